"""Samples whose entries are picked by value: routed tokens, adaptive softmax, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N, T, D = 4, 3, 5


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(out: Tensor, _: Any = None) -> Tensor:
    return (
        (out.sin() * torch.arange(1.0, 1 + out[0].numel()).view(out.shape[1:]).cos() + out.square()).flatten(1).sum(1)
    )


def check(
    model: nn.Module, inputs: Any, loss: Callable[..., Tensor] = losses, targets: Any = None, tolerance: float = 1e-11
) -> None:
    G = persample.gradients(model, loss, inputs, targets)
    reference = persample.gradients(model, loss, inputs, targets, engine="loop")
    assert G.unused == reference.unused
    for name in G.names:
        torch.testing.assert_close(
            G[name], reference[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- experts --------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Tokens go to their best experts; `how` they are picked and put back."""

    def __init__(self, how: str, experts: int = 4, k: int = 1) -> None:
        super().__init__()
        self.how, self.k = how, k
        self.first, self.router = nn.Linear(D, D), nn.Linear(D, experts)
        self.up = nn.Parameter(torch.randn(experts, 6, D) / 2)
        self.down = nn.Parameter(torch.randn(experts, D, 6) / 2)
        self.bias = nn.Parameter(torch.randn(experts, D))

    def expert(self, e: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.up[e])), self.down[e], self.bias[e])

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = torch.tanh(self.first(x)).reshape(-1, D)
        weight, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        out: Tensor = torch.zeros_like(x)
        if self.how == "dense":  # every expert sees every token
            for e in range(len(self.up)):
                out = out + self.expert(e, x) * (weight * (chosen == e)).sum(-1, keepdim=True)
        elif self.how == "where":
            for e in range(len(self.up)):
                token, rank = torch.where(chosen == e)
                out.index_add_(0, token, self.expert(e, x[token]) * weight[token, rank, None])
        elif self.how == "nonzero":
            hit = F.one_hot(chosen, len(self.up)).sum((0, 1)).nonzero()
            for e in hit:
                token, rank = (chosen == e[0]).nonzero(as_tuple=True)
                piece = self.expert(e[0], x[None, token].reshape(-1, D)) * weight[token, rank, None]
                out.index_add_(0, token, piece)
        elif self.how == "constant":
            out = torch.zeros(x.shape[0], D)
            for e in range(len(self.up)):
                token = (chosen == e).any(-1).nonzero().squeeze(1)
                gate = weight.masked_fill(chosen != e, 0).sum(-1)
                out.index_add_(0, token, self.expert(e, x.index_select(0, token)) * gate[token].unsqueeze(-1))
        elif self.how == "mask":
            for e in range(len(self.up)):
                mask = (chosen == e).any(-1)
                gate = weight.masked_fill(chosen != e, 0).sum(-1)
                out = out.masked_scatter(mask[:, None], out[mask] + self.expert(e, x[mask]) * gate[mask][:, None])
        elif self.how == "sorted":  # all tokens in the order of their experts, then back
            flat = chosen.flatten()
            order = flat.argsort(stable=True)
            routed = x.repeat_interleave(self.k, 0)[order]
            counts = flat.bincount(minlength=len(self.up)).tolist()
            done = torch.cat([self.expert(e, part) for e, part in enumerate(routed.split(counts))])
            back = done[order.argsort()] * weight.flatten()[:, None]
            out = back.unflatten(0, (-1, self.k)).sum(1)
        elif self.how == "gathered":  # every token takes its experts' weights along
            for r in range(self.k):
                e = chosen[:, r]
                hidden = torch.tanh(torch.einsum("bi,boi->bo", x, self.up[e]))
                out = out + (torch.einsum("bi,boi->bo", hidden, self.down[e]) + self.bias[e]) * weight[:, r, None]
        return out.view(shape)


WAYS = ["dense", "where", "nonzero", "constant", "mask", "sorted", "gathered"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(N, T, D), (N, D), (N, N, D), (1, T, D)], ids=str)
def test_experts(how: str, k: int, shape: tuple[int, ...]) -> None:
    check(Experts(how, k=k), torch.randn(shape))


