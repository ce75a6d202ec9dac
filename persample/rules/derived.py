"""Back from a tensor that was derived from parameters to what it was derived from.

Transposes swap factors, views reshape them, a looked-up table becomes `Rows`; whatever isn't listed here is
differentiated by autograd, one row at a time, by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from ..calls import Derivation
from ..factors import Conv, Dense, Factors, Outer, Rows, cast, outer, reshape, scale, transpose
from ..layout import Layout
from . import Yields, pullback, spellings


@dataclass(frozen=True)
class Diagonal:
    """Rows of a derived tensor that has an entry of its own for every sample: row ``n`` is zero except at index
    ``place[n]`` of ``axis`` (by default ``n``), where it is ``value[n]``.
    """

    value: Tensor  # [N, *shape without axis]
    axis: int
    shape: Size
    place: Tensor | None = None  # [N]

    @property
    def places(self) -> Tensor:
        return torch.arange(len(self.value), device=self.value.device) if self.place is None else self.place

    def dense(self) -> Tensor:
        """``[N, *shape]``."""
        n = len(self.value)
        out = self.value.new_zeros(n, *self.shape)
        out.movedim(1 + self.axis, 1)[torch.arange(n, device=out.device), self.places] = self.value
        return out


@dataclass(frozen=True)
class Lone:
    """Rows of which only one is not zero: what a sample that was taken out of the batch leaves."""

    value: Tensor  # [*shape]
    sample: int
    n: int

    @property
    def shape(self) -> Size:
        return self.value.shape

    def dense(self) -> Tensor:
        """``[N, *shape]``."""
        out = self.value.new_zeros(self.n, *self.shape)
        out[self.sample] = self.value
        return out


def apart(value: Tensor, at: Layout) -> Diagonal | Dense:
    """Rows of a shared tensor whose entries along ``at.axis`` belong to one sample each; ``value`` is the sum of all
    rows.
    """
    if at.n == 1:
        return Dense(value.unsqueeze(0))
    pieces = value.movedim(at.axis, 0)
    if at.plain:
        return Diagonal(pieces, at.axis, value.shape)
    owner = at.owners().to(value.device)
    if at.owner is not None and len(owner) == at.n and len(owner.unique()) == at.n:
        place = owner.argsort()
        return Diagonal(pieces[place], at.axis, value.shape, place)
    rows = value.new_zeros(at.n, *value.shape)
    rows.movedim(1 + at.axis, 1)[owner, torch.arange(len(owner), device=value.device)] = pieces
    return Dense(rows)


Rowlike = Factors | Diagonal


def plain(rows: Rowlike | Lone) -> Factors:
    """Rows in one of the common forms."""
    return Dense(rows.dense()) if isinstance(rows, Diagonal | Lone) else rows


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
    from .elementwise import _sum_to

    lead = len(d.shape) - input.ndim
    if isinstance(g, Diagonal):
        place = g.axis - lead
        if place >= 0 and input.shape[place] != 1:
            return  # the samples were on that axis before
        rest = input.shape[:place] + input.shape[place + 1 :] if place >= 0 else input.shape
        yield input, lambda: Dense(_sum_to(g.value, rest, 1).reshape(-1, *input.shape))
    elif isinstance(g, Dense):
        yield input, lambda: Dense(_sum_to(g.value, input.shape, 1))


@pullback(*spellings("index_select"))
def selected(d: Derivation, g: Rowlike, input: Tensor, dim: int, index: Tensor) -> Yields:
    index, dim = d.read(index), dim % input.ndim
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
    yield weight, lambda: table_rows(index, value.reshape(len(value), -1, weight.shape[1]), weight, padding_idx)


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


@pullback(F.linear)
def linear(d: Derivation, g: Rowlike, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Yields:
    if weight.ndim != 2 or (pair := _rows(g, d.read(input))) is None:
        return
    left, tokens = pair
    yield weight, lambda: cast(outer(left.unsqueeze(1), tokens.unsqueeze(1), weight.shape), weight.dtype)
    yield input, lambda: _times(g, d.read(weight).to(left.dtype))
    if bias is not None and bias.ndim == 1:
        yield bias, lambda: Dense(left.sum(1).to(bias.dtype))


@pullback(*spellings("matmul", "mm"))
def matmul(d: Derivation, g: Rowlike, input: Tensor, other: Tensor) -> Yields:
    if input.ndim < 2 or other.ndim != 2 or (pair := _rows(g, d.read(input))) is None:
        return
    left, tokens = pair
    yield other, lambda: cast(outer(tokens.unsqueeze(1), left.unsqueeze(1), other.shape), other.dtype)
    yield input, lambda: _times(g, d.read(other).to(left.dtype).mT)


@pullback(*spellings("mul", "rmul", "multiply"))
def scaled(d: Derivation, g: Rowlike, input: Any, other: Any, **kwargs: Any) -> Yields:
    if isinstance(g, Diagonal):
        return
    for p, factor in ((input, other), (other, input)):
        if isinstance(p, Tensor) and p.requires_grad and p.shape == d.shape and _is_number(factor):
            yield p, partial(scale, g, d.read(factor) if isinstance(factor, Tensor) else factor)


@pullback(*spellings("div", "truediv", "true_divide"))
def divided(d: Derivation, g: Rowlike, input: Any, other: Any, **kwargs: Any) -> Yields:
    if not isinstance(g, Diagonal) and isinstance(other, (int, float)) and not kwargs.get("rounding_mode"):
        yield input, lambda: scale(g, 1 / other)


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


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad)


def pulled(d: Derivation, g: Rowlike) -> Iterator[tuple[Tensor, Any]] | None:
    """One step back by a pull-back, if it serves every source of the derivation; else ``None``."""
    from . import PULLBACKS

    if (entry := PULLBACKS.get(d.func)) is None:
        return None
    try:
        found = list(entry(d, g, *d.args, **d.kwargs))
    except TypeError:  # a spelling of the arguments that the pull-back doesn't know
        return None
    served = {id(t) for t, _ in found}
    if not all(id(s.tensor) in served for s in d.sources):
        return None
    return iter(found)


__all__ = ["Diagonal", "Outer", "Rowlike", "pulled", "table_rows"]
