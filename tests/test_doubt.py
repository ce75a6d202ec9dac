"""Devices are not waited for: what kernels want to know of their results is asked later, and then acted upon.

There is no other device here, so the CPU plays one: `waits` says that reading a number takes a wait, and a dispatch
mode counts everything that would make the host wait for a device.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import cases, problem

import persample
from persample import cost, doubt, quantities, reductions
from persample.factors import Outer, Rows, dense
from persample.statistics_run import Statistics

WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "bincount", "masked_select", "equal"}
QUANTITIES: list[Any] = ["norm", "gram", "second_moment", "variance", "sum", ("clip", {"max_norm": 0.1})]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubt, "waits", lambda device: True)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Counter[str]()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Waits:
        tolist = Tensor.tolist  # not dispatched on the CPU
        self.patch.setattr(Tensor, "tolist", lambda x: (self.count.update(["tolist"]), tolist(x))[1])
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype is torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) * targets).sum(1)


class Differences(nn.Module):
    """Layers whose samples' tokens nearly cancel: the second half of them is the first, moved by ``difference``, and
    counts negative.
    """

    def __init__(self, difference: float, tokens: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 3)
        self.difference, self.tokens = difference, tokens

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x + self.difference], 1)
        x = self.second(self.first(x).tanh())
        return x[:, : self.tokens].sum(1) - x[:, self.tokens :].sum(1)


def cancelling(difference: float, tokens: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Differences(difference, tokens), torch.randn(9, tokens, 64), torch.randn(9, 3)


def ask(answer: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"norm": answer.norm(), "gram": answer.gram()}
    for name in ("second_moment", "variance"):
        found |= {f"{name} {of}": value for of, value in getattr(answer, name)().items()}
    return found


@pytest.mark.parametrize("how", ["kept", "reduced", "sliced"])
@pytest.mark.parametrize("held", [0, 1 << 26])
@pytest.mark.parametrize("tokens", [1, 2, 4, 40])
@pytest.mark.parametrize("difference", [1.0, 1e-3, 1e-4])
def test_what_is_doubtful_is_computed_again(
    difference: float, tokens: int, held: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = cancelling(difference, tokens)
    requests = None if how == "kept" else ["norm", "gram", "second_moment", "variance"]
    options: dict[str, Any] = {"quantities": requests, "max_bytes": 30_000 if how == "sliced" else None}
    with cost.using(held=held, tiny=0, outer_norm="tokens", outer_gram="tokens"):
        expected = ask(persample.gradients(model, losses, x, y, verify=False, **options))
        monkeypatch.setattr(doubt, "waits", lambda device: True)
        found = ask(persample.gradients(model, losses, x, y, verify=False, **options))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-30, msg=name)


@pytest.mark.usefixtures("waiting")
def test_only_doubtful_parameters_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Counter[str]()
    take = Statistics._take
    monkeypatch.setattr(Statistics, "_take", lambda self, name, g: (taken.update([name]), take(self, name, g))[1])
    model, x, y = cancelling(1e-4)
    with cost.using(tiny=0, outer_norm="tokens"):
        persample.gradients(model, losses, x, y, quantities=["norm"], verify=False)
    assert taken["first.weight"] == 2 and taken["first.bias"] <= 2
    taken.clear()
    model, x, y = cancelling(1.0)
    with cost.using(tiny=0, outer_norm="tokens"):
        persample.gradients(model, losses, x, y, quantities=["norm"], verify=False)
    assert set(taken.values()) == {1}


@pytest.mark.usefixtures("waiting")
def test_a_bound_on_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are read for many parameters at a time, and before their factors take too much memory."""
    reads = []
    raised = doubt.raised
    monkeypatch.setattr(doubt, "raised", lambda flags: (reads.append(len(flags)), raised(flags))[1])
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x, y = torch.randn(4, 5, 64), torch.randn(4, 320)
    for held, expected in ((1 << 26, [6]), (0, [1] * 6 + [0]), (25_000, [3, 3, 0])):  # 4 x 5 x 128 x 4 bytes each
        reads.clear()
        with cost.using(held=held, tiny=0, outer_norm="tokens"):
            persample.gradients(model, losses, x, y, quantities=["norm"], params=r".*weight", verify=False)
        assert reads == expected


