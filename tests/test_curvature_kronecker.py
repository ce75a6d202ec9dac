"""Kronecker factors against their formulas on tokens found independently, and against dense Gauss-Newton blocks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from persample import extend
from persample.curvature import Kronecker, ekfac, empirical_fisher, fisher, ggn, kfac, kflr, kfra
from persample.errors import ArgumentError, BatchCoupledError, KroneckerError, LossError, VerificationError

N = 5


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


X, VALUES, LABELS = tensor(1, N, 3), tensor(2, N, 2), torch.tensor([0, 1, 1, 0, 1])
SEQUENCES = tensor(3, N, 4, 3)
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))


def linear_net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def blockwise(dense: Tensor, k: Kronecker) -> Tensor:
    """``dense`` with everything between different blocks set to zero."""
    owner = {name: i for i, block in enumerate(k.blocks.values()) for name in block.layer.shapes}
    index = torch.cat([torch.full((k.shapes[name].numel(),), owner[name]) for name in k.names])
    return dense * (index[:, None] == index)


# ---- where the approximation is exact -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", ["joined", "apart"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_exact_for_deep_linear_networks_with_squared_loss(approximation: str, bias: str, reduction: str) -> None:
    model = linear_net()
    k = kfac(model, MSE, X, VALUES, type="exact", approximation=approximation, bias=bias, reduction=reduction)
    assert k.names == tuple(dict(model.named_parameters()))
    assert k.uncovered == {}
    assert len(k.blocks) == (3 if bias == "joined" else 5)
    close(k.dense(), blockwise(ggn(model, MSE, X, VALUES, reduction=reduction).dense(), k))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expand_is_exact_where_the_loss_is_a_sum_over_positions(reduction: str) -> None:
    model, targets = linear_net(), tensor(4, N, 4, 2)
    k = kflr(model, MSE, SEQUENCES, targets, reduction=reduction)
    exact = blockwise(ggn(model, MSE, SEQUENCES, targets, reduction=reduction).dense(), k)
    close(k.dense(), exact)
    assert (
        kflr(model, MSE, SEQUENCES, targets, approximation="reduce", reduction=reduction).dense() - exact
    ).norm() > 0.1 * exact.norm()


def test_reduce_is_exact_where_the_network_averages_over_positions() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Mean(), nn.Linear(4, 2)))
    k = kflr(model, MSE, SEQUENCES, VALUES, approximation="reduce")
    exact = blockwise(ggn(model, MSE, SEQUENCES, VALUES).dense(), k)
    close(k.dense(), exact)
    assert (kflr(model, MSE, SEQUENCES, VALUES, approximation="expand").dense() - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(2, 4, (2, 1), stride=(1, 2), padding=1, groups=2),
        lambda: nn.ConvTranspose2d(2, 4, 2, stride=2, padding=1, output_padding=1, groups=2),
    ],
)
def test_convolutions_are_exact_for_one_sample_and_one_position_summed(layer: Callable[[], nn.Module]) -> None:
    """A convolution averaged over its positions is a deep linear network in the reduce setting."""
    model = seeded(lambda: nn.Sequential(layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    images = tensor(5, N, 2, 3, 3)
    k = kflr(model, MSE, images, VALUES, approximation="reduce")
    close(k.blocks["0.weight"].dense(), per_group(ggn(model, MSE, images, VALUES, params="0").dense(), model[0]))


def per_group(dense: Tensor, conv: Any) -> Tensor:
    """The blocks of every group: entries whose weights (and biases) lie in the same one."""
    channels = conv.weight.shape[0]
    group = torch.arange(channels) // (channels // conv.groups)
    index = torch.cat(
        [
            group.repeat_interleave(conv.weight[0].numel()),
            torch.arange(conv.out_channels) // (conv.out_channels // conv.groups),
        ]
    )
    return dense * (index[:, None] == index)


# ---- the formulas, on tokens found by differentiation ---------------------------------------------------------------


def layer_tokens(layer: Any, x: Tensor) -> Tensor:
    """``[N, K, T, I]``: how the first output feature of each group depends on its weights, at every position."""
    n, out = len(x), layer(x)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.Linear):
        return x.reshape(n, 1, -1, x.shape[-1])
    positions = out.flatten(2).shape[2]
    found = []
    for k in range(groups):
        feature = k * layer.out_channels // groups
        rows = []
        for value in out[:, feature].reshape(-1):
            (g,) = torch.autograd.grad(value, layer.weight, retain_graph=True)
            g = g.unflatten(0, (groups, -1))[k]
            rows.append((g[:, 0] if transposed else g[0]).flatten())
        found.append(torch.stack(rows).view(n, positions, -1))
    return torch.stack(found, 1)


def output_gradients(model: nn.Sequential, index: int, loss_fn: Any, x: Tensor, y: Tensor) -> Tensor:
    """``[N, K, T, O]``: gradients of the losses with respect to a layer's outputs."""
    layer: Any = model[index]
    out = model[: index + 1](x).detach().requires_grad_()
    losses = torch.stack([loss_fn(model[index + 1 :](out[n : n + 1]), y[n : n + 1]) for n in range(len(x))])
    (g,) = torch.autograd.grad(losses.sum(), out)
    if isinstance(layer, nn.Linear):
        return g.reshape(len(x), 1, -1, g.shape[-1])
    return g.flatten(2).unflatten(1, (layer.groups, -1)).mT


