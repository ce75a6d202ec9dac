"""Per-sample gradients of one parameter, in the cheapest exact form.

``G [N, |P|]`` is the matrix whose row ``n`` is the gradient of the loss of sample ``n`` with respect to one parameter
of shape ``P``.  It has ``N |P|`` entries, but what produces it leaves it *factored*:

====== ============================================= ===========================================================
form   stores                                        row ``n`` of ``G``
====== ============================================= ===========================================================
Dense  ``value [N, *P]``                             ``value[n]``
Outer  ``left [N, K, T, O]``, ``right [N, K, T, I]`` ``sum_t left[n, k, t] (x) right[n, k, t]``, for all ``K`` blocks
Rows   ``index [N, T]``, ``value [N, T, D]``         ``sum_t onehot(index[n, t]) (x) value[n, t]``
Conv   ``input [N, K I, *S]``, ``grad [N, K O, *L]`` the correlation of both, see `persample.convolution`
Pulled ``rows``, ``back``                            ``back`` of row ``n`` of another form: of a tensor that was derived
                                                     from the parameter
====== ============================================= ===========================================================

The forms are closed under `add` (a parameter used several times) and `fold` (several samples counted as one), so that
no reduction knows about tying.  A rule always returns the form it finds; `compact` is for who *keeps* gradients, and
turns into `Dense` what is larger as factors.  What can be computed from a form is in `persample.reductions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Size, Tensor

from . import convolution, cost
from .convolution import Geometry
from .scratch import borrow, fresh, kernel

INDICES = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class Dense:
    """``G`` itself: ``value [N, *P]``."""

    value: Tensor

    @property
    def shape(self) -> Size:
        return self.value.shape[1:]

    def __len__(self) -> int:
        return self.value.shape[0]


@dataclass(frozen=True, eq=False)
class Outer:
    """Sums of outer products: ``sum_t left[n, k, t] (x) right[n, k, t]``, ``[K, O, I]`` reshaped to ``shape``."""

    left: Tensor  # [N, K, T, O]
    right: Tensor  # [N, K, T, I]
    shape: Size  # P

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if not len(left) == len(right) == 4 or left[:3] != right[:3]:
            raise _misfit("left [N, K, T, O] and right [N, K, T, I]", left=left, right=right)
        if left[1] * left[3] * right[3] != Size(self.shape).numel():
            raise _misfit("K O I entries in shape", left=left, right=right, shape=self.shape)

    def __len__(self) -> int:
        return self.left.shape[0]


@dataclass(frozen=True, eq=False)
class Rows:
    """Sums of rows: ``sum_t onehot(index[n, t]) (x) value[n, t]``, ``[V, D]``."""

    index: Tensor  # [N, T] int64 or int32
    value: Tensor  # [N, T, D]
    shape: Size  # P = [V, D]

    def __post_init__(self) -> None:
        index, value = self.index.shape, self.value.shape
        if len(index) != 2 or index != value[:2] or value[2:] != self.shape[1:] or len(self.shape) != 2:
            raise _misfit("index [N, T], value [N, T, D] and shape [V, D]", index=index, value=value, shape=self.shape)
        if self.index.dtype not in INDICES:
            raise _misfit("an int64 or int32 index", index=self.index.dtype)

    def __len__(self) -> int:
        return self.value.shape[0]


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution's weight: ``sum_p grad[n, o, p] input[n, block(o) I + i, p stride + a dilation - padding]``.

    That is entry ``[n, o, i, a]``; what lies outside of the input reads zero.  Transposed convolutions are of this form
    too, with the roles of input and output gradient exchanged.  One more leading spatial dim than ``shape`` has belongs
    to a kernel of size one: that is how samples and uses are folded in.
    """

    input: Tensor  # [N, K I, *S]
    grad: Tensor  # [N, K O, *L]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # below the first entry of each spatial dim; beyond the last, all reads zero
    dilation: tuple[int, ...]
    shape: Size  # P = [K O, I, *kernel]

    def __post_init__(self) -> None:
        input, grad, shape = self.input.shape, self.grad.shape, self.shape
        dims = {len(input) - 2, len(grad) - 2, *map(len, (self.stride, self.padding, self.dilation))}
        if len(dims) != 1 or len(input) - len(shape) not in (0, 1) or len(input) != len(grad) or len(input) < 3:
            raise _misfit(
                "as many strides, paddings and dilations as spatial dims", input=input, grad=grad, shape=shape
            )
        groups = input[1] // shape[1] if shape[1] else 0
        if (
            input[0] != grad[0]
            or grad[1] != shape[0]
            or groups * shape[1] != input[1]
            or (groups and shape[0] % groups)
        ):
            raise _misfit(
                "input [N, K I, *S], grad [N, K O, *L], shape [K O, I, *]", input=input, grad=grad, shape=shape
            )

    def __len__(self) -> int:
        return self.input.shape[0]

    @cached_property
    def geometry(self) -> Geometry:
        deep = self.input.ndim > len(self.shape)
        kernel = (1,) * deep + tuple(self.shape[2:])
        groups = self.input.shape[1] // self.shape[1]
        stride, padding, dilation = map(tuple, (self.stride, self.padding, self.dilation))  # a rule's own may be lists
        return Geometry(groups, kernel, stride, padding, dilation, deep)


