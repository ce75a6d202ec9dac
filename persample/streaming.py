"""Every form streams itself: in pieces of a direct sum, and in blocks of some samples x a slice of the parameter.

This is the default of every primitive: norms, Grams and projections add over blocks, moments are written block by
block.  A block is computed into reused memory and read while it is still in cache; ``[N, *P]`` never exists.

A convolution is a direct sum over kernel offsets (`persample.convolution`); one of torch's convolutions may
give whole rows; with one position or one offset it is an `Outer`.  For inner products, larger ones form
rows in slices of outputs.  Nothing but this file knows which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Size, Tensor

from . import convolution, cost
from .factors import INDICES, Conv, Dense, Factors, Outer, Pulled, Rows, cast, dense, dtype, index, led, tensors
from .scratch import borrow

Piece = Dense | Outer | Rows | Pulled  # an `Outer` times a tensor
Block = tuple[slice, slice, Tensor]  # samples, slice of the flat parameter, [n, width]


def split_of(g: Factors) -> str:
    """The cheapest way to take the rows of ``g`` apart: not at all ("whole"), or as `persample.cost.conv_rows` says."""
    if not isinstance(g, Conv):
        return "whole"
    return cost.conv_rows(g.grad, sizes_of(g), streamed=True)


def chunks(g: Factors, split: str) -> Iterator[tuple[slice, Factors]]:
    """Some samples at a time where taking apart needs memory."""
    step = len(g)
    if isinstance(g, Conv):
        step = convolution.native_step(g.input, g.grad, g.shape) if split == "native" else cost.shared(_each(g, split))
    elif isinstance(g, Pulled) and not streams(g):
        step = g.step
    for i in range(0, len(g), max(1, step)):
        at = slice(i, min(i + step, len(g)))
        yield at, g if step >= len(g) else index(g, at)


def streams(g: Pulled) -> bool:
    """Whether a product with a tensor streams in parts of the parameter."""
    return isinstance(g.back, Tensor) and isinstance(g.rows, Outer)


def _each(g: Conv, split: str) -> int:
    """Entries per sample that taking apart needs memory for."""
    match split:
        case "native":
            return g.shape.numel()
        case "tokens":
            return convolution.unfolded_size(g.input, g.grad, g.geometry)
    return max(g.shape[:2].numel(), g.input[:1].numel() + g.grad[:1].numel())


def pieces(g: Factors, split: str) -> Iterator[Piece]:
    """The pieces of ``g``, each with all samples."""
    match g, split:
        case Conv(input, grad), "tokens":
            with convolution.unfolded(input, grad, g.geometry) as (left, right):
                yield Outer(left, right, Size((g.shape[0], g.shape[1:].numel())))
        case Conv(input, grad), "offsets":
            left, rights = convolution.shifted(input, grad, g.geometry)
            yield from (Outer(left, right, g.shape[:2]) for right in rights)
        case Conv(input, grad), "native":
            yield Dense(convolution.native(input, grad, g.geometry))
        case Dense(value), "offsets":
            yield from (Dense(part) for part in value.flatten(3).unbind(3))
        case Dense(), _:
            yield g
        case Outer() | Rows(), "whole" | "tokens":
            yield g
        case Pulled(), "whole" if streams(g):
            yield g
        case Pulled(), "whole" if 0 < len(g) <= g.step:
            yield from (Dense(part) for _, part in led(g))
        case _:
            yield from pieces(Dense(dense(g)), split)


def shared_split(g: Factors) -> str:
    """How to take ``g`` apart so that its rows are formed once for inner products and moments: as a "whole", by kernel
    "offsets", in "blocks" of the parameter; or "", where both do better by themselves.
    """
    size, c = len(g) * g.shape.numel(), cost.costs()
    if not size or wide(g) is not g:
        return ""
    match g:
        case Outer(left, right) if left.shape[2] > 1:
            (n, _, t, o), i = left.shape, right.shape[3]
            if size <= c.wide:
                return "whole"
            return "blocks" if cost.outer_gram(n, n, t, t, o, i) == "stream" else ""
        case Conv():
            if size <= {"native": c.wide, "tokens": c.wide // 2}.get(split_of(g), 0):
                return "whole"
            fits = len(g) * g.shape[:2].numel() <= c.wide
            return "offsets" if fits and g.geometry.offsets > 1 and not cost.conv_alone(sizes_of(g)) else ""
        case Pulled() if size <= c.wide:
            return "whole"
    return ""


def formed(g: Factors, split: str) -> Iterator[Dense]:
    """The rows of ``g``, piece by piece, in memory that is reused for the next piece; see `shared_split`, `joined`."""
    if split == "blocks":
        assert isinstance(g, Outer)
        for _, _, block in blocks(g, len(g), cuts(g, cost.chunk(len(g), cost.costs().wide))):
            yield Dense(block)
        return
    for piece in pieces(g, split) if split == "offsets" else (g,):
        yield from _formed(piece)


def _formed(g: Factors) -> Iterator[Dense]:
    """The rows of ``g``, formed in memory that is reused afterwards."""
    if isinstance(g, Dense):
        yield g
        return
    with borrow(tensors(g)[-1], len(g), *g.shape) as out:
        yield Dense(dense(g, out=out))


def sizes_of(g: Conv) -> cost.Convolution:
    return convolution.sizes(g.input.shape, g.grad.shape, g.geometry)


def joined(parts: list[Tensor], split: str, shape: Size) -> Tensor:
    """``[*P]`` from what was computed of each piece."""
    if split == "blocks":
        return torch.cat([part.flatten() for part in parts]).reshape(shape)
    return (torch.stack(parts, -1) if split == "offsets" else parts[0]).reshape(shape)


def paired(a: Factors, b: Factors) -> Iterator[tuple[Piece, Piece]]:
    """The pieces of ``a`` next to the same pieces of ``b``, of a kind that can have all samples."""
    if isinstance(b, Conv) and not isinstance(a, Conv):
        yield from ((x, y) for y, x in paired(b, a))
        return
    split = split_of(a)
    if isinstance(a, Conv) and isinstance(b, Conv):
        if a.geometry.groups != b.geometry.groups:
            b = Dense(dense(b))
        elif split != split_of(b):
            split = "offsets"
    if isinstance(a, Conv) and max(len(a), len(b)) * _each(a, split) > cost.costs().wide // 2:
        step = cost.conv_slice(a.grad, sizes_of(a), max(len(a), len(b)), a.geometry.groups)
        if split != "offsets" and step:
            yield from _sliced(a, b if isinstance(b, Conv) else Dense(dense(b)), step)
            return
        split = "offsets"
    if b is a:
        yield from ((piece, piece) for piece in pieces(a, split))
    else:
        yield from zip(pieces(a, split), pieces(b, split), strict=True)


def _sliced(a: Conv, b: Conv | Dense, step: int) -> Iterator[tuple[Piece, Piece]]:
    """Rows of both, ``step`` outputs at a time."""
    groups = a.geometry.groups
    for x, y in zip(_slices(a, groups, step), _slices(b, groups, step), strict=True):
        for rows in _formed(x):
            if b is a:
                yield rows, rows
            else:
                yield from ((rows, other) for other in _formed(y))


def _slices(g: Conv | Dense, groups: int, step: int) -> Iterator[Conv | Dense]:
    """Some outputs of a convolution at a time, with all samples; of several groups, whole ones."""
    outputs, channels = g.shape[:2]
    for first in range(0, outputs, step):
        at = slice(first, min(first + step, outputs))
        match g:
            case Dense(value):
                yield Dense(value[:, at])
            case Conv(input, grad):
                if groups > 1:
                    input = input[:, at.start * groups // outputs * channels : at.stop * groups // outputs * channels]
                yield replace(g, input=input, grad=grad[:, at], shape=Size((at.stop - at.start, *g.shape[1:])))


def wide(g: Factors) -> Factors:
    """``g`` with one dtype, of at least float32, and real: a complex entry is two, its real and its imaginary part."""
    found = {t.dtype for t in tensors(g)} - {*INDICES}
    if found <= _WIDE and len(found) == 1:
        return g
    kind = dtype(g)
    if kind.is_complex:
        return Dense(torch.view_as_real(dense(g).resolve_conj()))
    return cast(g, torch.promote_types(kind, torch.float32))


def common(a: Factors, b: Factors) -> tuple[Factors, Factors]:
    """Both `wide`, with one dtype."""
    kind = torch.promote_types(torch.promote_types(dtype(a), dtype(b)), torch.float32)
    return wide(cast(a, kind)), wide(cast(b, kind))


_WIDE = {torch.float32, torch.float64}


# ---- blocks -----------------------------------------------------------------------------------------------------


def cuts(g: Piece, width: int) -> list[slice]:
    """The flat parameter in slices of about ``width`` entries, as ``g`` can stream it."""
    size = g.shape.numel()
    match g:
        case Outer(left, right):
            k, o, i = left.shape[1], left.shape[3], right.shape[3]
            step = max(1, width // max(1, i))
            if step < k * o:  # rows of one block at a time
                rows = [(b * o + r, b * o + min(o, r + step)) for b in range(k) for r in range(0, o, step)]
                return [slice(first * i, last * i) for first, last in rows]
            step = size
        case Rows():
            step = max(1, width // g.shape[1]) * g.shape[1]
        case Pulled(rows):
            return cuts(rows, width)  # type: ignore[arg-type]
        case Dense():
            step = max(1, width)
    return [slice(i, min(i + step, size)) for i in range(0, size, max(1, step))]


def blocks(g: Piece, samples: int, parts: list[slice]) -> Iterator[Block]:
    """``G`` in blocks, part by part, in each some samples at a time; a block may be overwritten by who reads it."""
    n = len(g)
    for part in parts:
        for s in range(0, n, max(1, samples)):
            at = slice(s, min(n, s + samples))
            with borrow(tensors(g)[-1], at.stop - s, part.stop - part.start) as out:
                _write(g, at, part, out)
                yield at, part, out


def streamed(g: Piece) -> Iterator[Block]:
    """In blocks of the usual size."""
    step, parts = tiles(g)
    return blocks(g, step, parts)


def tiles(g: Piece) -> tuple[int, list[slice]]:
    """Samples and parts of blocks of the usual size: whole rows of a few samples, or parts of long rows."""
    entries, c = g.shape.numel(), cost.costs()
    if entries > c.wide:
        return 1, cuts(g, c.block)
    samples = cost.chunk(entries)
    rows = g.rows if isinstance(g, Pulled) else g
    if isinstance(rows, Outer) and rows.left.shape[2] < c.short:  # one short product does not keep all threads busy
        samples = max(samples, min(4, cost.chunk(3 * entries, c.wide)))
    return samples, cuts(g, entries)


def _write(g: Piece, at: slice, part: slice, out: Tensor) -> None:
    """``G[at, part]`` into ``out [n, width]``."""
    match g:
        case Dense(value):
            out.copy_(value[at].reshape(len(out), g.shape.numel())[:, part])
        case Outer(left, right):
            left, right, i = left[at], right[at], right.shape[3]
            if out.shape[1] < g.shape.numel():  # some rows of one block
                block, row = divmod(part.start // i, left.shape[3])
                right = right[:, block : block + 1]
                left = left[:, block : block + 1, :, row : row + out.shape[1] // i]
            _multiply(left.flatten(0, 1).mT, right.flatten(0, 1), out)
        case Rows(index, value):
            first, last = part.start // g.shape[1], part.stop // g.shape[1]
            inside = (index[at] >= first) & (index[at] < last)
            place = torch.where(inside, index[at].long() - first, 0).unsqueeze(-1).expand_as(value[at])
            out = out.zero_().view(len(out), last - first, g.shape[1])
            out.scatter_add_(1, place, torch.where(inside.unsqueeze(-1), value[at], 0))
        case Pulled(rows, Tensor() as back):
            _write(rows, at, part, out)  # type: ignore[arg-type]
            out.mul_(back.flatten()[part])


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    out = out.view(len(left), left.shape[1], right.shape[2])
    if len(left) == 1:  # a single product is faster unbatched
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)


def alike(a: Piece, b: Piece) -> tuple[Piece, Piece, Piece]:
    """Both, so that they can be cut in the same way, and the one that says how."""
    match a, b:
        case Dense(), _:
            return a, b, b
        case _, Dense():
            return a, b, a
        case Outer(), Outer() if a.left.shape[1::2] == b.left.shape[1::2]:
            return a, b, a
        case (Rows(), Rows()):
            return a, b, a
        case (Outer(), Rows()) if a.right.shape[3] == b.shape[1]:
            return a, b, a
        case (Rows(), Outer()) if b.right.shape[3] == a.shape[1]:
            return a, b, b
    return a, Dense(dense(b)), a
