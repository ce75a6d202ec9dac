"""What can be computed from ``G [N, |P|]`` without forming it: seven primitives, exact for every form.

================ ====================== ============== ==========================================
primitive        formula                result         serves
================ ====================== ============== ==========================================
`weighted_sum`   ``w^T G``              ``[*P]``       batch, weighted and clipped gradients
`square_sum`     ``1^T (G o G)``        ``[*P]``       second moments
`moments`        sums, and centred      two ``[*P]``   variances, with the mean (`centred`: without)
`row_dot`        ``diag(A B^T)``        ``[N]``        norms
`gram`           ``A B^T``              ``[N, M]``     inner products of all samples
`dot`            ``G v``                ``[N]``        directional derivatives
`project`        ``G R``                ``[N, k]``     projections
================ ====================== ============== ==========================================

Each takes a form apart (`persample.streaming`) and reduces the pieces: `Dense` ones directly, `Rows` by table entry
(`persample.lookup`), an `Outer` by products of tokens (`persample.tokens`) where `persample.cost` says so, else by
blocks.  Sums of `Pulled` rows are led back once.  Half precision is computed in float32: results are float32, or
float64 for float64 factors.  A complex entry of a parameter counts as the two real ones that it is: inner products are
real.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import across, convolution, cost, lookup, tokens
from .doubt import doubtful
from .factors import Across, Conv, Dense, Factors, Outer, Pulled, Rows, dtype, index, led, same_back, tensors
from .moments import centred, moments, square_sum
from .scratch import kernel
from .streaming import (
    Piece,
    alike,
    blocks,
    chunks,
    common,
    cuts,
    paired,
    pieces,
    sizes_of,
    split_of,
    streamed,
    streams,
    tiles,
    wide,
)

__all__ = ["centred", "dot", "gram", "moments", "project", "row_dot", "square_sum", "weighted_sum"]


@kernel
def weighted_sum(g: Factors, weight: Tensor | None = None) -> Tensor:
    """``weight^T G``, ``[*P]``: ones (or no weight) give the batch gradient, clip factors a clipped one."""
    if dtype(g).is_complex:
        return torch.view_as_complex(weighted_sum(wide(g), weight))
    g = wide(g)
    if weight is not None:
        weight = weight.to(tensors(g)[-1].dtype)
    match g:
        case Dense(value):
            weight = value.new_ones(len(g)) if weight is None else weight
            return _matrix(g).mT.mv(weight).view(g.shape)
        case Outer():
            return tokens.weighted_sum(g, weight).view(g.shape)
        case Rows():
            return lookup.weighted_sum(g, weight)
        case Conv(input, grad):
            if weight is not None:  # into the smaller side
                weight = weight.view(-1, *[1] * (grad.ndim - 1))
                input, grad = (input * weight, grad) if input.numel() < grad.numel() else (input, grad * weight)
            return convolution.summed(input, grad, g.geometry).reshape(g.shape)
        case Pulled(rows, back):
            total = weighted_sum(rows, weight)
            return total * back if isinstance(back, Tensor) else back(total.unsqueeze(0))[0]


@kernel
def dot(g: Factors, v: Tensor) -> Tensor:
    """``G v``, ``[N]``: the derivative of every sample's loss in the direction ``v [*P]``."""
    if dtype(g).is_complex:
        return dot(wide(g), torch.view_as_real(v.to(dtype(g))))
    g = wide(g)
    v = v.to(tensors(g)[-1].dtype).reshape(g.shape)
    match g:
        case Dense():
            return _matrix(g).mv(v.flatten())
        case Outer(left, right):
            return tokens.dot(g, v.reshape(left.shape[1], left.shape[3], right.shape[3]))
        case Rows():
            return lookup.dot(g, v)
        case Conv(input, grad):
            return convolution.applied(input, grad, v, g.geometry).sum(1)
        case Pulled(rows, Tensor() as back):
            return dot(rows, v * back)
        case Pulled(rows, Across() as back):
            return dot(rows, back(v.unsqueeze(0))[0])
        case Pulled():
            found = v.new_empty(len(g))
            for at, part in led(g):
                found[at] = part.reshape(len(part), -1).mv(v.flatten())
            return found


