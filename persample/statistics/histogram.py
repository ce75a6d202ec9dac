"""Histograms of all entries ``g_{i,d}`` of the per-sample gradients, one block of rows at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, QuantityError
from ..gradients import Gradients
from ..quantities import Quantities, add_up
from .accumulate import Accumulator, check_alike
from .parts import By, blocks, group_of, named


def histogram(
    G: Quantities,
    edges: Tensor,
    by: By = None,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    parameter_edges: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Counts ``[E + 1]`` of the entries of ``G`` between sorted ``edges [E]``, those below and above them included.

    Bin ``b`` counts ``edges[b-1] <= g < edges[b]``, so all counts add up to ``N D`` and nothing is lost.  With
    ``parameters`` (``{name: [*P]}``) and ``parameter_edges [F]``: ``[E + 1, F + 1]``, gradient entries against the
    parameters they belong to (the 2-D histograms of Schneider et al. 2021, "Cockpit").  Needs rows.
    """
    if not isinstance(G, Gradients):
        raise QuantityError("a histogram needs the rows: compute gradients without quantities=.")
    edges = _sorted(edges)
    if (parameters is None) != (parameter_edges is None):
        raise ArgumentError("parameters= and parameter_edges= go together.")
    if parameters is not None:
        _check_parameters(G, parameters)
    beside = None if parameter_edges is None else _sorted(parameter_edges)
    counts = {
        name: _counts(G, name, edges, None if parameters is None else parameters[name].detach(), beside)
        for name in G.names
    }
    if by is None:
        return add_up(counts.values())
    groups: dict[str, list[Tensor]] = {}
    for name, count in counts.items():
        groups.setdefault(group_of(name, by), []).append(count)
    return {group: add_up(parts) for group, parts in groups.items()}


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts that add up, ``{group: [E + 1]}``."""

    counts: dict[str, Tensor]

    def __add__(self, other: Counts) -> Counts:
        check_alike(self.counts, other.counts)
        return Counts({group: c + other.counts[group] for group, c in self.counts.items()})


class Histogram(Accumulator[Counts]):
    """Counts ``[E + 1]`` of all entries of all rows between ``edges``; see `histogram`.  ``{group: [E + 1]}`` with
    ``by``.  Needs rows.
    """

    kind = Counts

    def __init__(self, edges: Tensor, by: By = None) -> None:
        super().__init__()
        self.edges, self.by = _sorted(edges).clone(), by

    def of(self, G: Quantities) -> Counts:
        found = histogram(G, self.edges, self.by)
        return Counts(found if isinstance(found, dict) else {"": found})

    def compute(self) -> Any:
        """``[E + 1]``, or ``{group: [E + 1]}``."""
        counts = copy.deepcopy(self._seen().counts)
        return counts[""] if self.by is None else counts

    def _settings(self) -> dict[str, Any]:
        return {"by": named(self.by), "edges": self.edges.tolist()}


def _counts(G: Gradients, name: str, edges: Tensor, parameter: Tensor | None, beside: Tensor | None) -> Tensor:
    width = 1 if beside is None else len(beside) + 1
    total = torch.zeros((len(edges) + 1) * width, dtype=torch.int64, device="cpu")
    for _, rows in blocks(G, name):
        _check_ordered(f"rows of parameter '{name}'", rows)
        bins = _bins(rows, edges) * width
        if parameter is not None and beside is not None:
            bins += _bins(parameter.to(rows.device), beside)
        total += torch.bincount(bins.flatten(), minlength=len(total)).to(total.device)
    return total if beside is None else total.view(-1, width)


def _bins(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of every value, in a type of which edges are not rounded to that of the values."""
    kind = torch.promote_types(values.dtype, edges.dtype)
    return torch.bucketize(values.to(kind), edges.to(values.device, kind), right=True)


def _check_parameters(G: Gradients, parameters: Mapping[str, Tensor]) -> None:
    for name, shape in G.shapes.items():
        if name not in parameters:
            raise ArgumentError(f"parameters= has no '{name}', but G has rows of it: give all of {list(G.names)}.")
        if parameters[name].shape != shape:
            raise ArgumentError(
                f"parameters= has '{name}' of shape {list(parameters[name].shape)}, but its rows are {list(shape)}."
            )
        _check_ordered(f"parameter '{name}'", parameters[name])


def _check_ordered(what: str, values: Tensor) -> None:
    if values.is_complex():
        raise QuantityError(f"{what} are complex numbers, which have no order: take histograms of real ones, params=.")
    if bool(values.isnan().any()):
        raise QuantityError(f"{what} hold NaN, which is in no bin of a histogram.")


def _sorted(edges: Tensor) -> Tensor:
    """Edges, once they are; integers as float64, for half precision would round them."""
    plain = isinstance(edges, Tensor) and edges.ndim == 1 and len(edges) and not edges.is_complex()
    if not plain or bool(edges.isnan().any()) or not bool((edges.diff() > 0).all()):
        raise ArgumentError("the edges of a histogram must be one dimensional, real and strictly increasing.")
    return edges if edges.is_floating_point() else edges.double()
