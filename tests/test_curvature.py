"""Operators against dense matrices from plain autograd: Hessians of flat functions, Jacobians of flat functions."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import persample
from persample import coupling
from persample.curvature import Operator, ekfac, empirical_fisher, fisher, ggn, hvp, kfac, kflr, kfra, per_sample_hvp
from persample.errors import (
    ArgumentError,
    BatchCoupledError,
    CaptureError,
    DirectionError,
    InplaceError,
    LossError,
    PersampleError,
    RandomnessError,
    VerificationError,
)

N = 5


def hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Row by row: torch.func.hessian differentiates a vmapped backward, which torch 2.13 gets wrong for norm layers."""

    def at(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        rows = [torch.autograd.grad(g, x, e.view_as(x), retain_graph=True)[0] for e in torch.eye(x.numel()).to(x)]
        return torch.stack(rows).reshape(*x.shape, *x.shape)

    return at


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


class Tokens(nn.Module):
    """Attention (fused kernels can't be differentiated twice), LayerNorm, a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + F.scaled_dot_product_attention(x, x, x, is_causal=True))
        return F.linear(x, self.embedding.weight).transpose(1, 2)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))


class Tempered(nn.Module):
    """A parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(x) * self.temperature)


X, LABELS = (
    torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 2, 1, 1, 0]),
)
VALUES = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(N, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(4, (N, 3), generator=torch.Generator().manual_seed(4))
BINARY = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.float64)


