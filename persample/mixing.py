"""Calls that surely couple the samples, by how they are called: entries of different samples meet, or are summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .joining import GATHERS, JOINS
from .layout import Layout, of_one, only, same
from .moves import MOVED, Function, is_axis, named, nonzero_of, recurred, sort_axis, sorted_along
from .writing import COPIES, WRITES

# Sums of some kind, and which argument says over what.
SUMS: dict[Function, int] = {
    **dict.fromkeys(named("sum", "nansum", "mean", "nanmean", "prod", "logsumexp"), 1),
    **dict.fromkeys(named("std", "var", "std_mean", "var_mean", "median", "nanmedian", "mode"), 1),
    **dict.fromkeys(named("norm", "quantile", "nanquantile", "kthvalue"), 2),
    **dict.fromkeys((torch.linalg.vector_norm, torch.linalg.norm), 2),
}
# Largest and smallest numbers.
EXTREMES = dict.fromkeys(named("amax", "amin", "aminmax", "max", "min", "argmax", "argmin"), 1)
# Whether there are some, and how many.
TESTS = named("any", "all", "count_nonzero")
# Functions that don't care how numbers are shifted against each other by one for all.
SHIFTS = named("add", "sub", "subtract", "rsub", "add_", "sub_", "__iadd__", "__isub__", "__radd__", "__rsub__")
PRODUCTS = named("matmul", "mm", "bmm", "__matmul__") | {F.linear}
_FFTN = {getattr(torch.fft, name) for name in ("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn")}
# Functions that give as many entries as they take, each from all along some axes; which argument says so, and what is
# meant without it.
ALONG: dict[Function, tuple[int, Any]] = {
    **dict.fromkeys((*named("softmax", "log_softmax"), F.softmax, F.log_softmax, F.softmin), (1, None)),
    **dict.fromkeys((torch.special.softmax, torch.special.log_softmax), (1, None)),
    **dict.fromkeys(named("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "cumsum_", "cumprod_"), (1, None)),
    F.gumbel_softmax: (4, -1),
    F.normalize: (2, 1),
    **{getattr(torch.fft, name): (2, -1) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{getattr(torch.fft, name): (2, (-2, -1)) for name in ("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2")},
    **dict.fromkeys(_FFTN, (2, None)),
}
NORMS = {
    *(F.layer_norm, torch.layer_norm, torch.native_layer_norm, F.rms_norm, torch.rms_norm),
    *(F.group_norm, torch.group_norm, F.instance_norm, torch.instance_norm, F.local_response_norm),
}
_RENORMS = named("renorm")
NORMS |= _RENORMS
PLACES = named("cummax", "cummin")  # those of ALONG that tell, too, without a gradient, where they found their numbers
ORDERS = {*ALONG, *(f for f, follow in MOVED.items() if follow is sorted_along)}
CHOICES, CHOSEN = named("where"), ("condition", "input", "other")  # of two tensors by a mask, and their names
BY_PLACE = {*SUMS, *EXTREMES, *TESTS, *ALONG, *MOVED, *PRODUCTS}  # what they act on is looked for in front


def in_order(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with what it acts on in front, where that was given by name: ``torch.mean(input=h, dim=0)``."""
    if func not in BY_PLACE or (func in CHOICES and not args):
        return args, kwargs
    first = [] if args else [name for name in ("input", "x") if name in kwargs]
    seconds = ("other", "mat2", "weight") if func in PRODUCTS else CHOSEN if func in CHOICES else ()
    second = [name for name in seconds if name in kwargs and len(args) < 2]
    names = first + second if args or first else []
    return (*args, *[kwargs[n] for n in names]), {name: x for name, x in kwargs.items() if name not in names}


