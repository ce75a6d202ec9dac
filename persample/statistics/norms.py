"""The norm of every row of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, QuantityError
from ..quantities import Quantities
from .accumulate import Accumulator, check_alike
from .parts import By, check_measured, named, per_group, squares


@dataclass(frozen=True, eq=False)
class Listed:
    """Numbers per sample, and the samples' ids where they are known."""

    values: dict[str, Tensor]  # {group: [n]}
    ids: Tensor | None  # [n]

    def __add__(self, other: Listed) -> Listed:
        if (self.ids is None) != (other.ids is None):
            raise QuantityError("some norms came with ids and some without: give ids to all updates, or to none.")
        check_alike(self.values, other.values)
        ids = None if self.ids is None or other.ids is None else torch.cat([self.ids, other.ids])
        return Listed({group: torch.cat([v, other.values[group]]) for group, v in self.values.items()}, ids)


class Norms(Accumulator[Listed]):
    """``[n]``: the norm of every row of a data set, in the order of the samples' ids, else in that of arrival.

    Give ``update(G, ids)`` the samples' numbers ``[N]`` where the loader shuffles or several workers are merged: the
    result is then the same for every order, and a sample that is counted twice is an error.  ``{group: [n]}`` with
    ``by``. Needs ``quantities=["norm"]``. The mean of the norms over a few models is GraNd (Paul et al. 2021, "Deep
    learning on a data diet").
    """

    needs = ("norm",)
    kind = Listed

    def __init__(self, by: By = None) -> None:
        super().__init__()
        self.by = by

    def of(self, G: Quantities, ids: Tensor | None = None) -> Listed:
        check_measured(G)
        norms = per_group(self.by, torch.sqrt, squares(G))
        if ids is not None and (
            not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool
        ):
            got = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
            raise ArgumentError(f"ids must be a tensor of integers [{len(G)}], got {got}: torch.tensor(ids).")
        if ids is not None and ids.shape != (len(G),):
            raise QuantityError(f"ids must have shape [{len(G)}], one per sample, got {list(ids.shape)}.")
        return Listed(norms if isinstance(norms, dict) else {"": norms}, None if ids is None else ids.clone())

    def update(self, G: Quantities, ids: Tensor | None = None) -> None:
        """Add one batch, of the samples ``ids [N]``."""
        self._add(self.of(G, ids))

    def compute(self) -> Any:
        """``[n]``, or ``{group: [n]}``."""
        seen = self._seen()
        values = {group: v.clone() for group, v in seen.values.items()}
        if seen.ids is not None:
            ids, order = seen.ids.sort()
            if bool((ids.diff() == 0).any()):
                raise QuantityError(f"sample {int(ids[:-1][ids.diff() == 0][0])} was counted more than once.")
            values = {group: v[order] for group, v in values.items()}
        return values[""] if self.by is None else values

    def _settings(self) -> dict[str, Any]:
        return {"by": named(self.by)}
