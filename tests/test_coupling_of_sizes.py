"""BatchNorm over samples that have several numbers of positions: tokens behind each other, the nodes of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

SIZES = (3, 5, 1, 4)
N, D, C, K = len(SIZES), 3, 4, 2
OWNER = torch.arange(N).repeat_interleave(torch.tensor(SIZES))
MASK = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]


class Net(nn.Module):
    """Tokens ``[R, D]`` of all samples, as they are put behind each other by `tokens`."""

    def __init__(self, positions: int = 0) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(D, C, bias=False), (nn.BatchNorm2d if positions else nn.BatchNorm1d)(C)
        self.second, self.last, self.positions = nn.Linear(C, C), nn.BatchNorm1d(C), positions
        self.head = nn.Linear(C, K)
        for module in (self.bn, self.last):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)

    def of_tokens(self, x: Tensor, owner: Tensor, n: int) -> Tensor:
        h = self.first(x)
        if self.positions:  # [R, C, P, 1]: several positions for every token
            h = self.bn((h[..., None] * torch.linspace(1, 2, self.positions).to(h))[..., None]).tanh().mean((2, 3))
        else:
            h = self.bn(h).tanh()
        h = self.last(self.second(h))
        return self.head(h.new_zeros(n, C).index_add(0, owner, h.tanh()))


class Listed(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        owner = torch.arange(len(xs)).repeat_interleave(torch.tensor([len(x) for x in xs]))
        return self.of_tokens(torch.cat(xs), owner, len(xs))


class Masked(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        owner = torch.arange(len(x))[:, None].expand(mask.shape)[mask]
        return self.of_tokens(x[mask], owner, len(x))


class Mixed(Net):
    """Tokens in an order in which those of different samples take turns."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        owner = torch.arange(len(x))[:, None].expand(mask.shape).T[mask.T]
        return self.of_tokens(x.transpose(0, 1)[mask.T], owner, len(x))


Case = tuple[nn.Module, Any, dict[str, Any]]


def listed() -> Case:
    return Listed(), (list(torch.randn(sum(SIZES), D).double().split(SIZES)),), {"batch_dim": list}


def masked() -> Case:
    return Masked(), (torch.randn(N, max(SIZES), D).double(), MASK), {}


def mixed() -> Case:
    return Mixed(), (torch.randn(N, max(SIZES), D).double(), MASK), {}


def of_positions() -> Case:
    return Masked(positions=2), (torch.randn(N, max(SIZES), D).double(), MASK), {}


CASES: list[Callable[[], Case]] = [listed, masked, mixed, of_positions]


def tokens(inputs: Any) -> Tensor:
    return torch.cat(inputs[0]) if isinstance(inputs[0], list) else inputs[0][MASK]


def by_copies(net: Any, x: Tensor, y: Tensor, theta: dict[str, Tensor], w: Tensor | None = None, fixed: bool = False):
    """The losses where sample ``m`` has the parameters ``theta[name][m]``, and counts ``w[m]`` in every statistic."""
    share = torch.ones(N).double()[OWNER] if w is None else w[OWNER]
    share = share / share.sum()

    def linear(name: str, h: Tensor) -> Tensor:
        made = torch.einsum("roi,ri->ro", theta[f"{name}.weight"][OWNER], h)
        return made + theta[f"{name}.bias"][OWNER] if f"{name}.bias" in theta else made

    def norm(name: str, h: Tensor) -> Tensor:  # [R, C, P]
        mean = torch.einsum("r,rcp->c", share / h.shape[2], h)
        mean = mean.detach() if fixed else mean
        variance = torch.einsum("r,rcp->c", share / h.shape[2], (h - mean[:, None]).square())
        variance = variance.detach() if fixed else variance
        made = (h - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        return made * theta[f"{name}.weight"][OWNER, :, None] + theta[f"{name}.bias"][OWNER, :, None]

    h = linear("first", x)[..., None]
    h = h * torch.linspace(1, 2, net.positions).to(h) if net.positions else h
    h = norm("last", linear("second", norm("bn", h).tanh().mean(2))[..., None])[..., 0].tanh()
    pooled = h.new_zeros(N, C).index_add(0, OWNER, h)
    out = torch.einsum("noi,ni->no", theta["head.weight"], pooled) + theta["head.bias"]
    return F.cross_entropy(out, y, reduction="none")


def copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().repeat(N, *[1] * p.ndim).requires_grad_() for name, p in net.named_parameters()}


