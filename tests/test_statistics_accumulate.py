"""Accumulators: the same result for any batching, any order of merging, and after a resume."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import statistics
from persample.errors import ArgumentError, EmptyBatchError, QuantityError
from persample.factors import index
from persample.statistics import Accumulator, Average, Histogram, Moments, NoiseScale, Norms

N = 12
EDGES = torch.tensor([-0.05, 0.0, 0.05], dtype=torch.float64)


class Data:
    """All rows at once from the loop engine, and any part of them through the default engine."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.x, self.y = torch.randn(N, 3).double(), torch.randint(0, 2, (N,))
        self.all = persample.gradients(self.model, nn.CrossEntropyLoss(), self.x, self.y, engine="loop")
        self.J = self.all.flat()
        self.G = persample.gradients(self.model, nn.CrossEntropyLoss(), self.x, self.y)

    def part(self, samples: Tensor) -> persample.Gradients:
        """Samples are independent, so their rows are those of a run of theirs."""
        factors = {name: index(g, samples) for name, g in self.G.factors.items()}
        return persample.Gradients(factors, self.G.losses[samples])


DATA = Data()
MAKE: dict[str, Callable[[], Accumulator[Any]]] = {
    "moments": Moments,
    "norms": Norms,
    "norms per layer": lambda: Norms(by="layer"),
    "noise": NoiseScale,
    "noise per layer": lambda: NoiseScale(by="layer"),
    "histogram": lambda: Histogram(EDGES),
    "histogram per layer": lambda: Histogram(EDGES, by="layer"),
    "average": lambda: Average(statistics.diversity),
}


def plain(result: Any) -> Any:
    """Results as nested dictionaries of tensors."""
    if isinstance(result, statistics.DatasetMoments):
        return {"n": len(result), "mean": result.mean(), "variance": result.variance(), "loss": result.loss}
    if isinstance(result, statistics.NoiseEstimate):
        return {"trace": result.trace, "square": result.square}
    return {group: plain(v) for group, v in result.items()} if isinstance(result, dict) else result


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(plain(a), plain(b), rtol=1e-9, atol=1e-12)


def feed(accumulator: Accumulator[Any], *parts: Tensor) -> Accumulator[Any]:
    for part in parts:
        G = DATA.part(part)
        accumulator.update(G, part) if isinstance(accumulator, Norms) else accumulator.update(G)
    return accumulator


splits = st.lists(st.integers(1, N - 1), max_size=4, unique=True)


