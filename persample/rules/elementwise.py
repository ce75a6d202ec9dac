"""Calls that broadcast a shared tensor over the batch: ``add``, ``mul``, ``where``, ``cat``, item assignment ..."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..factors import Dense
from . import Yields, rule, spellings
from .apart import apart


def spread(call: Call, g: Tensor, p: Tensor) -> Any:
    """The gradient of a shared ``p`` that was broadcast to the output: sum over where it was, per sample."""
    at = call.layout
    place = at.axis - (g.ndim - p.ndim)  # of the sample axis in p
    if place >= 0 and p.shape[place] == g.shape[at.axis] > 1:  # p has an entry of its own for every sample
        g = g.movedim(at.axis, 0)
        rest = p.shape[:place] + p.shape[place + 1 :]
        return apart(sum_to(g, rest, 1).to(p.dtype).movedim(0, place), replace(at, axis=place))
    rows = call.samples(g)  # [N, k, *rest of g]
    rest = p.shape[:place] + p.shape[place + 1 :] if place >= 0 else p.shape
    rows = sum_to(rows, rest, 1)
    return Dense(rows if rest == p.shape else rows.reshape(len(rows), *p.shape))


def sum_to(g: Tensor, shape: torch.Size, keep: int) -> Tensor:
    """Sum all but the first ``keep`` axes down to ``shape`` (aligned at the right)."""
    end = g.ndim - len(shape)
    if end == keep + 1 and g.shape[keep] == 1:  # one token of every sample: nothing to add up
        g = g.squeeze(keep)
    elif end > keep:  # the extra axes in one sum
        g = g.sum(tuple(range(keep, end)))
    over = [keep + a for a, size in enumerate(shape) if size == 1 != g.shape[keep + a]]
    return g.sum(over, keepdim=True) if over else g


@rule(*spellings("add", "add_", "iadd", "radd"))
def add(call: Call, g: Tensor, input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Yields:
    if isinstance(input, Tensor) and not call.sampled(input):
        yield input, lambda: spread(call, g, input)
    if isinstance(other, Tensor) and not call.sampled(other):
        yield other, lambda: spread(call, g if alpha == 1 else g * alpha, other)


@rule(*spellings("sub", "sub_", "isub", "subtract"))
def sub(call: Call, g: Tensor, input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Yields:
    yield from add(call, g, input, other, alpha=-alpha)


@rule(*spellings("rsub"))
def rsub(call: Call, g: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Yields:
    yield from add(call, g, other, input, alpha=-alpha)


def _scaled(call: Call, g: Tensor, x: Any, p: Tensor) -> Any:
    return spread(call, g * call.read(x), p)


@rule(*spellings("mul", "mul_", "imul", "rmul", "multiply"))
def mul(call: Call, g: Tensor, input: Any, other: Any, *, out: Any = None) -> Yields:
    for p, x in ((input, other), (other, input)):
        if isinstance(p, Tensor) and not call.sampled(p):
            yield p, partial(_scaled, call, g, x, p)


@rule(*spellings("div", "div_", "truediv", "itruediv", "true_divide"))
def div(call: Call, g: Tensor, input: Any, other: Any, *, rounding_mode: str | None = None, out: Any = None) -> Yields:
    if rounding_mode is not None:
        return
    if isinstance(input, Tensor) and not call.sampled(input):
        yield input, lambda: spread(call, g / call.read(other), input)
    if isinstance(other, Tensor) and not call.sampled(other):
        yield other, lambda: spread(call, -g * call.read(input) / call.read(other) / call.read(other), other)


@rule(torch.where, Tensor.where)
def where(call: Call, g: Tensor, condition: Any, input: Any = None, other: Any = None) -> Yields:
    if torch.is_tensor(input) and torch.is_tensor(condition) and condition.dtype is torch.bool:
        if not call.sampled(input):
            yield input, lambda: spread(call, g.masked_fill(~call.read(condition), 0), input)
        if isinstance(other, Tensor) and not call.sampled(other):
            yield other, lambda: spread(call, g.masked_fill(call.read(condition), 0), other)


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(call: Call, g: Tensor, tensors: Any, dim: int = 0, *, axis: int | None = None, out: Any = None) -> Yields:
    dim = (dim if axis is None else axis) % g.ndim
    if dim == call.layout.axis:
        return
    start = 0
    for p in tensors:
        piece = g.narrow(dim, start, p.shape[dim]) if p.ndim == g.ndim else g
        start += p.shape[dim] if p.ndim == g.ndim else 0
        if not call.sampled(p) and p.ndim == g.ndim:
            yield p, partial(spread, call, piece, p)


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(call: Call, g: Tensor, input: Tensor, weight: Tensor) -> Yields:
    """One slope, or one for each channel (axis 1)."""
    at = call.layout
    if call.sampled(weight) or (at.axis == 1 and weight.numel() > 1):
        return
    slope = g * call.read(input).clamp(max=0)
    if weight.numel() == 1:
        yield weight, lambda: Dense(call.tokens(slope, 0).sum(1).view(-1, *weight.shape))
    else:  # [N, k, C, *rest], or [N, k, rest, C, *rest] for samples behind the channels
        yield weight, lambda: Dense(call.samples(slope).movedim(2 if at.axis == 0 else 3, -1).flatten(1, -2).sum(1))


@rule(Tensor.__setitem__)
def setitem(call: Call, g: Tensor, target: Tensor, index: Any, value: Any) -> Yields:
    if isinstance(value, Tensor) and not call.sampled(value):
        picked = g[index]
        at = call.layout
        if at.plain and at.axis == 0 and picked.ndim and picked.shape[0] == at.n and _keeps_samples(index):
            yield value, lambda: spread(call, picked, value)


def _keeps_samples(index: Any) -> bool:
    """``x[:, ...] = p``: the assignment runs over all samples, which come first also in the part that is picked (not so
    behind tensors of indices that stand apart).
    """
    index = index if isinstance(index, tuple) else (index,)
    picks = [i for i, x in enumerate(index) if x is not None and x is not Ellipsis and not isinstance(x, slice)]
    apart = bool(picks) and picks[-1] - picks[0] >= len(picks) and any(not isinstance(index[i], int) for i in picks)
    return not apart and (index[0] is Ellipsis or (isinstance(index[0], slice) and index[0] == slice(None)))
