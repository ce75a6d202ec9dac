"""What rounding may do to rows and losses: how close numbers have to be that are held against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .patched import unpatched

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of a row's norm; half precision: 0.2
LOSS = {**TOLERANCE, torch.float32: 1e-3}  # of a loss, in which no ReLU turns the other way
# Where a part of the numbers goes through a coarser type: a few roundings of it.
INNER = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

_INSIDE: ContextVar[frozenset[torch.dtype]] = ContextVar("inside", default=frozenset())


def tolerance(*dtypes: torch.dtype, of: Mapping[torch.dtype, float] = TOLERANCE) -> float:
    """That of the coarsest type that takes part, autocast included."""
    cast = [torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    inner = [INNER.get(d, 1e-2) for d in _INSIDE.get()]
    return max(*inner, *(of.get(d.to_real(), 0.2) for d in (*dtypes, *cast)), 0.0)


def slack(dtype: torch.dtype) -> float:
    """Of all rows together: what rounding may do to a parameter whose own gradient is tiny."""
    return 1e-5 if dtype.to_real() is torch.float64 else 1e-3


@contextmanager
def computing_in(types: frozenset[torch.dtype]) -> Iterator[None]:
    """Numbers that are compared inside went through these types on their way."""
    token = _INSIDE.set(types)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def inside() -> bool:
    """Whether it is said which types numbers went through."""
    return bool(_INSIDE.get())


class Types(TorchFunctionMode):
    """The floating types of all that is differentiable among the results of calls (``.float()`` in a double model)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        out = func(*args, **(kwargs or {}))
        self.seen.update(x.dtype.to_real() for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)
        return out