@dataclass(frozen=True, eq=False)
class Across:
    """Takes out of rows what lies along ``unit``, part by part: ``A - <A, unit> unit``."""

    unit: Tensor  # [*P], of norm 1 (or zero) along the axes, in at least single precision
    axes: tuple[int, ...]  # of a part

    @property
    def sides(self) -> Size:
        """``P``, with 1 for the axes: the parts."""
        return Size(1 if a in self.axes else size for a, size in enumerate(self.unit.shape))

    def __call__(self, rows: Tensor) -> Tensor:
        wide, over = rows.to(self.unit.dtype), [a + 1 for a in self.axes]
        along = wide * self.unit
        along = along.sum(over, keepdim=True) if over else along
        return torch.addcmul(wide, along, self.unit, value=-1).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class Pulled:
    """The gradient of what another tensor was derived from: ``back(rows)``, linear, and sample by sample.

    Where ``back`` is a tensor, that is a product with it, entry by entry; `Across` projects.  Anything else may need
    the graph of what was derived, so that such a form lives no longer than the pass that found it.
    """

    rows: Factors  # of the derived tensor
    back: Tensor | Across | Callable[[Tensor], Tensor]  # [*P], or: [n, *derived] to [n, *P]
    shape: Size  # P

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def step(self) -> int:
        """How many rows are led back at a time."""
        return cost.pulled(max(self.shape.numel(), self.rows.shape.numel()))


Factors = Dense | Outer | Rows | Conv | Pulled


def outer(left: Tensor, right: Tensor, shape: Size) -> Outer:
    """`Outer` with both sides of one dtype."""
    if left.dtype is not right.dtype:
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
    return Outer(left, right, shape if type(shape) is Size else Size(shape))


def tensors(g: Factors) -> tuple[Tensor, ...]:
    """The tensors that ``g`` holds (and may share with the user)."""
    match g:
        case Dense(value):
            return (value,)
        case Outer(left, right):
            return (left, right)
        case Rows(index, value):
            return (index, value)
        case Conv(input, grad):
            return (input, grad)
        case Pulled(rows):
            return tensors(rows)


def nothing(p: Tensor, n: int) -> Dense:
    """``n`` rows of zeros for a parameter that no loss depends on, in the memory of one number."""
    return Dense(p.detach().new_zeros(()).expand(n, *p.shape))


def strided(x: Tensor) -> Tensor:
    """``x``, with all its entries: autograd gives sparse gradients of ``Embedding(sparse=True)``."""
    return x if x.layout is torch.strided else x.to_dense()


