"""A default device is for what the user makes: numbers of the library's own are where they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N = 6


def model_and_batch(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "dense": lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)),
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)
        ),
        "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), Last(3, 3)),
        "transposed": lambda: Transposed(),
        "by samples": lambda: BySamples(),
    }
    return models[kind]().double(), torch.randn(N, 6).double(), torch.randint(3, (N,))


class Last(nn.LSTM):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0][:, -1]


class Transposed(nn.Module):
    """The weight is a transposed one, and rows go where an index says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight.t())
        out = h.new_zeros(len(x), 3)
        out[torch.arange(len(x), device=x.device)] = h
        return out


class BySamples(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(row, self.weight, self.bias) for row in x])


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), [*model.parameters()]) for n in range(N)
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-12)


KINDS = ["dense", "convolution", "recurrent", "transposed", "by samples"]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, verify: bool) -> None:
    model, x, y = model_and_batch(kind)
    expected = one_by_one(model, x, y)
    for engine in ("hooks", "loop", "vmap") if kind != "recurrent" else ("hooks", "loop"):
        with torch.device("meta"):
            G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine, verify=verify)
            assert close(G.flat(), expected) and close(G.gram(), expected @ expected.T)
            S = persample.gradients(
                model,
                nn.CrossEntropyLoss(),
                x,
                y,
                engine=engine,
                verify=verify,
                quantities=["norm", "mean", "variance", ("clip", {"max_norm": 0.5})],
            )
        assert close(S.norm(), expected.norm(dim=1))
        assert close(torch.cat([m.flatten() for m in S.mean().values()]), expected.mean(0))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recorders(kind: str, verify: bool) -> None:
    model, x, y = model_and_batch(kind)
    expected, got = one_by_one(model, x, y), list[persample.Gradients]()
    with torch.device("meta"):
        with persample.extend(model, verify=verify) as recorder:
            losses = F.cross_entropy(model(x), y, reduction="none")
            got += [recorder.gradients(losses), recorder.gradients(losses, coupled="loss")]
        handle = persample.extend(model, on_backward=got.append, reduction="mean")
        F.cross_entropy(model(x), y).backward()
        handle.remove()
    assert len(got) == 3 and all(close(G.flat(), expected) for G in got)


def test_what_is_made_from_rows() -> None:
    model, x, y = model_and_batch("dense")
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    scale = persample.statistics.noise_scale(G).scale
    with torch.device("meta"):
        assert persample.statistics.noise_scale(G).scale == scale
        assert persample.explain(model, nn.CrossEntropyLoss(), x, y)
        assert (
            persample.attribution.mislabel_auc(
                torch.arange(6.0, device="cpu"), torch.tensor([0, 1, 0, 1, 1, 0], device="cpu")
            )
            >= 0
        )
