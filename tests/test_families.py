"""Models as people write them, one for each family: policies, variational and discrete codes, flows, graphs, sets ...

Each against the definition with nothing verified, by every way in: the hook engine, a recorder, statistics in slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

import persample

N, D = 4, 5
Case = tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor], Callable[[], Any], Callable[[], Any]]
CASES: dict[str, Case] = {}


def case(loss: Callable[[Any, Any], Tensor], inputs: Callable[[], Any], targets: Callable[[], Any]) -> Any:
    def register(make: type[nn.Module]) -> type[nn.Module]:
        CASES[make.__name__] = (make, loss, inputs, targets)
        return make

    return register


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def labels(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape or (N,))


def square(out: Any, y: Any) -> Tensor:
    return (out.flatten(1) - 0.3).square().sum(1)


def entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def gaussian(out: Any, y: Tensor) -> Tensor:
    return -distributions.Normal(*out).log_prob(y).sum(-1)


@case(gaussian, normal(N, D), normal(N, 3))
class GaussianPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(D, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Any:
        return self.mean(x), self.log_std.exp()


@case(lambda o, y: F.gaussian_nll_loss(o[0], y, o[1].square()), normal(N, D), normal(N, 3))
class HomoscedasticHead(GaussianPolicy):
    def forward(self, x: Tensor) -> Any:
        mean = self.mean(x)
        return mean, self.log_std.exp().expand_as(mean)


@case(
    lambda o, y: (
        -distributions.Independent(distributions.Normal(o[0], o[1]), 1).log_prob(y)
        - 0.01 * distributions.Normal(o[0], o[1]).entropy().sum(-1)
        + (o[2] - 1).square()
    ),
    normal(N, D),
    normal(N, 3),
)
class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(D, 6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        return self.actor(h), self.log_std.clamp(-2, 2).exp().expand(len(x), -1), self.critic(h).squeeze(-1)


@case(
    lambda o, y: -distributions.Categorical(logits=o).log_prob(y) - 0.1 * distributions.Categorical(logits=o).entropy(),
    normal(N, D),
    labels(3),
)
class CategoricalPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Any:
        return self.l(x)


@case(
    lambda o, y: (
        -distributions.MixtureSameFamily(
            distributions.Categorical(logits=o[0]), distributions.Independent(distributions.Normal(o[1], o[2]), 1)
        ).log_prob(y)
    ),
    normal(N, D),
    normal(N, 2),
)
class MixtureDensity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pi, self.mu, self.sigma = nn.Linear(D, 3), nn.Linear(D, 6), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Any:
        return self.pi(x), self.mu(x).view(-1, 3, 2), self.sigma.exp().expand(len(x), 3, 2)


@case(lambda o, y: -distributions.MultivariateNormal(o[0], scale_tril=o[1]).log_prob(y), normal(N, D), normal(N, 3))
class FullCovariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.raw = nn.Linear(D, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.mean(x), self.raw.tril(-1) + torch.diag(self.raw.diagonal().exp())


def elbo(o: Any, y: Any) -> Tensor:
    recon, mu, logvar, x = o
    return (recon - x).square().sum(1) - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


@case(elbo, lambda: (torch.randn(N, D), torch.randn(N, 2)), lambda: None)
class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def forward(self, x: Tensor, noise: Tensor) -> Any:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        return self.decoder(mu + noise * (0.5 * logvar).exp()), mu, logvar, x


@case(
    lambda o, y: (
        (o[0] - o[3]).square().sum(1)
        + distributions.kl_divergence(
            distributions.Normal(o[1], o[2]), distributions.Normal(torch.zeros_like(o[1]), torch.ones_like(o[2]))
        ).sum(1)
    ),
    lambda: (torch.randn(N, D), torch.randn(N, 2)),
    lambda: None,
)
class VAEWithDistributions(VAE):
    def forward(self, x: Tensor, noise: Tensor) -> Any:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        std = F.softplus(logvar)
        return self.decoder(mu + noise * std), mu, std, x


@case(
    lambda o, y: distributions.kl_divergence(
        distributions.Normal(o[0], o[1]), distributions.Normal(o[2], o[3].exp())
    ).sum(1),
    normal(N, D),
    lambda: None,
)
class LearnedPrior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prior = nn.Linear(D, 4), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Any:
        mu, raw = self.encoder(x).chunk(2, dim=-1)
        return mu, F.softplus(raw), *self.prior


@case(lambda o, y: (o[0] - y).square().sum(1) + o[1], normal(N, D), normal(N, D))
class VQVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(D, 6), nn.Embedding(7, 3), nn.Linear(6, D)

    def forward(self, x: Tensor) -> Any:
        z = self.encoder(x).view(-1, 2, 3)
        distances = z.square().sum(-1, keepdim=True) - 2 * z @ self.codes.weight.T + self.codes.weight.square().sum(-1)
        q = self.codes(distances.argmin(-1))
        commit = (q - z.detach()).square().flatten(1).sum(1) + 0.25 * (z - q.detach()).square().flatten(1).sum(1)
        return self.decoder((z + (q - z).detach()).flatten(1)), commit


@case(lambda o, y: 0.5 * o[0].square().sum(1) - o[1], normal(N, 4), lambda: None)
class CouplingFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))
        self.scale, self.mix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

    def forward(self, x: Tensor) -> Any:
        logdet = x.new_zeros(x.shape[0])
        for net in self.nets:
            a, b = x.chunk(2, dim=1)
            s, t = net(a).chunk(2, dim=1)
            x = torch.cat([b * s.tanh().exp() + t, a], dim=1)
            logdet = logdet + s.tanh().sum(1)
            x = x @ self.mix
            logdet += torch.linalg.slogdet(self.mix)[1]
        return x * self.scale.exp(), logdet + self.scale.sum()


@case(square, lambda: (torch.randn(N, 3, D), (torch.rand(N, 3, 3) > 0.5).double()), lambda: None)
class DenseGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = (adjacency @ self.a(x)).relu()
        return self.b(h).mean(1)


@case(square, lambda: (torch.randn(N, 3, D), (torch.rand(N, 3, 3) > 0.3)), lambda: None)
class GraphAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Linear(D, 4, bias=False), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.w(x)
        left, right = h @ self.a[:4], h @ self.a[4:]
        scores = F.leaky_relu(left[:, :, None] + right[:, None, :], 0.2)
        alpha = scores.masked_fill(~adjacency, -1e9).softmax(-1)
        return alpha @ h


@case(square, normal(N, 6, D), lambda: None)
class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = nn.Linear(D, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).relu().amax(dim=1))


@case(square, normal(N, 6, D), lambda: None)
class SetTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, 2, 4))
        self.embed, self.attend = nn.Linear(D, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        out, _ = self.attend(self.seeds.repeat(x.size(0), 1, 1), h, h)
        return out


@case(square, normal(N, 2, 6, 6), lambda: None)
class SlotAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mu, self.k, self.q, self.v = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )
        self.gru, self.norm = nn.GRUCell(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        k, v = self.k(h), self.v(h)
        slots = self.mu.expand(x.shape[0], 3, -1) * torch.arange(1, 4).view(1, 3, 1)
        for _ in range(2):
            q = self.q(self.norm(slots))
            attn = torch.einsum("bkd,bnd->bkn", q, k).softmax(dim=1)
            attn = attn / attn.sum(-1, keepdim=True)
            updates = torch.einsum("bkn,bnd->bkd", attn, v)
            slots = self.gru(updates.reshape(-1, 4), slots.reshape(-1, 4)).view(x.shape[0], 3, 4)
        return slots


@case(square, normal(N, 1, 6, 6), lambda: None)
class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.conv = nn.Linear(36, 6), nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.loc(x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))


@case(square, lambda: (torch.randn(N, D), torch.randn(N, 3)), lambda: None)
class HyperNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Linear(3, 2 * D)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return torch.bmm(self.hyper(task).view(-1, 2, D), x.unsqueeze(-1)).squeeze(-1)


@case(square, lambda: (torch.randn(N, 2, 5, 5), torch.randn(N, 3)), lambda: None)
class DynamicConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.gate = nn.Parameter(torch.randn(3, 4, 2, 3, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        w = torch.einsum("nk,koihw->noihw", self.gate(c).softmax(-1), self.kernels)
        n, _, h, k = x.shape
        return F.conv2d(x.reshape(1, -1, h, k), w.flatten(0, 1), groups=n).view(n, 4, h - 2, k - 2)


@case(square, lambda: (torch.randn(N, 2, 5, 5), torch.randn(N, 3)), lambda: None)
class ModulatedConv(nn.Module):
    """StyleGAN 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 4, 2, 3, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        n, c, h, k = x.shape
        w = self.weight * (self.style(s) + 1).view(n, 1, c, 1, 1)
        w = w * torch.rsqrt(w.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        return F.conv2d(x.view(1, n * c, h, k), w.view(n * 4, c, 3, 3), padding=1, groups=n).view(n, 4, h, k)


@case(square, lambda: (torch.randn(N, 2, 5, 5), torch.randn(N, 3)), lambda: None)
class FiLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.film = nn.Conv2d(2, 4, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gamma, beta = self.film(c)[:, :, None, None].chunk(2, 1)
        return self.conv(x) * (1 + gamma) + beta


@case(square, lambda: (torch.randn(N, 2, 4, 4), torch.rand(N)), lambda: None)
class Denoiser(nn.Module):
    """A diffusion U-Net in small."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.down, self.mid, self.up = (
            nn.Linear(4, 4),
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(6, 2, 3, padding=1),
        )
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        freqs = torch.exp(-torch.arange(2) / 2).to(x)
        angles = t[:, None] * freqs[None]
        e = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        h = F.silu(self.norm(self.down(x)) + e[..., None, None])
        h = F.interpolate(self.mid(h), scale_factor=2, mode="nearest")
        return self.up(torch.cat([h, x], dim=1))


@case(lambda o, y: (o - y).square().sum((1, 2)), normal(N, 6, 3), normal(N, 6, 3))
class Field(nn.Module):
    """Positional encoding as in NeRF, sampled points flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(15, 6), nn.Linear(6 + 15, 3)
        self.register_buffer("bands", 2.0 ** torch.arange(2))

    def forward(self, x: Tensor) -> Tensor:
        points = x.reshape(-1, 3)
        angles = (points[..., None, :] * self.bands[:, None]).flatten(-2)
        e = torch.cat([points, angles.sin(), angles.cos()], -1)
        return torch.sigmoid(self.b(torch.cat([self.a(e).relu(), e], -1))).view(x.shape)


@case(
    lambda o, y: F.cosine_embedding_loss(o[0], o[1], y, reduction="none"),
    lambda: (torch.randn(N, D), torch.randn(N, D)),
    lambda: torch.tensor([1, -1, 1, -1]),
)
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.net(a), self.net(b)


@case(
    lambda o, y: F.triplet_margin_loss(*o, margin=5.0, reduction="none"),
    lambda: tuple(torch.randn(N, D) for _ in range(3)),
    lambda: None,
)
class Triplets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, 3)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.net(torch.cat([a, b, c])).chunk(3)


@case(
    lambda o, y: -F.logsigmoid((o[0] * o[1]).sum(-1)) - F.logsigmoid(-(o[0][:, None] * o[2]).sum(-1)).sum(-1),
    lambda: (torch.randint(9, (N,)), torch.randint(9, (N,)), torch.randint(9, (N, 3))),
    lambda: None,
)
class SkipGram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, center: Tensor, context: Tensor, negative: Tensor) -> Any:
        return self.u(center), self.v(context), self.v(negative)


