"""What can be computed from ``G [N, |P|]`` without forming it: seven primitives, exact for every form.

================ ======================= ============ ==============================================
primitive        formula                 result       serves
================ ======================= ============ ==============================================
`weighted_sum`   ``w^T G``               ``[*P]``     batch, weighted and clipped gradients
`square_sum`     ``1^T (G o G)``         ``[*P]``     second moments
`moments`        both sums, centred      ``[*P] x 2`` variances
`row_dot`        ``diag(A B^T)``         ``[N]``      norms
`gram`           ``A B^T``               ``[N, M]``   inner products of all samples
`dot`            ``G v``                 ``[N]``      directional derivatives
`project`        ``G R``                 ``[N, k]``   projections
================ ======================= ============ ==============================================

Every primitive takes a form apart (`persample.streaming.pieces`), and reduces each piece: a `Dense` one directly, `Rows` by
table entry (`persample.lookup`), an `Outer` by products of tokens (`persample.tokens`) where `persample.cost` says so, by
default by streaming blocks.  Half precision is computed in float32; results are float32, or float64 for float64 factors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import convolution, cost, lookup, tokens
from .factors import Conv, Dense, Factors, Outer, Rows, cast, dtype, index, tensors
from .scratch import kernel
from .streaming import Block, Piece, alike, blocks, chunks, cuts, paired, pieces, split_of

# ---- parameter space --------------------------------------------------------------------------------------------


@kernel
def weighted_sum(g: Factors, weight: Tensor | None = None) -> Tensor:
    """``weight^T G``, ``[*P]``: ones (or no weight) give the batch gradient, clip factors a clipped one."""
    g = _wide(g)
    if weight is not None:
        weight = weight.to(dtype(g))
    match g:
        case Dense(value):
            return value.reshape(len(g), g.shape.numel()).mT.mv(value.new_ones(len(g)) if weight is None else weight).view(g.shape)
        case Outer():
            return tokens.weighted_sum(g, weight).reshape(g.shape)
        case Rows():
            return lookup.weighted_sum(g, weight)
        case Conv(input, grad):
            grad = grad if weight is None else grad * weight.view(-1, *[1] * (grad.ndim - 1))
            return convolution.summed(input, grad, g.geometry).reshape(g.shape)


@kernel
def square_sum(g: Factors) -> Tensor:
    """``1^T (G o G)``, ``[*P]``: the second moment, not divided by ``N``."""
    g = _wide(g)
    split, totals = split_of(g), list[Tensor]()
    for at, part in chunks(g, split):
        for number, piece in enumerate(pieces(part, split)):
            if not at.start:
                totals.append(_zeros(g, piece.shape.numel()))
            _add_squares(piece, totals[number])
    return split.joined(totals, g.shape) if totals else _zeros(g, *g.shape)


def _add_squares(g: Piece, total: Tensor) -> None:
    match g:
        case Dense() if len(total) >= cost.costs().long:
            for row in g.value.reshape(len(g), len(total)):
                total.addcmul_(row, row)
        case Dense():
            for _, part, block in blocks(g, len(g), cuts(g, cost.chunk(len(g)))):
                total[part].addmv_(block.square_().mT, block.new_ones(len(block)))
        case Rows():
            total += lookup.square_sum(g).flatten()
        case Outer(left) if left.shape[2] == 1:
            total += tokens.square_sum(g).flatten()
        case Outer():
            for _, part, block in _blocks(g):
                if block.shape[1] >= cost.costs().long:
                    for row in block:
                        total[part].addcmul_(row, row)
                else:
                    total[part].addmv_(block.square_().mT, block.new_ones(len(block)))


@kernel
def moments(g: Factors) -> tuple[Tensor, Tensor]:
    """``1^T G`` and ``sum_n (G_n - mean)^2``, both ``[*P]``; the squares of centred rows, which can't be negative.

    Rows are centred as they stream by: blocks are centred on their own mean, and merged with what came before by the
    distance of the means (Chan, Golub, LeVeque 1983).  No difference of large sums is ever taken unchecked.
    """
    g = _wide(g)
    split, means, squares = split_of(g), list[Tensor](), list[Tensor]()
    for at, part in chunks(g, split):
        for number, piece in enumerate(pieces(part, split)):
            if not at.start:
                means.append(_zeros(g, piece.shape.numel()))
                squares.append(_zeros(g, piece.shape.numel()))
            _merge(piece, at.start, means[number], squares[number])
    if not means:
        return _zeros(g, *g.shape), _zeros(g, *g.shape)
    return split.joined(means, g.shape).mul_(len(g)), split.joined(squares, g.shape)


def _merge(g: Piece, count: int, mean: Tensor, square: Tensor) -> None:
    """Take the rows of ``g`` into the mean and centred squares of ``count`` rows so far."""
    match g:
        case Rows():
            total, centred = lookup.moments(g)
            mean.add_(total.flatten(), alpha=1 / max(1, len(g)))
            square.add_(centred.flatten())
        case Outer(left) if not count and cost.outer_moments(len(g), left.shape[2]) == "products":
            _merge_products(g, mean, square)
        case Outer():
            for at, part, block in _blocks(g):
                _merge_block(block, count + at.start, mean[part], square[part])
        case Dense():
            for at, part, block in blocks(g, len(g), cuts(g, cost.chunk(len(g)))):
                _merge_block(block, count + at.start, mean[part], square[part])


def _merge_block(block: Tensor, count: int, mean: Tensor, square: Tensor) -> None:
    """Overwrites ``block``."""
    n = len(block)
    if block.shape[1] >= cost.costs().long and n <= 8:
        for i, row in enumerate(block.unbind(), count):
            row -= mean
            mean.add_(row, alpha=1 / (i + 1))
            square.addcmul_(row, row, value=i / (i + 1))
        return
    ones = block.new_ones(n)
    own = block.mT.mv(ones).div_(n)
    block -= own
    square.addmv_(block.square_().mT, ones)
    own -= mean
    mean.add_(own, alpha=n / (count + n))
    square.addcmul_(own, own, value=count * n / (count + n))


def _merge_products(g: Outer, mean: Tensor, square: Tensor) -> None:
    """From products of tokens; where centring would cancel too many digits, those rows of the parameter are streamed."""
    total, centred, plain = (f.flatten(0, 1) for f in tokens.moments(g))
    lost = (centred < 0.01 * plain).any(1)
    if lost.any():
        rows = lost.nonzero().squeeze(1)
        k, o, i = g.left.shape[1], g.left.shape[3], g.right.shape[3]
        for b in range(k):
            chosen = rows[(rows >= b * o) & (rows < (b + 1) * o)]
            part = Outer(g.left[:, b : b + 1, :, chosen - b * o], g.right[:, b : b + 1], torch.Size((len(chosen), i)))
            fresh = [mean.new_zeros(len(chosen) * i) for _ in range(2)]
            for at, where, block in _blocks(part):
                _merge_block(block, at.start, fresh[0][where], fresh[1][where])
            centred[chosen] = fresh[1].view(-1, i)
    mean.add_(total.flatten(), alpha=1 / len(g))
    square.add_(centred.flatten())


# ---- sample space -----------------------------------------------------------------------------------------------


@kernel
def row_dot(a: Factors, b: Factors) -> Tensor:
    """``diag(A B^T)``, ``[N]``; with ``b is a`` the squared norms of the rows."""
    if b is a:
        return _norms(_wide(a))
    a, b = _common(a, b)
    split = split_of(a if isinstance(a, Conv) else b)
    found = _zeros(a, len(a))
    for at, part in chunks(a if isinstance(a, Conv) else b, split):
        x, y = (part, index(b, at)) if isinstance(a, Conv) else (index(a, at), part)
        for pair in paired(x, y):
            found[at] += _row_dot(*pair)
    return found


def _norms(g: Factors) -> Tensor:
    if isinstance(g, Conv) and _prefers_pixels(g):
        step = cost.chunk(g.geometry.groups * g.geometry.pixels(tuple(g.grad.shape[2:])) ** 2)
        parts = [index(g, slice(i, i + step)) for i in range(0, len(g), step)]
        found = [convolution.pixel_products(p.input, p.grad, g.geometry) for p in parts if isinstance(p, Conv)]
        return _checked(g, *(torch.cat(f) for f in zip(*found, strict=True)))
    return _streamed_norms(g)


def _streamed_norms(g: Factors) -> Tensor:
    split, found = split_of(g), _zeros(g, len(g))
    for at, part in chunks(g, split):
        for piece in pieces(part, split):
            found[at] += _piece_norms(piece)
    return found


def _prefers_pixels(g: Conv) -> bool:
    geo, positions = g.geometry, tuple(g.grad.shape[2:])
    if not (len(g) and g.grad.numel() and g.input.numel()):
        return False
    outputs = g.shape[0] // geo.groups
    pixels, offsets = geo.pixels(positions), g.shape[2:].numel()
    return cost.conv_norm(g.shape[1], outputs, pixels, g.grad.shape[2:].numel(), offsets) == "pixels"


def _piece_norms(g: Piece) -> Tensor:
    match g:
        case Dense(value):
            sizes: Tensor = torch.linalg.vector_norm(value.reshape(len(g), g.shape.numel()), dim=1)
            return sizes.square_()
        case Rows():
            return lookup.norms(g)
        case Outer(left) if left.shape[2] == 1:
            return tokens.one_token_norms(g)
        case Outer(left, right) if cost.outer_norm(left.shape[2], left.shape[3], right.shape[3]) == "tokens":
            return _checked(g, *tokens.norms(g))
        case _:
            return _outer_norms(g)


def _outer_norms(g: Outer) -> Tensor:
    found = g.left.new_zeros(len(g))
    for at, _, block in _blocks(g):
        found[at] += torch.linalg.vector_norm(block, dim=1).square_()
    return found


def _checked(g: Conv | Outer, value: Tensor, size: Tensor) -> Tensor:
    """Squared norms from products of tokens; samples whose tokens nearly cancel are computed from their rows."""
    lost = value < cost.cancelled(value.dtype) * size
    if lost.any():
        which = lost.nonzero().squeeze(1)
        part = index(g, which)
        value[which] = _outer_norms(part) if isinstance(part, Outer) else _streamed_norms(part)
    return value


def _row_dot(a: Piece, b: Piece) -> Tensor:
    match a, b:
        case Outer(), Outer() if a.left.shape == b.left.shape and a.left.shape[2] == 1:
            return ((a.left * b.left).sum(3) * (a.right * b.right).sum(3)).sum((1, 2))
        case Rows(), Rows():
            return lookup.row_dot(a, b)
        case Dense(), Dense():
            x, y = (f.value.reshape(len(a), 1, a.shape.numel()) for f in (a, b))
            return torch.bmm(x, y.mT).view(len(a))
    found = _zeros(a, len(a))
    a, b, leader = alike(a, b)
    step, parts = _tiles(leader)
    for (at, _, x), (_, _, y) in zip(blocks(a, step, parts), blocks(b, step, parts), strict=True):
        found[at] += torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).view(len(x))
    return found


@kernel
def gram(a: Factors, b: Factors) -> Tensor:
    """``A B^T``, ``[N, M]``: inner products of all rows of ``a`` with all rows of ``b``."""
    same = b is a
    a, b = (_wide(a),) * 2 if same else _common(a, b)
    found = _zeros(a, len(a), len(b))
    step = cost.costs().samples
    for i in range(0, len(a), step):
        for j in range(i if same else 0, len(b), step):
            rows, cols = slice(i, i + step), slice(j, j + step)
            x = index(a, rows)
            y = x if same and i == j else index(b, cols)
            for pair in paired(x, y):
                found[rows, cols] += _gram(*pair)
            if same and i != j:
                found[cols, rows] = found[rows, cols].mT
    return found


def _gram(a: Piece, b: Piece) -> Tensor:
    match a, b:
        case Outer(), Outer() if _prefers_tokens(a, b):
            return tokens.gram(a, b)
        case Rows(), Rows():
            return lookup.gram(a, b)
        case Dense(), Dense():
            return a.value.reshape(len(a), a.shape.numel()) @ b.value.reshape(len(b), b.shape.numel()).mT
    found = _zeros(a, len(a), len(b))
    width = cost.chunk(max(len(a), len(b)), cost.costs().wide)
    if b is a:
        for _, _, x in blocks(a, len(a), cuts(a, width)):
            found.addmm_(x, x.mT)
        return found
    a, b, leader = alike(a, b)
    parts = cuts(leader, width)
    for (_, _, x), (_, _, y) in zip(blocks(a, len(a), parts), blocks(b, len(b), parts), strict=True):
        found.addmm_(x, y.mT)
    return found


def _prefers_tokens(a: Outer, b: Outer) -> bool:
    (n, k, t, o), (m, blocks_b, s, _) = a.left.shape, b.left.shape
    if (k, o) != (blocks_b, b.left.shape[3]) or cost.outer_gram(n, m, t, s, o, a.right.shape[3]) == "stream":
        return False
    if t == s == 1:
        return True
    for g in (a,) if b is a else (a, b):  # cancellation inside of a row would show in all its products
        value, size = tokens.norms(g)
        if (value < cost.cancelled(value.dtype) * size).any():
            return False
    return True


@kernel
def dot(g: Factors, v: Tensor) -> Tensor:
    """``G v``, ``[N]``: the derivative of every sample's loss in the direction ``v [*P]``."""
    g = _wide(g)
    v = v.to(dtype(g)).reshape(g.shape)
    match g:
        case Dense(value):
            return value.reshape(len(g), g.shape.numel()).mv(v.flatten())
        case Outer(left, right):
            return tokens.dot(g, v.reshape(left.shape[1], left.shape[3], right.shape[3]))
        case Rows():
            return lookup.dot(g, v)
        case Conv(input, grad):
            return convolution.applied(input, grad, v, g.geometry)


