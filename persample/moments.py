"""First and second moments of the rows, in parameter space: what is written block by block.

Rows are squared, or centred, as they stream by, each block in cache.  Centring never takes the difference of large sums
unchecked: a block is centred on its own mean and merged with what came before by the distance of the means (Welford
1962; Chan, Golub, LeVeque 1983), so that centred squares are sums of squares, and can't be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import across, cost, lookup, tokens
from .doubt import doubtful
from .factors import Conv, Dense, Factors, Outer, Pulled, Rows, dtype, tensors
from .scratch import borrow, fresh, kernel, zeros
from .streaming import Piece, blocks, chunks, cuts, joined, pieces, split_of, streamed, wide


@kernel
def square_sum(g: Factors) -> Tensor:
    """``1^T (G o G)``, ``[*P]``: the second moment, not divided by ``N``; of absolute values, if they are complex."""
    if dtype(g).is_complex:
        return square_sum(wide(g)).sum(-1)
    g = wide(g)
    match g:
        case Dense(value) if _small(value):
            return value.square().sum(0)
        case Rows():
            return lookup.square_sum(g)
        case Outer(left) if left.shape[2] == 1:
            return tokens.square_sum(g).view(g.shape)
        case Outer() if _how(g) == "pairs":
            return _pair_moments(g)
        case Conv() if _how(g) != "stream":
            (found,) = [square_sum(piece) for piece in pieces(g, "tokens")]
            return found.view(g.shape)
        case Pulled(rows, Tensor() as back):
            return square_sum(rows) * back.square()
        case Pulled() if across.has_products(g):
            return across.squares(g, centred=False)
        case _:
            return _accumulated(g, _add_squares, 1)[0]


@kernel
def moments(g: Factors) -> tuple[Tensor, Tensor]:
    """``1^T G`` and ``sum_n (G_n - mean)^2``, both ``[*P]``, not divided by ``N``; the latter is never negative.

    Of complex rows, the squares are those of absolute values.
    """
    if dtype(g).is_complex:
        total, square = moments(wide(g))
        return torch.view_as_complex(total), square.sum(-1)
    g = wide(g)
    match g:
        case Dense(value) if _small(value):
            total = value.sum(0)
            return total, (value - total / max(1, len(g))).square_().sum(0)
        case Rows():
            return lookup.moments(g)
        case Outer(left, right) if _how(g) == "products":
            total = fresh(right, left.shape[1], left.shape[3], right.shape[3])
            return total.view(g.shape), _product_moments(g, total)
        case Outer() if _how(g) == "pairs":
            total = tokens.weighted_sum(g, None)
            return total.view(g.shape), _pair_moments(g, total)
        case Conv() if _how(g) != "stream":
            (both,) = [moments(piece) for piece in pieces(g, "tokens")]
            return both[0].view(g.shape), both[1].view(g.shape)
        case Pulled(rows, Tensor() as back):
            total, square = moments(rows)
            return total * back, square * back.square()
        case Pulled() if across.has_products(g):
            total = tensors(g)[-1].new_empty(g.shape)
            return total, across.squares(g, total, centred=True)
        case _:
            mean, square = _accumulated(g, _merge, 2)
            return mean * len(g), square


@kernel
def centred(g: Factors) -> Tensor:
    """``sum_n (G_n - mean)^2``, ``[*P]``: the second one of `moments`, in less memory."""
    if dtype(g).is_complex:
        return centred(wide(g)).sum(-1)
    g = wide(g)
    match g:
        case Rows():
            return lookup.centred(g)
        case Outer() if _how(g) == "products":
            return _product_moments(g)
        case Pulled(rows, Tensor() as back):
            return centred(rows) * back.square()
        case Pulled() if across.has_products(g):
            return across.squares(g, centred=True)
        case _:
            return moments(g)[1]


def _how(g: Outer | Conv) -> str:
    """Of a convolution: whether that many positions are as good as tokens, and fit when they are unfolded."""
    if isinstance(g, Outer):
        return cost.outer_moments(len(g), g.left.shape[2])
    positions, channels = g.grad.shape[2:].numel(), g.shape[1]
    unfolded = len(g) * positions * g.geometry.groups * channels * g.geometry.offsets
    if g.geometry.deep or unfolded > max(cost.costs().wide, 2 * g.shape.numel()) or split_of(g) != "tokens":
        return "stream"
    return cost.outer_moments(len(g), positions)


def _small(value: Tensor) -> bool:
    return value.numel() <= cost.costs().block // 8


def _accumulated(g: Factors, take: Callable[..., None], count: int) -> list[Tensor]:
    """``[*P]`` each, filled by ``take(piece, samples so far, *totals)``, a row of ``[lanes, P]`` for each lane."""
    split, totals = split_of(g), list[list[Tensor]]()
    for at, part in chunks(g, split):
        for number, piece in enumerate(pieces(part, split)):
            if not at.start:
                like, size = tensors(g)[-1], piece.shape.numel()
                known = not isinstance(g, Dense | Pulled)  # which thread wrote the rows
                lanes = cost.lanes(like, len(g), size) if known else 1
                totals.append([zeros(like, lanes, size) for _ in range(count)])
            take(piece, at.start, *totals[number])
    if not totals:
        return [tensors(g)[-1].new_zeros(g.shape) for _ in range(count)]
    found = [_together(len(g), *parts) for parts in totals]
    return [joined(list(parts), split, g.shape) for parts in zip(*found, strict=True)]


def _together(n: int, *totals: Tensor) -> tuple[Tensor, ...]:
    """The totals of all lanes in one, ``[P]``: sums of squares, or means and the squares centred on them."""
    if len(totals) == 1:
        return (totals[0].sum(0) if len(totals[0]) > 1 else totals[0][0],)
    (mean, *means), (square, *squares) = totals
    lanes = len(totals[0])
    done = -(-n // lanes)
    for lane, (other, more) in enumerate(zip(means, squares, strict=True), 1):
        if own := n // lanes + (lane < n % lanes):
            gap = other.sub_(mean)
            mean.add_(gap, alpha=own / (done + own))
            square = square.add(more).addcmul_(gap, gap, value=done * own / (done + own))  # lives on; lanes don't
            done += own
    return mean, square


def _dealt(rows: Tensor, before: int, lanes: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Rows ``[n, P]`` dealt out to lanes, with how many each of these lanes had: to all of them at a time, where
    ``before`` have been dealt evenly.

    Threads share out the samples of a block, one part each, and the entries of an operation in the same way: so every
    thread reads and writes what it has written itself.  Cores that share no cache take twice as long otherwise.
    """
    first = min(-before % lanes, len(rows))
    even = (len(rows) - first) // lanes
    done = first + even * lanes
    for j in range(first):
        yield _one(rows, j, before, lanes)
    for j in range(even):
        yield slice(None), rows[first:done].unflatten(0, (lanes, even))[:, j], (before + first) // lanes + j
    for j in range(done, len(rows)):
        yield _one(rows, j, before, lanes)