def by_formula(a: Tensor, delta: Tensor, approximation: str, bias: bool) -> tuple[Tensor, Tensor]:
    """``A`` and ``G`` for reduction "mean"."""
    n, _, t, _ = a.shape
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a
    if approximation == "expand":
        return torch.einsum("nkti,nktj->kij", a, a) / (n * t), torch.einsum("nkto,nktp->kop", delta, delta) / n
    a, delta = a.mean(2), delta.sum(2)
    return torch.einsum("nki,nkj->kij", a, a) / n, torch.einsum("nko,nkp->kop", delta, delta) / n


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_empirical_factors_of_a_perceptron(approximation: str) -> None:
    model = mlp()
    k = kfac(model, CE, X, LABELS, type="empirical", approximation=approximation)
    hidden = model[:2](X).detach()
    slope = (F.softmax(model(X), 1) - F.one_hot(LABELS, 2)).detach()
    delta = (slope @ model[2].weight.detach()) * (1 - hidden.square())
    inputs = torch.cat([X, torch.ones(N, 1)], 1)
    close(k.blocks["0.weight"].inputs[0], inputs.T @ inputs / N, 1e-12)
    close(k.blocks["0.weight"].gradients[0], delta.T @ delta / N, 1e-12)
    close(k.blocks["2.weight"].inputs[0], hidden.T @ hidden / N, 1e-12)
    close(k.blocks["2.weight"].gradients[0], slope.T @ slope / N, 1e-12)
    close(k.blocks["2.weight"].dense(), torch.kron(slope.T @ slope / N, hidden.T @ hidden / N), 1e-12)
    summed = kfac(model, CE, X, LABELS, type="empirical", approximation=approximation, reduction="sum")
    close(summed.dense(), N * k.dense(), 1e-12)


geometry = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 1),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2), st.booleans(), geometry, st.sampled_from(["expand", "reduce"]), st.integers(0, 1))
def test_convolutions_are_linear_layers_on_unfolded_inputs(
    dims: int, transposed: bool, options: dict[str, Any], approximation: str, output_padding: int
) -> None:
    if transposed:
        options["output_padding"] = (
            output_padding if output_padding < max(options["stride"], options["dilation"]) else 0
        )
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    x = tensor(6, 2, 2, *[6, 5][:dims])
    model: Any = seeded(lambda: nn.Sequential(kind(2, 4, **options), nn.Tanh(), nn.Flatten()))
    if any(length < 1 for length in model[:1](x).shape):
        return
    model.append(nn.Linear(model(x).shape[1], 2).double())
    y = tensor(7, 2, 2)
    k = kfac(model, MSE, x, y, type="empirical", approximation=approximation)
    a, delta = layer_tokens(model[0], x), output_gradients(model, 0, MSE, x, y)
    expected = by_formula(a, delta, approximation, options["bias"])
    close(k.blocks["0.weight"].inputs, expected[0])
    close(k.blocks["0.weight"].gradients, expected[1])


def test_three_dimensional_and_padded_convolutions() -> None:
    model: Any = seeded(
        lambda: nn.Sequential(
            nn.Conv3d(2, 2, 2, padding="same", padding_mode="circular"), nn.Flatten(), nn.Linear(16, 2)
        )
    )
    x = tensor(8, 2, 2, 2, 2, 2)
    k = kfac(model, MSE, x, VALUES[:2], type="empirical")
    expected = by_formula(layer_tokens(model[0], x), output_gradients(model, 0, MSE, x, VALUES[:2]), "expand", True)
    close(k.blocks["0.weight"].inputs, expected[0])
    close(k.blocks["0.weight"].gradients, expected[1])


def test_a_transposed_convolution_is_its_dense_matrix() -> None:
    """With a kernel of one: the factors of the equivalent matrix on tokens."""
    conv = seeded(
        lambda: nn.ConvTranspose1d(3, 2, 1, bias=False)
    )  # a kernel of one: the very same matrix at every position
    x, y = tensor(9, N, 3, 4), tensor(10, N, 2, 4)
    dense = nn.Linear(3, 2, bias=False).double()
    dense.weight.data = conv.weight.data[:, :, 0].T.clone()
    a = kflr(nn.Sequential(conv), MSE, x, y).blocks["0.weight"]
    b = kflr(nn.Sequential(dense), MSE, x.mT, y.mT).blocks["0.weight"]
    close(a.inputs, b.inputs)
    close(a.gradients, b.gradients)


def test_strided_transposed_convolution_without_overlap_is_a_linear_layer() -> None:
    """Kernel equal to stride: every output position has one input position and one kernel offset."""
    conv = seeded(lambda: nn.ConvTranspose1d(3, 2, 2, stride=2, bias=False))
    x = tensor(11, N, 3, 2)
    a = kfac(nn.Sequential(conv, nn.Flatten()), MSE, x, tensor(12, N, 8), type="empirical").blocks["0.weight"].inputs[0]
    moment = torch.einsum("nip,njp->ij", x, x) / (N * 4)  # 4 output positions, each offset sees half of them
    close(a.view(3, 2, 3, 2)[:, 0, :, 0], moment)
    close(a.view(3, 2, 3, 2)[:, 1, :, 1], moment)
    close(a.view(3, 2, 3, 2)[:, 0, :, 1], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_expand_and_reduce_coincide_without_sharing(kind: str) -> None:
    model = mlp()
    a, b = (kfac(model, CE, X, LABELS, type=kind, approximation=name).dense() for name in ("expand", "reduce"))
    close(a, b, 1e-13)


def test_sequences_by_formula() -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), Mean(), nn.Linear(4, 2)))
    reference: Any = nn.Sequential(model[0], nn.ReLU(), *model[2:])
    for approximation in ("expand", "reduce"):
        k = kfac(model, CE, SEQUENCES, LABELS, type="empirical", approximation=approximation)
        expected = by_formula(
            SEQUENCES.unsqueeze(1), output_gradients(reference, 0, CE, SEQUENCES, LABELS), approximation, True
        )
        close(k.blocks["0.weight"].inputs, expected[0])
        close(k.blocks["0.weight"].gradients, expected[1])


