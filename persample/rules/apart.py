"""Rows of derived tensors that have an entry of their own for every sample, or belong to one sample alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Size, Tensor

from ..factors import Dense, Factors
from ..layout import Layout


@dataclass(frozen=True)
class Diagonal:
    """Rows of a derived tensor that has an entry of its own for every sample: row ``n`` is zero except at index
    ``place[n]`` of ``axis`` (by default ``n``), where it is ``value[n]``.
    """

    value: Tensor  # [N, *shape without axis]
    axis: int
    shape: Size
    place: Tensor | None = None  # [N]

    @property
    def places(self) -> Tensor:
        return torch.arange(len(self.value), device=self.value.device) if self.place is None else self.place

    def dense(self) -> Tensor:
        """``[N, *shape]``."""
        n = len(self.value)
        out = self.value.new_zeros(n, *self.shape)
        out.movedim(1 + self.axis, 1)[torch.arange(n, device=out.device), self.places] = self.value
        return out


@dataclass(frozen=True)
class Lone:
    """Rows of which only one is not zero: what a sample that was taken out of the batch leaves."""

    value: Tensor  # [*shape]
    sample: int
    n: int

    @property
    def shape(self) -> Size:
        return self.value.shape

    def dense(self) -> Tensor:
        """``[N, *shape]``."""
        out = self.value.new_zeros(self.n, *self.shape)
        out[self.sample] = self.value
        return out


def apart(value: Tensor, at: Layout) -> Diagonal | Dense:
    """Rows of a shared tensor whose entries along ``at.axis`` belong to one sample each; ``value`` is the sum of all
    rows.
    """
    if at.n == 1:
        return Dense(value.unsqueeze(0))
    pieces = value.movedim(at.axis, 0)
    if at.plain:
        return Diagonal(pieces, at.axis, value.shape)
    owner = at.owners().to(value.device)
    if at.owner is not None and len(owner) == at.n and len(owner.unique()) == at.n:
        place = owner.argsort()
        return Diagonal(pieces[place], at.axis, value.shape, place)
    rows = value.new_zeros(at.n, *value.shape)
    rows.movedim(1 + at.axis, 1)[owner, torch.arange(len(owner), device=value.device)] = pieces
    return Dense(rows)


Rowlike = Factors | Diagonal


def plain(rows: Rowlike | Lone) -> Factors:
    """Rows in one of the common forms."""
    return Dense(rows.dense()) if isinstance(rows, Diagonal | Lone) else rows
