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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .aten import UNKNOWN
from .joining import GATHERS, JOINS, STACKS, bagged, joined, one_by_one, stacked
from .layout import Layout, Sampled, kept, of_one, only, same
from .mixing import PRODUCTS, sample_letters, sums_up
from .moves import MOVED, Function, bind, indexed, named, nonzero_of
from .writing import COPIES, SCATTERS, WRITES, Seen, agree, rewritten, scattered, written


def propagate(
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sampled,
    tensors: Sequence[Tensor],
    out: Tensor,
    lost: bool = False,
    seen: Seen = tuple,
) -> Layout | None:
    """The layout of ``out = func(*args, **kwargs)``; ``sampled`` are those of its ``tensors`` that have samples.

    ``lost``: there are others, of which it isn't known where the samples are (scores of all samples against all).  What
    they are multiplied with is guessed by its size: that couples the batch, and only what is behind it is to be served.
    ``seen`` gives the layouts that tensors had so far.
    """
    if out.is_nested:
        return None
    if sampled[0][1].n == 1:
        return lone_sample(out)
    first, layout = sampled[0]
    inner = (
        not args or first is not args[0] or layout.axis == first.ndim - 1
    )  # most often, it is the first of more axes
    if inner and func in PRODUCTS and not lost and sums_up(func, args, kwargs, sampled):
        return None
    if func not in _SPECIAL and not (UNKNOWN and func in UNKNOWN) and _stays(func, args, sampled, out):
        return layout
    found: Layout | None = None
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            found = _followed(func, args, kwargs, sampled, tensors, out, lost, seen)
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        ArithmeticError,
    ):  # a way to call the function that isn't known
        pass
    beside = func in _PUTS and len(sampled) < len(tensors)
    if found is None and not (lost or beside or out.dtype in _COUNTS) and (n := of_one(sampled)) is not None:
        return Layout(layout.n, alone=n)  # whatever was done to the numbers of one sample
    return found


