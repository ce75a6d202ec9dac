"""How operations move the samples of a batch: the `Layout` of an output, from those of the arguments.

====================  =================================================================================================
views, indexing ...   the table of single functions in `persample.moves`
concatenation         each part brings the numbers of its samples (`persample.joining`)
writing into a part   the layout of the whole under which the part's entries belong to the samples they come from
                      (`persample.writing`)
anything else         samples stay where their size is found again; where that can't be told apart, the function is
                      called once more for its shapes only (device "meta"), with one sample more
====================  =================================================================================================

``None`` means "can't tell", and is an error only where a parameter meets such a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .aten import UNKNOWN
from .calls import common_type
from .joining import GATHERS, JOINS, STACKS, bagged, joined, one_by_one, stacked
from .layout import Function, Layout, Operation, kept, merged, of_one, only, owned, same
from .mixing import PRODUCTS, sample_letters, sums_up
from .moves import MOVED, indexed, is_choice, named, whether
from .writing import COPIES, SCATTERS, WRITES, agree, rewritten, scattered, written


def propagate(op: Operation, out: Tensor) -> Layout | None:
    """The layout of an output.

    What samples that are lost (scores of all samples against all) are multiplied with is guessed by its size: that
    couples the batch, and only what is behind it is to be served.
    """
    if out.is_nested:
        return None
    first, layout = op.known[0]
    if layout.n == 1:
        return lone_sample(out)
    inner = (
        not op.args or first is not op.args[0] or layout.axis == first.ndim - 1
    )  # most often, it is the first of more axes
    if inner and op.func in PRODUCTS and not op.lost and sums_up(op):
        return None
    if op.func not in _SPECIAL and not (UNKNOWN and op.func in UNKNOWN) and _stays(op, out):
        return layout
    found: Layout | None = None
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            found = _followed(op, out)
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
    ):  # a way to call the function that isn't known
        pass
    beside = op.func in _PUTS and len(op.known) < len(op.tensors)
    if found is None and not (op.lost or beside or out.dtype in _COUNTS) and (n := of_one(op.known)) is not None:
        return Layout(layout.n, alone=n)  # whatever was done to the numbers of one sample
    return found


def _stays(op: Operation, out: Tensor) -> bool:
    """The short way to what `_followed` finds for most calls: all samples stay where they are."""
    func, args, sampled = op.func, op.args, op.known
    first, layout = sampled[0]
    shape, axis = out.shape, layout.axis
    if layout.alone is not None or (func is F.embedding and args and first is not args[0]):
        return False
    if func in _CONVS and (axis or not args or first is not args[0]):  # among channels, or of a weight
        return False
    if func in _ADDS:  # samples of the first factor (of both, if they are batches of matrices) stay where they are
        alike = all(at.axis == 0 and same(at, layout) for _, at in sampled)
        left, right = (any(x is factor for x, _ in sampled) for factor in args[1:3]) if len(args) > 2 else (False, True)
        return alike and left and (not right or args[2].ndim == 3)
    if len(sampled) == 1:
        return _stays_alone(op, first, layout, shape)
    if all(x.shape == shape and at.axis == axis and same(at, layout) for x, at in sampled):
        return True
    front = len(shape) - _MEETS.get(func, len(shape))
    return axis < front and all(x.ndim == len(shape) and at.axis == axis and same(at, layout) for x, at in sampled)


def _stays_alone(op: Operation, x: Tensor, layout: Layout, shape: torch.Size) -> bool:
    """The same for a single tensor with samples."""
    first = not op.args or x is op.args[0]
    if x.shape == shape:
        return first or op.func not in PRODUCTS
    front = x.ndim - _READS.get(op.func, x.ndim)
    if layout.axis < front and first and op.args and shape[:front] == x.shape[:front]:
        return len(shape) <= x.ndim or op.func is F.embedding  # else new axes were put in front
    size = layout.size
    return x.ndim == len(shape) and [a for a, s in enumerate(shape) if s == size] == [layout.axis]


def lone_sample(x: Tensor) -> Layout:
    """With N = 1, everything belongs to the one sample: it is where layers look for a batch."""
    return Layout(1, inner=len(x)) if x.ndim > 1 and len(x) else Layout(1, alone=0)


def _followed(op: Operation, out: Tensor) -> Layout | None:
    first, layout = op.known[0]
    if op.lost and (op.func in JOINS or op.func in GATHERS) and any(only(at) is not None for _, at in op.known):
        return None  # one sample's part beside others of which it isn't known whose they are
    apart = op.func in GATHERS and of_one(op.known) is None and all(only(at) is not None for _, at in op.known)
    if apart or any(at.alone is not None for _, at in op.known):
        return one_by_one(op, out)
    if op.args and first is op.args[0] and (follow := MOVED.get(op.func)) is not None and not is_choice(op):
        return follow(op, layout, out)
    if op.func in _MASKED and first.dtype is torch.bool and (picked := _picked(op, out)) is not None:
        return picked
    if (special := _BY_FUNCTION.get(op.func)) is not None:
        return special(op, out)
    return (_told_by_size if op.func in UNKNOWN else _found_again)(op, out)


# ---- kinds of functions that look at all of their arguments -----------------------------------------------------


def _written(op: Operation, out: Tensor) -> Layout | None:
    first = op.known[0][0]
    into = op.func in WRITES and bool(op.args) and out is op.args[0] and out is not first
    if into or (op.func in COPIES and op.args[0] is not first):
        return written(op, out)
    if op.func not in COPIES or len(op.known) < 2:
        return _found_again(op, out)
    return rewritten(replace(op, sampled=op.known))  # numbers of all samples that are written in are refused elsewhere


def _picked(op: Operation, out: Tensor) -> Layout | None:
    """Constants picked by a mask: ``table[mask]``, ``table[:, mask]``, ``masked_select(table, mask)``."""
    (mask, layout), given = op.known[0], op.given(1, "mask")
    if op.func is not Tensor.__getitem__:  # the mask may have to broadcast
        mask = mask.expand(torch.broadcast_shapes(mask.shape, op.given(0, "input").shape))
        return whether(mask, layout.placed(layout.axis + mask.ndim - given.ndim))
    index = [i for i in (given if isinstance(given, tuple) else (given,)) if type(i) is not int]  # these take an axis
    at = [k for k, i in enumerate(index) if not (i is None or i is Ellipsis or isinstance(i, slice))]
    if len(at) != 1 or index[at[0]] is not mask:
        return None
    return whether(mask, layout).placed(out.ndim - len(index) + at[0] if Ellipsis in index[: at[0]] else at[0])


def _looked_up(op: Operation, out: Tensor) -> Layout | None:
    """A table of the samples' own, of which rows are picked."""
    table, layout = op.known[-1]
    if op.given(1, "weight") is not table:
        return _found_again(op, out)
    return indexed(Operation(Tensor.__getitem__, (table, op.given(0, "input"))), layout, out)


