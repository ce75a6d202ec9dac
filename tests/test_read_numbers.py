"""Numbers of the whole batch that Python reads decide what a model does.  A first batch may go the way on which samples
are alone: a later one that goes another way is verified, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import persample

N, D = 4, 5
Y = torch.tensor([0, 1, 2, 0])


class Between(nn.Module):
    def __init__(self, act: Callable[[Between, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(D, D), nn.Linear(D, 3), act
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self, x, self.first(x).tanh()))
        return out


def until_close(done: Callable[[Tensor, Tensor], bool]) -> Callable[[Between, Tensor, Tensor], Tensor]:
    """A fixed point, iterated until it is there for all samples."""

    def act(_: Between, x: Tensor, u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(12):
            z, before = 0.5 * x.square().sum(1, keepdim=True) * z.sin() + u, z
            if done(z, before):
                break
        return z

    return act


def after_warm_up(model: Between, x: Tensor, h: Tensor) -> Tensor:
    model.step += 1
    return (h @ h.mT).softmax(0).mT @ h if model.step > 5 else (h * h) @ torch.eye(D, dtype=h.dtype)


ACTS: dict[str, Callable[[Between, Tensor, Tensor], Tensor]] = {
    "any": lambda _, x, h: h * 0.5 if (x > 2).any() else h,
    "all": lambda _, x, h: h if bool(torch.all(x <= 2)) else h * 0.5,
    "count": lambda _, x, h: h / max(1, int((x > 2).sum())),
    "count_nonzero": lambda _, x, h: h / max(1, torch.count_nonzero(x > 2).item()),
    "tensor": lambda _, x, h: h / (x > 2).sum().clamp(min=1),
    "as_a_float": lambda _, x, h: h / (x > 2).sum().double().clamp(min=1),
    "any_of_numbers": lambda _, x, h: h * 0.5 if (x - 2).relu().any() else h,
    "largest_integer": lambda _, x, h: h * 0.5 if int(x.long().max()) > 2 else h,
    "a_list": lambda _, x, h: h / max(1.0, max(x.abs().amax(1).tolist()) - 1),
    "numpy": lambda _, x, h: h / max(1.0, float(x.numpy().max()) - 1),
    "equal": lambda _, x, h: h if torch.equal(x, x.clamp(max=2)) else h * 0.5,
    "contains": lambda _, x, h: h * 0.5 if 3.0 in x else h,
    "array": lambda _, x, h: h / max(1.0, float(np.asarray(x).max()) - 1),
    "is_nonzero": lambda _, x, h: h * 0.5 if torch.is_nonzero((x > 2).sum()) else h,
    "allclose": until_close(lambda z, before: torch.allclose(z, before, atol=1e-2)),
    "all_below": until_close(lambda z, before: bool(((z - before).abs().amax(1) < 1e-2).all())),
}


def each_alone(model: nn.Module, x: Tensor) -> Tensor:
    rows = persample.gradients(model, nn.CrossEntropyLoss(), x, Y, engine="loop", verify=False)
    return rows.flat()


@pytest.mark.parametrize("name", ACTS)
def test_a_batch_in_which_it_acts(name: str) -> None:
    """The batches before go the other way; in the last one, the third sample acts on all others."""
    torch.manual_seed(0)
    model = Between(ACTS[name]).double()
    for _ in range(3):
        x = torch.rand(N, D, dtype=torch.double) * 0.1
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, Y)
        assert not G.note
        torch.testing.assert_close(G.flat(), each_alone(model, x), rtol=1e-9, atol=1e-12)
    x = torch.rand(N, D, dtype=torch.double) * 0.1
    x[2, :2] = 3.0
    x[2, 2] = 3.1
    try:
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, Y)
    except persample.BatchCoupledError:
        return
    assert "batch-coupled" in G.note
    assert not torch.allclose(G.flat(), each_alone(model, x))


def test_a_step_that_is_counted_in_a_buffer() -> None:
    torch.manual_seed(0)
    model = Between(after_warm_up).double()
    x = torch.randn(N, D, dtype=torch.double)
    for _ in range(5):
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, Y)
    assert not G.note
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, nn.CrossEntropyLoss(), x, Y)


class Trimmed(nn.Module):
    """Cuts off what no sample needs; the mean then counts the padding of shorter ones."""

    def __init__(self, longest: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.longest = nn.Linear(D, D), nn.Linear(D, 3), longest

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x[:, : self.longest(lengths)]).tanh().mean(1))
        return out


@pytest.mark.parametrize("longest", [lambda n: int(n.max()), lambda n: n.max(), lambda n: n.amax().item()])
def test_batches_that_are_cut_to_their_longest_sample(longest: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    for at in range(N):
        model, lengths = Trimmed(longest).double(), torch.tensor([2, 3, 1, 2])
        lengths[at] = 6
        x = torch.randn(N, 6, D, dtype=torch.double)
        for _ in range(2):
            try:
                G = persample.gradients(model, nn.CrossEntropyLoss(), (x, lengths), Y)
            except persample.BatchCoupledError:
                continue
            assert "batch-coupled" in G.note


def test_numbers_that_are_read_and_change_nothing_cost_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that isn't used where it is full, as transformers have it: looked at when the answer is a new one."""
    verify = import_verify()
    looked: list[int] = []
    moved = verify.moved_by_others
    monkeypatch.setattr(verify, "moved_by_others", lambda *given: looked.append(1) or moved(*given))

    def act(_: Between, x: Tensor, h: Tensor) -> Tensor:
        mask = x > -1
        return h if mask.all() else h * mask

    torch.manual_seed(0)
    model = Between(act).double()
    for step in range(40):
        x = torch.rand(N, D, dtype=torch.double) - 2 * (step >= 20) * torch.eye(N, D, dtype=torch.double)
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, Y)
        assert not G.note
        torch.testing.assert_close(G.flat(), each_alone(model, x), rtol=1e-9, atol=1e-12)
    assert len(looked) == 2


