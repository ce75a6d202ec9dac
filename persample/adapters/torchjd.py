"""TorchJD: per-sample losses as objectives.

A ``Weighting`` maps the Gram matrix ``K = G G^T`` to weights ``w``, and the update is ``w^T G``; an ``Aggregator``
maps the rows themselves.  TorchJD's Jacobians are of unscaled losses, as are the rows here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..curvature.operator import unflatten
from ..errors import ArgumentError
from ..gradients import Gradients


def backward(G: Gradients, weighting: Callable[[Tensor], Tensor]) -> Tensor:
    """Add ``w^T G`` to ``.grad``, with ``w = weighting(G G^T)``; returns ``w [N]``.  Never writes ``[N, D]``."""
    weight = weighting(G.gram())
    if not isinstance(weight, Tensor):  # None would be the mean
        raise ArgumentError(f"weighting must return weights [N], a tensor, got {type(weight).__name__}.")
    G.backward(weight)
    return weight


def aggregate(G: Gradients, aggregator: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``A(G)``, ``{name: [*P]}``: what a TorchJD ``Aggregator`` makes of the rows ``[N, D]`` (which are written)."""
    return unflatten(aggregator(G.flat()), G.shapes)
