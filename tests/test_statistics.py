"""Statistics of one batch against direct formulas on the rows of the loop engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import statistics
from persample.errors import ArgumentError, QuantityError
from persample.factors import Dense

B = 7


def model() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.LayerNorm(4)).double()


def batch(n: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 4, dtype=torch.float64), torch.randint(0, 4, (n,))


class Case:
    """The rows ``J`` of a batch from the loop engine, and the same batch through the default engine."""

    def __init__(self, n: int = B) -> None:
        self.model, (self.x, self.y) = model(), batch(n)
        self.G = self.run()
        self.loop = self.run(engine="loop")
        self.J = self.loop.flat()

    def run(self, **options: Any) -> Any:
        return persample.gradients(self.model, nn.CrossEntropyLoss(), self.x, self.y, **options)

    def moments(self) -> Any:
        accumulator = statistics.Moments()
        accumulator.update(self.G)
        return accumulator.compute()

    def layers(self) -> dict[str, Tensor]:
        """The rows of every layer's parameters, side by side."""
        found: dict[str, list[Tensor]] = {}
        for name, rows in self.loop.dense().items():
            found.setdefault(name.split(".")[0], []).append(rows.flatten(1))
        return {layer: torch.cat(parts, 1) for layer, parts in found.items()}


def trace(J: Tensor, ddof: int) -> Tensor:
    return J.var(0, correction=ddof).sum()


def along(J: Tensor) -> Tensor:
    return J @ J.mean(0)


def off_diagonal(K: Tensor) -> Tensor:
    return torch.cat([K[i, [j for j in range(len(K)) if j != i]] for i in range(len(K))])


def noise(J: Tensor) -> list[Tensor]:
    mean_of_squares, mean = J.square().sum(1).mean(), J.mean(0).square().sum()
    square = (len(J) * mean - mean_of_squares) / (len(J) - 1)
    return [trace(J, 1), square, trace(J, 1) / square if square > 0 else torch.tensor(torch.inf).double()]


def cosines(J: Tensor) -> Tensor:
    unit = J / J.norm(dim=1, keepdim=True)
    return unit @ unit.T


LR = 0.3
# name -> (function, formula on rows J and losses, quantities of a statistics run, moments suffice)
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Any], list[str], bool]] = {
    "noise_scale": (
        lambda G, by=None: listed(statistics.noise_scale(G, by), lambda e: [e.trace, e.square, e.scale]),
        lambda J, _: noise(J),
        ["norm", "mean"],
        True,
    ),
    "diversity": (
        statistics.diversity,
        lambda J, _: J.square().sum() / J.sum(0).square().sum(),
        ["norm", "mean"],
        True,
    ),
    "norm_test": (
        statistics.norm_test,
        lambda J, _: (trace(J, 1) / len(J) / J.mean(0).square().sum()).sqrt(),
        ["norm", "mean"],
        True,
    ),
    "inner_product_test": (
        statistics.inner_product_test,
        lambda J, _: (along(J).var() / len(J) / J.mean(0).norm() ** 4).sqrt(),
        ["gram"],
        False,
    ),
    "orthogonality_test": (
        statistics.orthogonality_test,
        lambda J, _: (
            (J - along(J)[:, None] * J.mean(0) / J.mean(0).square().sum()).square().sum()
            / (len(J) - 1)
            / (len(J) * J.mean(0).square().sum())
        ).sqrt(),
        ["gram"],
        False,
    ),
    "cabs": (
        lambda G, by=None: statistics.cabs(G, LR, by),
        lambda J, losses: LR * trace(J, 0) / losses.mean(),
        ["norm", "mean"],
        True,
    ),
    "confusion": (
        statistics.confusion,
        lambda J, _: off_diagonal(J @ J.T).min(),
        ["gram"],
        False,
    ),
    "stiffness": (
        lambda G, by=None: listed(statistics.stiffness(G, by), list),
        lambda J, _: [off_diagonal(J @ J.T).sign().mean(), off_diagonal(cosines(J)).mean()],
        ["gram"],
        False,
    ),
    "signal_to_noise": (
        lambda G, by=None: statistics.signal_to_noise(G, eps=1e-3, ddof=1, by=by),
        lambda J, _: (J.mean(0).square() / (J.var(0) + 1e-3)).mean(),
        ["mean", "variance"],
        True,
    ),
    "evidence_based_stopping": (
        lambda G, by=None: statistics.evidence_based_stopping(G, eps=1e-6, by=by),
        lambda J, _: 1 - len(J) * (J.mean(0).square() / (J.var(0) + 1e-6)).mean(),
        ["mean", "variance"],
        True,
    ),
}  # fmt: skip
OF_ENTRIES = {"signal_to_noise", "evidence_based_stopping"}  # need the mean of every entry, not only its size


