"""One sample alone, where PyTorch's own backward pass is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .followed import is_wrapped

NORMALISE = {
    F.batch_norm,
    F.instance_norm,
    torch.batch_norm,
    torch.instance_norm,
    torch.native_batch_norm,
    torch._batch_norm_impl_index,
}


def put_right(out: Any) -> None:
    """The backward pass of ``batch_norm`` (and ``instance_norm``, which calls it) on a CPU, in PyTorch 2.13, takes the
    gradient of a single image that lies channels last, as that of tokens ``flatten(2).mT`` does, for one that lies
    like the input, and returns numbers of other places.  Have it come in order.
    """
    x = out[0] if isinstance(out, tuple) else out
    if isinstance(x, Tensor) and x.requires_grad and x.ndim > 3 and len(x) == 1 and not is_wrapped([x]):
        x.register_hook(Tensor.contiguous)


SOLVES = {torch.linalg.solve, torch.linalg.solve_ex}


def broadcast(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, with one matrix for many right-hand sides repeated for each: PyTorch's vmap of ``solve``
    takes the axis of the samples for one of theirs (in 2.13), and returns something of another shape.
    """
    if func in SOLVES and len(args) > 1 and isinstance(args[0], Tensor) and args[0].ndim < args[1].ndim:
        a, b, *rest = args
        return (a.expand(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:]), b, *rest)
    return args


class Mapped(TorchFunctionMode):
    """Inside of vmap: what it gets wrong is written in another way."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*broadcast(func, args), **kwargs or {})
