"""The test matrix: zoo x engine x quantity x {factors kept, collapsed, reduced on arrival}, in float64 at 1e-9.

The truth is plain autograd on one sample at a time (`zoo.oracle`); what each quantity should be comes from the dense
rows by its plain formula. A test collects all that is wrong in one case, so that a failure shows its pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from zoo import Case, Problem, call, cases, problem, size, take
from zoo.oracle import Rows, floats, matrix, rows

import persample
from persample import errors
from persample.factors import Dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),  # PyTorch's
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
    pytest.mark.filterwarnings("ignore:the criterion of the whole batch"),  # rightly so: class weights, ignored targets
]
ENGINES = ("hooks", "vmap", "loop")
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Truth:
    """A case with its rows, those of another batch of M samples, and the arguments of the quantities."""

    problem: Problem
    other: Problem
    g: Rows
    h: Rows
    weight: Tensor  # [N]
    direction: Tensor  # [D]
    projection: Tensor  # [D, 2]
    max_norm: float

    @cached_property
    def samples(self) -> dict[str, Any]:
        return sample_space(self)

    @cached_property
    def parameters(self) -> dict[str, dict[str, Tensor]]:
        return parameter_space(self)


@cache
def truth(case: Case) -> Truth:
    p = problem(case)
    n = size(p.inputs, case.batch_dim)
    index = range(min(1, n - 1), n)  # M = N - 1 samples (of one, that one), with other inputs
    inputs = tree_map(lambda x: x * 1.1 if isinstance(x, Tensor) and x.is_floating_point() else x, p.inputs)
    other = replace(p, inputs=take(inputs, index, case.batch_dim), targets=take(p.targets, index, case.batch_dim))
    g, h = rows(p, case.batch_dim), rows(other, case.batch_dim)
    generator = torch.Generator().manual_seed(0)
    d = g.flat.shape[1]
    weight, direction, projection = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n,), (d,), (d, 2))
    )
    max_norm = float(g.flat.norm(dim=1).median()) * 0.9 + 1e-3  # some rows are clipped, some are not
    return Truth(p, other, g, h, weight, direction, projection, max_norm)


# ---- the plain formulas -----------------------------------------------------------------------------------------


def sample_space(t: Truth) -> dict[str, Any]:
    """Quantities [N], [N, M], by name."""
    flat = t.g.flat
    squares = flat.square().sum(1)
    scale = squares.sqrt()[:, None] * squares.sqrt()
    return {
        "squared_norm": squares,
        "norm": squares.sqrt(),
        "gram": flat @ flat.T,
        "cosine": torch.where(scale > 0, flat @ flat.T / scale, 0.0),
        "dot": flat @ t.direction,
        "project": flat @ t.projection,
    }


def parameter_space(t: Truth) -> dict[str, dict[str, Tensor]]:
    """Quantities {name: [*P]}, by name."""
    flat, n = t.g.flat, len(t.weight)
    centred = (flat - flat.mean(0)).square().sum(0)
    clip = (t.max_norm / flat.norm(dim=1)).clamp(max=1).nan_to_num(posinf=1.0)
    by_name = {
        "mean": flat.mean(0), "sum": flat.sum(0), "weighted": t.weight @ flat, "clip": clip @ flat,
        "second_moment": flat.square().mean(0), "variance": centred / n, "std": (centred / n).sqrt(),
    }  # fmt: skip
    if n > 1:
        by_name |= {"variance1": centred / (n - 1), "std1": (centred / (n - 1)).sqrt()}
    return {k: t.g.unflatten(v) for k, v in by_name.items()}


@dataclass
class Differences:
    """What is not as it should be, in words."""

    found: list[str] = field(default_factory=list)

    def close(self, what: str, got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
        if isinstance(want, Mapping):
            if list(got) != list(want):
                self.found.append(f"{what}: {list(got)} instead of {list(want)}")
            else:
                scale = max((float(w.abs().max()) for w in want.values() if w.numel()), default=0.0)
                for name in want:
                    self._close(f"{what}[{name}]", got[name], want[name], scale, tolerance)
        else:
            self._close(what, got, want, float(want.abs().max()) if want.numel() else 0.0, tolerance)

    def _close(self, what: str, got: Tensor, want: Tensor, scale: float, tolerance: float = TOLERANCE) -> None:
        if got.shape != want.shape or got.dtype != want.dtype or got.requires_grad:
            self.found.append(f"{what}: {tuple(got.shape)}, {got.dtype} instead of {tuple(want.shape)}, {want.dtype}")
        elif want.numel() and not float((got - want).abs().max()) <= tolerance * scale:
            self.found.append(f"{what}: off by {float((got - want).abs().max()):.2g} where the largest is {scale:.2g}")

    def equal(self, what: str, got: Any, want: Any) -> None:
        if got != want:
            self.found.append(f"{what}: {got} instead of {want}")


# ---- what is compared -------------------------------------------------------------------------------------------


def check_rows(d: Differences, g: Any, t: Truth) -> None:
    """The individual gradients, and what else the engine reports."""
    d.equal("names", (tuple(g.names), len(g), set(g.unused)), (tuple(t.g.rows), len(t.weight), set(t.g.unused)))
    d.close("rows", {k: g[k] for k in g.names}, t.g.rows)
    d.close("losses", g.losses, t.g.losses)


def check_quantities(d: Differences, g: Any, t: Truth, tag: str) -> None:
    """All that `Gradients` answers about its own batch."""
    d.close(f"{tag} flat", g.flat(), t.g.flat)
    arguments: dict[str, list[Any]] = {"dot": [t.direction], "project": [t.projection]}
    for name, want in t.samples.items():
        d.close(f"{tag} {name}", getattr(g, name)(*arguments.get(name, [])), want)
    d.close(f"{tag} dot by name", g.dot(t.g.unflatten(t.direction)), t.g.flat @ t.direction)
    d.close(f"{tag} project by name", g.project(t.g.unflatten(t.projection)), t.g.flat @ t.projection)
    flat = {k: matrix(r) for k, r in t.g.rows.items()}
    d.close(f"{tag} squares", g.squared_norm(per_parameter=True), {k: f.square().sum(1) for k, f in flat.items()})
    d.close(f"{tag} grams", g.gram(per_parameter=True), {k: f @ f.T for k, f in flat.items()})
    large = [k for k, f in flat.items() if f.square().sum() > 1e-12 * t.g.flat.square().sum()]  # no root of rounding
    norms = g.norm(per_parameter=True)
    d.close(f"{tag} norms", {k: norms[k] for k in large}, {k: flat[k].norm(dim=1) for k in large})
    spaces = t.parameters
    for name, got in {
        "mean": g.mean(), "sum": g.sum(), "weighted": g.sum(t.weight), "clip": g.clip(t.max_norm),
        "second_moment": g.second_moment(), "variance": g.variance(), "std": g.std(),
    }.items():  # fmt: skip
        d.close(f"{tag} {name}", got, spaces[name])
    if len(g) > 1:
        d.close(f"{tag} variance1", g.variance(ddof=1), spaces["variance1"])
        d.close(f"{tag} std1", g.std(ddof=1), spaces["std1"])


def check_other(d: Differences, g: Any, h: Any, t: Truth, tag: str) -> None:
    """Products with the rows of another batch."""
    a, b = t.g.flat, t.h.flat
    scale = a.norm(dim=1)[:, None] * b.norm(dim=1)
    d.close(f"{tag} cross gram", g.gram(h), a @ b.T)
    d.close(f"{tag} cross cosine", g.cosine(h), torch.where(scale > 0, a @ b.T / scale, 0.0))


def check_model_side(d: Differences, g: Any, t: Truth) -> None:
    """Outputs, select, and backward into `.grad`; nothing has touched `.grad` before."""
    model = t.problem.model
    d.equal("grad of parameters", [k for k, p in model.named_parameters() if p.grad is not None], [])
    inputs = [x for x in tree_leaves(t.problem.inputs) if isinstance(x, Tensor) and x.requires_grad]
    d.equal("grad of inputs", [x.grad is not None for x in inputs], [False] * len(inputs))
    with torch.no_grad():
        outputs = floats(call(model, t.problem.inputs))
    for i, (got, want) in enumerate(zip(floats(g.outputs), outputs, strict=True)):
        d.close(f"output {i}", got, want)
    first = g.names[0]
    d.equal("select by name", g.select([first]).names, (first,))
    d.close("select by pattern", g.select(".*")[first], t.g.rows[first])
    d.close(
        "select by predicate",
        g.select(lambda name, p: name != first or len(g.names) == 1).flat(),
        torch.cat([matrix(r) for k, r in t.g.rows.items() if k != first or len(g.names) == 1], 1),
    )
    parameters = {k: p for k, p in model.named_parameters() if k in t.g.rows}
    try:
        g.backward()
        mean = {k: m for k, m in t.parameters["mean"].items() if k not in t.g.unused}
        d.equal("backward of unused", {k for k, p in parameters.items() if p.grad is None}, {*t.g.unused})
        d.close("backward", {k: p.grad for k, p in parameters.items() if k in mean}, mean)
        g.backward(t.weight)
        both = {k: m + t.parameters["weighted"][k] for k, m in mean.items()}
        d.close("backward again", {k: p.grad for k, p in parameters.items() if k in both}, both)
    finally:
        model.zero_grad()


def requests(t: Truth, engine: str) -> list[Any]:
    made: list[Any] = [
        "norm", "squared_norm", "gram", "cosine", "sum", "mean", "second_moment", "variance", "std",
        ("dot", {"direction": t.direction}), ("project", {"projection": t.projection}),
    ]  # fmt: skip
    return [*made, ("clip", {"max_norm": t.max_norm})]


def check_statistics(d: Differences, s: Any, t: Truth, engine: str, single: bool) -> None:
    """The run that reduces on arrival."""
    arguments = {"dot": [t.direction], "project": [t.projection]}
    for name, want in t.samples.items():
        d.close(f"statistics {name}", getattr(s, name)(*arguments.get(name, [])), want)
    for name, wanted in t.parameters.items():
        if name == "clip":
            d.close("statistics clip", s.clip(t.max_norm), wanted)
        elif name in ("variance1", "std1"):
            d.close(f"statistics {name}", getattr(s, name[:-1])(ddof=1), wanted)
        elif name != "weighted":
            d.close(f"statistics {name}", getattr(s, name)(), wanted)
    d.close("statistics losses", s.losses, t.g.losses)
    d.equal("statistics unused", set(s.unused), set(t.g.unused))


def run(p: Problem, case: Case, engine: str, **options: Any) -> Any:
    options = {"engine": engine, "batch_dim": case.batch_dim, **options}
    return persample.gradients(p.model, p.loss_fn, p.inputs, p.targets, **options)


def raises_as_said(case: Case, engine: str, **options: Any) -> bool:
    """Whether the case has to raise with this engine; if so, it does. Cases whose package is missing are skipped."""
    if case.missing:
        pytest.skip(f"needs {case.needs}")
    if engine not in case.raises:
        return False
    error, _ = case.raises[engine]
    with pytest.raises(getattr(errors, error)):
        run(problem(case), case, engine, **options)
    return True


# The loop and vmap run samples alone: they can't see coupling that no layer declares.
pairs = [(case, engine) for case in cases for engine in ENGINES if not case.coupled or engine in case.raises]


@pytest.mark.parametrize(("case", "engine"), pairs, ids=str)
def test_rows_and_every_quantity(case: Case, engine: str) -> None:
    if raises_as_said(case, engine):
        return
    t, d = truth(case), Differences()
    g = run(t.problem, case, engine)
    check_rows(d, g, t)
    check_model_side(d, g, t)
    if engine != "loop":  # whose rows are dense, as those of vmap
        h = run(t.other, case, engine)
        check_quantities(d, g, t, "kept")
        check_other(d, g, h, t, "kept")
    if engine == "hooks":
        c, k = collapsed(g), collapsed(h)
        check_quantities(d, c, t, "collapsed")
        check_other(d, c, k, t, "collapsed")
        check_other(d, g, k, t, "mixed")
    assert not d.found, "\n".join(d.found)


def collapsed(g: persample.Gradients) -> persample.Gradients:
    """The same gradients with dense rows."""
    return persample.Gradients({name: Dense(g[name]) for name in g.names}, g.losses, g.outputs, unused=g.unused)


@pytest.mark.parametrize(("case", "engine"), [(c, e) for c, e in pairs if e != "loop"], ids=str)
def test_reducing_on_arrival(case: Case, engine: str) -> None:
    if raises_as_said(case, engine, quantities=["norm"]):
        return
    t, d = truth(case), Differences()
    check_statistics(d, run(t.problem, case, engine, quantities=requests(t, engine)), t, engine, case.single)
    assert not d.found, "\n".join(d.found)


def test_every_form_is_kept_somewhere() -> None:
    """The zoo has gradients that stay factored in each of the forms, so that the quantities are tested on them."""
    seen: set[str] = set()
    for case in cases:
        if case.name.startswith(("linear", "conv", "embedding", "net_gpt")) and "hooks" not in case.raises:
            g = run(problem(case), case, "hooks")
            seen |= {type(f).__name__ for f in g.factors.values()}
    assert seen == {"Dense", "Outer", "Rows", "Conv"}
