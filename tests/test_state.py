"""What passes leave behind, and what they are run with again: random numbers of all kinds, buffers of model and
criterion, and graphs of the user's that have saved them.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N = 6
CE = nn.CrossEntropyLoss()


class MasksSpectra(nn.Module):
    """Some frames are replaced by a learned vector, drawn by NumPy or by Python, as in ``transformers``."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.inner, self.out = by, nn.Linear(5, 7), nn.Linear(7, 3)
        self.mask = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0] * x.shape[1]
        drawn = np.random.rand(count) if self.by == "numpy" else [random.random() for _ in range(count)]  # noqa: NPY002
        where = torch.as_tensor(drawn).view(x.shape[:2]) < 0.3
        return self.out(torch.where(where[..., None], self.mask, self.inner(x)).tanh()).mean(1)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 8, 5).double(), torch.randint(3, (N,))


@pytest.mark.parametrize("by", ["numpy", "python"])
@pytest.mark.parametrize("options", [{}, {"max_bytes": 1}, {"max_bytes": 20_000}])
@pytest.mark.parametrize("verify", [True, False])
def test_draws_of_numpy_and_python(by: str, options: dict[str, Any], verify: bool) -> None:
    model, (x, y) = MasksSpectra(by).double(), batch()
    for seed in range(5):
        np.random.seed(seed), random.seed(seed)  # noqa: NPY002
        S = persample.gradients(
            model, CE, x, y, quantities=["norm", ("project", {"projection": torch.eye(73).double()}), "gram"],
            verify=verify, **options,
        )  # fmt: skip
        rows = S.project()  # of the very draws that the inner products are of
        torch.testing.assert_close(S.gram(), rows @ rows.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(S.norm(), rows.norm(dim=1), rtol=1e-9, atol=1e-12)
        assert S.losses is not None and not S.note.startswith("batch-coupled")


@pytest.mark.parametrize("by", ["numpy", "python"])
def test_a_generator_repeats_them_and_leaves_them_alone(by: str) -> None:
    model, (x, y) = MasksSpectra(by).double(), batch()
    before = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]  # noqa: NPY002
    one, two, other = (
        persample.gradients(model, CE, x, y, generator=torch.Generator().manual_seed(seed)).flat() for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.allclose(one, other)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # type: ignore[union-attr]  # noqa: NPY002


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


CALLS: dict[str, Any] = {
    **{
        notion: lambda m, x, y, notion=notion: persample.gradients(m, CE, x, y, coupled=notion)
        for notion in ("loss", "copy", "frozen", "influence", "eval")
    },
    "coupling": lambda m, x, y: persample.coupling(m, CE, x, y).norms(),
    "uncoupled": lambda m, x, y: persample.gradients(m, CE, x, y, params=r"3\."),
    "check": lambda m, x, y: persample.check(m, CE, x, y, params=r"3\."),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_graphs_of_the_user_stay_whole(call: Any) -> None:
    """A forward of the user's has saved running statistics, which are put back as if nobody had touched them."""
    model, x, y = normed(), torch.randn(N, 5).double(), torch.randint(3, (N,))
    loss = CE(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    call(model, x, y)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Normalises(nn.Module):
    """A criterion with running statistics of its own, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.norm(outputs), targets, reduction="none")


@pytest.mark.parametrize("call", ["loss", "eval", "coupling"])
def test_buffers_of_the_criterion_stay_under_coupling(call: str) -> None:
    model, x, y, criterion = normed(), torch.randn(N, 5).double(), torch.randint(3, (N,)), Normalises().double()
    before = {name: b.clone() for name, b in criterion.named_buffers()}
    if call == "coupling":
        persample.coupling(model, criterion, x, y).norms()
    else:
        persample.gradients(model, criterion, x, y, coupled=call)
    assert all(torch.equal(b, before[name]) for name, b in criterion.named_buffers())


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_buffers_of_the_criterion_are_those_of_one_call(engine: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(outputs, targets, reduction="none")

    criterion = Counts()
    persample.gradients(
        nn.Linear(5, 3).double(), criterion, torch.randn(N, 5).double(), torch.arange(N) % 3, engine=engine
    )
    assert criterion.calls == 1


def test_a_coupling_notices_buffers_and_criteria_that_changed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()
            self.register_buffer("scale", torch.tensor(2.0).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.scale)

    for change, what in (
        (lambda m, c: m.scale.mul_(3), "buffer 'scale' changed"),
        (lambda m, c: c.weight.mul_(3), "buffer 'weight' of loss_fn changed"),
        (lambda m, c: setattr(m.net[1], "eps", 0.5), r"the eps of module 'net\.1' changed"),
    ):
        model, x, y = Scaled(), torch.randn(N, 5).double(), torch.arange(N) % 3
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum")
        C = persample.coupling(model, criterion, x, y)
        C.gradients("frozen"), model(x)
        change(model, criterion)
        with pytest.raises(persample.InplaceError, match=what):
            C.gradients("loss")


def test_another_generator_behind_numpy() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        model, (x, y) = MasksSpectra("numpy").double(), batch()
        G = persample.gradients(model, CE, x, y, max_bytes=1, quantities=["norm", "gram"])
        torch.testing.assert_close(G.gram().diagonal(), G.norm().square(), rtol=1e-9, atol=1e-12)
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("engine", ["hooks", "loop", "vmap"])
@pytest.mark.parametrize(
    "buffer", [torch.eye(5).to_sparse(), torch.full((1,), torch.nan).expand(3), torch.empty(2, device="meta")]
)
def test_buffers_of_all_kinds(buffer: Tensor, engine: str) -> None:
    model, x, y = nn.Linear(5, 3).double(), torch.randn(N, 5).double(), torch.arange(N) % 3
    expected = persample.gradients(model, CE, x, y)
    model.register_buffer("other", buffer)
    G = persample.gradients(model, CE, x, y, engine=engine, verify=True)
    torch.testing.assert_close(G.flat(), expected.flat(), rtol=1e-9, atol=1e-12)
    assert model.other is buffer


def test_a_forward_that_reads_what_a_norm_has_just_updated_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            return self.last(h - self.norm.running_mean)

    model, x, y = Reads().double(), torch.randn(N, 5).double(), torch.arange(N) % 3
    for notion in ("loss", "frozen", "influence"):
        with pytest.raises(persample.BatchCoupledError, match="running statistics that this forward updates"):
            persample.gradients(model, CE, x, y, coupled=notion, verify=True)


class Updates(nn.Module):
    """Writes its weight at every forward, where torch doesn't count it."""

    def __init__(self, update: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.update = nn.Parameter(torch.randn(3, 2)), update

    def forward(self, x: Tensor) -> Tensor:
        self.update(self.weight.data)
        return x @ self.weight


def _rolled(w: Tensor) -> Tensor:
    return w.copy_(w.roll(1))


def _flipped(w: Tensor) -> Tensor:  # comes back with every second forward
    return w.copy_(w.flip(0, 1))


def _partly(w: Tensor) -> Tensor:
    w[0] = torch.nan
    return w[1:].mul_(2)


def _hardly(w: Tensor) -> Tensor:  # far less than a sum of all entries would tell
    w[0, 0] = 1e4
    return torch.nextafter(w[1:], w.new_tensor(9.0), out=w[1:])


class Late:
    """Nothing in the first forwards."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w.mul_(2) if self.calls > 3 else w


def _clamped(w: Tensor) -> Tensor:
    return w.clamp_(-0.5, 0.5)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return CE(outputs, targets) * self.weight


def _grown(w: Tensor) -> Tensor:
    return w.mul_(1.001)


IN_TURNS: list[dict[str, Any]] = [
    {"engine": "loop"},
    {"max_bytes": 1},
    {"max_bytes": 1, "quantities": ["norm", "sum"]},
]


@pytest.mark.parametrize("options", IN_TURNS)
def test_a_parameter_that_every_forward_changes_is_refused(options: dict[str, Any]) -> None:
    x, y = torch.randn(7, 3), torch.randint(2, (7,))
    weighted = Weighted()  # its parameter has the same name
    updates = (_grown, _rolled, _flipped, _partly, _hardly, Late())
    for update, criterion in (*((update, CE) for update in updates), (_grown, weighted)):
        with pytest.raises(persample.CaptureError, match=r"'weight' changes whenever .* outside of the forward"):
            persample.gradients(Updates(update), criterion, x, y, verify=False, **options)
    # what stays after the first forward has one value for all
    model = Updates(_clamped)
    G = persample.gradients(model, CE, x, y, verify=False, **options)
    want = persample.gradients(model, CE, x, y, quantities=["norm"])
    torch.testing.assert_close(G.norm(), want.norm())


@pytest.mark.parametrize("options", IN_TURNS)
def test_parameters_of_all_kinds_stay(options: dict[str, Any]) -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    kinds = {
        "float8": torch.randn(2, 3).to(torch.float8_e4m3fn), "integer": torch.ones(3, dtype=torch.int32),
        "half": torch.randn(3).half(), "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 3), "number": torch.tensor(1.0), "nan": torch.tensor([torch.nan, 1.0]),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    for name, value in kinds.items():
        model.register_parameter(f"kept_{name}", nn.Parameter(value, requires_grad=False))
    G = persample.gradients(model, CE, x, y, params=["weight"], verify=False, **options)
    want = persample.gradients(model, CE, x, y, params=["weight"], quantities=["norm"])
    torch.testing.assert_close(G.norm(), want.norm())


@pytest.mark.parametrize("at", range(100, 470, 10))
def test_an_interrupt_leaves_the_model_its_own_parameters(at: int) -> None:
    """Whichever line of torch's swapping it comes in."""
    model, x, y = (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval(),
        torch.randn(4, 3),
        torch.tensor([0, 1, 1, 0]),
    )
    before, lines = {**dict(model.named_parameters()), **dict(model.named_buffers())}, 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if "stateless" not in frame.f_code.co_filename and "named_member_accessor" not in frame.f_code.co_filename:
            return trace if frame.f_back is not None and event == "call" else None
        lines += event == "line"
        if lines == at + 1 and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    with contextlib.suppress(KeyboardInterrupt):
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="vmap", verify=False)
    sys.settrace(None)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        assert before[name] is t


CALLS: dict[str, Callable[..., Any]] = {
    **{engine: partial(persample.gradients, engine=engine) for engine in ("hooks", "vmap", "loop")},
    "not verified": partial(persample.gradients, verify=False),
    "reduced": partial(persample.gradients, quantities=["norm"]),
    "slices": partial(persample.gradients, max_bytes=1000),
    "check": persample.check,
    "explain": persample.explain,
    "kfac": persample.curvature.kfac,
    "hvp": lambda *given: persample.curvature.hvp(*given).dense(),
    "recorder": lambda model, loss_fn, x, y: recorded(model, x, y),
}


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    with persample.extend(model) as recorder:
        return recorder.gradients(F.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_is_dropped_is_gone(name: str) -> None:
    """Not only when garbage is collected, which may be long after the memory is needed."""

    def dropped() -> weakref.ref[Tensor]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        result = CALLS[name](model, nn.CrossEntropyLoss(), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        weight = weakref.ref(model[0].weight)
        del model, result
        return weight

    dropped()  # what is imported at the first call holds on to it
    gc.collect()
    gc.disable()
    try:
        assert dropped()() is None
    finally:
        gc.enable()