def mixes(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> bool:
    """Whether entries of different samples surely meet, one on one."""
    (x, a), *others = sampled
    moves = func in MOVED and not (MOVED[func] is nonzero_of and len(args) > 1)  # `where` may be a choice
    if not others and not moves and func not in ALONG and func not in NORMS:
        return False
    if of_one(sampled) is not None or (func in GATHERS and all(only(at) is not None for _, at in sampled)):
        return False
    if any(at is not None and at.alone is not None for _, at in sampled):
        lone = func not in JOINS | GATHERS.keys() and func not in WRITES and not moves and a is not None and a.n > 1
        return lone and a is not None and not all(b is None or same(a, b) for _, b in others)
    if a is not None and MOVED.get(func) is recurred and not isinstance(args[3], (tuple, list)):
        return a.axis == 0 and a.n > 1 and x is args[0]
    if a is not None and MOVED.get(func) is sorted_along and x is args[0] and x.ndim > 1 and a.n > 1:
        return sort_axis(func, args, kwargs) == a.axis
    if a is not None and a.n > 1 and x.requires_grad and _runs_along(func, args, kwargs, x, a.axis):
        return True
    if func in NORMS and a is not None and a.n > 1 and x is _given(0, "input", args, kwargs) and x.requires_grad:
        return _normalises(func, args, kwargs, x.ndim, a)
    if func is torch.einsum and a is not None and a.n > 1:
        letters = _letters(args, sampled) or []
        return any(letter != letters[0][0] or not same(at, letters[0][1]) for letter, at in letters)
    if a is None or not others or moves or func in WRITES or func in COPIES:
        return False
    if func in JOINS:  # not of single samples' parts
        if all(only(at) is not None for _, at in sampled):
            return False
        dim = next((d for d in (*args[1:2], kwargs.get("dim"), kwargs.get("axis")) if d is not None), 0)
        beside = is_axis(dim) and dim % max(1, x.ndim) != a.axis
        return beside and any(b is not None and b.axis == a.axis and not same(a, b) for _, b in others)
    if func is F.embedding_bag:  # offsets say which entries are a sample's; those of others may be none
        return False
    slices = {sample for x, at in sampled if x.requires_grad and (sample := only(at)) is not None}
    if func not in GATHERS and any(at is not None and only(at) != sample for sample in slices for _, at in sampled):
        return True  # one sample's values act on others
    behind = x.ndim - 2 if func in PRODUCTS and a.axis < x.ndim - 2 else 0  # batches of matrices
    alike = [b for y, b in others if b is not None and b.axis == a.axis and _alike(x, y, a, b, behind)]
    return not all(same(a, b) for b in alike)


def _alike(x: Tensor, y: Tensor, a: Layout, b: Layout, behind: int) -> bool:
    """Whether entries of the two tensors surely meet along their sample axes."""
    if x.shape == y.shape:
        return True
    if x.ndim != y.ndim or a.size != b.size:
        return False
    fits = all(s == t or 1 in (s, t) for s, t in zip(x.shape, y.shape, strict=True))  # they broadcast
    return fits or a.axis < behind


def sums_up(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> bool:
    """Whether what a call gives is surely made of all samples together: their axis is reduced, or summed over in a
    product of two tensors that both have it.  A largest number is none of these: it is mostly there to be subtracted
    before an exponential, which changes nothing.
    """
    known = [(x, at) for x, at in sampled if at is not None and at.alone is None and at.n > 1]
    if not known or len(known) < len(sampled) or of_one(known) is not None:
        return False
    (x, at), *others = known
    if func in PRODUCTS and not others and len(args) > 1:  # with a constant
        second = x.ndim - 1 if func is F.linear else max(0, x.ndim - 2)
        return at.axis == (x.ndim - 1 if x is args[0] else second)
    if (place := SUMS.get(func)) is not None and not others and args and x is args[0]:
        return _reduced(place, args, kwargs, at.axis, x.ndim)
    if func is torch.einsum:
        letters = sample_letters(args, sampled)
        return letters is not None and not {*letters} & {*args[0].split("->")[1]}
    if func in PRODUCTS and len(others) == 1 and args and x is args[0] and x.ndim > 1:
        y, by = others[0]
        row = max(0, y.ndim - 2) if func is not F.linear else y.ndim - 1
        return len(args) > 1 and y is args[1] and at.axis == x.ndim - 1 and by.axis == row
    return False


def extent(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> int:
    """Whether a call gives what is made of all samples together: 3, their sum; 2, the largest or smallest of them; 1,
    what is counted or tested (any number of integers, or a flag).
    """
    counts = func in TESTS or not any(x.is_floating_point() or x.is_complex() for x, _ in sampled)
    if (func in EXTREMES or func in TESTS) and len(sampled) == 1:
        x, at = sampled[0]
        if at is None or only(at) is not None or at.n == 1 or not args or x is not args[0]:
            return 0
        return (1 if counts else 2) * _reduced(1, args, kwargs, at.axis, x.ndim)
    return (1 if counts else 3) * sums_up(func, args, kwargs, sampled)


def ranks(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], sampled: Sequence[tuple[Tensor, Layout | None]]
) -> bool:
    """Whether a call without gradient tells a sample its place among the others: running counts, orders."""
    x, at = sampled[0]
    if at is None or at.n == 1 or at.alone is not None or not args or x is not args[0]:
        return False
    if func in ALONG:
        return _runs_along(func, args, kwargs, x, at.axis)
    return x.is_floating_point() and sort_axis(func, args, kwargs) == at.axis


def _reduced(place: int, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, ndim: int) -> bool:
    """Whether a reduction takes this axis, with its dims at this ``place`` among the arguments."""
    dim = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if dim is None or isinstance(dim, bool):  # a flag is `unbiased`: std(False) is of all
        return True
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return all(map(is_axis, dims)) and (not dims or axis in {d % ndim for d in dims})


def _runs_along(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, axis: int) -> bool:
    """Whether all entries along this axis act on each other (softmax), where the call says so."""
    place, default = ALONG.get(func, (0, None))
    if not place or not args or x is not args[0]:
        return False
    dim = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else default))
    if dim is None and func in _FFTN:
        sizes = kwargs.get("s", args[1] if len(args) > 1 else None)
        dim = range(-x.ndim if sizes is None else -len(sizes), 0)
    dims = dim if isinstance(dim, (tuple, list, range)) else (dim,)
    return any(is_axis(d) and d % max(1, x.ndim) == axis for d in dims)


