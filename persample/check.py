"""`check`: is it right for this model, parameter by parameter?  `explain`: what would serve each parameter, and at
what cost?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import display
from .calls import Call, Reached, function_name, leaves_of, reached
from .capture import Capture
from .collect import check_complete, couplers, factors_of
from .engines import ENGINES, check_engine
from .engines.hooks import forward, hooks
from .errors import ArgumentError, BatchCoupledError, PersampleError, VerificationError
from .factors import Dense, Factors, nbytes, strided
from .losses import LossFunction
from .problem import Pass, Problem, Selection, pose
from .reductions import weighted_sum
from .report import bytes_text, html_table, text_table
from .rules import RULES
from .rules.apart import Diagonal, plain
from .state import Buffers, restored
from .statistics_run import Statistics
from .verify import LossDiffers, NoDropout, Probe, find_coupling, slack, tolerance

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Checked:
    """What was found about one parameter."""

    name: str
    served: str  # the functions that used it, and by rule or fallback
    error: float  # largest relative error of the rows that were compared
    sum_error: float  # relative error of the sum of rows against ordinary autograd
    verdict: str  # "exact", "unused", "coupled", "wrong", "not finite" or "error"
    reason: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`: ``ok``, ``raise_if_bad()``, and one `Checked` per parameter in ``rows``."""

    engine: str
    n: int
    samples: tuple[int, ...]  # those that were run alone
    rows: tuple[Checked, ...]
    note: str = ""
    failure: PersampleError | None = None

    @property
    def ok(self) -> bool:
        """Whether every parameter is exact (or unused)."""
        return self.failure is None and all(row.verdict in ("exact", "unused") for row in self.rows)

    def raise_if_bad(self) -> None:
        """Raise the error that the run raised, or a `VerificationError` that names the worst parameter."""
        if self.failure is not None:
            raise self.failure
        if bad := [row for row in self.rows if row.verdict not in ("exact", "unused")]:
            worst = max(bad, key=lambda row: max(row.error, row.sum_error))
            raise VerificationError(
                f"parameter '{worst.name}' (and {len(bad) - 1} more): {worst.reason} {worst.way_out}"
            )

    def _title(self) -> str:
        alone = f"samples {', '.join(map(str, self.samples))} run alone" if self.samples else "no sample run alone"
        note = f"; {self.note}" if self.note else ""
        return f"persample.check: {'ok' if self.ok else 'NOT ok'} (engine={self.engine}, N={self.n}, {alone}{note})"

    def _cells(self) -> list[list[str]]:
        return [
            [r.name, r.served, _error(r.error), _error(r.sum_error), r.verdict, f"{r.reason} {r.way_out}".strip()]
            for r in self.rows
        ]

    def __str__(self) -> str:
        table = text_table(_CHECK, self._cells(), self._title())
        return table if self.failure is None else f"{table}\n\n{type(self.failure).__name__}: {self.failure}"

    __repr__ = __str__

    def plot(self, ax: Axes | None = None) -> Axes:
        """The errors of every parameter, on a logarithmic axis; draws into ``ax`` if given.  Needs matplotlib."""
        return display.plot_errors(self, ax)

    def _repr_html_(self) -> str:
        colour = {"exact": "#009E73", "unused": "#999999"}
        below = (
            "" if self.failure is None else f"<p><b>{type(self.failure).__name__}</b>: {escape(str(self.failure))}</p>"
        )
        marks = [colour.get(r.verdict, "#D55E00") for r in self.rows]
        return html_table(_CHECK, self._cells(), self._title(), marks=marks) + below


def _error(value: float) -> str:
    return f"{value:.1e}" if value == value else "-"  # NaN: nothing was compared


_CHECK = ("parameter", "served by", "row error", "sum error", "verdict", "reason and way out")


def check(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    engine: str = "hooks",
    params: Selection = None,
    batch_dim: Any = 0,
    samples: int = 3,
    generator: torch.Generator | None = None,
    coupled: None = None,
) -> CheckReport:
    """Whether per-sample gradients of this model are right: a report with one line per parameter.

    ``samples`` random samples are run alone, through the definition, and compared with their rows; the sum of all
    rows is compared with the ordinary gradient of the summed losses; completeness, the sample axis and batch coupling
    are checked on the way.  With random draws (dropout) all of it is done with dropout off.  Random state and buffers
    are restored.  It costs about ``samples + 3 N`` sample passes.  Whatever the engine raises becomes part of the
    report; ``report.raise_if_bad()`` raises it.  There is no ``coupled=``: a sample alone says nothing about the
    notions of `persample.gradients`, which verify themselves otherwise.
    """
    _no_notion("check", coupled)
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    check_engine(engine)
    if not isinstance(samples, int) or samples < 0:
        raise ArgumentError(f"samples must be how many samples to run alone, 0 or more, got {samples!r}.")
    chosen = (
        torch.randperm(problem.batch.n, generator=generator or torch.Generator().manual_seed(0))[:samples]
        .sort()
        .values.tolist()
    )
    return check_problem(problem, engine, chosen)


