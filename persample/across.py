"""Rows of weights over their norm, reduced without forming them.

The rows of ``v``, where a model uses ``w = v / |v|``, are those of ``w`` without what lies along it (`factors.Across`):
with ``u = v / |v|`` and ``c_n = <A_n, u>``, ``A_n - c_n u``, for each part of the weight that has a norm of its own.
That is an orthogonal projection, so

* inner products are those of ``A`` less those of ``c``: ``<A_n - c_n u, A_m - c_m u> = <A_n, A_m> - c_n c_m``;
* it may act on what rows are multiplied with, instead of on the rows;
* squares of outer products ``A_n = l_n r_n^T`` are products of tokens: ``l^2 r^2 - 2 u c l r + u^2 c^2``.

Where little is left of the terms of such a difference, rows are formed after all.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor

from . import convolution, cost
from .doubt import doubtful
from .factors import Across, Conv, Factors, Outer, Pulled, dense, dtype, index, times


def along(g: Pulled) -> Tensor:
    """``c``, ``[N, parts]``: what lies along the unit vectors of the parts."""
    assert isinstance(g.back, Across)
    return shares(g.rows, g.back.unit, g.back.sides).flatten(1)


def shares(g: Factors, factor: Tensor, sides: Size) -> Tensor:
    """``[N, *sides]``: rows times ``factor``, summed over the axes of the parameter that ``sides`` has in size 1."""
    factor = factor.expand(g.shape)
    if (matrix := _matrix(g, sides)) is not None:
        assert isinstance(g, Outer)
        return _components(g.left[:, 0], g.right[:, 0], factor.reshape(matrix), sides)
    if isinstance(g, Conv) and set(sides[1:]) <= {1}:
        input, grad, factor = (t.to(dtype(g)) for t in (g.input, g.grad, factor))  # autocast leaves several types
        found = convolution.applied(input, grad, factor, g.geometry)
        return (found if sides[0] > 1 else found.sum(1)).view(-1, *sides)
    whole, step = times(g, factor), cost.pulled(g.shape.numel())
    over = [a + 1 for a, (size, own) in enumerate(zip(g.shape, sides, strict=True)) if own == 1 != size]
    parts = (dense(index(whole, slice(i, i + step))) for i in range(0, max(1, len(g)), step))
    return torch.cat([part.sum(over, keepdim=True) if over else part for part in parts])


def _matrix(g: Factors, sides: Size) -> tuple[int, int] | None:
    """The shape of the parameter as a matrix, if rows are sums of outer products of its two sides."""
    if not isinstance(g, Outer) or g.left.shape[1] != 1 or g.left.shape[3] != g.shape[0] or 1 not in sides:
        return None
    return (g.left.shape[3], g.right.shape[3]) if len(sides) == 2 or set(sides[1:]) == {1} else None


def _components(left: Tensor, right: Tensor, matrix: Tensor, sides: Size) -> Tensor:
    """The same of tokens ``[N, T, O]`` and ``[N, T, I]``."""
    matrix = matrix.to(left.dtype)
    if set(sides[1:]) == {1}:
        found = (left * (right @ matrix.mT)).sum(1)
        return (found if sides[0] > 1 else found.sum(1)).view(-1, *sides)
    return (right * (left @ matrix)).sum(1).view(-1, *sides)


# ---- squares ----------------------------------------------------------------------------------------------------


def has_products(g: Pulled) -> bool:
    """Whether its squares are products of tokens: those of single tokens."""
    rows, back = g.rows, g.back
    if not isinstance(back, Across) or not isinstance(rows, Outer) or _matrix(rows, back.sides) is None:
        return False
    return rows.left.shape[2] == 1 and cost.outer_moments(len(g), 1) == "products"


def squares(g: Pulled, sums: Tensor | None = None, *, centred: bool) -> Tensor:
    """``[*P]``: sums of squares, ``centred`` or not; ``sums [*P]`` is filled if given."""
    rows, back = g.rows, g.back
    assert isinstance(rows, Outer) and isinstance(back, Across)
    left, right = rows.left[:, 0, 0], rows.right[:, 0, 0]
    (n, o), i = left.shape, right.shape[1]
    unit, by_row = back.unit.reshape(o, i).to(left.dtype), set(back.sides[1:]) == {1}
    found = right.new_empty(o, i)
    totals = found if sums is None else sums.view(o, i)
    c = _components(left.unsqueeze(1), right.unsqueeze(1), unit, back.sides)
    c = c.view(n, -1, 1) if by_row else c.view(n, 1, -1)  # [N, O or 1, I or 1]
    step = max(1, cost.chunk(i))
    for r in range(0, o, step):
        at = slice(r, r + step)
        l, u, own = left[:, at], unit[at], c[:, at] if c.shape[1] > 1 else c
        total, size = l.mT @ right, l.square().mT @ right.square()
        cross = (l * own[:, :, 0]).mT @ right if by_row else l.mT @ (right * own[:, 0])
        total.addcmul_(u, own.sum(0), value=-1)
        size.addcmul_(u.square(), own.square().sum(0))
        part = torch.addcmul(size, u, cross, value=-2)
        if centred:
            part.addcmul_(total, total, value=-1 / n)
        totals[at], found[at] = total, part
        lost = (part < size.mul_(0.01)).any(1)
        if part.numel() and doubtful(lost.any()):
            for where in lost.nonzero().squeeze(1).split(max(1, cost.chunk(n * i))):
                block = l[:, where].unsqueeze(2) * right.unsqueeze(1)
                block -= (own[:, where] if own.shape[1] > 1 else own) * u[where]
                if centred:
                    block -= block.mean(0)
                found[r + where] = block.square_().sum(0)
    return found.view(g.shape)
