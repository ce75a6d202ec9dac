"""Second derivatives of every sample's own loss: one sample at a time, vectorised where ``torch.func`` can follow.

The vectorised form is ``vmap`` *outside* of reverse over reverse.  (Reverse over forward, and a reverse through a
vmapped reverse as in ``torch.func.hessian``, give wrong numbers for normalisation layers in torch 2.13.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.func import vmap as vectorise

from ..arguments import one_of
from ..batch import call_model, taken_apart
from ..errors import CaptureError, DirectionError, PersampleError, RandomnessError
from ..losses import LossFunction, is_per_sample, lone_losses, warn_if_not_mean
from ..problem import Problem, Selection, pose
from ..remembered import remember, verified
from ..state import drawn_since, random_state, restored, swapped
from ..telling import numbered_as, telling
from ..verify import check_alone, with_own_inputs
from ..watch import Watch
from .objective import Objective, Start, named_derivatives, refuse_once_differentiable, twice_differentiable
from .operator import check_real, flatten, unflatten
from .products import hessian

ENGINES = ("auto", "vmap", "loop")


@telling
def per_sample_hvp(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None,
    v: Tensor | Mapping[str, Tensor] | None = None, *,
    engine: str = "auto", params: Selection = None, batch_dim: Any = 0,
) -> Tensor:  # fmt: skip
    """``H_n v`` for every sample, ``[N, D]``, with ``H_n = d2 l_n / dtheta2`` of its unscaled loss.

    Args:
        model, loss_fn, inputs, targets, params, batch_dim: as for `persample.gradients`.
        v: the direction, ``[D]`` or ``{name: [*P]}``.
        engine: "vmap", "loop" (one sample after the other), or "auto": the loop where ``torch.func`` can't follow.

    The mean over ``n`` is `hvp` times ``v``.  Where every target is ignored, a row is zero.

    Raises:
        BatchCoupledError: if samples are coupled (BatchNorm in training mode): `hvp` of the batch loss stays exact.
            Two samples alone are held against their losses in the batch, at the first call for a model and shapes.
        LossError: if outputs are broadcast with targets of other samples.
        RandomnessError: if the model draws random numbers (dropout): a lone sample would get another mask.
        DirectionError: if ``v`` doesn't have the entries of the parameters.

    Cost: a double backward of the batch as ``torch.func.vmap`` runs it (convolutions are slow there), and the memory of
    ``[N, D]``.
    """
    one_of("engine", engine, ENGINES)
    problem = pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim)
    direction = _direction(problem, v)
    with restored(*problem.owners), twice_differentiable():
        _check_repeatable(problem)
        _check_uncoupled(problem)
        if engine == "loop":
            return _by_loop(problem, direction)
        try:
            return _by_vmap(problem, direction)
        except RuntimeError as error:
            ours = isinstance(error, PersampleError)
            if engine == "auto" and (not ours or isinstance(error, CaptureError)):
                return _by_loop(problem, direction)
            if ours:
                raise
            raise CaptureError(f"torch.func can't follow this model: {error}\nUse engine='loop'.") from error


def _direction(problem: Problem, v: Tensor | Mapping[str, Tensor] | None) -> Tensor:
    shapes = {name: p.shape for name, p in problem.parameters.items()}
    size = sum(shape.numel() for shape in shapes.values())
    if isinstance(v, Mapping):
        v = flatten(v, shapes)
    if not isinstance(v, Tensor) or v.shape != (size,):
        got = tuple(v.shape) if isinstance(v, Tensor) else repr(v)
        raise DirectionError(f"v must be a direction [{size}] or one tensor per parameter, got {got}")
    kind = reduce(torch.promote_types, (p.dtype for p in problem.parameters.values()))
    check_real(v, kind)
    return v.detach().to(kind)  # products have its type: integers would cut them off


def _check_repeatable(problem: Problem) -> None:
    """Run one sample alone: a batch draws other random numbers, and statistics over it are other ones.  There is a
    graph of it, which says what ``torch.func`` doesn't: which functions can be differentiated once only.
    """
    alone = problem.batch.select(torch.tensor([0], device="cpu"))
    with Watch(), torch.enable_grad():  # some models differentiate themselves
        before = random_state(problem.model)
        outputs = call_model(problem.model, alone.inputs.whole())
        drawn = drawn_since(before, problem.model)
    if drawn:
        raise RandomnessError(
            "the model draws random numbers (dropout), and a sample alone would get others than in its batch. Switch "
            "the draws off (model.eval()), or use hvp, which keeps one draw for the whole batch."
        )
    with torch.enable_grad():
        loss = problem.loss_fn(outputs, alone.targets.whole())
    refuse_once_differentiable([loss], list(problem.parameters.values()))


def _check_uncoupled(problem: Problem) -> None:
    """Samples have the same losses alone as in their batch.  Two of them: one may attain a maximum over all samples."""
    if not verified(problem, "per_sample_hvp"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the criterion, which is said below
            for n in sorted({0, problem.batch.n - 1}):
                check_alone(problem, n)
        _warn_if_not_mean(problem)
        remember(problem, "per_sample_hvp")


def _warn_if_not_mean(problem: Problem) -> None:
    """Say where the mean of the products is no product of the batch's own criterion."""
    batch, loss_fn = problem.batch, problem.loss_fn
    with torch.enable_grad():  # some models differentiate themselves
        outputs = batch.outputs(call_model(problem.model, with_own_inputs(problem).batch.inputs.whole()))
        whole = loss_fn(outputs.whole(), batch.targets.whole())
        if not is_per_sample(whole, batch.n):
            losses = lone_losses(loss_fn, outputs, batch.targets, batch.n)
            warn_if_not_mean(loss_fn, whole, losses, outputs, batch.targets)


def _by_loop(problem: Problem, direction: Tensor) -> Tensor:
    rows = []
    for n in range(problem.batch.n):
        alone = replace(problem, batch=problem.batch.select(torch.tensor([n], device="cpu")))
        objective = Objective(alone, "sum", Start.now(problem.model))
        with numbered_as([n]):
            rows.append(hessian(objective)(direction[:, None]).squeeze(1))
    return torch.stack(rows)


def _by_vmap(problem: Problem, direction: Tensor) -> Tensor:
    batch, model = problem.batch, problem.model
    values = {name: p.detach() for name, p in problem.parameters.items()}
    fixed = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()] if name not in values}
    along = unflatten(direction, {name: p.shape for name, p in values.items()})

    def one(pieces: list[list[Tensor]]) -> dict[str, Tensor]:
        inputs, targets = batch.inputs.one(pieces[0]), batch.targets.one(pieces[1])

        def loss(values: dict[str, Tensor]) -> Tensor:
            with swapped(model, {**fixed, **values}):
                return problem.loss_fn(call_model(model, inputs), targets).reshape(())

        def slope(values: dict[str, Tensor]) -> Tensor:
            return torch.stack([(g * along[name].to(g.dtype)).sum() for name, g in grad(loss)(values).items()]).sum()

        products: dict[str, Tensor] = grad(slope)(values)
        return products

    samples, dims = taken_apart(batch.inputs, batch.targets)
    samples = [[x.detach() for x in own] for own in samples]
    with Watch({id(p): name for name, p in problem.parameters.items()}), named_derivatives():
        rows = vectorise(one, in_dims=(dims,), randomness="error")(samples)
    flat = torch.cat([rows[name].reshape(batch.n, -1) for name in values], 1)
    return flat if bool(flat.isfinite().all()) else _by_loop(problem, direction)  # ignored targets: 0 / 0