def _no_notion(name: str, coupled: Any) -> None:
    if coupled is not None:
        raise ArgumentError(
            f"persample.{name} is about samples on their own, and has no coupled={coupled!r}. "
            "persample.gradients(..., coupled=..., verify=True) verifies a notion in its run; "
            "persample.coupling(...) shows which parameters are coupled, by which layer, and repr() of it what each "
            "costs."
        )


def check_problem(problem: Problem, engine: str, chosen: list[int], couplers: tuple[int, ...] = ()) -> CheckReport:
    """The report; what the engine raises becomes part of it."""
    try:
        with restored(problem.model), NoDropout():
            return _checked(problem, engine, chosen, couplers)
    except PersampleError as error:
        return _failed(problem, engine, chosen, error, couplers)


def _failed(
    problem: Problem, engine: str, chosen: list[int], error: PersampleError, couplers: tuple[int, ...]
) -> CheckReport:
    """The run raised.  Where only some parameters are coupled, the others are checked all the same."""
    blamed = (
        error.parameters if isinstance(error, BatchCoupledError) and error.parameters else tuple(problem.parameters)
    )
    verdict = "coupled" if isinstance(error, BatchCoupledError) else "error"
    rows = {name: Checked(name, "-", float("nan"), float("nan"), verdict, "see below") for name in blamed}
    free = {name: p for name, p in problem.parameters.items() if name not in rows}
    if free and engine == "hooks":
        report = check_problem(replace(problem, parameters=free), engine, chosen, couplers)
        rows.update({row.name: row for row in report.rows})
    return CheckReport(
        engine,
        problem.batch.n,
        tuple(chosen) if free else (),
        tuple(rows[name] for name in problem.parameters),
        failure=error,
    )


def _checked(problem: Problem, engine: str, chosen: list[int], couplers: tuple[int, ...]) -> CheckReport:
    probes, buffers = [Probe(problem, n) for n in chosen], Buffers(problem.model)
    sums: dict[str, Tensor] = {}

    def emit(name: str, g: Factors) -> None:
        sums[name] = weighted_sum(g)
        for probe in probes:
            probe.keep(name, g)

    run = hooks(problem, emit, couplers=couplers) if engine == "hooks" else ENGINES[engine](problem, emit)
    errors: dict[str, list[float]] = {name: [0.0] for name in problem.parameters}
    bad: set[str] = set()
    note = ""
    for probe in probes:
        try:
            verdicts, note = probe.verdicts(run, engine)
        except LossDiffers as differs:
            return _coupled(problem, engine, chosen, differs)
        for v in verdicts:
            errors[v.name].append(v.error)
            if not v.ok:
                bad.add(v.name)
    buffers.restore()
    ordinary = _summed(problem)
    total = torch.stack([g.double().norm() for g in ordinary.values()]).norm()
    rows = []
    for name, g in ordinary.items():
        off, size = (sums[name].double() - g.double()).norm(), g.double().norm()
        summed_wrong = bool(off > tolerance(g.dtype) * (size + slack(g.dtype) * total))
        verdict = "wrong" if name in bad or summed_wrong else "unused" if name in run.unused else "exact"
        error, sum_error = max(errors[name]), float(off / size) if size > 0 else float(off)
        if not bool(g.isfinite().all()):  # NaN agrees with nothing, not even itself
            verdict, error, sum_error, summed_wrong = "not finite", float("nan"), float("nan"), False
        rows.append(_row(name, run, error, sum_error, verdict, summed_wrong))
    return CheckReport(engine, problem.batch.n, tuple(chosen), tuple(rows), note)


def _coupled(problem: Problem, engine: str, chosen: list[int], differs: LossDiffers) -> CheckReport:
    """Name the call that couples, and the parameters that act through it."""
    name, ordinal = find_coupling(problem, differs.n)
    if engine == "hooks" and ordinal:
        try:
            hooks(problem, lambda *_: None, couplers=(ordinal,))
        except BatchCoupledError as error:
            return _failed(problem, engine, chosen, error, (ordinal,))
    raise LossDiffers(differs.n, differs.batch, differs.alone, name)


