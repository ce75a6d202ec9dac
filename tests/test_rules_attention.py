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
    return sum((o.sin() * torch.arange(1.0, 1 + o[0].numel()).view(o.shape[1:]).cos()).flatten(1).sum(1) + o.square().flatten(1).sum(1) for o in out)


def check(model: nn.Module, inputs: Any, batch_dim: Any = 0, tolerance: float = 1e-12) -> None:
    """Hook rows are the loop's."""
    G = persample.gradients(model, losses, inputs, batch_dim=batch_dim, verify=False)
    reference = persample.gradients(model, losses, inputs, batch_dim=batch_dim, engine="loop")
    assert G.names == reference.names and G.unused == reference.unused
    for name in G.names:
        torch.testing.assert_close(G[name], reference[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


class Attention(nn.Module):
    """``nn.MultiheadAttention`` between two layers; all its outputs are seen, with the sample axis first."""

    def __init__(self, how: str, masks: str = "", need_weights: bool = True, average: bool = True, **options: Any) -> None:
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
            options["attn_mask"] = (memory.mean(-1) if first else memory.mean(-1).t()).repeat_interleave(2, 0)[:, None].expand(2 * n, t, s)
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
@pytest.mark.parametrize("bias, extra, batch_first", [*itertools.product([True, False], ["", "add_bias_kv", "add_zero_attn"], [True, False])])
def test_attention(how: str, bias: bool, extra: str, batch_first: bool) -> None:
    options = {extra: True} if extra else {}
    check(Attention(how, bias=bias, batch_first=batch_first, **options), pair(batch_first), axis(batch_first))


@pytest.mark.parametrize("kdim, vdim", [(6, None), (None, 7), (6, 7)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_other_widths(kdim: int | None, vdim: int | None, extra: dict[str, bool], batch_first: bool) -> None:
    check(Attention("three", kdim=kdim, vdim=vdim, batch_first=batch_first, **extra), pair(batch_first), axis(batch_first))


@pytest.mark.parametrize("need_weights, average", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("masks", ["", "causal", "float", "bool", "padding", "bool padding", "heads"])
@pytest.mark.parametrize("how", ["self", "cross"])
def test_attention_masks(how: str, masks: str, need_weights: bool, average: bool) -> None:
    if how == "cross" and masks == "causal":
        pytest.skip("causal is for self attention")
    check(Attention(how, masks, need_weights, average, batch_first=True), pair(True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n, t, s", [(3, 3, 3), (2, 3, 2), (4, 4, 4), (8, 8, 8), (1, 3, 5), (4, 1, 4), (6, 3, 6)])
@pytest.mark.parametrize("how", ["self", "three"])
def test_attention_with_coinciding_sizes(how: str, n: int, t: int, s: int, batch_first: bool) -> None:
    """N equals T, S, the number of heads, the width of a head, the width, T times the heads."""
    for masks in ("", "padding"):
        for need_weights in (True, False):
            check(Attention(how, masks, need_weights, batch_first=batch_first, add_bias_kv=True), pair(batch_first, n, t, s), axis(batch_first))


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
            out = self.layer(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding if self.padded else None)
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
            out = self.net(memory, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1 if batch_first else 0]))
            return out if batch_first else out.transpose(0, 1)

    check(Model(), pair(batch_first), axis(batch_first))
