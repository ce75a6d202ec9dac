"""Is it right?  One sample alone, through the definition, against what an engine computed for the batch.

A sample run alone is the only check that catches a wrong sample axis, a missed use, and coupling that no one
declared.  `Probe` listens to a run and keeps one row; `Probe.verdicts` runs that sample alone and compares.  It
restores the random state and the model's buffers.  Random draws (dropout) belong to one pass, so where the run drew
any, both sides are run once more with dropout off; where other draws are left, the row is held against the ordinary
gradient of that loss of the batch, with the same draws.  It costs about one sample, and with random draws one or two
more passes of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import cost, reductions
from .batch import Tree, call_model
from .calls import APART
from .dropout import NoDropout, RecomputedDropout
from .engines import ENGINES
from .engines.hooks import told_apart
from .engines.loop import one_sample
from .errors import BatchCoupledError, PersampleError, VerificationError
from .factors import Factors, dense, device, index, strided
from .losses import batch_losses
from .meter import uncounted
from .problem import Emit, Pass, Problem
from .remembered import counting, mistrust, recall, remember, signature
from .rounding import LOSS, Types, computing_in, inside, slack, tolerance
from .state import Buffers, drawn_since, random_state, restored, set_random_state
from .telling import numbered_as
from .trace import find_coupling, influence

P = ParamSpec("P")
R = TypeVar("R")

Grads = tuple[Tensor | None, ...]
Definition = Callable[[Problem, int, float], tuple[Tensor, Grads]]  # the gradients times a number

# Where a sample alone draws other random numbers than within the batch (dropout aside, which can be switched off).
WITHIN = "verified within the batch (same random draws)"
DRAWN = "not verified: a sample alone draws other random numbers"


@dataclass(frozen=True)
class Verdict:
    """How far a parameter's row is from the definition."""

    name: str
    error: float  # |row - definition| / |definition|, for sample `sample`
    sample: int
    ok: bool


class Probe:
    """Keeps row ``n`` of a run, by listening to what it emits; and of parameters of which that one is zero, and so
    says nothing, the largest.
    """

    @uncounted()
    def __init__(self, problem: Problem, n: int) -> None:
        self.problem, self.n = with_own_inputs(problem), n
        self.rows: dict[str, Tensor] = {}
        self.others: dict[int, dict[str, Tensor]] = {}  # rows of other samples
        self.before, self.buffers = random_state(problem.model), Buffers(*problem.owners)

    def listen(self, emit: Emit) -> Emit:
        """``emit``, with the row kept on the way."""

        def both(name: str, g: Factors) -> None:
            self.keep(name, g)
            emit(name, g)

        return both

    @uncounted()
    def keep(self, name: str, g: Factors) -> None:
        self.rows[name] = row = row_of(g, self.n)
        if len(g) > 1 and not bool(row.any()):
            sizes = reductions.row_dot(g, g).nan_to_num()
            if bool(sizes.max() > 0):
                largest = int(sizes.argmax())
                self.others.setdefault(largest, {})[name] = row_of(g, largest)

    @uncounted()
    def verdicts(self, run: Pass, engine: str) -> tuple[list[Verdict], str]:
        """Row ``n`` against sample ``n`` alone; and a note on how that was done.  Raises where the loss itself
        differs.
        """
        model = self.problem.model
        if not drawn_since(self.before, model):
            return self._compare(run), ""
        try:
            with restored(*self.problem.owners, begin=self.buffers), NoDropout(differentiated=True):
                again = Probe(self.problem, self.n)
                silent = ENGINES[engine](self.problem, again.keep)
                if not drawn_since(again.before, model):
                    return again._compare(silent), "verified with dropout off"
        except RecomputedDropout:
            with restored(*self.problem.owners, begin=self.buffers):  # no backward follows: nothing is run again
                check_alone(self.problem, self.n, told=False)
        assert run.losses is not None
        loss, grads = self._held_against(_within_batch, self.n)
        if _differ(run.losses[self.n], loss, self.problem):
            return [], DRAWN
        return self._compared(self.rows, self.n, _within_batch, loss, grads), WITHIN

    def _compare(self, run: Pass) -> list[Verdict]:
        assert run.losses is not None
        verdicts = []
        how = _within_batch if run.coupled else _alone
        for n, rows in [(self.n, self.rows), *[*self.others.items()][:FEW]]:
            loss, grads = self._held_against(how, n)
            if _differ(run.losses[n], loss, self.problem):
                raise LossDiffers(n, float(run.losses[n]), float(loss))
            verdicts += self._compared(rows, n, how, loss, grads)
        return verdicts

    def _held_against(self, how: Definition, n: int, seed: float = 1.0) -> tuple[Tensor, Grads]:
        """From the buffers and random numbers that the run began with."""
        with restored(*self.problem.owners, begin=self.buffers):
            set_random_state(self.before)
            return how(self.problem, n, seed)

    def _compared(
        self, rows: Mapping[str, Tensor], n: int, how: Definition, loss: Tensor, grads: Grads
    ) -> list[Verdict]:
        def named(grads: Grads) -> dict[str, Tensor | None]:
            return dict(zip(self.problem.parameters, grads, strict=True))

        return compared(rows, named(grads), n, loss.dtype, lambda seed: named(self._held_against(how, n, seed)[1]))