def dtype(g: Factors) -> torch.dtype:
    """The dtype of the entries of ``G``."""
    match g:
        case Outer(left=a, right=b) | Conv(input=a, grad=b):
            return torch.promote_types(a.dtype, b.dtype)
        case Dense(value) | Rows(value=value):
            return value.dtype
        case Pulled(rows):
            return dtype(rows)


def device(g: Factors) -> torch.device:
    return tensors(g)[-1].device


def nbytes(g: Factors) -> int:
    """What the tensors of ``g`` take, in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors(g))


def compact(g: Factors, own: bool = True) -> Factors:
    """``g`` as it is best kept: `Dense` where that is smaller than the factors, ``g`` otherwise.

    ``own``: rows that are a view of another tensor (an output gradient, which several parameters may have in common)
    get memory of their own, for whoever is handed them may write into it.
    """
    if isinstance(g, Dense):
        base = g.value._base
        return Dense(g.value.clone()) if own and base is not None and base.numel() >= g.value.numel() else g
    kept = isinstance(g, Pulled) and not isinstance(g.back, Tensor | Across)  # by a graph, which may change
    if not kept and nbytes(g) < len(g) * g.shape.numel() * tensors(g)[-1].element_size():
        return g
    return Dense(dense(g))


# ---- linear algebra of forms ------------------------------------------------------------------------------------


def add(a: Factors, b: Factors) -> Factors:
    """``A + B``: the gradient of a parameter that was used twice."""
    match a, b:
        case Outer(), Outer() if a.left.shape[1] == b.left.shape[1] and a.left.shape[3] == b.left.shape[3]:
            return outer(_cat(a.left, b.left, 2), _cat(a.right, b.right, 2), a.shape)
        case Rows(), Rows():
            return Rows(torch.cat([a.index, b.index], 1), _cat(a.value, b.value, 1), a.shape)
        case Rows(), Outer() if _table_as_outer(a, b):
            return add(_as_outer(a), b)
        case Outer(), Rows() if _table_as_outer(b, a):
            return add(a, _as_outer(b))
        case Conv(), Conv() if _stackable(a, b):
            a, b = _deepened(a), _deepened(b)
            return replace(a, input=_cat(a.input, b.input, 2), grad=_cat(a.grad, b.grad, 2))
        case Pulled(back=one), Pulled(back=other) if same_back(one, other):
            return replace(a, rows=add(a.rows, b.rows))
        case _:
            return Dense(dense(a) + dense(b))


def same_back(a: object, b: object) -> bool:
    """Whether two ``back`` of `Pulled` surely are the same map."""
    match a, b:
        case Tensor(), Tensor():
            return torch.equal(a, b)
        case Across(unit, axes), Across(other, others):
            return axes == others and torch.equal(unit, other)
    return a is b


def fold(g: Factors, size: int) -> Factors:
    """Count every ``size`` consecutive samples as one: row ``n`` becomes a sum of rows."""
    match g:
        case Dense(value):
            return Dense(_folded(value, size).sum(1))
        case Outer(left, right, shape):
            left, right = (_folded(f, size).movedim(1, 2).flatten(2, 3) for f in (left, right))
            return Outer(left, right, shape)
        case Rows(index, value, shape):
            return Rows(_folded(index, size).flatten(1, 2), _folded(value, size).flatten(1, 2), shape)
        case Conv():
            deep = _deepened(g)
            input, grad = (_folded(f, size).movedim(1, 2).flatten(2, 3) for f in (deep.input, deep.grad))
            return replace(deep, input=input, grad=grad)
        case Pulled(rows):
            return replace(g, rows=fold(rows, size))


def scale(g: Factors, factor: float | Tensor) -> Factors:
    """``factor G``, for one number."""
    match g:
        case Dense(value):
            return Dense(value * factor)
        case Outer(left, right, _) if left.numel() <= right.numel():
            return replace(g, left=left * factor)
        case Outer(_, right, _):
            return replace(g, right=right * factor)
        case Rows(_, value, _):
            return replace(g, value=value * factor)
        case Conv(_, grad):
            return replace(g, grad=grad * factor)
        case Pulled(rows):
            return replace(g, rows=scale(rows, factor))


def cast(g: Factors, dtype: torch.dtype) -> Factors:
    """``G`` with entries of another floating type."""
    match g:
        case Dense(value):
            return Dense(value.to(dtype))
        case Outer(left, right, _):
            return replace(g, left=left.to(dtype), right=right.to(dtype))
        case Rows(_, value, _):
            return replace(g, value=value.to(dtype))
        case Conv(input, grad):
            return replace(g, input=input.to(dtype), grad=grad.to(dtype))
        case Pulled(rows, back):
            if isinstance(back, Tensor):
                return replace(g, rows=cast(rows, dtype), back=back.to(dtype))
            if isinstance(back, Across):
                unit = back.unit.to(torch.promote_types(dtype, torch.float32))
                return replace(g, rows=cast(rows, dtype), back=back if unit is back.unit else Across(unit, back.axes))
            return g if {t.dtype for t in tensors(rows)} - {*INDICES} == {dtype} else Dense(dense(g).to(dtype))


def index(g: Factors, samples: slice | Tensor) -> Factors:
    """The rows ``samples`` of ``G``; a slice gives views."""
    match g:
        case Dense(value):
            return Dense(value[samples])
        case Outer(left, right, _):
            return replace(g, left=left[samples], right=right[samples])
        case Rows(tokens, value, _):
            return replace(g, index=tokens[samples], value=value[samples])
        case Conv(input, grad):
            return replace(g, input=input[samples], grad=grad[samples])
        case Pulled(rows):
            return replace(g, rows=index(rows, samples))


def reshape(g: Factors, shape: Size) -> Factors:
    """The gradient of a parameter that was used as a reshape of itself; ``shape`` is the parameter's own."""
    shape = Size(shape)
    match g:
        case Outer():
            return replace(g, shape=shape)
        case Rows(shape=own) | Conv(shape=own) if own == shape:
            return g
        case Pulled(rows, Tensor() as back):
            return Pulled(reshape(rows, shape), back.reshape(shape), shape)
        case _:
            return Dense(dense(g).reshape(len(g), *shape))


