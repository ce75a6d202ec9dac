"""Diagonals of Gauss-Newton matrices, against those of the dense matrices, and against BackPACK."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import persample
from persample.curvature import fisher, ggn, ggn_diagonal
from persample.curvature.operator import unflatten

N, C = 5, 3


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 0, 1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale, self.unused = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.w(torch.tanh(self.w(x)) * self.scale)) @ self.w.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(7, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0].mean(1))


def attention() -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(12, C))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, groups=2),
        nn.Flatten(), nn.Linear(50, C),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), tensor(1, N, 4)),
    "tied": (Tied, tensor(1, N, 4)),
    "convolutions": (convolutions, tensor(2, N, 2, 4, 4)),
    "attention": (attention, tensor(3, N, 3, 4)),
    "recurrent": (Recurrent, torch.arange(N * 6).view(N, 6) % 7),
    "weight_norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, C)), tensor(1, N, 4)),
}
CRITERIA: dict[str, tuple[nn.Module, Tensor]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), LABELS),
    "squared": (nn.MSELoss(), tensor(4, N, C)),
    "binary": (nn.BCEWithLogitsLoss(reduction="sum"), tensor(5, N, C).sigmoid()),
    "absolute": (nn.L1Loss(), tensor(6, N, C)),  # no curvature
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    return make().double(), x


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_diagonal_of_the_dense_matrix(name: str, criterion: str, reduction: str) -> None:
    (model, x), (loss_fn, y) = made(name), CRITERIA[criterion]
    matrix = ggn(model, loss_fn, x, y, reduction=reduction)
    expected = unflatten(matrix.dense().diagonal(), matrix.shapes)
    close(ggn_diagonal(model, loss_fn, x, y, reduction=reduction), expected)


@pytest.mark.parametrize("name", MODELS)
def test_of_every_sample_it_is_that_of_the_sample_alone(name: str) -> None:
    (model, x), (loss_fn, y) = made(name), CRITERIA["cross_entropy"]
    each = ggn_diagonal(model, loss_fn, x, y, per_sample=True)
    for n in range(N):
        close({key: d[n] for key, d in each.items()}, ggn_diagonal(model, loss_fn, x[n : n + 1], y[n : n + 1]))
    close({key: d.mean(0) for key, d in each.items()}, ggn_diagonal(model, loss_fn, x, y))


@pytest.mark.parametrize("criterion", ["cross_entropy", "squared", "binary"])
def test_draws_are_those_of_the_sampled_fisher(criterion: str) -> None:
    (model, x), (loss_fn, y) = made("mlp"), CRITERIA[criterion]
    options = {"type": "mc", "samples": 3}
    generator = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    matrix = fisher(model, loss_fn, x, y, generator=generator(), **options)
    found = ggn_diagonal(model, loss_fn, x, y, generator=generator(), **options)
    close(found, unflatten(matrix.dense().diagonal(), matrix.shapes))
    many = ggn_diagonal(model, loss_fn, x, y, type="mc", samples=600, generator=generator(), params=["0.bias"])
    exact = ggn_diagonal(model, loss_fn, x, y)["0.bias"]
    torch.testing.assert_close(many["0.bias"], exact, rtol=0.2, atol=0.05 * float(exact.max()))


def test_parameters_that_are_asked_for_and_positions_of_the_samples() -> None:
    (model, x), (loss_fn, y) = made("tied"), CRITERIA["cross_entropy"]
    whole = ggn_diagonal(model, loss_fn, x, y)
    close(ggn_diagonal(model, loss_fn, x, y, params="w"), {key: d for key, d in whole.items() if key[0] == "w"})
    assert not whole["unused"].any()

    class SamplesLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = model

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x.mT)

    last = ggn_diagonal(SamplesLast(), loss_fn, x.mT, y, batch_dim=(1, 0, 0))
    close({key.removeprefix("own."): d for key, d in last.items()}, whole)


def test_against_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchDiagGGNExact, DiagGGNExact

    torch.manual_seed(0)
    make = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, C))
    x = tensor(2, N, 2, 4, 4).float()
    theirs, loss = backpack.extend(make), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(DiagGGNExact(), BatchDiagGGNExact()):
        loss(theirs(x), LABELS).backward()
    ours = ggn_diagonal(make, nn.CrossEntropyLoss(), x, LABELS)
    each = ggn_diagonal(make, nn.CrossEntropyLoss(), x, LABELS, per_sample=True)
    for name, p in make.named_parameters():
        torch.testing.assert_close(ours[name], p.diag_ggn_exact)
        torch.testing.assert_close(each[name] / N, p.diag_ggn_exact_batch)


def test_half_precision_is_computed_in_single() -> None:
    model, x = made("mlp")
    expected = ggn_diagonal(model.bfloat16().double(), nn.CrossEntropyLoss(), x.bfloat16().double(), LABELS)
    for per_sample in (False, True):
        found = ggn_diagonal(
            model.bfloat16(), nn.CrossEntropyLoss(), x.bfloat16(), LABELS, per_sample=per_sample, verify=False
        )
        for name, d in found.items():
            assert d.dtype is torch.float32
            torch.testing.assert_close(d.mean(0) if per_sample else d, expected[name].float(), rtol=0.1, atol=0.02)


def test_nothing_is_left_behind_and_what_is_refused_says_why() -> None:
    model, x = made("mlp")
    state, drawn = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    ggn_diagonal(model, nn.CrossEntropyLoss(), x, LABELS)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())
    with pytest.raises(persample.errors.ArgumentError, match="type must be"):
        ggn_diagonal(model, nn.CrossEntropyLoss(), x, LABELS, type="empirical")
    with pytest.raises(persample.errors.LossError, match="not convex"):
        ggn_diagonal(model, lambda out, y: -out.square().sum(1), x, LABELS)
    with pytest.raises(persample.errors.LossError, match="differentiable tensors"):
        ggn_diagonal(Two(model), lambda out, y: F.cross_entropy(out[0], y), x, LABELS)
    coupled = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)).double()
    with pytest.raises(persample.BatchCoupledError):
        ggn_diagonal(coupled, nn.CrossEntropyLoss(), x, LABELS)
    behind = ggn_diagonal(coupled, nn.CrossEntropyLoss(), x, LABELS, params="2")  # nothing couples these
    matrix = ggn(coupled, nn.CrossEntropyLoss(), x, LABELS, params="2")
    close(behind, unflatten(matrix.dense().diagonal(), matrix.shapes))
    with pytest.raises(persample.errors.ArgumentError, match="complex"):
        ggn_diagonal(nn.Linear(4, C, dtype=torch.complex128), lambda out, y: out.abs().sum(1), x + 0j, LABELS)


class Two(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(x), self.other(x)
