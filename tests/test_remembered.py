"""What lasts from one call to the next: verifications, results, arguments; each only for as long as it is true."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample import remembered, statistics, verify

N, D = 6, 4


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sine(out: Tensor, _: Any = None) -> Tensor:
    return out.sin().flatten(1).sum(1)


def linear(out: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, out).double()


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-9 * (1 + float(b.abs().max()))


# ---- verifications --------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """By the largest of the batch, if it is told to."""

    def __init__(self, scales: Any = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scales, self.calls = nn.Linear(D, 5).double(), nn.Linear(5, 3).double(), scales, 0

    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        self.calls += 1
        z = self.a(x)
        scales = self.scales[-1] if isinstance(self.scales, list) else self.scales
        if scales or (how is not None and how.scales):
            z = z / z.abs().amax(0)
        out: Tensor = self.b(z.tanh())
        return out

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled)

    def __hash__(self) -> int:
        return 1


class How:
    def __init__(self, scales: bool) -> None:
        self.scales = scales


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z / z.abs().amax(0)


def replaced(model: Scaled) -> None:
    torch.manual_seed(0)
    model.a = Layer(D, 5).double()


CHANGES: dict[str, Callable[[Scaled], Any]] = {
    "a flag": lambda m: setattr(m, "scales", True),
    "in a list": lambda m: setattr(m, "scales", [False, True]),
    "another layer": replaced,
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in CHANGES for how in ({}, {"quantities": ["norm"]})),
        *(
            (name, {"engine": "loop"}) for name in CHANGES if name != "in a list"
        ),  # which calls are made isn't seen there
    ],
)
def test_a_model_that_was_changed(name: str, how: dict[str, Any]) -> None:
    model = Scaled()
    for _ in range(2):
        persample.gradients(model, sine, x(), **how)
    CHANGES[name](model)
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, sine, x(), **how)


def test_inputs_and_models_that_look_alike() -> None:
    model = Scaled()
    persample.gradients(model, sine, (x(), How(False)))
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, sine, (x(), How(True)))
    with pytest.raises(persample.BatchCoupledError):  # another model, equal by its own word
        persample.gradients(Scaled(True), sine, x())


def test_criteria_with_lists_globals_and_names_without_values() -> None:
    class Criterion:
        def __init__(self, kinds: list[str]) -> None:
            self.kinds = kinds

        def __call__(self, out: Tensor, _: Any) -> Tensor:
            return sine(out - out.median(0).values if self.kinds[0] == "all" else out)

    model = linear()
    persample.gradients(model, Criterion(["own"]), x())
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, Criterion(["all"]), x())

    def made() -> Callable[[Tensor, Any], Tensor]:
        def criterion(out: Tensor, _: Any) -> Tensor:
            return sine(later if out is None else out)

        if len(str(out)) < 0:
            later = out
        return criterion

    out = None
    assert close(persample.gradients(model, made(), x()).flat(), persample.gradients(model, sine, x()).flat())


def test_a_rule_that_came_later_is_verified() -> None:
    model = linear()
    persample.gradients(model, sine, x())

    @persample.rule(F.linear)
    def wrong(call: Any, g: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[Any]:
        yield weight, lambda: g.new_zeros(len(g), *weight.shape)

    try:
        with pytest.raises(persample.VerificationError, match="weight"):
            persample.gradients(model, sine, x())
    finally:
        wrong.remove()
    persample.gradients(model, sine, x())


def test_rules_are_removed_in_any_order() -> None:
    def rule(call: Any, g: Tensor, *args: Any) -> Iterator[Any]:
        yield from ()

    first, second = (persample.rule(torch.frac)(copy.copy(rule) if i else lambda *a: iter(())) for i in range(2))
    first.remove()
    assert persample.rules.RULES[torch.frac] is second
    second.remove()
    second.remove()
    assert torch.frac not in persample.rules.RULES


def test_counters_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that counts is not another model every time; and what is remembered has a bound."""
    model, alone = Scaled(), list[int]()
    monkeypatch.setattr(verify, "_alone", lambda *a, old=verify._alone: alone.append(a[1]) or old(*a))
    for _ in range(4):
        persample.gradients(model, sine, x())
    assert len(alone) == 1
    monkeypatch.setattr(remembered, "KEPT", 2)
    for n in range(1, 5):
        persample.gradients(model, sine, x(n, D))
    assert len(remembered._memory(model).known) <= 2


