"""What is computed from rows, Kronecker factors and BatchNorm's statistics is the same inside an autocast region."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import persample
from persample import attribution, batchnorm, curvature, optim, statistics

N, M = 12, 5
LOSS = nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """What products are of, so that autocast can be in nothing but the products themselves."""
    net = model()
    G, H = persample.gradients(net, LOSS, *data(N)), persample.gradients(net, LOSS, *data(M))
    return SimpleNamespace(
        G=G, H=H, a=G.flat(), b=H.flat(), K=G.gram(), R=attribution.Projection(16),
        S=persample.gradients(net, LOSS, *data(N), quantities=["norm", "mean"]),
        kfac=curvature.kfac(net, LOSS, *data(N), type="empirical"),
        ekfac=curvature.ekfac(net, LOSS, *data(N), type="empirical"),
        rows=curvature.empirical_fisher(net, LOSS, *data(N), method="rows"),
        v=torch.randn(G.flat().shape[1]), columns=torch.randn(G.flat().shape[1], 4),
        named={name: torch.randn(p.shape) for name, p in net.named_parameters()},
        groups=torch.arange(N) % 3, missing=torch.rand(N),
        jacobian=batchnorm.jacobian(nn.BatchNorm1d(4), torch.randn(9, 4, 5) + 3), w=torch.randn(9, 4, 5),
    )  # fmt: skip


PRODUCTS: dict[str, Callable[[Any], Any]] = {
    "grad_dot": lambda m: attribution.grad_dot(m.a, m.b),
    "grad_dot of half precision": lambda m: attribution.grad_dot(m.a.half(), m.b.half()),
    "grad_dot of gradients": lambda m: attribution.grad_dot(m.G, m.H),
    "grad_cos": lambda m: attribution.grad_cos(m.a, m.b),
    "grad_cos of gradients": lambda m: attribution.grad_cos(m.G, m.H),
    "tracin": lambda m: attribution.tracin([(0.1, m.a, m.b), (0.2, m.a, m.b)]),
    "self_influence": lambda m: attribution.self_influence(m.a),
    "empirical_fisher_influence": lambda m: attribution.empirical_fisher_influence(m.a, m.b, damping=1e-3),
    "empirical_fisher_influence of gradients": lambda m: attribution.empirical_fisher_influence(m.G, m.H, damping=1e-3),
    "influence": lambda m: attribution.influence(m.G, m.H, lambda columns: m.kfac.dense() @ columns),
    "trak": lambda m: attribution.trak(m.a, m.b, m.missing, damping=1e-3),
    "projection": lambda m: m.G.project(m.R),
    "project": lambda m: m.G.project(m.columns),
    "dot": lambda m: m.G.dot(m.named),
    "sum": lambda m: m.G.sum(m.missing),
    "clip": lambda m: m.G.clip(0.5),
    "variance": lambda m: m.G.variance(ddof=1),
    "kfac @ v": lambda m: m.kfac @ m.v,
    "kfac @ columns": lambda m: m.kfac @ m.columns,
    "kfac @ named": lambda m: m.kfac @ m.named,
    "kfac.solve": lambda m: m.kfac.solve(m.v, damping=1e-3),
    "kfac.dense": lambda m: m.kfac.dense(),
    "ekfac @ v": lambda m: m.ekfac @ m.v,
    "ekfac.solve": lambda m: m.ekfac.solve(m.columns, damping=1e-3),
    "ekfac.dense": lambda m: m.ekfac.dense(),
    "empirical_fisher @ v": lambda m: m.rows @ m.v,
    "natural_weights": lambda m: optim.natural_weights(m.K, 1e-2),
    "pcgrad_weights": lambda m: optim.pcgrad_weights(m.K),
    "surgery_weights": lambda m: optim.surgery_weights(m.K, lambda gram: gram @ gram[0]),
    "surgery_weights of groups": lambda m: optim.surgery_weights(m.K, optim.pcgrad_weights, m.groups),
    "noise_scale": lambda m: statistics.noise_scale(m.G).scale,
    "noise_scale of statistics": lambda m: statistics.noise_scale(m.S).scale,
    "jacobian @ v": lambda m: m.jacobian @ m.w,
    "jacobian.dense": lambda m: m.jacobian.dense(),
    "jacobian.block_norms": lambda m: m.jacobian.block_norms(),
    "jacobian.block_norms per channel": lambda m: m.jacobian.block_norms(per_channel=True),
    "jacobian.solve": lambda m: m.jacobian.pinv() @ m.w,
    "jacobian.leverage": lambda m: m.jacobian.leverage(),
    "jacobian.second_derivative": lambda m: m.jacobian.second_derivative(m.w, m.w),
}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_not_rounded_by_autocast(made: SimpleNamespace, name: str, kind: torch.dtype) -> None:
    outside = tree_leaves(PRODUCTS[name](made))
    with torch.autocast("cpu", dtype=kind):
        inside = tree_leaves(PRODUCTS[name](made))
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip(outside, inside, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_cross_gram_multiplies_projected_rows_as_they_are(tmp_path: Path, on_disk: bool) -> None:
    """The model runs in reduced precision there, as it is asked to; its rows are not rounded again."""
    net, R, out = model(), attribution.Projection(16), tmp_path if on_disk else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (persample.gradients(net, LOSS, *data(n)).project(R) for n in (N, M))
        found = attribution.cross_gram(net, LOSS, [data(N)], [data(M)], projection=R, out=out)
    torch.testing.assert_close(found, a @ b.mT, rtol=1e-6, atol=1e-6)


def test_inner_products_of_features_can_be_differentiated() -> None:
    a, b = (torch.randn(n, 4, requires_grad=True) for n in (N, M))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = attribution.grad_dot(a, b)
    (grad,) = torch.autograd.grad(scores.sum(), a)
    torch.testing.assert_close(grad, b.detach().sum(0).expand(N, 4))


COUPLED: dict[str, Callable[[persample.Coupling], Any]] = {
    name: lambda C, name=name: getattr(C, name)()
    for name in ("adjoints", "statistic_influence", "leave_one_out", "effective_losses", "noise", "loss_norms", "norms")
} | {
    "column": lambda C: C.column(2).flat(),
    "row": lambda C: C.row(2).flat(),
    "via_statistics": lambda C: C.via_statistics().flat(),
    "ggn": lambda C: C.ggn().dense(),
    **{kind: lambda C, kind=kind: C.gradients(kind).flat() for kind in ("loss", "influence", "copy", "frozen")},
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("n", [4, 12])
def test_couplings(name: str, n: int) -> None:
    """Made outside, asked inside; with fewer and with more samples than statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)
    )
    outside, inside = (persample.coupling(net, LOSS, *data(n)) for _ in range(2))
    expected = COUPLED[name](outside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = COUPLED[name](inside)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_scaled_loss_under_a_handle() -> None:
    """What docs/losses.md says of a GradScaler: in the rows, and taken out by a function of its scale."""
    net, (x, y), rows = model(), data(N), list[Tensor]()
    expected = persample.gradients(net, LOSS, x, y).flat()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for reduction, factor in (("mean", 1024), (lambda: scaler.get_scale() / N, 1)):
        handle = persample.extend(net, on_backward=lambda G: rows.append(G.flat()), reduction=reduction)
        scaler.scale(LOSS(net(x), y)).backward()
        handle.remove()
        torch.testing.assert_close(rows.pop(), factor * expected)


# ---- parameters in single precision, of which some calls compute in less -----------------------------------------


class Bare(nn.Module):
    """A function of a layer's outputs and parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(8, 8), function
        self.p = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x), *self.p)


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.float().flatten(1).square().sum(1)


def alone(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Rows by autograd, of every sample by itself."""
    named = dict(model.named_parameters())
    grads = [torch.autograd.grad(squares(model(one), None).sum(), list(named.values())) for one in x.split(1)]
    return {name: torch.stack(column) for name, column in zip(named, zip(*grads, strict=True), strict=True)}


def agree(G: Any, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, rows in expected.items():
        assert G[name].dtype == G.mean()[name].dtype == rows.dtype == torch.float32
        assert float((G[name] - rows).norm()) <= tolerance * float(rows.norm())


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(8),
    "rms": lambda: nn.RMSNorm(8, eps=1e-5),
    "group": lambda: nn.GroupNorm(2, 8),
    "instance": lambda: nn.InstanceNorm1d(8, affine=True),
    "batch": lambda: nn.BatchNorm1d(8).eval(),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, of RMSNorm
@pytest.mark.parametrize("name", NORMS)
def test_rows_of_gains_are_in_single_precision(name: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv1d(8, 8, 1) if name in ("group", "instance", "batch") else nn.Linear(8, 8)
    net, x = nn.Sequential(first, NORMS[name]()), torch.randn(6, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        G, expected = persample.gradients(net, squares, x), alone(net, x)
        S = persample.gradients(net, squares, x, quantities=["mean"])
    assert S.mean()["1.weight"].dtype == torch.float32
    agree(G, expected, 2e-2)
    error = (G["1.weight"] - expected["1.weight"]).norm() / expected["1.weight"].norm()
    assert float(error) < (1e-2 if name == "layer" else 1e-5)  # torch's own rounds products of LayerNorm


SEVERAL: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "einsum": (lambda h, p: torch.einsum("ntd,dhe->nthe", h, p), (8, 2, 4)),
    "einsum with an ellipsis": (lambda h, p: torch.einsum("...d,de->...e", h, p), (8, 3)),
    "a matrix for each head": (lambda h, p: p @ h.unflatten(1, (5, 1)).mT, (5, 3, 8)),
    "bmm": (lambda h, p: torch.bmm(h, p.expand(len(h), -1, -1)), (1, 8, 3)),
    "attention": (lambda h, p: F.scaled_dot_product_attention(h, p.expand(len(h), -1, -1), h), (5, 8)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_functions_of_arguments_in_several_types(name: str) -> None:
    """Activations are in half precision there, parameters are not."""
    function, shape = SEVERAL[name]
    net, x = Bare(function, shape), torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(persample.gradients(net, squares, x), alone(net, x), 2e-2)


@pytest.mark.parametrize("gain", ["weight_norm", "product"])
def test_scaled_weights_of_convolutions(gain: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Conv1d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 5, 2)))
    if gain == "product":
        net = Bare(lambda h, w, g: F.conv1d(h, w * g), (5, 5, 2), (5, 1, 1))
    x = torch.randn(6, 8 if gain == "weight_norm" else 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(persample.gradients(net, squares, x), alone(net, x), 2e-2)
        S = persample.gradients(net, squares, x, quantities=["norm", "variance"])
    assert all(v.isfinite().all() for v in S.variance().values())
