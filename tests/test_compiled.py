"""The compiled engine: the rows of the loop, compiled once, nothing kept of a model, errors with a way out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from test_matrix import Differences, check_model_side, check_quantities, check_rows, check_statistics, requests, truth
from test_matrix import run as run_case
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from zoo import Case, cases

import persample
from persample.errors import BatchCoupledError, CaptureError

compiled = import_module("persample.engines.compiled")
criterion = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated as ever, but without machine code; the first test has that."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that something was compiled."""
    times: list[int] = []
    backend = compiled.Compiled._backend

    def counted(self: Any, graph: Any, inputs: list[Tensor]) -> Any:
        times.append(len(inputs))
        return backend(self, graph, inputs)

    monkeypatch.setattr(compiled.Compiled, "_backend", counted)
    return times


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 6, 6, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def rows(
    model: nn.Module, x: Tensor, y: Tensor, loss: Any = criterion, engine: str = "compiled", **options: Any
) -> Tensor:
    return persample.gradients(model, loss, x, y, engine=engine, verify=False, **options).flat()


def agree(model: nn.Module, *args: Any, **options: Any) -> bool:
    return torch.allclose(rows(model, *args, **options), rows(model, *args, engine="loop"), rtol=0, atol=1e-12)


def test_machine_code_gives_the_rows_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    assert agree(net(), *batch())


CASES = {"mlp", "net_gpt", "reuse_conv_twice", "cut_by_detach"}


@pytest.mark.parametrize("case", [c for c in cases if c.name in CASES], ids=str)
def test_rows_and_every_quantity(case: Case) -> None:
    t, d = truth(case), Differences()
    g = run_case(t.problem, case, "compiled")
    check_rows(d, g, t)
    check_model_side(d, g, t)
    check_quantities(d, g, t, "kept")
    check_statistics(d, run_case(t.problem, case, "compiled", quantities=requests(t, "compiled")), t, "compiled", False)
    assert not d.found, "\n".join(d.found)


