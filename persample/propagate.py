"""How operations move the samples of a batch: the `Layout` of an output, from those of the arguments.

====================  =================================================================================================
views, indexing ...   the table of single functions in `persample.moves`
concatenation         each part brings the numbers of its samples
writing into a part   the layout of the whole under which the part's entries belong to the samples they come from
anything else         samples stay where their size is found again; where that can't be told apart, the function is
                      called once more for its shapes only (device "meta"), with one sample more
====================  =================================================================================================

``None`` means "can't tell", and is an error only where a parameter meets such a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .layout import Layout, kept, owned, same
from .moves import (
    MOVED,
    Function,
    bind,
    indexed,
    named,
    nonzero_of,
    numbered,
    read,
    recurred,
    sort_axis,
    sorted_along,
)

Sampled = Sequence[tuple[Tensor, Layout]]


def propagate(
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sampled,
    tensors: Sequence[Tensor],
    out: Tensor,
    lost: bool = False,
) -> Layout | None:
    """The layout of ``out = func(*args, **kwargs)``; ``sampled`` are those of its ``tensors`` that have samples.

    ``lost``: there are others, of which it isn't known where the samples are (scores of all samples against all).  What
    they are multiplied with is guessed by its size: that couples the batch, and only what is behind it is to be served.
    """
    if sampled[0][1].n == 1:
        return lone_sample(out)
    first, layout = sampled[0]
    inner = (
        not args or first is not args[0] or layout.axis == first.ndim - 1
    )  # most often, it is the first of more axes
    if inner and func in _PRODUCTS and not lost and sums_up(func, args, kwargs, sampled):
        return None
    if func not in _SPECIAL and _stays(func, args, sampled, out):
        return layout
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return _followed(func, args, kwargs, sampled, tensors, out, lost)
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        ArithmeticError,
    ):  # a way to call the function that isn't known
        return None


def _stays(func: Function, args: tuple[Any, ...], sampled: Sampled, out: Tensor) -> bool:
    """The short way to what `_followed` finds for most calls: all samples stay where they are."""
    first, layout = sampled[0]
    shape, axis = out.shape, layout.axis
    if layout.alone is not None or (func is F.embedding and args and first is not args[0]):
        return False
    if len(sampled) == 1:
        if first.shape == shape:
            return True
        front = first.ndim - _READS.get(func, first.ndim)
        if axis < front and args and first is args[0] and shape[:front] == first.shape[:front]:
            return True
        size = layout.size
        return first.ndim == len(shape) and [a for a, s in enumerate(shape) if s == size] == [axis]
    if all(x.shape == shape and at.axis == axis and same(at, layout) for x, at in sampled):
        return True
    front = len(shape) - _MEETS.get(func, len(shape))
    return axis < front and all(x.ndim == len(shape) and at.axis == axis and same(at, layout) for x, at in sampled)


def lone_sample(x: Tensor) -> Layout:
    """With N = 1, everything belongs to the one sample: it is where layers look for a batch."""
    return Layout(1, inner=len(x)) if x.ndim > 1 and len(x) else Layout(1, alone=0)


def _followed(
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sampled,
    tensors: Sequence[Tensor],
    out: Tensor,
    lost: bool,
) -> Layout | None:
    first, layout = sampled[0]
    if any(at.alone is not None for _, at in sampled):
        return _one_by_one(func, args, kwargs, sampled, out)
    if args and first is args[0] and (follow := MOVED.get(func)) is not None and not _is_choice(func, args):
        return follow(func, args, kwargs, layout, out)
    if (
        func in _MASKED and len(args) > 1 and first is args[1] and first.dtype is torch.bool
    ):  # constants picked by a mask
        return nonzero_of(func, (first,), {}, layout, out)
    if func in _JOINS:
        return _joined(args, kwargs, sampled, out)
    if func is F.embedding_bag:
        return _bagged(args, kwargs, sampled, out)
    if func is F.embedding and (table := bind(args, kwargs, "input", "weight")[1]) is sampled[-1][0]:
        return indexed(Tensor.__getitem__, (table, args[0] if args else kwargs["input"]), {}, sampled[-1][1], out)
    if (func in _WRITES and args and out is args[0] and out is not first) or (func in _COPIES and args[0] is not first):
        return _written(func, args, kwargs, sampled, out)
    if func in _COPIES and len(sampled) > 1:
        return rewritten(func, args, kwargs, sampled)
    if func in _GROWS:
        axes = _grown(layout, func, args, kwargs, sampled, out)
        return replace(layout, axis=axes[0]) if len(axes) == 1 else None
    if func is torch.einsum:
        return _einsum(args, sampled, out, lost)
    if func in _REDUCES and len(sampled) == 1:
        if (axis := _axis_behind(func, args, kwargs, layout.axis, first.ndim)) is not None and layout.fits(
            out.shape, axis
        ):
            return replace(layout, axis=axis)
        axes = _grown(layout, func, args, kwargs, sampled, out)
        return replace(layout, axis=axes[0]) if len(axes) == 1 else None
    broadcast = func in _SPREADS or any(t.ndim == out.ndim for t in tensors)
    found: Layout | None = None
    for x, candidate in sorted(sampled, key=lambda pair: -pair[0].numel()):
        place: Layout | None = None
        aside = x.shape != out.shape or any(y.shape == x.shape and at.axis != candidate.axis for y, at in sampled)
        if aside and sum(size == candidate.size for size in out.shape) > 1:
            axes = _grown(candidate, func, args, kwargs, sampled, out)
            if len(axes) > 1:
                return None  # products of samples with samples
            place = replace(candidate, axis=axes[0]) if axes else None
        place = place or kept(candidate, x.ndim, out.shape, broadcast)
        if place is not None and found is None:
            found = place
        elif place is not None and found is not None and place.axis == found.axis and not same(place, found):
            return None  # entries of different samples meet
    return found


def _axis_behind(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, ndim: int) -> int | None:
    """Where an axis is after others were reduced, if the call says so in the usual way: ``sum(x, dim, keepdim)``."""
    dim, keep = bind(args[1:] if func in _REDUCES_DIM else (), kwargs, "dim", "keepdim")
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or any(type(d) is not int for d in dims) or not isinstance(keep, (bool, type(None))):
        return None
    gone = {d % ndim for d in dims}
    return None if axis in gone else axis if keep else axis - sum(d < axis for d in gone)


def found_again(layout: Layout, out: Tensor) -> Layout | None:
    """The layout of something that an unseen function has computed from a tensor with this one."""
    return lone_sample(out) if layout.n == 1 else kept(layout, out.ndim, out.shape)


def mixes(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> bool:
    """Whether entries of different samples surely meet, one on one."""
    (x, a), *others = sampled
    if not others and func not in MOVED and func not in _ALONG:
        return False
    if any(at is not None and at.alone is not None for _, at in sampled):
        lone = (
            func not in _JOINS | _GATHERS.keys()
            and func not in _WRITES
            and func not in MOVED
            and a is not None
            and a.n > 1
        )
        return lone and a is not None and not all(b is None or same(a, b) for _, b in others)
    if a is not None and MOVED.get(func) is recurred and not isinstance(args[3], (tuple, list)):
        return a.axis == 0 and a.n > 1 and x is args[0]
    if a is not None and MOVED.get(func) is sorted_along and x is args[0] and x.ndim > 1 and a.n > 1:
        return sort_axis(func, args, kwargs) == a.axis
    if a is not None and a.n > 1 and x.requires_grad and _runs_along(func, args, kwargs, x) == a.axis:
        return True
    if func is torch.einsum and a is not None and a.n > 1:
        return len(_sample_letters(args, sampled) or ()) > 1
    if a is None or not others or func in MOVED or func in _JOINS or func in _WRITES or func in _COPIES:
        return False
    alike = [b for y, b in others if y.shape == x.shape and b is not None and b.axis == a.axis]
    return not all(same(a, b) for b in alike)


def sums_up(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> bool:
    """Whether what a call gives is surely made of all samples together: their axis is reduced, or summed over in a
    product of two tensors that both have it.  A largest number is none of these: it is mostly there to be subtracted
    before an exponential, which changes nothing.
    """
    known = [(x, at) for x, at in sampled if at is not None and at.alone is None and at.n > 1 and x.is_floating_point()]
    if not known or len(known) < len(sampled):
        return False
    (x, at), *others = known
    if func in _PRODUCTS and not others and len(args) > 1:  # with a constant
        second = x.ndim - 1 if func is F.linear else max(0, x.ndim - 2)
        return at.axis == (x.ndim - 1 if x is args[0] else second)
    if (place := _SUMS.get(func)) is not None and not others and args and x is args[0]:
        return _reduced(place, args, kwargs, at.axis, x.ndim)
    if func is torch.einsum:
        letters = _sample_letters(args, sampled)
        return letters is not None and not {*letters} & {*args[0].split("->")[1]}
    if func in _PRODUCTS and len(others) == 1 and args and x is args[0] and x.ndim > 1:
        y, by = others[0]
        row = max(0, y.ndim - 2) if func is not F.linear else y.ndim - 1
        return len(args) > 1 and y is args[1] and at.axis == x.ndim - 1 and by.axis == row
    return False


def _reduced(place: int, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, ndim: int) -> bool:
    """Whether a reduction takes this axis, with its dims at this ``place`` among the arguments."""
    dim = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if dim is None:
        return True
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return all(type(d) is int for d in dims) and (not dims or axis in {d % ndim for d in dims})


def _runs_along(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> int | None:
    """The axis along which all entries act on each other (softmax), where the call says which."""
    place = _ALONG.get(func)
    if place is None or not args or x is not args[0]:
        return None
    dim = kwargs.get(
        "dim", kwargs.get("axis", args[place] if len(args) > place else 1 if func is F.normalize else None)
    )
    return dim % max(1, x.ndim) if type(dim) is int else None


def _is_choice(func: Function, args: tuple[Any, ...]) -> bool:
    """``where(condition, this, that)``, not ``where(condition)``."""
    return func in _WHERE and len(args) > 1


# ---- anything else: where the size is found again ---------------------------------------------------------------


def _grown(
    layout: Layout, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor
) -> list[int]:
    """Call the function once more for its shapes only, with more samples: the axes on which there is more."""
    axis_of = {id(t): at.axis for t, at in sampled if at.size == layout.size}

    def grown(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        axis = axis_of.get(id(t))
        return torch.empty([size + (a == axis) for a, size in enumerate(t.shape)], dtype=t.dtype, device="meta")

    try:
        more = func(*tree_map(grown, args), **tree_map(grown, kwargs))
    except Exception:  # a function that can't tell shapes, or was told this size as a number
        return []
    shapes = [m.shape for m in tree_leaves(more) if isinstance(m, Tensor) and m.ndim == out.ndim]
    return [a for a in range(out.ndim) if any(shape[a] == out.shape[a] + 1 == layout.size + 1 for shape in shapes)]


def _einsum(args: tuple[Any, ...], sampled: Sampled, out: Tensor, lost: bool) -> Layout | None:
    """The sample axis keeps its letter."""
    first, layout = sampled[0]
    if (letters := _sample_letters(args, sampled)) is None:
        axes = _grown(layout, torch.einsum, args, {}, sampled, out)
        return replace(layout, axis=axes[0]) if len(axes) == 1 else None
    right = args[0].replace(" ", "").split("->")[1]
    if (letter := next((letter for letter in letters if letter in right), None)) is not None:
        return replace(letters[letter], axis=right.index(letter))
    return kept(layout, first.ndim, out.shape) if lost else None


def _sample_letters(args: tuple[Any, ...], sampled: Sequence[tuple[Tensor, Layout | None]]) -> dict[str, Layout] | None:
    """By which letters the samples go in an einsum; ``None`` if they aren't all written out."""
    if not isinstance(args[0], str) or "." in args[0] or "->" not in args[0]:
        return None
    operands = args[1:] if not isinstance(args[1], (list, tuple)) else tuple(args[1])
    layouts = {id(x): at for x, at in sampled if at is not None and at.alone is None}
    left = args[0].replace(" ", "").split("->")[0].split(",")
    pairs = [(term, layouts[id(x)]) for term, x in zip(left, operands, strict=True) if id(x) in layouts]
    return {term[at.axis]: at for term, at in pairs}


