"""Tables looked up by index: embeddings, positions that have no sample axis, class tokens, bags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import VMAP_NUMBERS, Case, Fn, N, Problem, T, normal, on, readout, tokens

V, D = 7, 5  # vocabulary, width


class _Tied(nn.Module):
    """The decoder is the embedding: one parameter, two modules; positions in between."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.emb(ids))))


class _Positions(nn.Module):
    """Token embeddings plus positions, which meet the batch in the way `how` says."""

    def __init__(self, how: Callable[[nn.Embedding, Tensor], Tensor]) -> None:
        super().__init__()
        self.wte, self.wpe, self.how = nn.Embedding(V, D), nn.Embedding(6, D), how

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.wte(ids) + self.how(self.wpe, ids))


class _LearnedPositions(nn.Module):
    """`pos[:, :T]` and a class token, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 6, D))
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        return torch.tanh(self.linear(x + self.pos[:, : x.shape[1]]))


class _TokenTypes(nn.Module):
    """A buffer of integers, sliced and expanded to the batch before it is looked up (BERT)."""

    types: Tensor
    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.word, self.kind, self.position = nn.Embedding(V, D), nn.Embedding(2, D), nn.Embedding(6, D)
        self.register_buffer("types", torch.zeros(1, 6, dtype=torch.long))
        self.register_buffer("position_ids", torch.arange(6).expand(1, -1))

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        types = self.types[:, :t].expand(n, t)
        return torch.tanh(self.word(ids) + self.kind(types) + self.position(self.position_ids[:, :t]))


def _padded_ids() -> Tensor:
    return torch.tensor([[0, 2, 0], [1, 1, 0], [3, 0, 3], [0, 4, 5]])


def _positions(how: Callable[[nn.Embedding, Tensor], Tensor], n: int = N, t: int = T) -> Callable[[], Problem]:
    return on(lambda: _Positions(how), tokens(n, t))


def _bag(shape: tuple[int, ...] = (N, T), weights: bool = False, **options: Any) -> Callable[[], Problem]:
    """EmbeddingBag on ids [N, T]."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(V, D, **options)

        def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
            return torch.tanh(self.bag(ids, per_sample_weights=weights))

    return on(Bag, tokens(*shape), *([normal(*shape)] if weights else []))


