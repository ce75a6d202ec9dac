"""Samples that are written into a part of a tensor, and where that leaves those of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Layout, Operation, kept, of_one, owned, same
from .moves import indexed, named, numbered, read

_ADDS = "index_add index_reduce scatter_add scatter_reduce"
_PUTS = f"index_copy index_fill index_put scatter {_ADDS}"
ADDS = named(*_ADDS.split(), *(f"{name}_" for name in _ADDS.split()))
WRITES = {Tensor.__setitem__} | named(*(f"{name}_" for name in _PUTS.split()))
SCATTERS = named("masked_scatter", "masked_scatter_")
PLACES = named("put", "put_", "select_scatter", "slice_scatter", "diagonal_scatter")
WRITES |= {f for f in SCATTERS | PLACES if f.__name__.endswith("_")}
COPIES = named(*_PUTS.split()) | SCATTERS | PLACES


def written(op: Operation, out: Tensor) -> Layout | None:
    """What becomes of a constant into which samples are written."""
    value, layout = op.known[-1]
    if (owner := of_one(op.known)) is not None:
        return _put(op, out, layout.n, owner)
    if op.func in PLACES:
        if _source(op)[0] is not value:
            return None
        nobody, numbers = torch.full_like(op.args[0], -1, dtype=torch.long), numbered(layout, value)
        return filled(op, out, layout.n, _replaced(op, nobody, numbers))
    if op.func is Tensor.__setitem__ or "put" in op.func.__name__:
        index = op.given(1, "indices")
        index = tuple(index) if isinstance(index, tuple) or op.func is not Tensor.__setitem__ else (index,)
        if value is not op.given(2, "values"):
            if len(index) == 1 and value is index[0] and value.ndim == 1 and value.dtype is not torch.bool:
                return agree(op, out, layout.n, 0, value, layout.owners())  # constants, at places of the samples
            return _marked(op, index, out)
        return _placed(op, index, layout, value, out) or _assigned(index, layout, value, out)
    dim, index, source = op.given(1, "dim"), op.given(2, "index"), op.given(3, "source", "src")
    if dim % out.ndim == layout.axis and (value is source or value is index):
        rows = index.reshape(len(index), -1) if index.ndim < 2 else index.movedim(dim, 0).flatten(1)
        owners = layout.owners()[: len(rows)].repeat_interleave(rows.shape[1])
        return agree(op, out, layout.n, layout.axis, rows.flatten(), owners)
    if value.ndim == out.ndim:  # of another size than the whole, maybe, along the axis of the samples
        return layout if layout.fits(out.shape, layout.axis) else None
    return kept(layout, value.ndim, out.shape)


def _put(op: Operation, out: Tensor, n: int, owner: int) -> Layout | None:
    """A constant, after entries of one sample were put into it (``out[i, :length] = x[i]``)."""
    value = _source(op)[0]
    shape = value.shape if isinstance(value, Tensor) else ()
    theirs = torch.full(shape, owner, dtype=torch.long, device=out.device)
    return _first(op, out, n, _replaced(op, torch.full_like(op.args[0], -1, dtype=torch.long), theirs), owner)


def beneath(
    op: Operation, whole: Tensor, part: Tensor, layout: Layout | None, before: Layout | None = None
) -> Layout | None:
    """Where samples are in a tensor, a constant unless they were there ``before``, after a view of it was written into
    (``out[i].copy_(x[i])``, ``out[i][:k] = x[i]``), which has this layout if all of it was.
    """
    if not op.known or op.lost or (layout is None and not writes_into(op, part)):
        return None
    n = op.known[0][1].n
    with torch._C.DisableTorchFunction(), torch.no_grad():
        was, numbers = _numbers(whole, before), _numbers(whole, before)
        own = _seen_through(numbers, whole, part)
        if writes_into(op, part):  # some of its entries
            value, nobody = _source(op)[0], torch.full_like(part, -1, dtype=torch.long)
            at = op.of(value) or op.known[-1][1]
            put = numbered(at, value) if isinstance(value, Tensor) and at.alone is None else at.owners()[:1]
            theirs = _replaced(op, nobody, put.expand(value.shape) if isinstance(value, Tensor) else put)
        else:
            assert layout is not None
            theirs = numbered(layout, part)
        own.copy_(torch.where(theirs < 0, own, theirs))
        if before is not None:
            return before if torch.equal(was, numbers) else read(before, numbers, whole)
        owners = theirs[theirs >= 0].unique().tolist()
        if len(owners) == 1:
            return _first(op, whole, n, numbers, owners[0])
        return filled(op, whole, n, numbers)


def above(whole: Tensor, part: Tensor, layout: Layout) -> Layout | None:
    """Where samples are in a view of a tensor in which it is known."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        numbers = _seen_through(_numbers(whole, layout), whole, part)
        owners = numbers.unique()
        return Layout(layout.n, alone=int(owners)) if len(owners) == 1 else read(layout, numbers, part)


