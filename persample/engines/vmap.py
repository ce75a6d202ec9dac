"""The vmap engine: ``torch.func``, the model on single samples, vectorised over the batch, a chunk at a time.

It returns `Dense` rows, and the losses and outputs of the same pass.  Random draws are each sample's own
(``randomness="different"``) and belong to those losses.  It needs a model that ``torch.func`` can follow: no
``.item()``, no in-place change of buffers (BatchNorm in training mode is refused, never replaced by a norm over
single samples).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.func import vmap as vectorise
from torch.nn.utils.stateless import _reparametrize_module

from ..batch import Batch, call_model, detached, flatten, unflatten
from ..errors import CaptureError, LossError, PersampleError
from ..factors import Dense
from ..losses import ignored, is_per_sample
from ..problem import Emit, Pass, Problem
from ..watch import Watch
from .loop import one_sample

ROW_BYTES = 1 << 28  # of individual gradients computed at a time, unless the caller says otherwise


def vmap(problem: Problem, emit: Emit, *, max_bytes: int | None = None) -> Pass:
    """One vectorised pass; ``max_bytes`` bounds the rows that are computed at a time."""
    batch, model = problem.batch, problem.model
    values = {name: p.detach() for name, p in problem.parameters.items()}
    fixed = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()] if name not in values}
    row = sum(p.numel() * p.element_size() for p in values.values())
    chunk = max(1, (max_bytes or ROW_BYTES) // max(1, row))
    spec: list[Any] = []

    def one(values: dict[str, Tensor], pieces: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        inputs, targets = (
            _alone(tree, given) for tree, given in zip((batch.inputs, batch.targets), pieces, strict=True)
        )
        with _reparametrize_module(
            model, {**fixed, **values}, tie_weights=True, stack_weights=True
        ):  # around loss_fn too (penalties)
            watch.share([*values.values(), *fixed.values()])
            outputs = call_model(model, inputs)
            loss = problem.loss_fn(outputs, targets)
        if not is_per_sample(loss, 1) and loss.ndim:
            raise LossError(f"loss_fn returned shape {tuple(loss.shape)} for one sample alone.")
        leaves, structure = flatten(outputs)
        spec[:] = [structure, Batch(1, batch.inputs, batch.targets, batch.output_dim).outputs(outputs).axes, leaves]
        return loss.reshape(()), [x for x in leaves if isinstance(x, Tensor)]

    trees = [
        [(x, a) for x, a in zip(t.leaves, t.axes, strict=True) if a is not None] for t in (batch.inputs, batch.targets)
    ]
    samples, dims = [[x.detach() for x, _ in tree] for tree in trees], [[a for _, a in tree] for tree in trees]
    run = vectorise(grad_and_value(one, has_aux=True), in_dims=(None, dims), randomness="different", chunk_size=chunk)
    watch = Watch({id(p): name for name, p in problem.parameters.items()})
    try:
        with watch:
            rows, (losses, outputs) = run(values, samples)
    except (PersampleError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        one_sample(problem, 0, [])  # raises where the real reason is that the batch is coupled
        raise CaptureError(
            f"torch.func can't follow this model: {error}\nUse engine='hooks' or engine='loop'."
        ) from error
    losses, rows = losses.detach(), detached(rows)  # the criterion may have parameters of its own
    outputs = detached(_joined(spec, outputs))
    bad = ignored(losses, batch.outputs(outputs), batch.targets)
    for name, value in rows.items():
        emit(name, Dense(value if bad is None else value.masked_fill(bad.view(-1, *[1] * (value.ndim - 1)), 0)))
    return Pass(losses if bad is None else losses.masked_fill(bad, 0), outputs, _unused(problem, rows))


def _unused(problem: Problem, rows: dict[str, Tensor]) -> tuple[str, ...]:
    """torch.func gives zeros for what no loss depends on; whether it is that or a true zero, one sample alone tells."""
    zero = [name for name, value in rows.items() if not bool(value.any())]
    if not zero:
        return ()
    grads = one_sample(problem, 0, [problem.parameters[name] for name in zero])[2]
    return tuple(name for name, g in zip(zero, grads, strict=True) if g is None)


def _alone(tree: Any, given: list[Tensor]) -> Any:
    """One sample as a batch of one."""
    it = iter(given)
    return unflatten(
        [x if a is None else next(it).unsqueeze(a) for x, a in zip(tree.leaves, tree.axes, strict=True)], tree.spec
    )


def _joined(spec: list[Any], outputs: list[Tensor]) -> Any:
    """The outputs of all samples, as the model would return them for the batch."""
    structure, axes, leaves = spec
    it = iter(outputs)
    joined = []
    for leaf, axis in zip(leaves, axes, strict=True):
        if not isinstance(leaf, Tensor):
            joined.append(leaf)
        else:
            x = next(it)
            if axis is not None:
                joined.append(x.squeeze(axis + 1).movedim(0, axis))
            else:
                joined.append(x[0] if x.ndim == 1 or bool((x == x[:1]).all()) else x.flatten(0, 1))
    return unflatten(joined, structure)