@settings(max_examples=30)
@given(splits, st.permutations(range(N)))
def test_moments_whatever_the_batching(cuts: list[int], order: list[int]) -> None:
    parts = torch.tensor(order).tensor_split(sorted(cuts))
    moments = feed(Moments(), *parts).compute()
    flat = lambda d: torch.cat([v.flatten() for v in d.values()])  # noqa: E731
    J = DATA.J
    torch.testing.assert_close(flat(moments.mean()), J.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(moments.variance(1)), J.var(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(moments.std()), J.std(0, correction=0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(moments.second_moment()), J.square().mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moments.loss, DATA.all.losses.mean(), rtol=1e-9, atol=1e-12)
    norms = feed(Norms(), *parts).compute()
    torch.testing.assert_close(norms, J.norm(dim=1), rtol=1e-9, atol=1e-12)
    counts = feed(Histogram(EDGES), *parts).compute()
    assert counts.tolist() == statistics.histogram(DATA.all, EDGES).tolist()  # type: ignore[union-attr]
    for function in (statistics.noise_scale, statistics.norm_test, statistics.diversity):
        close(function(moments), function(DATA.all))


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=20)
@given(splits, st.randoms(use_true_random=False))
def test_merging_in_any_order(name: str, cuts: list[int], random: Any) -> None:
    parts = list(torch.arange(N).tensor_split(sorted(cuts)))
    expected = feed(MAKE[name](), *parts).compute()
    workers = [feed(MAKE[name](), part) for part in parts] + [MAKE[name]()]  # one that has seen nothing
    while len(workers) > 1:
        random.shuffle(workers)
        other = workers.pop()
        workers[0].merge_state(other)
    close(workers[0].compute(), expected)


@pytest.mark.parametrize("name", MAKE)
def test_resume(name: str) -> None:
    parts = torch.arange(N).split(5)
    expected = feed(MAKE[name](), *parts).compute()
    first = feed(MAKE[name](), *parts[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MAKE[name]()
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain(feed(second, *parts[2:]).compute()), plain(expected), rtol=0, atol=0)
    empty = MAKE[name]()
    empty.load_state_dict(MAKE[name]().state_dict())
    with pytest.raises(QuantityError, match="no sample"):
        empty.compute()
    second.reset()
    with pytest.raises(QuantityError, match="no sample"):
        second.compute()


def test_noise_scale_is_pooled() -> None:
    """Numerator: the variance within batches, pooled.  Both numbers are averages weighted by B - 1."""
    parts = torch.arange(N).split([5, 4, 2, 1])
    estimate = feed(NoiseScale(), *parts).compute()
    single = [statistics.noise_scale(DATA.part(part)) for part in parts[:3]]
    weights = [4, 3, 1]
    torch.testing.assert_close(estimate.trace, sum(w * e.trace for w, e in zip(weights, single, strict=True)) / 8)
    torch.testing.assert_close(estimate.square, sum(w * e.square for w, e in zip(weights, single, strict=True)) / 8)
    within = sum((DATA.J[p] - DATA.J[p].mean(0)).square().sum() for p in parts) / 8
    torch.testing.assert_close(estimate.trace, within, rtol=1e-9, atol=1e-12)
    with pytest.raises(QuantityError, match="at least 2"):
        feed(NoiseScale(), torch.tensor([3])).compute()


def test_noise_scale_fades() -> None:
    parts = torch.arange(N).split(4)
    estimate = feed(NoiseScale(decay=0.5), *parts).compute()
    single = [statistics.noise_scale(DATA.part(part)) for part in parts]
    expected = sum(0.5 ** (2 - i) * e.trace for i, e in enumerate(single)) / (1 + 0.5 + 0.25)
    torch.testing.assert_close(estimate.trace, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="decay"):
        NoiseScale(decay=0)


def test_float32_variance_does_not_cancel() -> None:
    """Rows of mean 1 and spread 1e-4 in 40 batches: differences of squares would leave nothing."""
    J = 1 + 1e-4 * torch.randn(400, 3)
    moments = Moments()
    for rows in J.split(10):
        moments.update(persample.Gradients({"w": persample.factors.Dense(rows)}, torch.zeros(10)))
    exact = J.double().var(0)
    assert ((moments.compute().variance(1)["w"].double() / exact - 1).abs() < 1e-2).all()
    naive = (J.square().mean(0) - J.mean(0).square()).double()
    assert ((naive / exact - 1).abs() > 0.5).any()


def test_a_sample_counted_twice_is_noticed() -> None:
    norms = Norms()
    norms.update(DATA.part(torch.tensor([1, 2])), torch.tensor([1, 2]))
    norms.update(DATA.part(torch.tensor([2])), torch.tensor([2]))
    with pytest.raises(QuantityError, match="sample 2"):
        norms.compute()
    with pytest.raises(QuantityError, match="ids"):
        norms.update(DATA.part(torch.tensor([3])))
    with pytest.raises(QuantityError, match="shape"):
        Norms().update(DATA.part(torch.tensor([1, 2])), torch.tensor([1]))
    for bad in ([1, 2], torch.tensor([1.0, 2.0])):
        with pytest.raises(ArgumentError, match=r"ids must be a tensor of integers \[2\], got"):
            norms.update(DATA.part(torch.tensor([1, 2])), bad)  # type: ignore[arg-type]
    assert len(norms.value.ids) == 3  # type: ignore[union-attr]


def test_without_ids_norms_come_in_order_of_arrival() -> None:
    norms = Norms()
    for part in torch.arange(N).split(5):
        norms.update(DATA.part(part))
    torch.testing.assert_close(norms.compute(), DATA.J.norm(dim=1), rtol=1e-9, atol=1e-12)


def test_only_the_same_merge() -> None:
    with pytest.raises(QuantityError, match="can't merge"):
        NoiseScale().merge_state(NoiseScale(by="layer"))
    with pytest.raises(QuantityError, match="can't merge"):
        Moments().merge_state(Norms())  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match="settings"):
        NoiseScale().load_state_dict(NoiseScale(decay=0.9).state_dict())
    other = Moments()
    other.update(persample.Gradients({"w": persample.factors.Dense(torch.ones(3, 2))}, torch.zeros(3)))
    with pytest.raises(QuantityError, match="different parameters"):
        feed(Moments(), torch.arange(3)).merge_state(other)


def test_average_over_batches() -> None:
    parts = torch.arange(N).split(4)
    tests = torch.stack([statistics.norm_test(DATA.part(part)) for part in parts])
    found = feed(Average(statistics.norm_test), *parts).compute()
    torch.testing.assert_close(found.mean()[""], tests.mean())
    torch.testing.assert_close(found.std(ddof=1)[""], tests.std())


@pytest.mark.parametrize(
    "values", [[1000.0001, 1000.0002, 1000.0004], [2**24 + 1, 2**24 + 3], [True, False], [1 + 2j, 3.5j]]
)
@pytest.mark.parametrize("kind", [lambda v: v, np.asarray, lambda v: torch.as_tensor(np.asarray(v))])
def test_averages_of_numbers_are_in_double_precision(values: list[Any], kind: Callable[[Any], Any]) -> None:
    left = iter([kind(v) for v in values])
    found = feed(Average(lambda G: next(left)), *torch.arange(N).split(4)[: len(values)]).compute()
    x = torch.as_tensor(np.asarray([*map(complex, values)]))
    exact = x if isinstance(values[0], complex) else x.real
    torch.testing.assert_close(found.mean()[""], exact.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.variance(1)[""], exact.var(), rtol=1e-8, atol=0)


def test_averages_of_half_precision_are_in_single() -> None:
    values = [torch.tensor(1 + i / 1024).half() for i in range(N)]
    left = iter(values)
    found = feed(Average(lambda G: next(left)), *torch.arange(N).split(1)).compute().mean()[""]
    torch.testing.assert_close(found, torch.stack(values).double().mean().float())
    losses = torch.tensor([1000.0, 1000.5, 1001.5]).half()
    moments = Moments()
    for loss in losses:
        moments.update(persample.Gradients({"w": persample.factors.Dense(torch.ones(1, 2))}, loss[None]))
    torch.testing.assert_close(moments.compute().loss, losses.double().mean().float(), rtol=1e-6, atol=0)


def test_averages_of_several_numbers_by_name() -> None:
    parts = torch.arange(N).split(4)
    single = [statistics.noise_scale(DATA.part(part), by="layer") for part in parts]
    by_layer = functools.partial(statistics.noise_scale, by="layer")
    found = feed(Average(by_layer), *parts).compute()
    assert list(found.mean()) == ["0.trace", "0.square", "2.trace", "2.square"]
    close(found.mean()["2.square"], torch.stack([e["2"].square for e in single]).mean())
    close(found.std(1)["0.trace"], torch.stack([e["0"].trace for e in single]).std())
    assert list(feed(Average(statistics.noise_scale), *parts).compute().mean()) == ["trace", "square"]
    nested = feed(Average(lambda G: {0: {"a": 1.0}, "": {"a": 3}}), *parts).compute().mean()
    close(nested, {"0.a": torch.tensor(1.0).double(), "a": torch.tensor(3.0).double()})
    agreement = feed(Average(statistics.stiffness), *parts).compute().mean()
    close(agreement["cosine"], torch.stack([statistics.stiffness(DATA.part(part)).cosine for part in parts]).mean())
    for bad in (None, "1", {"a": object()}):
        with pytest.raises(QuantityError, match="a statistic to average returns numbers"):
            feed(Average(lambda G, bad=bad: bad), parts[0])


@pytest.mark.parametrize("progress", [False, True])
def test_over_a_loader(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    if progress:
        pytest.importorskip("tqdm")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA.x, DATA.y), batch_size=5)
    moments, norms, noise = Moments(), Norms(), NoiseScale(by="layer")
    statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, moments, norms, noise, progress=progress)
    parts = torch.arange(N).split(5)
    close(moments.compute(), feed(Moments(), *parts).compute())
    close(noise.compute(), feed(NoiseScale(by="layer"), *parts).compute())
    torch.testing.assert_close(norms.compute(), DATA.J.norm(dim=1), rtol=1e-9, atol=1e-12)
    assert ("accumulate" in capfd.readouterr().err) is progress