def test_flattened_tokens_belong_to_their_samples() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.reshape(-1, 3)).tanh().view(len(x), -1, 4).mean(1))

    model = seeded(Flat)
    straight = nn.Sequential(model.a, nn.Tanh(), Mean(), model.b)
    for approximation in ("expand", "reduce"):
        a = kfac(model, CE, SEQUENCES, LABELS, type="empirical", approximation=approximation)
        b = kfac(straight, CE, SEQUENCES, LABELS, type="empirical", approximation=approximation)
        close(a.dense(), b.dense(), 1e-13)


def test_a_weight_used_twice_is_shared_over_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x).tanh())

    model = seeded(Twice)
    y = tensor(13, N, 3)
    first = X
    second = model.a(first).tanh()
    tokens = torch.stack([first, second], 1).detach()
    hidden = model.a(first).detach().requires_grad_()
    out = model.a(hidden.tanh())
    delta = torch.autograd.grad(MSE(out, y) * N, [hidden, out])
    for approximation in ("expand", "reduce"):
        k = kfac(model, MSE, X, y, type="empirical", approximation=approximation)
        expected = by_formula(tokens.unsqueeze(1), torch.stack(delta, 1).unsqueeze(1), approximation, True)
        close(k.blocks["a.weight"].inputs, expected[0])
        close(k.blocks["a.weight"].gradients, expected[1])


# ---- output gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_fn", "y"), [(CE, LABELS), (MSE, VALUES), (nn.BCEWithLogitsLoss(), LABELS.double()[:, None].repeat(1, 2))]
)
def test_exact_is_the_mean_of_mc(loss_fn: Any, y: Tensor) -> None:
    model = mlp()
    exact = kfac(model, loss_fn, X, y, type="exact")
    samples = 100

    def make(seed: int) -> Kronecker:
        return kfac(model, loss_fn, X, y, samples=samples, generator=torch.Generator().manual_seed(seed))

    drawn, same, other = make(0), make(0), make(1)
    close(drawn.dense(), same.dense(), 1e-14)
    for name, block in exact.blocks.items():
        close(drawn.blocks[name].inputs, block.inputs, 1e-14)
        a, b, c = drawn.blocks[name].gradients, block.gradients, other.blocks[name].gradients
        assert (a - b).norm() < 6 / math.sqrt(samples) * b.norm()
        assert (a - c).norm() > 1e-6


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_draws_without_a_generator_are_new_ones_every_time(make: Any) -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, other = make(model, CE, X, LABELS), make(model, CE, X, LABELS)
    assert not torch.equal(torch.get_rng_state(), state)
    assert (one.dense() - other.dense()).norm() > 1e-3
    torch.manual_seed(11)
    close(make(model, CE, X, LABELS).dense(), one.dense(), 1e-14)
    close(make(model, CE, X, LABELS).dense(), other.dense(), 1e-14)


def test_draws_without_a_generator_are_right_in_the_mean() -> None:
    model, draws = mlp(), 200
    exact = kflr(model, CE, X, LABELS).dense()
    mean = sum(kfac(model, CE, X, LABELS, verify=False).dense() for _ in range(draws)) / draws
    assert (mean - exact).norm() < 6 / math.sqrt(draws * N) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [kflr, kfra, lambda *args: ekfac(*args, type="exact")])
def test_half_precision(make: Any, dtype: torch.dtype) -> None:
    model = mlp()
    for loss_fn, y in ((CE, LABELS), (MSE, VALUES)):
        exact = make(model, loss_fn, X, y).dense()
        rough = make(mlp().to(dtype), loss_fn, X.to(dtype), y.to(dtype) if y.is_floating_point() else y)
        assert rough.dtype == torch.float32
        assert (rough.dense() - exact).norm() < 0.03 * exact.norm()
        v = tensor(22, len(exact))
        solved = torch.linalg.solve(exact + torch.eye(len(exact)), v)
        assert (rough.solve(v, 1.0) - solved).norm() < 0.03 * solved.norm()


@pytest.mark.parametrize("make", [kflr, kfra, lambda *args: ekfac(*args, type="exact")])
def test_a_loss_without_curvature_has_a_zero_matrix(make: Any) -> None:
    model = mlp()
    k = make(model, nn.L1Loss(), X, VALUES)
    assert k.names == tuple(dict(model.named_parameters()))
    close(k.dense(), ggn(model, nn.L1Loss(), X, VALUES).dense())
    close(k.dense(), torch.zeros(k.shape, dtype=torch.float64))
    inputs = kfac(model, CE, X, LABELS, type="empirical")
    close(k.blocks["0.weight"].inputs, inputs.blocks["0.weight"].inputs)


def test_what_is_not_finite_is_named() -> None:
    model, x = mlp(), X.clone()
    x[0, 0] = math.nan
    for make in (kfac, kflr, kfra, ekfac):
        with pytest.raises(LossError, match=r"Hessian of the losses .* NaN or infinite"):
            make(model, CE, x, LABELS)
    with pytest.raises(KroneckerError, match=r"factors of '0.weight' .* NaN or infinite"):
        ekfac(model, CE, x, LABELS, type="empirical")
    k = kfac(model, CE, x, LABELS, type="empirical")
    with pytest.raises(KroneckerError, match=r"factors of '0.weight' .* NaN or infinite"):
        k.solve(tensor(23, k.shape[0]), 1.0)