def _row(name: str, run: Pass, error: float, sum_error: float, verdict: str, summed_wrong: bool) -> Checked:
    reason, way = "", ""
    if verdict == "unused":
        reason = "no loss depends on it; its rows are zeros"
    elif verdict == "not finite":
        reason, way = (
            "its ordinary gradient is no finite number, so nothing can be compared.",
            "Look for NaN and infinities in parameters, inputs and losses.",
        )
    elif verdict == "wrong" and summed_wrong:
        reason, way = (
            "the rows don't add up to the ordinary gradient: a use was missed, or a rule is wrong.",
            "Use engine='loop', and report the functions named here.",
        )
    elif verdict == "wrong":
        reason, way = (
            "the sum is right, single rows are not: the samples are on another axis than assumed.",
            "Say where with batch_dim=, or use engine='loop'.",
        )
    return Checked(name, served_text(run.served.get(name, [])), error, sum_error, verdict, reason, way)


def served_text(served: Iterable[tuple[Any, str]]) -> str:
    """``torch.nn.functional.linear (rule, 2x)``."""
    counts = Counter((function_name(func), how) for func, how in served)
    return ", ".join(f"{name} ({how}{f', {k}x' if k > 1 else ''})" for (name, how), k in counts.items()) or "-"


def _summed(problem: Problem) -> dict[str, Tensor]:
    """Ordinary autograd: the gradient of the summed losses."""
    capture = Capture(problem.model, set())
    with torch.enable_grad():
        _, _, seeds, criterion = forward(problem, capture)
        tensors, grads = [t for t, *_ in seeds], [g for _, g, _ in seeds]
        if criterion is not None and criterion.requires_grad:
            tensors, grads = [*tensors, criterion], [*grads, torch.ones_like(criterion)]
    if not tensors:
        return {name: torch.zeros_like(p) for name, p in problem.parameters.items()}
    found = torch.autograd.grad(
        tensors, list(problem.parameters.values()), grads, materialize_grads=True, allow_unused=True
    )
    return dict(zip(problem.parameters, map(strided, found), strict=True))