def _stays(func: Function, args: tuple[Any, ...], sampled: Sampled, out: Tensor) -> bool:
    """The short way to what `_followed` finds for most calls: all samples stay where they are."""
    first, layout = sampled[0]
    shape, axis = out.shape, layout.axis
    if layout.alone is not None or (func is F.embedding and args and first is not args[0]):
        return False
    if func in _ADDS:  # samples of the first factor (of both, if they are batches of matrices) stay where they are
        alike = all(at.axis == 0 and same(at, layout) for _, at in sampled)
        left, right = (any(x is factor for x, _ in sampled) for factor in args[1:3]) if len(args) > 2 else (False, True)
        return alike and left and (not right or args[2].ndim == 3)
    if len(sampled) == 1:
        if first.shape == shape:
            return func not in PRODUCTS or not args or first is args[0]
        front = first.ndim - _READS.get(func, first.ndim)
        if axis < front and args and first is args[0] and shape[:front] == first.shape[:front]:
            return len(shape) <= first.ndim or func is F.embedding  # else new axes were put in front
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
    seen: Seen,
) -> Layout | None:
    first, layout = sampled[0]
    if any(at.alone is not None for _, at in sampled) or (
        func in GATHERS and of_one(sampled) is None and all(only(at) is not None for _, at in sampled)
    ):
        return one_by_one(func, args, kwargs, sampled, out, seen)
    if args and first is args[0] and (follow := MOVED.get(func)) is not None and not _is_choice(func, args):
        return follow(func, args, kwargs, layout, out)
    if (
        func in _MASKED and len(args) > 1 and first is args[1] and first.dtype is torch.bool
    ):  # constants picked by a mask
        return nonzero_of(func, (first,), {}, layout, out)
    if func in JOINS:
        return joined(args, kwargs, sampled, out)
    if func in STACKS:
        return stacked(func, args, kwargs, sampled, out)
    if func is F.embedding_bag:
        return bagged(args, kwargs, sampled, out)
    if func is F.embedding and (table := bind(args, kwargs, "input", "weight")[1]) is sampled[-1][0]:
        return indexed(Tensor.__getitem__, (table, args[0] if args else kwargs["input"]), {}, sampled[-1][1], out)
    if func in SCATTERS:
        return None if lost else scattered(args, kwargs, sampled, out, seen)
    if (func in WRITES and args and out is args[0] and out is not first) or (func in COPIES and args[0] is not first):
        return written(func, args, kwargs, sampled, out, seen)
    if func in COPIES and len(sampled) > 1:
        return rewritten(func, args, kwargs, sampled)
    if func is F.linear and len(sampled) == 1 and len(args) > 1 and first is args[1]:  # samples as a weight's outputs
        return layout.placed(out.ndim - 1) if layout.axis == 0 and first.ndim == 2 else None
    if func in _COUNTED and len(sampled) == 1 and args and first is args[0]:  # entry k is of those that are k
        return agree(out, layout.n, 0, first.flatten(), layout.owners(), seen) if first.ndim == 1 else None
    if func is torch.cdist:
        return _distances(args, kwargs, sampled, out)
    if func in _GROWS or func in _ADDS:
        axes = _grown(layout, func, args, kwargs, sampled, out)
        return layout.placed(axes[0]) if len(axes) == 1 else None
    if func is torch.einsum:
        return _einsum(args, sampled, out, lost)
    if func in _REDUCES and len(sampled) == 1:
        if (axis := _axis_behind(func, args, kwargs, layout.axis, first.ndim)) is not None and layout.fits(
            out.shape, axis
        ):
            return layout.placed(axis)
        axes = _grown(layout, func, args, kwargs, sampled, out)
        return layout.placed(axes[0]) if len(axes) == 1 else None
    if func in UNKNOWN:
        return _told_by_size(func, args, kwargs, sampled, out)
    broadcast = func in _SPREADS or any(t.ndim == out.ndim for t in tensors)
    found: Layout | None = None
    for x, candidate in sorted(sampled, key=lambda pair: -pair[0].numel()):
        place: Layout | None = None
        aside = x.shape != out.shape or any(y.shape == x.shape and at.axis != candidate.axis for y, at in sampled)
        several = aside and sum(size == candidate.size for size in out.shape) > 1
        picked = candidate.owner is not None and x.ndim != out.ndim  # as many as another axis is long, by chance
        if several or (picked and candidate.size in out.shape):
            axes = _grown(candidate, func, args, kwargs, sampled, out)
            if len(axes) > 1:
                return None  # products of samples with samples
            if picked and not axes:
                continue
            place = candidate.placed(axes[0]) if axes else None
        place = place or kept(candidate, x.ndim, out.shape, broadcast)
        if place is not None and found is None:
            found = place
        elif place is not None and found is not None and not (place.axis == found.axis and same(place, found)):
            return None  # entries of different samples meet, or sizes coincide
    return found


def _axis_behind(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, ndim: int) -> int | None:
    """Where an axis is after others were reduced, if the call says so in the usual way: ``sum(x, dim, keepdim)``."""
    dim, keep = bind(args[1:] if func in _REDUCES_DIM else (), kwargs, "dim", "keepdim")
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or any(type(d) is not int for d in dims) or not isinstance(keep, (bool, type(None))):
        return None
    gone = {d % ndim for d in dims}
    return None if axis in gone else axis if keep else axis - sum(d < axis for d in gone)


def _is_choice(func: Function, args: tuple[Any, ...]) -> bool:
    """``where(condition, this, that)``, not ``where(condition)``."""
    return func in _WHERE and len(args) > 1


# ---- anything else: where the size is found again ---------------------------------------------------------------


def _told_by_size(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor
) -> Layout | None:
    """Of an operation that isn't known: nothing is guessed where several axes fit."""
    found: Layout | None = None
    for x, at in sampled:
        axes = [axis for axis in range(out.ndim) if at.fits(out.shape, axis)]
        if len(axes) > 1 or (axes and at.owner is not None and x.shape != out.shape):
            axes = _grown(at, func, args, kwargs, sampled, out) or axes
        if len(axes) > 1 or (axes and found is not None and not (found.axis == axes[0] and same(found, at))):
            return None
        found = at.placed(axes[0]) if axes else found
    return found