@kernel
def project(g: Factors, matrix: Tensor) -> Tensor:
    """``G R``, ``[N, k]``, for ``R [*P, k]``: one `dot` for every column."""
    if dtype(g).is_complex:
        return project(wide(g), torch.view_as_real(matrix.to(dtype(g))).movedim(-1, -2))
    g = wide(g)
    k = matrix.shape[-1]
    matrix = matrix.to(tensors(g)[-1].dtype).reshape(*g.shape, k)
    if isinstance(g, Pulled) and isinstance(g.back, Across):
        return project(g.rows, g.back(matrix.movedim(-1, 0)).movedim(0, -1))
    found = matrix.new_zeros(len(g), k)
    split = split_of(g)
    columns = matrix.flatten(2, -2).unbind(2) if split == "offsets" else (matrix,)
    for at, part in chunks(g, split):
        for piece, own in zip(pieces(part, split), columns, strict=True):
            match piece:
                case Dense():
                    found[at] += _matrix(piece) @ own.reshape(-1, k)
                case Rows():
                    found[at] += lookup.project(piece, own)
                case Outer() | Pulled():
                    own = own.reshape(-1, k)
                    for rows, cols, block in streamed(piece):
                        found[at][rows].addmm_(block, own[cols])
    return found


# ---- norms ------------------------------------------------------------------------------------------------------


@kernel
def row_dot(a: Factors, b: Factors) -> Tensor:
    """``diag(A B^T)``, ``[N]``; with ``b is a`` the squared norms of the rows."""
    if b is a:
        return _norms(wide(a))
    a, b = common(a, b)
    if isinstance(b, Conv) and not isinstance(a, Conv):
        a, b = b, a
    found = _zeros(a, len(a))
    for at, part in chunks(a, split_of(a)):
        for pair in paired(part, index(b, at)):
            found[at] += _row_dot(*pair)
    return found


def _row_dot(a: Piece, b: Piece) -> Tensor:
    match a, b:
        case Outer(), Outer() if a.left.shape == b.left.shape and a.left.shape[2] == 1:
            return ((a.left * b.left).sum(3) * (a.right * b.right).sum(3)).sum((1, 2))
        case Rows(), Rows():
            return lookup.row_dot(a, b)
        case Dense(), Dense() if a.value.numel() <= cost.costs().block:
            return (_matrix(a) * _matrix(b)).sum(1)
    found = _zeros(a, len(a))
    a, b, leader = alike(a, b)
    step, parts = tiles(leader)
    for (at, _, x), (_, _, y) in zip(blocks(a, step, parts), blocks(b, step, parts), strict=True):
        found[at] += x.mul_(y).sum(1)
    return found


def _norms(g: Factors) -> Tensor:
    if isinstance(g, Pulled) and isinstance(g.back, Across):
        return _checked(g, *_across_norms(g))
    if isinstance(g, Pulled) and not streams(g):
        return _streamed_norms(g)
    if not isinstance(g, Conv):
        return _piece_norms(g)
    return _checked(g, *_pixel_products(g)) if _prefers_pixels(g) else _streamed_norms(g)


def _piece_norms(g: Piece) -> Tensor:
    match g:
        case Dense():
            return _squares(_matrix(g))
        case Rows():
            return lookup.norms(g)
        case Outer(left, right):
            n, _, t, o = left.shape
            if t == 1:
                return tokens.one_token_norms(g)
            if cost.outer_norm(n, t, o, right.shape[3]) == "tokens":
                return _checked(g, *tokens.norms(g))
            return _block_norms(g)
        case Pulled(Outer(left, right, shape), Tensor() as back) if left.shape[2] == 1:
            return dot(Outer(left.square(), right.square(), shape), back.square())
        case Pulled():
            return _block_norms(g)


