"""Half precision: sums and means are formed in single precision, and rounded once, where they are handed out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample import optim, statistics
from persample.attribution import GradientStore, Projection
from persample.errors import StoreError


def first(outputs: Tensor, _: Any) -> Tensor:
    return outputs.squeeze(1)


def rows_of_thousands(count: int = 128) -> tuple[nn.Module, Any]:
    """Every row is 1000; their sum is no number in half precision."""
    model = nn.Linear(4, 1).half()
    return model, lambda **options: persample.gradients(model, first, torch.full((count, 4), 1000.0).half(), **options)


@pytest.mark.parametrize("options", [{}, {"quantities": ["mean"]}, {"quantities": ["mean"], "max_bytes": 2000}])
def test_a_mean_whose_sum_would_overflow(options: dict[str, Any]) -> None:
    model, run = rows_of_thousands()
    G = run(**options)
    assert G.mean()["weight"].tolist() == [[1000.0] * 4]
    assert G.mean()["weight"].dtype == torch.half
    G.backward()
    assert model.weight.grad.tolist() == [[1000.0] * 4]


def test_statistics_of_large_rows() -> None:
    _, run = rows_of_thousands()
    assert statistics.noise_scale(run()).square == 4000001
    moments = statistics.Moments()
    moments.update(run())
    assert moments.compute().mean()["weight"].tolist() == [[1000.0] * 4]
    for size, count in ((128, 128), (64, 128), (256, 512)):
        _, run = rows_of_thousands(count)
        assert optim.group_second_moment(run(), size)["weight"].tolist() == [[1e6] * 4]


@pytest.mark.parametrize("kind", [optim.ClippedSGD, optim.ClippedAdam])
@pytest.mark.parametrize("quantities", [None, [("clip", {"max_norm": 1e4})]])
def test_clipped_steps_divide_before_they_round(kind: Any, quantities: Any) -> None:
    model, run = rows_of_thousands()
    before = model.weight.detach().clone()
    kind(model.named_parameters(), lr=1e-3, max_norm=1e4).step(run(quantities=quantities))
    assert model.weight.isfinite().all()
    if kind is optim.ClippedSGD:
        torch.testing.assert_close(model.weight.detach(), before - 1, rtol=0, atol=2e-3)


def nearly_alike(count: int, spread: float, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """bfloat16 rows whose mean is no number of bfloat16; the rows, in double precision."""
    torch.manual_seed(seed)
    model, x = nn.Linear(3, 1, bias=False).bfloat16(), (1 + spread * torch.randn(count, 3)).bfloat16()
    return model, x, persample.gradients(model, first, x).flat().double()


def test_moments_do_not_depend_on_the_batches() -> None:
    model, x, rows = nearly_alike(256, 0.006)
    for size in (8, 256):
        moments = statistics.Moments()
        for part in x.split(size):
            moments.update(persample.gradients(model, first, part))
        found = moments.compute()
        torch.testing.assert_close(found.variance()["weight"][0].double(), rows.var(0, correction=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.mean()["weight"][0].double(), rows.mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("quantities", [None, ["norm", "mean"]])
def test_noise_is_measured_against_the_mean_itself(seed: int, quantities: Any) -> None:
    model, x, rows = nearly_alike(64, 0.04, seed)
    found = statistics.noise_scale(persample.gradients(model, first, x, quantities=quantities))
    assert float(found.trace) == pytest.approx(float(rows.var(0).sum()), rel=1e-3)


STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "ClippedSGD": lambda m: optim.ClippedSGD(m.named_parameters(), max_norm=1.0),
    "ClippedAdam": lambda m: optim.ClippedAdam(m.named_parameters(), max_norm=1.0),
    "PerSampleAdam": lambda m: optim.PerSampleAdam(m.named_parameters()),
    "whole": lambda m: optim.PerSampleAdam(m.named_parameters(), group_size=None),
    "NaturalGradient": lambda m: optim.NaturalGradient(m.named_parameters()),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("wrong", [None, torch.ones(3), lambda: 1.0])
def test_what_is_no_result_of_a_batch_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(persample.ArgumentError, match="takes the per-sample gradients of a batch"):
        STEPS[name](nn.Linear(4, 3)).step(wrong)


def test_a_refused_step_draws_no_noise_and_keeps_no_state() -> None:
    model, generator = nn.Linear(4, 3), torch.Generator().manual_seed(0)
    optimizer = optim.ClippedSGD(model.named_parameters(), max_norm=1.0, noise_multiplier=1.0, generator=generator)
    before = generator.get_state()
    x, y = torch.randn(3, 4), torch.arange(3)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, params=["weight"])
    with pytest.raises(persample.UnknownParameterError):
        optimizer.step(G)
    assert torch.equal(before, generator.get_state())
    assert not optimizer.state


def test_a_store_refuses_rows_of_another_model(tmp_path: Path) -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    other = nn.Linear(3, 2)
    store = GradientStore(tmp_path / "store", model)
    with pytest.raises(StoreError, match="another model"):
        store.append(persample.gradients(other, nn.CrossEntropyLoss(), x, y))
    assert len(store) == 0
    other.load_state_dict(model.state_dict())
    store.append(persample.gradients(other, nn.CrossEntropyLoss(), x, y))
    assert len(store) == 4


def test_a_parameter_without_entries_is_projected() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.empty = nn.Linear(4, 3), nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) + self.empty.sum()
            return out

    model, x, y, R = Net(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), Projection(8)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    want = G.select("layer").project(R)
    torch.testing.assert_close(G.project(R), want)
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=[("project", {"projection": R})])
    torch.testing.assert_close(S.project(R), want)


# ---- arguments of other types --------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


def tame(outputs: Tensor, _: Any) -> Tensor:
    return outputs.float().flatten(1).tanh().square().sum(1)


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, p: x * p,
    "add": lambda x, p: x + p,
    "div": lambda x, p: x / p,
    "where": lambda x, p: torch.where(x > 0, x, p),
    "cat": lambda x, p: torch.cat([p.expand(len(x), 1, 4), x], 1),
    "pow": lambda x, p: x.abs() ** p,
    "a number": lambda x, p: x * p[0],
    "derived": lambda x, p: x * p.tanh(),
    "used twice": lambda x, p: x * p + x.float() * p,
}


@pytest.mark.parametrize(("own", "other"), [("float32", "float64"), ("bfloat16", "float32"), ("float16", "float64")])
@pytest.mark.parametrize("name", MIXED)
def test_rows_have_the_type_of_their_parameter(name: str, own: str, other: str) -> None:
    """What it is multiplied with, or added to, may have another."""
    model = Bare(MIXED[name]).to(getattr(torch, own))
    x = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(getattr(torch, other))
    G = persample.gradients(model, tame, x)
    S = persample.gradients(model, tame, x, quantities=["mean", ("clip", {"max_norm": 1.0})])
    kinds = {r["p"].dtype for r in (G, G.sum(), G.mean(), G.clip(1.0), S.mean(), S.clip())}
    assert kinds == {model.p.dtype}
    assert G.norm().dtype == G.variance()["p"].dtype == torch.float32
    rows = [torch.autograd.grad(tame(model(one), None).sum(), model.p)[0] for one in x.split(1)]
    expected, eps = torch.stack(rows), torch.finfo(model.p.dtype).eps
    assert (G["p"].double() - expected.double()).norm() <= 4 * eps * expected.double().norm()


def test_rows_of_the_parameters_type_are_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Bare(MIXED["mul"])), torch.randn(8, 4)
    monkeypatch.setattr("persample.collect.cast", None)
    assert persample.gradients(model, tame, x, verify=False)["1.p"].dtype == torch.float32