def table(net: Any, x: Tensor, y: Tensor, fixed: bool = False) -> dict[str, Tensor]:
    """``G[n, m]``, ``{name: [N, N, *P]}``: the derivative of loss ``n`` with respect to the copy of sample ``m``."""
    theta = copies(net)
    losses = by_copies(net, x, y, theta, fixed=fixed)
    rows = [torch.autograd.grad(loss, list(theta.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack(g) for name, g in zip(theta, zip(*rows, strict=True), strict=True)}


def influence(net: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    w = torch.ones(N).double().requires_grad_()
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    losses = by_copies(net, x, y, {name: p.expand(N, *p.shape) for name, p in theta.items()}, w)
    L = (w * losses).sum() / w.sum()
    mean = torch.autograd.grad(L, list(theta.values()), create_graph=True)
    slope = torch.autograd.grad(L, w, create_graph=True)[0]
    bends = [torch.autograd.grad(slope[n], list(theta.values()), retain_graph=True) for n in range(N)]
    return {
        name: g.detach() + N * torch.stack(b) for name, g, b in zip(theta, mean, zip(*bends, strict=True), strict=True)
    }


def close(G: Any, expected: dict[str, Tensor]) -> None:
    for name, rows in expected.items():
        torch.testing.assert_close(G[name], rows, rtol=1e-8, atol=1e-9)


def made(case: Callable[[], Case]) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    net, inputs, how = case()
    return net.double(), inputs, torch.randint(K, (N,)), how


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_that_of_the_model(case: Callable[[], Case]) -> None:
    net, inputs, y, _ = made(case)
    losses = by_copies(net, tokens(inputs), y, copies(net))
    torch.testing.assert_close(losses, F.cross_entropy(net(*inputs), y, reduction="none"))


@pytest.mark.parametrize("case", CASES)
def test_notions(case: Callable[[], Case]) -> None:
    net, inputs, y, how = made(case)
    G = table(net, tokens(inputs), y)
    expected = {
        "loss": {name: g.sum(1) for name, g in G.items()},
        "copy": {name: g.sum(0) for name, g in G.items()},
        "frozen": {name: g.sum(1) for name, g in table(net, tokens(inputs), y, fixed=True).items()},
        "influence": influence(net, tokens(inputs), y),
    }
    for notion, rows in expected.items():
        close(persample.gradients(net, nn.CrossEntropyLoss(), inputs, y, coupled=notion, **how), rows)
        coupling = persample.coupling(net, nn.CrossEntropyLoss(), inputs, y, **how)
        close(coupling.gradients(notion), rows)
    evaluated = persample.gradients(net, nn.CrossEntropyLoss(), inputs, y, coupled="eval", **how)
    close(evaluated, persample.gradients(net.eval(), nn.CrossEntropyLoss(), inputs, y, **how).dense())


@pytest.mark.parametrize("route", ["samples", "statistics"])
@pytest.mark.parametrize("case", CASES)
def test_the_table(case: Callable[[], Case], route: str) -> None:
    net, inputs, y, how = made(case)
    G = table(net, tokens(inputs), y)
    coupling = persample.coupling(net, nn.CrossEntropyLoss(), inputs, y, route=route, **how)
    norms = torch.stack([g.flatten(2).square().sum(2) for g in G.values()]).sum(0).sqrt()
    torch.testing.assert_close(coupling.norms(), norms)
    for m in range(N):
        close(coupling.column(m), {name: g[:, m] for name, g in G.items()})
        close(coupling.row(m), {name: g[m] for name, g in G.items()})
    for notion in ("loss", "influence"):
        expected = {name: g.sum(1) for name, g in G.items()} if notion == "loss" else influence(net, tokens(inputs), y)
        close(coupling.gradients(notion), expected)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_leaving_out(case: Callable[[], Case]) -> None:
    net, inputs, y, how = made(case)
    coupling = persample.coupling(net, nn.CrossEntropyLoss(), inputs, y, **how)
    w = torch.ones(N).double().requires_grad_()
    losses = by_copies(net, tokens(inputs), y, copies(net), w)
    jacobian = torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses])
    torch.testing.assert_close(coupling.statistic_influence(), jacobian)
    changes = []
    for m in range(N):
        left = torch.ones(N).double()
        left[m] = 0
        changes.append(by_copies(net, tokens(inputs), y, copies(net), left) - losses)
    exact = coupling.leave_one_out(exact=True)
    off = ~torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(exact[off], torch.stack(changes, 1).detach()[off])


@pytest.mark.parametrize("case", CASES)
def test_under_a_handle(case: Callable[[], Case]) -> None:
    net, inputs, y, how = made(case)
    G = table(net, tokens(inputs), y)
    with persample.extend(net, **how) as recorder:
        losses = F.cross_entropy(net(*inputs), y, reduction="none")
        close(recorder.gradients(losses, coupled="loss"), {name: g.sum(1) for name, g in G.items()})
        close(recorder.gradients(losses, coupled="copy"), {name: g.sum(0) for name, g in G.items()})