@pytest.mark.parametrize("error", [QuantityError, KeyboardInterrupt])
def test_a_batch_that_one_refuses_counts_for_none(error: type[BaseException]) -> None:
    def refuse(G: Any) -> float:
        if len(G) == 2:
            raise error("no")
        return 1.0

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA.x, DATA.y), batch_size=5)
    moments, noise, average = Moments(), NoiseScale(decay=0.5), Average(refuse)
    with pytest.raises(error, match="no"):
        statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, moments, noise, average)
    parts = torch.arange(N).split(5)[:2]
    close(moments.compute(), feed(Moments(), *parts).compute())
    close(noise.compute(), feed(NoiseScale(decay=0.5), *parts).compute())
    assert len(average.compute()) == 2


def test_arguments_of_accumulators_are_checked() -> None:
    accumulators: list[Accumulator[Any]] = [Moments(), Norms(), NoiseScale()]
    for accumulator in accumulators:
        for bad in (torch.ones(3, 2), None):
            with pytest.raises(ArgumentError, match="G must be"):
                accumulator.update(bad)  # type: ignore[arg-type]
        for state in ({}, None, {"settings": {}}):
            with pytest.raises(QuantityError, match=f"no state of a {type(accumulator).__name__}"):
                accumulator.load_state_dict(state)  # type: ignore[arg-type]
        assert accumulator.value is None
    loader = [(DATA.x, DATA.y)]
    for refused in (
        lambda: Average("norm_test"),  # type: ignore[arg-type]
        lambda: NoiseScale(decay="1"),  # type: ignore[arg-type]
        lambda: statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, statistics.norm_test),  # type: ignore[arg-type]
        lambda: statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, Norms(), quantities=["norm"]),
    ):
        with pytest.raises(ArgumentError, match=r"function of G|decay must|such as Moments|leave quantities= out"):
            refused()
    for batch in (DATA.x[:2], (DATA.x, DATA.y, DATA.y), {"x": DATA.x, "y": DATA.y}):
        with pytest.raises(ArgumentError, match=r"batch must be \(inputs, targets\), got a"):
            statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), [batch], Norms())
    one = Average(statistics.confusion, needs="gram")
    statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, one)
    close(one.compute().mean()[""], statistics.confusion(DATA.G))