@pytest.mark.parametrize("how", ["where", "sorted"])
def test_an_expert_without_tokens(how: str) -> None:
    model = Experts(how, experts=9)
    check(model, torch.randn(2, 2, D))


class Kept(nn.Module):
    """Stochastic depth that runs a layer for the samples that keep it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(2, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        kept = keep.nonzero().squeeze(1)
        return self.head(x.index_add(0, kept, self.layer(x[kept])).flatten(2).mean(2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_without_images(layer: Any, groups: int) -> None:
    model = Kept(layer(2, 2, 3, padding=1, groups=groups))
    check(model, (torch.randn(N, 2, 4, 4), torch.zeros(N)))
    inputs = (torch.randn(N, 2, 4, 4), torch.tensor([0, 0, 1, 1]))  # nobody in the first slice
    S = persample.gradients(model, losses, inputs, None, quantities=["gram"], max_bytes=1)
    torch.testing.assert_close(S.gram(), persample.gradients(model, losses, inputs, None).gram())


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_mixtral(experts: str) -> None:
    transformers = pytest.importorskip("transformers")
    dtype = torch.float32 if experts == "grouped_mm" else torch.float64  # there is no kernel for float64
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16,
        attention_dropout=0.0, sliding_window=None,
    )  # fmt: skip

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config._experts_implementation = experts
            self.net = transformers.MixtralForCausalLM(config).to(dtype)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.net(input_ids=ids, use_cache=False).logits
            return logits

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    ids = torch.randint(11, (N, 6))
    check(Model(), ids, loss, ids, 1e-11 if dtype is torch.float64 else 1e-4)


# ---- adaptive softmax -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[0, 4, 8, 5], [0, 1, 2, 1], [8, 9, 8, 9], [5, 5, 5, 5], [9, 0, 6, 1]], ids=str)
@pytest.mark.parametrize("head_bias", [False, True])
def test_adaptive_softmax(targets: list[int], head_bias: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, 8)
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 7], div_value=2.0, head_bias=head_bias)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.softmax(torch.tanh(self.first(x)), y).output
            return out

    check(Model(), (torch.randn(N, D), torch.tensor(targets)), lambda out, _: -out)


def test_adaptive_softmax_over_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, 8)
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 7], div_value=2.0)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.softmax(hidden.flatten(0, 1), y.flatten()).output.view(y.shape)

    check(Model(), (torch.randn(N, T, D), torch.randint(10, (N, T))), lambda out, _: -out.sum(1))


# ---- masks ----------------------------------------------------------------------------------------------------------


MASKED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "masked_select": lambda m, x, mask: m.second(x.masked_select(mask[..., None]).view(-1, D)),
    "by_mask": lambda m, x, mask: m.second(x[mask]),
    "by_places": lambda m, x, mask: m.second(x[mask.nonzero(as_tuple=True)]),
    "by_flat_places": lambda m, x, mask: m.second(x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)]),
    "normalised": lambda m, x, mask: m.norm(x[mask]),
    "scaled": lambda m, x, mask: x[mask] * m.scale + m.scale,
    "matmul": lambda m, x, mask: x[mask] @ m.second.weight,
    "bilinear": lambda m, x, mask: F.bilinear(x[mask], x[mask].sin(), m.cube),
    "own_rows": lambda m, x, mask: m.own[: x.shape[1]].expand(x.shape)[mask] * x[mask],
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("back", ["setitem", "index_put", "masked_scatter"])
def test_some_tokens_only(name: str, back: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
            self.scale, self.cube = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D, D))
            self.own = nn.Parameter(torch.randn(T, D))

        def forward(self, x: Tensor) -> Tensor:
            mask = x[..., 0] > -0.3
            x = torch.tanh(self.first(x))
            picked = MASKED[name](self, x, mask)
            if back == "setitem":
                out = torch.zeros_like(x)
                out[mask] = picked
                return out
            if back == "index_put":
                return torch.zeros(x.shape).index_put(mask.nonzero(as_tuple=True), picked)
            return x.masked_scatter(mask[..., None], picked)

    model = Model()
    reference = persample.gradients(model, losses, torch.randn(N, T, D), engine="loop")
    torch.manual_seed(1)
    x = torch.randn(N, T, D)
    reference = persample.gradients(model, losses, x, engine="loop")
    G = persample.gradients(model, losses, x)
    for n in reference.names:
        torch.testing.assert_close(G[n], reference[n], rtol=1e-11, atol=1e-11)


# ---- as many rows as another axis is long ---------------------------------------------------------------------------


def in_place(out: Tensor, index: Any, value: Any) -> Tensor:
    out = out.clone()
    out[index] = value
    return out


# (model, mask [N, T], all rows h [N, T, D], those picked, zeros [N, T, D])
PUT_BACK: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "zeros": lambda m, mask, h, k, z: z.masked_scatter(mask[..., None], k),
    "a parameter": lambda m, mask, h, k, z: m.token.expand(z.shape).masked_scatter(mask[..., None], k),
    "expanded mask": lambda m, mask, h, k, z: z.masked_scatter(mask[..., None].expand(z.shape), k),
    "in place": lambda m, mask, h, k, z: z.clone().masked_scatter_(mask[..., None], k),
    "into samples": lambda m, mask, h, k, z: (h * 2).masked_scatter_(mask[..., None], k),
    "tokens first": lambda m, mask, h, k, z: (
        z.transpose(0, 1).masked_scatter(mask.t()[..., None], h.transpose(0, 1)[mask.t()]).transpose(0, 1)
    ),
    "rows of a parameter": lambda m, mask, h, k, z: h.masked_scatter(mask[..., None], m.token.expand(len(k), D)),
    "constant mask": lambda m, mask, h, k, z: z.masked_scatter(torch.arange(z.shape[1])[:, None] < 1, h[:, 0]),
    "numbers by a mask": lambda m, mask, h, k, z: in_place(z, mask, 1.5),
    "parameters by a mask": lambda m, mask, h, k, z: in_place(z, mask, m.token),
    "one hot": lambda m, mask, h, k, z: in_place(z, (torch.arange(len(z)), mask.long().argmax(1)), 1.0) * h,
    "select_scatter": lambda m, mask, h, k, z: z.select_scatter(h[:, 0], 1, 0),
    "select_scatter of features": lambda m, mask, h, k, z: z.select_scatter(h[..., 1], 2, 0),
    "slice_scatter": lambda m, mask, h, k, z: h.slice_scatter(h[:, 1:2], 1, 0, 1),
    "put": lambda m, mask, h, k, z: (h * 2).put_(mask.flatten().nonzero() * D + torch.arange(D), k),
}


class PutsBack(nn.Module):
    def __init__(self, put: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.token, self.put = nn.Parameter(torch.randn(D)), put

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.last(self.put(self, mask, h, h[mask], torch.zeros(x.shape)))
        return out


def some(n: int, t: int, k: int) -> Tensor:
    mask = torch.zeros(n * t, dtype=torch.bool)
    mask[torch.randperm(n * t)[:k]] = True
    return mask.view(n, t)


@pytest.mark.parametrize(("n", "t", "k"), [(2, D, D), (D, D, D), (3, 5, 5), (D, 3, D), (3, 5, 3), (2, 5, 3)])
@pytest.mark.parametrize("name", PUT_BACK)
def test_as_many_rows_as_another_axis_is_long(name: str, n: int, t: int, k: int) -> None:
    model = PutsBack(PUT_BACK[name])
    for _ in range(3):
        given = torch.randn(n, t, D), some(n, t, k)
        reference = persample.gradients(model, losses, given, engine="loop")
        with persample.extend(model, verify=False) as recorder:
            recorded = recorder.gradients(losses(model(*given), None))
        sliced = persample.gradients(model, losses, given, verify=False, max_bytes=2**14)
        for G in (persample.gradients(model, losses, given), recorded, sliced):
            for name in reference.names:
                torch.testing.assert_close(G[name], reference[name], rtol=1e-9, atol=1e-11)


def test_rows_that_go_to_other_samples_are_refused() -> None:
    model = PutsBack(lambda m, mask, h, k, z: z.masked_scatter(mask[..., None], k.flip(0)))
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    with pytest.raises(persample.SampleAxisError, match=r"lost in torch.Tensor.masked_scatter"):
        persample.gradients(model, losses, (torch.randn(2, 4, D), mask), verify=False)
