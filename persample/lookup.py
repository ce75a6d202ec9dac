"""Sums of rows of a table (`Rows`), reduced without forming ``[N, V, D]``.

A sample that looks up an entry several times adds up there, so what is not linear in ``G`` needs these sums first: one
row for every pair of a sample and an entry that it looked up.  There are at most ``N T`` of them, however large the
table; on other devices than the CPU as many are reserved, as the host would have to wait for the number.  Inner
products of all samples do so.  Rows are read by `index_select`, several times as fast as indexing on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import cost, doubt
from .factors import Rows
from .scratch import zeros


@dataclass(frozen=True)
class Entries:
    """The rows of ``G`` that are not zero: row ``r`` belongs to a sample and an entry."""

    sample: Tensor  # [R]
    entry: Tensor  # [R]
    value: Tensor  # [R, D]
    real: Tensor  # [R]: the others only fill up, with values of zero


def entries(g: Rows) -> Entries:
    """As few as there are, unless a device would be waited for to know how many."""
    return by_sample(g) if doubt.waits(g.index.device) else by_entry(g)


def by_entry(g: Rows) -> Entries:
    """Ordered by table entry first, and nothing to fill up."""
    n = len(g)
    key = g.index.long() * n + torch.arange(n, device=g.index.device).unsqueeze(1)
    found, place = torch.unique(key.flatten(), return_inverse=True)
    value = g.value.new_zeros(len(found), g.shape[1]).index_add_(0, place, g.value.flatten(0, 1))
    entry = torch.div(found, max(1, n), rounding_mode="floor")
    return Entries(found - entry * n, entry, value, torch.ones_like(found, dtype=torch.bool))


def by_sample(g: Rows) -> Entries:
    """Ordered by sample, then by entry, ``T`` for every sample: where it looked up fewer, its last one fills up."""
    (n, t), index = g.index.shape, g.index.long()
    index, order = index.sort(dim=1)
    new = torch.ones_like(index)
    new[:, 1:] = index[:, 1:] != index[:, :-1]
    place = new.cumsum(1).sub_(1)  # of each token of the sorted ones, among those of its sample that differ
    entry = index[:, -1:].repeat(1, t).scatter_(1, place, index)
    rows = torch.arange(n, device=index.device).unsqueeze(1)
    target = torch.empty_like(place).scatter_(1, order, place + rows * t)
    value = g.value.new_zeros(n * t, g.shape[1]).index_add_(0, target.flatten(), g.value.flatten(0, 1))
    real = torch.arange(t, device=index.device) <= place[:, -1:]
    return Entries(rows.expand(n, t).flatten(), entry.flatten(), value, real.flatten())


def weighted_sum(g: Rows, weight: Tensor | None) -> Tensor:
    """``weight^T G``, ``[V, D]``."""
    value = g.value if weight is None else g.value * weight.view(-1, 1, 1)
    return zeros(value, *g.shape).index_add_(0, g.index.flatten(), value.flatten(0, 1))


def norms(g: Rows) -> Tensor:
    """Squared norms of the rows of ``G``, ``[N]``."""
    e = entries(g)
    squares: Tensor = torch.linalg.vector_norm(e.value, dim=1).square_()
    return squares.new_zeros(len(g)).index_add_(0, e.sample, squares)


def square_sum(g: Rows) -> Tensor:
    """``1^T (G o G)``, ``[V, D]``."""
    e = entries(g)
    return zeros(e.value, *g.shape).index_add_(0, e.entry, e.value.square_())


def moments(g: Rows) -> tuple[Tensor, Tensor]:
    """Sum and centred sum of squares; a sample that did not look an entry up counts as zero there."""
    e = entries(g)
    total = zeros(e.value, *g.shape).index_add_(0, e.entry, e.value)
    return total, zeros(e.value, *g.shape).index_add_(0, e.entry, _gaps(e, len(g), total))


def centred(g: Rows) -> Tensor:
    """The second one of `moments`, in the memory that held the first."""
    e = entries(g)
    found = zeros(e.value, *g.shape).index_add_(0, e.entry, e.value)
    gaps = _gaps(e, len(g), found)
    return found.index_fill_(0, e.entry, 0).index_add_(0, e.entry, gaps)


def _gaps(e: Entries, n: int, total: Tensor) -> Tensor:
    """What each row adds to the centred squares of its entry, ``[R, D]``, with a share of the samples that have none
    there; overwrites the rows.
    """
    count = e.value.new_zeros(len(total)).index_add_(0, e.entry, e.real.to(e.value.dtype))
    share = count.neg().add_(n).div_(count.clamp_(min=1)).unsqueeze(1)
    step = cost.chunk(total.shape[1], cost.costs().block // 4)  # two of them live at a time
    for i in range(0, len(e.entry), step):
        entry, value, real = (x[i : i + step] for x in (e.entry, e.value, e.real))
        mean = total.index_select(0, entry).div_(n)
        others = share.index_select(0, entry)
        value.sub_(mean).square_().addcmul_(mean.square_(), others).mul_(real.unsqueeze(1))
    return e.value


def dot(g: Rows, v: Tensor) -> Tensor:
    """``G v``, ``[N]``."""
    return v.index_select(0, g.index.flatten()).view(g.value.shape).mul_(g.value).flatten(1).sum(1)


def project(g: Rows, matrix: Tensor) -> Tensor:
    """``G R``, ``[N, k]``, for ``R [V, D, k]``: by the entries that were looked up."""
    e = entries(g)
    found = matrix.new_zeros(len(g), matrix.shape[2])
    step = cost.chunk(matrix.shape[1:].numel())
    for i in range(0, len(e.entry), step):
        at = slice(i, i + step)
        columns = matrix.index_select(0, e.entry[at])
        found.index_add_(0, e.sample[at], torch.bmm(e.value[at].unsqueeze(1), columns).squeeze(1))
    return found


def row_dot(a: Rows, b: Rows) -> Tensor:
    """``diag(A B^T)``, ``[N]``: over the entries that a sample looked up in both."""
    n, (x, y) = len(a), (by_sample(a), by_sample(b))
    key, other = (e.sample * a.shape[0] + e.entry for e in (x, y))
    if not len(key) or not len(other):
        return x.value.new_zeros(n)
    place = torch.searchsorted(other, key).clamp_(max=len(other) - 1)  # the first: what fills up comes later
    products = y.value.index_select(0, place).mul_(x.value).sum(1)
    return torch.where(other[place] == key, products, 0).view(a.index.shape).sum(1)


def gram(a: Rows, b: Rows) -> Tensor:
    """``A B^T``, ``[N, M]``: per table entry, the products of all samples that looked it up.

    Entries with about as many samples (within a factor of two) are multiplied together, padded by zeros.
    """
    x = by_entry(a)
    y = x if b is a else by_entry(b)
    found = x.value.new_zeros(len(a) * len(b))
    counts = [torch.bincount(e.entry, minlength=a.shape[0]) for e in (x, y)]
    starts = [count.cumsum(0) - count for count in counts]
    most = torch.maximum(*counts) * (torch.minimum(*counts) > 0)
    used = most.nonzero().squeeze(1)
    level = torch.frexp((most[used] - 1).double()).exponent  # up to 1, 2, 4, 8, ... samples
    for width, group in ((1 << at, used[level == at]) for at in level.unique().tolist()):
        for chosen in group.split(cost.chunk(width * a.shape[1])):
            rows, n = _padded(x, starts[0][chosen], counts[0][chosen])
            cols, m = (rows, n) if y is x else _padded(y, starts[1][chosen], counts[1][chosen])
            place = n.unsqueeze(2) * len(b) + m.unsqueeze(1)
            found.index_add_(0, place.flatten(), torch.bmm(rows, cols.mT).flatten())
    return found.view(len(a), len(b))


def _padded(e: Entries, start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of some entries side by side, ``[B, M, D]``, zeros after the last, and their samples, ``[B, M]``."""
    offset = torch.arange(int(count.max()), device=start.device)
    inside = offset < count.unsqueeze(1)
    place = torch.where(inside, start.unsqueeze(1) + offset, 0)
    rows = e.value.index_select(0, place.flatten()).view(*place.shape, -1)
    return rows.masked_fill_(~inside.unsqueeze(2), 0), torch.where(inside, e.sample[place], 0)  # not times zero: NaN
