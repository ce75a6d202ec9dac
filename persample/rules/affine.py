"""Products with a weight: ``linear``, ``addmm``, ``matmul`` and its spellings, ``einsum``."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..factors import Dense, Outer, outer
from ..layout import Layout, samples_first
from . import Yields, rule, spellings
from .elementwise import spread


def product(left: Tensor, right: Tensor, shape: torch.Size) -> Outer:
    """One block: ``sum_t left[n, t] (x) right[n, t]`` from tokens ``[N, T, O]`` and ``[N, T, I]``."""
    return outer(left.unsqueeze(1), right.unsqueeze(1), shape)


@rule(F.linear)
def linear(call: Call, g: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Yields:
    if call.sampled(input) and not call.sampled(weight):
        if weight.ndim == 1:
            yield weight, lambda: Dense((call.tokens(g, 0).unsqueeze(-1) * call.tokens(input)).sum(1))
        else:
            yield weight, lambda: product(call.tokens(g), call.tokens(input), weight.shape)
    if bias is not None and not call.sampled(bias):
        yield bias, lambda: spread(call, g, bias)


@rule(torch.addmm, Tensor.addmm)
def addmm(
    call: Call, g: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Yields:
    if call.sampled(mat1) and not call.sampled(mat2):
        yield mat2, lambda: product(call.tokens(mat1), call.tokens(g) * alpha, mat2.shape)
    if not call.sampled(input):
        yield input, lambda: spread(call, g * beta, input)


@rule(*spellings("matmul", "mm"))
def matmul(call: Call, g: Tensor, input: Tensor, other: Tensor) -> Yields:
    if call.sampled(input) and not call.sampled(other):
        yield from _right(call, g, input, other)
    if call.sampled(other) and not call.sampled(input):
        yield from _left(call, g, input, other)


@rule(Tensor.__rmatmul__)
def rmatmul(call: Call, g: Tensor, other: Tensor, input: Tensor) -> Yields:
    yield from matmul(call, g, input, other)


@rule(*spellings("mv"))
def mv(call: Call, g: Tensor, input: Tensor, vec: Tensor) -> Yields:
    yield from matmul(call, g, input, vec)


def _right(call: Call, g: Tensor, x: Tensor, w: Tensor) -> Yields:
    """``x @ w`` with a shared ``w``: a vector, a matrix, or a matrix for each of some heads."""
    if x.ndim < 2:
        return
    if w.ndim == 1:
        yield w, lambda: Dense((call.tokens(g, 0).unsqueeze(-1) * call.tokens(x)).sum(1))
    elif w.ndim == 2:
        yield w, lambda: product(call.tokens(x), call.tokens(g), w.shape)
    elif (pair := _heads(call, g, x, w)) is not None:
        yield w, lambda: outer(pair[1], pair[0], w.shape)


def _left(call: Call, g: Tensor, w: Tensor, x: Tensor) -> Yields:
    """``w @ x`` with a shared ``w``: the same from the right, of the transposed tensors."""
    if x.ndim < 2 or w.ndim != 2:
        return
    at = call.layouts[id(x)]
    assert at is not None
    if at.axis == x.ndim - 1:  # the samples are the columns
        yield w, lambda: product(call.tokens(g), call.tokens(x), w.shape)
    elif at.axis < x.ndim - 2:
        yield w, lambda: product(call.samples(g).mT.flatten(1, -2), call.samples(x).mT.flatten(1, -2), w.shape)


def _heads(call: Call, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor] | None:
    """``x [N, K, T, I] @ w [K, I, O]``, blocks ``K`` aligned: ``(g [N, K, T, O], x [N, K, T, I])``."""
    at = call.layouts[id(x)]
    if at is None or not at.plain or at.axis != 0 or x.ndim != w.ndim + 1 or x.shape[1:-2] != w.shape[:-2]:
        return None
    return call.samples(g).squeeze(1).flatten(1, -3), call.samples(x).squeeze(1).flatten(1, -3)


@rule(torch.einsum)
def einsum(call: Call, g: Tensor, equation: Any, *operands: Any) -> Yields:
    """One more einsum: the output gradient takes the output's place, the result the operand's, the sample stays."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return
    left, result = equation.replace(" ", "").split("->")
    letters = left.split(",")
    at = call.layout
    if not at.plain or any(len(set(part)) != len(part) for part in letters):
        return
    pairs = {pair for part, x in zip(letters, operands, strict=True) for pair in zip(part, x.shape, strict=True)}
    if len(pairs) > len({letter for letter, _ in pairs}):
        return  # axes of one entry that are broadcast
    n = result[at.axis]
    for position, (own, w) in enumerate(zip(letters, operands, strict=True)):
        others = [i for i in range(len(operands)) if i != position]
        seen = set(result).union(*(letters[i] for i in others))
        if call.sampled(w) or n in own or not set(own) <= seen:
            continue
        inner = ",".join([result, *(letters[i] for i in others)])
        yield w, partial(_contracted, call, f"{inner}->{n}{own}", g, [operands[i] for i in others])


def _contracted(call: Call, equation: str, g: Tensor, rest: list[Tensor]) -> Dense:
    factors = [g, *(call.read(x) for x in rest)]
    kind = functools.reduce(torch.promote_types, (x.dtype for x in factors))  # they differ under autocast
    return Dense(torch.einsum(equation, *(x.to(kind) for x in factors)))


@rule(torch._grouped_mm)
def grouped_mm(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor,
    offs: Tensor | None = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Yields:
    """Rows ``[offs[k - 1] : offs[k]]`` times the matrix of expert ``k``, ``other [K, I, O]``."""
    at = call.layout
    if input.ndim != 2 or other.ndim != 3 or offs is None or call.sampled(other) or at.axis != 0:
        return
    rows = torch.arange(len(input), device=input.device)
    expert = torch.searchsorted(call.read(offs).to(rows.dtype).contiguous(), rows, right=True)
    used = expert < len(other)
    key = Layout(at.n * len(other), owner=(at.owners().to(expert.device) * len(other) + expert)[used])

    def blocks(x: Tensor) -> Tensor:
        """``[N, K, T, D]``."""
        tokens: Tensor = samples_first(x[used], key).unflatten(0, (at.n, len(other)))
        return tokens

    yield other, lambda: outer(blocks(call.read(input)), blocks(g), other.shape)


@rule(F.bilinear)
def bilinear(
    call: Call, g: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Yields:
    """``out[o] = sum_ij input1[i] weight[o, i, j] input2[j]``: of a token's three vectors two are multiplied out."""
    if not call.sampled(weight) and call.sampled(input1) and call.sampled(input2):
        yield weight, lambda: _three(call.tokens(g), call.tokens(input1), call.tokens(input2), weight.shape)
    if bias is not None:
        yield bias, lambda: spread(call, g, bias)


def _three(g: Tensor, x: Tensor, y: Tensor, shape: torch.Size) -> Outer:
    o, i, j = shape
    if o + i * j < o * i + j:
        return product(g, (x.unsqueeze(3) * y.unsqueeze(2)).flatten(2), shape)
    return product((g.unsqueeze(3) * x.unsqueeze(2)).flatten(2), y, shape)