# ---- explain --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explained:
    """What would serve one parameter."""

    name: str
    shape: tuple[int, ...]
    served: str
    form: str  # "Outer", "Conv", "Rows", "Dense"
    kept: int  # bytes of the factors that would be kept
    dense: int  # bytes of the individual gradients [N, *P]
    why: str


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`: one `Explained` per parameter in ``rows``."""

    engine: str
    n: int
    rows: tuple[Explained, ...]

    @property
    def kept(self) -> int:
        """Bytes of all factors."""
        return sum(row.kept for row in self.rows)

    @property
    def dense(self) -> int:
        """Bytes of all individual gradients."""
        return sum(row.dense for row in self.rows)

    def _title(self) -> str:
        sizes = f"factors {bytes_text(self.kept)}, individual gradients {bytes_text(self.dense)}"
        return f"persample.explain: engine={self.engine}, N={self.n}, {sizes}"

    def _cells(self) -> list[list[str]]:
        return [
            [r.name, str(r.shape), r.served, r.form, bytes_text(r.kept), bytes_text(r.dense), r.why] for r in self.rows
        ]

    def __str__(self) -> str:
        return text_table(_EXPLAIN, self._cells(), self._title())

    __repr__ = __str__

    def plot(self, ax: Axes | None = None, limit: int = 12) -> Axes:
        """Memory of factors against that of individual gradients, for the ``limit`` largest parameters; draws into
        ``ax`` if given.  Needs matplotlib.
        """
        return display.plot_sizes(self, ax, limit)

    def _repr_html_(self) -> str:
        shares = [r.kept / max(1, self.kept) for r in self.rows]
        return html_table(_EXPLAIN, self._cells(), self._title(), shares, bar_name="share of kept")


_EXPLAIN = ("parameter", "shape", "served by", "form", "kept", "[N, *P]", "why")


def explain(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    engine: str = "hooks",
    params: Selection = None,
    batch_dim: Any = 0,
    quantities: Iterable[Any] | None = None,
    coupled: None = None,
) -> Explanation:
    """What a run of `persample.gradients` with these arguments would do, before it is done: a report with one line per
    parameter.

    It runs the forward pass only (random state and buffers are restored), and asks the rules about output gradients
    of zeros.  ``kept`` is what `Gradients` would hold, ``[N, *P]`` what individual gradients would take.  A
    statistics run keeps neither, except that ``clip`` keeps the former until all norms are known.  Parameters that are
    coupled are told as such; whatever else the run would raise is raised.  There is no ``coupled=``:
    `persample.coupling` shows what those runs do.
    """
    _no_notion("explain", coupled)
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    check_engine(engine)
    streamed = quantities is not None and "clip" not in Statistics(quantities, problem.parameters).requests
    n = problem.batch.n
    if engine != "hooks":
        why = "one sample at a time: the definition" if engine == "loop" else "torch.func, all samples at once"
        rows = [
            _explained(name, p, n, f"engine='{engine}'", "Dense", None, why) for name, p in problem.parameters.items()
        ]
        return Explanation(engine, n, tuple(rows))
    capture = Capture(model, {id(p) for p in problem.parameters.values()})
    with restored(model), torch.enable_grad():
        _, _, seeds, _ = forward(problem, capture)
        found = reached(t.grad_fn for t, *_ in seeds)
        check_complete(found, problem.parameters)
        behind = couplers(found, problem.parameters)
        uses = _uses(found, problem)
    rows = [
        _explain_coupled(name, p, n, behind[name]) if name in behind else _explain_one(name, p, n, uses[name], streamed)
        for name, p in problem.parameters.items()
    ]
    return Explanation(engine, n, tuple(rows))


Use = tuple[
    Call, str, Factors | None, bool
]  # the call, how it is served, its factors (None: not tried), whether the tensor is derived


def _uses(found: Reached, problem: Problem) -> dict[str, list[Use]]:
    names = {id(p): name for name, p in problem.parameters.items()}
    uses: dict[str, list[Use]] = {name: [] for name in problem.parameters}
    for call in found.calls:
        factors: dict[int, tuple[str, Factors | None]] = {id(s.tensor): ("fallback", None) for s in call.shared}
        if call.func in RULES:
            zeros = (
                [torch.zeros((), dtype=call.shared[0].tensor.dtype).expand(shape) for shape, _ in call.outputs]
                if call.shared
                else []
            )
            with torch.no_grad():
                for shared, rows, how in factors_of(call, zeros):
                    factors[id(shared.tensor)] = (how, Dense(rows.value) if isinstance(rows, Diagonal) else plain(rows))
        for shared in call.shared:
            how, g = factors[id(shared.tensor)]
            for p in [shared.tensor] if shared.derivation is None else leaves_of(shared.derivation):
                if id(p) in names:
                    uses[names[id(p)]].append((call, how, g, shared.derivation is not None))
    return uses


def _explain_one(name: str, p: Tensor, n: int, uses: list[Use], streamed: bool) -> Explained:
    if not uses:
        return _explained(name, p, n, "-", "Dense", 0, "no loss depends on it, or only the criterion itself")
    served = served_text(
        (call.func, how + (" of a derived tensor" if derived else "")) for call, how, _, derived in uses
    )
    known = [g for *_, g, _ in uses if g is not None]
    full = n * p.numel() * p.element_size()
    size = sum(nbytes(g) for g in known)
    factored = len(known) == len(uses) and not any(derived for *_, derived in uses) and size < full
    form = type(known[0]).__name__ if factored else "Dense"
    if streamed:
        return _explained(name, p, n, served, form, 0, "reduced on arrival, then dropped")
    if factored and form != "Dense":
        return _explained(name, p, n, served, form, size, "factors are smaller than the gradients")
    why = "gradients are no larger than factors"
    if any(how == "fallback" for _, how, *_ in uses):
        why = "no rule: vmap of vjp over this call"
    elif any(derived for *_, derived in uses):
        why = "pulled back to the parameter"
    return _explained(name, p, n, served, "Dense", full, why)


def _explain_coupled(name: str, p: Tensor, n: int, call: Call) -> Explained:
    why = f"{call.name} {call.couples}: which gradient is meant says coupled=, see persample.coupling"
    return _explained(name, p, n, "- (coupled)", "-", 0, why)


def _explained(name: str, p: Tensor, n: int, served: str, form: str, kept: int | None, why: str) -> Explained:
    full = n * p.numel() * p.element_size()
    return Explained(name, tuple(p.shape), served, form, full if kept is None else kept, full, why)


__all__ = ["CheckReport", "Checked", "Explained", "Explanation", "check", "explain"]
