"""Calls that surely couple the samples, by how they are called: entries of different samples meet, or are summed up."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .joining import GATHERS, JOINS, picked_in_bags
from .jointly import JOINTLY, meets
from .layout import Function, Layout, Operation, Sampled, merged, of_one, only, owned, same
from .moves import MOVED, is_axis, is_choice, named, recurred, sort_axis, sorted_along
from .writing import COPIES, WRITES

# Sums of some kind, and which argument says over what.
SUMS: dict[Function, int] = {
    **dict.fromkeys(named("sum", "nansum", "mean", "nanmean", "prod", "logsumexp"), 1),
    **dict.fromkeys(named("std", "var", "std_mean", "var_mean", "median", "nanmedian", "mode"), 1),
    **dict.fromkeys(named("norm", "quantile", "nanquantile", "kthvalue"), 2),
    **dict.fromkeys((torch.linalg.vector_norm, torch.linalg.norm), 2),
}
# Criteria, which sum too unless `reduction` says not to.
LOSSES = {getattr(F, name) for name in dir(F) if name.endswith("_loss")}
LOSSES |= {F.cross_entropy, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div}
# Largest and smallest numbers.
EXTREMES = dict.fromkeys(named("amax", "amin", "aminmax", "max", "min", "argmax", "argmin"), 1)
# Whether there are some, and how many.
TESTS = named("any", "all", "count_nonzero")
# Functions that don't care how numbers are shifted against each other by one for all.
SHIFTS = named("add", "sub", "subtract", "rsub", "add_", "sub_", "__iadd__", "__isub__", "__radd__", "__rsub__")
ATTENTION = F.scaled_dot_product_attention
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
    **dict.fromkeys((*named("diff"), torch.linalg.cross, torch.linalg.vecdot), (2, -1)),
    **dict.fromkeys(named("cross"), (2, None)),
    **dict.fromkeys((torch.trapezoid, torch.trapz, torch.cumulative_trapezoid), (3, -1)),
    **dict.fromkeys(named("cosine_similarity"), (2, 1)),
    torch.gradient: (9, None),
}
NORMS = {
    *(F.layer_norm, torch.layer_norm, torch.native_layer_norm, F.rms_norm, torch.rms_norm),
    *(
        F.group_norm,
        torch.group_norm,
        torch.native_group_norm,
        F.instance_norm,
        torch.instance_norm,
        F.local_response_norm,
    ),
}
_OF_GROUPS: dict[Function, int] = {F.group_norm: 1, torch.group_norm: 1, torch.native_group_norm: 6}
_RENORMS, _CROSS = named("renorm", "renorm_"), named("cross")
NORMS |= _RENORMS
PLACES = named("cummax", "cummin")  # those of ALONG that tell, too, without a gradient, where they found their numbers
ORDERS = {*ALONG, *(f for f, follow in MOVED.items() if follow is sorted_along)}
CHOICES, CHOSEN = named("where"), ("condition", "input", "other")  # of two tensors by a mask, and their names
_BY_ITSELF = {*MOVED, *ALONG, *NORMS, *JOINTLY, F.embedding_bag}  # what can mix the entries of one tensor
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


def mixes(op: Operation) -> bool:
    """Whether entries of different samples surely meet, one on one."""
    (x, a), *others = op.sampled
    if not others and op.func not in _BY_ITSELF:
        return False
    if of_one(op.sampled) is not None or (op.func in GATHERS and all(only(at) is not None for _, at in op.sampled)):
        return False
    moves = op.func in MOVED and not is_choice(op)
    if any(at.alone is not None for _, at in op.known):
        single = op.func in JOINS or op.func in GATHERS or op.func in WRITES or moves or a is None or a.n == 1
        return not single and not all(b is None or same(a, b) for _, b in others)  # type: ignore[arg-type]
    if op.func in JOINTLY and meets(op):
        return True
    if op.func is F.embedding_bag and (picked := picked_in_bags(op)) is not None:
        return picked[1]
    if a is None:
        return False
    if a.n > 1 and (found := _mixes_itself(op, x, a)) is not None:
        return found
    if not others or moves or op.func in WRITES or op.func in COPIES:
        return False
    return _joins_others(op, x, a) if op.func in JOINS else _meet(op, x, a)


def _mixes_itself(op: Operation, x: Tensor, a: Layout) -> bool | None:
    """Whether a function lets the entries of one tensor meet along its samples; ``None``: it isn't of these."""
    follow, first = MOVED.get(op.func), bool(op.args) and x is op.args[0]
    if follow is recurred and not isinstance(op.args[3], (tuple, list)):  # not packed: samples one after the other
        return a.axis == 0 and first
    if follow is sorted_along and first and x.ndim > 1:
        return sort_axis(op) == a.axis
    if x.requires_grad and _runs_along(op, x, a.axis):
        return True
    if op.func in NORMS and x is op.given(0, "input") and x.requires_grad:
        return _normalises(op, x.ndim, a)
    if op.func is torch.einsum:
        letters, _ = _letters(op) or ([], "")
        return any(letter != letters[0][0] or not same(at, letters[0][1]) for letter, at in letters)
    return None


