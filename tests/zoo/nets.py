"""Small whole networks in plain torch: residual, GPT-like, ViT-like, mixers, experts, windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import Case, N, Problem, T, normal, on, readout, tokens

D, H, V = 8, 2, 7  # width, heads, vocabulary


class _Attention(nn.Module):
    """Packed q/k/v, heads by view and transpose; the product by hand or by `scaled_dot_product_attention`."""

    def __init__(self, fused: bool, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused, self.causal = nn.Linear(D, 3 * D), nn.Linear(D, D), fused, causal

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (z.view(n, t, H, D // H).transpose(1, 2) for z in self.qkv(x).split(D, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(D // H)
            if self.causal:
                scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(n, t, D))


class _Block(nn.Module):
    def __init__(self, fused: bool, causal: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D, bias=False)
        self.attention = _Attention(fused, causal)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class _GPT(nn.Module):
    """Positions without a sample axis, a tied head."""

    def __init__(self, fused: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(6, D)
        self.blocks = nn.ModuleList([_Block(fused, True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.head.weight = self.wte.weight
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


class _ViT(nn.Module):
    """Patches by a strided convolution, a class token, learned positions."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, D, 2, stride=2)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 7, D))
        self.blocks = nn.Sequential(_Block(fused, False), _Block(fused, False))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class _ResidualBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False),
            nn.GroupNorm(2, o),
            nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, 1, 1, bias=False),
            nn.GroupNorm(2, o),
        )
        self.skip = nn.Conv2d(i, o, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.skip(x)
        return F.relu(y, inplace=True)


class _ResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            _ResidualBlock(4, 4, 1),
            _ResidualBlock(4, 6, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )


class _Mixer(nn.Module):
    """Linear layers over tokens and over channels, by transposing."""

    def __init__(self, t: int) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(t, t), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x).tanh()


class _Experts(nn.Module):
    """A mixture of experts with soft routing: every expert sees every token, and weights are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.Parameter(torch.randn(3, D, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ntd,edf->ntef", x, self.experts).tanh()
        return (y * self.router(x).softmax(-1).unsqueeze(-1)).sum(2)


class _Windows(nn.Module):
    """Tokens regrouped into windows [N nW, T / nW, D] and back, with one bias per window position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        w = x.view(n, t // 2, 2, d).reshape(n * (t // 2), 2, d)
        q, k, v = self.qkv(w).chunk(3, -1)
        y = (q @ k.mT + self.bias).softmax(-1) @ v
        return self.out(y).reshape(n, t, d)


class _ShiftedWindows(nn.Module):
    """Windows of an image [N, 4, 4, D] by view and permute, rolled, with a mask per window (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.table = nn.Linear(D, 3 * D), nn.LayerNorm(D), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        x = torch.roll(self.norm(x), (-1, -1), (1, 2))
        w = x.view(n, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, D)
        q, k, v = self.qkv(w).chunk(3, -1)
        mask = torch.zeros(4, 4, 4, dtype=x.dtype)
        mask[-1, 0, 1] = -2.0
        scores = (q @ k.mT + self.table).view(n, 4, 4, 4) + mask
        y = scores.view(-1, 4, 4).softmax(-1) @ v
        return y.view(n, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, D)


class _FlattenedTokens(nn.Module):
    """Everything between embedding and output in one axis [N T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.norm, self.b = nn.Embedding(V, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids.reshape(-1))
        x = self.norm(torch.tanh(self.a(x)) * self.scale)
        return self.b(x).view(*ids.shape, 3)


class _TokensFirst(nn.Module):
    """The model transposes to [T, N, D] inside: the sample axis moves away from the front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1)


class _TimeFirstLoop(nn.Module):
    """The model loops over tokens and stacks along a new first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([torch.tanh(self.a(x[:, t])) for t in range(x.size(1))])  # [T, N, 6]
        return self.b(h.transpose(0, 1))


class _Autoencoder(nn.Module):
    """A decoder by transposed weights, and by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv = nn.Linear(D, 3), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(torch.tanh(self.a(x)), self.a.weight.t())
        return self.conv(F.interpolate(y.unsqueeze(1), scale_factor=2.0)).squeeze(1)


class _Hypernetwork(nn.Module):
    """The weight of one layer is computed from the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.film = nn.Linear(D, D * 2), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.hyper(x).view(-1, 2, D)
        return (w @ x.unsqueeze(-1)).squeeze(-1) * self.film(x)


def _gpt(fused: bool, checkpointed: bool = False, n: int = N, t: int = T) -> Problem:
    labels = torch.randint(V, (n, t))
    return Problem(
        _GPT(fused, checkpointed),
        lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none").mean(1),
        torch.randint(V, (n, t)),
        labels,
    )


cases = [
    Case(
        "net_residual",
        lambda: Problem(_ResNet(), nn.CrossEntropyLoss(), torch.randn(N, 1, 6, 6), torch.randint(3, (N,))),
    ),
    Case("net_gpt", lambda: _gpt(False)),
    Case("net_gpt_fused_attention", lambda: _gpt(True)),
    Case("net_gpt_t_equals_n", lambda: _gpt(False, n=3, t=3)),
    Case("net_gpt_one_sample", lambda: _gpt(True, n=1)),
    Case("net_vit", lambda: Problem(_ViT(), nn.CrossEntropyLoss(), torch.randn(N, 2, 6, 4), torch.randint(3, (N,)))),
    Case(
        "net_vit_fused_attention",
        lambda: Problem(
            _ViT(True), nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(N, 2, 6, 4), torch.randint(3, (N,))
        ),
    ),
    Case("net_vit_t_equals_n", lambda: Problem(_ViT(), readout, torch.randn(7, 2, 6, 4))),
    Case("net_mixer", on(lambda: _Mixer(T), normal(N, T, D))),
    Case("net_mixer_t_equals_n", on(lambda: _Mixer(4), normal(4, 4, D))),
    Case("net_soft_experts", on(_Experts, normal(N, T, D))),
    Case("net_flattened_tokens", on(_FlattenedTokens, tokens(N, T))),
    Case("net_windows", on(_Windows, normal(3, 4, D))),
    Case("net_shifted_windows", on(_ShiftedWindows, normal(3, 4, 4, D))),
    Case("net_shifted_windows_n_coincides", on(_ShiftedWindows, normal(4, 4, 4, D))),
    Case("net_autoencoder_tied", on(_Autoencoder, normal(N, D))),
    Case("net_hypernetwork", on(_Hypernetwork, normal(N, D))),
    Case("net_tokens_stacked_first_then_back", on(_TimeFirstLoop, normal(N, T, D))),
    Case("net_tokens_stacked_first_then_back_t_equals_n", on(_TimeFirstLoop, normal(4, 4, D))),
    Case("net_tokens_first_inside", on(_TokensFirst, normal(N, T, D))),
    Case("net_tokens_first_inside_t_equals_n", on(_TokensFirst, normal(4, 4, D))),
    Case(
        "net_gpt_checkpointed",
        lambda: _gpt(True, checkpointed=True),
        raises={"vmap": ("CaptureError", "torch.func does not support saved-tensor hooks")},
    ),
]
