"""Back from a tensor that was derived from parameters to what it was derived from.

Transposes swap factors, views reshape them, products with a matrix take theirs, a looked-up table becomes `Rows`;
products with numbers and tensors are in `scaling`.  Whatever is in neither is differentiated by autograd, some rows at
a time, by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from ..calls import Derivation, arguments
from ..factors import Conv, Dense, Outer, Rows, cast, outer, reshape, scale, transpose
from . import Yields, pullback, spellings
from .apart import Diagonal, Rowlike
from .elementwise import sum_to


def _same(g: Any) -> Any:
    return lambda: g


@pullback(*spellings("contiguous", "clone", "alias", "requires_grad_"), torch.clone)
def identity(d: Derivation, g: Rowlike, input: Tensor, *args: Any, **kwargs: Any) -> Yields:
    yield input, _same(g)


@pullback(*spellings("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu"))
def converted(d: Derivation, g: Rowlike, input: Tensor, *args: Any, **kwargs: Any) -> Yields:
    if not isinstance(g, Diagonal):
        yield input, lambda: cast(g, input.dtype)


_TRANSPOSES = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


@pullback(*spellings("t", "transpose", "swapaxes", "swapdims", "permute", "adjoint"), *_TRANSPOSES)
def transposed(d: Derivation, g: Rowlike, input: Tensor, *args: Any, **kwargs: Any) -> Yields:
    if not isinstance(g, Diagonal) and input.ndim == 2 and tuple(d.shape) == (input.shape[1], input.shape[0]):
        probe = d.func(torch.empty(2, 3), *args, **kwargs)  # a permutation may also be the identity
        yield input, (lambda: transpose(g)) if probe.shape == (3, 2) else _same(g)
        return
    blocks = isinstance(g, Outer) and (g.left.shape[1], g.left.shape[3], g.right.shape[3]) == tuple(d.shape)
    if blocks and d.func(torch.empty(2, 3, 5), *args, **kwargs).shape == (2, 5, 3):  # a matrix for each
        assert isinstance(g, Outer)
        right, left = g.right, g.left
        yield input, lambda: Outer(right, left, input.shape)


@pullback(*spellings("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"))
def viewed(d: Derivation, g: Rowlike, input: Tensor, *args: Any, **kwargs: Any) -> Yields:
    if isinstance(g, Diagonal):
        return
    if isinstance(g, Conv | Rows) and g.shape != input.shape:
        return
    yield input, lambda: reshape(g, input.shape)


@pullback(*spellings("expand", "expand_as", "broadcast_to"))
def expanded(d: Derivation, g: Rowlike, input: Tensor, *args: Any, **kwargs: Any) -> Yields:
    lead = len(d.shape) - input.ndim
    if isinstance(g, Diagonal):
        place = g.axis - lead
        if place >= 0 and input.shape[place] != 1:
            return  # the samples were on that axis before
        rest = input.shape[:place] + input.shape[place + 1 :] if place >= 0 else input.shape
        yield input, lambda: Dense(sum_to(g.value, rest, 1).reshape(len(g.value), *input.shape))
    elif isinstance(g, Dense):
        yield input, lambda: Dense(sum_to(g.value, input.shape, 1))


@pullback(*spellings("index_select"))
def selected(d: Derivation, g: Rowlike, input: Tensor, dim: int, index: Tensor) -> Yields:
    index, dim = d.read(index), dim % max(1, input.ndim)
    if isinstance(g, Diagonal) and g.axis == dim:
        yield input, lambda: Diagonal(g.value, dim, input.shape, index[g.places])


@pullback(*spellings("narrow"))
def narrowed(d: Derivation, g: Rowlike, input: Tensor, dim: int, start: int, length: int) -> Yields:
    dim %= input.ndim
    if isinstance(g, Diagonal) and g.axis != dim:
        yield input, lambda: _padded(g, input.shape, dim, start, length)


def _padded(g: Diagonal, shape: Size, dim: int, start: int, length: int) -> Diagonal:
    rows = g.value.new_zeros(len(g.value), *shape[: g.axis], *shape[g.axis + 1 :])
    rows.narrow(1 + dim - (dim > g.axis), start, length).copy_(g.value)
    return Diagonal(rows, g.axis, shape, g.place)


@pullback(F.embedding)
def looked_up(
    d: Derivation, g: Rowlike, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Yields:  # fmt: skip
    if scale_grad_by_freq:
        return
    index = d.read(input)
    if isinstance(g, Diagonal):
        if g.axis >= index.ndim:
            return
        index, value = index.movedim(g.axis, 0)[g.places].reshape(len(g.value), -1), g.value
    elif isinstance(g, Dense):
        value = g.value
        index = index.reshape(1, -1).expand(len(value), -1)
    else:
        return
    yield weight, lambda: table_rows(index, value.reshape(*index.shape, weight.shape[1]), weight, padding_idx)


def table_rows(index: Tensor, value: Tensor, weight: Tensor, padding_idx: int | None) -> Rows:
    """``Rows`` of a looked-up table; the padding entry gets no gradient."""
    if padding_idx is not None:
        value = value.masked_fill((index == padding_idx % len(weight)).unsqueeze(-1), 0)
    return Rows(index, value, weight.shape)


def _rows(g: Rowlike, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """``[N, T, O]`` and ``[N, T, I]``: the rows of a product, and what its other factor ``x [*, I]`` has there."""
    if isinstance(g, Diagonal) and g.axis < x.ndim - 1:
        n = len(g.value)
        return g.value.reshape(n, -1, g.shape[-1]), x.movedim(g.axis, 0)[g.places].reshape(n, -1, x.shape[-1])
    if isinstance(g, Dense):
        n, tokens = len(g.value), x.reshape(1, -1, x.shape[-1])
        return g.value.reshape(n, -1, g.shape[-1]), tokens.expand(n, -1, -1)
    return None


def _times(g: Rowlike, w: Tensor) -> Rowlike:
    """Rows along the last axis, each times a matrix ``[O, I]``."""
    assert isinstance(g, Dense | Diagonal)
    value = g.value @ w
    return replace(g, value=value, shape=Size((*g.shape[:-1], w.shape[1]))) if isinstance(g, Diagonal) else Dense(value)


def single(g: Rowlike, shape: Size) -> Outer | None:
    """Sums of outer products of vectors of a matrix' two sides."""
    whole = isinstance(g, Outer) and (g.left.shape[3], g.right.shape[3]) == tuple(shape)
    return g if whole and isinstance(g, Outer) and g.left.shape[1] == 1 else None