def transpose(g: Factors) -> Factors:
    """The gradient of a matrix ``[O, I]`` that was used as its transpose ``[I, O]``."""
    o, i = g.shape
    match g:
        case Outer(left, right, _) if (left.shape[1], left.shape[3], right.shape[3]) == (1, o, i):
            return Outer(right, left, Size((i, o)))
        case Pulled(rows, Tensor() as back):
            return Pulled(transpose(rows), back.mT, Size((i, o)))
        case _:
            return Dense(dense(g).mT)


def times(g: Factors, factor: Tensor) -> Factors:
    """``G`` with every row times ``factor``, which broadcasts to ``P``, entry by entry."""
    wide = factor.detach().to(dtype(g)).expand(g.shape)
    steps = tuple(0 if size == 1 else step for size, step in zip(wide.shape, wide.stride(), strict=True))
    match g:
        case Dense(value):
            return Dense(value * wide)
        case Rows(tokens, value):
            return replace(g, value=value * wide[tokens.long()])
        case Outer(left, right) if wide.numel() and wide.ndim and len(wide) == left.shape[1] * left.shape[3]:
            if not any(steps[1:]):
                return replace(g, left=left * wide.reshape(len(wide), -1)[:, 0].view(left.shape[1], 1, left.shape[3]))
            if not steps[0]:
                return replace(g, right=right * wide[0].flatten())
        case Conv(_, grad) if wide.numel() and not any(steps[1:]):
            return replace(g, grad=grad * wide.flatten(1)[:, 0].view(-1, *[1] * (grad.ndim - 2)))
        case Pulled(rows, Tensor() as back):
            return Pulled(rows, back * wide, g.shape)
    return Pulled(g, wide.clone(memory_format=torch.contiguous_format), g.shape)


