"""The vmap engine: ``torch.func``, the model on single samples, vectorised over the batch, a chunk at a time.

It returns `Dense` rows, and the losses and outputs of the same pass.  Random draws are each sample's own
(``randomness="different"``) and belong to those losses.  It needs a model that ``torch.func`` can follow: no
``.item()``, no in-place change of buffers by samples (BatchNorm in training mode is refused, never replaced by a norm
over single samples).  The model's own buffers are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.func import vmap as vectorise
from torch.utils._pytree import tree_map

from ..batch import Batch, apply, flatten, suspended, taken_apart, unflatten
from ..errors import CaptureError, LossError, PersampleError
from ..factors import Dense
from ..losses import LossFunction, hinted, ignored, is_per_sample
from ..problem import Emit, Pass, Problem, check_no_hooks
from ..state import swapped
from ..watch import Watch
from .loop import one_sample

ROW_BYTES = 1 << 28  # of individual gradients computed at a time, unless the caller says otherwise


def vmap(problem: Problem, emit: Emit, *, max_bytes: int | None = None) -> Pass:
    """One vectorised pass; ``max_bytes`` bounds the rows that are computed at a time."""
    return vectorised(problem, emit, max_bytes, eager)


@dataclass(frozen=True)
class Pieces:
    """What one vectorised call is given; tensors of samples have their sample axis in ``dims``."""

    batch: Batch  # for its structure, and for what all samples share
    values: dict[str, Tensor]  # what is differentiated
    fixed: dict[str, Tensor]  # the other parameters
    buffers: dict[str, Tensor]
    samples: list[list[Tensor]]
    dims: list[list[int]]


Found = tuple[dict[str, Tensor], tuple[Tensor, list[Tensor]]]  # rows, (losses, outputs)
Run = Callable[[Problem, Pieces, list[Any]], Found]


def vectorised(problem: Problem, emit: Emit, max_bytes: int | None, run: Run) -> Pass:
    """The batch by ``run``, as many samples at a time as there is memory for their rows."""
    check_no_hooks(problem.parameters)
    batch, model = problem.batch, problem.model
    values = {name: p.detach() for name, p in problem.parameters.items()}
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in values}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    row = sum(p.numel() * p.element_size() for p in values.values())
    chunks = -(-batch.n // max(1, (max_bytes or ROW_BYTES) // max(1, row)))
    size = -(-batch.n // chunks)  # all but the last are of one size
    found: list[Found] = []
    spec: list[Any] = []
    for start in range(0, batch.n, size):
        part = min(size, batch.n - start)
        samples, dims = taken_apart(*(tree.narrow(start, part) for tree in (batch.inputs, batch.targets)))
        samples = [[x.detach() for x in own] for own in samples]
        spec = []
        with suspended(model):
            found.append(run(problem, Pieces(batch, values, fixed, buffers, samples, dims), spec))
    rows, (losses, outputs) = tree_map(lambda *parts: _cat([x.detach() for x in parts]), *found)
    whole = _joined(spec, outputs)
    bad = None if spec[3] else ignored(problem.loss_fn, losses, batch.outputs(whole), batch.targets)
    for name, value in rows.items():
        emit(name, Dense(value if bad is None else value.masked_fill(bad.view(-1, *[1] * (value.ndim - 1)), 0)))
    return Pass(losses if bad is None else losses.masked_fill(bad, 0), whole, _unused(problem, rows))


def eager(problem: Problem, pieces: Pieces, spec: list[Any]) -> Found:
    """As `rows_of`, watched."""
    try:
        with watching(problem) as watch:
            return rows_of(*problem.owners, pieces, spec, watch)
    except (PersampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        one_sample(
            problem, 0, []
        )  # raises where the real reason is that the batch is coupled, or the model's own error
        raise CaptureError(
            f"torch.func can't follow this model: {error}\nUse engine='hooks' or engine='loop'."
        ) from error


def watching(problem: Problem) -> Watch:
    """Raises where samples alone are another function, or a parameter is used that is not the model's attribute."""
    return Watch({id(p): name for name, p in problem.parameters.items()})


def rows_of(
    model: nn.Module, loss_fn: LossFunction, pieces: Pieces, spec: list[Any], watch: Watch | None = None
) -> Found:
    """Rows, losses and outputs of some samples; ``spec`` is told the structure of the outputs, and whether ``loss_fn``
    returned a loss per sample.
    """

    def one(values: dict[str, Tensor], samples: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        return alone(model, loss_fn, replace(pieces, values=values, samples=samples), spec, watch)

    run = vectorise(grad_and_value(one, has_aux=True), in_dims=(None, pieces.dims), randomness="different")
    return run(pieces.values, pieces.samples)


def alone(
    model: nn.Module, loss_fn: LossFunction, pieces: Pieces, spec: list[Any], watch: Watch | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the outputs of one sample, whose tensors come without their sample axis."""
    batch = pieces.batch
    inputs, targets = batch.inputs.one(pieces.samples[0]), batch.targets.one(pieces.samples[1])
    own = {name: b.clone() for name, b in pieces.buffers.items()}  # the model's are left alone
    tensors = {**pieces.fixed, **own, **pieces.values}
    with swapped(model, tensors):  # around loss_fn too (penalties)
        if watch is not None:
            watch.share(tensors.items())
        outputs = apply(model, inputs)
        with hinted(outputs, targets):
            loss = loss_fn(outputs, targets)
    try:
        each = is_per_sample(loss, 1)
    except LossError as error:
        other = "If engine='hooks' takes it, a function of the model has another shape under torch.func.vmap."
        raise LossError(f"{error} {other}") from None
    leaves, structure = flatten(outputs)
    axes = replace(batch, n=1).outputs(outputs).axes
    spec[:] = [structure, axes, [None if isinstance(x, Tensor) else (x,) for x in leaves], each]
    return loss.reshape(()), [x for x in leaves if isinstance(x, Tensor)]


def first(pieces: Pieces) -> Pieces:
    """The first sample alone."""
    both = zip(pieces.samples, pieces.dims, strict=True)
    return replace(pieces, samples=[[x.select(a, 0) for x, a in zip(*part, strict=True)] for part in both])


def _unused(problem: Problem, rows: dict[str, Tensor]) -> tuple[str, ...]:
    """torch.func gives zeros for what no loss depends on; whether it is that or a true zero, one sample alone tells."""
    zero = [name for name, value in rows.items() if not any(bool(part.any()) for part in (value[:1], value))]
    if not zero:
        return ()
    grads = one_sample(problem, 0, [problem.parameters[name] for name in zero])[2]
    return tuple(name for name, g in zip(zero, grads, strict=True) if g is None)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(spec: list[Any], outputs: list[Tensor]) -> Any:
    """The outputs of all samples, as the model would return them for the batch."""
    structure, axes, others, _ = spec
    each = iter(outputs)
    joined = []
    for other, axis in zip(others, axes, strict=True):
        if other is not None:
            joined.append(other[0])
            continue
        x = next(each)
        if axis is not None:
            joined.append(x.squeeze(axis + 1).movedim(0, axis))
        else:
            joined.append(x[0] if x.ndim == 1 or bool((x == x[:1]).all()) else x.flatten(0, 1))
    return unflatten(joined, structure)
