"""Bags of table entries: their sum, mean or maximum, as one call for all bags.

Position ``p`` of the flat index list lies in bag ``bag[p]``, and gives its entry the output gradient of that bag times
a coefficient.  A maximum sends each of its features to the entry that won it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..errors import SampleAxisError
from ..factors import Rows
from ..layout import Layout, owned, samples_first
from . import Yields, couples, rule
from .apart import apart
from .embedding import BY_FREQUENCY, refuse_table_options


@rule(F.embedding_bag)
def embedding_bag(
    call: Call, g: Tensor, input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2, scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Yields:  # fmt: skip
    refuse_table_options(call, max_norm, scale_grad_by_freq)
    at = call.layout
    bags = _Bags.of(call.read(input), offsets, include_last_offset, len(g), padding_idx, len(weight))
    owner = at.owners().to(g.device)[bags.bag]
    here = owned(at.n, 0, owner)  # of the positions

    def values() -> Tensor:
        rows, table = g.index_select(0, bags.bag), call.read(weight)
        if mode == "max":
            return rows.mul_(bags.wins(table))
        scale = bags.keep
        if mode == "mean":
            scale = scale / bags.counts().clamp(min=1)[bags.bag].to(g.dtype)
        elif per_sample_weights is not None:
            scale = call.read(per_sample_weights).reshape(-1)[bags.used] * bags.keep
        return rows.mul_(scale.unsqueeze(1))

    if not call.sampled(weight):
        yield weight, lambda: Rows(samples_first(bags.index, here), samples_first(values(), here), weight.shape)
    if per_sample_weights is not None and not call.sampled(per_sample_weights):
        yield per_sample_weights, lambda: _weights(call, g, weight, per_sample_weights, bags, here)


def _weights(call: Call, g: Tensor, weight: Tensor, given: Tensor, bags: _Bags, here: Layout):  # type: ignore[no-untyped-def]
    value = given.new_zeros(given.numel())
    products = g.index_select(0, bags.bag) * weight.index_select(0, bags.index)
    value[bags.used] = products.sum(1).to(given.dtype) * bags.keep
    if given.ndim == 1:
        if len(value) != here.size:
            raise NotImplementedError  # positions of no bag
        return apart(value, here)
    return apart(value.view(given.shape), call.layout)


@dataclass(frozen=True)
class _Bags:
    """All positions that lie in some bag."""

    index: Tensor  # [M] of the table's entries
    bag: Tensor  # [M]
    used: Tensor  # [M] where they are in the flat list
    keep: Tensor  # [M] 0 for padding, otherwise 1
    number: int

    @staticmethod
    def of(
        input: Tensor, offsets: Tensor | None, include_last: bool, number: int, padding: int | None, size: int
    ) -> _Bags:
        index = input.reshape(-1).long()
        places = torch.arange(len(index), device=index.device)
        if input.ndim == 2:
            return _Bags._kept(index, places // max(1, input.shape[1]), places, number, padding, size)
        assert offsets is not None
        bag = torch.searchsorted(offsets[:number].contiguous(), places.to(offsets.dtype), right=True) - 1
        if include_last:
            places = places[: int(offsets[-1])]
        return _Bags._kept(index[places], bag[places], places, number, padding, size)

    @staticmethod
    def _kept(index: Tensor, bag: Tensor, places: Tensor, number: int, padding: int | None, size: int) -> _Bags:
        keep = torch.ones_like(index) if padding is None else (index != padding % size).long()
        return _Bags(index, bag, places, keep, number)

    def counts(self) -> Tensor:
        """``[B]``: how many entries each bag has."""
        return torch.zeros(self.number, dtype=torch.long, device=self.bag.device).index_add_(0, self.bag, self.keep)

    def wins(self, weight: Tensor) -> Tensor:
        """``[M, D]``: 1 where a position's entry is the first maximum of its bag, otherwise 0."""
        value = weight[self.index].masked_fill((self.keep == 0).unsqueeze(1), -torch.inf)
        into = self.bag.unsqueeze(1).expand_as(value)
        best = value.new_full((self.number, weight.shape[1]), -torch.inf).scatter_reduce(0, into, value, "amax")
        place = torch.arange(len(value), device=value.device).unsqueeze(1).expand_as(value)
        place = place.masked_fill((value != best[self.bag]) | (self.keep == 0).unsqueeze(1), len(value))
        first = place.new_full(best.shape, len(value)).scatter_reduce(0, into, place, "amin")
        return (place == first[self.bag]).to(value.dtype) * self.keep.unsqueeze(1)


@couples(F.embedding_bag)
def cut_apart(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, *args: object, **kwargs: object,
) -> str:  # fmt: skip
    """A flat list of indices, of which a batch of one sample still holds all; and gradients scaled by frequency."""
    if (
        offsets is not None
        and len(offsets)
        and not torch._C._functorch.is_functorch_wrapped_tensor(offsets)
        and int(offsets[0])
    ):
        raise SampleAxisError(
            "embedding_bag with offsets: the flat list of indices can't be cut into the samples, which engine='loop', "
            "engine='vmap' and verify need. Use engine='hooks' with verify=False, or give the model padded indices "
            "[N, T] (padding_idx)."
        )
    return BY_FREQUENCY if scale_grad_by_freq else ""
