"""Tables: a looked-up row gets the gradient of every place that looked it up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..errors import BatchCoupledError, CaptureError
from ..factors import Dense, Rows
from ..layout import samples_first
from . import Yields, couples, rule, spellings
from .apart import Diagonal, apart
from .derived import table_rows


@rule(F.embedding)
def embedding(
    call: Call, g: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Yields:  # fmt: skip
    refuse_table_options(call, max_norm, scale_grad_by_freq)
    if call.sampled(input) and not call.sampled(weight):
        yield weight, lambda: table_rows(call.tokens(input, 0), call.tokens(g), weight, padding_idx)


@rule(Tensor.__getitem__)
def looked_up(call: Call, g: Tensor, table: Tensor, index: Any) -> Yields:
    """``table[index]`` with the samples' own indices."""
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and not call.sampled(table):
        yield table, lambda: _entries(call, g, table, index)
    elif isinstance(index, Tensor) and index.dtype is torch.bool and (at := call.layouts.get(id(index))) is not None:
        yield table, lambda: apart(torch.zeros_like(table).index_put_((call.read(index),), g.to(table.dtype)), at)


@rule(*spellings("index_select"))
def index_select(call: Call, g: Tensor, input: Tensor, dim: int, index: Tensor) -> Yields:
    at = call.layout
    if call.sampled(input) or not call.sampled(index):
        return
    if dim % input.ndim == 0:
        yield input, lambda: _entries(call, g, input, index)
    elif at.axis == dim % input.ndim and isinstance(rows := apart(g, at), Diagonal):
        yield input, lambda: replace(rows, shape=input.shape, place=call.read(index)[rows.places])


@rule(*spellings("gather"))
def gather(
    call: Call, g: Tensor, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False, out: Any = None
) -> Yields:
    """Entries along ``dim`` by the samples' own indices; along the other axes each takes from its own place."""
    if call.sampled(index) and not call.sampled(input) and call.layout.axis != dim % g.ndim:
        yield input, lambda: _by_place(call, g, input, dim, index)  # along the samples, every entry is one sample's


def _by_place(call: Call, g: Tensor, table: Tensor, dim: int, index: Tensor) -> Diagonal | Dense:
    at = call.layout
    if table.shape[at.axis] != at.size:  # more of them than there are samples
        raise NotImplementedError
    return apart(g.new_zeros(table.shape).scatter_add_(dim, call.read(index), g), at)


def _entries(call: Call, g: Tensor, table: Tensor, index: Tensor) -> Rows | Dense:
    """Every index is a token; what it picks is an entry of the table."""
    index = call.read(index).long() % len(table)
    places = samples_first(index, call.layout).flatten(1)
    values = call.tokens(g, table.ndim - 1)
    if table.ndim == 2:
        return Rows(places, values, table.shape)
    rows = values.new_zeros(len(values), *table.shape)
    return Dense(rows.scatter_add_(1, places.view(*places.shape, *[1] * (table.ndim - 1)).expand_as(values), values))


def refuse_table_options(call: Call, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise CaptureError(
            f"{call.name}: max_norm= changes the table during the forward pass. Renormalise it yourself, outside the "
            "model."
        )
    if scale_grad_by_freq:
        raise BatchCoupledError(
            f"{call.name}: scale_grad_by_freq=True divides by how often an entry occurs in the whole batch. Switch it "
            "off to get per-sample gradients."
        )


BY_FREQUENCY = "divides gradients by how often an entry occurs in the batch (scale_grad_by_freq=True)"


@couples(F.embedding)
def counts_the_batch(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> str:
    """Only the gradient is coupled, not the value, so nothing but the option tells."""
    return BY_FREQUENCY if scale_grad_by_freq else ""