def bent(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per sample, with an output Hessian that is neither constant nor diagonal nor definite."""
    return (outputs * targets).sum(1).sin() + outputs.prod(1) + outputs.pow(4).sum(1)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, Tensor]] = {
    "cross entropy": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)),
        nn.CrossEntropyLoss(),
        X,
        LABELS,
    ),
    "squared error": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 3)), nn.MSELoss(), X, VALUES),
    "binary": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)),
        nn.BCEWithLogitsLoss(reduction="sum"),
        X,
        BINARY,
    ),
    "bent loss": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)), bent, X, VALUES),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 1, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
        IMAGES,
        LABELS,
    ),
    "batch norm": (normed, nn.CrossEntropyLoss(), X, LABELS),
    "tokens": (Tokens, nn.CrossEntropyLoss(), TEXT, TEXT.roll(-1, 1)),
    "temperature": (Tempered, nn.CrossEntropyLoss(), X, LABELS),
}
FISHER = [name for name in CASES if name != "bent loss"]


def case(name: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    make, *rest = CASES[name]
    return (seeded(make), *rest)


def flat_functions(
    model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``theta [D]``, ``theta -> outputs``, ``outputs -> losses [N]`` (each sample alone, in a loop)."""
    names, shapes = zip(*[(k, p.shape) for k, p in model.named_parameters()], strict=True)

    def outputs(theta: Tensor) -> Tensor:
        pieces = theta.split([s.numel() for s in shapes])
        own = {k: p.view(s) for k, p, s in zip(names, pieces, shapes, strict=True)}
        state = {k: b.clone() for k, b in model.named_buffers()}
        state.pop("1.num_batches_tracked", None)
        stateless = copy.deepcopy(model)
        for m in stateless.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = False, None, None, None
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(stateless, own, (x,))

    def losses(f: Tensor) -> Tensor:
        return torch.stack([loss_fn(f[i : i + 1], y[i : i + 1]).reshape(()) for i in range(len(f))])

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return theta, outputs, losses


def dense_ggn(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> Tensor:
    """``sum_n J_n^T H_n J_n``, every factor dense."""
    theta, outputs, losses = flat_functions(model, loss_fn, x, y)
    f = outputs(theta).detach()
    jacobian = jacrev(outputs)(theta).reshape(N, -1, len(theta))
    curvature = [hessian(lambda v, i=i: losses(torch.cat([f[:i], v[None], f[i + 1 :]]))[i])(f[i]) for i in range(N)]
    return sum(j.T @ h.reshape(j.shape[0], -1) @ j for j, h in zip(jacobian, curvature, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_hvp_is_the_hessian_of_the_batch_loss(name: str, reduction: str) -> None:
    model, loss_fn, x, y = case(name)
    theta, outputs, losses = flat_functions(model, loss_fn, x, y)
    scale = 1 / N if reduction == "mean" else 1.0
    expected = hessian(lambda t: losses(outputs(t)).sum())(theta) * scale
    close(hvp(model, loss_fn, x, y, reduction=reduction).dense(), expected)


def test_hvp_is_double_backward() -> None:
    model, loss_fn, x, y = case("cross entropy")
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)
    inner = (torch.cat([g.reshape(-1) for g in grads]) * v).sum()
    close(hvp(model, loss_fn, x, y) @ v, torch.cat([h.reshape(-1) for h in torch.autograd.grad(inner, params)]), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_ggn_is_jacobian_hessian_jacobian(name: str, reduction: str) -> None:
    model, loss_fn, x, y = case(name)
    expected = dense_ggn(model, loss_fn, x, y) * (1 / N if reduction == "mean" else 1.0)
    close(ggn(model, loss_fn, x, y, reduction=reduction).dense(), expected)


@pytest.mark.parametrize("name", FISHER)
def test_fisher_is_ggn(name: str) -> None:
    model, loss_fn, x, y = case(name)
    close(fisher(model, loss_fn, x, y).dense(), dense_ggn(model, loss_fn, x, y) / N)


def test_fisher_is_the_expectation_over_all_targets() -> None:
    model, loss_fn, x, y = case("cross entropy")
    theta, outputs, _ = flat_functions(model, loss_fn, x, y)
    rows = jacrev(lambda t: -F.log_softmax(outputs(t), 1))(theta)  # [N, C, D]: the gradient for every possible target
    p = outputs(theta).softmax(1)
    expected = torch.einsum("nc,ncd,nce->de", p, rows, rows)
    close(fisher(model, loss_fn, x, y, reduction="sum").dense(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_is_the_sum_of_outer_products(name: str, reduction: str) -> None:
    model, loss_fn, x, y = case(name)
    theta, outputs, losses = flat_functions(model, loss_fn, x, y)
    rows = jacrev(lambda t: losses(outputs(t)))(theta)
    expected = rows.T @ rows * (1 / N if reduction == "mean" else 1.0)
    close(empirical_fisher(model, loss_fn, x, y, reduction=reduction).dense(), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch norm"])
def test_empirical_fisher_from_rows(name: str) -> None:
    model, loss_fn, x, y = case(name)
    close(empirical_fisher(model, loss_fn, x, y, method="rows").dense(), empirical_fisher(model, loss_fn, x, y).dense())


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "batch norm"])
def test_per_sample_hvp(name: str, engine: str) -> None:
    model, loss_fn, x, y = case(name)
    theta, outputs, losses = flat_functions(model, loss_fn, x, y)
    v = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = per_sample_hvp(model, loss_fn, x, y, v, engine=engine)
    assert rows.shape == (N, len(theta))
    for n in range(N):
        close(rows[n], hessian(lambda t, n=n: losses(outputs(t))[n])(theta) @ v)
    close(rows.mean(0), hvp(model, loss_fn, x, y) @ v)
    named = dict(zip(dict(model.named_parameters()), v.split([p.numel() for p in model.parameters()]), strict=True))
    close(per_sample_hvp(model, loss_fn, x, y, {k: named[k].view_as(p) for k, p in model.named_parameters()}), rows)


@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16])
def test_per_sample_hvp_has_the_type_of_the_parameters_whatever_that_of_the_direction(kind: torch.dtype) -> None:
    model, loss_fn, x, y = case("cross entropy")
    v = (torch.arange(sum(p.numel() for p in model.parameters())) % 3).to(kind)
    rows = per_sample_hvp(model, loss_fn, x, y, v, engine="loop")
    close(rows, per_sample_hvp(model, loss_fn, x, y, v.double(), engine="vmap"))
    close(rows.mean(0), hvp(model, loss_fn, x, y) @ v)


def test_complex_directions_of_real_parameters_are_refused() -> None:
    """Their imaginary part was dropped."""
    model, loss_fn, x, y = case("cross entropy")
    H = hvp(model, loss_fn, x, y)
    v = 1j * torch.ones(H.shape[0], dtype=torch.complex128)
    runs = (
        lambda: H @ v,
        lambda: H.to_scipy() @ v.numpy(),
        lambda: kflr(model, loss_fn, x, y).solve(v, damping=1.0),
        lambda: per_sample_hvp(model, loss_fn, x, y, v),
    )
    for run in runs:
        with pytest.raises(DirectionError, match=r"complex, and the parameters are real.*v\.real"):
            run()


def test_losses_may_change_outputs_in_place() -> None:
    model, _, x, y = case("cross entropy")

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            out.masked_fill_(out.new_tensor([0, 0, 1]).bool(), -1e9), y, reduction="none"
        )

    def same(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.masked_fill(out.new_tensor([0, 0, 1]).bool(), -1e9), y)

    y = y.clamp(max=1)
    for matrix in (hvp, ggn, empirical_fisher, kflr):
        close(matrix(model, loss_fn, x, y).dense(), matrix(model, same, x, y).dense())


def test_per_sample_hvp_of_a_loss_that_holds_a_parameter() -> None:
    model, _, x, y = case("cross entropy")
    held = next(model.parameters())
    args = model, lambda out, y: nn.functional.cross_entropy(out, y) + held.pow(4).sum(), x, y
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    close(per_sample_hvp(*args, v).mean(0), hvp(*args) @ v)
    with pytest.raises(CaptureError, match="engine='loop'"):
        per_sample_hvp(*args, v, engine="vmap")


class TwoNames(nn.Module):
    """One module under two names, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again, self.same = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.same(self.first(x))))


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_per_sample_hvp_leaves_a_module_of_two_names_as_it_was(engine: str) -> None:
    model, x = seeded(TwoNames).eval(), X.new_ones(N, 3) + torch.arange(3 * N).view(N, 3).sin()
    before = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = [t.detach().clone() for _, t in before]
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    rows = per_sample_hvp(model, nn.CrossEntropyLoss(), x, LABELS, v, engine=engine)
    close(rows.mean(0), hvp(model, nn.CrossEntropyLoss(), x, LABELS) @ v)
    after = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [(name, id(t)) for name, t in before] == [(name, id(t)) for name, t in after]
    assert all(torch.equal(t, value) for (_, t), value in zip(after, values, strict=True))


@pytest.mark.parametrize("way", ["dense", "to_scipy"])
def test_complex_parameters_have_products_but_no_matrix(way: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(2, 2, dtype=torch.complex128), torch.randn(N, 2, dtype=torch.complex128)
    H, v = hvp(model, lambda out, _: out.real.square().sum(1), x), torch.randn(6, dtype=torch.complex128)
    with pytest.raises(DirectionError, match=r"complex parameters.*products.*view_as_complex"):
        getattr(H, way)()

    def slope(*p: Tensor) -> Tensor:  # the gradient with respect to real and imaginary parts
        weight, bias = (torch.view_as_complex(t) for t in p)
        return (x @ weight.T + bias).real.square().sum(1).mean()

    parts = tuple(torch.view_as_real(p.detach()) for p in model.parameters())
    along = tuple(torch.view_as_real(u.view_as(p)) for u, p in zip(v.split([4, 2]), model.parameters(), strict=True))
    expected = torch.autograd.functional.hvp(slope, parts, along)[1]
    close(torch.view_as_real(H @ v), torch.cat([e.reshape(-1, 2) for e in expected]))


def test_complex_outputs_have_no_distribution() -> None:
    model, x = nn.Linear(2, 2, dtype=torch.complex128), torch.randn(N, 2, dtype=torch.complex128)
    with pytest.raises(LossError, match=r"outputs are complex.*view_as_real"):
        fisher(model, lambda out, _: out.abs().square().sum(1), x)


def test_per_sample_shortcuts_refuse_coupled_batches() -> None:
    model, loss_fn, x, y = case("batch norm")
    before = {k: b.clone() for k, b in model.state_dict().items()}
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for engine in ("auto", "vmap", "loop"):
        with pytest.raises(BatchCoupledError):
            per_sample_hvp(model, loss_fn, x, y, v, engine=engine)
    with pytest.raises(BatchCoupledError):
        empirical_fisher(model, loss_fn, x, y, method="rows")
    assert all(torch.equal(b, before[k]) for k, b in model.state_dict().items())


class Coupled(nn.Module):
    """Values go through a function of the whole batch."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.through = nn.Linear(2, 3), nn.Linear(3, 3), through

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.through(self.first(x).tanh()))


COUPLINGS = {
    "mean": lambda h: h - h.mean(0),
    "std": lambda h: h / h.std(),
    "largest": lambda h: h / h.amax(),
    "largest of each": lambda h: h / h.amax(0),
}


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_per_sample_hvp_refuses_samples_that_are_coupled_by_hand(name: str, engine: str) -> None:
    model = seeded(lambda: Coupled(COUPLINGS[name]))
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for shift in range(N):  # every sample attains a maximum, in turn
        with pytest.raises(BatchCoupledError, match=r"sample \d has loss .* within the batch and .* alone"):
            per_sample_hvp(model, nn.CrossEntropyLoss(), X.roll(shift, 0), LABELS.roll(shift), v, engine=engine)
    assert per_sample_hvp(model, nn.CrossEntropyLoss(), X[:1], LABELS[:1], v, engine="loop").shape == (1, len(v))


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_per_sample_hvp_refuses_outputs_that_are_broadcast_with_targets(engine: str) -> None:
    model = seeded(lambda: nn.Linear(2, 1))
    v, y = torch.ones(3, dtype=torch.float64), VALUES[:, 0]
    with pytest.raises(LossError, match=r"outputs of shape \(5, 1\) with targets of shape \(5,\)"):
        per_sample_hvp(model, lambda f, y: (f - y).square().mean(), X, y, v, engine=engine)
    inputs = torch.cat([X, torch.ones(N, 1)], 1)
    close(
        per_sample_hvp(model, nn.MSELoss(), X, y[:, None], v, engine=engine), 2 * inputs * inputs.sum(1, keepdim=True)
    )


class Differentiates(nn.Module):
    """A score: the model is the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Linear(2, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self.head(torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)[0])


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_per_sample_hvp_of_a_model_that_differentiates_itself(engine: str) -> None:
    args = seeded(Differentiates), nn.CrossEntropyLoss(), X, LABELS
    v = torch.randn(21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = per_sample_hvp(*args, v, engine=engine)
    close(rows.mean(0), hvp(*args) @ v)
    for n in range(N):
        close(rows[n], hvp(*args[:2], X[n : n + 1], LABELS[n : n + 1]) @ v)
    with pytest.raises(CaptureError, match="Use engine='loop'"):
        per_sample_hvp(*args, v, engine="vmap")


def test_per_sample_hvp_refuses_random_masks() -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with pytest.raises(RandomnessError, match="dropout"):
        per_sample_hvp(model, nn.CrossEntropyLoss(), X, LABELS, v)
    with pytest.raises(DirectionError, match=r"\[39\].*\(3,\)"):
        per_sample_hvp(model, nn.CrossEntropyLoss(), X, LABELS, v[:3])
    with pytest.raises(DirectionError, match=r"\[39\].*1\.0"):
        per_sample_hvp(model, nn.CrossEntropyLoss(), X, LABELS, 1.0)


def test_ignored_targets_have_no_curvature() -> None:
    model, _, x, y = case("cross entropy")
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    ignoring = nn.CrossEntropyLoss(ignore_index=2)
    with pytest.warns(UserWarning, match=r"sample\(s\) \[1\] is ignored"):
        rows = per_sample_hvp(model, ignoring, x, y, v)
    with pytest.warns(UserWarning, match=r"sample\(s\) \[1\] is ignored"):
        whole = hvp(model, ignoring, x, y) @ v
    expected = per_sample_hvp(model, nn.CrossEntropyLoss(), x, y, v)
    expected[1] = 0
    close(rows, expected)
    close(whole, expected.mean(0))


# ---- sampled targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross entropy", "squared error", "binary"])
def test_mc_fisher_is_a_mean_over_sampled_targets(name: str) -> None:
    model, loss_fn, x, y = case(name)

    def make(seed: int, k: int) -> Operator:
        return fisher(model, loss_fn, x, y, type="mc", samples=k, generator=torch.Generator().manual_seed(seed))

    few, same, other = make(0, 2).dense(), make(0, 2).dense(), make(1, 2).dense()
    close(few, same, 1e-14)
    assert (few - other).norm() > 1e-3
    assert torch.linalg.matrix_rank(few, hermitian=True) <= 2 * N
    exact = fisher(model, loss_fn, x, y).dense()
    samples = 4000
    error = (make(0, samples).dense() - exact).norm() / exact.norm()
    assert error < 12 / math.sqrt(samples)


def test_mc_fisher_for_categorical_targets_uses_the_losses_own_gradients() -> None:
    model, loss_fn, x, y = case("cross entropy")
    generator = torch.Generator().manual_seed(5)
    own = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(5))))
    drawn = torch.multinomial(model(x).detach().softmax(1), 1, generator=own).squeeze(1)
    theta, outputs, _ = flat_functions(model, loss_fn, x, y)
    rows = jacrev(lambda t: F.cross_entropy(outputs(t), drawn, reduction="none"))(theta)
    close(fisher(model, loss_fn, x, y, type="mc", generator=generator).dense(), rows.T @ rows / N)


def test_mc_fisher_without_a_generator_draws_from_the_global_one() -> None:
    def make() -> Tensor:
        return fisher(*case("cross entropy"), type="mc").dense()  # case() seeds

    model, loss_fn, x, y = case("cross entropy")
    one, other = (fisher(model, loss_fn, x, y, type="mc").dense() for _ in range(2))
    assert (one - other).norm() > 1e-3
    close(make(), make(), 1e-14)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("make", [fisher, ekfac])
def test_targets_are_independent_of_the_random_numbers_of_the_forward_pass(make: Any, given: bool) -> None:
    """Were they drawn from one stream, the mean of ``noise^2 u^2`` would be that of ``u^4``: 6 instead of 2."""
    n = 4000
    x, y, model = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64), seeded(Noisy)
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3) if given else None
    assert abs(float(make(model, nn.MSELoss(), x, y, type="mc", generator=generator).dense()) - 2) < 0.5


@pytest.mark.parametrize("samples", [0, -1, 1.5])
def test_draws_have_a_number(samples: Any) -> None:
    for make in (fisher, ekfac):
        with pytest.raises(ArgumentError, match=f"samples must be a positive integer .*, got {samples}"):
            make(*case("cross entropy"), type="mc", samples=samples)
        with pytest.raises(RandomnessError, match=r"generator must be a torch.Generator, got int"):
            make(*case("cross entropy"), type="mc", generator=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_families_are_told_apart_in_half_precision(dtype: torch.dtype) -> None:
    for name, family in {"cross entropy": "categorical", "squared error": "gaussian", "binary": "bernoulli"}.items():
        model, loss_fn, x, y = case(name)
        exact = fisher(model, loss_fn, x, y).dense()
        half = [t.to(dtype) if t.is_floating_point() else t for t in (x, y)]
        op = fisher(model.to(dtype), loss_fn, *half, type="mc", samples=1000)
        assert family in repr(op)
        assert (op.dense().double() - exact).norm() < 0.2 * exact.norm()
    model, _, x, y = case("cross entropy")
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=dtype))
    with pytest.raises(LossError, match=r"computed in float32 where outputs are .*Give it weights in float32"):
        fisher(model.to(dtype), weighted, x.to(dtype), y)


def test_curvature_that_is_not_finite_is_named() -> None:
    model, loss_fn, x, y = case("cross entropy")
    x = x.clone()
    x[0, 0] = math.nan
    with pytest.raises(LossError, match="NaN or infinite"):
        fisher(model, loss_fn, x, y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
        lambda f, y: 3 * F.cross_entropy(f, y, reduction="none"),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
)
def test_the_scale_of_the_loss_does_not_matter_to_fisher_equals_ggn(loss_fn: Any) -> None:
    model, _, x, y = case("cross entropy")
    if getattr(loss_fn, "ignore_index", -1) == 2:
        with pytest.warns(UserWarning, match="ignored"):
            close(fisher(model, loss_fn, x, y).dense(), ggn(model, loss_fn, x, y).dense())
        return
    close(fisher(model, loss_fn, x, y).dense(), ggn(model, loss_fn, x, y).dense())
    error = fisher(model, loss_fn, x, y, type="mc", samples=3000).dense() - ggn(model, loss_fn, x, y).dense()
    assert error.norm() < 0.2 * ggn(model, loss_fn, x, y).dense().norm()


def test_tokens_last_or_second() -> None:
    model, _, x, y = case("tokens")
    last = nn.Sequential(model, nn.Flatten(2))  # [N, V, T]

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).transpose(1, 2)  # [N, T, V]

    def loss_fn(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f.transpose(1, 2), y, reduction="none").mean(1)

    a = fisher(Last(), loss_fn, x, y)
    b = fisher(last, nn.CrossEntropyLoss(), x, y)
    assert "categorical" in repr(a)
    assert "categorical" in repr(b)
    close(a.dense(), b.dense())


def test_fisher_refuses_other_losses() -> None:
    model, loss_fn, x, y = case("bent loss")
    with pytest.raises(LossError, match="not the negative log-likelihood"):
        fisher(model, loss_fn, x, y)


def test_penalties_are_in_the_hessian_and_refused_by_gauss_newton() -> None:
    model, _, x, y = case("cross entropy")

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction="none") + model[0].weight.pow(4).sum()

    bare = hvp(model, nn.CrossEntropyLoss(), x, y).dense()
    difference = (hvp(model, penalised, x, y).dense() - bare).diagonal()
    close(difference[: model[0].weight.numel()], 12 * model[0].weight.detach().square().flatten())
    for matrix in (ggn, fisher):
        with pytest.raises(LossError, match=r"'0.weight' directly.*use hvp"):
            matrix(model, penalised, x, y).dense()


# ---- as an operator -----------------------------------------------------------------------------------------------

MATRICES = [hvp, ggn, fisher, empirical_fisher]


@pytest.mark.parametrize("name", ["cross entropy", "temperature"])
@pytest.mark.parametrize("make", MATRICES)
def test_operator(make: Any, name: str) -> None:
    model, loss_fn, x, y = case(name)
    op = make(model, loss_fn, x, y)
    dense = op.dense()
    size = sum(p.numel() for p in model.parameters())
    assert op.shape == dense.shape == (size, size)
    assert op.T is op
    assert op.dtype == torch.float64
    assert op.names == tuple(dict(model.named_parameters()))
    v, matrix = torch.randn(size, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
    close(op @ v, dense @ v)
    close(op @ matrix, dense @ matrix)
    direction = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    product = op @ direction
    flat = torch.cat([direction[k].flatten() for k in op.names])
    close(torch.cat([product[k].flatten() for k in op.names]), dense @ flat)
    assert not (op @ v).requires_grad
    assert f"{size} x {size}" in repr(op)
    sparse = pytest.importorskip("scipy.sparse.linalg")
    linear = op.to_scipy()
    close(torch.as_tensor(linear @ v.numpy()), dense @ v)
    close(torch.as_tensor(linear.T @ matrix.numpy()), dense @ matrix)
    top = sparse.eigsh(linear, k=1, which="LA", return_eigenvectors=False)
    close(torch.as_tensor(top), torch.linalg.eigvalsh(dense)[-1:])


@pytest.mark.parametrize("make", MATRICES)
def test_chosen_parameters_are_a_block(make: Any) -> None:
    model, loss_fn, x, y = case("cross entropy")
    whole, part = make(model, loss_fn, x, y), make(model, loss_fn, x, y, params=r"2\..*")
    assert part.names == ("2.weight", "2.bias")
    close(part.dense(), whole.dense()[-part.shape[0] :, -part.shape[0] :])


def test_wrong_directions_are_named() -> None:
    op = ggn(*case("cross entropy"))
    with pytest.raises(DirectionError, match=r"\(21, 21\).*\(3,\)"):
        op @ torch.zeros(3)
    with pytest.raises(DirectionError, match=r"2\.weight"):
        op @ {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3), "2.bias": torch.zeros(3)}
    with pytest.raises(PersampleError, match=r"'0.bias' must have shape \(3,\), got \(2,\)"):
        op @ {k: torch.zeros(2) if k == "0.bias" else torch.zeros(s) for k, s in op.shapes.items()}


@pytest.mark.parametrize("make", MATRICES)
def test_nothing_is_left_behind(make: Any) -> None:
    model, loss_fn, x, y = case("batch norm")
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    identities = {k: id(b) for k, b in model.named_buffers()}
    x.requires_grad_()
    torch.manual_seed(3)
    random = torch.get_rng_state()
    op = make(model, loss_fn, x, y)
    assert op.dense().norm() > 0
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters())
    assert identities == {k: id(b) for k, b in model.named_buffers()}
    assert x.grad is None
    x.requires_grad_(False)


@pytest.mark.parametrize("make", MATRICES)
def test_one_dropout_mask_for_all_products(make: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)))
    torch.manual_seed(7)
    op = make(model, nn.CrossEntropyLoss(), X, LABELS)
    first = op.dense()
    torch.manual_seed(8)
    assert torch.equal(first, op.dense())
    close(first, first.T)
    assert (first - make(model, nn.CrossEntropyLoss(), X, LABELS).dense()).norm() > 1e-4


@torch.no_grad()
def _double(model: nn.Module, *_: Any) -> None:
    model[0].weight.mul_(2)


def _step(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, **options: bool) -> None:
    loss_fn(model(x), y).backward()
    torch.optim.SGD(model.parameters(), 0.1, **options).step()


def _replace(model: nn.Module, *_: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


CHANGES: dict[str, Callable[..., Any]] = {
    "'0.weight'": _double,
    "model: parameter": _step,
    "parameter '0.": lambda *args: _step(*args, fused=True),  # no version counts that
    "model: parameter '0.weight'": _replace,
    "'3.bias'": lambda model, *_: model[3].bias.data.add_(1),  # nor that
    "parameter '3.bias'": lambda model, *_: setattr(model[3].bias, "data", model[3].bias + 1),
    "an input": lambda model, loss_fn, x, y: x.mul_(2),
    r"input of shape \(5, 2\)": lambda model, loss_fn, x, y: x.numpy().fill(1.0),
    "a target": lambda model, loss_fn, x, y: y.zero_(),
    "the mode": lambda model, *_: model.eval(),
    "mode of module '1'": lambda model, *_: model[1].eval(),
    "loss_fn: buffer 'weight'": lambda model, loss_fn, *_: loss_fn.weight.mul_(torch.tensor([1.0, 2.0, 3.0])),
    r"model: '2\.negative_slope' changed": lambda model, *_: setattr(model[2], "negative_slope", 0.5),
    r"model: '2' changed": lambda model, *_: model.__setitem__(2, nn.ReLU()),
    "loss_fn: 'label_smoothing' changed": lambda model, loss_fn, *_: setattr(loss_fn, "label_smoothing", 0.5),
    "not require grad any more": lambda model, *_: model[3].requires_grad_(False),
    "'0.weight' does not require grad": lambda model, *_: model.requires_grad_(False),
}
OPERATORS = {
    **{make.__name__: make for make in (hvp, ggn, fisher, empirical_fisher)},
    "mc": lambda *args: fisher(*args, type="mc"),
    "coupling": lambda *args: coupling(*args).ggn(),
}
ROWS = {"rows": lambda *args: empirical_fisher(*args, method="rows")}


MATRICES: dict[str, Callable[..., Any]] = {
    **{make.__name__: make for make in (hvp, ggn, fisher, empirical_fisher, kfac, kflr)},
    **ROWS,
    "kfra": kfra,
    "unverified": lambda *args: kflr(*args, verify=False),
    "samples": lambda model, *args: per_sample_hvp(model, *args, torch.ones(9).double()),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_criterion_that_is_no_mean_of_its_samples_is_said_once(name: str) -> None:
    """Class weights cancel in the loss of one sample."""

    def products(reduction: str) -> None:
        weight = torch.tensor([1.0, 10.0, 2.0]).double()
        model = seeded(lambda: nn.Sequential(nn.Linear(2, 3)))
        found = MATRICES[name](model, nn.CrossEntropyLoss(weight, reduction=reduction), X, LABELS)
        for _ in range(2 if isinstance(found, Operator) else 0):
            found.dense()

    with pytest.warns(UserWarning, match="mean of the samples' own losses") as caught:
        products("mean")
    assert [warning.filename for warning in caught] == [__file__]
    products("sum")  # is one of theirs: no warning


class Doubles(nn.Module):
    """Inputs, and a tensor without samples, in place or not."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.layer, self.within = nn.Linear(2, 3), within

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.within:
            x, scale = x.mul_(2), scale.add_(1)
        else:
            x, scale = x * 2, scale + 1
        return self.layer(x) * scale


@pytest.mark.parametrize("make", [hvp, ggn, fisher, empirical_fisher, *ROWS.values(), kflr, ekfac])
def test_inputs_that_the_model_changes_in_place_are_as_they_were_given(make: Callable[..., Any]) -> None:
    x, scale, found = X.clone(), torch.tensor([2.0]).double(), []
    for within in (True, False):
        model = seeded(lambda within=within: Doubles(within))
        torch.manual_seed(1)
        found.append(make(model, nn.CrossEntropyLoss(), (x, scale), LABELS))
    for _ in range(2):
        close(found[0].dense(), found[1].dense())
    assert torch.equal(x, X) and scale.item() == 2


@pytest.mark.parametrize("name", OPERATORS)
def test_copies_of_operators_are_of_the_same_model_and_pickles_are_refused(name: str) -> None:
    model = seeded(normed)
    op = OPERATORS[name](model, nn.CrossEntropyLoss(), X, LABELS)
    again, _ = copy.deepcopy((op, model))
    close(again.dense(), op.dense())
    with pytest.raises(ArgumentError, match=r"can't be pickled.*make it again there"):
        pickle.dumps(op)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(InplaceError, match=r"parameter '0\.weight'"):
        again.dense()


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", [*OPERATORS, *ROWS])
def test_products_refuse_another_point(name: str, what: str) -> None:
    model, x, y = seeded(normed), X.clone(), LABELS.clone()
    model[2] = nn.LeakyReLU()
    if name in ROWS:
        model[1] = nn.LayerNorm(3).double()
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
    op = {**OPERATORS, **ROWS}[name](model, loss_fn, x, y)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    assert torch.equal(op @ v, op @ v)
    CHANGES[what](model, loss_fn, x, y)
    with pytest.raises(InplaceError, match=what):
        op @ v


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(2, 3), 0, (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.seen = self.calls + 1, tuple(x.shape)
        return self.layer(x).tanh()


@pytest.mark.parametrize("name", [*OPERATORS, *ROWS])
def test_what_passes_change_is_no_setting(name: str) -> None:
    model = seeded(Counts)
    op = {**OPERATORS, **ROWS}[name](model, nn.CrossEntropyLoss(), X, LABELS)
    model(X[:2])
    expected = {**OPERATORS, **ROWS}[name](model, nn.CrossEntropyLoss(), X, LABELS).dense()
    for _ in range(2):
        model(X[:3])
        if name != "mc":
            close(op.dense(), expected)
        assert torch.equal(op.dense(), op.dense())


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_the_same_after_forward_passes_and_moved_statistics(name: str) -> None:
    model, loss_fn, x, y = case("batch norm")
    op = OPERATORS[name](model, loss_fn, x, y)
    before = op.dense()
    model(2 * x)
    model.eval()
    model(x)
    model.train()  # back again
    assert torch.equal(op.dense(), before)
    model.eval()
    op = OPERATORS[name](model, loss_fn, x, y)
    before = op.dense()
    model[1].running_mean.add_(1)
    moved = model[1].running_mean.clone()
    assert torch.equal(op.dense(), before)
    assert torch.equal(model[1].running_mean, moved)
    assert (OPERATORS[name](model, loss_fn, x, y).dense() - before).norm() > 1e-3


class Filter(nn.Module):
    """One layer, and a function of its own between two."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(2, 4), nn.Linear(4, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize("make", [ggn, fisher, empirical_fisher])
def test_operations_whose_gradient_is_linear_but_not_written_so(make: Callable[..., Operator]) -> None:
    """``logcumsumexp`` takes logarithms of the gradient that arrives."""
    alike = [
        lambda h: torch.logcumsumexp(h, 1),
        lambda h: torch.stack([h[:, : i + 1].logsumexp(1) for i in range(4)], 1),
    ]
    known, expected = (make(seeded(lambda f=f: Filter(f)), nn.CrossEntropyLoss(), X, LABELS).dense() for f in alike)
    close(known, expected)


def _implicit(h: Tensor) -> Tensor:
    """A fixed point, whose gradient a hook solves for; nothing can differentiate the hook."""
    z = h.tanh()
    inner = z.detach().requires_grad_()
    with torch.enable_grad():
        again = (inner.roll(1, 1) / 2).tanh()

    def solve(g: Tensor) -> Tensor:
        y = g
        for _ in range(20):
            y = torch.autograd.grad(again, inner, y, retain_graph=True)[0] + g
        return y

    if z.requires_grad:
        z.register_hook(solve)
    return z


def _clamped(h: Tensor) -> Tensor:
    z = h.tanh()
    if z.requires_grad:
        z.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return z


def _clamped_high(h: Tensor) -> Tensor:
    z = h.tanh()
    if z.requires_grad:
        z.register_hook(lambda g: g.clamp(-10, 10))
    return z


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return g.data * (1 - h.tanh() ** 2)


OPAQUE = {"implicit": _implicit, "clamped": _clamped, "clamped high": _clamped_high, "detached": _Plain.apply}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("make", [ggn, fisher, empirical_fisher])
def test_backward_passes_that_cannot_be_differentiated_are_refused(make: Callable[..., Operator], name: str) -> None:
    op = make(seeded(lambda: Filter(OPAQUE[name])), nn.CrossEntropyLoss(), X, LABELS)
    v = torch.randn(op.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VerificationError, match="not linear"):
        op @ (v * 1e4)


def _passed_on(backward: Any) -> Any:
    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        return backward(*args)

    return run


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].exp()


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @_passed_on
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


def _samples(engine: str) -> Callable[..., Any]:
    def product(model: nn.Module, *args: Any) -> Tensor:
        v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        return per_sample_hvp(model, *args, v, engine=engine)

    return product


PRODUCTS: dict[str, Callable[..., Any]] = {
    **{make.__name__: lambda *args, make=make: make(*args).dense() for make in (hvp, ggn, empirical_fisher)},
    "fisher": lambda *args: fisher(*args, type="mc").dense(),
    **{engine: _samples(engine) for engine in ("auto", "vmap", "loop")},
}


def _linear(outputs: Tensor, _: Tensor) -> Tensor:
    """Its gradient is constant, so that nothing of it requires a gradient."""
    return outputs.sum(1)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), _linear])
@pytest.mark.parametrize("function", [_Once, _Within])
@pytest.mark.parametrize("name", PRODUCTS)
def test_functions_that_are_marked_once_differentiable_are_refused(name: str, function: Any, loss_fn: Any) -> None:
    if name == "fisher":
        loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(CaptureError, match=rf"Function {function.__name__} marks .*@once_differentiable.*'rows'.*kfac"):
        PRODUCTS[name](seeded(lambda: Filter(function.apply)), loss_fn, X, LABELS)


def test_functions_that_are_marked_once_differentiable_elsewhere_do_no_harm() -> None:
    """Only what is between parameters and loss is differentiated twice; rows take one backward pass through it."""
    model, plain = seeded(lambda: Filter(_Within.apply)), seeded(lambda: Filter(torch.exp))
    plain.load_state_dict(model.state_dict())
    last = list(model.state_dict())[-1]
    for make in (hvp, ggn):
        arguments = (nn.CrossEntropyLoss(), X, LABELS)
        close(make(model, *arguments, params=[last]).dense(), make(plain, *arguments, params=[last]).dense())
    for make in (lambda *args: empirical_fisher(*args, method="rows"), lambda *args: kfac(*args, type="exact")):
        close(make(model, *arguments).dense(), make(plain, *arguments).dense())


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(6, 3, mode="mean"), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.bag(x).tanh())


def _ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    length = torch.full((len(targets),), 4), torch.full((len(targets),), 2)
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), targets, *length, reduction="none")


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in ("auto", "vmap")])
def test_functions_without_a_second_derivative_are_named(name: str) -> None:
    with pytest.raises(CaptureError, match=r"embedding_bag, so that .*'rows'.*kfac") as caught:
        PRODUCTS[name](seeded(Bag), nn.CrossEntropyLoss(), torch.randint(6, (N, 4)), LABELS)
    assert "_embedding_bag_backward" in str(caught.value.__cause__)
    if name != "fisher":
        with pytest.raises(CaptureError, match=r"ctc_loss, so that .*'rows'.*kfac"):
            PRODUCTS[name](nn.Linear(2, 3).double(), _ctc, torch.randn(N, 4, 2).double(), torch.randint(1, 3, (N, 2)))


class Normed(nn.Module):
    """A convolution and a layer whose weights are over their norms."""

    def __init__(self, normalise: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv, self.layer = normalise(nn.Conv1d(1, 2, 1)), normalise(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.conv(x.unsqueeze(1)).flatten(1)))


WEIGHT_NORMS = {
    f"{way.__module__.rpartition('.')[2]} {dim}": functools.partial(way, dim=dim)
    for way in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm)
    for dim in (0, 1, -1, None)
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_weight_norm_is_differentiated_twice(name: str) -> None:
    """Its double backward is wrong in torch 2.13, so that only differences of gradients can be the reference."""
    model, loss_fn = seeded(lambda: Normed(WEIGHT_NORMS[name])), nn.CrossEntropyLoss(reduction="none")
    params = list(model.parameters())
    theta = nn.utils.parameters_to_vector(params).detach()
    u, v = torch.randn(2, len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rows(step: float) -> Tensor:
        nn.utils.vector_to_parameters(theta + step * v, params)
        losses = loss_fn(model(X), LABELS)
        found = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        nn.utils.vector_to_parameters(theta, params)
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])

    h = 2e-4  # an error of h^4
    expected = (8 * (rows(h) - rows(-h)) - (rows(2 * h) - rows(-2 * h))) / (12 * h)
    H = hvp(model, nn.CrossEntropyLoss(), X, LABELS)
    close(H @ v, expected.mean(0))
    close(u @ (H @ v), v @ (H @ u))
    for engine in ("vmap", "loop"):
        close(per_sample_hvp(model, nn.CrossEntropyLoss(), X, LABELS, v, engine=engine), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated", "ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", [hvp, ggn])
def test_weight_norm_out_of_reach_is_refused(make: Callable[..., Operator]) -> None:
    """What a traced module calls can't be replaced."""
    model = torch.jit.trace(seeded(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 3)))), X)
    with pytest.raises(CaptureError, match=r"weight_norm.*wrong.*not a scripted or traced"):
        make(model, nn.CrossEntropyLoss(), X, LABELS).dense()