def _normalises(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int, a: Layout) -> bool:
    """Whether numbers of several samples are normalised together."""
    if func in (F.instance_norm, torch.instance_norm):
        return a.axis > 1
    if func is F.local_response_norm:
        return a.axis == 1
    if func in _RENORMS:  # every slice along one axis
        return bool(a.axis != _given(2, "dim", args, kwargs) % ndim)
    if func in (F.group_norm, torch.group_norm):
        channels = a.size // _given(1, "num_groups", args, kwargs)  # of a group
        return a.axis > 1 or (a.axis == 1 and (a.owner is not None or a.inner % channels != 0))
    shape = _given(1, "normalized_shape", args, kwargs)
    return a.axis >= ndim - (len(shape) if isinstance(shape, (tuple, list)) else 1)


def _given(place: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def sample_letters(args: tuple[Any, ...], sampled: Sequence[tuple[Tensor, Layout | None]]) -> dict[str, Layout] | None:
    """By which letters the samples go in an einsum; ``None`` if they aren't all written out."""
    pairs = _letters(args, sampled)
    return None if pairs is None else dict(pairs)


def _letters(args: tuple[Any, ...], sampled: Sequence[tuple[Tensor, Layout | None]]) -> list[tuple[str, Layout]] | None:
    """The same for every operand."""
    if not isinstance(args[0], str) or "." in args[0] or "->" not in args[0]:
        return None
    operands = args[1:] if not isinstance(args[1], (list, tuple)) else tuple(args[1])
    layouts = {id(x): at for x, at in sampled if at is not None and at.alone is None}
    left = args[0].replace(" ", "").split("->")[0].split(",")
    pairs = [(term, layouts[id(x)]) for term, x in zip(left, operands, strict=True) if id(x) in layouts]
    return [(term[at.axis], at) for term, at in pairs]