def test_exact_uses_the_hessian_of_any_convex_loss() -> None:
    model = mlp()

    def convex(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).pow(4).sum(1) + f.logsumexp(1)

    k = kflr(model, convex, X, VALUES)
    f = model(X).detach().requires_grad_()
    g = torch.autograd.grad(convex(f, VALUES).sum(), f, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(g[:, c].sum(), f, retain_graph=True)[0] for c in range(2)], 1)
    close(k.blocks["2.weight"].gradients[0], hessian.mean(0))
    with pytest.raises(LossError, match="not convex"):
        kflr(model, lambda f, y: f.prod(1), X, VALUES)
    with pytest.raises(LossError, match="not the negative log-likelihood"):
        kfac(model, convex, X, VALUES, type="mc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [kflr, kfra])
def test_a_little_negative_curvature_is_no_rounding(dtype: torch.dtype, make: Any) -> None:
    """Of far outliers under a Cauchy loss, far below the curvature of their neighbours at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
    with torch.no_grad():
        model[0].bias += 60
    x, y = torch.randn(8, 3, dtype=dtype), torch.zeros(8, 2, dtype=dtype)
    with pytest.raises(LossError, match=r"not convex .* eigenvalue -0\.0005"):
        make(model, lambda o, t: (o - t).square().log1p().sum(1), x, y)


def _weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A weight of a square, and one of what is not convex beyond 1, with curvature ``2 (1 - f^2) / (1 + f^2)^2``."""
    return targets[:, 0] * outputs[:, 0].square() + targets[:, 1] * outputs[:, 0].square().log1p()


@pytest.mark.parametrize(("dtype", "large"), [(torch.float64, 1e13), (torch.float32, 2e3)])
def test_a_sample_that_is_not_convex_is_not_hidden_behind_another(dtype: torch.dtype, large: float) -> None:
    model = nn.Linear(2, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    x, y = torch.tensor([[1e-3, 0.0], [1.5, 0.0]]).to(dtype), torch.tensor([[large, 0.0], [0.0, 1.0]]).to(dtype)
    with pytest.raises(LossError, match=r"not convex .* eigenvalue -0\.237"):
        kflr(model, _weighted, x, y)
    close(kflr(model, _weighted, x[:1], y[:1]).dense()[0, 0], ggn(model, _weighted, x[:1], y[:1]).dense()[0, 0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [kflr, kfra, partial(ekfac, type="exact")])
def test_classifiers_that_are_sure_are_convex(make: Any, dtype: torch.dtype) -> None:
    """Their Hessians are nothing but rounding errors, of numbers that are much larger."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).to(dtype)
        with torch.no_grad():
            model[2].weight.mul_(10 ** (2 * torch.rand(())))
        k = make(model, CE, X[seed % N :][:1].to(dtype), LABELS[:1], verify=False)
        exact = ggn(model, CE, X[seed % N :][:1].to(dtype), LABELS[:1]).dense()
        scale = model[2].weight.square().sum().detach() + 1  # of what a curvature of 1 at the outputs gives
        assert (k.blocks["2.weight"].dense() - exact[16:, 16:]).abs().max() < 1e2 * torch.finfo(dtype).eps * scale


def test_hessians_of_denormal_numbers() -> None:
    """Of many classes, in float32, where LAPACK's first choice doesn't converge."""
    torch.manual_seed(0)
    model = nn.Linear(3, 251)
    with torch.no_grad():
        model.weight.mul_(100)
    x, y = X.float(), torch.randint(251, (N,))
    exact = torch.vmap(torch.func.hessian(lambda f, t: F.cross_entropy(f, t)))(model(x).double().detach(), y).mean(0)
    close(kflr(model, CE, x, y).blocks["weight"].gradients[0].double(), exact, 1e-5)


# ---- KFRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfra_is_its_recursion(reduction: str) -> None:
    model: Any = seeded(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), nn.Sigmoid(), nn.Linear(3, 2))
    )
    k = kfra(model, CE, X, LABELS, reduction=reduction)
    h1 = model[0](X)
    h2 = model[1][1](h1.tanh())
    p = model(X).softmax(1)
    third = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    slope2 = h2.sigmoid() * (1 - h2.sigmoid())
    second = (model[3].weight.T @ third @ model[3].weight) * (slope2.T @ slope2 / N)
    slope1 = 1 - h1.tanh().square()
    first = (model[1][1].weight.T @ second @ model[1][1].weight) * (slope1.T @ slope1 / N)
    scale = 1 if reduction == "mean" else N
    for name, expected in {"0.weight": first, "1.1.weight": second, "3.weight": third}.items():
        close(k.blocks[name].gradients[0], scale * expected.detach())
    inputs = torch.cat([X, torch.ones(N, 1)], 1)
    close(k.blocks["0.weight"].inputs[0], inputs.T @ inputs / N)


@pytest.mark.parametrize("bias", ["joined", "apart"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kfra_of_one_sample_is_kflr(approximation: str, bias: str) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 2, 2), nn.MaxPool2d(2),
            nn.Flatten(2), nn.Linear(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2),
        )
    )  # fmt: skip
    x = tensor(14, 1, 2, 3, 3)
    a = kfra(model, CE, x, LABELS[:1], approximation=approximation, bias=bias)
    b = kflr(model, CE, x, LABELS[:1], approximation=approximation, bias=bias)
    assert a.blocks.keys() == b.blocks.keys()
    close(a.dense(), b.dense())


@pytest.mark.parametrize("given", [(X,), [X], {"input": X}], ids=["tuple", "list", "dict"])
def test_kfra_takes_the_one_input_however_it_is_given(given: Any) -> None:
    close(kfra(mlp(), CE, given, LABELS).dense(), kfra(mlp(), CE, X, LABELS).dense())


@pytest.mark.parametrize("loss_fn", [nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("make", [kfac, ekfac, fisher, ggn, kfra])
def test_outputs_without_an_axis_are_those_with_one(make: Any, type: str, loss_fn: nn.Module) -> None:
    y = LABELS.double()
    wide = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    flat = nn.Sequential(*wide, nn.Flatten(0))
    more = {} if make in (ggn, kfra) else {"type": type, "generator": torch.Generator().manual_seed(1)}
    if make is fisher and type == "empirical":
        make, more = empirical_fisher, {}
    found = make(flat, loss_fn, X, y, **more).dense()
    if "generator" in more:
        more["generator"].manual_seed(1)
    close(found, make(wide, loss_fn, X, y.unsqueeze(1), **more).dense())


def test_kfra_through_outputs_of_one_number() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0), nn.Tanh()))
    alike = nn.Sequential(model[0], nn.Tanh())  # type: ignore[index]
    close(kfra(model, MSE, X, VALUES[:, 0]).dense(), kfra(alike, MSE, X, VALUES[:, :1]).dense())


class Named(nn.Module):
    """One output under two names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layer, self.names = nn.Linear(3, 2), names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.layer(x))


@pytest.mark.parametrize("type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("make", [kfac, ekfac, fisher, ggn, empirical_fisher])
def test_one_output_under_two_names_is_one_output(make: Any, type: str) -> None:
    def both(out: dict[str, Tensor], y: Tensor) -> Tensor:
        logits = (out["logits"] + out[max(out)]) / 2
        return F.cross_entropy(logits, y, reduction="none")

    found = []
    for names in (("logits",), ("logits", "scores")):
        more = {"type": type, "generator": torch.Generator().manual_seed(1)}
        if make in (ggn, empirical_fisher):
            more = {}
        elif make is fisher:
            more["type"] = "mc" if type == "mc" else "exact"
        found.append(make(seeded(lambda names=names: Named(names)), both, X, LABELS, **more).dense())
    close(*found)


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).float(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.float())).double())

    def double(self) -> TwoTypes:
        self.b.double()
        return self