@kernel
def project(g: Factors, matrix: Tensor) -> Tensor:
    """``G R``, ``[N, k]``, for ``R [*P, k]``."""
    g = _wide(g)
    k = matrix.shape[-1]
    matrix = matrix.to(dtype(g)).reshape(*g.shape, k)
    found = matrix.new_zeros(len(g), k)
    split = split_of(g)
    columns = matrix.flatten(2, -2).unbind(2) if split.how == "offsets" else (matrix,)
    for at, part in chunks(g, split):
        for piece, own in zip(pieces(part, split), columns, strict=True):
            match piece:
                case Dense(value):
                    found[at] += value.reshape(len(piece), piece.shape.numel()) @ own.reshape(-1, k)
                case Rows():
                    found[at] += lookup.project(piece, own)
                case Outer():
                    own = own.reshape(-1, k)
                    for rows, cols, block in _blocks(piece):
                        found[at][rows].addmm_(block, own[cols])
    return found


# ---- details ----------------------------------------------------------------------------------------------------


def _wide(g: Factors) -> Factors:
    """With one dtype, of at least float32."""
    kind = dtype(g)
    return cast(g, torch.float32 if kind.itemsize < 4 else kind)


def _common(a: Factors, b: Factors) -> tuple[Factors, Factors]:
    kind = torch.promote_types(torch.promote_types(dtype(a), dtype(b)), torch.float32)
    return cast(a, kind), cast(b, kind)


def _zeros(g: Factors, *shape: int) -> Tensor:
    return tensors(g)[-1].new_zeros(shape)


def _blocks(g: Outer) -> Iterator[Block]:
    step, parts = _tiles(g)
    return blocks(g, step, parts)


def _tiles(g: Piece) -> tuple[int, list[slice]]:
    """Samples and slices of the blocks of ``g``: whole rows, a few samples at a time, and slices of rows if they are long."""
    entries = g.shape.numel()
    if entries <= cost.costs().wide:
        return cost.chunk(entries), cuts(g, entries)
    return 1, cuts(g, cost.costs().block)
