"""`gradients`: the front door."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from . import microbatch
from .engines import ENGINES, check_engine, compiled, hooks
from .engines import vmap as vmap_engine
from .errors import ArgumentError, noted, warn
from .gradients import Sink
from .losses import LossFunction
from .problem import Emit, Pass, Problem, Selection, pose
from .remembered import recall, remember
from .state import restored, seed_of, seeded, taking_turns, undone_on_error
from .statistics_run import Request
from .telling import telling
from .verify import check_alone, chosen, run_verified


@taking_turns
@telling
def gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    engine: str = "hooks",
    params: Selection = None,
    batch_dim: Any = 0,
    coupled: str | None = None,
    quantities: Iterable[Request] | None = None,
    max_bytes: int | None = None,
    verify: bool | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Per-sample gradients ``G [N, D]``: row ``n`` is the gradient of the *unscaled* loss of sample ``n``.

    The loss of sample ``n`` is what ``loss_fn(outputs, targets)`` says of that sample alone: an ``[N]`` result is
    taken as it is, a scalar criterion (most ``nn.*Loss()``) is applied to batches of one.  Class weights then cancel
    in a mean over one sample, and there is no ``1/N``.

    Args:
        model: any module; its ``.grad``, buffers beyond an ordinary forward pass, and hooks stay as they are.  A call
            that raises leaves buffers (running statistics) and random state as they were.
        loss_fn: ``loss_fn(outputs, targets) ->`` ``[N]`` or a scalar.
        inputs: a tensor, a tuple of positional arguments, or a dict of arguments by name (all of them, also those
            that could be positional: ``{"x": x, "scale": scale}``); nested as you like.
        targets: as ``inputs``, or ``None``; passed to ``loss_fn``.
        engine: ``"hooks"`` (one forward and backward pass, any model), ``"vmap"`` (``torch.func``), ``"compiled"``
            (the same by ``torch.compile``), ``"loop"`` (one sample at a time: the definition).
        params: which parameters: a regular expression for the beginning of a name (``re.match``: ``"encoder"``,
            ``r".*\.weight"``, no shell pattern ``"*.weight"``), names, or a predicate ``(name, parameter)``; all that
            require grad by default.
        batch_dim: where the samples are: an int for all tensors, or ``(inputs, targets[, outputs])`` with an int,
            ``None`` (shared) or a pytree each; ``list``: a list has an entry for each sample (of several sizes),
            tensors have them in front.
        coupled: for models whose batch is coupled (BatchNorm in training mode), which of five notions to return:
            ``"eval"``, ``"frozen"``, ``"copy"``,
            ``"loss"`` or ``"influence"``; see `persample.coupling`.
        quantities: names of `Gradients` methods or ``(name, options)`` pairs; the run then reduces on arrival and
            returns `Statistics`.
        max_bytes: a bound for the memory of a pass, beyond the model, the result, the blocks in which reductions
            stream, and a row and a gradient where one is verified: the batch is run in slices of as many samples as
            fit, at least one.  Results don't depend on it, but for random draws (dropout), which are other ones in
            slices, and, with ``verify=False``, for samples that act on each other where no call shows it, which they
            then do within slices.
            A Gram matrix in ``S`` slices costs about ``(S + 3) / 2`` passes, everything else one.
        verify: run one sample alone and compare; by default at the first call for a model, shapes, mode and engine, and
            at every call in which numbers of the whole batch act on single samples; where samples were picked by
            values of the batch (masks, packed sequences, routes), or Python read counts or tests of it, in the first
            eight batches and every eighth.  Costs about one sample, where numbers of the batch act more (see
            docs/limits.md).
        generator: its next draw seeds the forward pass (dropout), which leaves the global random state as it was.

    Returns:
        `Gradients`, or `Statistics` with ``quantities=``.

    Raises:
        ArgumentError, LossError, SampleAxisError, EmptyBatchError, UnknownParameterError: what was given doesn't fit.
        BatchCoupledError: samples depend on each other, and ``coupled`` doesn't say which notion is meant.
        CaptureError, InplaceError, HigherOrderError, RandomnessError, VerificationError: the engine can't serve
            this model, and says why.
    """
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    check_engine(engine)
    plain = " BatchNorm layers after .eval() are the same function, without coupled=." if coupled == "eval" else ""
    if coupled is not None and engine != "hooks":
        raise ArgumentError(
            f"coupled={coupled!r} needs engine='hooks': {engine!r} runs samples alone, which is another function."
            + plain
        )
    if max_bytes is not None:
        if not isinstance(max_bytes, Real) or not max_bytes >= 1:
            raise ArgumentError(f"max_bytes must be a positive number of bytes, got {max_bytes!r}.")
        if coupled is not None:
            raise ArgumentError(
                f"coupled={coupled!r} is about a whole batch, which max_bytes={max_bytes} would run in slices: leave "
                f"one of the two out, or give a smaller batch.{plain}"
            )
        max_bytes = int(min(max_bytes, sys.maxsize))
    if verify not in (None, True, False):
        raise ArgumentError(f"verify must be True, False or None (at the first call), got {verify!r}.")

    begun: set[int] = set()  # sizes of slices: one of each is verified once more, in place of all of this call

    def sliced(part: Problem, emit: Emit, replay: bool) -> tuple[Pass, str]:
        later = part.batch.n in begun
        begun.add(part.batch.n)
        return _verified(part, engine, emit, False if replay else verify, later=later)

    def tried(part: Problem) -> bool:
        if verify is False or coupled is not None:
            return False
        known = recall(part, engine)
        return verify is True or known is None or (known.ragged and part.batch.n not in begun)

    with _drawing(generator), undone_on_error(*problem.owners):
        slices = noted(f"max_bytes={max_bytes} runs the batch in slices of as many samples as fit, at least one.")
        if quantities is not None and max_bytes is not None:
            with slices:
                return microbatch.statistics(problem, quantities, max_bytes, sliced, tried)
        sink = Sink(problem.model, problem.parameters, problem.aliases, quantities)
        if engine == "hooks" and max_bytes is not None:
            with slices:
                sink.kept, run, note = microbatch.rows(problem, max_bytes, sliced)
        else:
            run, note = _verified(problem, engine, sink.emit, verify, max_bytes=max_bytes, coupled=coupled)
        if len(run.unused) == len(problem.parameters):
            warn("no loss depends on any of the parameters, so all rows are zeros: are outputs detached, or rounded?")
        return sink.result(run, note)