def _joins_others(op: Operation, x: Tensor, a: Layout) -> bool:
    """Whether ``cat`` puts samples beside others; not of single samples' parts."""
    if all(only(at) is not None for _, at in op.sampled):
        return False
    dim = next((d for d in (*op.args[1:2], op.kwargs.get("dim"), op.kwargs.get("axis")) if d is not None), 0)
    beside = is_axis(dim) and dim % max(1, x.ndim) != a.axis
    return beside and any(b is not None and b.axis == a.axis and not same(a, b) for _, b in op.sampled[1:])


def _meet(op: Operation, x: Tensor, a: Layout) -> bool:
    """Whether a function of several tensors lets one's samples meet another's."""
    if op.func is F.embedding_bag:  # offsets say which entries are a sample's; those of others may be none
        return False
    slices = {sample for y, at in op.sampled if y.requires_grad and (sample := only(at)) is not None}
    if op.func not in GATHERS and any(
        at is not None and only(at) != sample for sample in slices for _, at in op.sampled
    ):
        return True  # one sample's values act on others
    behind = x.ndim - 2 if op.func in PRODUCTS and a.axis < x.ndim - 2 else 0  # batches of matrices
    alike = [(y, b) for y, b in op.sampled[1:] if b is not None and b.axis == a.axis and _alike(x, y, a, b, behind)]
    constant = not x.requires_grad  # of which some entries may be nobody's
    return not all(same(a, b) or ((constant or not y.requires_grad) and merged(a, b)) for y, b in alike)


def acts_across(op: Operation) -> bool | None:
    """Whether samples are added up with weights that are of samples too: attention along them, `_sums_across`;
    ``None``: that can't be told.
    """
    if (op.func not in PRODUCTS and op.func is not ATTENTION) or len(op.sampled) < 2:
        return False
    if any(at.alone is not None for _, at in op.known) or of_one(op.sampled) is not None:
        return False
    return _attends(op) if op.func is ATTENTION else _sums_across(op)


def _attends(op: Operation) -> bool:
    """Whether attention runs along the samples (a forgotten ``batch_first``), unless a mask keeps them apart."""
    x, y, mask = op.given(0, "query"), op.given(1, "key"), op.given(3, "attn_mask")
    a, b = op.of(x), op.of(y)
    if a is None or b is None or a.n == 1 or a.axis != x.ndim - 2 or b.axis != y.ndim - 2:
        return False
    if mask is None:
        return True
    if mask.dtype is not torch.bool:  # what a softmax leaves of it: -1e9 is as good as none
        least = torch.finfo(torch.float64).min
        mask = (mask.detach().double() - mask.detach().double().amax(-1, True).clamp(min=least)).exp() > 0
    return bool((mask & _apart(a, b).to(mask.device)).any())


