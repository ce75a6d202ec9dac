"""`check`: is it right for this model, parameter by parameter?"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import display
from .calls import function_name
from .capture import Capture
from .dropout import NoDropout, RecomputedDropout
from .engines import ENGINES, check_engine
from .engines.hooks import forward, hooks
from .errors import ArgumentError, BatchCoupledError, PersampleError, VerificationError
from .factors import Factors, strided
from .losses import LossFunction
from .problem import Pass, Problem, Selection, pose
from .reductions import weighted_sum
from .report import html_table, text_table
from .rounding import computing_in, slack, tolerance
from .state import Buffers, random_state, restored, set_random_state, taking_turns
from .telling import telling
from .trace import find_coupling
from .verify import DRAWN, WITHIN, LossDiffers, Probe, check_alone, double, inner_types, moved_by_others, roundings

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
        which, how, notes = f"samples {', '.join(map(str, self.samples))}", "run alone", self.note.split("; ")
        if notes[0] in (WITHIN, DRAWN):  # alone, they draw other numbers
            how = notes.pop(0)
        alone, note = f"{which if self.samples else 'no sample'} {how}", "".join(f"; {note}" for note in notes if note)
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


@taking_turns
@telling
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
    no_notion("check", coupled)
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    check_engine(engine)
    if not isinstance(samples, int) or samples < 0:
        raise ArgumentError(f"samples must be how many samples to run alone, 0 or more, got {samples!r}.")
    chosen = (
        torch.randperm(problem.batch.n, generator=generator or torch.Generator().manual_seed(0), device="cpu")[:samples]
        .sort()
        .values.tolist()
    )
    return check_problem(problem, engine, chosen)


def no_notion(name: str, coupled: Any) -> None:
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
        with restored(*problem.owners), computing_in(inner_types(problem)):
            with contextlib.suppress(RecomputedDropout), NoDropout(differentiated=True):
                return _checked(problem, engine, chosen, couplers)
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
    probes, buffers, before = [Probe(problem, n) for n in chosen], Buffers(*problem.owners), random_state(problem.model)
    sums: dict[str, Tensor] = {}

    def emit(name: str, g: Factors) -> None:
        sums[name] = weighted_sum(g)
        for probe in probes:
            probe.keep(name, g)

    for n in chosen if engine != "hooks" else ():
        check_alone(problem, n)
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
    set_random_state(before)
    if (run.totals or run.hidden) and not couplers and (moved := moved_by_others(problem)) is not None:
        return _coupled(problem, engine, chosen, moved)
    ordinary, of_criterion = _summed(problem)
    note = "; ".join(filter(None, [note, of_criterion]))
    sizes = {name: double(g).norm() for name, g in ordinary.items()}
    total = torch.stack(list(sizes.values())).norm()
    offs = {name: (double(sums[name]) - double(g)).norm() for name, g in ordinary.items()}
    lost = {n for n, g in ordinary.items() if offs[n] > tolerance(g.dtype) * (sizes[n] + slack(g.dtype) * total)}

    def again(seed: float) -> Mapping[str, Tensor]:
        buffers.restore()
        set_random_state(before)
        return _summed(problem, seed)[0]

    if lost:
        noise = roundings(ordinary, again)
        lost = {name for name in lost if not float(offs[name]) <= noise[name]}
    rows = []
    for name, g in ordinary.items():
        off, size, summed_wrong = offs[name], sizes[name], name in lost
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


def _summed(problem: Problem, seed: float = 1.0) -> tuple[dict[str, Tensor], str]:
    """Ordinary autograd: the gradient of the summed losses, times ``seed``; and what there is to say of the
    criterion.
    """
    capture = Capture(problem.model, set())
    with torch.enable_grad(), warnings.catch_warnings(record=True) as said:  # the run has said it already
        warnings.simplefilter("always")
        _, _, seeds, criterion = forward(problem, capture)
        other = next((text for w in said if (text := str(w.message)).startswith("the criterion of the whole")), "")
        note = f"rows are of the samples' own losses: {other.partition('. ')[0]}" if other else ""
        tensors, grads = [t for t, *_ in seeds], [g for _, g, _ in seeds]
        if criterion is not None and criterion.requires_grad:
            tensors, grads = [*tensors, criterion], [*grads, torch.ones_like(criterion)]
    if not tensors:
        return {name: torch.zeros_like(p) for name, p in problem.parameters.items()}, note
    found = torch.autograd.grad(
        tensors, list(problem.parameters.values()), [g * seed for g in grads], materialize_grads=True, allow_unused=True
    )
    return dict(zip(problem.parameters, map(strided, found), strict=True)), note