@pytest.mark.parametrize("make", [kfac, kflr, ekfac])
def test_layers_of_two_types(make: Any) -> None:
    k = make(seeded(TwoTypes), CE, X, LABELS)
    dense = k.dense()
    assert k.dtype == dense.dtype == torch.float64 and k.blocks["a.weight"].inputs.dtype == torch.float32
    size, v = len(dense), torch.linspace(-1, 1, len(dense), dtype=torch.float64)
    close(dense[:16, 16:], torch.zeros(16, size - 16, dtype=torch.float64))
    close(dense[:16, :16], k.blocks["a.weight"].dense().double(), 1e-6)
    close(k @ v, dense @ v, 1e-6)
    close((dense + 0.1 * torch.eye(size)) @ k.solve(v, 0.1), v, 1e-5)


def test_kfra_refuses_what_is_no_sequence() -> None:
    shared = nn.Linear(3, 3).double()
    with pytest.raises(KroneckerError, match=r"needs an nn\.Sequential, got Linear"):
        kfra(shared, MSE, X, X)
    with pytest.raises(KroneckerError, match="used twice"):
        kfra(nn.Sequential(shared, nn.Tanh(), shared), MSE, X, X)
    block = nn.Sequential(
        nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 1, 4, dropout=0, batch_first=True), nn.Flatten()
    ).double()
    with pytest.raises(
        KroneckerError, match=r"'1\..*' does not belong to a linear or convolution module of the sequence"
    ):
        kfra(block, MSE, SEQUENCES, tensor(15, N, 16))


def test_kfra_behind_batch_norm_and_in_place_modules() -> None:
    model: Any = seeded(
        lambda: nn.Sequential(
            nn.ReLU(inplace=True), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
        )
    )
    x, statistics = X.clone(), model[2].running_mean.clone()
    k = kfra(model, CE, x, LABELS, params=r"[35]\.")
    assert torch.equal(x, X) and torch.equal(model[2].running_mean, statistics)
    h = copy.deepcopy(model[:3])(X.clone()).detach()
    close(k.dense(), kfra(model[3:], CE, h, LABELS).dense())


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize(("place", "named"), [("", "the model"), ("0", "module '0'"), ("0.1", r"module '0\.1'")])
def test_kfra_refuses_hooks(place: str, named: str, register: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)))
    expected = kfra(model, MSE, X, VALUES).dense()
    handle = getattr(model.get_submodule(place), f"register_{register}_hook")(lambda *_: None)
    with pytest.raises(KroneckerError, match=rf"^{named} has a hook .* use kflr"):
        kfra(model, MSE, X, VALUES)
    handle.remove()
    with extend(model):
        close(kfra(model, MSE, X, VALUES).dense(), expected)


# ---- EKFAC, solving -------------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 2), nn.Flatten(), nn.Linear(6, 2)
        )
    )


SIGNALS = tensor(16, N, 2, 3)