def test_backward_passes_that_make_nan_of_zero_are_refused() -> None:
    model = seeded(lambda: Filter(lambda h: torch.logcumsumexp(h, 1) * torch.tensor([1.0, 0.0, 1.0, 1.0]).double()))
    op = empirical_fisher(model, nn.CrossEntropyLoss(), X, LABELS)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("make", [ggn, fisher, empirical_fisher])
def test_products_that_are_rounding_errors_are_not_refused(make: Callable[..., Operator]) -> None:
    """A bias that BatchNorm takes away again has no effect, and a gradient of rounding errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = 10 * torch.randn(20, 6), torch.randint(3, (20,))
    for kind in (torch.float32, torch.float64):
        for params in (r"0\.bias", None):
            op = make(model.to(kind), nn.CrossEntropyLoss(), x.to(kind), y, params=params)
            block = op @ torch.eye(op.shape[0], dtype=kind)
            assert params is None or float(block.abs().max()) < 1e-6


def test_nan_stays_nan() -> None:
    x = X.clone()
    x[1] = float("nan")
    op = empirical_fisher(seeded(lambda: Filter(torch.tanh)), lambda out, y: out.square().sum(1), x, LABELS)
    assert bool((op @ torch.ones(op.shape[0], dtype=torch.float64)).isnan().any())


def test_batch_coupling_is_kept() -> None:
    """The Gauss-Newton matrix under BatchNorm is not the sum of the lone samples' or the frozen ones."""
    model, loss_fn, x, y = case("batch norm")
    coupled = ggn(model, loss_fn, x, y).dense()
    norm = model[1]
    frozen = nn.Sequential(model[0], nn.BatchNorm1d(3).double().eval(), *model[2:])
    pre = model[0](x).detach()
    frozen[1].load_state_dict(norm.state_dict())
    frozen[1].running_mean, frozen[1].running_var = pre.mean(0), pre.var(0, unbiased=False)
    close(frozen[:3](x), nn.Sequential(*copy.deepcopy(model)[:3])(x))
    assert (coupled - ggn(frozen, loss_fn, x, y).dense()).norm() > 0.1 * coupled.norm()


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        hvp(*case("cross entropy"), reduction="none")
    with pytest.raises(ValueError, match="type must be one of 'exact', 'mc', got 'exakt'"):
        fisher(*case("cross entropy"), type="exakt")