def _sums_across(op: Operation) -> bool | None:
    """Whether a product sums over samples with weights that are of samples too, and not zero between different ones:
    not one with a diagonal or block diagonal matrix.

    Whose rows they are is not known of weights that were lost (products of samples with each other).  There, rows that
    take from several samples surely do; rows that take from one each don't, if these are in an order that rows may be
    in, and else can't be told.
    """
    x, y = op.args[:2]
    pairs = ((y, _summed(op, y), x, x.ndim - 1), (x, x.ndim - 1, y, _summed(op, y)))
    for t, axis, weight, along in pairs:
        at, own = op.of(t), op.of(weight)
        rows = 2 * weight.ndim - 3 - along  # the other axis of the matrix
        if at is None or at.n == 1 or at.axis != axis or weight.ndim < 2 or not any(weight is z for z, _ in op.sampled):
            continue
        if weight.layout is torch.strided and (own is None or own.axis == rows):
            used = weight.detach() != 0
            used = used if rows < along else used.mT
            if own is not None:
                return bool((used & _apart(own, at).to(used.device)).any())
            owners = at.owners().to(used.device)
            used &= owners >= 0
            first, last = (torch.where(used, owners, at.n).amin(-1), torch.where(used, owners, -1).amax(-1))
            if bool((first < last).any()):
                return True
            lines = last.reshape(-1, last.shape[-1])  # of every matrix
            return False if all(owned(at.n, 0, line).owner is None for line in lines.unique(dim=0)) else None
    return False


def _apart(a: Layout, b: Layout) -> Tensor:
    """``[a.size, b.size]``: which entries belong to different samples."""
    rows, columns = a.owners()[:, None], b.owners()
    return (rows != columns) & (rows >= 0) & (columns >= 0)


def _alike(x: Tensor, y: Tensor, a: Layout, b: Layout, behind: int) -> bool:
    """Whether entries of the two tensors surely meet along their sample axes."""
    if x.shape == y.shape:
        return True
    if x.ndim != y.ndim or a.size != b.size:
        return False
    fits = all(s == t or 1 in (s, t) for s, t in zip(x.shape, y.shape, strict=True))  # they broadcast
    return fits or a.axis < behind


def sums_up(op: Operation, scalar: bool = False) -> bool:
    """Whether what a call gives, which may be a ``scalar``, is surely made of all samples together: their axis is
    reduced, or summed over in a product of two tensors that both have it.  A largest number is none of these: it is
    mostly there to be subtracted before an exponential, which changes nothing.
    """
    known = [(x, at) for x, at in op.known if at.alone is None and at.n > 1]
    if not known or len(known) < len(op.sampled) or of_one(known) is not None:
        return False
    if op.func in LOSSES:
        return scalar
    if op.func is torch.einsum:
        letters = sample_letters(op)
        return letters is not None and not {*letters[0]} & {*letters[1]}
    (x, at), *others = known
    if op.func in PRODUCTS:
        return _sums_products(op, x, at, others)
    place = SUMS.get(op.func)
    return (
        place is not None and not others and bool(op.args) and x is op.args[0] and _reduced(op, place, at.axis, x.ndim)
    )


def _sums_products(op: Operation, x: Tensor, at: Layout, others: Sampled) -> bool:
    """Whether a product of matrices sums over the samples."""
    if len(op.args) < 2:
        return False
    if not others:  # with a constant
        return at.axis == (x.ndim - 1 if x is op.args[0] else _summed(op, x))
    y, by = others[0]
    pair = len(others) == 1 and x is op.args[0] and x.ndim > 1 and y is op.args[1]
    return pair and at.axis == x.ndim - 1 and by.axis == _summed(op, y)


def _summed(op: Operation, second: Tensor) -> int:
    """The axis of the second factor that a product of matrices sums over."""
    return second.ndim - 1 if op.func is F.linear else max(0, second.ndim - 2)


def extent(op: Operation, out: Tensor) -> int:
    """Whether a call gives what is made of all samples together: 3, their sum; 2, the largest or smallest of them; 1,
    what is counted or tested (any number of integers, or a flag).
    """
    counts = op.func in TESTS or not any(x.is_floating_point() or x.is_complex() for x, _ in op.sampled)
    if (op.func in EXTREMES or op.func in TESTS) and len(op.sampled) == 1:
        x, at = op.sampled[0]
        if at is None or only(at) is not None or at.n == 1 or not op.args or x is not op.args[0]:
            return 0
        return (1 if counts else 2) * _reduced(op, 1, at.axis, x.ndim)
    return (1 if counts else 3) * sums_up(op, not out.ndim)


