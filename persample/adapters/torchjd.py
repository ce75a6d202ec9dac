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
    """Add ``w^T G`` to ``.grad``, with ``w = weighting(G G^T)``; returns ``w [N]``.  Never writes ``[N, D]``.

    Raises `ArgumentError` for an ``Aggregator``: what it makes of a Gram matrix has the shape of weights and isn't.
    """
    if _is("Aggregator", weighting):
        raise ArgumentError(
            f"{type(weighting).__name__} is an Aggregator, which maps the rows: give its Weighting of the Gram matrix "
            "(UPGradWeighting() for UPGrad()), or use aggregate(G, aggregator)."
        )
    weight = weighting(G.gram())
    if not isinstance(weight, Tensor):  # None would be the mean
        raise ArgumentError(f"weighting must return weights [N], a tensor, got {type(weight).__name__}.")
    G.backward(weight)
    return weight


def aggregate(G: Gradients, aggregator: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``A(G)``, ``{name: [*P]}``: what a TorchJD ``Aggregator`` makes of the rows ``[N, D]`` (which are written).

    Raises `ArgumentError` for a ``Weighting``, which maps the Gram matrix.
    """
    if _is("Weighting", aggregator):
        raise ArgumentError(
            f"{type(aggregator).__name__} is a Weighting: give an Aggregator (UPGrad() for UPGradWeighting()), or use "
            "backward(G, weighting)."
        )
    return unflatten(aggregator(G.flat()), G.shapes)


def _is(kind: str, given: object) -> bool:
    """Whether it is of TorchJD's class of that name, without a need of the library."""
    return any(c.__name__ == kind and c.__module__.startswith("torchjd") for c in type(given).__mro__)