def import_verify() -> Any:
    from importlib import import_module

    return import_module("persample.verify")


@pytest.mark.parametrize("how", ["shift", "reference"])
def test_of_two_samples_the_second_is_verified(how: str) -> None:
    """What the first one does to the others doesn't show in its own loss."""

    def act(_: Between, x: Tensor, h: Tensor) -> Tensor:
        before = torch.cat([torch.zeros(1, D, dtype=x.dtype), x[:-1]]) if how == "shift" else x - x[0]
        return h + before

    torch.manual_seed(0)
    model = Between(act).double()
    try:
        G = persample.gradients(model, nn.CrossEntropyLoss(), torch.randn(2, D, dtype=torch.double), Y[:2])
    except persample.BatchCoupledError:
        return
    assert "batch-coupled" in G.note


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("verify", [None, False])
def test_inputs_that_the_forward_changes_in_place(engine: str, verify: bool | None) -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(x.sub_(0.5).mul_(2))
            return out

    model, x = Normalises().double(), torch.rand(N, D, dtype=torch.double)
    given = x.clone()
    G = persample.gradients(model, nn.CrossEntropyLoss(), given, Y, engine=engine, verify=verify)
    losses = F.cross_entropy(model(x.clone()), Y, reduction="none")
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, [*model.parameters()], retain_graph=True)])
        for v in losses
    ]
    torch.testing.assert_close(G.flat(), torch.stack(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_token_in_front_of_each_samples_own_sequence(learned: bool, bias: bool) -> None:
    """Padded to the longest of the batch, which counts if the last layer has a bias."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.first = nn.Parameter(torch.randn(1, D)), nn.Linear(D, D)
            self.last = nn.Linear(D, 3, bias=bias)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            token = self.token if learned else torch.zeros(1, D, dtype=x.dtype)
            parts = [torch.cat([token, h[:n]]) for h, n in zip(self.first(x).tanh(), lengths.tolist(), strict=True)]
            out: Tensor = self.last(pad_sequence(parts, batch_first=True)).sin().sum(1)
            return out

    torch.manual_seed(0)
    model = Model().double()
    for lengths in ([3, 6, 1, 4], [6, 5, 3, 3], [2, 2, 6, 2]):
        given = torch.randn(N, 6, D, dtype=torch.double), torch.tensor(lengths)
        want = persample.gradients(model, persample_losses, given, Y, engine="loop", verify=False).flat()
        if bias:
            with pytest.raises(persample.BatchCoupledError):
                persample.gradients(model, persample_losses, given, Y)
        else:
            G = persample.gradients(model, persample_losses, given, Y)
            torch.testing.assert_close(G.flat(), want, rtol=1e-9, atol=1e-12)


def persample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_a_grid_of_samples_and_parameters(both: bool, indexing: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.points = nn.Linear(D, 1), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            u, v = torch.meshgrid(self.first(x)[:, 0], self.points, indexing=indexing)
            u, v = (u, v) if indexing == "ij" else (u.T, v.T)
            return v * u if both else v * x[:, :1]

    model, x = Model().double(), torch.randn(N, D, dtype=torch.double)
    loss = lambda outputs, _: outputs.sin().sum(1)  # noqa: E731
    want = persample.gradients(model, loss, x, engine="loop").flat()
    assert want.any()
    for verify in (None, False):
        G = persample.gradients(model, loss, x, verify=verify)
        torch.testing.assert_close(G.flat(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("engine", ["hooks", "loop", "vmap"])
def test_a_loss_that_was_computed_beforehand(engine: str, verify: bool | None) -> None:
    model, x = nn.Linear(D, 3), torch.randn(N, D)
    criterion = nn.CrossEntropyLoss()
    before = criterion(model(x), Y)
    error = persample.CaptureError if engine == "vmap" else persample.LossError
    why = "used through a reference of its own" if engine == "vmap" else "doesn't use what the model returns"
    for wrong in (lambda *_: before, lambda *_: criterion(model(x), Y))[: 1 if engine == "vmap" else 2]:
        with pytest.raises(error, match=why):
            persample.gradients(model, wrong, x, Y, engine=engine, verify=verify)
    before.backward()  # its graph is still there
    assert model.weight.grad is not None


@pytest.mark.parametrize("verify", [None, False])
def test_a_penalty_that_was_computed_beforehand(verify: bool | None) -> None:
    """It belongs to every loss; torch.func doesn't see it, and says so."""
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(N, D).double()
    penalty = model[0].weight.square().sum()
    loss = lambda o, t: nn.functional.cross_entropy(o, t, reduction="none") + penalty  # noqa: E731
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
        for each in loss(model(x), Y)
    ]
    for engine in ("loop", "hooks"):
        G = persample.gradients(model, loss, x, Y, engine=engine, verify=verify)
        torch.testing.assert_close(G.flat(), torch.stack(rows), rtol=1e-9, atol=1e-12)
        penalty = model[0].weight.square().sum()
    with pytest.raises(persample.CaptureError, match=r"parameter '0.weight' is used through .* computed from it"):
        persample.gradients(model, loss, x, Y, engine="vmap", verify=verify)