def ranks(op: Operation) -> bool:
    """Whether a call without gradient tells a sample its place among the others: running counts, orders."""
    x, at = op.sampled[0]
    if at is None or at.n == 1 or at.alone is not None or not op.args or x is not op.args[0]:
        return False
    if op.func in ALONG:
        return _runs_along(op, x, at.axis)
    return x.is_floating_point() and sort_axis(op) == at.axis


def _reduced(op: Operation, place: int, axis: int, ndim: int) -> bool:
    """Whether a reduction takes this axis, with its dims at this ``place`` among the arguments."""
    dim = op.given(place, "dim", "axis")
    if dim is None or isinstance(dim, bool):  # a flag is `unbiased`: std(False) is of all
        return True
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return all(map(is_axis, dims)) and (not dims or axis in {d % ndim for d in dims})


def _runs_along(op: Operation, x: Tensor, axis: int) -> bool:
    """Whether all entries along this axis act on each other (softmax), where the call says so."""
    place, default = ALONG.get(op.func, (0, None))
    if not place or not op.args or x is not op.args[0]:
        return False
    dim = op.given(place, "dim", "axis", default=default)
    if dim is None and (op.func in _FFTN or op.func is torch.gradient):
        sizes = op.given(1, "s")
        dim = range(-x.ndim if sizes is None else -len(sizes), 0)
    elif dim is None and op.func in _CROSS and 3 in x.shape:
        dim = x.shape.index(3)
    dims = dim if isinstance(dim, (tuple, list, range)) else (dim,)
    return any(is_axis(d) and d % max(1, x.ndim) == axis for d in dims)


def _normalises(op: Operation, ndim: int, a: Layout) -> bool:
    """Whether numbers of several samples are normalised together."""
    if op.func in (F.instance_norm, torch.instance_norm):
        return a.axis > 1 and op.given(5, "use_input_stats", default=True) is not False
    if op.func is F.local_response_norm:
        return a.axis == 1
    if op.func in _RENORMS:  # every slice along one axis
        return bool(a.axis != op.given(2, "dim") % ndim)
    if op.func in _OF_GROUPS:
        channels = a.size // op.given(_OF_GROUPS[op.func], "num_groups", "group")  # of a group
        return a.axis > 1 or (a.axis == 1 and (a.owner is not None or a.inner % channels != 0))
    shape = op.given(1, "normalized_shape")
    return a.axis >= ndim - (len(shape) if isinstance(shape, (tuple, list)) else 1)


def sample_letters(op: Operation) -> tuple[dict[str, Layout], str] | None:
    """By which letters the samples go in an einsum, and the letters of its output; ``None`` if it has none."""
    spelled = _letters(op)
    return None if spelled is None else (dict(spelled[0]), spelled[1])


def _letters(op: Operation) -> tuple[list[tuple[str, Layout]], str] | None:
    """The same for every operand."""
    equation, first = op.args[:2]
    if not isinstance(equation, str):
        return None
    operands = first if isinstance(first, (list, tuple)) else op.args[1:]
    terms, right = _spelled(equation, operands)
    layouts = {id(x): at for x, at in op.known if at.alone is None}
    pairs = [(term, layouts[id(x)]) for term, x in zip(terms, operands, strict=True) if id(x) in layouts]
    return [(term[at.axis], at) for term, at in pairs], right


def _spelled(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """The terms of an einsum and its output, an ellipsis as letters, and what may be left out written down."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = [letter for letter in {*left} - {*",."} if left.count(letter) == 1]
        right = "..." * ("..." in left) + "".join(sorted(once))
    if "..." not in left:
        return terms, right
    behind = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    free = [letter for letter in string.ascii_letters if letter not in equation][: max(0, *behind)]
    terms = [t.replace("...", "".join(free[len(free) - n :])) for t, n in zip(terms, behind, strict=True)]
    return terms, right.replace("...", "".join(free))