def listed(found: Any, take: Callable[[Any], Any]) -> Any:
    return {group: take(v) for group, v in found.items()} if isinstance(found, dict) else take(found)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    function, formula, needs, moments = FORMULAS[name]
    case = Case()
    expected = formula(case.J, case.loop.losses)
    close(function(case.G), expected)
    close(function(case.run(quantities=needs)), expected)
    close(function(case.run(quantities=["gram", "variance", *(["mean"] if name in OF_ENTRIES else [])])), expected)
    if moments:
        close(function(case.moments()), expected)
        close(function(case.run(quantities=["mean", "variance"])), expected)


def test_cabs_needs_no_mean_where_the_variance_is_there() -> None:
    case = Case()
    expected = LR * trace(case.J, 0) / case.loop.losses.mean()
    for max_bytes in (None, 1):
        close(statistics.cabs(case.run(quantities=["variance"], max_bytes=max_bytes), LR), expected)
    with pytest.raises(persample.QuantityError, match=r"\['variance'\] only.*for 'sum'"):
        statistics.noise_scale(case.run(quantities=["variance"]))


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_per_layer(name: str) -> None:
    function, formula, needs, moments = FORMULAS[name]
    case = Case()
    expected = {layer: formula(J, case.loop.losses) for layer, J in case.layers().items()}
    close(function(case.G, by="layer"), expected)
    close(function(case.run(quantities=needs), by="layer"), expected)
    if moments:
        close(function(case.moments(), by="layer"), expected)
    close(function(case.G, by=lambda name: "all"), {"all": formula(case.J, case.loop.losses)})
    assert list(function(case.G, by="parameter")) == list(case.G.names)


@pytest.mark.parametrize("name", FORMULAS)
def test_one_sample_is_refused_where_two_are_compared(name: str) -> None:
    function = FORMULAS[name][0]
    G = Case(1).G
    if name in ("diversity", "cabs"):
        assert function(G).isfinite()
    else:
        with pytest.raises(QuantityError, match=r"2 of them|ddof"):
            function(G)


def test_statistics_run_says_what_to_ask_for() -> None:
    run = Case().run(quantities=["norm"])
    with pytest.raises(QuantityError, match="quantities="):
        statistics.noise_scale(run)
    with pytest.raises(QuantityError, match="quantities="):
        statistics.confusion(run)
    with pytest.raises(QuantityError, match="rows"):
        statistics.histogram(run, torch.tensor([0.0]))


@pytest.mark.parametrize(("name", "way"), [("noise_scale", r"noise_scale\(S\)"), ("Moments", r"Moments\(...\).update")])
def test_statistics_are_no_quantities(name: str, way: str) -> None:
    with pytest.raises(QuantityError, match=rf"unknown quantity '{name}'.*\['norm', 'mean'\].*call statistics.{way}"):
        Case().run(quantities=[name])
    with pytest.raises(QuantityError, match=r"'project'\]\.$"):
        Case().run(quantities=["noise"])


def test_by_is_checked() -> None:
    with pytest.raises(ValueError, match="'layer'"):
        statistics.norm_test(Case().G, by="module")