def _verified(
    problem: Problem,
    engine: str,
    emit: Emit,
    verify: bool | None,
    max_bytes: int | None = None,
    coupled: str | None = None,
    later: bool = False,
) -> tuple[Pass, str]:
    """Run the engine; at the first call of its kind, hold one row against the definition.  ``later``: a further slice
    of a batch of which one as large was.
    """
    if coupled is not None:
        from .batchnorm.notions import coupled_pass

        return coupled_pass(problem, coupled, emit, verify)

    alone = f"engine={engine!r} runs every sample alone, as a batch of one."

    def run(emit: Emit, couplers: tuple[int, ...]) -> Pass:
        if engine == "hooks":
            return hooks(problem, emit, couplers=couplers)
        with noted(alone):
            if engine in ("vmap", "compiled"):
                return (vmap_engine if engine == "vmap" else compiled)(problem, emit, max_bytes=max_bytes)
            return ENGINES[engine](problem, emit)

    known = recall(problem, engine)
    due = verify is None and known is not None and not later and known.due()  # another batch may lie otherwise
    if verify is False or (verify is None and known is not None and not due):
        result = run(emit, known.couplers if known is not None else ())
        acts = (
            result.totals
            or result.hidden
            or ((result.ragged or result.read) and known is not None and not known.ragged)
        )
        if verify is False:
            result = replace(result, coupled=result.coupled or result.totals)
        elif engine == "hooks" and known is not None and (acts or result.called not in known.called):
            with restored(*problem.owners):
                held, _ = run_verified(
                    problem, engine, lambda *_: None, run, chosen(problem.batch.n, 0, problem.batch.sizes)
                )
            result = replace(result, coupled=result.coupled or held.coupled)
        return result, "verify=False" if verify is False else ""
    n = chosen(problem.batch.n, known.calls if known is not None and due else 0, problem.batch.sizes)
    if engine != "hooks":
        with noted(alone):
            check_alone(problem, *{n, (n + 1) % problem.batch.n})  # one of them may attain a maximum, say
    if engine == "loop":  # the definition
        remember(problem, engine)
        return run(emit, ()), ""
    return run_verified(problem, engine, emit, run, n)


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Random draws inside come from the generator's next draw; outside, nothing was drawn."""
    if generator is None:
        yield
        return
    with seeded(seed_of(generator, 2**31)):
        yield