@pytest.mark.parametrize("bias", ["joined", "apart"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("kind", "matrix"), [("empirical", empirical_fisher), ("exact", ggn)])
def test_ekfac_eigenvalues_are_second_moments_in_the_eigenbasis(
    kind: str, matrix: Any, approximation: str, bias: str
) -> None:
    model = mixed()
    k = ekfac(model, CE, SIGNALS, LABELS, type=kind, approximation=approximation, bias=bias)
    plain = kfac(model, CE, SIGNALS, LABELS, type=kind, approximation=approximation, bias=bias)
    for name, block in k.blocks.items():
        close(block.inputs, plain.blocks[name].inputs)
        layer = block.layer
        dense = matrix(model, CE, SIGNALS, LABELS, params=list(layer.shapes)).dense()
        size = [block.gradients.shape[1], block.inputs.shape[1]]
        values = torch.empty_like(block.eigenvalues)
        for g in range(layer.groups):
            for o in range(size[0]):
                for i in range(size[1]):
                    direction = torch.zeros(1, layer.groups, *size, dtype=torch.float64)
                    direction[0, g] = torch.outer(block.bases[0][g, :, o], block.bases[1][g, :, i])
                    parts = layer.parameters(direction)
                    v = torch.cat([parts[n].flatten() for n in layer.shapes])
                    values[g, o, i] = v @ dense @ v
        close(block.eigenvalues, values)
    exact = matrix(model, CE, SIGNALS, LABELS).dense()
    target = blockwise(exact, k)
    assert (k.dense() - target).norm() < (plain.dense() - target).norm()


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf, "a", torch.ones(2)])
def test_a_damping_is_a_number(damping: Any) -> None:
    k = kfac(mlp(), CE, X, LABELS, type="empirical")
    with pytest.raises(ArgumentError, match="damping must be a number of 0 or more"):
        k.solve(torch.ones(k.shape[0], dtype=torch.float64), damping)


@pytest.mark.parametrize("bias", ["joined", "apart"])
@pytest.mark.parametrize("make", [kfac, ekfac])
def test_products_and_solutions_are_those_of_the_dense_matrix(make: Any, bias: str) -> None:
    model = mixed()
    k = make(model, CE, SIGNALS, LABELS, type="empirical", bias=bias)
    dense, size = k.dense(), sum(p.numel() for p in model.parameters())
    assert k.shape == dense.shape == (size, size)
    close(dense, dense.T)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
    v, matrix = tensor(17, size), tensor(18, size, 3)
    close(k @ v, dense @ v)
    close(k @ matrix, dense @ matrix)
    for damping in (1e-3, 1.0):
        damped = dense + damping * torch.eye(size, dtype=torch.float64)
        close(k.solve(v, damping), torch.linalg.solve(damped, v))
        close(k.solve(matrix, damping), torch.linalg.solve(damped, matrix))
    named = {name: tensor(19, *p.shape) for name, p in model.named_parameters()}
    flat = torch.cat([x.flatten() for x in named.values()])
    solved = k.solve(named, 0.1)
    close(torch.cat([solved[name].flatten() for name in named]), k.solve(flat, 0.1))
    close(torch.as_tensor(k.to_scipy() @ v.numpy()), dense @ v)
    with pytest.raises(ValueError, match="damping must be a number of 0 or more"):
        k.solve(v, -1.0)


def test_undamped_where_the_blocks_are_regular() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2)))
    k = kflr(model, MSE, X, VALUES)
    v = tensor(20, 8)
    close(k @ k.solve(v, 0.0), v)
    few = kfac(model, MSE, X[:2], VALUES[:2], type="empirical")
    with pytest.raises(KroneckerError, match=r"block of '0.weight' is singular: give a damping > 0"):
        few.solve(v, 0.0)


def test_blocks_assemble_to_the_whole() -> None:
    model = mixed()
    k = kfac(model, CE, SIGNALS, LABELS, type="empirical")
    close(torch.block_diag(*(block.dense() for block in k.blocks.values())), k.dense())
    last = k.blocks["4.weight"]
    joined = torch.kron(last.gradients[0], last.inputs[0])  # bias as the last column of each row
    order = torch.cat([torch.arange(14).view(2, 7)[:, :6].flatten(), torch.tensor([6, 13])])
    close(last.dense(), joined[order][:, order])


# ---- what is covered, and what is refused --------------------------------------------------------------------------


class Assorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0]) * self.scale
        x = self.normalised(x) + F.linear(x, self.shared.weight)
        return F.linear(self.shared(x.mean(1)), self.embedding.weight)


TEXT = torch.randint(5, (N, 3), generator=torch.Generator().manual_seed(21))


def test_parameters_without_factors_are_listed_with_a_reason() -> None:
    model = seeded(Assorted)
    labels = TEXT[:, 0]
    k = kfac(model, CE, TEXT, labels, type="empirical")
    assert "attention.out_proj.weight" in k.names  # used functionally, inside of one call
    for name, reason in {
        "embedding.weight": "used by torch.nn.functional.embedding|different ways",
        "norm.weight": "layer_norm",
        "scale": "used by",
        "normalised.parametrizations.weight.original0": "something computed from it",
        "shared.weight": "different ways, or with different biases",
        "shared.bias": "used elsewhere too",
        "idle.weight": "no loss depends on it",
    }.items():
        assert name not in k.names
        assert any(part in k.uncovered[name] for part in reason.split("|")), k.uncovered[name]
    everything = {name for name, _ in model.named_parameters()}
    assert set(k.names) | set(k.uncovered) == everything
    assert not set(k.names) & set(k.uncovered)
    assert f"without {len(k.uncovered)} parameters" in repr(k)
    with pytest.raises(KroneckerError, match=r"'norm.weight' has no Kronecker factors: it is used by .*layer_norm"):
        kfac(model, CE, TEXT, labels, type="empirical", params=r"norm\..*|attention.out_proj.weight")
    with pytest.raises(KroneckerError, match="none of the chosen parameters"):
        kfac(nn.LayerNorm(3).double(), MSE, X, X, type="empirical")


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


