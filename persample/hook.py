"""The forward hooks by which a model tells its recorder that it runs; they stay behind when the model is copied."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .recorder import Recorder


class Hook:
    """A forward hook that stays behind when the model is copied or pickled."""

    def __init__(self, recorder: Recorder | None, method: str) -> None:
        self.recorder, self.method = recorder, method
        self.__name__ = f"persample{method}"  # some who list hooks ask for it

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if "torch._dynamo" in sys.modules:  # a model that was compiled in place would have its hooks compiled, too
            torch.compiler.disable(Hook._act)(self, module, args, kwargs, *output)
        else:
            self._act(module, args, kwargs, *output)

    def _act(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if self.recorder is None:
            self._leave(module)
        elif self.recorder._asleep:
            return
        elif self.method == "_before":
            self.recorder._before(args, kwargs)
        else:
            self.recorder._after(*output)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While the library makes passes of its own over an extended model, the user's recorder does not listen."""
        if (recorder := self.recorder) is None:
            yield
            return
        mine = recorder._thread == threading.get_ident()
        capture, asleep = recorder._capture if mine else None, recorder._asleep
        active = capture is not None and capture.active
        recorder._asleep = True
        if capture is not None:
            capture.active = False
        try:
            yield
        finally:
            recorder._asleep = asleep
            if capture is not None:
                capture.active = active

    def _leave(self, module: nn.Module) -> None:
        """A copy's hook takes itself off at the first call."""
        hooks = module._forward_pre_hooks if self.method == "_before" else module._forward_hooks
        for key in [k for k, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(None, self.method)

    def __reduce__(self) -> Any:
        return (Hook, (None, self.method))