def test_negative_denominator_is_flagged() -> None:
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64)  # opposite: the mean can't be told from zero
    estimate = statistics.noise_scale(rows(J))
    assert estimate.negative and estimate.scale == torch.inf
    close(estimate.square, (2 * J.mean(0).square().sum() - J.square().sum(1).mean()) / 1)
    assert not statistics.noise_scale(rows(J + 10)).negative
    shown = repr(statistics.noise_scale(rows(J + 10)))
    scale = float(statistics.noise_scale(rows(J + 10)).scale)
    assert shown.startswith("NoiseEstimate(scale=") and float(shown.split("=")[1].split(",")[0]) == scale


def rows(J: Tensor) -> persample.Gradients:
    return persample.Gradients({"w": persample.factors.Dense(J)}, torch.zeros(len(J), dtype=J.dtype))


@pytest.mark.parametrize("given", [torch.ones(3, 2), [1.0, 2.0], None])
@pytest.mark.parametrize("name", [*FORMULAS, "importance_weights"])
def test_what_holds_no_gradients_is_named(name: str, given: Any) -> None:
    function = FORMULAS[name][0] if name in FORMULAS else statistics.importance_weights
    if name != "importance_weights" or not isinstance(given, Tensor):
        with pytest.raises(ArgumentError, match=f"G must be .* got {type(given).__name__}"):
            function(given)


OF_NOISE: dict[str, Callable[[Any], Any]] = {
    **{name: FORMULAS[name][0] for name in FORMULAS if name not in ("diversity", "confusion", "stiffness")},
    "NoiseScale": lambda G: statistics.NoiseScale().update(G),
    "by_cabs": persample.optim.by_cabs(LR),
    "by_norm_test": persample.optim.by_norm_test(1.0),
}


def test_warnings_are_shown_once() -> None:
    """As Python shows those of one line, also where steps in between look at many functions."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(4):
            x, y = torch.randn(6, 3), torch.randint(2, (6,))
            G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, coupled="loss")
            persample.statistics.noise_scale(G)
    assert 1 <= len(said) <= 2  # and again, once the names of all functions are known


@pytest.mark.parametrize("name", OF_NOISE)
def test_noise_of_rows_that_move_each_other_is_warned_of(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 2, (B,))
    for notion in ("loss", "copy", "frozen", "influence", "eval"):
        for verify in (True, False):
            G = persample.gradients(net, nn.CrossEntropyLoss(), x, y, coupled=notion, verify=verify)
            if notion in ("influence", "eval"):
                OF_NOISE[name](G)
            else:
                with pytest.warns(UserWarning, match=f"rows of coupled='{notion}' don't tell.*'influence'"):
                    OF_NOISE[name](G)
    behind = persample.gradients(net, nn.CrossEntropyLoss(), x, y, params=r"2\.")  # same rows as those of "loss"
    with pytest.warns(UserWarning, match="rows of coupled samples don't tell.*'influence'"):
        OF_NOISE[name](behind)


@pytest.mark.parametrize("eps", [-1.0, torch.nan, torch.inf, "0"])
def test_what_is_added_to_variances_is_checked(eps: Any) -> None:
    for function in (statistics.signal_to_noise, statistics.evidence_based_stopping):
        with pytest.raises(ArgumentError, match="eps must be a finite number, 0 or more"):
            function(Case().G, eps=eps)  # type: ignore[operator]


def test_noise_scale_of_numbers() -> None:
    estimate = statistics.noise_scale_of_two(1.0, 1, 0.5, 3)
    close([estimate.trace, estimate.square, estimate.scale], [*torch.tensor([0.75, 0.25, 3.0]).double()])
    for bad in (("1", 1, 0.5, 3), (1.0, 1, None, 3), (1.0, "1", 0.5, 3), (1.0, 1, 0.5, torch.nan)):
        with pytest.raises(ArgumentError, match="must be"):
            statistics.noise_scale_of_two(*bad)  # type: ignore[arg-type]


def test_noise_scale_of_two_batch_sizes() -> None:
    """With the mean squared norm of single samples for the small batch, it is the estimate from per-sample norms."""
    case = Case()
    estimate = statistics.noise_scale_of_two(case.J.square().sum(1).mean(), 1, case.J.mean(0).square().sum(), B)
    close([estimate.trace, estimate.square], noise(case.J)[:2])
    with pytest.raises(ValueError, match="small < big"):
        statistics.noise_scale_of_two(torch.ones(()), 4, torch.ones(()), 4)


def test_tiny_noise_does_not_cancel() -> None:
    """float32 rows that agree to five digits: from norms alone, nothing of the variance would be left."""
    torch.manual_seed(3)
    J = 1 + 1e-5 * torch.randn(50, 20)
    exact = J.double().var(0).sum()
    got = statistics.noise_scale(rows(J)).trace.double()
    assert abs(got / exact - 1) < 1e-3
    naive = (J.square().sum(1).mean() - J.mean(0).square().sum()) * 50 / 49
    assert abs(naive.double() / exact - 1) > 0.1


def test_tests_add_up() -> None:
    G = Case().G
    parts = statistics.inner_product_test(G).square() + statistics.orthogonality_test(G).square()
    close(parts, statistics.norm_test(G).square())


def across(J: Tensor, seed: int, along: float, noise: float) -> Tensor:
    """Rows of a mean of about ``[1, 1, ...]``, with noise along it and across it."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(J.shape, generator=generator, dtype=torch.float64)
    Z -= Z.mean(1, keepdim=True)
    return (J + noise * Z + along * torch.randn(len(J), 1, generator=generator, dtype=torch.float64)).to(J.dtype)


