"""What scores are given: gradients, or features ``[n, k]``; looked at, and in a type that sums can be taken in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantityError
from ..quantities import Quantities

Features = Quantities | Tensor


def both(train: Tensor, test: Tensor, project: bool = False) -> tuple[Tensor, Tensor]:
    """Features of one type, with as many columns each."""
    a, b = wide(train, "train", project), wide(test, "test", project)
    if a.shape[1] != b.shape[1]:
        raise QuantityError(
            f"train has {a.shape[1]} features and test {b.shape[1]}: give rows of the same parameters, or of the same "
            "projection."
        )
    kind = torch.promote_types(a.dtype, b.dtype)
    return a.to(kind), b.to(kind)


def wide(features: Any, what: str, project: bool = False) -> Tensor:
    """Features ``[n, k]``, of at least float32: sums of half precision overflow, and small squares vanish."""
    if not isinstance(features, Tensor):
        hint = "; of gradients G: G.project(Projection(k))" if project else ""
        hint = "; of a store, store.rows()" if hasattr(features, "rows") else hint
        raise QuantityError(f"{what} must be features [n, k], a tensor, got {type(features).__name__}{hint}.")
    if features.ndim != 2 or not features.shape[1] or not features.dtype.is_floating_point:
        real = " Of complex rows, give torch.view_as_real(rows).flatten(1)." if features.is_complex() else ""
        raise QuantityError(
            f"{what} must be real features [n, k], got {features.dtype} of shape {list(features.shape)}.{real}"
        )
    return features.to(torch.promote_types(features.dtype, torch.float32))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, or 0; first of largest entry 1, as squares of very small or large ones are 0 or infinite."""
    for order in (math.inf, 2):
        size = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
        rows = torch.where(size == 0, 0.0, rows / size)
    return rows


def check_finite(**given: Tensor) -> None:
    for what, x in given.items():
        if not x.isfinite().all():
            raise QuantityError(
                f"{what} holds numbers that are infinite or NaN: features that overflowed (take a higher precision), "
                "or gradients of losses that are."
            )