@pytest.mark.usefixtures("waiting")
def test_flags_of_kernels_that_nobody_collects_are_read_at_once() -> None:
    left = torch.tensor([[1.0], [-1.0]]).expand(3, 1, 2, 1)
    right = torch.stack([torch.ones(64), torch.ones(64) + 1e-5]).expand(3, 1, 2, 64).contiguous()
    g = Outer(left.contiguous(), right, torch.Size((1, 64)))
    exact = (right[:, 0, 0] - right[:, 0, 1]).double().square().sum(1)
    with cost.using(tiny=0, outer_norm="tokens"):
        torch.testing.assert_close(reductions.row_dot(g, g).double(), exact, rtol=1e-3, atol=0)
        with doubt.collected() as flags:
            reductions.row_dot(g, g)
    assert len(flags) == 1 and flags[0] and doubt.raised({"a": flags, "b": []}) == ["a"]


def test_the_cpu_is_asked_at_once() -> None:
    with doubt.collected() as flags:
        assert doubt.doubtful(torch.tensor(True)) and not doubt.doubtful(torch.tensor(False))
    assert not flags


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm, self.head = nn.Embedding(30, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.lstm(self.embedding(x))[0][:, -1])
            return out

    return Net(), torch.randint(30, (5, 7)), torch.randn(5, 4)


def convolutions() -> tuple[nn.Module, Tensor, Tensor]:
    layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(72, 4)), torch.randn(5, 3, 9, 9), torch.randn(5, 4)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    net = problem(next(case for case in cases if case.name == "net_gpt_fused_attention"))
    return net.model, net.inputs, torch.ones(len(net.inputs), 1)


def perceptron() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(9, 70), nn.Tanh(), nn.Linear(70, 4)), torch.randn(8, 9), torch.randn(8, 4)


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    "request_", [*QUANTITIES, None], ids=lambda q: q if isinstance(q, str) else "clip" if q else "rows"
)
@pytest.mark.parametrize("make", [perceptron, convolutions, transformer, lstm])
def test_a_run_waits_once(make: Any, request_: Any) -> None:
    """When all parameters are there; inner products of table entries alone need to know how many there are."""
    model, x, y = make()
    with cost.using(tiny=0), Waits() as waits:
        g = persample.gradients(model, losses, x, y, quantities=None if request_ is None else [request_], verify=False)
        if request_ is None:
            g.dense()
    if request_ != "gram" or make in (perceptron, convolutions):
        assert sum(waits.count.values()) <= 1, waits.count
    else:
        assert sum(waits.count.values()) <= 12, waits.count


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("kind", ["squares", "mean_square", "moments", "variance"])
def test_rows_that_are_kept_wait_once_for_each_quantity(kind: str) -> None:
    g = persample.gradients(
        nn.Sequential(*(nn.Linear(30, 30) for _ in range(4))), losses, torch.randn(9, 2, 30), torch.randn(9, 60)
    )
    assert kind in quantities.PARTS
    with cost.using(tiny=0), Waits() as waits:
        g._parts(kind)
    assert sum(waits.count.values()) == 1


def test_the_counter_counts() -> None:
    """The same runs, on a device whose results are looked at one by one."""
    model, x, y = transformer()
    with cost.using(tiny=0), Waits() as waits:
        persample.gradients(model, losses, x, y, quantities=["norm", "variance"], verify=False)
    assert sum(waits.count.values()) > 5


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    ("n", "t", "v"), [(3, 5, 4), (1, 1, 1), (4, 1, 9), (5, 7, 1), (0, 3, 4), (3, 0, 4), (6, 9, 40)]
)
def test_table_entries_in_a_fixed_number(n: int, t: int, v: int) -> None:
    torch.manual_seed(0)
    g, h = (Rows(torch.randint(v, (n, t)), torch.randn(n, t, 2, dtype=torch.float64), torch.Size((v, 2))) for _ in "gh")
    a, b = dense(g).flatten(1), dense(h).flatten(1)
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    with Waits() as waits:
        total, square = reductions.moments(g)
        found = [reductions.row_dot(g, g), reductions.row_dot(g, h), reductions.square_sum(g).flatten()]
        projected = reductions.project(g, torch.ones(v, 2, 3, dtype=torch.float64))
    assert not waits.count
    same(total.flatten(), a.sum(0))
    same(square.flatten(), (a - a.sum(0) / max(1, n)).square().sum(0))
    for value, expected in zip(found, (a.square().sum(1), (a * b).sum(1), a.square().sum(0)), strict=True):
        same(value, expected)
    same(projected, a.sum(1, keepdim=True).expand(n, 3))