def test_over_a_loader_of_other_batches() -> None:
    loader = [{"x": DATA.x[:6], "y": DATA.y[:6]}, {"x": DATA.x[6:], "y": DATA.y[6:]}]
    counts = Histogram(EDGES)
    unpack = lambda batch: (batch["x"], batch["y"])  # noqa: E731
    statistics.accumulate(DATA.model, nn.CrossEntropyLoss(), loader, counts, unpack=unpack)
    assert counts.compute().tolist() == statistics.histogram(DATA.all, EDGES).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [NoiseScale, lambda: NoiseScale(by="parameter"), lambda: Norms(by=str.upper)])
def test_batches_of_other_parameters_do_not_add_up(make: Callable[[], Accumulator[Any]]) -> None:
    accumulator = make()
    for name in ("v", "w"):
        G = persample.Gradients({name: persample.factors.Dense(torch.randn(3, 2))}, torch.zeros(3))
        if name == "v":
            accumulator.update(G)
        else:
            with pytest.raises(QuantityError, match="different parameters or groups"):
                accumulator.update(G)


def refused() -> persample.Statistics:
    """A run of samples that are all the same: norms and mean can't tell its noise."""
    x, y = torch.ones(6, 3).double(), torch.zeros(6, dtype=torch.int64)
    return persample.gradients(DATA.model, nn.CrossEntropyLoss(), x, y, quantities=["norm", "mean"])


@pytest.mark.parametrize("wrong", ["noise", "parameters"])
def test_a_batch_that_is_refused_changes_nothing(wrong: str) -> None:
    first, second = torch.arange(N).split(6)
    a, b = feed(NoiseScale(decay=0.5), first), feed(NoiseScale(decay=0.5), first)
    other = persample.Gradients({"w": persample.factors.Dense(torch.randn(3, 2))}, torch.zeros(3))
    with pytest.raises(QuantityError):
        b.update(refused() if wrong == "noise" else other)
    close(b.compute(), a.compute())
    close(feed(b, second).compute(), feed(a, second).compute())
    assert a.value.weight == b.value.weight == 7.5  # type: ignore[union-attr]


def test_empty_batches_are_refused() -> None:
    """Which would count with a weight of -1, or make means of nothing."""
    empty, whole = DATA.part(torch.arange(0)), torch.arange(N)
    for make in (Moments, Norms, NoiseScale):
        accumulator = feed(make(), whole)
        with pytest.raises(EmptyBatchError, match="no sample in G"):
            accumulator.update(empty)
        close(accumulator.compute(), feed(make(), whole).compute())
    for function in (statistics.diversity, statistics.noise_scale, lambda G: statistics.cabs(G, 0.1)):
        with pytest.raises(EmptyBatchError, match="no sample in G"):
            function(empty)