def test_a_training_loop_compiles_once(count: list[int]) -> None:
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="compiled")
        G.backward()
        assert torch.allclose(G.flat(), rows(model, x, y, engine="loop"), rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        rows(model, x, y, loss=lambda o, t: nn.functional.cross_entropy(o, t))
    assert len(count) == 2  # two criteria, whatever objects hold them


def test_what_changes_compiles_again(count: list[int]) -> None:
    """Modes, hooks, attributes, shapes: nothing that was compiled before is used for another function."""
    model, (x, y) = nn.Sequential(net(), nn.Dropout(0.5)), batch()
    assert agree(model.eval(), x, y)
    torch.manual_seed(0)
    assert not agree(model.train(), x, y)
    model[1].p = 0.0
    assert agree(model, x, y)
    hook = model[0][0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert agree(model, x, y)
    hook.remove()
    assert agree(model, x, y) and agree(model, *batch(3))
    before = len(count)
    assert agree(model, x, y) and len(count) == before


def test_penalties_and_selections() -> None:
    model, (x, y) = net(), batch()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return criterion(outputs, targets) + model[0].weight.square().sum()

    G = persample.gradients(model, loss, x, y, engine="compiled", params=r"0\.")
    H = persample.gradients(model, loss, x, y, engine="loop", params=r"0\.")
    assert G.names == H.names and torch.allclose(G.flat(), H.flat(), rtol=0, atol=1e-12)


def test_slices_of_equal_size_share_what_is_compiled(count: list[int]) -> None:
    model, (x, y) = net(), batch(6)
    row = 8 * sum(p.numel() for p in model.parameters())
    assert agree(model, x, y, max_bytes=2 * row)
    assert len(count) == 1
    S = persample.gradients(model, criterion, x, y, engine="compiled", quantities=["gram"], max_bytes=2**15)
    flat = rows(model, x, y, engine="loop")
    assert torch.allclose(S.gram(), flat @ flat.T, rtol=0, atol=1e-10)


def test_the_model_is_let_go() -> None:
    def run() -> weakref.ref[nn.Module]:
        model = net()
        rows(model, *batch(), loss=lambda o, t: criterion(o, t) + model[0].weight.sum())
        return weakref.ref(model)

    gone = run()
    gc.collect()
    assert gone() is None


def test_a_generator_repeats_the_draws() -> None:
    model, (x, y) = nn.Sequential(net(), nn.Dropout(0.5)), batch()
    before = torch.get_rng_state()
    first, second, other = (rows(model, x, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


class Reads(nn.Module):
    """Something that can't be compiled, though ``torch.func`` follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with open("/dev/null"):
            return self.linear(x)


def test_what_cannot_be_compiled_says_why_and_what_to_do() -> None:
    model, x, y = Reads(), torch.randn(5, 4), torch.randint(3, (5,))
    assert rows(model, x, y, engine="vmap").shape == (5, 15)
    with pytest.raises(CaptureError, match=r"(?s)torch.compile can't compile this model: .*open.*Use engine='vmap'"):
        rows(model, x, y)
    with torch.compiler.set_stance("force_eager"), pytest.raises(CaptureError, match="switched off"):
        rows(net(), *batch())


class Checkpointed(nn.Module):
    """Recomputes its layer in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False)


def test_a_failed_compilation_leaves_nothing_switched_off() -> None:
    model, x, y = Checkpointed(), torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(CaptureError, match=r"torch.func can't follow this model: .*saved tensor hooks"):
        rows(model, x, y)
    with torch.autograd.graph.save_on_cpu():
        assert model(x).shape == (5, 3)


class RefusesTransforms(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError("not inside of vmap")
        return super().forward(x)


class Refuses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("the model's own")


def test_whatever_a_transform_raises_is_named_and_what_the_model_raises_stays() -> None:
    x, y = torch.randn(5, 3), torch.arange(5) % 3
    with pytest.raises(CaptureError, match=r"torch.func can't follow this model: not inside of vmap"):
        persample.gradients(RefusesTransforms(3, 3), nn.CrossEntropyLoss(), x, y, engine="vmap")
    with pytest.raises(KeyError, match="the model's own"):
        persample.gradients(Refuses(3, 3), nn.CrossEntropyLoss(), x, y, engine="vmap")


def test_more_versions_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KEPT", 1)
    model = net()
    rows(model, *batch(2))
    with pytest.raises(CaptureError, match="for 1 combinations of shapes"):
        rows(model, *batch(3))
    assert agree(model, *batch(2))


class Aside(nn.Module):
    """A weight behind a reference of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.weights = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0].T + self.linear.bias


@pytest.mark.parametrize(
    "model, error",
    [(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), BatchCoupledError), (Aside(), CaptureError)],
    ids=["BatchNorm", "hidden"],
)
def test_what_vmap_refuses_is_refused_every_time(model: nn.Module, error: type[Exception]) -> None:
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    for _ in range(2):
        with pytest.raises(error):
            rows(model, x, y)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop", "compiled"])
def test_a_compiled_step_may_ask_for_gradients(engine: str) -> None:
    model, (x, y) = net(), batch()

    def step(scale: Tensor) -> Tensor:
        return (scale + 1) * rows(model, x, y, engine=engine).norm(dim=1).sin()

    scale = torch.ones((), dtype=torch.float64)
    expected = 2 * rows(model, x, y, engine="loop").norm(dim=1).sin()
    assert_close(torch.compile(step, backend="aot_eager")(scale), expected, rtol=0, atol=1e-12)


def test_a_handle_on_what_was_compiled_before() -> None:
    model, (x, y), got = net(), batch(), list[persample.Gradients]()
    expected = rows(model, x, y, engine="loop")
    compiled_model = torch.compile(model, backend="eager")
    compiled_model(x)
    with pytest.warns(UserWarning, match=r"torch\.compile was given this.*Extend what torch\.compile returned") as seen:
        persample.extend(model, on_backward=got.append, reduction="mean").remove()
    assert {w.filename for w in seen} == {__file__}
    handle = persample.extend(compiled_model, on_backward=got.append, reduction="mean")
    criterion(compiled_model(x), y).backward()
    handle.remove()
    with persample.extend(model) as recorder:
        got.append(recorder.gradients(nn.functional.cross_entropy(compiled_model(x), y, reduction="none")))
    assert len(got) == 2 and all(assert_close(G.flat(), expected, rtol=0, atol=1e-12) is None for G in got)
