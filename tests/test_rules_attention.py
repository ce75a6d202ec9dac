"""Attention and transformer modules: every option, the hook engine against one sample at a time."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N, T, S, E = 4, 3, 5, 8  # samples, target and source tokens, width


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(out: Any, _: Any = None) -> Tensor:
    """``[N]``, not linear in any of the outputs ``[N, ...]``."""
    out = [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if o is not None]
    return sum(
        (o.sin() * torch.arange(1.0, 1 + o[0].numel()).view(o.shape[1:]).cos()).flatten(1).sum(1)
        + o.square().flatten(1).sum(1)
        for o in out
    )


def check(model: nn.Module, inputs: Any, batch_dim: Any = 0, tolerance: float = 1e-12) -> None:
    """Hook rows are the loop's."""
    G = persample.gradients(model, losses, inputs, batch_dim=batch_dim, verify=False)
    reference = persample.gradients(model, losses, inputs, batch_dim=batch_dim, engine="loop")
    assert G.names == reference.names and G.unused == reference.unused
    for name in G.names:
        torch.testing.assert_close(
            G[name], reference[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


class Attention(nn.Module):
    """``nn.MultiheadAttention`` between two layers; all its outputs are seen, with the sample axis first."""

    def __init__(
        self, how: str, masks: str = "", need_weights: bool = True, average: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.how, self.masks, self.weights, self.average = how, masks, need_weights, average
        k, v = options.get("kdim") or E, options.get("vdim") or E
        self.attention = nn.MultiheadAttention(E, 2, **options)
        self.first, self.key, self.value = nn.Linear(E, E), nn.Linear(E, k), nn.Linear(E, v)
        if how != "three":
            self.key = self.value = self.first
        # random biases, so that nothing is exact because it is zero
        for p in self.attention.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        first = self.attention.batch_first
        q = torch.tanh(self.first(x))
        memory = x if self.how == "self" else memory
        k = q if self.how == "self" else torch.tanh(self.key(memory))
        v = k if self.how != "three" else torch.tanh(self.value(memory))
        t, s = q.shape[1 if first else 0], k.shape[1 if first else 0]
        n = q.shape[0 if first else 1]
        options: dict[str, Any] = {"need_weights": self.weights, "average_attn_weights": self.average}
        if "causal" in self.masks:
            options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(t)[:, :s], "is_causal": True}
        if "float" in self.masks:
            options["attn_mask"] = torch.linspace(-1, 1, t * s).view(t, s)
        if "bool" in self.masks:
            options["attn_mask"] = torch.arange(t * s).view(t, s) % 3 == 1
        if "heads" in self.masks:  # a mask per sample and head, from the samples
            options["attn_mask"] = (
                (memory.mean(-1) if first else memory.mean(-1).t()).repeat_interleave(2, 0)[:, None].expand(2 * n, t, s)
            )
        if "padding" in self.masks:
            options["key_padding_mask"] = (memory[..., 0] > 0.8) if first else (memory[..., 0] > 0.8).t()
        out, weights = self.attention(q, k, v, **options)
        return out if first else out.transpose(0, 1), weights


def pair(batch_first: bool, n: int = N, t: int = T, s: int = S) -> tuple[Tensor, Tensor]:
    x, memory = torch.randn(n, t, E), torch.randn(n, s, E)
    return (x, memory) if batch_first else (x.transpose(0, 1).contiguous(), memory.transpose(0, 1).contiguous())


def axis(batch_first: bool) -> Any:
    return (0 if batch_first else 1, 0, 0)


@pytest.mark.parametrize("how", ["self", "cross", "three"])
@pytest.mark.parametrize(
    "bias, extra, batch_first", [*itertools.product([True, False], ["", "add_bias_kv", "add_zero_attn"], [True, False])]
)
def test_attention(how: str, bias: bool, extra: str, batch_first: bool) -> None:
    options = {extra: True} if extra else {}
    check(Attention(how, bias=bias, batch_first=batch_first, **options), pair(batch_first), axis(batch_first))


@pytest.mark.parametrize("kdim, vdim", [(6, None), (None, 7), (6, 7)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_other_widths(
    kdim: int | None, vdim: int | None, extra: dict[str, bool], batch_first: bool
) -> None:
    check(
        Attention("three", kdim=kdim, vdim=vdim, batch_first=batch_first, **extra), pair(batch_first), axis(batch_first)
    )


@pytest.mark.parametrize("need_weights, average", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    "how, masks",
    [
        ("self", "causal"),
        *itertools.product(["self", "cross"], ["", "float", "bool", "padding", "bool padding", "heads"]),
    ],
)
def test_attention_masks(how: str, masks: str, need_weights: bool, average: bool) -> None:
    check(Attention(how, masks, need_weights, average, batch_first=True), pair(True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n, t, s", [(3, 3, 3), (2, 3, 2), (4, 4, 4), (8, 8, 8), (1, 3, 5), (4, 1, 4), (6, 3, 6)])
@pytest.mark.parametrize("how", ["self", "three"])
def test_attention_with_coinciding_sizes(how: str, n: int, t: int, s: int, batch_first: bool) -> None:
    """N equals T, S, the number of heads, the width of a head, the width, T times the heads."""
    for masks in ("", "padding"):
        for need_weights in (True, False):
            check(
                Attention(how, masks, need_weights, batch_first=batch_first, add_bias_kv=True),
                pair(batch_first, n, t, s),
                axis(batch_first),
            )


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "encoder": lambda **k: nn.TransformerEncoderLayer(E, 2, 11, dropout=0.0, **k),
    "decoder": lambda **k: nn.TransformerDecoderLayer(E, 2, 11, dropout=0.0, **k),
}


class Layer(nn.Module):
    def __init__(self, layer: nn.Module, decoder: bool, batch_first: bool, padded: bool = False) -> None:
        super().__init__()
        self.layer, self.decoder, self.batch_first, self.padded = layer, decoder, batch_first, padded

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        t = x.shape[1 if self.batch_first else 0]
        causal = nn.Transformer.generate_square_subsequent_mask(t)
        if self.decoder:
            padding = (memory[..., 0] > 0.8) if self.batch_first else (memory[..., 0] > 0.8).t()
            out = self.layer(
                x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding if self.padded else None
            )
        else:
            padding = (memory[..., 0] > 0.8) if self.batch_first else (memory[..., 0] > 0.8).t()
            out = self.layer(memory, src_key_padding_mask=padding if self.padded else None)
        return out if self.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first, norm_first, bias", [*itertools.product([True, False], repeat=3)])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(kind: str, batch_first: bool, norm_first: bool, bias: bool, training: bool) -> None:
    activation = "gelu" if norm_first else "relu"
    layer = LAYERS[kind](batch_first=batch_first, norm_first=norm_first, bias=bias, activation=activation)
    model = Layer(layer, kind == "decoder", batch_first, padded=bias).train(training)
    check(model, pair(batch_first), axis(batch_first))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("training, padded", [(True, True), (False, True), (False, False)])
def test_transformer_encoder(nested: bool, training: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 11, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E), enable_nested_tensor=nested)
    check(Layer(encoder, False, True, padded).train(training), pair(True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(batch_first: bool, norm_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it can't use nested tensors
                self.net = nn.Transformer(E, 2, 1, 1, 11, dropout=0.0, batch_first=batch_first, norm_first=norm_first)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            out = self.net(
                memory, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1 if batch_first else 0])
            )
            return out if batch_first else out.transpose(0, 1)

    check(Model(), pair(batch_first), axis(batch_first))


# ---- dropout --------------------------------------------------------------------------------------------------------


def same_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Rows belong to the masks of that forward: those of one loss of the very same graph."""
    with persample.extend(model) as recorder:
        each = losses(model(*inputs))
        G = recorder.gradients(each)
    parameters = dict(model.named_parameters())
    for n, loss in enumerate(each):
        rows = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for name, row in zip(parameters, rows, strict=True):
            torch.testing.assert_close(G[name][n], row, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    total = torch.autograd.grad(each.sum(), list(parameters.values()), materialize_grads=True)
    for (name, s), row in zip(G.sum().items(), total, strict=True):
        torch.testing.assert_close(s, row, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("how", ["self", "three"])
def test_attention_with_dropout(how: str, need_weights: bool) -> None:
    model = Attention(how, "padding", need_weights, dropout=0.4, batch_first=True, add_bias_kv=True)
    same_graph(model, pair(True))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_with_dropout(kind: str, norm_first: bool) -> None:
    make = nn.TransformerDecoderLayer if kind == "decoder" else nn.TransformerEncoderLayer
    layer = make(E, 2, 11, dropout=0.3, batch_first=True, norm_first=norm_first)
    same_graph(Layer(layer, kind == "decoder", True, padded=True), pair(True))


# ---- functional attention -------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Attention written out, with learned queries, keys or memory without a sample axis, or expanded to have one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.project, self.query = nn.Linear(E, 3 * E), nn.Parameter(torch.randn(1, T, E))
        self.heads, self.slots = nn.Parameter(torch.randn(2, T, E // 2)), nn.Parameter(torch.randn(2, S, E // 2))
        self.bias = nn.Parameter(torch.randn(2, S, S))

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in torch.tanh(self.project(x)).chunk(3, -1))
        attend = F.scaled_dot_product_attention
        if self.how == "plain":
            out = attend(q, k, v, is_causal=True)
        elif self.how == "learned_query":
            out = attend(self.query.expand(n, -1, -1).unflatten(-1, (2, -1)).transpose(1, 2), k, v)
        elif self.how == "query_by_repeat":
            out = attend(self.query.repeat(n, 1, 1).unflatten(-1, (2, -1)).transpose(1, 2), k, v)
        elif self.how == "broadcast_query":
            out = attend(self.heads, k, v)
        elif self.how == "learned_memory":
            out = attend(q, self.slots.sin(), self.slots)
        elif self.how == "shared_memory_in_front":
            keys = torch.cat([self.slots.expand(n, -1, -1, -1), k], 2)
            out = attend(q, keys, torch.cat([self.slots.cos().expand(n, -1, -1, -1), v], 2))
        elif self.how == "learned_bias":
            out = attend(q, k, v, attn_mask=self.bias)
        elif self.how == "grouped_query":
            out = attend(q, k[:, :1], v[:, :1], enable_gqa=True, scale=0.3)
        elif self.how == "slices_of_one_weight":
            w, b = self.project.weight, self.project.bias
            q, k, v = (F.linear(x, w[i * E : (i + 1) * E], b[i * E : (i + 1) * E]) for i in range(3))
            out = attend(*(y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v)))
        elif self.how == "chunks_of_one_weight":
            parts = zip(self.project.weight.chunk(3), self.project.bias.split(E), strict=True)
            q, k, v = (F.linear(x, w, b) for w, b in parts)
            out = attend(*(y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v)))
        elif self.how == "heads_in_the_batch":
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
            out = (torch.bmm(q, k.mT).softmax(-1) @ v).unflatten(0, (n, 2))
        elif self.how == "einsum":
            out = torch.einsum("nhts,nhsd->nhtd", torch.einsum("nhtd,nhsd->nhts", q, k).softmax(-1), v)
        return out.transpose(1, 2).flatten(2)


FUNCTIONAL = [
    "plain", "learned_query", "query_by_repeat", "broadcast_query", "learned_memory", "shared_memory_in_front",
    "learned_bias", "grouped_query", "slices_of_one_weight", "chunks_of_one_weight", "heads_in_the_batch", "einsum",
]  # fmt: skip


@pytest.mark.parametrize("how", FUNCTIONAL)
@pytest.mark.parametrize("n", [N, S, 2, 1])
def test_functional_attention(how: str, n: int) -> None:
    check(Functional(how), torch.randn(n, S, E))