def grouping(name: str) -> Callable[[str], str]:
    return lambda parameter: name


def one(name: str) -> str:
    return "all"


APART: dict[str, tuple[Accumulator[Any], Accumulator[Any]]] = {
    "statistic": (Average(statistics.norm_test), Average(statistics.diversity)),
    "class": (Average(statistics.norm_test), Moments()),
    "arguments": (
        Average(functools.partial(statistics.norm_test, by="layer")), Average(functools.partial(statistics.norm_test)),
    ),
    "by": (NoiseScale(by=grouping("a")), NoiseScale(by=grouping("b"))),
    "norms by": (Norms(by=one), Norms(by=grouping("all"))),
    "histogram by": (Histogram(EDGES, by=one), Histogram(EDGES, by="layer")),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_states_of_something_else_are_refused(name: str) -> None:
    for a, b in (APART[name], APART[name][::-1]):
        with pytest.raises(QuantityError, match="settings"):
            a.load_state_dict(b.state_dict())
        with pytest.raises(QuantityError, match="can't merge"):
            a.merge_state(b)


def test_functions_of_one_name_do_not_merge() -> None:
    makes: list[Callable[[Any], Accumulator[Any]]] = [Average, lambda f: NoiseScale(by=f), lambda f: Norms(by=f)]
    for make in makes:
        f, g = grouping("a"), grouping("a")
        with pytest.raises(QuantityError, match="can't merge"):
            make(f).merge_state(make(g))
        make(f).merge_state(make(f))
    parts = torch.arange(N).split(6)
    a, b = (feed(Average(functools.partial(statistics.norm_test, by="layer")), part) for part in parts)
    a.merge_state(b)
    close(a.compute(), feed(Average(functools.partial(statistics.norm_test, by="layer")), *parts).compute())


@pytest.mark.parametrize("name", MAKE)
def test_states_are_copies(name: str) -> None:
    part = torch.arange(N)
    a, expected = feed(MAKE[name](), part), feed(MAKE[name](), part).compute()
    overwrite(a.state_dict())
    close(a.compute(), expected)
    b, state = MAKE[name](), a.state_dict()
    b.load_state_dict(state)
    overwrite(state)
    close(b.compute(), expected)


@pytest.mark.parametrize("quantities", [None, ["sum", "norm", "mean", "variance"]])
def test_what_was_counted_is_not_the_run_s(quantities: Any) -> None:
    run = persample.gradients(DATA.model, nn.CrossEntropyLoss(), DATA.x, DATA.y, quantities=quantities)
    found, ids = run.sum(), torch.arange(N)
    expected = {name: v.clone() for name, v in found.items()}
    sums, norms = Average(lambda G: found, needs=("sum",)), Norms()
    sums.update(run)
    norms.update(run, ids)
    overwrite({"sum": found})
    ids.zero_()
    close(sums.compute().mean(), expected)
    close(norms.compute(), DATA.J.norm(dim=1))


def overwrite(tree: Any) -> None:
    """Write into all tensors of nested dictionaries."""
    for value in tree.values():
        if isinstance(value, dict):
            overwrite(value)
        elif isinstance(value, Tensor):
            value.fill_(7)


@pytest.mark.parametrize("name", MAKE)
def test_threads_may_share_one(name: str) -> None:
    g, shared, alone = DATA.part(torch.arange(5)), MAKE[name](), MAKE[name]()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: shared.update(g), range(40)))
    finally:
        sys.setswitchinterval(interval)
    for _ in range(40):
        alone.update(g)
    close(shared.compute(), alone.compute())


FORKS = """
import os, signal, threading, time, warnings
from dataclasses import dataclass
from persample.statistics import Accumulator

warnings.simplefilter("ignore")  # of a fork beside threads
inside = threading.Event()

@dataclass
class Slow:
    n: int

    def __add__(self, other):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            time.sleep(0.5)
        return Slow(self.n + other.n)

class Count(Accumulator):
    kind = Slow

    def of(self, G):
        return Slow(G)

count = Count()
count.update(1)
thread = threading.Thread(target=count.update, args=(2,))
thread.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(20)  # hangs
    count.update(4)
    os._exit(count.value.n)
thread.join()
count.update(8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count.value.n)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_process_may_fork_while_another_thread_adds() -> None:
    """As workers of a loader do: in the child nobody is there to end the addition, nor to let go of its lock."""
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["7", "11"], run.stderr