def or_error(function: Callable[[Any], Any], G: Any) -> Any:
    try:
        return function(G)
    except QuantityError as error:
        return str(error)


def exact_tests(J: Tensor) -> list[float]:
    """The norm test, and the parts of it along and across the mean, from centred rows in extended precision."""
    A = J.double().numpy().astype(np.longdouble)
    mean = A.mean(0)
    square, Z = mean @ mean, A - mean
    share = Z @ mean / square
    sizes = (Z, share[:, None] * mean, Z - share[:, None] * mean)
    return [float(np.sqrt((x * x).sum() / (len(A) - 1) / len(A) / square)) for x in sizes]


@pytest.mark.parametrize(
    "along, noise", [(1e-3, 1e-3), (1e-5, 1e-5), (1e-9, 1e-9), (1e-2, 1e-9), (1e-9, 1e-2), (0.1, 1e-6), (1e-7, 1.0)]
)
@pytest.mark.parametrize("kind, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_tests_do_not_cancel(along: float, noise: float, kind: torch.dtype, tolerance: float) -> None:
    """Whatever is small against what; from inner products alone, right or refused."""
    J = across(torch.ones(9, 12, dtype=kind), 0, along, noise)
    net = nn.Linear(12, 1, bias=False).to(kind)
    run = lambda q=None: persample.gradients(net, lambda o, _: o.sum(1), J, quantities=q)  # noqa: E731
    G, two = run(), persample.Gradients({n: Dense(x) for n, x in zip("ab", J.split(6, 1), strict=True)}, J.sum(1))
    tests = (statistics.norm_test, statistics.inner_product_test, statistics.orthogonality_test)
    refused, least = [], torch.finfo(kind).eps * exact_tests(J)[0]
    for function, exact in zip(tests, exact_tests(J), strict=True):
        for source in (G, two):
            assert float(function(source)) == pytest.approx(exact, rel=tolerance, abs=least)
        for needs in (["gram"], ["gram", "mean", "variance"]):
            said = or_error(function, run(needs))
            refused.append(isinstance(said, str))
            assert (
                "keep the rows" in said
                if isinstance(said, str)
                else float(said) == pytest.approx(exact, rel=max(1e-7, tolerance), abs=least)
            )
    for name, J_ in (("a", J[:, :6]), ("b", J[:, 6:])):
        apart = statistics.orthogonality_test(two, by="parameter")[name]
        assert float(apart) == pytest.approx(exact_tests(J_)[2], rel=tolerance, abs=least)
    if along == noise != 1e-5 and kind is torch.float64:
        assert refused == ([False] * 6 if noise == 1e-3 else [True, False, True, True, True, False])


@pytest.mark.parametrize("noise", [1.0, 1e-5])
@pytest.mark.parametrize("name", FORMULAS)
def test_autocast_rounds_nothing(name: str, noise: float) -> None:
    torch.manual_seed(0)
    net, x = model().float(), torch.randn(1, 2, 4) + noise * torch.randn(B, 2, 4)
    G, function = (
        persample.gradients(net, nn.CrossEntropyLoss(), x, torch.zeros(B, dtype=torch.int64)),
        FORMULAS[name][0],
    )
    expected = function(G)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(function(G), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_centred_rows_of_any_shape(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persample.statistics.parts, "BLOCK", 1)
    torch.manual_seed(0)
    for kind in (torch.float64, torch.complex128):
        J = 1 + 1e-9 * torch.randn(5, *shape, dtype=kind)
        flat = (torch.view_as_real(J) if kind.is_complex else J).reshape(5, -1)
        exact = exact_tests(flat)
        assert float(statistics.inner_product_test(rows(J))) == pytest.approx(exact[1], rel=1e-9)
        assert float(statistics.orthogonality_test(rows(J))) == pytest.approx(exact[2], rel=1e-9, abs=1e-15 * exact[0])


@pytest.mark.parametrize("kind, size", [(torch.float64, 1e-6), (torch.float64, 0.1), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["norm_test", "inner_product_test", "orthogonality_test", "diversity"])
def test_a_mean_that_inner_products_can_not_tell(name: str, kind: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    J = torch.randn(8, 12, dtype=torch.float64)
    J = (J - J.mean(0) + size).to(kind)
    A = J.double().numpy().astype(np.longdouble)
    expected = dict(zip(("norm_test", "inner_product_test", "orthogonality_test"), exact_tests(J), strict=True)).get(
        name, float((A * A).sum() / (A.sum(0) @ A.sum(0)))
    )
    net = nn.Linear(12, 1, bias=False).to(kind)
    run = lambda q=None: persample.gradients(net, lambda o, _: o.sum(1), J, quantities=q)  # noqa: E731
    function = getattr(statistics, name)
    for needs in (None, ["gram", "mean"]):
        assert float(function(run(needs))) == pytest.approx(expected, rel=1e-9 if kind is torch.float64 else 1e-2)
    if size == 0.1:
        assert float(function(run(["gram"]))) == pytest.approx(expected, rel=1e-9)
    else:
        with pytest.raises(QuantityError, match="ask for 'mean' too"):
            function(run(["gram"]))
    square = statistics.noise_scale(run(["gram"])).square  # which is a difference of numbers of this size
    exact = (8 * J.double().mean(0).square().sum() - J.double().square().sum(1).mean()) / 7
    assert float(square) == pytest.approx(float(exact), rel=1e-9 if kind is torch.float64 else 1e-5)


def test_tests_of_tiny_gradients_do_not_underflow() -> None:
    J = 1e-12 * (1 + torch.randn(6, 4))
    for function, exact in zip(
        (statistics.inner_product_test, statistics.orthogonality_test), exact_tests(J)[1:], strict=True
    ):
        assert float(function(rows(J))) == pytest.approx(exact, rel=1e-5)


def test_signal_of_every_entry() -> None:
    case = Case()
    got = statistics.signal_to_noise(case.G)
    for name, J in case.loop.dense().items():
        close(got[name], J.mean(0).square() / J.var(0, correction=0))
    dead = statistics.signal_to_noise(rows(torch.zeros(4, 3).double()))
    assert dead["w"].tolist() == [0, 0, 0]


def test_cabs_needs_a_positive_loss() -> None:
    case = Case()
    with pytest.raises(QuantityError, match="infimum 0"):
        statistics.cabs(persample.Gradients(case.G.factors, -case.G.losses), 0.1)


# ---- importance, histograms -------------------------------------------------------------------------------------


def test_importance_weights_are_unbiased_and_least_variable() -> None:
    case = Case()
    found = statistics.importance_weights(case.G)
    norms = case.J.norm(dim=1)
    close(found.probability, norms / norms.sum())
    close((found.probability * found.weight) @ case.J, case.J.mean(0))
    second = (found.probability * found.weight.square()) @ norms.square()
    for smoothing in (0.1, 0.5, 1.0):
        other = statistics.importance_weights(case.G, smoothing)
        close((other.probability * other.weight) @ case.J, case.J.mean(0))
        assert (other.probability * other.weight.square()) @ norms.square() > second
        assert other.weight.max() <= 1 / smoothing + 1e-12
    drawn = found.draw(1000, torch.Generator().manual_seed(0))
    assert abs(found.weight[drawn].mean() - 1) < 0.1


def test_importance_weights_at_the_edges() -> None:
    found = statistics.importance_weights(torch.tensor([0.0, 3.0, 1.0]))
    assert found.probability.tolist() == [0, 0.75, 0.25] and found.weight[0] == 0
    assert statistics.importance_weights(torch.zeros(4)).weight.tolist() == [1, 1, 1, 1]
    with pytest.raises(QuantityError, match="not negative"):
        statistics.importance_weights(torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="smoothing"):
        statistics.importance_weights(torch.ones(2), 2.0)
    with pytest.raises(ArgumentError, match="smoothing"):
        statistics.importance_weights(torch.ones(2), "0.5")  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=5, unique=True))
def test_histogram_counts_every_entry(points: list[float]) -> None:
    torch.manual_seed(1)
    case, edges = Case(4), torch.tensor(sorted(points), dtype=torch.float64)
    counts = statistics.histogram(case.loop, edges)
    flat = case.J.flatten()
    expected = [(flat < edges[0]).sum()]
    expected += [((a <= flat) & (flat < b)).sum() for a, b in pairwise(edges)]
    expected += [(flat >= edges[-1]).sum()]
    assert counts.tolist() == [int(c) for c in expected]
    layers = statistics.histogram(case.loop, edges, by="layer")
    assert isinstance(layers, dict) and sum(layers.values()).tolist() == counts.tolist()  # type: ignore[union-attr]


def test_histogram_against_parameters() -> None:
    case = Case()
    edges, beside = torch.tensor([-0.1, 0.0, 0.1]).double(), torch.tensor([-0.2, 0.2]).double()
    parameters = dict(case.model.named_parameters())
    counts = statistics.histogram(case.loop, edges, parameters=parameters, parameter_edges=beside)
    assert isinstance(counts, Tensor) and counts.shape == (4, 3) and counts.sum() == case.J.numel()
    theta = torch.cat([p.detach().flatten() for p in parameters.values()]).expand_as(case.J)
    assert counts[1, 2] == ((case.J >= -0.1) & (case.J < 0) & (theta >= 0.2)).sum()
    assert counts.sum(1).tolist() == statistics.histogram(case.loop, edges).tolist()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="go together"):
        statistics.histogram(case.loop, edges, parameters=parameters)
    with pytest.raises(ValueError, match="increasing"):
        statistics.histogram(case.loop, torch.tensor([1.0, 0.0]))


# ---- what a run was asked for, and in which precision -------------------------------------------------------------

FROM_VARIANCE: dict[str, Callable[[Any], Any]] = {
    "noise_scale": lambda G: statistics.noise_scale(G).trace,
    "norm_test": statistics.norm_test,
    "diversity": statistics.diversity,
    "cabs": lambda G: statistics.cabs(G, 0.1),
}


@pytest.mark.parametrize("ddof", [0, 1, 2])
@pytest.mark.parametrize("name", FROM_VARIANCE)
def test_the_ddof_of_a_run_is_its_own_matter(name: str, ddof: int) -> None:
    """`variance()` of a run is with its own ``ddof``; statistics have theirs."""
    case, formula = Case(), FROM_VARIANCE[name]
    for also in (["norm", "mean"], ["mean"]):
        close(formula(case.run(quantities=[*also, ("variance", {"ddof": ddof})])), formula(case.G))
    moments = statistics.Moments()
    moments.update(case.run(quantities=["mean", ("variance", {"ddof": ddof})]))
    close(formula(moments.compute()), formula(case.G))


@pytest.mark.parametrize("asked", [["norm", "mean"], ["gram"]])
def test_noise_that_norms_can_not_tell(asked: list[str]) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(50, 1), torch.randn(1, 50) + 1e-4 * torch.randn(256, 50)
    run = lambda **options: persample.gradients(model, nn.MSELoss(), x, torch.zeros(256, 1), **options)  # noqa: E731
    for formula in (statistics.noise_scale, statistics.norm_test, lambda G: statistics.cabs(G, 0.1)):
        with pytest.raises(QuantityError, match="ask for 'variance' too"):
            formula(run(quantities=asked))
    exact = run().flat().double().var(0).sum()
    for source in (run(), run(quantities=["norm", "mean", "variance"])):
        assert abs(statistics.noise_scale(source).trace.double() / exact - 1) < 1e-3
    tiny = {
        "a": torch.full((4, 2), 1e-3),
        "w": 1 + torch.randn(4, 2),
    }  # the noise of one parameter is lost, that of both not
    tiny["a"][0] *= 1 + 1e-6
    G = persample.Statistics(["norm", "mean"], {name: J[0] for name, J in tiny.items()})
    for name, J in tiny.items():
        G.emit(name, persample.factors.Dense(J))
    assert statistics.noise_scale(G).trace > 0
    with pytest.raises(QuantityError, match="variance"):
        statistics.noise_scale(G, by="parameter")


def test_half_precision_is_squared_in_single() -> None:
    torch.manual_seed(0)
    J = (1e-5 * (1 + torch.randn(64, 40))).half()
    G, D = rows(J), rows(J.double())
    for formula in (lambda G: statistics.noise_scale(G).scale, statistics.norm_test, statistics.diversity):
        assert formula(G).dtype is torch.float32
        torch.testing.assert_close(formula(G).double(), formula(D), rtol=1e-2, atol=0)
    torch.manual_seed(0)
    batches = [(1 + torch.randn(4, 3)).bfloat16() for _ in range(500)]
    moments = statistics.Moments()
    for batch in batches:
        moments.update(rows(batch))
    exact = torch.cat(batches).double().mean(0)
    assert float((moments.compute().mean()["w"].double() / exact - 1).abs().max()) < 2e-3


def test_complex_rows() -> None:
    torch.manual_seed(0)
    J = torch.randn(6, 3, dtype=torch.complex128) + 1
    real = torch.view_as_real(J).flatten(1)
    G, R = rows(J), rows(real)
    for formula in (lambda G: statistics.noise_scale(G).scale, *(getattr(statistics, name) for name in COMPLEX)):
        close(formula(G), formula(R))
    gain = J.mean(0).abs().square() / (J - J.mean(0)).abs().square().mean(0)
    close(statistics.signal_to_noise(G)["w"], gain)


COMPLEX = ("norm_test", "diversity", "inner_product_test", "orthogonality_test", "confusion")


def test_moments_say_nothing_about_pairs() -> None:
    with pytest.raises(QuantityError, match="pairs of samples"):
        statistics.confusion(Case().moments())


def test_nan_is_in_no_bin() -> None:
    with pytest.raises(QuantityError, match=r"'w' hold NaN"):
        statistics.histogram(rows(torch.tensor([[0.0, torch.nan]])), torch.tensor([0.0]))


def mixed() -> tuple[persample.Gradients, Tensor]:
    """Rows of a complex and of a real parameter, and all of them as real numbers side by side."""
    torch.manual_seed(0)
    z, J = torch.randn(6, 3, dtype=torch.complex128) + 1, torch.randn(6, 2, dtype=torch.float64) + 1
    factors = {"z": persample.factors.Dense(z), "w": persample.factors.Dense(J)}
    return persample.Gradients(factors, torch.zeros(6).double()), torch.cat([torch.view_as_real(z).flatten(1), J], 1)


@pytest.mark.parametrize("name", COMPLEX)
def test_real_and_complex_parameters(name: str) -> None:
    G, J = mixed()
    function = getattr(statistics, name)
    close(function(G), function(rows(J)))
    close(function(G, by="parameter"), {"z": function(rows(J[:, :6])), "w": function(rows(J[:, 6:]))})


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_importance_weights_of_any_type(kind: torch.dtype) -> None:
    norms = torch.tensor([1, 0, 1, 0]).to(kind)
    found = statistics.importance_weights(norms, 0.5)
    assert found.probability.dtype is (kind if kind is torch.float64 else torch.float32)
    close(found.probability.double(), torch.tensor([3, 1, 3, 1]).double() / 8)
    close(found.weight, 1 / (4 * found.probability))


@pytest.mark.parametrize("kind, size", [
    (torch.float32, 3e38), (torch.float32, 1e-45), (torch.float64, 1e308), (torch.float64, 1e-320),
    (torch.float16, 6e4),
])  # fmt: skip
def test_importance_weights_of_any_size(kind: torch.dtype, size: float) -> None:
    found = statistics.importance_weights(torch.tensor([size, size, 0.0], dtype=kind))
    assert found.probability.tolist() == [0.5, 0.5, 0]


def test_importance_weights_of_no_real_norms() -> None:
    with pytest.raises(QuantityError, match="need norms"):
        statistics.importance_weights(torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize("edges", [torch.tensor([1.001]).double(), torch.tensor([257])])
def test_edges_are_not_rounded_to_what_they_are_compared_with(edges: Tensor) -> None:
    below = torch.tensor([1.0 if edges < 2 else 256.0], dtype=torch.bfloat16)
    zero = torch.tensor([0.5])
    assert statistics.histogram(rows(below[None]), edges).tolist() == [1, 0]  # type: ignore[union-attr]
    found = statistics.histogram(rows(torch.zeros(1, 1)), zero, parameters={"w": below}, parameter_edges=edges)
    assert found.tolist() == [[1, 0], [0, 0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("parameters, error, named", [
    ({"w": torch.tensor([1.0, torch.nan])}, QuantityError, "parameter 'w' hold NaN"),
    ({"w": torch.zeros(1)}, ArgumentError, r"'w' of shape \[1\], but its rows are \[2\]"),
    ({"v": torch.zeros(2)}, ArgumentError, "has no 'w'"),
    ({"w": torch.zeros(2, dtype=torch.complex64)}, QuantityError, "parameter 'w' are complex"),
])  # fmt: skip
def test_parameters_of_a_histogram_are_checked(parameters: Any, error: type[Exception], named: str) -> None:
    edges = torch.tensor([0.0])
    with pytest.raises(error, match=named):
        statistics.histogram(rows(torch.zeros(3, 2)), edges, parameters=parameters, parameter_edges=edges)


def test_complex_rows_have_no_histogram() -> None:
    with pytest.raises(QuantityError, match="rows of parameter 'z' are complex"):
        statistics.histogram(mixed()[0], torch.tensor([0.0]))
    for edges in (torch.tensor([torch.nan]), torch.tensor([0j, 1])):
        with pytest.raises(ArgumentError, match="real and strictly increasing"):
            statistics.histogram(rows(torch.zeros(3, 2)), edges)


@pytest.mark.parametrize("whole", [False, True])
def test_signs_of_inner_products_that_are_no_numbers(whole: bool) -> None:
    """One row that holds NaN, or all: neither cosines nor their signs have a mean."""
    J = torch.randn(5, 4, dtype=torch.float64)
    J[slice(None) if whole else 2, 1] = torch.nan
    found = statistics.stiffness(rows(J))
    assert found.sign.isnan()
    assert found.cosine.isnan()