def test_threads_take_turns_over_a_model() -> None:
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    right, wrong = persample.gradients(model, sine, x()).flat(), list[Any]()

    def work(engine: str) -> None:
        try:
            found = [persample.gradients(model, sine, x(), engine=engine).flat() for _ in range(8)]
            wrong.extend(engine for rows in found if not close(rows, right))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in ("hooks", "vmap", "vmap", "loop")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(type(p) is nn.Parameter for p in model.parameters())


# ---- outputs that no sample owns --------------------------------------------------------------------------------


class Centres(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.l, self.c = linear(), nn.Parameter(torch.randn(number, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.l(x).tanh(), self.c


@pytest.mark.parametrize("number", [1, 2, 3, N])
def test_outputs_of_the_size_of_a_batch_or_a_slice(number: int) -> None:
    near = lambda out, _: torch.cdist(out[0], out[1]).min(1).values.mean()  # noqa: E731
    model = Centres(number)
    truth = persample.gradients(model, near, x(), engine="loop")
    for options in ({}, {"max_bytes": 1}, {"verify": False}):
        G = persample.gradients(model, near, x(), **options)  # type: ignore[arg-type]
        assert close(G.flat(), truth.flat()) and close(G.losses, truth.losses)
    assert tuple(persample.gradients(model, near, x(), max_bytes=1).outputs[1].shape) == (number, 3)


def test_slices_that_are_run_again_must_be_the_same() -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.noise = linear(), itertools.count(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.l(x) * next(self.noise)
            return out

    for asked in (["gram"], ["norm", "cosine"]):
        with pytest.raises(persample.errors.RandomnessError, match="run again"):
            persample.gradients(Drifts(), sine, x(), max_bytes=1, quantities=asked, verify=False)


# ---- results ------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda G: pickle.loads(pickle.dumps(G)),
    "save": lambda G: _saved(G),
}


def _saved(G: Any) -> Any:
    file = io.BytesIO()
    torch.save(G, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", COPIES)
def test_results_can_be_copied(name: str) -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, D)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    G = persample.gradients(model, sine, x())
    R = persample.attribution.Projection(4, seed=0)
    S = persample.gradients(model, sine, x(), quantities=["gram", "variance", ("project", {"projection": R})])
    S.variance()
    H, T = COPIES[name](G), COPIES[name](S)
    assert close(H.gram(), G.gram()) and close(H["1.weight"], G["1.weight"]) and H.names == G.names
    assert close(T.gram(), S.gram()) and close(T.project(), S.project()) and close(T.std()["3.bias"], S.std()["3.bias"])
    H["1.bias"].mul_(2)
    assert close(G.flat(), persample.gradients(model, sine, x()).flat())


def results(model: nn.Module) -> list[Any]:
    """Of every kind: kept, reduced, recorded, reported, of some parameters."""
    G = persample.gradients(model, sine, x())
    S = persample.gradients(model, sine, x(), quantities=["mean", "variance"])
    with persample.extend(model) as recorder:
        R = recorder.gradients(sine(model(x())))
    found: list[Any] = []
    handle = persample.extend(model, on_backward=found.append, reduction="mean")
    sine(model(x())).mean().backward()
    handle.remove()
    model.zero_grad()
    return [G, S, R, *found, G.select("1"), copy.copy(G)]


@pytest.mark.parametrize("first", ["model", "result"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_together_with_the_model_writes_into_the_copied_model(name: str, first: str) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, 3)).double()
    for G in results(model):
        pair = COPIES[name]((model, G) if first == "model" else (G, model))
        other, H = pair if first == "model" else pair[::-1]
        gc.collect()
        for again, result in ((other, H), COPIES[name]((other, H)), (other, copy.copy(H))):  # copies of copies too
            again.zero_grad()
            result.backward()
            mean = G.mean()
            assert all(p.grad is None for p in model.parameters())
            assert all(close(again.get_parameter(n).grad, mean[n]) for n in mean)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_alone_has_no_model_to_write_to(name: str) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, 3)).double()
    for G in results(model):
        H = COPIES[name](G)
        gc.collect()
        with pytest.raises(persample.QuantityError, match=r"'(0|1)\.weight' of a model .* copied without its model"):
            H.backward()
        assert all(close(H.mean()[n], G.mean()[n]) for n in G.names)
        G.backward()
        model.zero_grad()
    G = results(model)[0]
    H = COPIES[name](G)
    assert H.select(lambda _, p: p.ndim == 2).names == ("0.weight", "1.weight")
    v = torch.ones(H.flat().shape[1], dtype=torch.float64)
    with pytest.raises(persample.QuantityError, match="complex, but the rows are real"):
        H.dot(v + 1j * v)


def test_arguments_that_were_changed() -> None:
    model, v, bound = linear(), x(3 * D + 3), torch.tensor(0.1, dtype=torch.float64)
    S = persample.gradients(model, sine, x(), quantities=[("dot", {"direction": v}), ("clip", {"max_norm": bound})])
    G = persample.gradients(model, sine, x())
    assert close(S.dot(v), G.dot(v)) and close(S.clip(bound)["bias"], G.clip(0.1)["bias"])
    v.neg_()
    bound.fill_(1.0)
    with pytest.raises(persample.QuantityError, match="before it was changed"):
        S.dot(v)
    with pytest.raises(persample.QuantityError, match=r"clipped at 0\.1"):
        S.clip(bound)
    assert close(S.dot(), G.dot(-v))
    for ask in (lambda: G.dot(v + 1j * v), lambda: G.project((v + 1j * v)[:, None])):
        with pytest.raises(persample.QuantityError, match="complex, but the rows are real"):
            ask()


def strided(*stride: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.empty(rows.numel(), dtype=rows.dtype).as_strided(rows.shape, stride)


def test_memory_that_overlaps() -> None:
    G = persample.gradients(nn.Sequential(linear(5), nn.Linear(5, 3).double()), sine, x())
    rows = G.flat()
    with pytest.raises(persample.QuantityError, match="share it"):
        G.flat(out=strided(1, 1)(rows))
    with pytest.raises(persample.QuantityError, match="share it"):
        G.flat(out=torch.empty(1, rows.shape[1], dtype=rows.dtype).expand_as(rows))
    with pytest.raises(persample.QuantityError, match="requires grad"):
        G.flat(out=torch.empty_like(rows, requires_grad=True))
    with pytest.raises(persample.QuantityError, match="must be a tensor"):
        G.flat(out=[1])  # type: ignore[arg-type]
    wide = torch.empty(N, 8, 5, dtype=rows.dtype)
    out = {name: torch.empty_like(G[name]) for name in G.names}
    with pytest.raises(persample.QuantityError, match=r"'0\.weight' and '1\.weight' overlap"):
        G.dense(out={**out, "0.weight": wide[:, :5, :4], "1.weight": wide[:, 4:7]})
    columns = torch.empty(N, rows.shape[1] + 3, dtype=rows.dtype)[:, 1:-2]
    pieces = columns.split([s.numel() for s in G.shapes.values()], 1)
    G.dense(out={name: p.unflatten(1, G.shapes[name]) for name, p in zip(G.names, pieces, strict=True)})
    assert close(columns, rows) and close(G.flat(out=torch.empty_like(rows.T.contiguous()).T), rows)


def test_norms_that_overflow_do_not_drop_rows() -> None:
    rows = torch.tensor([[1.0, 1.0], [5e19, 1.0]])
    total = persample.Gradients({"w": persample.factors.Dense(rows)}, torch.zeros(2)).clip(1.0)["w"]
    assert total.isnan().all()


# ---- accumulators ---------------------------------------------------------------------------------------------------


def test_what_accumulators_hand_out_is_the_callers() -> None:
    G = persample.gradients(linear(), sine, x())
    moments, norms, edges = statistics.Moments(), statistics.Norms(), torch.tensor([0.0, 1.0])
    histogram = statistics.Histogram(edges)
    for accumulator in (moments, norms, histogram):
        accumulator.update(G)  # type: ignore[attr-defined]
    moments.compute().mean()["weight"].mul_(0.5)
    norms.compute().zero_()
    histogram.compute().zero_()
    edges.add_(5)
    histogram.update(G)
    assert close(moments.compute().mean()["weight"], G.mean()["weight"]) and close(norms.compute(), G.norm())
    assert torch.equal(histogram.compute(), 2 * statistics.histogram(G, torch.tensor([0.0, 1.0])))


def test_edges_are_not_rounded() -> None:
    rows = persample.factors.Dense(torch.tensor([[1.0], [2.0], [4.0]]).bfloat16())
    G = persample.Gradients({"w": rows}, torch.zeros(3))
    assert statistics.histogram(G, torch.tensor([2.001])).tolist() == [2, 1]
    for bad in ([0.0], torch.zeros(0)):
        with pytest.raises(persample.ArgumentError, match="strictly increasing"):
            statistics.histogram(G, bad)  # type: ignore[arg-type]
    for weights in (torch.tensor([1.0, torch.inf]), torch.zeros(0)):
        with pytest.raises(persample.QuantityError, match="finite and not negative"):
            statistics.importance_weights(weights)


# ---- check, and autocast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_check_tells_coupling_for_every_engine(engine: str) -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = linear()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.l(x.roll(1, 0))
            return out

    report = persample.check(Neighbours(), sine, x(), engine=engine)
    assert not report.ok and isinstance(report.failure, persample.BatchCoupledError | persample.errors.SampleAxisError)


def test_projections_are_not_rounded_by_autocast() -> None:
    G, P = persample.gradients(linear().float(), sine, x().float()), persample.attribution.Projection(4, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = G.project(P)
    assert torch.equal(inside, G.project(P))


class Calls(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what


SETTINGS: dict[str, tuple[Any, Any]] = {
    "number": (0.1, 0.9),
    "numpy": (np.float64(0.1), np.float64(0.9)),
    "dtype": (torch.float32, torch.float64),
    "partial": (partial(F.leaky_relu, negative_slope=0.1), partial(F.leaky_relu, negative_slope=0.9)),
    "lambda": (lambda x: 0.1 * x, lambda x: 0.9 * x),
    "function": (F.relu, F.silu),
    "dictionary": ({"slope": 0.1, "how": ("a", F.relu)}, {"slope": 0.1, "how": ("a", F.silu)}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_modules_are_set_to(name: str) -> None:
    a, b = SETTINGS[name]
    one, two = (remembered.settings(nn.Sequential(Calls(what))) for what in (a, b))
    assert remembered.changed(one, two) == ["0.what"] and not remembered.changed(one, one)
    assert remembered.settings(copy.deepcopy(nn.Sequential(Calls(a)))) == one


def test_records_and_new_attributes_are_no_settings() -> None:
    model = nn.Sequential(Calls(0.1))
    before = remembered.settings(model)
    model[0].history, model[0].last_epoch = [1.0, 2.0], 3
    assert not remembered.changed(before, remembered.settings(model))