# ---- joining ----------------------------------------------------------------------------------------------------


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor) -> Layout | None:
    """``cat``: along the sample axis each part brings its own samples; along another, they have to agree."""
    parts = [p for p in (args[0] if args else kwargs["tensors"]) if p.ndim == out.ndim]  # not the old empty [0]
    dim = next((d for d in (*args[1:2], kwargs.get("dim"), kwargs.get("axis")) if d is not None), 0) % out.ndim
    layouts = {id(t): at for t, at in sampled}
    known = [layouts[id(p)] for p in parts if id(p) in layouts]
    if not known:
        return None
    first = known[0]
    if any(at.axis != first.axis for at in known):
        return None
    if dim != first.axis:
        return first if all(same(at, first) for at in known) else None
    if len(known) != len(parts) and out.is_floating_point():
        return None
    nobody = [out.new_full((p.shape[dim],), -1, dtype=torch.long) for p in parts]
    owners = [
        layouts[id(p)].owners().to(out.device) if id(p) in layouts else no for p, no in zip(parts, nobody, strict=True)
    ]
    return owned(first.n, dim, torch.cat(owners))


def _bagged(args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor) -> Layout | None:
    """A bag belongs to the sample of its entries, or of its offset."""
    input, offsets = bind(args, kwargs, "input", "weight", "offsets")[::2]
    layouts = {id(t): at for t, at in sampled}
    if input.ndim == 2:
        at = layouts.get(id(input), sampled[-1][1])
        return at if at.axis == 0 else None
    if (by := layouts.get(id(offsets))) is not None:
        owners = by.owners()
        if len(owners) == len(out) + 1:  # with the end of the last bag
            owners = owners[:-1] if int(owners[-1]) < 0 else owners[1:]
        return owned(by.n, 0, owners) if len(owners) == len(out) and bool((owners >= 0).all()) else None
    at = sampled[0][1]
    if at.axis != 0 or input.shape[0] != at.size:
        return None
    first = offsets[: len(out)]
    full = torch.cat([first[1:], first.new_tensor([len(input)])]) > first
    if bool(full.all()):
        return owned(at.n, 0, at.owners().to(first.device)[first])
    regular = Layout(at.n, 0, 1, len(out) // at.n)  # an empty bag doesn't say whose it is
    fits = regular.size == len(out) and torch.equal(regular.owners()[full.cpu()], at.owners()[first[full].cpu()])
    return regular if fits else None


def _one_by_one(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor
) -> Layout | None:
    """What becomes of samples that are taken out of the batch: each stays alone until they are joined again."""
    layouts = {id(t): at for t, at in sampled}
    n = sampled[0][1].n
    if func in _JOINS or func in _GATHERS:
        parts = args[0] if args else next(kwargs[name] for name in ("tensors", "sequences") if name in kwargs)
        dim = _joins_at(func, args, kwargs, parts, out)
        new = out.ndim > parts[0].ndim  # the axis, with one entry for each
        known = [(layouts[id(p)].alone, 1 if new else p.shape[dim]) for p in parts if id(p) in layouts]
        owners = [torch.full((count,), k, dtype=torch.long) for k, count in known if k is not None]
        return owned(n, dim, torch.cat(owners)) if len(owners) == len(parts) else None
    if func is Tensor.__setitem__ and out is args[0] and isinstance(i := args[1], int) and id(out) not in layouts:
        return _agrees(out, sampled[-1][1], 0, torch.tensor([i % len(out)]))
    first = sampled[0][1]
    return first if all(same(at, first) for _, at in sampled) else None


def _joins_at(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Sequence[Tensor], out: Tensor
) -> int:
    """The axis along which several tensors are put behind each other."""
    if axes := _GATHERS.get(func):
        return axes[min(max(1, parts[0].ndim), len(axes)) - 1]
    if func is torch._C._nn.pad_sequence:
        return 0 if bind(args, kwargs, "sequences", "batch_first")[1] else 1
    return int(next((d for d in (*args[1:2], kwargs.get("dim")) if d is not None), 0) % out.ndim)


# ---- writing into a part ----------------------------------------------------------------------------------------


def _written(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor
) -> Layout | None:
    """What becomes of a constant into which samples are written."""
    value, layout = sampled[-1]
    if func is Tensor.__setitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if value is not args[2]:
            return kept(layout, value.ndim, out.shape, True)
        if len(index) == 1 and isinstance(index[0], Tensor) and layout.axis == 0:
            i = index[0]
            return _agrees(out, layout, 0, i.nonzero()[:, 0] if i.dtype is torch.bool else i)
        return _assigned(args, layout, value, out)
    if "put" in func.__name__:
        return None
    dim, index, source = bind(args[1:], kwargs, "dim", "index", "source")
    source = kwargs.get("src", source)
    if value is source and dim % out.ndim == layout.axis:
        return _agrees(out, layout, layout.axis, index) if func in _PLACES else None
    return kept(layout, value.ndim, out.shape)


def writes_into(func: Function, args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether a call writes parts of one tensor into ``out``."""
    return func in _WRITES and bool(args) and out is args[0]


def rewritten(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> Layout | None:
    """The layout of a tensor that has samples, after entries of another one were written into it: by doing the same
    with the numbers of the samples.
    """
    layouts = {id(t): at for t, at in sampled}
    target, layout, adds = args[0], layouts[id(args[0])], func in _ADDS
    if func is Tensor.__setitem__:
        index, value = args[1:3]
    elif "put" in func.__name__:
        index, value, adds = bind(args[1:], kwargs, "indices", "values", "accumulate")
    else:
        dim, index, value = bind(args[1:], kwargs, "dim", "index", "source")
        value = kwargs.get("src", value)
    if not isinstance(value, Tensor) or id(value) not in layouts:
        return layout  # a constant
    at = layouts[id(value)]
    if at is None or layout is None or layout.n == 1:
        return layout if layout is not None and layout.n == 1 else None
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if func is Tensor.__setitem__ and _spares(index, layout.axis) and at.alone is None and same(at, layout):
            return layout
        mine = numbered(layout, target)
        theirs = torch.full_like(value, at.alone, dtype=torch.long) if at.alone is not None else numbered(at, value)
        try:
            if func is Tensor.__setitem__:
                after = mine.clone()
                after[index] = theirs
            elif "put" in func.__name__:
                after = mine.index_put(index, theirs)
            else:
                after = (mine.index_copy if "index" in func.__name__ else mine.scatter)(dim, index, theirs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        if torch.equal(mine, after):
            return layout
        return None if adds else read(layout, after, target)


def _spares(index: Any, axis: int) -> bool:
    """Whether an index surely takes all of this axis, and leaves it where it is."""
    index = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index)
    return plain and (axis >= len(index) or index[axis] == slice(None))


def _agrees(out: Tensor, layout: Layout, axis: int, places: Tensor) -> Layout | None:
    """The regular layout of ``out`` whose entries at ``places`` are those that were put there."""
    size, n = out.shape[axis], layout.n
    if size % n or not size:
        return None
    for at in (Layout(n, axis, 1, size // n), Layout(n, axis, size // n, 1)):
        if torch.equal(at.owners()[places.reshape(-1).cpu()], layout.owners().cpu()):
            return at
    return None


def _assigned(args: tuple[Any, ...], layout: Layout, value: Tensor, out: Tensor) -> Layout | None:
    """``out[index] = value``: the axis of ``out`` that the index would bring to where the samples are in ``value``."""
    part = out[args[1]]
    for axis in range(out.ndim):
        if out.shape[axis] == layout.size and layout.owner is None:
            piece = indexed(Tensor.__getitem__, (out, args[1]), {}, replace(layout, axis=axis), part)
            if piece is not None and piece.axis == layout.axis + part.ndim - value.ndim and same(piece, layout):
                return replace(layout, axis=axis)
    return None


# ---- kinds of functions -----------------------------------------------------------------------------------------


_REDUCTIONS = """sum nansum mean nanmean prod amax amin aminmax max min median nanmedian mode quantile var std var_mean
    std_mean norm logsumexp any all argmax argmin count_nonzero kthvalue"""

_POOLS = ("avg", "max", "adaptive_avg", "adaptive_max", "lp")

_WHERE = named("where")
_MASKED = {Tensor.__getitem__} | named("masked_select")
_JOINS = named("cat", "concat", "concatenate")
# What else puts tensors behind each other, and along which axis: that of lists, of tables; empty where the call says.
_GATHERS: dict[Function, tuple[int, ...]] = {
    **dict.fromkeys((*named("stack"), torch._C._nn.pad_sequence), ()),
    **dict.fromkeys(named("vstack", "row_stack"), (0,)),
    **dict.fromkeys(named("hstack"), (0, 1)),
    **dict.fromkeys(named("column_stack"), (1,)),
    **dict.fromkeys(named("dstack"), (2,)),
}
_SPREADS = named("expand", "expand_as", "broadcast_to")
_REDUCES = named(*_REDUCTIONS.split()) | {torch.linalg.vector_norm, torch.linalg.norm}
_REDUCES_DIM = named("sum", "nansum", "mean", "nanmean", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp")
# Sums of some kind, and which argument says over what.
_SUMS: dict[Function, int] = {
    **dict.fromkeys(named("sum", "nansum", "mean", "nanmean", "prod", "logsumexp"), 1),
    **dict.fromkeys(named("std", "var", "std_mean", "var_mean"), 1),
    **dict.fromkeys((*named("norm"), torch.linalg.vector_norm, torch.linalg.norm), 2),
}
_PRODUCTS = named("matmul", "mm", "bmm", "__matmul__") | {F.linear}
# Functions that give as many entries as they take, each from all along one axis; which argument says so.
_ALONG: dict[Function, int] = {
    **dict.fromkeys((*named("softmax", "log_softmax"), F.softmax, F.log_softmax, F.softmin), 1),
    **dict.fromkeys(named("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), 1),
    F.normalize: 2,
}
_ADDS = named("index_add_", "scatter_add_", "scatter_reduce_", "index_add", "scatter_add", "scatter_reduce")
_WRITES = {Tensor.__setitem__} | named(
    "index_add_", "index_copy_", "scatter_", "scatter_add_", "scatter_reduce_", "index_put_"
)
_COPIES = named("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "index_put")
_PLACES = named("index_add_", "index_copy_", "index_add", "index_copy")
# How many of its first argument's last axes a function reads together, or, of two arguments that have samples, of both:
# what is before stays where it is, whatever its size.
_READS: dict[Function, int] = {
    F.linear: 1,
    F.embedding: 0,
    **dict.fromkeys(named("matmul", "mm", "__matmul__"), 1),
    **{getattr(F, f"{name}{d}d"): d + 1 for name in ("conv", "conv_transpose") for d in (1, 2, 3)},
    **{getattr(F, f"{name}_pool{d}d"): d for name in _POOLS for d in (1, 2, 3)},
}
_MEETS: dict[Function, int] = {
    **dict.fromkeys(named("add", "sub", "mul", "div", "true_divide"), 0),
    **dict.fromkeys((*named("matmul", "bmm", "__matmul__"), F.scaled_dot_product_attention), 2),
}
_SPECIAL = {*MOVED, *_WHERE, *_MASKED, *_JOINS, *_GATHERS, *_SPREADS, *_REDUCES, *_WRITES, *_COPIES}
# Where the axis isn't told by its size: it is looked where there is more with more samples.
_GROWS = {*named("tensordot", "cdist", "as_strided", "transpose_copy", "permute_copy"), *_GATHERS} - named("stack")
_SPECIAL |= {F.embedding_bag, torch.einsum, *_GROWS}