def _one(rows: Tensor, j: int, before: int, lanes: int) -> tuple[slice, Tensor, int]:
    count, lane = divmod(before + j, lanes)
    return slice(lane, lane + 1), rows[j : j + 1], count


def _add_squares(g: Piece, count: int, total: Tensor) -> None:
    match g:
        case Dense(value) if total.shape[1] >= cost.costs().long:
            for lane, rows, _ in _dealt(value.reshape(len(g), total.shape[1]), count, len(total)):
                total[lane].addcmul_(rows, rows)
        case Dense():
            for _, part, block in blocks(g, len(g), cuts(g, cost.chunk(len(g)))):
                total[0, part].addmv_(block.square_().mT, block.new_ones(len(block)))
        case _:
            for at, part, block in streamed(g):
                if block.shape[1] >= cost.costs().long:
                    for lane, rows, _ in _dealt(block, count + at.start, len(total)):
                        total[lane, part].addcmul_(rows, rows)
                else:
                    total[0, part].addmv_(block.square_().mT, block.new_ones(len(block)))


def _merge(g: Piece, count: int, mean: Tensor, square: Tensor) -> None:
    """Take the rows of ``g`` into the mean and the centred squares of ``count`` rows so far."""
    lanes, size = mean.shape
    long = cost.costs().long
    if isinstance(g, Dense) and size >= long:
        with borrow(mean, lanes, size) as spare:
            for lane, rows, n in _dealt(g.value.reshape(len(g), size), count, lanes):
                _merge_rows(rows, spare[: len(rows)], n, mean[lane], square[lane])
        return
    source = blocks(g, len(g), cuts(g, cost.chunk(len(g)))) if isinstance(g, Dense) else streamed(g)
    for at, part, block in source:
        if lanes > 1 or (block.shape[1] >= long and len(block) <= 16):  # few, or very long ones
            for lane, rows, n in _dealt(block, count + at.start, lanes):
                _merge_rows(rows, rows, n, mean[lane, part], square[lane, part])
        else:
            _merge_block(block, count + at.start, mean[0, part], square[0, part])


def _merge_rows(rows: Tensor, gap: Tensor, count: int, mean: Tensor, square: Tensor) -> None:
    """One long row for each lane; overwrites ``gap``, which may be the rows."""
    torch.sub(rows, mean, out=gap)
    mean.add_(gap, alpha=1 / (count + 1))
    square.addcmul_(gap, gap, value=count / (count + 1))


