"""Back from weights that were scaled: products and quotients, functions of each entry, and weights over their norm.

What acts on each entry alone is a product with its slope, which `persample.factors.times` takes into a side of the
factors where it can.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import across, reductions
from ..calls import Derivation, leaves_of
from ..factors import Across, Dense, Factors, Pulled, dtype, scale, times
from . import Yields, pullback, spellings
from .apart import Diagonal, Rowlike
from .derived import changed, single


@pullback(*spellings("mul", "rmul", "multiply"))
def scaled(d: Derivation, g: Rowlike, input: Any, other: Any, **kwargs: Any) -> Yields:
    if isinstance(g, Diagonal) or _meet(d) or changed(d):
        return
    for p, factor in ((input, other), (other, input)):
        if isinstance(p, Tensor) and p.requires_grad:
            if isinstance(factor, Tensor):
                yield p, partial(_product, g, factor.detach(), p)
            elif p.shape == d.shape:
                yield p, partial(scale, g, factor)


@pullback(*spellings("div", "truediv", "true_divide"))
def divided(d: Derivation, g: Rowlike, input: Any, other: Any, *, rounding_mode: str | None = None) -> Yields:
    if isinstance(g, Diagonal) or rounding_mode or not isinstance(input, Tensor) or changed(d):
        return
    product = isinstance(other, Tensor) and single(g, d.shape) is not None and _is_a_product(d, other)
    if _meet(d) and not product:
        return
    if not isinstance(other, Tensor):
        yield input, lambda: scale(g, 1 / other)
        return
    x, y = input.detach(), other.detach()
    yield input, lambda: _product(g, y.reciprocal(), input)
    yield other, lambda: _product(g, -(x / y) / y, other)


def _is_a_product(d: Derivation, number: Tensor) -> bool:
    """Whether a number that a weight is divided by is ``u . W v`` (its largest singular value): the rows of both are
    sums of outer products.
    """
    made = next((s.derivation for s in d.sources if s.tensor is number), None)
    return made is not None and made.func in (torch.dot, torch.vdot)


def _meet(d: Derivation) -> bool:
    """Whether both sides were derived from one parameter (a weight over its own norm): their rows would be added up
    again, as matrices, where autograd leads back both at once.
    """
    found = [id(p) for s in d.sources for p in ([s.tensor] if s.derivation is None else leaves_of(s.derivation))]
    return len({*found}) < len(found)


def _product(g: Factors, factor: Tensor, p: Tensor) -> Factors:
    """Rows times ``factor``, summed to the shape that ``p`` was broadcast from."""
    if p.shape == g.shape:
        return scale(g, factor) if factor.ndim == 0 else times(g, factor)
    if p.numel() == 1:
        return Dense(reductions.dot(g, factor.expand(g.shape)).to(p.dtype).view(-1, *p.shape))
    sides = torch.Size((1,) * (len(g.shape) - p.ndim) + tuple(p.shape))
    return Dense(across.shares(g, factor, sides).view(-1, *p.shape))


ENTRYWISE = spellings(
    "exp", "expm1", "log", "log1p", "square", "sqrt", "rsqrt", "reciprocal", "pow", "abs", "sin", "cos", "tanh", "erf",
    "sigmoid", "softplus", "relu", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "clamp", "clip", "clamp_min",
    "clamp_max",
)  # fmt: skip


@pullback(*ENTRYWISE)
def entrywise(d: Derivation, g: Rowlike, input: Any, *args: Any, **kwargs: Any) -> Yields:
    """A function of each entry alone."""
    others = any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
    if isinstance(g, Diagonal) or others or changed(d):
        return
    if isinstance(input, Tensor) and input.shape == d.shape:
        yield input, lambda: times(g, _slope(d, input.detach(), args, kwargs))


@torch.enable_grad()
def _slope(d: Derivation, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = x.requires_grad_()
    y = d.func(x, *args, **kwargs)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return slope


# ---- over a norm ------------------------------------------------------------------------------------------------


@pullback(torch._weight_norm)
def weight_normed(d: Derivation, g: Rowlike, v: Tensor, magnitude: Tensor, dim: int = 0) -> Yields:
    """Salimans and Kingma 2016, equation 3: without what lies along the direction ``v``, times ``g / |v|``."""
    if isinstance(g, Diagonal) or changed(d):
        return
    size = torch.norm_except_dim(v.detach(), 2, dim)
    unit = v.detach() / size
    axes = tuple(a for a in range(v.ndim) if dim == -1 or a != dim % v.ndim)
    yield v, lambda: _across(times(g, magnitude.detach() / size), unit, axes)
    yield magnitude, lambda: _product(g, unit, magnitude)


@pullback(F.normalize)
def normalized(
    d: Derivation, g: Rowlike, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> Yields:
    if isinstance(g, Diagonal) or p != 2 or changed(d):
        return
    x, dims = input.detach(), dim if isinstance(dim, tuple) else (dim,)
    axes = tuple(a % input.ndim for a in dims or range(input.ndim))
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    unit = torch.where(norm >= eps, x / norm.clamp_min(eps), 0)
    yield input, lambda: _across(times(g, norm.clamp_min(eps).reciprocal()), unit, axes)


def _across(g: Factors, unit: Tensor, axes: tuple[int, ...]) -> Factors:
    """Rows without what lies along ``unit``, whose entries along ``axes`` have norm 1 (or are zero)."""
    return Pulled(g, Across(unit.to(torch.promote_types(dtype(g), torch.float32)), axes), unit.shape)
