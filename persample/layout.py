"""Where the samples of a batch lie inside a tensor.

A tensor that depends on samples carries a `Layout`.  Its axis has ``outer * N * inner`` entries, and entry ``i``
belongs to sample ``(i // inner) % N``: batch-first (``axis=0``), sequence-first (``axis=1``), flattened tokens
(``inner=T``), heads folded into the batch (``inner=heads``) are all of this kind.  Where rows were picked by an index
(packed sequences, experts that see some of the tokens), ``owner`` says to which sample each entry belongs; -1 is
nobody, which only integers can be.  In a loop over the samples (``for x in batch``), tensors are one sample's alone.
How operations move samples is in `persample.propagate`; an `Operation` is one call, as all look at it who follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import SampleAxisError


@dataclass(frozen=True)
class Layout:
    """Entry ``i`` of ``axis`` belongs to sample ``owner[i]``, by default ``(i // inner) % N``."""

    n: int
    axis: int = 0
    outer: int = 1
    inner: int = 1
    owner: Tensor | None = None  # [size]
    alone: int | None = None  # all of the tensor is this sample's, which is on no axis of its own

    @property
    def size(self) -> int:
        """How many entries the axis has."""
        return self.outer * self.n * self.inner if self.owner is None else len(self.owner)

    @property
    def plain(self) -> bool:
        """Whether each sample has exactly one entry, in order."""
        return self.owner is None and self.alone is None and self.outer == self.inner == 1

    def placed(self, axis: int) -> Layout:
        """The same samples on another axis."""
        if axis == self.axis:
            return self
        return Layout(self.n, axis, self.outer, self.inner, self.owner, self.alone)

    def fits(self, shape: Sequence[int], axis: int) -> bool:
        return self.alone is None and -len(shape) <= axis < len(shape) and shape[axis] == self.size

    def owners(self) -> Tensor:
        """The sample of every entry, ``[size]``."""
        if self.owner is not None:
            return self.owner
        if self.alone is not None:
            return torch.tensor([self.alone], device="cpu")
        return torch.arange(self.n, device="cpu").repeat_interleave(self.inner).repeat(self.outer)


Function = Callable[..., Any]
Sampled = Sequence[tuple[Tensor, Layout]]


@dataclass(slots=True)
class Operation:
    """A function of torch with its arguments: what everybody looks at who wants to know what it does to the samples."""

    func: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()
    sampled: Sequence[tuple[Tensor, Layout | None]] = ()  # those that depend on samples; ``None``: somewhere in them
    known: Sampled = ()  # those whose layout is known
    seen: Callable[[], Iterable[Layout]] = tuple  # the layouts of what was computed before

    @property
    def lost(self) -> bool:
        """Whether there are samples of which it isn't known where they are (scores of all samples against all)."""
        return len(self.known) < len(self.sampled)

    def given(self, place: int, *names: str, default: Any = None) -> Any:
        """An argument by one of its names, or at its place."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[place] if len(self.args) > place else default

    def of(self, x: Any) -> Layout | None:
        """Where the samples are in one of the arguments."""
        return next((at for y, at in self.known if y is x), None)

    def again(self, first: Any) -> Any:
        """The same, done to another first argument."""
        return self.func(first, *self.args[1:], **self.kwargs)


def spreads(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two tensors with as many entries (``[N, 1]`` and ``[N]``) broadcast to more than they have, so that an
    operation on both compares samples with each other.
    """
    if len(a) == len(b) or prod(a) != prod(b):
        return False
    try:
        size: torch.Size = torch.broadcast_shapes(a, b)
        return prod(size) > prod(a)
    except RuntimeError:
        return False


def samples_first(x: Tensor, layout: Layout) -> Tensor:
    """``[N, k, *rest]``: the entries of every sample, in order; ragged ones are filled up with zeros."""
    if layout.alone is not None:
        out = x.new_zeros(layout.n, 1, *x.shape)
        out[layout.alone, 0] = x
        return out
    if layout.axis != 0:
        x = x.movedim(layout.axis, 0)
    if layout.plain:
        return x.unsqueeze(1)
    if layout.owner is None:
        x = x.unflatten(0, (layout.outer, layout.n, layout.inner))
        return x.transpose(0, 1).flatten(1, 2)
    owner = layout.owner.to(x.device)
    if len(owner) and int(owner.min()) < 0:
        raise SampleAxisError(
            f"some entries of a tensor of shape {tuple(x.shape)} belong to no sample, as nothing of any was put there "
            "(the end of a constant that samples were put into by an index). Cut them off before, or use engine='loop'."
        )
    rank = ranks(owner)
    out = x.new_zeros(layout.n, int(rank.max()) + 1 if len(owner) else 0, *x.shape[1:])
    out[owner, rank] = x
    return out


def ranks(owner: Tensor) -> Tensor:
    """Of every entry, how many of the same sample come before it."""
    count, order = torch.bincount(owner), owner.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner[order]]
    return rank