def _merge_block(block: Tensor, count: int, mean: Tensor, square: Tensor) -> None:
    """Many short rows at once; overwrites ``block``."""
    n, ones = len(block), block.new_ones(len(block))
    own = block.mT.mv(ones).div_(n)
    block -= own
    square.addmv_(block.square_().mT, ones)
    own -= mean
    mean.add_(own, alpha=n / (count + n))
    square.addcmul_(own, own, value=count * n / (count + n))


def _product_moments(g: Outer, sums: Tensor | None = None) -> Tensor:
    """Centred squares of outer products, from products of tokens: the sum of squares less ``N mean^2``; ``sums`` is
    filled if given, ``[K, O, I]``.

    That difference is checked: where less than a hundredth of the squares is left, those rows of ``P`` are streamed.
    """
    left, right = (f[:, :, 0].transpose(0, 1) for f in (g.left, g.right))  # [K, N, *]
    (k, n, o), i = left.shape, right.shape[2]
    squares, result = right.square(), fresh(right, k, o, i)
    some, step = max(1, cost.chunk(o * i)), min(o, cost.chunk(i))
    for b in range(0, k, some):
        for r in range(0, o, max(1, step)):
            at = (slice(b, b + some), slice(r, r + step))
            own, found = left[at[0], :, at[1]].mT, result[at]
            with borrow(result, *found.shape) as spare:
                total = torch.bmm(own, right[at[0]], out=spare if sums is None else sums[at])
                torch.bmm(own.square(), squares[at[0]], out=found)
                found.addcmul_(total, total, value=-1 / n)
                torch.addcmul(found, total, total, value=-1 / (99 * n), out=spare)
                if found.numel() and doubtful(~(spare.amin() >= 0)):  # also of NaN, beside which others may be lost
                    for j in range(len(found)):
                        rows = (spare[j] < 0).any(1).nonzero().squeeze(1)
                        found[j, rows] = _centred_rows(g, b + j, r + rows)
    return result.view(g.shape)


def _pair_moments(g: Outer, total: Tensor | None = None) -> Tensor:
    """Sums of squares of rows that are sums of a few outer products; centred, if the sum of all rows is given.

    ``(sum_t l_t (x) r_t)^2 = sum_{t, s} (l_t l_s) (x) (r_t r_s)``, all samples in one product.  Where terms nearly
    cancel, entries are computed one by one, or all rows streamed if these are many.
    """
    (n, k, t, o), i = g.left.shape, g.right.shape[3]
    first, second = torch.triu_indices(t, t, 1, device=g.left.device)
    size, cross = (zeros(g.left, k, o, i) for _ in range(2))
    step = cost.chunk(k * (t * (t + 1) // 2) * (o + i), cost.costs().wide)
    for s in range(0, n, step):
        left, right = (f[s : s + step].transpose(0, 1) for f in (g.left, g.right))  # [K, n, T, *]
        size.baddbmm_(left.square().flatten(1, 2).mT, right.square().flatten(1, 2))
        left, right = ((f[:, :, first] * f[:, :, second]).flatten(1, 2) for f in (left, right))
        cross.baddbmm_(left.mT, right)
    found = torch.add(size, cross, alpha=2, out=cross)
    if total is not None:
        found.addcmul_(total, total, value=-1 / n)
    lost = found < size.mul_(t * cost.cancelled(size.dtype))
    if not doubtful(lost.any()):
        return found.view(g.shape)
    where = lost.nonzero()
    if 64 * len(where) > found.numel():
        return _accumulated(g, *((_add_squares, 1) if total is None else (_merge, 2)))[-1].view(g.shape)
    for entries in where.split(max(1, cost.chunk(n * t))):
        block, row, column = entries.unbind(1)
        rows = (g.left[:, block, :, row] * g.right[:, block, :, column]).sum(2)  # [entries, N]
        if total is not None:
            rows -= rows.mean(1, keepdim=True)
        found[block, row, column] = rows.square().sum(1)
    return found.view(g.shape)


def _centred_rows(g: Outer, block: int, rows: Tensor) -> Tensor:
    """Centred squares of some rows of one block of the parameter, ``[rows, I]``."""
    shape = torch.Size((len(rows), g.right.shape[3]))
    part = Outer(g.left[:, block : block + 1, :, rows], g.right[:, block : block + 1], shape)
    mean, square = (g.left.new_zeros(1, shape.numel()) for _ in range(2))
    _merge(part, 0, mean, square)
    return square.view(shape)