@pytest.mark.parametrize("make", [hvp, ggn, empirical_fisher, kfac])
@pytest.mark.parametrize("form", ["flat", "columns", "named"])
def test_products_are_differentiable_in_the_direction(make: Callable[..., Any], form: str) -> None:
    """As in a penalty around earlier parameters, whose gradient would be halved by a product without a graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    K = make(model, nn.CrossEntropyLoss(), torch.randn(N, 6).double(), torch.randint(3, (N,)))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    v = torch.randn(K.shape[0], *((2,) if form == "columns" else ()), dtype=torch.float64, requires_grad=True)
    if form == "named":
        pieces = dict(zip(shapes, v.split([s.numel() for s in shapes.values()]), strict=True))
        product = K @ {name: piece.view(shapes[name]) for name, piece in pieces.items()}
        Kv = torch.cat([product[name].flatten() for name in shapes])
    else:
        Kv = K @ v
    penalty = (v * Kv).sum() / 2
    (g,) = torch.autograd.grad(penalty, v, create_graph=True)
    torch.testing.assert_close(g, Kv, rtol=1e-9, atol=1e-12)
    (h,) = torch.autograd.grad(g.square().sum() / 2, v)
    torch.testing.assert_close(h, K @ Kv.detach(), rtol=1e-9, atol=1e-12)
    assert not (K @ v.detach()).requires_grad


def test_a_solution_is_differentiable_in_the_right_side() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    K = kfac(model, nn.CrossEntropyLoss(), torch.randn(N, 6).double(), torch.randint(3, (N,)))
    v = torch.randn(K.shape[0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(v @ K.solve(v, 0.1) / 2, v)
    torch.testing.assert_close(g, torch.linalg.solve(K.dense() + 0.1 * torch.eye(21).double(), v.detach()))


@pytest.mark.parametrize("make", [hvp, ggn, fisher, empirical_fisher])
def test_an_operator_keeps_the_autocast_region_that_it_was_made_in(make: Callable[..., Operator]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    args = (model, nn.CrossEntropyLoss(), torch.randn(N, 6), torch.randint(3, (N,)))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    plain = make(*args)
    outside = plain @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make(*args)
        inside = mixed @ v
        assert torch.equal(plain @ v, outside)
    assert torch.equal(mixed @ v, inside)
    assert not torch.equal(inside, outside)


@pytest.mark.parametrize("make", [hvp, ggn, fisher, empirical_fisher])
def test_operators_of_tables_with_sparse_gradients(make: Callable[..., Operator]) -> None:
    x, y, v = torch.randint(7, (N, 3)), torch.randint(4, (N,)), torch.randn(80, dtype=torch.float64)
    products = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 4)).double()
        products.append(make(model, nn.CrossEntropyLoss(), x, y) @ v)
    assert products[0].norm() > 0
    torch.testing.assert_close(products[1], products[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(2).eval(), lambda: nn.InstanceNorm2d(2, affine=True)])
def test_one_image_whose_gradient_lies_channels_last(norm: Callable[[], nn.Module]) -> None:
    """PyTorch 2.13 differentiates it wrongly on a CPU, which is put right here: one sample is as two of it."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 2, 1), norm(), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)).flatten(2).mT).flatten(1)

    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    loss = lambda out, _: out.sin().square().sum(1)  # noqa: E731
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for make in (hvp, ggn, empirical_fisher):
        torch.testing.assert_close(make(model, loss, x) @ v, make(model, loss, x.expand(2, -1, -1, -1)) @ v)
    for engine in ("auto", "vmap", "loop"):
        each = per_sample_hvp(model, loss, x.expand(2, -1, -1, -1), None, v, engine=engine)
        torch.testing.assert_close(per_sample_hvp(model, loss, x, None, v, engine=engine)[0], each[1])


