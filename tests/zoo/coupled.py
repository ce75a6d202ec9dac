"""Models in which the loss of a sample depends on the other samples: no engine may return rows as if it did not.

The engines that run samples alone (vmap, loop) see coupling only where a layer says so (BatchNorm in training mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, D, N, Problem, T, fn, normal, on, readout, tokens

COUPLED = ("BatchCoupledError", "samples depend on each other")
ALL = {"hooks": COUPLED, "vmap": COUPLED, "loop": COUPLED}


class _Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(D, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x).tanh()))


class _Routed(nn.Module):
    """Two experts, each with room for half of the batch: who gets in depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 2), nn.ModuleList([nn.Linear(D, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            chosen = p[:, e].topk((len(x) + 1) // 2).indices
            out = out.index_add(0, chosen, expert(x[chosen]) * p[chosen, e, None])
        return out


def _between(function: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], Problem]:
    return on(lambda: _Between(function), normal(*(shape or (N, D))))


def _norm(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Problem]:
    return on(lambda: nn.Sequential(nn.Linear(shape[-1], shape[-1]), make(), nn.Tanh()), normal(*shape))


def _all_tokens(x: Tensor) -> Tensor:
    y = x.flatten(0, 1)[None]
    return F.scaled_dot_product_attention(y, y, y).view(x.shape)


def _contrastive() -> Problem:
    """Losses [N] that compare every sample with all others."""

    def loss(z: Tensor, _: Any = None) -> Tensor:
        z = F.normalize(z, dim=-1)
        return F.cross_entropy(z @ z.roll(1, 0).T, torch.arange(len(z)), reduction="none")

    return Problem(nn.Sequential(nn.Linear(D, 6), nn.Tanh()), loss, torch.randn(N, D))


def _centred_loss() -> Problem:
    """Losses [N] relative to their mean (baselines, advantages)."""

    def loss(y: Tensor, _: Any = None) -> Tensor:
        losses = readout(y)
        return (losses - losses.mean()).square()

    return Problem(nn.Linear(D, 3), loss, torch.randn(N, D))


norms = [
    Case(f"coupled_{name}", build, coupled=True, raises=ALL) for name, build in [
        ("batch_norm_1d", _norm(lambda: nn.BatchNorm1d(6), N, 6)),
        ("batch_norm_rank3", _norm(lambda: nn.BatchNorm1d(T), N, T, 6)),
        ("batch_norm_2d", _norm(lambda: nn.BatchNorm2d(2), N, 2, 3, 5)),
        ("batch_norm_3d", _norm(lambda: nn.BatchNorm3d(2), N, 2, 3, 2, 5)),
        ("batch_norm_no_affine", _norm(lambda: nn.BatchNorm1d(6, affine=False), N, 6)),
        ("batch_norm_without_statistics_eval", _norm(
            lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(), N, 6)),
        ("batch_norm_functional", fn(
            lambda p, x: F.batch_norm(x * p.s, None, None, p.w, p.b, training=True), (N, 6), s=(6,), w=(6,), b=(6,))),
    ]
]  # fmt: skip

hidden = [
    Case(f"coupled_{name}", build, coupled=True, raises=ALL) for name, build in [
        ("softmax_over_batch", _between(lambda x: x.softmax(0))),
        ("minus_mean", _between(lambda x: x - x.mean(0))),
        ("minus_mean_of_everything", _between(lambda x: x - x.mean())),
        ("over_norm_of_batch", _between(lambda x: x / x.norm())),
        ("over_largest_of_batch", _between(lambda x: x / x.abs().max())),
        ("sorted_over_batch", _between(lambda x: x.sort(0).values)),
        ("rolled", _between(lambda x: x + x.roll(1, 0))),
        ("flipped", _between(lambda x: x + x.flip(0))),
        ("summed_up_over_batch", _between(lambda x: x.cumsum(0))),
        ("compared_with_first", _between(lambda x: x - x[:1])),
        ("attention_over_samples", _between(lambda x: (x @ x.T).softmax(-1) @ x)),
        ("distances_of_samples", _between(lambda x: x * torch.cdist(x, x).sum(1, keepdim=True))),
        ("einsum_over_samples", _between(lambda x: torch.einsum("ni,mi,mo->no", x, x, x))),
        ("statistics_by_hand", _between(lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())),
        ("transposed_layer_norm", _between(lambda x: F.layer_norm(x.T, x.shape[:1]).T)),
        ("no_grad_statistic", _between(lambda x: x * x.detach().std())),
        ("tokens_attend_across_samples", _between(
            _all_tokens, N, T, D)),
        ("capacity_routing", on(_Routed, normal(N, D))),
        ("contrastive_loss", _contrastive),
        ("centred_loss", _centred_loss),
        ("embedding_scaled_by_frequency", on(
            lambda: nn.Embedding(7, D, scale_grad_by_freq=True), tokens(N, T, vocabulary=3))),
    ]
]  # fmt: skip

cases = norms + hidden