class Pyramid(nn.Module):
    """One convolution at two resolutions, one layer of halves of the batch, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(3, 3, 3), nn.Linear(3, 2)
        self.halves, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (self.conv(z).mean(2) for z in (x, x[:, :, ::2]))
        h = torch.cat([self.halves(low[:3]), self.halves(low[3:])]) + high
        return self.last(h.tanh() + _Nothing.apply(self.idle(h)))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 2, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.view_as_real(self.layer(x + 1j)).flatten(1))


def test_reasons_are_true() -> None:
    model = seeded(Pyramid)
    k = kfac(model, CE, tensor(3, N, 3, 9), LABELS, type="empirical")
    assert k.names == ("last.weight", "last.bias")
    for name, reason in {"conv": "used 2 times, in ways", "halves": "picked out", "idle": "no loss depends"}.items():
        assert all(reason in k.uncovered[f"{name}.{which}"] for which in ("weight", "bias")), k.uncovered
    k = kflr(Complex(), MSE, X, VALUES)
    assert k.names == ("last.weight", "last.bias")
    assert all("it is complex" in k.uncovered[f"layer.{which}"] for which in ("weight", "bias"))


class Broadcast(nn.Module):
    """A linear layer whose bias is of any shape that broadcasts with its outputs."""

    def __init__(self, shape: tuple[int, ...], function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn((2, 3) if function is F.linear else (3, 2)))
        self.bias = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if x.ndim > 2 else x  # what is contiguous goes to addmm, which takes fewer shapes
        given = (x, self.weight, self.bias) if self.function is F.linear else (self.bias, x, self.weight)
        return self.function(*given)


@pytest.mark.parametrize(
    ("shape", "function", "x"),
    [
        *((shape, F.linear, X) for shape in [(), (1,), (1, 1), (1, 2)]),
        *((shape, F.linear, tensor(3, N, 4, 2, 3)) for shape in [(4, 1), (4, 2)]),
        *((shape, torch.addmm, X) for shape in [(), (1,), (1, 1), (1, 2)]),
    ],
)
@pytest.mark.parametrize("make", [kflr, lambda *args, **options: ekfac(*args, type="exact", **options)])
@pytest.mark.parametrize("bias", ["joined", "apart"])
def test_a_bias_that_is_no_column_has_no_factors(make: Any, shape: Any, function: Any, x: Tensor, bias: str) -> None:
    torch.manual_seed(0)
    model, loss_fn, y = Broadcast(shape, function).double(), nn.MSELoss(reduction="sum"), tensor(4, *x.shape[:-1], 2)
    y = y.transpose(1, 2) if x.ndim > 2 else y
    k = make(model, loss_fn, x, y, bias=bias)
    assert k.names == ("weight",)
    assert f"it has shape {shape}, not (2,)" in k.uncovered["bias"]
    if x.ndim == 2 or make is kflr:
        close(k.dense(), ggn(model, loss_fn, x, y, params="weight").dense())


def test_chosen_parameters() -> None:
    model = mlp()
    part = kfac(model, CE, X, LABELS, type="empirical", params="2")
    assert part.names == ("2.weight",)
    close(part.dense(), kfac(model, CE, X, LABELS, type="empirical").blocks["2.weight"].dense())
    weight_only = kfac(model, CE, X, LABELS, type="empirical", params=["0.weight"])
    close(weight_only.dense(), kfac(model, CE, X, LABELS, type="empirical", bias="apart").blocks["0.weight"].dense())
    with pytest.raises(KroneckerError, match=r"'0.bias' .*weight of its layer .*not among the chosen"):
        kfac(model, CE, X, LABELS, type="empirical", params=["0.bias", "2.weight"])


@pytest.mark.parametrize("make", [kfac, kflr, kfra, ekfac])
def test_coupled_batches_are_refused_and_left_alone(make: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BatchCoupledError, match=r"'0.weight'"):
        make(model, CE, X, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert make(model, CE, X, LABELS).names == ("0.weight", "0.bias", "3.weight", "3.bias")


class Scaled(nn.Module):
    def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by(x)


@pytest.mark.parametrize("by", [torch.amax, torch.linalg.matrix_norm])
@pytest.mark.parametrize("make", [kfac, kflr, kfra, ekfac])
def test_what_couples_unnoticed_is_found_by_verification(make: Any, by: Any) -> None:
    def make_model() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Scaled(by), nn.Linear(4, 2)))

    for shift in range(N):  # every sample attains the maximum, in turn
        with pytest.raises(BatchCoupledError, match=r"'0.weight'"):
            make(make_model(), CE, X.roll(shift, 0), LABELS.roll(shift))
    assert make(make_model(), CE, X, LABELS, params="3").names == ("3.weight", "3.bias")  # behind it
    if by is torch.amax:  # noticed in any case
        with pytest.raises(BatchCoupledError, match=r"'0.weight'"):
            make(make_model(), CE, X, LABELS, verify=False)
    else:
        assert make(make_model(), CE, X, LABELS, verify=False).names[0] == "0.weight"
    with pytest.raises(ArgumentError, match="verify must be True, False or None"):
        make(make_model(), CE, X, LABELS, verify="once")


@pytest.mark.parametrize("make", [kfac, kflr, kfra, ekfac])
def test_losses_that_compare_samples_are_refused(make: Any) -> None:
    def contrast(f: Tensor, y: Tensor) -> Tensor:
        return (f - f.mean(0)).square().sum(1)

    with pytest.raises(BatchCoupledError):
        make(mlp(), contrast, X, VALUES)


def test_verification_is_at_the_first_call_for_a_model() -> None:
    model, calls = mlp(), []
    model.register_forward_hook(lambda *_: calls.append(1))

    def passes(**options: Any) -> int:
        calls.clear()
        kfac(model, CE, X, LABELS, type="empirical", **options)
        return len(calls)

    assert [passes(), passes(), passes(verify=True), passes(verify=False)] == [3, 1, 3, 1]


def test_a_model_for_one_number_of_samples_is_served_without_verification() -> None:
    model = nn.Sequential(mlp(), nn.Unflatten(0, (N, 1)), nn.Flatten())
    with pytest.raises(VerificationError, match=r"sample \d alone does not .*verify=False"):
        kfac(model, CE, X, LABELS, type="empirical")
    k = kfac(model, CE, X, LABELS, type="empirical", verify=False)
    close(k.dense(), kfac(mlp(), CE, X, LABELS, type="empirical").dense())


def test_layers_behind_the_last_batch_norm_are_not_coupled() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    k = kfac(model, CE, X, LABELS, type="empirical", params="3")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hidden = torch.cat([model[:3](X).detach(), torch.ones(N, 1)], 1)
    close(k.blocks["3.weight"].inputs[0], hidden.T @ hidden / N)


def test_nothing_is_left_behind() -> None:
    model = mlp()
    x = X.clone().requires_grad_()
    torch.manual_seed(5)
    random = torch.get_rng_state()
    kfac(model, CE, x, LABELS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random, torch.get_rng_state())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_a_batch_without_targets_has_no_distribution_but_matrices_of_zeros() -> None:
    """Every target is ignored."""
    targets = torch.full((N,), -100)
    for make in (kfac, ekfac, fisher):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(LossError, match="every target is ignored"):
                make(mlp(), CE, X, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for make in (kflr, ggn):
            assert not make(mlp(), CE, X, targets).dense().any()


def test_unknown_options_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"kflr is kfac with type='exact': leave type='mc' out"):
        kflr(mlp(), CE, X, LABELS, type="mc")
    for option, known in {"type": "empirical", "approximation": "expand", "bias": "joined"}.items():
        with pytest.raises(ValueError, match=f"{option} must be one of '{known}'.*got 'other'"):
            kfac(mlp(), CE, X, LABELS, **{option: "other"})


@pytest.mark.parametrize("bias", ["joined", "apart"])
def test_corrected_eigenvalues_are_determined_where_those_of_a_factor_are_equal(bias: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3)).double()
    x, y = torch.randn(10, 3, 4, 4, dtype=torch.float64), torch.randint(3, (10,))
    block = slice(sum(p.numel() for p in model[0].parameters()))
    options = {"type": "empirical", "bias": bias}

    def found(x: Tensor) -> Tensor:
        return ekfac(model.to(x.dtype), nn.CrossEntropyLoss(), x, y, **options).dense()[block, block]

    exact = found(x)
    assert (found(x * (1 + 1e-13 * torch.randn_like(x))) - exact).norm() < 1e-10 * exact.norm()
    if bias == "apart":  # joined, some eigenvalues differ by less than single precision can tell
        assert (found(x.float()) - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("net", ["tokens", "pixels"])
def test_corrected_eigenvalues_do_not_depend_on_the_order_of_samples(net: str, kind: str, approximation: str) -> None:
    """Also where the factor of the inputs has zeros among its eigenvalues, with fewer samples than inputs."""
    if net == "tokens":
        x, model = tensor(4, N, 6, 7), seeded(lambda: nn.Sequential(nn.Linear(7, 3), nn.Flatten(), nn.Linear(18, 2)))
    else:
        x = tensor(4, N, 4, 5, 5)
        model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Flatten(), nn.Linear(75, 2)))
    order = torch.tensor([3, 0, 4, 1, 2])
    found, again = (
        ekfac(model, CE, x[at], LABELS[at], type=kind, approximation=approximation, params=["0.weight", "0.bias"])
        for at in (torch.arange(N), order)
    )
    close(found.dense(), again.dense())
    v = tensor(5, found.shape[0])
    close(found.solve(v, 1e-4), again.solve(v, 1e-4), 1e-6)


def test_corrected_eigenvalues_in_single_precision() -> None:
    """Eigenvalues that are close, but others, keep their own vectors."""
    torch.manual_seed(0)
    x = torch.randn(512, 64) * torch.logspace(0, -2, 64) @ torch.linalg.qr(torch.randn(64, 64))[0] + 1
    single, y = nn.Linear(64, 3), torch.randint(3, (512,))
    double, v = copy.deepcopy(single).double(), torch.randn(65 * 3)
    for damping in (1e-2, 1e-3, 1e-4):
        found = ekfac(single, CE, x, y, type="exact").solve(v, damping).double()
        expected = ekfac(double, CE, x.double(), y, type="exact").solve(v.double(), damping)
        assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_kfra_refuses_weights_of_two_modules(kind: str) -> None:
    make: Callable[[], nn.Module] = {
        "linear": lambda: nn.Linear(3, 3, bias=False),
        "conv": lambda: nn.Conv1d(3, 3, 3, padding=1, bias=False),
    }[kind]
    first, second = seeded(make), seeded(make)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.Tanh(), second, nn.Flatten()), tensor(1, N, 3, *([4] if kind == "conv" else []))
    y = torch.zeros_like(model(x))
    assert kflr(model, MSE, x, y).names == ("0.weight",)
    with pytest.raises(KroneckerError, match=r"'0.weight' is used twice in the sequence: use kflr"):
        kfra(model, MSE, x, y)


def test_autocast_regions_leave_factors_in_single_precision() -> None:
    model, x, y = mlp().float(), X.float(), LABELS
    plain = kfra(model, CE, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = kfra(model, CE, x, y)
    assert found.dense().dtype is torch.float32
    torch.testing.assert_close(found.dense(), plain.dense(), rtol=0.1, atol=0.02)
