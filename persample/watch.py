"""What engines that run samples alone have to look out for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import aten, rules
from .calls import arguments, behind, function_name, tensors_in
from .errors import NOTIONS, BatchCoupledError, CaptureError
from .followed import is_wrapped
from .lone import NORMALISE, broadcast, put_right
from .patched import unpatched


class Watch(TorchFunctionMode):
    """For engines that run samples alone: raises where that would be another function, or miss a parameter."""

    def __init__(self, hidden: Mapping[int, str] | None = None, shared: Iterable[tuple[str, Tensor]] = ()) -> None:
        """``hidden``: parameters (by id) that must not be used as they are, because functional copies stand for
        them; ``shared``: names and tensors without samples, on which statistics couple nothing (standardised weights).
        """
        super().__init__()
        self.hidden = hidden or {}
        self.shared: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self.share(shared)

    def share(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """These have no samples, nor has what is computed from them alone."""
        self.shared.update((id(t), (name, weakref.ref(t))) for name, t in named)

    def _name(self, t: Tensor) -> str | None:
        """Of a tensor without samples: what it is called, ``""`` for what was computed from such."""
        name, ref = self.shared.get(id(t), ("", None))
        return name if ref is not None and ref() is t else None

    def _hidden(self, t: Tensor) -> str | None:
        """The name of a hidden parameter that ``t`` is, or was computed from; what torch.func has wrapped of copies
        has no graph.
        """
        while is_wrapped([t]):  # a transform inside the model wraps parameters, too
            t = torch._C._functorch.get_unwrapped(t)
        if id(t) in self.hidden or t.grad_fn is None:
            return self.hidden.get(id(t))
        return next((self.hidden[id(leaf)] for leaf in behind(t)[1] if id(leaf) in self.hidden), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        kwargs = kwargs or {}
        if type(func) in aten.OPERATIONS and (run := aten.in_torch(func, args, kwargs)) is not None:
            with self:
                return run()
        names = [self._name(t) for t in arguments(args, kwargs)] if self.shared else []
        shared = bool(names) and None not in names
        if (reason := rules.coupling(func, args, kwargs)) and not shared:
            where = next((f" (with '{name}')" for name in names if name), "")
            raise BatchCoupledError(
                f"{function_name(func)}{where} {reason}, so a sample alone is another function than a sample of this "
                f"batch. Of persample.gradients, use engine='hooks'. {NOTIONS}"
            )
        if self.hidden:
            for t in arguments(args, kwargs):
                if name := self._hidden(t):
                    raise CaptureError(
                        f"parameter '{name}' is used through a reference of its own, or through a value that was "
                        "computed from it beforehand, not through the model's attribute, so torch.func does "
                        "not see it. Refer to it as model.<name> (also in loss_fn), or use engine='loop' (of "
                        "persample.gradients also 'hooks')."
                    )
        out = func(*broadcast(func, args), **kwargs)
        if func in NORMALISE:
            put_right(out)
        if shared:
            self.share(("", t) for t in tensors_in(out))
        return out
