"""A batch in slices of samples, so that what is computed at a time stays within a number of bytes: ``max_bytes=``.

Rows of independent samples don't depend on the slice that they are computed in, so every quantity can be put together:

====================================== ===============================================================================
rows, norms, derivatives, projections  one slice after the other
sums, clipped sums                     added
second moments                         averaged, by the number of samples
variances                              merged by the distance of the means (Chan, Golub, LeVeque 1983), held until then
Gram matrices                          block by block: rows of one slice are kept while every later slice is run again
====================================== ===============================================================================

What is as large as the parameters is merged in place, as it arrives where that is final (what is verified may be tried
again).  All but the last cost one pass over the batch; a Gram matrix in ``S`` slices costs about ``(S + 3) / 2``.
Slices that are run again draw the same random numbers.  Every slice finds the buffers as they were before the first,
and what they leave is averaged.

What a sample takes is measured on a first slice of two samples: the most that tensors hold at a time during its pass.
What the user gets (kept rows, results), the model, the blocks in which reductions stream, and a row and a gradient
where one is verified, come on top.

Slices of a batch whose samples are coupled are other functions of these samples: `BatchCoupledError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reductions
from .batch import Batch, cat, flatten, unflatten
from .errors import BatchCoupledError, RandomnessError
from .factors import Dense, Factors, Pulled, compact, dense, dtype, nothing, same_back, tensors
from .meter import Meter
from .problem import Emit, Pass, Problem
from .quantities import COUPLED, NEEDS, Parts
from .rounding import tolerance
from .scratch import fresh
from .state import Averaged, Buffers, RandomState, random_state, restored, set_random_state, unwrapped
from .statistics_run import Request, Statistics, listed
from .telling import numbered_as

FIRST = 2  # samples whose bytes are measured

Run = Callable[[Problem, Emit, bool], tuple[Pass, str]]  # problem, emit, whether it is a replay -> pass, note


@dataclass(frozen=True)
class Slice:
    """Some of the samples, as a problem of its own."""

    at: slice
    problem: Problem
    buffers: Buffers
    random: RandomState  # the state before its first run

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The same buffers and draws once more; afterwards, nothing has happened."""
        with restored(*self.problem.owners, begin=self.buffers), numbered_as(range(self.at.start, self.at.stop)):
            set_random_state(self.random)
            yield


# ---- results ----------------------------------------------------------------------------------------------------


def rows(problem: Problem, max_bytes: int, run: Run) -> tuple[dict[str, Factors], Pass, str]:
    """Factors of all samples, from slices; their own bytes are not counted."""
    kept: dict[str, list[Factors]] = {name: [] for name in problem.parameters}
    passes = []
    note = ""

    def once(part: Problem, meter: Meter) -> Pass:
        nonlocal note
        own: dict[str, Factors] = {}  # a run that is tried again emits once more
        result, note = run(part, meter.paused()(partial(_keep, own)), False)
        for name, g in own.items():
            kept[name].append(g)
        passes.append(result)
        return result

    slices = list(sweep(problem, max_bytes, once))
    whole = joined(slices, passes)
    factors: dict[str, Factors] = {}
    for name, p in problem.parameters.items():
        parts = kept.pop(name)
        factors[name] = nothing(p, problem.batch.n) if name in whole.unused else concatenated(parts)
    return factors, whole, note


