"""Attention: `MultiheadAttention` and the Transformer modules in every option, and attention by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Fn, N, Problem, T, normal, on, readout, readout_dim1

D, S = 6, 5  # width, source tokens


class _MHA(nn.Module):
    """`MultiheadAttention` on one input, or on queries and keys of different lengths and widths."""

    def __init__(self, call: dict[str, Any] | None = None, before: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, **{"batch_first": True, **options})
        self.inp = nn.Linear(D, D) if before else nn.Identity()
        self.call = call or {"need_weights": False}
        for name, p in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)  # biases are zero at first

    def forward(
        self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None, pad: Tensor | None = None
    ) -> Any:
        x = self.inp(x)
        key = x if key is None else key
        out, weights = self.attention(x, key, key if value is None else value, key_padding_mask=pad, **self.call)
        return out if weights is None else (out, weights)


class _LearnedQueries(nn.Module):
    """Queries that are parameters, expanded to the batch, attend to the inputs."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, D))
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            q = self.queries.unsqueeze(0).expand(x.size(0), -1, -1)
        else:
            q = self.queries.unsqueeze(1).repeat(1, x.size(1), 1)
        return self.attention(q, x, x, need_weights=False)[0]


class _Transposing(nn.Module):
    """A sequence-first layer inside of a batch-first model."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(D, 2), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.attention(x, x, x)[0]
        return self.out(x.transpose(0, 1))


class _Masked(nn.Module):
    """A Transformer module with the masks of its kind made inside."""

    def __init__(self, body: nn.Module, masks: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.body, self.masks = body, masks

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(*inputs, **self.masks(*inputs))


def _mha(
    *shapes: tuple[int, ...], dim: int = 0, call: dict[str, Any] | None = None, pad: bool = False, **options: Any
) -> Callable[[], Problem]:
    def build() -> Problem:
        inputs: tuple[Any, ...] = tuple(torch.randn(s) for s in shapes or ((N, T, D),))
        if pad:
            mask = torch.zeros(inputs[0].shape[:2], dtype=torch.bool)
            mask[1, -1] = mask[2, -2:] = True
            inputs = (*inputs, None, None, mask)
        return Problem(_MHA(call, **options), readout_dim1 if dim else readout, inputs)

    return build


def _causal(x: Tensor, *_: Tensor, dim: int = 1) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.size(dim), dtype=x.dtype)


ENCODER: dict[str, Any] = {"d_model": D, "nhead": 2, "dim_feedforward": 7, "dropout": 0.0, "batch_first": True}


def _encoder(n: int = 2, norm: bool = False, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**{**ENCODER, **options})
    return nn.TransformerEncoder(layer, n, nn.LayerNorm(D) if norm else None, enable_nested_tensor=False)


def _padding(x: Tensor, *_: Tensor) -> dict[str, Any]:
    mask = torch.arange(x.size(1)) >= 2 + (x[:, :1, 0] > 0)  # the length of a sample depends on the sample
    return {"src_key_padding_mask": mask}


def _sequence_first_transformer() -> Problem:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")  # it can't be told otherwise
        body = nn.Transformer(**{**ENCODER, "batch_first": False}, num_encoder_layers=1, num_decoder_layers=1)
    model = _Masked(body, lambda x, y: {"tgt_mask": _causal(y, dim=0)})
    return Problem(model, readout_dim1, (torch.randn(S, N, D), torch.randn(T, N, D)))


def _bias_by_hand(p: Any, x: Tensor) -> Tensor:
    """A learned bias of the scores, given as the mask of the fused function."""
    q = (x @ p.w).unsqueeze(1)
    return F.scaled_dot_product_attention(q, q.cos(), q.sin(), attn_mask=p.bias).squeeze(1)


def _grouped_queries(p: Any, x: Tensor) -> Tensor:
    q = (x @ p.q).unflatten(-1, (4, 2)).transpose(1, 2)
    k, v = ((x @ w).unflatten(-1, (2, 2)).transpose(1, 2) for w in (p.k, p.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3).transpose(1, 2).flatten(2)


def _linear_attention(p: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ w for w in (p.q, p.k, p.v))
    return F.elu(q).add(1) @ (F.elu(k).add(1).mT @ v)


mha = [
    Case("mha", _mha()),
    Case("mha_first", _mha(before=False)),
    Case("mha_no_bias", _mha(bias=False)),
    Case("mha_weights", _mha(call={"need_weights": True})),
    Case("mha_weights_per_head", _mha(call={"need_weights": True, "average_attn_weights": False})),
    Case("mha_cross", _mha((N, T, D), (N, S, D))),
    Case("mha_cross_three_inputs", _mha((N, T, D), (N, S, D), (N, S, D))),
    Case("mha_kdim_vdim", _mha((N, T, D), (N, S, 4), (N, S, 3), kdim=4, vdim=3)),
    Case("mha_bias_kv", _mha(add_bias_kv=True)),
    Case("mha_zero_attn", _mha(add_zero_attn=True)),
    Case(
        "mha_everything",
        _mha(
            (N, T, D),
            (N, S, 4),
            (N, S, 4),
            kdim=4,
            vdim=4,
            add_bias_kv=True,
            add_zero_attn=True,
            call={"need_weights": True},
        ),
    ),
    Case(
        "mha_causal",
        _mha(call={"need_weights": False, "is_causal": True, "attn_mask": torch.ones(T, T).triu(1).bool()}),
    ),
    Case("mha_float_mask", _mha(call={"need_weights": False, "attn_mask": torch.arange(9.0).view(3, 3).double()})),
    Case("mha_padding", _mha(pad=True)),
    Case("mha_padding_weights", _mha(pad=True, call={"need_weights": True})),
    Case("mha_one_sample", _mha((1, T, D))),
    Case("mha_t_equals_n", _mha((3, 3, D))),
    Case("mha_sequence_first", _mha((T, N, D), dim=1, batch_first=False), batch_dim=1),
    Case(
        "mha_sequence_first_cross",
        _mha((T, N, D), (S, N, 4), (S, N, 3), dim=1, batch_first=False, kdim=4, vdim=3, add_bias_kv=True),
        batch_dim=1,
    ),
    Case("mha_sequence_first_t_equals_n", _mha((3, 3, D), dim=1, batch_first=False), batch_dim=1),
    Case("mha_learned_queries", on(lambda: _LearnedQueries(True), normal(N, T, D))),
    Case(
        "mha_learned_queries_sequence_first",
        lambda: Problem(_LearnedQueries(False), readout_dim1, torch.randn(T, N, D)),
        batch_dim=1,
    ),
    Case("mha_transposed_inside", on(_Transposing, normal(N, T, D))),
    Case("mha_transposed_inside_t_equals_n", on(_Transposing, normal(4, 4, D))),
]

transformers = [
    Case("encoder_layer", on(lambda: nn.TransformerEncoderLayer(**ENCODER), normal(N, T, D))),
    Case("encoder_layer_eval", on(lambda: nn.TransformerEncoderLayer(**ENCODER).eval(), normal(N, T, D))),
    Case(
        "encoder_layer_norm_first_gelu",
        on(
            lambda: nn.TransformerEncoderLayer(**ENCODER, norm_first=True, activation="gelu", bias=False),
            normal(N, T, D),
        ),
    ),
    Case("encoder", on(lambda: _encoder(norm=True), normal(N, T, D))),
    Case(
        "encoder_causal",
        on(lambda: _Masked(_encoder(1), lambda x: {"mask": _causal(x), "is_causal": True}), normal(N, T, D)),
    ),
    Case("encoder_padding", on(lambda: _Masked(_encoder(1), _padding), normal(N, 4, D))),
    Case(
        "encoder_sequence_first",
        lambda: Problem(_encoder(batch_first=False), readout_dim1, torch.randn(T, N, D)),
        batch_dim=1,
    ),
    Case(
        "encoder_sequence_first_t_equals_n",
        lambda: Problem(_encoder(batch_first=False), readout_dim1, torch.randn(4, 4, D)),
        batch_dim=1,
    ),
    Case("decoder_layer", on(lambda: nn.TransformerDecoderLayer(**ENCODER), normal(N, T, D), normal(N, S, D))),
    Case(
        "decoder_causal",
        on(
            lambda: _Masked(
                nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER, norm_first=True), 2, nn.LayerNorm(D)),
                lambda x, memory: {"tgt_mask": _causal(x), "tgt_is_causal": True},
            ),
            normal(N, T, D),
            normal(N, S, D),
        ),
    ),
    Case(
        "transformer",
        on(
            lambda: nn.Transformer(**ENCODER, num_encoder_layers=1, num_decoder_layers=1),
            normal(N, S, D),
            normal(N, T, D),
        ),
    ),
    Case("transformer_sequence_first", _sequence_first_transformer, batch_dim=1),
]

by_hand = [
    Case(
        "sdpa_learned_bias", on(lambda: Fn(_bias_by_hand, w=torch.randn(D, D), bias=torch.randn(T, T)), normal(N, T, D))
    ),
    Case(
        "sdpa_learned_bias_t_equals_n",
        on(lambda: Fn(_bias_by_hand, w=torch.randn(D, D), bias=torch.randn(4, 4)), normal(4, 4, D)),
    ),
    Case(
        "sdpa_grouped_queries",
        on(
            lambda: Fn(_grouped_queries, q=torch.randn(D, 8), k=torch.randn(D, 4), v=torch.randn(D, 4)), normal(N, T, D)
        ),
    ),
    Case(
        "attention_linear",
        on(
            lambda: Fn(_linear_attention, q=torch.randn(D, 4), k=torch.randn(D, 4), v=torch.randn(D, 4)),
            normal(N, T, D),
        ),
    ),
    Case(
        "attention_to_parameters",
        on(
            lambda: Fn(
                lambda p, x: F.scaled_dot_product_attention(x, p.k.expand(len(x), -1, -1), p.v.expand(len(x), -1, -1)),
                k=torch.randn(7, D),
                v=torch.randn(7, D),
            ),
            normal(N, T, D),
        ),
    ),
    Case(
        "attention_to_memory_matrix",
        on(
            lambda: Fn(lambda p, x: torch.softmax(x @ p.k.t(), -1) @ p.v, k=torch.randn(7, D), v=torch.randn(7, D)),
            normal(N, T, D),
        ),
    ),
]

cases = mha + transformers + by_hand