class Centred(nn.Module):
    """A criterion with a running centre, as in self-distillation."""

    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.used = used
        self.register_buffer("centre", torch.zeros(2, dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        loss = ((out - self.centre if self.used else out) ** 2).sum()
        with torch.no_grad():
            self.centre.mul_(0.5).add_(out.detach().mean(0) + 0.5)
        return loss


def test_criteria_that_move_a_buffer_they_depend_on_are_refused() -> None:
    """A sample alone would find it moved by the batch, and by the samples before."""
    torch.manual_seed(0)
    model, x, v = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    y = torch.zeros(4, 2)
    for run in (
        lambda f: persample.gradients(model, f, x, y, verify=False),
        *(lambda f, make=make: make(model, f, x, y) @ v for make in (hvp, ggn, empirical_fisher)),
        lambda f: kflr(model, f, x, y, verify=False),
    ):
        with pytest.raises(persample.errors.LossError, match=r"moves its buffer 'centre'"):
            run(Centred())
        run(Centred(used=False))  # whatever it keeps for others
    criterion = Centred()
    with pytest.raises(persample.PersampleError):
        per_sample_hvp(model, criterion, x, y, v)
    assert not criterion.centre.any()


def test_scipy_operators_of_half_precision() -> None:
    pytest.importorskip("scipy")
    model, x, y = nn.Linear(3, 2).bfloat16(), torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 1, 0])
    H = hvp(model, nn.CrossEntropyLoss(), x, y)
    found = H.to_scipy() @ torch.ones(8).numpy()
    torch.testing.assert_close(torch.as_tensor(found), (H @ torch.ones(8)).float())


def test_backward_passes_that_fail_to_be_differentiated_are_named() -> None:
    """Not as PyTorch says it, which names an argument of nobody's call."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.bias = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.native_layer_norm(x * self.gain, [3], None, self.bias, 1e-5)[0]

    model, x, y = Normalised(), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    for operator in (ggn, hvp):
        with pytest.raises(persample.CaptureError, match="no second derivative"):
            operator(model, nn.CrossEntropyLoss(), x, y) @ torch.ones(6, dtype=torch.float64)
    assert persample.curvature.ggn_diagonal(model, nn.CrossEntropyLoss(), x, y)["gain"].shape == (3,)