def statistics(
    problem: Problem, requests: Iterable[Request], max_bytes: int, run: Run, tried: Callable[[Problem], bool]
) -> Statistics:
    """The quantities of all samples, merged slice by slice; ``tried``: whether a slice's run may be tried again."""
    requests, wrapper = listed(requests), unwrapped(problem.model)[1]
    total = Statistics(requests, problem.parameters, wrapper)
    kinds = {NEEDS[name] for name in total.requests}
    with_sums = "variance" in kinds and "sum" not in kinds  # in between: variances are merged by the means
    if with_sums:
        requests = [*requests, "sum"]
        total = Statistics(requests, problem.parameters, wrapper)
    passes: list[Pass] = []
    paired = "gram" in kinds

    def once(part: Problem, meter: Meter) -> Pass:
        own, final = Statistics(requests, problem.parameters, wrapper), not tried(part)

        @meter.paused()
        def emit(name: str, g: Factors) -> None:
            own.emit(name, g)
            if final and own.settled(name):
                take_in(total, own, name, len(g))

        result, note = run(part, emit, False)
        with meter.paused():
            own.finish(result, note)
            for name in next(iter(own._stored.values())).copy():
                take_in(total, own, name, len(own))
            if own._clipped is not None:
                total._clipped = _summed(total._clipped, own._clipped)
            total._n, total._kinds, total.note = len(total) + len(own), own._kinds, own.note
        passes.append(result)
        return result

    budget = max_bytes // 2 if paired else max_bytes  # of a Gram matrix, the rows of two slices are there at a time
    slices = list(sweep(problem, budget, once))
    whole = joined(slices, passes)
    if paired:
        assert whole.losses is not None
        fill_in(total._stored["gram"], slices, run, whole.losses)
    if with_sums:
        total.forget("sum")
    total.report(whole, ", ".join(filter(None, [total.note, COUPLED if whole.coupled else ""])))
    return total


def take_in(total: Statistics, more: Statistics, name: str, m: int) -> None:
    """Merge the parts of one parameter from ``m`` further samples into the total, in its memory, and drop them; the
    inner products across are left zero.
    """
    n = len(total)
    mine, theirs = total._stored, {kind: parts.pop(name) for kind, parts in more._stored.items()}
    gap = (theirs["sum"] / m).sub_(mine["sum"][name], alpha=1 / n) if n and "variance" in mine else None  # of means
    for kind, part in theirs.items():
        mine[kind][name] = MERGE[kind](mine[kind][name], n, part, m) if n else part.contiguous()
    if gap is not None:
        gap = gap.abs() if gap.is_complex() else gap
        mine["variance"][name].addcmul_(gap, gap, value=n * m / (n + m) ** 2)


def _summed(before: Parts | None, more: Parts) -> Parts:
    return more if before is None else {name: before[name].add_(c) for name, c in more.items()}


def _averaged(a: Tensor, n: int, b: Tensor, m: int) -> Tensor:
    return a.mul_(n / (n + m)).add_(b, alpha=m / (n + m))


def _appended(a: Tensor, n: int, b: Tensor, m: int) -> Tensor:
    return torch.cat([a, b])


def _beside(a: Tensor, n: int, b: Tensor, m: int) -> Tensor:
    found: Tensor = torch.block_diag(a, b)
    return found


def _added(a: Tensor, n: int, b: Tensor, m: int) -> Tensor:
    return a.add_(b)


# How the part of n samples and that of m more become one; for variances, the distance of the means comes on top.
MERGE: dict[str, Callable[[Any, int, Any, int], Any]] = {
    "squares": _appended,
    "dot": _appended,
    "project": _appended,
    "sum": _added,
    "mean_square": _averaged,
    "variance": _averaged,
    "gram": _beside,
}


def fill_in(grams: Parts, slices: Sequence[Slice], run: Run, losses: Tensor) -> None:
    """The inner products of samples in different slices: each slice once more, and all later ones against it."""
    for i, one in enumerate(slices[:-1]):
        kept: dict[str, Factors] = {}
        with one.replayed():
            _check_same(one, losses, run(one.problem, partial(_keep, kept), True)[0])
        for other in slices[i + 1 :]:
            with other.replayed():
                again, _ = run(other.problem, partial(_cross, grams, kept, one.at, other.at), True)
                _check_same(other, losses, again)


def _check_same(part: Slice, losses: Tensor, again: Pass) -> None:
    """Raise for a replay that isn't one: a model with draws or state of its own that can't be put back."""
    before, now = losses[part.at], again.losses
    assert now is not None
    if not torch.allclose(before, now.to(before), rtol=tolerance(before.dtype) / 100, atol=1e-6, equal_nan=True):
        raise RandomnessError(
            "a slice of the batch had other losses when it was run again, as inner products of all samples need: its "
            "random draws (from a generator of the model's own, or in compiled code), or state that is no buffer, "
            "can't be put back. Use a max_bytes= that the whole batch fits in; or engine='hooks' for compiled code."
        )