def _numbers(x: Tensor, layout: Layout | None) -> Tensor:
    """`numbered`, in memory laid out as that of ``x``; -1 for a constant."""
    numbers = torch.empty_strided(x.shape, x.stride(), dtype=torch.long, device=x.device)
    return numbers.fill_(-1) if layout is None else numbers.copy_(numbered(layout, x))


def _seen_through(numbers: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    return numbers.as_strided(part.shape, part.stride(), part.storage_offset() - whole.storage_offset())


def _first(op: Operation, out: Tensor, n: int, numbers: Tensor, owner: int) -> Layout | None:
    """The layout of a constant into which entries of one sample were put, the first of several, most likely, each at
    its number: ``numbers`` says which entries.
    """
    single: list[Layout] = []
    several: list[Layout] = []
    for axis in range(out.ndim):
        places = (numbers.movedim(axis, 0).reshape(out.shape[axis], -1) >= 0).any(1).nonzero().squeeze(1)
        if out.shape[axis] == n and places.tolist() == [owner]:
            return Layout(n, axis)
        if len(places) < out.shape[axis]:
            found = single if len(places) == 1 else several
            found += candidates(op, out, n, axis, places, torch.full_like(places, owner))[:1]
    found = single or several
    return found[0] if len(found) == 1 else None


def writes_into(op: Operation, out: Tensor) -> bool:
    """Whether a call writes parts of one tensor into ``out``."""
    return op.func in WRITES and bool(op.args) and out is op.args[0]


def rewritten(op: Operation) -> Layout | None:
    """The layout of a tensor that has samples, after entries of another one were written into it: by doing the same
    with the numbers of the samples.
    """
    target, layout = op.args[0], op.of(op.args[0])
    if op.func in SCATTERS and layout is not None and layout.n > 1:
        alone = any(at is None or at.alone is not None for _, at in op.sampled)
        return None if alone else scattered(op, target)
    value, adds = _source(op)
    if not any(value is x for x, _ in op.sampled):
        return layout  # a constant
    at = op.of(value)
    if at is None or layout is None or layout.n == 1:
        return layout if layout is not None and layout.n == 1 else None
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if op.func is Tensor.__setitem__ and _spares(op.args[1], layout.axis) and at.alone is None and same(at, layout):
            return layout
        mine = numbered(layout, target)
        theirs = torch.full_like(value, at.alone, dtype=torch.long) if at.alone is not None else numbered(at, value)
        try:
            after = _replaced(op, mine, theirs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        if torch.equal(mine, after):
            return layout
        return None if adds else read(layout, after, target)


def _source(op: Operation) -> tuple[Any, bool]:
    """What is written into a tensor, and whether it is added to what is there."""
    if op.func in PLACES and "put" not in op.func.__name__:
        return op.given(1, "src"), False
    if op.func is Tensor.__setitem__:
        return op.args[2], False
    if "put" in op.func.__name__:
        return op.given(2, "values", "source"), bool(op.given(3, "accumulate"))
    return op.given(3, "source", "src"), op.func in ADDS


def _replaced(op: Operation, target: Tensor, source: Tensor) -> Tensor:
    """The same with the numbers of samples, which are put even where entries are added."""
    name = op.func.__name__
    if op.func in PLACES and "put" not in name:
        found: Tensor = op.func(target, source, *op.args[2:], **{k: x for k, x in op.kwargs.items() if k != "src"})
    elif op.func is Tensor.__setitem__:
        found = target.clone()
        found[op.args[1]] = source
    elif op.func in PLACES:
        found = target.put(op.given(1, "index"), source)
    elif "put" in name:
        found = target.index_put(op.given(1, "indices"), source)
    else:
        put = target.index_copy if "index" in name else target.scatter
        found = put(op.given(1, "dim"), op.given(2, "index"), source)
    return found


def scattered(op: Operation, out: Tensor) -> Layout | None:
    """``masked_scatter``: the samples are where the target and the mask have them; the values have to be those of the
    samples to whose entries they go.
    """
    target, mask, values = op.given(0, "input"), op.given(1, "mask"), op.given(2, "source")
    whole = [at.placed(at.axis + out.ndim - t.ndim) for t in (target, mask) if (at := op.of(t)) is not None]
    if any(at.axis != whole[0].axis or not same(at, whole[0]) for at in whole):
        return None
    by = op.of(values)
    if by is None:
        return whole[0] if whole else None
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if not whole:
            nobody = torch.full_like(out, -1, dtype=torch.long)
            return filled(op, out, by.n, nobody.masked_scatter(mask, numbered(by, values)))
        return whole[0] if _confirms(whole[0], mask.expand(out.shape), by, values) else None


def _confirms(whole: Layout, mask: Tensor, by: Layout, values: Tensor) -> bool:
    """Whether values, one after the other, belong to the samples of the entries at which a mask is true."""
    block, behind = 1, prod(values.shape[by.axis + 1 :])
    owners, theirs = whole.owners().to(mask.device), by.owners().to(mask.device)
    while mask.ndim - 1 > whole.axis and (mask.stride(-1) == 0 or mask.shape[-1] == 1):
        block, mask = block * mask.shape[-1], mask[..., 0]  # blocks of entries go together
    mine = owners[mask.nonzero()[:, whole.axis]]
    if behind % max(1, block):
        mine, block = mine.repeat_interleave(block), 1
    return torch.equal(mine, theirs[torch.arange(len(mine), device=mine.device) * block // max(1, behind) % by.size])


def filled(op: Operation, out: Tensor, n: int, numbers: Tensor, axes: Iterable[int] | None = None) -> Layout | None:
    """The layout of a constant into which entries of samples were put: ``numbers`` says of which, -1 of none."""
    found: list[Layout] = []
    for axis in range(out.ndim) if axes is None else axes:
        line = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
        owner = line.amax(1)
        if torch.equal(line.masked_fill(line < 0, n).amin(1).clamp(max=n - 1)[owner >= 0], owner[owner >= 0]):
            places = (owner >= 0).nonzero().squeeze(1)
            found += candidates(op, out, n, axis, places, owner[places])
    return found[0] if len(found) == 1 else None


def _spares(index: Any, axis: int) -> bool:
    """Whether an index surely takes all of this axis, and leaves it where it is."""
    index = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index)
    return plain and (axis >= len(index) or index[axis] == slice(None))


def agree(op: Operation, out: Tensor, n: int, axis: int, places: Tensor, owners: Tensor) -> Layout | None:
    """The layout of ``out`` in which the entries at ``places`` of its axis belong to their ``owners``.

    Where every entry was written, that is all.  If not, whose the others are has to be guessed: those of a tensor of
    the same size that was seen, of which these are a part; or in blocks or turns.  Of several guesses none is taken.
    """
    found = candidates(op, out, n, axis, places, owners)
    return found[0] if len(found) == 1 else None


def candidates(op: Operation, out: Tensor, n: int, axis: int, places: Tensor, owners: Tensor) -> list[Layout]:
    """What `agree` chooses from."""
    size, places, owners = out.shape[axis], places.reshape(-1).cpu(), owners.cpu()
    places, owners = places[owners >= 0], owners[owners >= 0]  # what nobody put there (the loops of nodes) says nothing
    owner = torch.full((size,), -1, device="cpu")
    owner[places] = owners
    if not size or not torch.equal(owner[places], owners):
        return []  # several samples in one entry
    if bool((owner >= 0).all()):
        return [owned(n, axis, owner)]
    before = [at for at in op.seen() if at.alone is None and at.size == size and at.n == n]
    rest = size % n  # rows at the end that nothing was put into (for what is padding) are nobody's
    orders = [Layout(n, axis, 1, size // n), Layout(n, axis, size // n, 1)] if size >= n else []
    regular = [at if not rest else Layout(n, axis, owner=F.pad(at.owners(), (0, rest), value=-1)) for at in orders]
    for known in ([owned(n, axis, at.owners().cpu()) for at in before], regular):
        found: list[Layout] = []
        for at in known:
            if torch.equal(at.owners()[places], owners) and not any(same(at, other) for other in found):
                found.append(at)
        if found:
            return found
    return []


def _placed(op: Operation, index: tuple[Any, ...], layout: Layout, value: Tensor, out: Tensor) -> Layout | None:
    """``out[index] = value``, where the samples are in front in ``value``: tensors say in which rows each is put."""
    while index and (index[-1] is Ellipsis or (isinstance(index[-1], slice) and index[-1] == slice(None))):
        index = index[:-1]
    if layout.axis != 0 or not index or not all(isinstance(i, Tensor) for i in index):
        return None
    first, used = index[0], len(index)
    if used == 1 and first.dtype is torch.bool:
        first, used = first.nonzero()[:, 0], first.ndim
    if value.ndim != out.ndim - used + 1 or any(i.ndim != 1 or i.dtype is torch.bool for i in (first, *index[1:])):
        return None
    return agree(op, out, layout.n, 0, first, layout.owners())


def _marked(op: Operation, index: tuple[Any, ...], out: Tensor) -> Layout | None:
    """``out[index] = constant``, at places that the samples say."""
    value, layout = op.known[-1]
    place = next((j for j, i in enumerate(index) if i is value), None)
    if place is None or not all(isinstance(i, Tensor) or i == slice(None) for i in index):
        return None
    if value.dtype is torch.bool and all(not isinstance(i, Tensor) for i in index[:place]):
        axis = place + layout.axis
        return layout.placed(axis) if layout.fits(out.shape, axis) else None
    numbers = torch.full_like(out, -1, dtype=torch.long)
    numbers[index] = numbered(layout, value)[(..., *[None] * (out.ndim - len(index)))]
    others = [j for j, i in enumerate(index) if isinstance(i, Tensor) and op.of(i) is None]
    return filled(op, out, layout.n, numbers, others) or filled(op, out, layout.n, numbers)


def _assigned(index: tuple[Any, ...], layout: Layout, value: Tensor, out: Tensor) -> Layout | None:
    """``out[index] = value``: the axis of ``out`` that the index would bring to where the samples are in ``value``."""
    part = out[index]
    for axis in range(out.ndim):
        if out.shape[axis] == layout.size and layout.owner is None:
            piece = indexed(Operation(Tensor.__getitem__, (out, index)), layout.placed(axis), part)
            if piece is not None and piece.axis == layout.axis + part.ndim - value.ndim and same(piece, layout):
                return layout.placed(axis)
    return None