class _OffsetBag(nn.Module):
    """Bags of different lengths, flattened with offsets inside the model: all bags of the batch in one call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, **options)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        flat = torch.cat([row[: int(k)] for row, k in zip(ids, lengths, strict=True)])
        offsets = lengths.cumsum(0) - lengths
        if self.bag.include_last_offset:
            offsets = torch.cat([offsets, lengths.sum()[None]])
        return torch.tanh(self.bag(flat, offsets))


def _offset_bag(**options: Any) -> Callable[[], Problem]:
    return on(lambda: _OffsetBag(**options), tokens(N, 4), lambda: torch.tensor([3, 1, 4, 2]))


def _relative(p: Any, x: Tensor) -> Tensor:
    """Scores with a relative position bias looked up in a table (T5, Swin)."""
    t = torch.arange(x.size(1))
    bias = p.table[(t[:, None] - t[None, :]) + x.size(1) - 1]  # [T, T, heads]
    scores = torch.einsum("ntd,nsd->nts", x, x).unsqueeze(1) + bias.permute(2, 0, 1)
    return torch.softmax(scores, -1) @ x.unsqueeze(1)


def _linear_by_embedding() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.body = nn.Embedding(V, D), nn.Linear(D, D)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.body(self.emb(ids))), self.emb.weight)

    return Problem(Model(), readout, torch.randint(V, (N, T)))


lookups = [
    Case("embedding", on(lambda: nn.Embedding(V, D), tokens(N, T))),
    Case("embedding_rank1_ids", on(lambda: nn.Embedding(V, D), tokens(N))),
    Case("embedding_rank3_ids", on(lambda: nn.Embedding(V, D), tokens(N, 2, T))),
    Case("embedding_duplicates", on(lambda: nn.Embedding(3, D), tokens(N, 6, vocabulary=2))),
    Case("embedding_large_vocabulary", on(lambda: nn.Embedding(50, D), tokens(N, T, vocabulary=50))),
    Case(
        "embedding_renormalised",
        on(lambda: nn.Embedding(V, D, max_norm=1.0), tokens(N, T)),
        raises=dict.fromkeys(("hooks", "vmap"), ("PersampleError", "the forward pass changes the weights")),
    ),
    Case("embedding_padding", on(lambda: nn.Embedding(V, D, padding_idx=0), _padded_ids)),
    Case("embedding_negative_padding", on(lambda: nn.Embedding(6, D, padding_idx=-1), _padded_ids)),
    Case("embedding_t_equals_n", on(lambda: nn.Embedding(V, D), tokens(3, 3))),
    Case("embedding_one_sample", on(lambda: nn.Embedding(V, D), tokens(1, T))),
    Case("embedding_int32_ids", on(lambda: nn.Embedding(V, D), lambda: torch.randint(V, (N, T), dtype=torch.int32))),
    Case(
        "embedding_mean_of_tokens",
        on(lambda: Fn(lambda p, ids: F.embedding(ids, p.w).mean(1).tanh(), w=torch.randn(V, D)), tokens(N, T)),
    ),
    Case(
        "embedding_scaled_in_place",
        on(lambda: Fn(lambda p, ids: F.embedding(ids, p.w).mul_(D**0.5).tanh(), w=torch.randn(V, D)), tokens(N, T)),
    ),
    Case(
        "embedding_of_derived_table",
        on(lambda: Fn(lambda p, ids: F.embedding(ids, p.w.cumsum(0)), w=torch.randn(V, D)), tokens(N, T)),
    ),
    Case("embedding_by_indexing", on(lambda: Fn(lambda p, ids: p.w[ids].tanh(), w=torch.randn(V, D)), tokens(N, T))),
    Case(
        "embedding_by_one_hot",
        on(lambda: Fn(lambda p, ids: F.one_hot(ids, V).to(p.w.dtype) @ p.w, w=torch.randn(V, D)), tokens(N, T)),
        raises=VMAP_NUMBERS,
    ),
    Case(
        "embedding_factored", on(lambda: nn.Sequential(nn.Embedding(V, 2), nn.Linear(2, 8, bias=False)), tokens(N, T))
    ),
]

positions = [
    Case("positions_arange", _positions(lambda e, ids: e(torch.arange(ids.size(1))))),
    Case("positions_arange_t_equals_n", _positions(lambda e, ids: e(torch.arange(ids.size(1))), 3, 3)),
    Case("positions_arange_unsqueezed", _positions(lambda e, ids: e(torch.arange(ids.size(1)).unsqueeze(0)))),
    Case("positions_arange_expanded", _positions(lambda e, ids: e(torch.arange(ids.size(1)).expand(ids.shape)))),
    Case(
        "positions_expanded_t_equals_n", _positions(lambda e, ids: e(torch.arange(ids.size(1)).expand(ids.shape)), 3, 3)
    ),
    Case("positions_arange_repeated", _positions(lambda e, ids: e(torch.arange(ids.size(1)).repeat(len(ids), 1)))),
    Case("positions_weight_sliced", _positions(lambda e, ids: e.weight[: ids.size(1)])),
    Case("positions_weight_sliced_t_equals_n", _positions(lambda e, ids: e.weight[: ids.size(1)], 3, 3)),
    Case("positions_weight_expanded", _positions(lambda e, ids: e.weight[: ids.size(1)].expand(len(ids), -1, -1))),
    Case("positions_from_mask", _positions(lambda e, ids: e((ids != 0).long().cumsum(1)))),
    Case("positions_one_sample", _positions(lambda e, ids: e(torch.arange(ids.size(1)).unsqueeze(0)), 1)),
    Case("positions_and_class_token", on(_LearnedPositions, normal(N, T, D))),
    Case("positions_and_class_token_t_equals_n", on(_LearnedPositions, normal(4, 4, D))),
    Case("positions_and_class_token_one_sample", on(_LearnedPositions, normal(1, T, D))),
    Case("positions_relative_table", on(lambda: Fn(_relative, table=torch.randn(2 * T - 1, 2)), normal(N, T, D))),
    Case("positions_relative_t_equals_n", on(lambda: Fn(_relative, table=torch.randn(7, 4)), normal(4, 4, D))),
    Case("token_types_from_buffer", on(_TokenTypes, tokens(N, T))),
    Case("token_types_t_equals_n", on(_TokenTypes, tokens(3, 3))),
]

tied = [
    Case("tied_decoder", on(_Tied, tokens(N, T))),
    Case("tied_decoder_bias", on(lambda: _Tied(bias=True), tokens(N, T))),
    Case("tied_decoder_t_equals_n", on(_Tied, tokens(3, 3))),
    Case("tied_functionally", _linear_by_embedding),
]

bags = [
    Case("bag_mean", _bag()),
    Case("bag_sum", _bag(mode="sum")),
    Case("bag_max", _bag(mode="max")),
    Case("bag_sum_weighted", _bag(mode="sum", weights=True)),
    Case("bag_padding", on(lambda: nn.EmbeddingBag(V, D, padding_idx=0), _padded_ids)),
    Case("bag_sum_padding", on(lambda: nn.EmbeddingBag(V, D, mode="sum", padding_idx=0), _padded_ids)),
    Case("bag_max_padding", on(lambda: nn.EmbeddingBag(V, D, mode="max", padding_idx=0), _padded_ids)),
    Case("bag_duplicates", on(lambda: nn.EmbeddingBag(3, D), tokens(N, 6, vocabulary=2))),
    Case("bag_offsets_mean", _offset_bag(), raises=VMAP_NUMBERS),
    Case("bag_offsets_sum", _offset_bag(mode="sum"), raises=VMAP_NUMBERS),
    Case("bag_offsets_max", _offset_bag(mode="max"), raises=VMAP_NUMBERS),
    Case("bag_offsets_include_last", _offset_bag(include_last_offset=True), raises=VMAP_NUMBERS),
    Case("bag_offsets_padding", _offset_bag(padding_idx=1), raises=VMAP_NUMBERS),
]

cases = lookups + positions + tied + bags
