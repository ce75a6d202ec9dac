"""`explain`: what would serve each parameter, and at what cost?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import display
from .calls import Call, Reached, leaves_of, reached
from .capture import Capture
from .check import no_notion, served_text
from .collect import factors_of
from .engines import check_engine
from .engines.hooks import forward
from .factors import Dense, Factors, nbytes
from .losses import LossFunction
from .problem import Problem, Selection, pose
from .refusals import check_complete, couplers, parameters_of
from .report import bytes_text, html_table, text_table
from .rules import COUPLES, RULES
from .rules.apart import Diagonal, plain
from .state import restored, taking_turns
from .statistics_run import Statistics
from .telling import telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        unseen = "; no row is verified: coupling that calls don't show is for persample.check"
        return f"persample.explain: engine={self.engine}, N={self.n}, {sizes}{unseen}"

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


@taking_turns
@telling
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
    coupled are told as such, as far as calls show it: products of all pairs of samples, and random generators of a
    model's own, are found when rows are verified.  Whatever else the run would raise is raised.  There is no
    ``coupled=``: `persample.coupling` shows what those runs do.
    """
    no_notion("explain", coupled)
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
    capture = Capture(problem.model, {id(p) for p in problem.parameters.values()})
    with restored(*problem.owners), torch.enable_grad():
        _, _, seeds, _ = forward(problem, capture)
        found = reached(t.grad_fn for t, *_ in seeds)
        check_complete(found, problem.parameters)
        behind = couplers(found, problem.parameters)
        uses = _uses(found, problem, behind)
    rows = [
        _explain_coupled(name, p, n, behind[name]) if name in behind else _explain_one(name, p, n, uses[name], streamed)
        for name, p in problem.parameters.items()
    ]
    return Explanation(engine, n, tuple(rows))


Use = tuple[
    Call, str, Factors | None, bool
]  # the call, how it is served, its factors (None: not tried), whether the tensor is derived


def _uses(found: Reached, problem: Problem, coupled: Mapping[str, Call]) -> dict[str, list[Use]]:
    """How every parameter that isn't ``coupled`` is used."""
    names = {id(p): name for name, p in problem.parameters.items() if name not in coupled}
    uses: dict[str, list[Use]] = {name: [] for name in names.values()}
    for call in found.calls:
        if not any(id(p) in names for p in parameters_of(Reached([call]))):
            continue
        factors: dict[int, tuple[str, Factors | None]] = {id(s.tensor): ("fallback", None) for s in call.shared}
        if call.func in RULES:
            zeros = (
                [call.shared[0].tensor.new_zeros(()).expand(shape) for shape, _ in call.outputs] if call.shared else []
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
    statistics = "which gradient is meant says coupled=, see persample.coupling"
    way = statistics if call.func in COUPLES else "let the model act on every sample alone"
    return _explained(name, p, n, "- (coupled)", "-", 0, f"{call.name} {call.couples}: {way}")


def _explained(name: str, p: Tensor, n: int, served: str, form: str, kept: int | None, why: str) -> Explained:
    full = n * p.numel() * p.element_size()
    return Explained(name, tuple(p.shape), served, form, full if kept is None else kept, full, why)