@case(
    lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none"),
    lambda: (torch.randint(6, (N,)), torch.randint(8, (N,))),
    lambda: torch.rand(N),
)
class MatrixFactorization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(6, 4), nn.Embedding(8, 4)
        self.bu, self.bi, self.b = nn.Embedding(6, 1), nn.Embedding(8, 1), nn.Parameter(torch.zeros(1))

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return (self.user(u) * self.item(i)).sum(-1) + self.bu(u).squeeze(-1) + self.bi(i).squeeze(-1) + self.b


@case(
    lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none"),
    lambda: torch.randint(5, (N, 3)),
    lambda: torch.rand(N),
)
class FactorizationMachine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, 5, 10]))
        self.w, self.v, self.bias = nn.Embedding(15, 1), nn.Embedding(15, 4), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        v = self.v(x)
        second = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        return self.bias + self.w(x).sum((1, 2)) + second


@case(entropy, normal(N, D), labels(3))
class MixtureOfExperts(nn.Module):
    """Top-2 routing with index_add, as in Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.head = (
            nn.Linear(D, 3),
            nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
            nn.Linear(D, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return self.head(out)


@case(entropy, normal(N, D), labels(3))
class SoftExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.gate = nn.Parameter(torch.randn(4, D, 3)), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.matmul(x, self.w).permute(1, 0, 2) * self.gate(x).softmax(-1).unsqueeze(-1)).sum(1)


@case(entropy, normal(N, D), labels(3))
class EnsembleOfHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(D, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([h(x) for h in self.heads]).mean(0)


@case(entropy, normal(N, D), labels(3))
class BatchEnsemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.r, self.s = (
            nn.Linear(D, 3, bias=False),
            nn.Parameter(torch.randn(2, D)),
            nn.Parameter(torch.randn(2, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.w(x[:, None] * self.r) * self.s).mean(1)


@case(entropy, normal(N, D), labels(3))
class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.prototypes = nn.Linear(D, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.net(x), self.prototypes)


@case(entropy, normal(N, D), labels(3))
class CosineClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.w, self.s = nn.Linear(D, 4), nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * F.linear(F.normalize(self.net(x)), F.normalize(self.w))


@case(entropy, normal(N, D), labels(3))
class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres, self.log_width, self.out = (
            nn.Parameter(torch.randn(6, D)),
            nn.Parameter(torch.zeros(6)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        d = (x.unsqueeze(1) - self.centres.unsqueeze(0)).pow(2).sum(-1)
        return self.out(torch.exp(-d * self.log_width.exp()))


@case(square, normal(N, D), lambda: None)
class KAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coef, self.base = nn.Parameter(torch.randn(3, D, 4)), nn.Parameter(torch.randn(3, D))
        self.register_buffer("grid", torch.linspace(-2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-(x[..., None] - self.grid).square())
        return torch.einsum("nik,oik->no", basis, self.coef) + F.silu(x) @ self.base.T


@case(square, normal(N, D), lambda: None)
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(D, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x).view(-1, 3, 2).max(dim=-1)[0]


@case(square, normal(N, D), lambda: None)
class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        return torch.lerp(x, self.h(x).relu(), t)


@case(square, normal(N, D), lambda: None)
class NeuralODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.step = nn.Sequential(nn.Linear(D + 1, D), nn.Tanh()), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            t = torch.full((x.shape[0], 1), 0.1 * i, dtype=x.dtype)
            k = self.f(torch.cat([x, t], 1))
            x = x + self.step * self.f(torch.cat([x + 0.5 * self.step * k, t], 1))
        return x


@case(square, normal(N, D), lambda: None)
class Equilibrium(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(5):
                z = torch.tanh(0.3 * self.w(z) + self.u(x))
        return torch.tanh(0.3 * self.w(z) + self.u(x))


@case(entropy, normal(N, 6, D), labels(3))
class StateSpace(nn.Module):
    """A diagonal recurrence by a convolution with its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a, self.b, self.c, self.out = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4, D)),
            nn.Parameter(torch.randn(D, 4)),
            nn.Linear(D, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1]).to(x)
        kernel = torch.einsum("ds,st,sd->dt", self.c, torch.exp(-self.log_a.exp()[:, None] * t), self.b)
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x.transpose(1, 2), n=n) * torch.fft.rfft(kernel, n=n), n=n)[
            ..., : x.shape[1]
        ]
        return self.out(y.transpose(1, 2)[:, -1])