# ---- individual gradients ---------------------------------------------------------------------------------------


@kernel
def dense(g: Factors, out: Tensor | None = None) -> Tensor:
    """``G`` itself, ``[N, *P]``; written into ``out`` if given."""
    g = cast(g, dtype(g))
    match g:
        case Pulled():
            return _pulled(g, out)
        case Dense(value):
            return value if out is None else out.copy_(value)
        case Outer(left, right, shape):
            out = fresh(left, len(g), *shape) if out is None else out
            convolution.write_products(left, right, out)
            return out
        case Rows(index, value, shape):
            out = (fresh(value, len(value), *shape) if out is None else out).zero_()
            return out.scatter_add_(1, index.long().unsqueeze(-1).expand_as(value), value.to(out.dtype))
        case Conv(input, grad):
            return convolution.dense(input, grad, g.geometry, g.shape, out)


def led(g: Pulled) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``g``, some samples at a time; they may lie in memory that is used again for the next ones."""
    for i in range(0, len(g), g.step):
        at = slice(i, min(i + g.step, len(g)))
        rows = index(g.rows, at)
        if isinstance(rows, Dense):
            yield at, _back(g, rows.value)
        else:
            with borrow(tensors(rows)[-1], len(rows), *rows.shape) as block:
                yield at, _back(g, dense(rows, out=block))


def _back(g: Pulled, rows: Tensor) -> Tensor:
    return rows * g.back if isinstance(g.back, Tensor) else g.back(rows)


def _pulled(g: Pulled, out: Tensor | None) -> Tensor:
    out = fresh(tensors(g)[-1], len(g), *g.shape) if out is None else out
    for at, rows in led(g):
        out[at] = rows
    return out


# ---- details ----------------------------------------------------------------------------------------------------


def _misfit(expected: str, **found: object) -> ValueError:
    given = ", ".join(f"{name} {tuple(f) if isinstance(f, Size) else f}" for name, f in found.items())
    return ValueError(f"These factors do not fit together: expected {expected}, got {given}.")


def _cat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.cat([a.to(dtype), b.to(dtype)], dim)


def _folded(x: Tensor, size: int) -> Tensor:
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])


def _table_as_outer(rows: Rows, other: Outer) -> bool:
    """Whether one-hot tokens are of the other form's kind, and smaller than the gradient."""
    sides = (other.left.shape[3], other.right.shape[3])
    return sides == tuple(rows.shape) and rows.index.shape[1] < rows.shape[1]


def _as_outer(g: Rows) -> Outer:
    left = g.value.new_zeros(*g.index.shape, g.shape[0]).scatter_(2, g.index.long().unsqueeze(-1), 1)
    return Outer(left.unsqueeze(1), g.value.unsqueeze(1), g.shape)


def _deepened(g: Conv) -> Conv:
    """With one leading spatial dim more than the kernel has, in which samples and uses can be stacked."""
    if g.input.ndim > len(g.shape):
        return g
    stride, padding, dilation = (1, *g.stride), (0, *g.padding), (1, *g.dilation)
    return Conv(g.input.unsqueeze(2), g.grad.unsqueeze(2), stride, padding, dilation, g.shape)


def _stackable(a: Conv, b: Conv) -> bool:
    a, b = _deepened(a), _deepened(b)
    sides = ((a.input, b.input), (a.grad, b.grad))
    if any(x.shape[1] != y.shape[1] or x.shape[3:] != y.shape[3:] for x, y in sides):
        return False  # channels differ where the same weight is used with another number of groups
    return (a.stride, a.padding, a.dilation) == (b.stride, b.padding, b.dilation)
