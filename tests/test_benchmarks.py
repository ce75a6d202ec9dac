"""The benchmark measures what it says: every engine gets the right numbers on toy models.  No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import case, engines, kernels, measure, peers, plan, quantities, report, verification, workloads
from benchmarks.case import Case, Options

from persample import cost
from persample.factors import dense

References = dict[str, dict[str, quantities.Result]]


@pytest.fixture(scope="module")
def references() -> References:
    found = {}
    for name, w in workloads.TOY.items():
        model, x, y = w.make(torch.float64)
        found[name] = quantities.reference(model, workloads.losses, x, y)
    return found


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap, of what it has no batching rule for
@pytest.mark.parametrize("workload", workloads.TOY)
@pytest.mark.parametrize("engine", [e for e in engines.OURS if "compiled" not in e])
def test_own_engines(references: References, workload: str, engine: str) -> None:
    model, x, y = workloads.TOY[workload].make()
    for q in quantities.QUANTITIES:
        try:
            run = engines.OURS[engine](model, x, y, q)
        except engines.Unserved:
            continue
        assert quantities.error(run(), references[workload][q]) < 1e-4, q


@pytest.mark.parametrize("engine", ["torch.func", "torch.func, chunks of 8", "ExpandedWeights"])
@pytest.mark.parametrize("workload", ["W1", "W2"])
def test_engines_of_torch(references: References, workload: str, engine: str) -> None:
    check_peer(references, workload, engine)


@pytest.mark.parametrize(
    "engine, package",
    [("BackPACK", "backpack"), ("Opacus", "opacus"), ("Opacus, ghost clipping", "opacus"), ("TorchJD", "torchjd")],
)
@pytest.mark.filterwarnings("ignore")
def test_other_libraries(references: References, engine: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    check_peer(references, "W1", engine)


def check_peer(references: References, workload: str, engine: str) -> None:
    served = 0
    for q in quantities.QUANTITIES:
        model, x, y = workloads.TOY[workload].make()
        try:
            run = peers.PEERS[engine](model, x, y, q)
        except engines.Unserved:
            continue
        served += 1
        assert quantities.error(run(), references[workload][q]) < 1e-4, q
    assert served


@pytest.mark.parametrize("around", engines.AROUND)
def test_what_surrounds_the_kernels_runs(around: str) -> None:
    model, x, y = workloads.TOY["W1"].make()
    assert set(engines.AROUND[around](model, x, y, "Q2")()) <= {"norm"}


@pytest.mark.parametrize("dropout", [False, True])
def test_the_cost_of_verification_is_measured(dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of call are made, as many times, and the verified one runs a sample alone."""
    asked: list[Any] = []
    plain = verification.persample.gradients
    monkeypatch.setattr(
        verification.persample, "gradients", lambda *a, **k: asked.append(k["verify"]) or plain(*a, **k)
    )
    timing = verification.cost(workloads.TOY["W1"], 0.0, dropout)
    assert timing.pairs == 3 and timing.low <= timing.ratio <= timing.high
    assert asked.count(True) == asked.count(False) == 4


def test_a_wrong_result_is_noticed(references: References) -> None:
    right = references["W1"]["Q2"]
    assert quantities.error(right, right) == 0
    assert quantities.error({"norm": right["norm"] * 1.01}, right) == pytest.approx(0.01)


def test_scaled_workloads_change_one_size() -> None:
    base, wide = (workloads.scaled("width", w).make() for w in (16, 32))
    assert base[1].shape == wide[1].shape
    assert sum(p.numel() for p in base[0].parameters()) < sum(p.numel() for p in wide[0].parameters())


def test_pairs_alternate_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []
    timing = measure.compare(lambda: order.append("plain"), lambda: order.append("run"), budget=0, least=3)
    assert order == ["plain", "run", "run", "plain", "plain", "run"]
    assert timing.pairs == 3 and timing.low <= timing.ratio <= timing.high


def test_peak_memory_is_of_what_lives_at_a_time() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1000, 100)
        b = a + 1
        del a
        return b * 2

    run()
    bytes, result = measure.peak(run)
    assert result.shape == (1000, 100)
    assert bytes == pytest.approx(2 * 400_000, rel=0.01)


def test_a_case_is_measured_once_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = Options(budget=0, repeats=1, least=1, toy=True, folder=tmp_path)
    one = Case("W1", "Q2", "persample")
    import multiprocessing

    found = case.run(one, options, multiprocessing.get_context("spawn"))
    assert found["ratio"] > 0 and found["bytes"] > 0 and found["samples"] == 5
    assert case.run(one, options, None) == found  # from its file


def test_refusals_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> engines.Run:
        raise NotImplementedError("no such layer")

    monkeypatch.setitem(engines.OURS, "persample", refuse)
    options = Options(toy=True, folder=tmp_path)
    for q in ("Q1", "Q2"):
        case.write(Case("W1", q, "persample"), options, case.outcome(Case("W1", q, "persample"), options))
    found = report.load(options)
    assert found["W1", "Q1", "persample"]["message"] == "no such layer"
    assert report.refusals(found) == "* persample (W1 Q1, Q2): `NotImplementedError: no such layer`"


def test_report(tmp_path: Path) -> None:
    options = Options(toy=True, folder=tmp_path)
    figures = {"low": 1.0, "high": 2.0, "plain": 1e-3, "plain_bytes": 100, "error": 1e-7}
    for e, ratio in (("persample", 1.25), ("BackPACK", 2.5)):
        case.write(Case("W1", "Q2", e), options, figures | {"ratio": ratio, "bytes": 100 * ratio})
    report.write(options, into_docs=False)
    text = (tmp_path / "results.md").read_text()
    assert "| W1 |  |  | 1.25 |" in text and "| W1 |  |  | 2.50 BackPACK |" in text
    assert "**1.25**" in text  # the least of its column
    assert "spans 80 % of its figure" in text and "W1 Q2, persample (1.00 to 2.00)" in text
    assert (tmp_path / "benchmark.svg").stat().st_size < 200_000


def test_plan_runs_the_reference_first_and_refuses_unknown_names() -> None:
    cases = list(plan.cells(["W1"], ["Q2"], []))
    assert cases[0].engine == "reference" and {c.engine for c in cases[1:]} >= {"persample", "BackPACK"}
    assert [c.engine for c in plan.cells(["W1"], ["Q2"], ["persample*"])][1:3] == ["persample", "persample, rows kept"]
    with pytest.raises(SystemExit, match="W9"):
        list(plan.cells(["W9"], [], []))


def test_results_are_json(tmp_path: Path) -> None:
    options, one = Options(toy=True, folder=tmp_path), Case("N=2", "Q2", "torch.func, chunks of 8")
    case.write(one, options, {"ratio": 1.0})
    assert json.loads(one.path(options).read_text())["engine"] == one.engine


def test_kernels_of_random_convolutions_agree() -> None:
    rng = random.Random(0)
    for _ in range(8):
        g = kernels.draw(rng, (1e4, 1e5))
        rows = dense(g).flatten(1).double()
        expected = rows @ rows.mT
        for forced in ({}, *kernels.KERNELS.values()):
            with cost.using(**forced):
                norms, gram = (of(g, g).double() for of in kernels.QUANTITIES.values())
            torch.testing.assert_close(norms, expected.diagonal(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().max()))
    (found,) = kernels.regrets(0, 0, (1e4, 1e5))
    assert found[2] in kernels.KERNELS
    assert found[1] > 0
