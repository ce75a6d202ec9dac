"""The forward hooks by which a model tells its recorder that it runs; they stay behind when the model is copied."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .recorder import Recorder


class Hook:
    """A forward hook that stays behind when the model is copied or pickled."""

    def __init__(self, recorder: Recorder | None, method: str) -> None:
        self.recorder, self.method = recorder, method
        self.__name__ = f"persample{method}"  # some who list hooks ask for it

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None, *output: Any) -> None:
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
        """A copy's hooks take themselves off at the first call (those of further recorders are called once more)."""
        for hooks in _kept_by(module):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and hook.recorder is None]:
                for kept in _kept_by(module):
                    kept.pop(key, None)

    @staticmethod
    def attach(recorder: Recorder, module: nn.Module) -> list[RemovableHandle]:
        """Before and after every forward."""
        handles = [
            module.register_forward_pre_hook(Hook(recorder, "_before"), prepend=True, with_kwargs=True),
            module.register_forward_hook(Hook(recorder, "_after"), with_kwargs=True, always_call=True),
        ]
        for (
            handle
        ) in handles:  # torch counts from 0 in every process: a hook that the user gives to a pickled copy there
            number, handle.id = handle.id, secrets.randbits(62)  # would get the number, and the flags, of one of these
            for kept in _kept_by(module):
                if number in kept:
                    kept[handle.id] = kept.pop(number)
        module._forward_pre_hooks.move_to_end(handles[0].id, last=False)  # type: ignore[attr-defined]
        return handles

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(None, self.method)

    def __reduce__(self) -> Any:
        return (Hook, (None, self.method))


def _kept_by(module: nn.Module) -> list[dict[int, Any]]:
    """Where a module keeps forward hooks, and how they are to be called."""
    return [
        module._forward_pre_hooks,
        module._forward_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
