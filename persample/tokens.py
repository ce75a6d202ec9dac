"""Sums of outer products, reduced without forming them: products of tokens instead of rows.

Each of these is one closed form of an `Outer`, for the shapes where `persample.cost` finds it cheaper than streaming.
Inner products of sums of outer products factor into products of tokens (Goodfellow 2015, Li et al. 2021),

    ``<sum_t l_t (x) r_t, sum_s l'_s (x) r'_s> = sum_{t, s} <l_t, l'_s> <r_t, r'_s>``,

but where the terms nearly cancel, so do the digits: `norms` also returns the size of its terms, for callers to judge.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cost
from .convolution import multiplied
from .factors import Outer
from .scratch import borrow


def one_token_norms(g: Outer) -> Tensor:
    """Squared norms of outer products, ``[N]``: products of two squared norms."""
    left: Tensor  # [N, K, 1]
    left, right = (torch.linalg.vector_norm(f, dim=3) for f in (g.left, g.right))
    return left.mul_(right).square_().sum((1, 2))


def norms(g: Outer) -> tuple[Tensor, Tensor]:
    """Squared norms, ``[N]``, and the size of the terms that they are sums of, ``[N]``."""
    n, k, t = g.left.shape[:3]
    value, size = g.left.new_empty(n), g.left.new_empty(n)
    halvings = cost.halvings(t)
    missing = -t % 2**halvings  # tokens of zeros, so that it can be halved so often
    step = cost.chunk(k * t * t)
    for i in range(0, n, step):
        sides = (f[i : i + step].flatten(0, 1) for f in (g.left, g.right))
        left, right = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in sides)
        for found, part in zip((value, size), _squares(left, right, halvings), strict=True):
            found[i : i + step] = part.view(-1, k).sum(1)
    return value, size


def _squares(left: Tensor, right: Tensor, halvings: int) -> tuple[Tensor, Tensor]:
    """``sum_{t, s} <l_t, l_s> <r_t, r_s>`` of ``[M, T, *]``, ``[M]``, and a bound.

    Products are symmetric: those of the first half of the tokens with the second count twice.  The two halves are
    samples of their own, at once if that takes no copy.
    """
    if not halvings:
        return _products(left, left, right, right)
    half = left.shape[1] // 2
    value, size = _products(left[:, :half], left[:, half:], right[:, :half], right[:, half:])
    if left.is_contiguous() and right.is_contiguous():
        left, right = (x.unflatten(1, (2, half)).flatten(0, 1) for x in (left, right))
        more, bound = (part.view(-1, 2).sum(1) for part in _squares(left, right, halvings - 1))
        return more.add_(value, alpha=2), bound.add_(size, alpha=2)
    value, size = value.mul_(2), size.mul_(2)
    for at in (slice(half), slice(half, None)):
        more, bound = _squares(left[:, at], right[:, at], halvings - 1)
        value, size = value.add_(more), size.add_(bound)
    return value, size


def _products(left: Tensor, left2: Tensor, right: Tensor, right2: Tensor) -> tuple[Tensor, Tensor]:
    m, t, s = *left.shape[:2], left2.shape[1]
    with borrow(left, m, t, s) as a, borrow(right, m, t, s) as b:
        torch.bmm(left, left2.mT, out=a)
        torch.bmm(right, right2.mT, out=b)
        return multiplied(a.flatten(1), b.flatten(1), m)


def gram(a: Outer, b: Outer) -> Tensor:
    """``A B^T``, ``[N, M]``, from the products of all tokens, those of some samples with all others at a time."""
    (n, k, t), (m, _, s) = a.left.shape[:3], b.left.shape[:3]
    if k == t == s == 1:
        left, right = (x[:, 0, 0] @ y[:, 0, 0].mT for x, y in ((a.left, b.left), (a.right, b.right)))
        return left.mul_(right)
    same = b is a
    found = a.left.new_empty(n, m)
    lefts, rights = (f.transpose(0, 1).flatten(1, 2).mT for f in (b.left, b.right))  # [K, *, M S]
    step = cost.chunk(k * t * m * s, cost.costs().wide)
    if same and n * t > cost.costs().banded:
        step = min(step, -(-n // 4))
    for i in range(0, n, step):
        first = i if same else 0  # products with earlier samples are there
        left, right = (f[i : i + step].transpose(0, 1).flatten(1, 2) for f in (a.left, a.right))  # [K, N T, *]
        shape = (k, left.shape[1], (m - first) * s)
        with borrow(left, *shape) as x, borrow(left, *shape) as y:
            torch.bmm(left, lefts[..., first * s :], out=x)
            x.mul_(torch.bmm(right, rights[..., first * s :], out=y))
            found[i : i + step, first:] = x.view(k, min(step, n - i), t, m - first, s).sum((0, 2, 4))
        if same:
            found[i + step :, i : i + step] = found[i : i + step, i + step :].mT
    return found


def weighted_sum(g: Outer, weight: Tensor | None) -> Tensor:
    """``weight^T G``, ``[K, O, I]``: the ordinary weight gradient, of scaled tokens, some samples at a time."""
    (n, k, t, o), i = g.left.shape, g.right.shape[3]
    total: Tensor | None = None
    step = n if weight is None else cost.chunk(k * t * min(o, i), cost.costs().wide)
    for s in range(0, n, max(1, step)):
        left, right = g.left[s : s + step], g.right[s : s + step]
        if weight is not None:
            w = weight[s : s + step].view(-1, 1, 1, 1)
            left, right = (left * w, right) if o <= i else (left, right * w)
        left, right = (f.transpose(0, 1).flatten(1, 2) for f in (left, right))  # [K, N T, *]
        total = torch.bmm(left.mT, right) if total is None else total.baddbmm_(left.mT, right)
    return g.left.new_zeros(k, o, i) if total is None else total


def square_sum(g: Outer) -> Tensor:
    """``1^T (G o G)``, ``[K, O, I]``, of outer products: the product of squared tokens."""
    left, right = (f[:, :, 0].transpose(0, 1).square() for f in (g.left, g.right))
    return torch.bmm(left.mT, right)


def dot(g: Outer, v: Tensor) -> Tensor:
    """``G v``, ``[N]``, for ``v [K, O, I]``: the longer side times ``v``, times the shorter side."""
    (n, k, t, o), i = g.left.shape, g.right.shape[3]
    x, y, v = (g.left, g.right, v) if i <= o else (g.right, g.left, v.mT)
    found = v.new_zeros(n)
    step = cost.chunk(k * t * v.shape[2])
    for s in range(0, n, step):
        tokens = x[s : s + step].transpose(0, 1).flatten(1, 2)  # [K, N T, *]
        with borrow(v, k, tokens.shape[1], v.shape[2]) as moved:
            torch.bmm(tokens, v, out=moved)
            products = moved.view(k, min(step, n - s), t, v.shape[2]).mul_(y[s : s + step].transpose(0, 1))
            found[s : s + step] = products.sum((2, 3)).sum(0)
    return found
