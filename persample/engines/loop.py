"""The loop engine: the definition.  One sample at a time, as a batch of one, with plain autograd.

It costs N forward and backward passes.  Every sample finds the buffers as they were before the first, and what they
leave is averaged.  Random draws (dropout) belong to each sample's own pass, whose losses and outputs are the ones
reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, call_model, cat, detached, flatten, unflatten
from ..errors import LossError, SampleAxisError
from ..factors import Dense, nothing, strided
from ..losses import hinted, ignored, is_per_sample, unrelated
from ..problem import Emit, Pass, Problem
from ..state import Averaged, Buffers
from ..watch import Watch


def loop(problem: Problem, emit: Emit) -> Pass:
    """N separate backward passes of batches of one."""
    leaves = list(problem.parameters.values())
    rows: dict[str, list[Tensor | None]] = {name: [] for name in problem.parameters}
    losses, outputs, buffers = [], [], Buffers(*problem.owners)
    averaged = Averaged(buffers)
    for n in range(problem.batch.n):
        buffers.restore()
        loss, output, grads = one_sample(problem, n, leaves)
        averaged.take(1)
        losses.append(loss)
        outputs.append(output)
        for column, g in zip(rows.values(), grads, strict=True):
            column.append(g)
    averaged.leave()
    unused = emit_stacked(problem.parameters, rows, emit)
    return Pass(torch.stack(losses), _joined(problem.batch, outputs), unused)


def emit_stacked(parameters: Mapping[str, Tensor], rows: dict[str, list[Tensor | None]], emit: Emit) -> tuple[str, ...]:
    """Emit the rows that single losses have given (``None``: none), and drop them; the names of unused parameters."""
    unused = []
    for name, p in parameters.items():
        given = rows.pop(name)
        if all(g is None for g in given):
            unused.append(name)
            emit(name, nothing(p, len(given)))
        else:
            emit(name, Dense(torch.stack([torch.zeros_like(p) if g is None else strided(g) for g in given])))
    return tuple(unused)


def one_sample(
    problem: Problem, n: int, leaves: list[Any], seed: float = 1.0
) -> tuple[Tensor, Any, tuple[Tensor | None, ...]]:
    """Loss, outputs and gradients of sample ``n`` alone; the latter times ``seed``."""
    batch = problem.batch
    alone = batch.select(torch.tensor([n], device="cpu"))
    with torch.enable_grad():
        inputs = alone.inputs.map(lambda x, _: x.detach())
        with Watch(shared=[*problem.model.named_parameters(), *problem.model.named_buffers()]):
            output = call_model(problem.model, inputs)
        ends = [x for x in flatten(output)[0] if isinstance(x, Tensor) and x.requires_grad]  # some losses take them out
        targets = alone.targets.whole()
        with hinted(output, targets):
            loss = problem.loss_fn(output, targets)
        if isinstance(loss, Tensor) and loss.shape == (batch.n,) and batch.n > 1:
            raise SampleAxisError(
                f"sample {n} alone has {batch.n} losses: the model or loss_fn has the number of samples N = {batch.n} "
                "built in (a constant of that size), so that a sample alone is another function. Take the size from "
                "the inputs; or use engine='hooks' with verify=False for the rows within this batch."
            )
        each = is_per_sample(loss, 1)
        loss = loss.reshape(()) if each else loss
    if loss.ndim:
        raise LossError(f"loss_fn returned shape {tuple(loss.shape)} for one sample alone.")
    bad = None if each else ignored(problem.loss_fn, loss.reshape(1), alone.outputs(output), alone.targets, n)
    if bad is not None or not loss.requires_grad:
        return torch.zeros_like(loss) if bad is not None else loss, detached(output), (None,) * len(leaves)
    # what all samples share (a penalty computed beforehand) is differentiated again for the next
    ends = [] if each else ends
    ends = [*leaves, *ends]
    seeds = torch.full_like(loss, seed)
    found = torch.autograd.grad(loss, ends, seeds, allow_unused=True, retain_graph=True) if leaves else ()
    grads, of_outputs = found[: len(leaves)], found[len(leaves) :]
    if of_outputs and all(g is None for g in of_outputs):
        raise unrelated()
    return loss.detach(), detached(output), tuple(None if g is None else strided(g) for g in grads)


def _joined(batch: Batch, outputs: list[Any]) -> Any:
    """The outputs of single samples put together along their sample axes; what all samples share stays as it is."""
    if len(outputs) > 1 and not batch.joinable(outputs):
        return None
    flat = [flatten(output)[0] for output in outputs]
    spec = flatten(outputs[0])[1]
    axes = batch.select(torch.tensor([0], device="cpu")).outputs(outputs[0]).axes
    joined = []
    for column, axis in zip(zip(*flat, strict=True), axes, strict=True):
        shared = (
            not isinstance(column[0], Tensor)
            or column[0].ndim == 0
            or (axis is None and all(torch.equal(x, column[0]) for x in column))
        )
        joined.append(column[0] if shared else cat(column, axis or 0))
    return unflatten(joined, spec)