@case(entropy, normal(N, 6, D), labels(3))
class SelectiveScan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.delta, self.log_a, self.b, self.c, self.d, self.out = (
            nn.Linear(D, D),
            nn.Parameter(torch.rand(D, 3)),
            nn.Linear(D, 3),
            nn.Linear(D, 3),
            nn.Parameter(torch.ones(D)),
            nn.Linear(D, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        delta, b, c = F.softplus(self.delta(x)), self.b(x), self.c(x)
        a = torch.exp(delta.unsqueeze(-1) * -self.log_a.exp())
        bx = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        h, ys = torch.zeros(x.shape[0], D, 3, dtype=x.dtype), []
        for i in range(x.shape[1]):
            h = a[:, i] * h + bx[:, i]
            ys.append((h * c[:, i].unsqueeze(1)).sum(-1))
        return self.out((torch.stack(ys, 1) + x * self.d)[:, -1])


@case(lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none").sum(1), labels(7, N, 6), labels(7, N, 6))
class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.qkv, self.out = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        n, t, _ = x.shape
        q, k, v = (h.view(n, t, 2, 4).transpose(1, 2) for h in self.qkv(x).split(8, dim=-1))
        angle = torch.outer(torch.arange(t), 1.0 / 10000 ** (torch.arange(0, 4, 2) / 4)).repeat(1, 2).to(x)
        cos, sin = angle.cos(), angle.sin()
        turn = lambda h: torch.cat([-h[..., 2:], h[..., :2]], -1)  # noqa: E731
        q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(self.out(h.transpose(1, 2).reshape(n, t, 8)), self.wte.weight)


@case(lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none").sum(1), labels(7, N, 6), labels(7, N, 6))
class RelativeBias(nn.Module):
    """Swin and T5."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.q, self.k, self.v = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.out, self.tau = (
            nn.Parameter(torch.randn(11, 2)),
            nn.Linear(8, 7),
            nn.Parameter(torch.ones(2, 1, 1)),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, 4).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        index = (torch.arange(t)[:, None] - torch.arange(t)[None]) + t - 1
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.tau.clamp(max=4.6).exp()
        scores = scores + self.table[index.view(-1)].view(t, t, 2).permute(2, 0, 1).unsqueeze(0)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(entropy, normal(N, 3, 8, 8), labels(3))
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(3, 8, 4, stride=4),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 5, 8)),
        )
        self.block, self.head, self.gamma = (
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
            nn.Linear(8, 3),
            nn.Parameter(1e-1 * torch.ones(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return self.head(x[:, 0] + self.gamma * self.block(x)[:, 0])


@case(entropy, lambda: (torch.randn(N, 4, 8, 8), torch.tensor([1.0, 0.0, 2.0, 1.0])), labels(3))
class MixerWithDropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels, self.norm, self.head = (
            nn.Linear(64, 64),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        h = h + keep.view(-1, 1, 1) * self.tokens(self.norm(h).transpose(1, 2)).transpose(1, 2)
        return self.head((h + self.channels(self.norm(h)).relu()).mean(1))


@case(entropy, normal(N, 4, 6, 6), labels(3))
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.se, self.pw = (
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Sequential(nn.Conv2d(4, 2, 1), nn.SiLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.dw(x))
        return self.pw(h * self.se(F.adaptive_avg_pool2d(h, 1))).mean((-2, -1))


@case(entropy, normal(N, 4, 6, 6), labels(3))
class GlobalResponseNorm(nn.Module):
    """ConvNeXt 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma, self.beta, self.head = (
            nn.Conv2d(4, 6, 3),
            nn.Parameter(torch.randn(1, 1, 1, 6)),
            nn.Parameter(torch.randn(1, 1, 1, 6)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        x = self.gamma * (x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x
        return self.head(x.mean([1, 2]))


@case(entropy, normal(N, 4, 6, 6), labels(3))
class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = self.a(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, dim=1)
        return self.head(torch.cat((left, self.b(right).relu()), dim=1).mean([2, 3]))


@case(square, normal(N, 2, 12), lambda: None)
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for i, (gate, skip) in enumerate(zip(self.gates, self.skip, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = skip(a.tanh() * b.sigmoid())
            total, x = total + h, x + h
        return total


@case(
    lambda o, y: F.ctc_loss(
        o.log_softmax(-1).transpose(0, 1),
        y,
        torch.full((o.shape[0],), 6),
        torch.full((o.shape[0],), 2),
        reduction="none",
    ),
    normal(N, 6, D),
    lambda: torch.randint(1, 4, (N, 2)),
)
class SpeechCTC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(D, 4, batch_first=True, bidirectional=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


@case(
    lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none", ignore_index=0).sum(1),
    lambda: (torch.randint(7, (N, 5)), torch.randint(7, (N, 4))),
    labels(7, N, 4),
)
class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.enc, self.dec, self.attn, self.out = (
            nn.Embedding(7, 4),
            nn.LSTM(4, 4, batch_first=True),
            nn.LSTMCell(8, 4),
            nn.Linear(8, 1),
            nn.Linear(4, 7),
        )

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory, (h, c) = self.enc(self.emb(src))
        h, c, outs = h[-1], c[-1], []
        for t in range(tgt.size(1)):
            scores = self.attn(torch.cat([memory, h.unsqueeze(1).expand_as(memory)], -1)).squeeze(-1)
            context = torch.bmm(scores.softmax(-1).unsqueeze(1), memory).squeeze(1)
            h, c = self.dec(torch.cat([self.emb(tgt[:, t]), context], -1), (h, c))
            outs.append(self.out(h))
        return torch.stack(outs, dim=1)


@case(square, normal(N, D), lambda: None)
class LearnedInitialState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h0, self.cell = nn.Parameter(torch.randn(1, 4)), nn.GRUCell(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.h0.expand(x.size(0), -1)
        for _ in range(2):
            h = self.cell(x, h)
        return h


@case(square, normal(N, 3, D), lambda: None)
class LearnedInitialStateOfALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h0, self.c0, self.lstm = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.LSTM(D, 4, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x, (self.h0.repeat(1, x.size(0), 1), self.c0.expand(-1, x.size(0), -1).contiguous()))[0]


@case(lambda o, y: -o.logsumexp(0) if o.ndim == 1 else -o.logsumexp(1), normal(N, 5, 3), lambda: None)
class CRF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emit, self.transitions, self.start = (
            nn.Linear(3, 4),
            nn.Parameter(torch.randn(4, 4)),
            nn.Parameter(torch.randn(4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        e = self.emit(x)
        alpha = self.start + e[:, 0]
        for t in range(1, x.shape[1]):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transitions + e[:, t].unsqueeze(1), dim=1)
        return alpha


@case(entropy, normal(N, D), labels(3))
class Capsules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.primary, self.w = nn.Linear(D, 8), nn.Parameter(torch.randn(1, 4, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        u = self.primary(x).view(-1, 4, 1, 1, 2)
        u_hat = (u @ self.w).squeeze(-2)
        b = torch.zeros(x.shape[0], 4, 3, 1, dtype=x.dtype)
        for _ in range(2):
            s = (b.softmax(2) * u_hat).sum(1, keepdim=True)
            v = s * s.norm(dim=-1, keepdim=True) / (1 + s.square().sum(-1, keepdim=True))
            b = b + (u_hat * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@case(entropy, normal(N, D), labels(3))
class GumbelTree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.leaves = nn.Linear(D, 3), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        p = self.split(x).sigmoid()
        a, b, c = p.unbind(-1)
        reach = torch.stack([a * b, a * (1 - b), (1 - a) * c, (1 - a) * (1 - c)], -1)
        return reach @ self.leaves


@case(square, normal(N, D), lambda: None)
class LowRankAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b, self.m = (
            nn.Linear(D, 4),
            nn.Parameter(torch.randn(2, D)),
            nn.Parameter(torch.randn(4, 2)),
            nn.Parameter(torch.rand(4, 1)),
        )
        self.base.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.base.weight + self.b @ self.a
        return F.linear(x, self.m * w / w.norm(dim=1, keepdim=True), self.base.bias)


@case(square, normal(N, D), lambda: None)
class BayesByBackprop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.rho = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3, D))
        self.register_buffer("eps", torch.randn(3, D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mu + F.softplus(self.rho) * self.eps)


@case(square, normal(N, D), lambda: None)
class LocalReparametrisation(BayesByBackprop):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mu) + F.linear(x.square(), F.softplus(self.rho).square()).add(
            1e-8
        ).sqrt() * self.eps.sum(1)


@case(square, normal(N, D), lambda: None)
class QuantisedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q = self.w / self.scale
        q = (q.round() - q).detach() + q
        return F.linear(x, q.clamp(-7, 7) * self.scale)


@case(square, normal(N, D), lambda: None)
class MaskedAutoregressive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(D, D)
        self.register_buffer("mask", torch.ones(D, D).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.l.weight, self.l.bias)


@case(square, normal(N, 6), lambda: None)
class Equivariant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        circulant = torch.stack([self.w.roll(i) for i in range(6)])
        return (x @ circulant).relu()


@case(square, normal(N, 2, 6), lambda: None)
class ComplexFourierLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.skip = nn.Parameter(torch.randn(2, 2, 3, 2)), nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], 2, f.shape[-1], dtype=f.dtype)
        out[:, :, :3] = torch.einsum("bix,iox->box", f[:, :, :3], torch.view_as_complex(self.w))
        return F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.skip(x))


@case(square, lambda: (torch.randn(3, D), torch.randn(N, 2)), lambda: None)
class DeepONet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk, self.b = nn.Linear(D, 4), nn.Linear(2, 4), nn.Parameter(torch.zeros(1))

    def forward(self, sensors: Tensor, points: Tensor) -> Tensor:
        return self.trunk(points).tanh() @ self.branch(sensors).T + self.b


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-9 * (1 + float(b.abs().max()))


def built(name: str) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any, Any, Any]:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            make, loss, inputs, targets = CASES[name]
            model, x, y = make(), inputs(), targets()
        finally:
            torch.set_default_dtype(default)
    dims = 0 if name != "DeepONet" else ((None, 0), 0)
    return model, loss, x, y, dims


def call(model: nn.Module, x: Any) -> Any:
    return model(*x) if isinstance(x, tuple) else model(x)


def definition(model: nn.Module, loss: Any, x: Any, y: Any) -> dict[str, Tensor]:
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    losses = loss(call(model, x), y)
    if losses.ndim == 0:
        return {}
    rows = [torch.autograd.grad(l, list(named.values()), retain_graph=True, materialize_grads=True) for l in losses]
    return dict(zip(named, map(torch.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    model, loss, x, y, dims = built(name)
    truth = persample.gradients(model, loss, x, y, engine="loop", batch_dim=dims)
    G = persample.gradients(model, loss, x, y, verify=False, batch_dim=dims)
    for k in truth.names:
        assert close(G[k], truth[k]), k
    for k, rows in definition(model, loss, x, y).items():
        assert close(rows, truth[k]), k


@pytest.mark.parametrize("name", [name for name in CASES if name != "HomoscedasticHead"])  # which has a mean
def test_recorder(name: str) -> None:
    model, loss, x, y, dims = built(name)
    truth = persample.gradients(model, loss, x, y, engine="loop", batch_dim=dims)
    with persample.extend(model, batch_dim=dims) as recorder:
        G = recorder.gradients(loss(call(model, x), y))
    for k in truth.names:
        assert close(G[k], truth[k]), k


@pytest.mark.parametrize("name", CASES)
def test_statistics(name: str) -> None:
    model, loss, x, y, dims = built(name)
    truth = persample.gradients(model, loss, x, y, engine="loop", batch_dim=dims)
    for options in ({}, {"max_bytes": 1}):
        S = persample.gradients(
            model,
            loss,
            x,
            y,
            verify=False,
            batch_dim=dims,
            quantities=["gram", "variance", ("clip", {"max_norm": 1.0})],
            **options,
        )
        assert close(S.gram(), truth.gram())
        for k in truth.names:
            assert close(S.variance()[k], truth.variance()[k]) and close(S.clip()[k], truth.clip(1.0)[k]), k


WITHOUT_SAMPLES = ("GaussianPolicy", "ActorCritic", "MixtureDensity", "FullCovariance", "LearnedPrior")


@pytest.mark.parametrize("name", [name for name in CASES if name != "HomoscedasticHead"])
def test_handle(name: str) -> None:
    model, loss, x, y, dims = built(name)
    truth, got = persample.gradients(model, loss, x, y, engine="loop", batch_dim=dims), list[Any]()
    handle = persample.extend(model, on_backward=got.append, reduction="mean", batch_dim=dims)
    try:
        if name in WITHOUT_SAMPLES:
            with pytest.raises(persample.CaptureError, match="from no sample"):
                call(model, x)
            return
        loss(call(model, x), y).mean().backward()
    finally:
        handle.remove()
    for k in truth.names:
        assert close(got[0][k], truth[k]), k