def _grown(
    layout: Layout, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor
) -> list[int]:
    """Call the function once more for its shapes only, with more samples: the axes on which there is more."""
    axis_of = {id(t): at.axis for t, at in sampled if at.size == layout.size}

    def grown(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        axis = axis_of.get(id(t))
        if axis is None and func in GATHERS and t.shape[layout.axis : layout.axis + 1] == (layout.size,):
            axis = layout.axis  # a shared row, given to each
        return torch.empty([size + (a == axis) for a, size in enumerate(t.shape)], dtype=t.dtype, device="meta")

    try:
        more = func(*tree_map(grown, args), **tree_map(grown, kwargs))
    except Exception:  # a function that can't tell shapes, or was told this size as a number
        return []
    shapes = [m.shape for m in tree_leaves(more) if isinstance(m, Tensor) and m.ndim == out.ndim]
    return [a for a in range(out.ndim) if any(shape[a] == out.shape[a] + 1 == layout.size + 1 for shape in shapes)]


def _distances(args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sampled, out: Tensor) -> Layout | None:
    """``[*B, P, D]`` and ``[*B, Q, D]`` to ``[*B, P, Q]``, with batches that broadcast."""
    layouts = {id(x): at for x, at in sampled}
    places = []
    for i, x in enumerate(bind(args, kwargs, "x1", "x2")):
        if (at := layouts.get(id(x))) is not None:
            behind = x.ndim - at.axis - (i if at.axis == x.ndim - 2 else 0)
            places.append(at.placed(out.ndim - behind))
            if at.axis == x.ndim - 1 or not at.fits(out.shape, out.ndim - behind):
                return None
    first = places[0]
    return first if all(at.axis == first.axis and same(at, first) for at in places) else None


def _einsum(args: tuple[Any, ...], sampled: Sampled, out: Tensor, lost: bool) -> Layout | None:
    """The sample axis keeps its letter."""
    first, layout = sampled[0]
    if (letters := sample_letters(args, sampled)) is None:
        axes = _grown(layout, torch.einsum, args, {}, sampled, out)
        return layout.placed(axes[0]) if len(axes) == 1 else None
    right = args[0].replace(" ", "").split("->")[1]
    if (letter := next((letter for letter in letters if letter in right), None)) is not None:
        return letters[letter].placed(right.index(letter))
    return kept(layout, first.ndim, out.shape) if lost else None


# ---- kinds of functions -----------------------------------------------------------------------------------------


_REDUCTIONS = """sum nansum mean nanmean prod amax amin aminmax max min median nanmedian mode quantile var std var_mean
    std_mean norm logsumexp any all argmax argmin count_nonzero kthvalue"""

_POOLS = ("avg", "max", "adaptive_avg", "adaptive_max", "lp")

_WHERE = named("where")
_MASKED = {Tensor.__getitem__} | named("masked_select")
_SPREADS = named("expand", "expand_as", "broadcast_to")
_REDUCES = named(*_REDUCTIONS.split()) | {torch.linalg.vector_norm, torch.linalg.norm}
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
_SPECIAL = {*MOVED, *_WHERE, *_MASKED, *JOINS, *GATHERS, *_SPREADS, *_REDUCES, *WRITES, *COPIES}
# Where the axis isn't told by its size: it is looked where there is more with more samples.
_GROWS = {
    *named("tensordot", "inner", "addbmm", "chain_matmul", "as_strided", "transpose_copy", "permute_copy"),
    *GATHERS,
} - STACKS
_GROWS |= {torch.linalg.multi_dot, torch.linalg.solve, torch.linalg.solve_triangular, torch.kron}
_ADDS = named("addmm", "baddbmm", "addmv", "addr")
_SPECIAL |= {F.embedding_bag, torch.einsum, torch.cdist, *_GROWS}
_COUNTED = named("bincount")
_SPECIAL |= _COUNTED
_COUNTS = {torch.int64, torch.int32, torch.bool}  # indices and masks, of whatever they are put to
_PUTS = {*JOINS, *GATHERS, *WRITES, *COPIES}  # beside constants, which are nobody's