def one_sample(x: Tensor, layout: Layout, n: int) -> Tensor:
    """What belongs to sample ``n``: a slice along the layout's axis that keeps the axis."""
    if layout.alone is not None:
        return x if layout.alone == n else x.new_zeros(0)
    if layout.plain:
        return x.narrow(layout.axis, n, 1)
    return x.index_select(layout.axis, (layout.owners() == n).nonzero().squeeze(1).to(x.device))


def only(layout: Layout | None) -> int | None:
    """The one sample among several to which all entries belong (``x[n]``, ``x[n : n + 1]``), if there is one."""
    if layout is None or layout.owner is None or not len(layout.owner):
        return None if layout is None else layout.alone
    first = int(layout.owner[0])
    return first if layout.n > 1 and first >= 0 and bool((layout.owner == first).all()) else None


def of_one(sampled: Sequence[tuple[Tensor, Layout | None]]) -> int | None:
    """The one sample among several to which all these tensors belong, if there is one."""
    first = only(sampled[0][1])
    return first if first is not None and all(only(at) == first for _, at in sampled[1:]) else None


def same(a: Layout, b: Layout) -> bool:
    """Whether every entry belongs to the same sample."""
    if a.alone is not None or b.alone is not None:
        return only(a) == only(b)
    if a.owner is None and b.owner is None:
        return (a.outer, a.inner) == (b.outer, b.inner) or a.n == 1
    return a.size == b.size and torch.equal(a.owners().cpu(), b.owners().cpu())


def merged(a: Layout, b: Layout) -> Layout | None:
    """The same samples, those of one where entries of the other are nobody's; ``None`` where those of two meet."""
    if a.axis == b.axis and same(a, b):
        return a
    if a.alone is not None or b.alone is not None or (a.axis, a.size) != (b.axis, b.size):
        return None
    x, y = a.owners().cpu(), b.owners().cpu()
    if not bool(((x == y) | (x < 0) | (y < 0)).all()):
        return None
    return owned(a.n, a.axis, torch.where(x < 0, y, x))


def owned(n: int, axis: int, owner: Tensor) -> Layout:
    """The layout in which entry ``i`` belongs to sample ``owner[i]``: a regular one if that can be."""
    size = len(owner)
    if size and size % n == 0 and int(owner[0]) == 0:
        inner = size if n == 1 else int((owner != 0).to(torch.uint8).argmax())
        if inner and size % (n * inner) == 0:
            regular = Layout(n, axis, size // (n * inner), inner)
            if torch.equal(regular.owners(), owner.cpu()):
                return regular
    return Layout(n, axis, owner=owner)


def kept(layout: Layout, ndim: int, shape: Sequence[int], broadcast: bool = False) -> Layout | None:
    """The samples of an argument found again in an output of this shape."""
    aligned = layout.axis + len(shape) - ndim  # broadcasting aligns at the right
    for axis in (aligned, layout.axis) if broadcast and len(shape) > ndim else (layout.axis, aligned):
        if axis >= 0 and layout.fits(shape, axis):
            return layout.placed(axis)
    places = [axis for axis in range(len(shape)) if layout.fits(shape, axis)]
    return layout.placed(places[0]) if len(places) == 1 else None