def chosen(count: int, call: int = 0, sizes: Sequence[int] = ()) -> int:
    """The sample that is verified: always the same of so many at the first call, another at later ones; not the first
    of several then, on which those before it can't act; nor one of the largest, where their ``sizes`` are known, as
    nothing is padded there.
    """
    drawn = int(torch.randint(count, (), generator=torch.Generator().manual_seed(count + 7919 * call), device="cpu"))
    drawn = drawn if call else max(drawn, min(1, count - 1))
    return sizes.index(min(sizes)) if sizes and sizes[drawn] == max(sizes) else drawn


def with_own_inputs(problem: Problem) -> Problem:
    """The same, with inputs of its own: a forward may change those that it is given in place."""
    return replace(problem, batch=replace(problem.batch, inputs=_own(problem.batch.inputs)))


def _own(tree: Tree) -> Tree:
    given = zip(tree.leaves, tree.axes, strict=True)
    shared = [x.clone() if axis is None and isinstance(x, Tensor) else x for x, axis in given]
    return replace(tree, leaves=shared).over(lambda x, _: x.clone())


def row_of(g: Factors, n: int) -> Tensor:
    """Row ``n``, ``[*P]``."""
    return dense(index(g, torch.tensor([n], device=device(g))))[0]


def compared(
    rows: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    n: int,
    precision: torch.dtype,
    again: Callable[[float], Mapping[str, Tensor | None]],
) -> list[Verdict]:
    """Row ``n`` of these parameters against what it should be, given for all (``None``: zeros); ``again``: the latter
    times a number, from another backward pass.
    """
    wanted = {name: torch.zeros_like(row) if (g := grads[name]) is None else g for name, row in rows.items()}
    norms = {name: _norm(g) for name, g in {**grads, **wanted}.items() if g is not None}
    sizes, whole = torch.stack([norms[name] for name in wanted]), torch.stack([*norms.values()])
    scale = whole[whole.isfinite()].norm()
    tol = tolerance(precision, *(g.dtype for g in wanted.values()))
    offs = {name: _norm(rows[name], g) for name, g in wanted.items()}
    right = []
    for (name, g), size in zip(wanted.items(), sizes, strict=True):
        ok = bool(offs[name] <= tol * (size + slack(g.dtype) * scale))
        right.append(ok or not bool(size.isfinite() | _norm(rows[name]).isfinite()))  # NaN agrees with NaN only
    if not all(right):
        noise = roundings(wanted, again)
        right = [ok or float(offs[name]) <= noise[name] for ok, name in zip(right, wanted, strict=True)]
    return [
        Verdict(name, float(offs[name] / size) if size > 0 else float(offs[name]), n, ok)
        for name, size, ok in zip(wanted, sizes, right, strict=True)
    ]


