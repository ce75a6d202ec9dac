"""The model as it is, but without dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import aten
from .capture import saves_elsewhere
from .errors import PersampleError
from .patched import unpatched
from .rules import DROPS


class RecomputedDropout(PersampleError):
    """Dropout that can't be switched off: a checkpoint runs it again in the backward, which no mode sees."""


class NoDropout(TorchFunctionMode):
    """Runs the model as it is, but with every dropout switched off; ``differentiated``: a backward follows."""

    def __init__(self, differentiated: bool = False) -> None:
        super().__init__()
        self.differentiated = differentiated

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        kwargs = dict(kwargs or {})
        if type(func) in aten.OPERATIONS and (run := aten.in_torch(func, args, kwargs)) is not None:
            with self:
                return run()
        if self.differentiated and (func in DROPS or func in _ALSO_DROP) and saves_elsewhere():
            raise RecomputedDropout
        if func in DROPS:
            return args[0] if args else kwargs["input"]
        if func is torch.native_dropout:
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        if (place := _DROPOUT_ARGUMENT.get(func)) is not None:
            args = args if len(args) <= place else (*args[:place], 0.0, *args[place + 1 :])
            kwargs.update({"dropout_p": 0.0} if len(args) <= place else {})
        if func in _RECURRENT:
            args = tuple(0.0 if isinstance(a, float) else a for a in args)  # the one float among them is the dropout
        return func(*args, **kwargs)


_DROPOUT_ARGUMENT = {
    nn.functional.scaled_dot_product_attention: 4,
    nn.functional.multi_head_attention_forward: 10,
}  # dropout_p
_RECURRENT = {getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_ALSO_DROP = {torch.native_dropout, *_DROPOUT_ARGUMENT, *_RECURRENT}