def _block_norms(g: Piece) -> Tensor:
    found = _zeros(g, len(g))
    for at, _, block in streamed(g):
        found[at] += _squares(block)
    return found


def _squares(x: Tensor) -> Tensor:
    """Squared norms of rows, ``[N]``; of long ones in parts, as torch adds up a row's squares in single precision."""
    long = cost.costs().long
    parts = x.shape[1] // max(1, long)
    found: Tensor = torch.linalg.vector_norm(x[:, parts * long :] if parts > 1 else x, dim=1).square_()
    if parts > 1:
        found += torch.linalg.vector_norm(x[:, : parts * long].unflatten(1, (parts, long)), dim=2).square_().sum(1)
    return found


def _streamed_norms(g: Conv | Pulled) -> Tensor:
    split, found = split_of(g), _zeros(g, len(g))
    for at, part in chunks(g, split):
        for piece in pieces(part, split):
            found[at] += _piece_norms(piece)
    return found


def _across_norms(g: Pulled) -> tuple[Tensor, Tensor]:
    whole = _norms(g.rows)
    return whole - across.along(g).square_().sum(1), whole


def _prefers_pixels(g: Conv) -> bool:
    return bool(g.grad.numel() and g.input.numel()) and cost.conv_norm(g.grad, sizes_of(g)) == "pixels"


def _pixel_products(g: Conv) -> tuple[Tensor, ...]:
    step = cost.chunk(2 * g.geometry.groups * g.geometry.pixels(tuple(g.grad.shape[2:])) ** 2)  # of either side
    parts = zip(g.input.split(step), g.grad.split(step), strict=True)
    found = [convolution.pixel_products(input, grad, g.geometry) for input, grad in parts]
    return tuple(torch.cat(f) for f in zip(*found, strict=True))


def _checked(g: Factors, value: Tensor, size: Tensor) -> Tensor:
    """Squared norms from products of tokens; samples whose tokens nearly cancel are computed from their rows."""
    lost = value < cost.cancelled(value.dtype) * size
    if doubtful(lost.any()):
        which = lost.nonzero().squeeze(1)
        part = index(g, which)
        value[which] = _streamed_norms(part) if isinstance(part, Conv | Pulled) else _block_norms(part)
    return value


# ---- all pairs --------------------------------------------------------------------------------------------------


@kernel
def gram(a: Factors, b: Factors) -> Tensor:
    """``A B^T``, ``[N, M]``: inner products of all rows of ``a`` with all rows of ``b``."""
    same = b is a
    a, b = (wide(a),) * 2 if same else common(a, b)
    step = cost.costs().samples
    if min(len(a), len(b)) > 0 and max(len(a), len(b)) <= step:
        return _tile(a, b)
    found = _zeros(a, len(a), len(b))
    for i in range(0, len(a), step):
        for j in range(i if same else 0, len(b), step):
            rows, cols = slice(i, i + step), slice(j, j + step)
            x = index(a, rows)
            y = x if same and i == j else index(b, cols)
            found[rows, cols] = _tile(x, y)
            if same and i != j:
                found[cols, rows] = found[rows, cols].mT
    return found


def _tile(a: Factors, b: Factors) -> Tensor:
    if isinstance(a, Conv) and isinstance(b, Conv) and _prefers_pixel_pairs(a, b):
        return convolution.pixel_gram((a.input, a.grad), (b.input, b.grad), a.geometry)
    if isinstance(a, Pulled) and isinstance(b, Pulled) and (less := _projected(a, b)) is not None:
        return less
    found: Tensor | None = None
    for pair in paired(a, b):
        products = _gram(*pair)
        found = products if found is None else found.add_(products)
    return _zeros(a, len(a), len(b)) if found is None else found


