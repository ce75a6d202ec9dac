"""What can be computed from ``G [N, |P|]`` without forming it: seven primitives, exact for every form.

``N, M`` samples, ``P`` the parameter's shape.  Half precision is accumulated in float32; results are float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import convolution
from .factors import Conv, Dense, Factors, Outer, Rows, cast, dense, dtype, index

BLOCK = 1 << 21  # entries


def weighted_sum(g: Factors, weight: Tensor | None = None) -> Tensor:
    """``weight^T G``, ``[*P]``: ones (or none) give the batch gradient, clip factors a clipped one."""
    with torch.no_grad():
        g = _wide(g)
        w = torch.ones(len(g), dtype=dtype(g), device=_device(g)) if weight is None else weight.to(dtype(g))
        match g:
            case Dense(value):
                return torch.mv(value.reshape(len(g), g.shape.numel()).mT, w).reshape(g.shape)
            case Outer(left, right, shape):
                return torch.einsum("n,nkto,nkti->koi", w, left, right).reshape(shape)
            case Rows(index, value, shape):
                value = w[:, None, None] * value
                return value.new_zeros(shape).index_add_(0, index.flatten(), value.flatten(0, 1))
            case Conv(input, grad):
                grad = grad * w.view(-1, *[1] * (grad.ndim - 1))
                return convolution.summed(input, grad, g.geometry).reshape(g.shape)


def square_sum(g: Factors) -> Tensor:
    """``1^T (G o G)``, ``[*P]``: the second moment, not divided by ``N``."""
    with torch.no_grad():
        return sum((b.square().sum(0) for b in _blocks(g)), _zeros(g))


def moments(g: Factors) -> tuple[Tensor, Tensor]:
    """``1^T G`` and the squares of the centred rows ``sum_n (G_n - mean)^2``, both ``[*P]``; never negative."""
    with torch.no_grad():
        total = sum((b.sum(0) for b in _blocks(g)), _zeros(g))
        mean = total / max(1, len(g))
        return total, sum(((b - mean).square().sum(0) for b in _blocks(g)), _zeros(g))


def row_dot(a: Factors, b: Factors) -> Tensor:
    """``diag(A B^T)``, ``[N]``; with ``b is a`` the squared norms of the rows."""
    with torch.no_grad():
        pairs = zip(_blocks(a), _blocks(a if b is a else b), strict=True)
        return torch.cat([_zeros(a).new_zeros(0), *((x * y).reshape(len(x), a.shape.numel()).sum(1) for x, y in pairs)])


def gram(a: Factors, b: Factors) -> Tensor:
    """``A B^T``, ``[N, M]``: all inner products between the rows of ``a`` and those of ``b``."""
    with torch.no_grad():
        size = a.shape.numel()
        return dense(_wide(a)).reshape(len(a), size) @ dense(_wide(b)).reshape(len(b), size).mT


def dot(g: Factors, v: Tensor) -> Tensor:
    """``G v``, ``[N]``: the derivative of every sample's loss in the direction ``v [*P]``."""
    return project(g, v.unsqueeze(-1)).squeeze(-1)


def project(g: Factors, matrix: Tensor) -> Tensor:
    """``G R``, ``[N, k]``, for ``R [*P, k]``."""
    with torch.no_grad():
        matrix = matrix.reshape(g.shape.numel(), matrix.shape[-1]).to(_zeros(g).dtype)
        parts = [b.reshape(len(b), matrix.shape[0]) @ matrix for b in _blocks(g)]
        return torch.cat([matrix.new_zeros(0, matrix.shape[1]), *parts])


def _blocks(g: Factors) -> Iterator[Tensor]:
    step = max(1, BLOCK // max(1, g.shape.numel()))
    for i in range(0, len(g), step):
        yield dense(_wide(index(g, slice(i, i + step))))


def _wide(g: Factors) -> Factors:
    return cast(g, torch.float32) if dtype(g).itemsize < 4 else g


def _device(g: Factors) -> torch.device:
    match g:
        case Dense(value) | Rows(value=value) | Outer(left=value) | Conv(grad=value):
            return value.device


def _zeros(g: Factors) -> Tensor:
    kind = torch.float32 if dtype(g).itemsize < 4 else dtype(g)
    return torch.zeros(g.shape, dtype=kind, device=_device(g))