def changed(d: Derivation) -> bool:
    """Whether an argument was changed in place afterwards: autograd knows whether its old value is needed."""
    return any(t._version != d.versions.get(id(t), t._version) for t in arguments(d.args, d.kwargs))


@pullback(F.linear)
def linear(d: Derivation, g: Rowlike, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Yields:
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return
    if (o := single(g, d.shape)) is not None:
        yield weight, lambda: outer(o.right, o.left @ d.read(input).to(o.left.dtype), weight.shape)
        yield input, lambda: outer(o.left, o.right @ d.read(weight).to(o.right.dtype), input.shape)
        if bias is not None:
            yield bias, lambda: Dense((o.left.sum(3, keepdim=True) * o.right).sum((1, 2)))
        return
    if (pair := _rows(g, d.read(input))) is None:
        return
    left, tokens = pair
    yield weight, lambda: cast(outer(left.unsqueeze(1), tokens.unsqueeze(1), weight.shape), weight.dtype)
    yield input, lambda: _times(g, d.read(weight).to(left.dtype))
    if bias is not None:
        yield bias, lambda: Dense(left.sum(1).to(bias.dtype))


@pullback(*spellings("matmul", "mm"))
def matmul(d: Derivation, g: Rowlike, input: Tensor, other: Tensor) -> Yields:
    if input.ndim < 2 or other.ndim != 2:
        return
    if (o := single(g, d.shape)) is not None:
        yield other, lambda: outer(o.left @ d.read(input).to(o.left.dtype), o.right, other.shape)
        yield input, lambda: outer(o.left, o.right @ d.read(other).to(o.right.dtype).mT, input.shape)
        return
    if (pair := _rows(g, d.read(input))) is None:
        return
    left, tokens = pair
    yield other, lambda: cast(outer(tokens.unsqueeze(1), left.unsqueeze(1), other.shape), other.dtype)
    yield input, lambda: _times(g, d.read(other).to(left.dtype).mT)


@pullback(torch.vdot, torch.dot)
def dotted(d: Derivation, g: Rowlike, input: Tensor, other: Tensor) -> Yields:
    """Of real vectors: as in the largest singular value, ``u . W v``."""
    if isinstance(g, Dense) and not changed(d):
        for p, x in ((input, other), (other, input)):
            yield p, partial(lambda x: Dense(g.value.reshape(-1, 1) * x.detach()), x)


@pullback(torch.mv, Tensor.mv)
def applied(d: Derivation, g: Rowlike, input: Tensor, vec: Tensor) -> Yields:
    if isinstance(g, Dense) and not changed(d):
        rows = g.value.reshape(len(g.value), 1, 1, -1)
        yield input, lambda: outer(rows, vec.detach().expand(len(rows), 1, 1, -1), input.shape)
        yield vec, lambda: Dense(g.value @ input.detach())


@pullback(*spellings("cat", "concat", "concatenate"))
def joined(d: Derivation, g: Rowlike, tensors: Any, dim: int = 0, *, axis: int | None = None) -> Yields:
    """Each gets its part, where a form has parts along that dim."""
    dim, start = (dim if axis is None else axis) % len(d.shape), 0
    if any(p.ndim != len(d.shape) for p in tensors):
        return
    for p in tensors:
        at = slice(start, start + p.shape[dim])
        start = at.stop
        if isinstance(g, Dense):
            yield p, partial(lambda at: Dense(g.value.narrow(1 + dim, at.start, at.stop - at.start)), at)
        elif (o := single(g, d.shape)) is not None:
            sides = (o.left[..., at], o.right) if dim == 0 else (o.left, o.right[..., at])
            yield p, partial(Outer, *sides, p.shape)
        elif isinstance(g, Conv) and dim == 0 and g.geometry.groups == 1:
            yield p, partial(replace, g, grad=g.grad[:, at], shape=p.shape)


@pullback(*spellings("neg"))
def negated(d: Derivation, g: Rowlike, input: Tensor, **kwargs: Any) -> Yields:
    if not isinstance(g, Diagonal):
        yield input, lambda: scale(g, -1.0)


@pullback(*spellings("add", "radd", "sub"))
def added(d: Derivation, g: Rowlike, input: Any, other: Any, *, alpha: float = 1, **kwargs: Any) -> Yields:
    sign = -alpha if "sub" in getattr(d.func, "__name__", "") else alpha
    for p, factor in ((input, 1), (other, sign)):
        if isinstance(p, Tensor) and p.shape == d.shape and (factor == 1 or not isinstance(g, Diagonal)):
            yield p, _same(g) if factor == 1 or isinstance(g, Diagonal) else partial(scale, g, factor)


def pulled(d: Derivation, g: Rowlike) -> Iterator[tuple[Tensor, Any]] | None:
    """One step back by a pull-back, if it serves every source of the derivation; else ``None``."""
    from . import PULLBACKS

    if (entry := PULLBACKS.get(d.func)) is None or any(s.tensor.is_complex() for s in d.sources):
        return None
    try:
        found = list(entry(d, g, *d.args, **d.kwargs))
    except TypeError:  # a spelling of the arguments that the pull-back doesn't know
        return None
    served = {id(t) for t, _ in found}
    if not all(id(s.tensor) in served for s in d.sources):
        return None
    return iter(found)