def _gathered(op: Operation, out: Tensor) -> Layout | None:
    """Tensors behind each other, by a function that may have to give them an axis for that (``column_stack``)."""
    whole = all(p.ndim == out.ndim for p in op.given(0, "tensors", "sequences"))
    several = whole and of_one(op.known) is None  # one sample's own parts are its tokens, most likely
    return (joined(op, out) if several else None) or _longer(op, out)


def _as_weight(op: Operation, out: Tensor) -> Layout | None:
    """``linear`` with samples as a weight's outputs."""
    first, layout = op.known[0]
    if len(op.known) > 1 or len(op.args) < 2 or first is not op.args[1]:
        return _found_again(op, out)
    return layout.placed(out.ndim - 1) if layout.axis == 0 and first.ndim == 2 else None


def _in_groups(layout: Layout, groups: int, out: Tensor, axis: int) -> Layout | None:
    """Channels of which every group makes a group of the output's, where no group has those of several samples."""
    owners = layout.owners().view(groups, -1)
    if not torch.equal(owners, owners[:, :1].expand_as(owners)):
        return None
    return owned(layout.n, axis, owners[:, 0].repeat_interleave(out.shape[axis] // groups))


def _cut(op: Operation, out: Tensor) -> Layout | None:
    """``unfold``, ``pixel_shuffle``: every channel becomes several, or several become one."""
    x, layout = op.known[0]
    channels = x.ndim - (2 if op.func is F.fold else 3)
    if layout.axis != channels:
        return _found_again(op, out)
    return _in_groups(layout, min(x.shape[channels], out.shape[channels]), out, channels)


def _convolved(op: Operation, out: Tensor) -> Layout | None:
    """A convolution: samples among the channels, too, where no group has those of several samples."""
    x, weight, groups = op.given(0, "input"), op.given(1, "weight"), op.given(6, "groups", default=1)
    channels, transposed = out.ndim - weight.ndim + 1, op.func in _TRANSPOSED
    if op.func is torch.convolution:
        transposed, groups = op.given(6, "transposed"), op.given(8, "groups")
    places: list[Layout] = []
    for t, at in op.known:
        if t is x and at.axis != channels:
            place: Layout | None = at if at.axis == channels - 1 else _found_again(op, out)
        elif t is x or (transposed and t is weight and at.axis == 0):
            place = _in_groups(at, groups, out, channels)
        else:  # of a weight, or a bias, those for each channel of the output
            fits = at.axis == (1 if transposed and t is weight and groups == 1 else 0)
            place = at.placed(channels) if fits else None
        if place is None or any(place.axis != other.axis or not same(place, other) for other in places):
            return None
        places.append(place)
    return places[0]


def _padded(op: Operation, out: Tensor) -> Layout | None:
    """Samples that nothing is put beside, or taken from, stay where they are."""
    x, layout = op.known[0]
    pads, behind = op.given(1, "pad"), 2 * (x.ndim - 1 - layout.axis)
    return None if len(op.known) > 1 or any(pads[behind : behind + 2]) else layout


def _counted(op: Operation, out: Tensor) -> Layout | None:
    """``bincount``: entry ``k`` is of those that are ``k``."""
    first, layout = op.known[0]
    if len(op.known) > 1 or not op.args or first is not op.args[0]:
        return _found_again(op, out)
    return agree(op, out, layout.n, 0, first.flatten(), layout.owners()) if first.ndim == 1 else None


def _reduced(op: Operation, out: Tensor) -> Layout | None:
    if len(op.known) > 1:
        return _found_again(op, out)
    first, layout = op.known[0]
    axis = _axis_behind(op, layout.axis, first.ndim)
    return layout.placed(axis) if axis is not None and layout.fits(out.shape, axis) else _longer(op, out)


def _axis_behind(op: Operation, axis: int, ndim: int) -> int | None:
    """Where an axis is after others were reduced, if the call says so in the usual way: ``sum(x, dim, keepdim)``."""
    if op.func in _SEVERAL:  # `quantile` of several puts them in front of all axes
        return None
    place = 1 if op.func in _REDUCES_DIM else len(op.args)
    dim, keep = op.given(place, "dim"), op.given(place + 1, "keepdim")
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or any(type(d) is not int for d in dims) or not isinstance(keep, (bool, type(None))):
        return None
    gone = {d % ndim for d in dims}
    return None if axis in gone else axis if keep else axis - sum(d < axis for d in gone)


def _longer(op: Operation, out: Tensor) -> Layout | None:
    """The one axis on which there is more with more samples."""
    layout = op.known[0][1]
    axes = _grown(op, layout, out)
    return layout.placed(axes[0]) if len(axes) == 1 else None


def _distances(op: Operation, out: Tensor) -> Layout | None:
    """``[*B, P, D]`` and ``[*B, Q, D]`` to ``[*B, P, Q]``, with batches that broadcast."""
    places = []
    for i, x in enumerate((op.given(0, "x1"), op.given(1, "x2"))):
        if (at := op.of(x)) is not None:
            behind = x.ndim - at.axis - (i if at.axis == x.ndim - 2 else 0)
            places.append(at.placed(out.ndim - behind))
            if at.axis == x.ndim - 1 or not at.fits(out.shape, out.ndim - behind):
                return None
    first = places[0]
    return first if all(at.axis == first.axis and same(at, first) for at in places) else None


def _einsum(op: Operation, out: Tensor) -> Layout | None:
    """The sample axis keeps its letter."""
    first, layout = op.known[0]
    if (found := sample_letters(op)) is None:
        return _longer(op, out)
    letters, right = found
    if (letter := next((letter for letter in letters if letter in right), None)) is not None:
        return letters[letter].placed(right.index(letter))
    return kept(layout, first.ndim, out.shape) if op.lost else None


# ---- anything else: where the size is found again ---------------------------------------------------------------


def _found_again(op: Operation, out: Tensor) -> Layout | None:
    broadcast = op.func in _SPREADS or any(t.ndim == out.ndim for t in op.tensors)
    found: Layout | None = None
    for x, candidate in sorted(op.known, key=lambda pair: -pair[0].numel()):
        place: Layout | None = None
        aside = x.shape != out.shape or any(y.shape == x.shape and at.axis != candidate.axis for y, at in op.known)
        several = aside and sum(size == candidate.size for size in out.shape) > 1
        picked = candidate.owner is not None and x.ndim != out.ndim  # as many as another axis is long, by chance
        if several or (picked and candidate.size in out.shape):
            axes = _grown(op, candidate, out)
            if len(axes) > 1:
                return None  # products of samples with samples
            if picked and not axes:
                continue
            place = candidate.placed(axes[0]) if axes else None
        place = place or kept(candidate, x.ndim, out.shape, broadcast)
        if place is not None and found is None:
            found = place
        elif place is not None and found is not None and (found := merged(found, place)) is None:
            return None  # entries of different samples meet, or sizes coincide
    return found


def _told_by_size(op: Operation, out: Tensor) -> Layout | None:
    """Of an operation that isn't known: nothing is guessed where several axes fit."""
    found: Layout | None = None
    for x, at in op.known:
        axes = [axis for axis in range(out.ndim) if at.fits(out.shape, axis)]
        if len(axes) > 1 or (axes and at.owner is not None and x.shape != out.shape):
            axes = _grown(op, at, out) or axes
        if len(axes) > 1 or (axes and found is not None and not (found.axis == axes[0] and same(found, at))):
            return None
        found = at.placed(axes[0]) if axes else found
    return found


def _grown(op: Operation, layout: Layout, out: Tensor) -> list[int]:
    """Call the function once more for its shapes only, with more samples: the axes on which there is more."""
    axis_of = {id(t): at.axis for t, at in op.known if at.size == layout.size}
    common = common_type(tree_leaves((op.args, op.kwargs)))  # there is no autocast on this device

    def grown(repeated: bool, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        axis = axis_of.get(id(t))
        if axis is None and repeated and t.shape[layout.axis : layout.axis + 1] == (layout.size,):
            axis = layout.axis  # a shared row, given to each
        kind = t.dtype if common is None or not t.is_floating_point() else common
        return torch.empty([size + (a == axis) for a, size in enumerate(t.shape)], dtype=kind, device="meta")

    for repeated in (op.func in GATHERS, True):
        try:
            args, kwargs = tree_map(partial(grown, repeated), (op.args, op.kwargs))
            more = op.func(*args, **kwargs)
            break
        except Exception:  # a function that can't tell shapes, or was told this size as a number
            continue
    else:
        return []
    shapes = [m.shape for m in tree_leaves(more) if isinstance(m, Tensor) and m.ndim == out.ndim]
    return [a for a in range(out.ndim) if any(shape[a] == out.shape[a] + 1 == layout.size + 1 for shape in shapes)]


# ---- kinds of functions -----------------------------------------------------------------------------------------


_REDUCTIONS = """sum nansum mean nanmean prod amax amin aminmax max min median nanmedian mode quantile nanquantile
    var std var_mean std_mean norm logsumexp any all argmax argmin count_nonzero kthvalue"""

_POOLS = ("avg", "max", "adaptive_avg", "adaptive_max", "lp")

_MASKED = {Tensor.__getitem__} | named("masked_select")
_SPREADS = named("expand", "expand_as", "broadcast_to", "expand_copy")
_REDUCES = named(*_REDUCTIONS.split()) | {torch.linalg.vector_norm, torch.linalg.norm}
_SEVERAL = named("quantile", "nanquantile")
_REDUCES_DIM = named("sum", "nansum", "mean", "nanmean", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp")
# How many of its first argument's last axes a function reads together, or, of two arguments that have samples, of both:
# what is before stays where it is, whatever its size.
_READS: dict[Function, int] = {
    F.linear: 1,
    F.embedding: 0,
    torch.bilinear: 1,
    **dict.fromkeys(named("matmul", "mm", "__matmul__"), 1),
    **{getattr(F, f"{name}{d}d"): d + 1 for name in ("conv", "conv_transpose") for d in (1, 2, 3)},
    **{getattr(F, f"{name}_pool{d}d"): d for name in _POOLS for d in (1, 2, 3)},
}
_MEETS: dict[Function, int] = {
    **dict.fromkeys(named("add", "sub", "mul", "div", "true_divide"), 0),
    torch.bilinear: 1,
    **dict.fromkeys((*named("matmul", "bmm", "__matmul__"), F.scaled_dot_product_attention), 2),
}
# Where the axis isn't told by its size: it is looked where there is more with more samples.
_GROWS = named("tensordot", "inner", "addbmm", "chain_matmul", "transpose_copy", "permute_copy")
_GROWS |= {torch.linalg.multi_dot, torch.linalg.solve, torch.linalg.solve_triangular, torch.kron}
_ADDS = named("addmm", "baddbmm", "addmv", "addr")
_TRANSPOSED = {getattr(F, f"conv_transpose{d}d") for d in (1, 2, 3)}
_CONVS = _TRANSPOSED | {torch.convolution, *(getattr(F, f"conv{d}d") for d in (1, 2, 3))}
# What is special about single functions, where `MOVED` doesn't say it.
_BY_FUNCTION: dict[Function, Callable[[Operation, Tensor], Layout | None]] = {
    **dict.fromkeys(_REDUCES, _reduced),
    **dict.fromkeys(_GROWS | _ADDS, _longer),
    **dict.fromkeys(WRITES | COPIES, _written),
    **dict.fromkeys(SCATTERS, lambda op, out: None if op.lost else scattered(op, out)),
    **dict.fromkeys(JOINS, joined),
    **dict.fromkeys(GATHERS, _gathered),
    **dict.fromkeys(STACKS, stacked),
    **dict.fromkeys((F.pad, torch.constant_pad_nd), _padded),
    **dict.fromkeys(named("bincount"), _counted),
    **dict.fromkeys(named("unbind_copy", "split_copy", "split_with_sizes_copy"), lambda op, out: None),  # which one?
    F.embedding: _looked_up,
    F.embedding_bag: bagged,
    F.linear: _as_weight,
    torch.einsum: _einsum,
    torch.cdist: _distances,
    **dict.fromkeys(_CONVS, _convolved),
    **dict.fromkeys((F.unfold, F.fold, *named("pixel_shuffle", "pixel_unshuffle")), _cut),
}
_SPECIAL = {*MOVED, *_MASKED, *_SPREADS, *_BY_FUNCTION}  # not to be looked at shortly
_SPECIAL -= {F.embedding, F.linear, *_ADDS, *_CONVS}
_COUNTS = {torch.int64, torch.int32, torch.bool}  # indices and masks, of whatever they are put to
_PUTS = {*JOINS, *GATHERS, *WRITES, *COPIES}  # beside constants, which are nobody's