def roundings(grads: Mapping[str, Tensor], again: Callable[[float], Mapping[str, Tensor | None]]) -> dict[str, float]:
    """How far off rows may be where the gradient is nothing but rounding (of a bias before a normalisation): times a
    number, each operation of the backward pass rounds another way, and other gradients hardly change.  Times a power
    of two, all are exactly that: where they aren't, the backward pass isn't linear, and nothing is told.
    """

    def change(seed: float) -> dict[str, float]:
        found = again(seed)
        return {
            name: 0.0 if (again_g := found[name]) is None else float(_norm(again_g, g, seed))
            for name, g in grads.items()
        }

    if any(c for seed in (0.5, 2.0) for c in change(seed).values()):
        return dict.fromkeys(grads, 0.0)
    changes = [change(seed) for seed in (0.7, 1.1, 1.9)]
    return {name: ROUNDINGS * max((c[name] for c in changes if math.isfinite(c[name])), default=0.0) for name in grads}


ROUNDINGS = 30  # how much further off other orders of a sum are


def _alone(problem: Problem, n: int, seed: float = 1.0) -> tuple[Tensor, Grads]:
    """The definition: the loss and gradients of sample ``n`` as a batch of one."""
    try:
        loss, _, grads = one_sample(problem, n, list(problem.parameters.values()), seed)
    except (PersampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise VerificationError(
            f"the batch runs, but sample {n} alone does not ({type(error).__name__}: {error}), so the rows can't be "
            f"held against the definition.{problem.batch.listed()} Let the model take any number of samples; or use "
            "verify=False for the rows within this batch."
        ) from error
    return loss, grads


def judged_by_inner_types(function: Callable[Concatenate[Problem, P], R]) -> Callable[Concatenate[Problem, P], R]:
    """Where a comparison fails, once more with the rounding of what the model computes in inside: it may be coarser
    than its parameters.
    """

    @wraps(function)
    def run(problem: Problem, /, *args: P.args, **kwargs: P.kwargs) -> R:
        before, buffers = random_state(problem.model), Buffers(*problem.owners)
        try:
            return function(problem, *args, **kwargs)
        except (LossDiffers, VerificationError):
            if inside() or not (types := inner_types(problem)):
                raise
            set_random_state(before)
            buffers.restore()
            with computing_in(types):
                return function(problem, *args, **kwargs)

    return run


def inner_types(problem: Problem) -> frozenset[torch.dtype]:
    """The types in which losses are computed that are coarser than all parameters."""
    with restored(*problem.owners), torch.enable_grad(), Types() as types:
        _batch_losses(problem)
    coarsest = max(torch.finfo(p.dtype).eps for p in problem.parameters.values())
    return frozenset(d for d in types.seen if torch.finfo(d).eps > coarsest)


@uncounted()
@judged_by_inner_types
def check_alone(problem: Problem, *samples: int, told: bool = True) -> None:
    """For engines that run samples alone: raise where one of ``samples`` has another loss within the batch (dropout
    off).  ``told``: as for `_batch_losses`.
    """
    with restored(*problem.owners), NoDropout(), torch.enable_grad():
        before, buffers = random_state(problem.model), Buffers(*problem.owners)
        losses = {}
        for n in samples:
            losses[n] = one_sample(problem, n, [])[0]
            buffers.restore()
        batch = _batch_losses(problem, told)
        if drawn_since(before, problem.model):
            return  # other random draws than dropout: nothing to compare
    for n, alone in losses.items():
        if _differ(batch[n], alone, problem):
            raise LossDiffers(n, float(batch[n].detach()), float(alone), find_coupling(problem, n)[0])


def _differ(a: Tensor, b: Tensor, problem: Problem) -> bool:
    """Whether two losses are different beyond rounding."""
    types = b.dtype, *(p.dtype for p in problem.parameters.values())
    x, y = double(a.detach()), double(b.detach())
    if not bool(x.isfinite() & y.isfinite()):
        return bool(x.isfinite() | y.isfinite())
    return not bool((x - y).abs() <= tolerance(*types, of=LOSS) * (x.abs() + y.abs()) + 1e-3 * tolerance(*types))


def _batch_losses(problem: Problem, told: bool = False) -> Tensor:
    """``[N]``, by one forward pass; ``told``: with a warning where the criterion is something else than their mean."""
    batch = problem.batch
    tree = batch.outputs(call_model(problem.model, batch.inputs.map(lambda x, _: x.clone())))
    several = [i for i, axis in enumerate(tree.axes) if axis is not None]
    tree = told_apart(problem, tree, several) if len(several) > 1 else tree
    return batch_losses(problem.loss_fn, tree, _own(batch.targets), batch.n, told)


def _within_batch(problem: Problem, n: int, seed: float = 1.0) -> tuple[Tensor, Grads]:
    """The definition where other parameters are coupled: the ordinary gradient of loss ``n`` of this batch."""
    with torch.enable_grad():
        losses = _batch_losses(problem)
    if not losses.requires_grad:  # they depend on none of the parameters
        return losses[n].detach(), (None,) * len(problem.parameters)
    seeds = torch.full_like(losses[n], seed)
    found = torch.autograd.grad(losses[n], list(problem.parameters.values()), seeds, allow_unused=True)
    return losses[n].detach(), tuple(None if g is None else strided(g) for g in found)


class LossDiffers(BatchCoupledError):
    """A sample has another loss in the batch than alone: something couples the samples, or they are on another axis."""

    def __init__(self, n: int, batch: float, alone: float, call: str = "") -> None:
        what = f": {call} {APART}" if call else ""
        times = alone / batch if batch else 0.0
        if math.isfinite(times) and (size := round(times)) > 1 and abs(times - size) < 1e-4 * size:
            what += f", {size} times as much (is it divided by the number of samples?)"
        super().__init__(
            f"sample {n} has loss {batch:.6g} within the batch and {alone:.6g} alone{what}. Either the model (or the "
            "loss) couples the samples, and 'the gradient of sample n' is not one thing; let it act on every sample "
            "alone. Or the samples are not where batch_dim= says. Or the model draws random numbers from a generator "
            "of its own, or changes parameters or other state than buffers in its forward (then verify=False gives the "
            "rows within the batch)."
        )
        self.n, self.batch, self.alone = n, batch, alone


@judged_by_inner_types
def run_verified(problem: Problem, engine: str, emit: Emit, run: Run, n: int) -> tuple[Pass, str]:
    """Run, hold row ``n`` against the definition, and remember that this was done."""
    probe, before = Probe(problem, n), signature(problem, engine)
    result = run(probe.listen(emit), ())
    if signature(problem, engine) != before:
        counting(problem.model)
    couplers: tuple[int, ...] = ()
    try:
        verdicts, note = probe.verdicts(result, engine)
    except LossDiffers as differs:
        mistrust(problem, engine)
        n = differs.n  # another one, where the row of the one that was chosen is zero
        name, ordinal = find_coupling(problem, n)
        if engine != "hooks" or not ordinal:
            raise LossDiffers(n, differs.batch, differs.alone, name) from None
        probe.buffers.restore()
        couplers, probe = (ordinal,), Probe(problem, n)
        result = run(probe.listen(emit), couplers)  # raises for what is upstream of that call, serves what is behind it
        verdicts, note = probe.verdicts(result, engine)
    wrong = not all(v.ok for v in verdicts)
    if engine == "hooks" and not couplers and wrong and (ordinal := influence(problem, n)):
        run(lambda *_: None, (ordinal,))  # raises for what is upstream of that call
    acts = result.totals or result.hidden
    known = recall(problem, engine)
    another = result.ragged or (result.read and (known is None or result.called not in known.called))
    another = another and problem.batch.n > 1  # a sample as long as the longest tells nothing of the others
    if (
        (acts or another or wrong)
        and not couplers
        and not result.coupled  # rows are held against this batch's own losses, and a sample alone is another function
        and (other := moved_by_others(problem, probe.buffers)) is not None
        and other.n != n
    ):
        return run_verified(problem, engine, emit, run, other.n)  # where the others move this one's loss, too
    raise_if_wrong(verdicts, None if note == WITHIN else engine)
    if not acts:  # a mask that is full now may not be so in the next batch
        remember(problem, engine, couplers, result.called, result.ragged or result.read)
    return result, note


@uncounted()
def moved_by_others(problem: Problem, begin: Buffers | None = None) -> LossDiffers | None:
    """A sample that has another loss alone: where numbers of the whole batch act by comparisons or branches, they do so
    on some samples only.  Looked for among those that have another loss in half of the batch, and among eight others;
    not in models that draw random numbers (dropout aside), of which a sample alone draws others.  ``begin``: the
    buffers that each pass finds.
    """
    batch, losses = problem.batch, []
    with restored(*problem.owners, begin=begin), NoDropout(), torch.enable_grad():  # the model may hook its gradients
        before, buffers = random_state(problem.model), begin or Buffers(*problem.owners)
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
            buffers.restore()
            some = torch.arange(batch.n, device="cpu")[part]
            with numbered_as(some.tolist()):
                losses.append(_losses_of(problem, some))
        if drawn_since(before, problem.model):
            return None
        whole, *halves = losses
        moved = [n for n in range(batch.n) if _differ(whole[n], halves[n % 2][n // 2], problem)]
        few: list[int] = [*moved[:FEW], *range(0, batch.n, -(-batch.n // FEW))]
        for n in few:
            buffers.restore()
            alone = one_sample(problem, n, [])[0]
            if _differ(whole[n], alone, problem):
                return LossDiffers(n, float(whole[n]), float(alone))
    return None


def _losses_of(problem: Problem, some: Tensor) -> Tensor:
    """The losses of some samples, as a batch of their own."""
    try:
        return _batch_losses(replace(problem, batch=problem.batch.select(some))).detach()
    except (PersampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise VerificationError(
            f"numbers of the batch may act on single samples, and the batch runs, but samples {some.tolist()} by "
            f"themselves don't ({type(error).__name__}: {error}), so it can't be told whether the others act on them. "
            "Let the model take any number of samples; or use verify=False for the rows within this batch."
        ) from error


FEW = 8  # samples of each kind that are run alone


Run = Callable[[Emit, tuple[int, ...]], Pass]


def raise_if_wrong(verdicts: list[Verdict], engine: str | None) -> None:
    """Raise `VerificationError` for rows that are not what the definition gives; without an engine, the definition
    is the gradient of one of the losses that were given.
    """
    if wrong := [v for v in verdicts if not v.ok]:
        worst = max(wrong, key=lambda v: v.error)
        of, causes = (
            (
                f"losses[{worst.sample}]",
                "losses that depend on several samples (something couples the batch, or predictions [N, 1] are "
                "compared with targets [N]), or that stand in another order than the samples. The ordinary gradients "
                "of losses that compare samples are gradients(losses, coupled='loss'). Of a loss_fn, see",
            )
            if engine is None
            else (
                f"that sample alone (engine='{engine}')",
                "samples on another axis than assumed where sizes coincide, a rule that is wrong, values that are "
                "discontinuous in single precision, or gradients of nothing but rounding (a bias that cancels, asked "
                "for alone). Use engine='loop', or",
            )
        )
        raise VerificationError(
            f"parameter '{worst.name}' (and {len(wrong) - 1} more): the row of sample {worst.sample} is off by "
            f"{worst.error:.2g} (relative) from the gradient of {of}. Usual causes: {causes} persample.check for a "
            "report per parameter."
        )


def double(x: Tensor) -> Tensor:
    """In double precision, complex numbers as such."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _norm(a: Tensor, b: Tensor | None = None, divided: float = 1.0) -> Tensor:
    """``|a / divided - b|`` in double precision, some entries at a time: there may be as many as of the model."""
    parts = [x.flatten().split(max(1, cost.costs().block // 8)) for x in ((a,) if b is None else (a, b))]
    found = [(double(x) / divided - sum(map(double, other))).norm() for x, *other in zip(*parts, strict=True)]
    norm: Tensor = torch.stack(found).norm()
    return norm
