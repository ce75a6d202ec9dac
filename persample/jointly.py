"""Functions that read some axes of a tensor as one thing: matrices (inverses, decompositions), windows (convolutions,
pooling), lines (differences).  Samples along such an axis meet, often in an output of the same shape.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Function, Layout, Operation
from .moves import named

Part = Literal["matrix", "rows", "vector", "image", "whole"]
_FACTORED = "cholesky cholesky_ex eig eigh eigvals eigvalsh inv inv_ex ldl_factor ldl_factor_ex lu lu_factor"
_FACTORED += " lu_factor_ex matrix_exp matrix_power pinv qr svd svdvals det slogdet matrix_rank cond"
_DECOMPOSED = "cholesky cholesky_inverse inverse det logdet slogdet lu matrix_exp matrix_power pinverse qr svd geqrf"
# What a function takes each of its first arguments for: matrices in the last two axes, of which it reads both, or, as
# a right-hand side, each column by itself; vectors in the last; images behind two; or one thing.
PARTS: dict[Function | None, tuple[Part, ...]] = {
    **dict.fromkeys((getattr(torch.linalg, name) for name in _FACTORED.split()), ("matrix",)),
    **dict.fromkeys(named(*_DECOMPOSED.split()), ("matrix",)),
    **dict.fromkeys((torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.lstsq), ("matrix", "rows")),
    **dict.fromkeys(named("lstsq", "lu_solve", "cholesky_solve", "triangular_solve"), ("rows", "matrix", "matrix")),
    **dict.fromkeys((torch.linalg.lu_solve, torch.linalg.ldl_solve), ("matrix", "matrix", "rows")),
    torch.linalg.solve_triangular: ("matrix", "rows"),
    torch.linalg.householder_product: ("matrix", "vector"),
    **dict.fromkeys(named("orgqr"), ("matrix", "vector")),
    **dict.fromkeys(named("ormqr"), ("matrix", "vector", "matrix")),
    **dict.fromkeys((*named("cov", "corrcoef"), torch.linalg.tensorinv, F.pdist), ("whole",)),
    torch.linalg.tensorsolve: ("whole", "whole"),
    torch.bilinear: ("vector", "vector"),
    F.grid_sample: ("image", "vector"),
    torch.grid_sampler: ("image", "vector"),
    getattr(F, "linear_cross_entropy", None): ("vector", "whole"),
}
_CHAINS = {torch.linalg.multi_dot, torch.chain_matmul}
_TRANSPOSED = {getattr(F, f"conv_transpose{d}d") for d in (1, 2, 3)}
_CONVOLVES = _TRANSPOSED | {torch.convolution, *(getattr(F, f"conv{d}d") for d in (1, 2, 3))}
_POOLS = {getattr(F, f"{kind}_pool{d}d"): d for kind in ("avg", "max", "lp") for d in (1, 2, 3)}
_POOLS |= {getattr(F, f"max_pool{d}d_with_indices"): d for d in (1, 2, 3)}
_PADS = {F.pad, torch.constant_pad_nd}
_ATTENTION = F.scaled_dot_product_attention
_OF_POWERS = {F.lp_pool1d, F.lp_pool2d, F.lp_pool3d}
_OF_VECTORS = {torch.linalg.solve, torch.linalg.solve_ex}
JOINTLY = {*PARTS, *_CHAINS, *_CONVOLVES, *_POOLS, *_PADS, _ATTENTION}


def meets(op: Operation) -> bool:
    """Whether samples surely meet in what a function reads as one, with a gradient."""
    if op.func in _CONVOLVES:
        return _in_window(op)
    if op.func in _POOLS:
        return _in_pool(op, _POOLS[op.func])
    if op.func in _PADS:
        return _in_pad(op)
    if op.func in _CHAINS:
        return _in_chain(op)
    if op.func is _ATTENTION:
        return _in_attention(op)
    parts = PARTS.get(op.func)
    if parts is None:
        return False
    pairs = zip(op.args, parts, strict=False)
    return any((at := _samples(op, x)) is not None and _within(op, part, x, at.axis) for x, part in pairs)


def _samples(op: Operation, x: Any) -> Layout | None:
    at = op.of(x) if isinstance(x, Tensor) and x.requires_grad else None
    return None if at is None or at.n == 1 or at.alone is not None else at


def _within(op: Operation, part: Part, x: Tensor, axis: int) -> bool:
    if part == "rows" and op.func in _OF_VECTORS and (x.ndim == 1 or x.shape == op.args[0].shape[:-1]):
        part = "vector"  # several of them, where matrices are several
    if part == "rows":
        return axis == x.ndim - (1 if op.kwargs.get("left") is False else 2)
    return axis >= x.ndim - {"matrix": 2, "vector": 1, "image": x.ndim - 2, "whole": x.ndim}[part]


def _in_pad(op: Operation) -> bool:
    """Whether samples are moved along in the batch, some out of it, and others, or constants, in."""
    x, pad = op.given(0, "input"), op.given(1, "pad")
    if (at := _samples(op, x)) is None:
        return False
    first = 2 * (x.ndim - 1 - at.axis)
    before, after = (*pad[first : first + 2], 0, 0)[:2]
    return bool(before and before + after == 0)


def _in_chain(op: Operation) -> bool:
    """Products of matrices: samples are the rows of the first or the columns of the last, or meet."""
    factors = [x for arg in op.args for x in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    found = [(i, x, at) for i, x in enumerate(factors) if (at := _samples(op, x)) is not None]
    free = (0, 0), (len(factors) - 1, factors[-1].ndim - 1)
    return any((i, at.axis) not in free for i, _, at in found) or len(found) > 1


def _in_window(op: Operation) -> bool:
    """Whether a convolution has several samples in a group of channels, or next to each other in a kernel."""
    x, weight, transposed = op.given(0, "input"), op.given(1, "weight"), op.func in _TRANSPOSED
    groups = op.given(6, "groups", default=1)
    if op.func is torch.convolution:
        transposed, groups = op.given(6, "transposed"), op.given(8, "groups")
    if (at := _samples(op, weight)) is not None and at.axis != (1 if transposed else 0):
        return at.axis > 1 or not transposed or groups == 1
    at, channels = _samples(op, x), x.ndim - weight.ndim + 1
    if at is None or at.axis < channels:
        return False
    if at.axis > channels:
        return bool(weight.shape[at.axis - x.ndim] > 1)
    owners = at.owners().view(groups, -1)
    return not torch.equal(owners, owners[:, :1].expand_as(owners))


def _in_attention(op: Operation) -> bool:
    """Whether attention adds up over samples, or the places of samples say what they attend to; queries that are
    samples along keys that are, too, may be kept apart by a mask (`persample.mixing.acts_across`).
    """
    query, key, value = (op.given(i, name) for i, name in enumerate(("query", "key", "value")))
    q, k, v = (_samples(op, x) for x in (query, key, value))
    along = q is not None and q.axis == query.ndim - 2
    if along and op.given(5, "is_causal"):
        return True
    apart = along and op.given(3, "attn_mask") is not None
    return (
        (q is not None and q.axis == query.ndim - 1)
        or (k is not None and k.axis >= key.ndim - (1 if apart else 2))
        or (v is not None and v.axis == value.ndim - 2 and not apart)
    )


def _in_pool(op: Operation, dims: int) -> bool:
    x = op.given(0, "input")
    size = op.given(2 if op.func in _OF_POWERS else 1, "kernel_size")
    at = _samples(op, x)
    if at is None or at.axis < x.ndim - dims:
        return False
    return (size[at.axis - x.ndim] if isinstance(size, (tuple, list)) and len(size) == dims else size) not in (1, (1,))