def _gram(a: Piece, b: Piece) -> Tensor:
    match a, b:
        case Outer(), Outer() if _prefers_tokens(a, b):
            return tokens.gram(a, b)
        case Rows(), Rows():
            return lookup.gram(a, b)
        case Dense(), Dense():
            return _own_products(_matrix(a)) if b is a else _products(_matrix(a), _matrix(b))
    found = _zeros(a, len(a), len(b))
    width = cost.chunk(max(len(a), len(b)), cost.costs().wide)
    if b is a:
        for _, _, x in blocks(a, len(a), cuts(a, width)):
            found += _own_products(x)
        return found
    a, b, leader = alike(a, b)
    parts = cuts(leader, width)
    for (_, _, x), (_, _, y) in zip(blocks(a, len(a), parts), blocks(b, len(b), parts), strict=True):
        found += _products(x, y)
    return found


def _products(x: Tensor, y: Tensor) -> Tensor:
    """``x y^T``.  Long rows are cut in four: the library of matrix products shares out four better than one."""
    if x.shape[1] < cost.costs().long or x.shape[1] % 4:
        return x @ y.mT
    left, right = (t.unflatten(1, (4, -1)).transpose(0, 1) for t in (x, y))
    return torch.bmm(left, right.mT).sum(0)


def _own_products(x: Tensor) -> Tensor:
    """``x x^T``.  Long rows of many samples are multiplied with those of later bands of samples only."""
    n, bands = len(x), min(4, len(x) // 32)
    if bands < 2 or x.shape[1] < cost.costs().long:
        return _products(x, x)
    found, step = x.new_empty(n, n), -(-n // bands)
    for i in range(0, n, step):
        found[i : i + step, i:] = _products(x[i : i + step], x[i:])
        found[i + step :, i : i + step] = found[i : i + step, i + step :].mT
    return found


def _prefers_tokens(a: Outer, b: Outer) -> bool:
    (n, _, t, o), (m, _, s, _) = a.left.shape, b.left.shape
    if a.left.shape[1::2] != b.left.shape[1::2] or cost.outer_gram(n, m, t, s, o, a.right.shape[3]) == "stream":
        return False
    if t == s == 1:
        return True
    return _intact(*(tokens.norms(g) for g in ((a,) if b is a else (a, b))))


def _prefers_pixel_pairs(a: Conv, b: Conv) -> bool:
    if a.geometry != b.geometry or a.grad.shape[2:] != b.grad.shape[2:] or not (a.input.numel() and a.grad.numel()):
        return False
    if cost.conv_gram(len(a), len(b), sizes_of(a)) == "stream":
        return False
    return _intact(*(_pixel_products(g) for g in ((a,) if b is a else (a, b))))


def _projected(a: Pulled, b: Pulled) -> Tensor | None:
    """Of rows that were projected in one way, unless they are few enough to be formed, or nearly cancel."""
    if not isinstance(a.back, Across) or not same_back(a.back, b.back):
        return None
    single = isinstance(a.rows, Outer) and a.rows.left.shape[2] == 1
    if not single and max(len(a), len(b)) * a.shape.numel() <= cost.costs().wide:
        return None
    x = across.along(a)
    if b is a:
        found, y = _tile(a.rows, a.rows), x
        norms = found.diagonal().clone()
        intact = _intact((norms - x.square().sum(1), norms))
    else:
        y, intact = across.along(b), _intact(_across_norms(a), _across_norms(b))
        found = _tile(a.rows, b.rows) if intact else x
    return found.addmm_(x, y.mT, alpha=-1) if intact else None


def _intact(*norms: tuple[Tensor, ...]) -> bool:
    """Whether no row's own terms nearly cancel: that would show in all its products."""
    return not any(doubtful((value < cost.cancelled(value.dtype) * size).any()) for value, size in norms)


def _zeros(g: Factors, *shape: int) -> Tensor:
    return tensors(g)[-1].new_zeros(shape)


def _matrix(g: Dense) -> Tensor:
    """``[N, |P|]``."""
    return g.value if g.value.ndim == 2 else g.value.reshape(len(g), g.shape.numel())