def _keep(kept: dict[str, Factors], name: str, g: Factors) -> None:
    kept[name] = compact(g)


def _cross(grams: Parts, kept: dict[str, Factors], rows: slice, columns: slice, name: str, g: Factors) -> None:
    grams[name][rows, columns] = block = reductions.gram(kept[name], g)
    grams[name][columns, rows] = block.mT


# ---- slices -----------------------------------------------------------------------------------------------------


def sweep(problem: Problem, max_bytes: int, once: Callable[[Problem, Meter], Pass]) -> Iterator[Slice]:
    """Run ``once`` on slice after slice, all but the first about as large, and as large as ``max_bytes`` allows."""
    n, start, size = problem.batch.n, 0, FIRST
    buffers = Buffers(*problem.owners)
    averaged = Averaged(buffers)
    while start < n:
        at = slice(start, min(n, start + size))
        part = Slice(at, replace(problem, batch=narrowed(problem.batch, at)), buffers, random_state(problem.model))
        buffers.restore()
        meter = Meter()
        with nullcontext() if start else meter, numbered_as(range(at.start, at.stop)):
            result = once(part.problem, meter)
        averaged.take(at.stop - at.start)
        if result.coupled and at.stop - at.start < n:
            raise BatchCoupledError(
                "max_bytes= would run the batch in slices, but its samples depend on each other, and a slice would be "
                "another function of its samples. Leave max_bytes out."
            )
        yield part
        if not start:
            most = max(1, max_bytes * (at.stop - start) // max(1, meter.most))
            size = -(-(n - at.stop) // max(1, -(-(n - at.stop) // most)))
        start = at.stop
    averaged.leave()


def narrowed(batch: Batch, at: slice) -> Batch:
    """The samples of a slice, as views."""
    start, n = at.start, at.stop - at.start
    return Batch(n, batch.inputs.narrow(start, n), batch.targets.narrow(start, n), batch.output_dim)


def joined(slices: Sequence[Slice], passes: Sequence[Pass]) -> Pass:
    """Losses and outputs of all samples; unused is what no slice uses."""
    losses = [p.losses for p in passes if p.losses is not None]
    unused = tuple(name for name in passes[0].unused if all(name in p.unused for p in passes))
    coupled = any(p.coupled for p in passes)  # of one slice that is the batch
    if len(passes) > 1 and not slices[0].problem.batch.joinable([p.outputs for p in passes]):
        return Pass(torch.cat(losses), None, unused, coupled)
    trees = [s.problem.batch.outputs(p.outputs) for s, p in zip(slices, passes, strict=True)]
    axes = [column[0] if len({*column}) == 1 else None for column in zip(*(t.axes for t in trees), strict=True)]
    columns = zip(axes, zip(*(t.leaves for t in trees), strict=True), strict=True)
    leaves = [cat(column, axis) for axis, column in columns]
    return Pass(torch.cat(losses), unflatten(leaves, flatten(passes[0].outputs)[1]), unused, coupled)


def concatenated(parts: Sequence[Factors]) -> Factors:
    """The rows of one after the other, in their common form, or as `Dense`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    pulled = [g for g in parts if isinstance(g, Pulled)]
    if len(pulled) == len(parts) and all(same_back(g.back, pulled[0].back) for g in pulled):
        return replace(pulled[0], rows=concatenated([g.rows for g in pulled]))
    values = [{f.name: getattr(g, f.name) for f in fields(g)} for g in parts]
    if all(type(g) is type(first) and _alike(v, values[0]) for g, v in zip(parts, values, strict=True)):
        held = [name for name, x in values[0].items() if isinstance(x, Tensor)]
        joined: dict[str, Any] = {name: torch.cat([v[name] for v in values]) for name in held}
        return replace(first, **joined)
    kind = functools.reduce(torch.promote_types, map(dtype, parts))
    rows = fresh(tensors(first)[-1], sum(map(len, parts)), *first.shape, dtype=kind)
    for g, part in zip(parts, rows.split([len(g) for g in parts]), strict=True):
        dense(g, out=part)
    return Dense(rows)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[k].shape[1:] == x.shape[1:] if isinstance(x, Tensor) else a[k] == x for k, x in b.items())
