"""hvp, ggn, fisher and empirical_fisher as operators on flat vectors, and the Hessian of every sample's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..api import gradients
from ..arguments import check_samples, one_of
from ..batch import Tree
from ..errors import LossError
from ..losses import LossFunction
from ..problem import Selection, pose
from ..remembered import lasting
from ..state import restored, seed_of
from ..telling import telling
from ..verify import with_own_inputs
from .likelihood import Likelihood, identify, wide
from .objective import Objective
from .operator import Operator, flatten, unflatten
from .products import Middle, Tensors, gradient, hessian, loss_curvature, operator, pinned, sandwich, set_to


def hvp(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
) -> Operator:  # fmt: skip
    """The Hessian of the batch loss, ``c sum_n d2 l_n / dtheta2``, ``[D, D]``.

    Args:
        model, loss_fn, inputs, targets, params, batch_dim: as for `persample.gradients`.  The model runs in its own
            mode, on the whole batch.  Buffers, ``.grad`` and the random state stay as they are.
        reduction: ``c`` is ``1/N`` for "mean", 1 for "sum" (``l_n`` is the unscaled loss of sample ``n``).

    Cost: one forward and backward pass for a product, and about two backward passes for each of its columns.
    """
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    return operator(f"Hessian ({reduction})", objective, hessian(objective))


def ggn(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
) -> Operator:  # fmt: skip
    """The generalised Gauss-Newton matrix ``c sum_n J_n^T H_n J_n``, ``[D, D]``, for any twice differentiable loss.

    ``J_n = df_n/dtheta`` of the outputs, ``H_n = d2 l_n/df_n2`` the exact Hessian of the loss (Schraudolph 2002).  It
    is positive semi-definite where the losses are convex in the outputs.  Arguments and scale as in `hvp`.

    Raises:
        LossError: if ``loss_fn`` depends on parameters other than through the outputs (penalties).
        VerificationError: from a product, if the backward pass is not linear, or autograd can't follow it (hooks).

    Cost: one forward and backward pass for a product, and about three backward passes for each of its columns.
    """
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    return operator(f"Gauss-Newton ({reduction})", objective, sandwich(objective, loss_curvature(objective)))


@telling
def fisher(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    type: str = "exact", samples: int = 1, generator: torch.Generator | None = None,
    params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
) -> Operator:  # fmt: skip
    """The Fisher information ``c sum_n J_n^T E[u_n u_n^T] J_n``, ``[D, D]``, targets distributed as the model says.

    Args:
        type: "exact", the expectation, which is the Gauss-Newton matrix; or "mc", the mean over ``samples`` targets
            drawn per sample when the operator is made (unbiased; the same for all its products).
        samples: number of draws for "mc".
        generator: its next draw seeds those of "mc"; without it, that of the global generator.
        model, loss_fn, inputs, targets, params, batch_dim, reduction: as in `hvp`.

    ``u_n`` is the gradient of loss ``n`` with respect to the outputs at a sampled target.  The loss must be a negative
    log-likelihood, up to its scale: cross entropy, squared error, binary cross entropy with logits, recognised by
    their curvature and normalised so that ``E[u_n u_n^T] = H_n`` (`persample.curvature.likelihood`).

    Raises:
        LossError: for another loss, or a model that doesn't return one tensor.
    """
    one_of("type", type, ("exact", "mc"))
    check_samples(samples)
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    likelihood = likelihood_of(objective)
    title = f"Fisher ({type}, {likelihood.family}, {reduction})"
    if type == "exact":
        return operator(title, objective, sandwich(objective, loss_curvature(objective)))
    draws = likelihood.draws(samples, seed_of(generator))

    def middle(outputs: object) -> tuple[Tensors, Middle]:
        end, axis = single_output(objective, outputs)

        def multiply(v: Tensors) -> Tensors:
            pushed = v[0].movedim(axis, 0)
            along = (draws * pushed).reshape(*draws.shape[:2], -1).sum(2) / samples
            return [torch.einsum("sn,sn...->n...", along, draws).movedim(0, axis)]

        return [end], multiply

    return operator(title, objective, sandwich(objective, middle))


def empirical_fisher(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    method: str = "autograd", params: Selection = None, batch_dim: Any = 0, reduction: str = "mean",
) -> Operator:  # fmt: skip
    """``c sum_n g_n g_n^T``, ``[D, D]``: ``g_n`` is the gradient of the unscaled loss of sample ``n`` at its target.

    Args:
        method: "autograd" differentiates the batch's own loss vector for every product, so that under BatchNorm in
            training mode ``g_n`` is the gradient of the loss as it is, statistics included.  "rows" takes the
            per-sample gradients once (`persample.gradients`, in factors) and multiplies by them: faster from the
            second product on.
        model, loss_fn, inputs, targets, params, batch_dim, reduction: as in `hvp`.

    Note the scale: ``c`` once, not ``c^2``.

    Raises:
        BatchCoupledError: for "rows" where samples are coupled.
        VerificationError: from a product, for "autograd" as in `ggn`.
    """
    one_of("method", method, ("autograd", "rows"))
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    title = f"empirical Fisher ({reduction})"
    if method == "rows":
        return operator(title, objective, _by_rows(objective, batch_dim))

    def middle(outputs: object) -> tuple[Tensors, Middle]:
        return [objective.losses(outputs)], lambda v: v

    return operator(title, objective, sandwich(objective, middle))


def _by_rows(objective: Objective, batch_dim: Any) -> Callable[[Tensor], Tensor]:
    problem = objective.problem
    own = set_to(problem)
    with restored(*problem.owners):
        inputs, targets = with_own_inputs(problem).batch.inputs.whole(), problem.batch.targets.whole()
        rows = gradients(
            problem.model, problem.loss_fn, inputs, targets, params=list(problem.parameters), batch_dim=batch_dim
        )
    shapes = {name: p.shape for name, p in problem.parameters.items()}

    def apply(matrix: Tensor) -> Tensor:
        columns = []
        for column in matrix.T:
            weight = objective.scale * rows.dot(unflatten(column, shapes))
            columns.append(flatten(rows.sum(weight), shapes).to(matrix.dtype))
        return torch.stack(columns, 1) if columns else matrix.clone()

    return pinned(problem, apply, lasting(own, set_to(problem)))


# ---- shared with the Kronecker factors ----------------------------------------------------------------------------


def single_output(objective: Objective, outputs: Any) -> tuple[Tensor, int]:
    """The one tensor that the model returns, under one name or several, and its sample axis."""
    tree = objective.problem.batch.outputs(outputs)
    pairs = zip(tree.leaves, tree.axes, strict=True)
    found = list({id(x): (x, axis) for x, axis in pairs if isinstance(x, Tensor) and x.requires_grad}.values())
    if len(found) != 1 or found[0][1] is None:
        raise LossError(
            f"the model returned {len(found)} differentiable tensors, or none with a sample axis; the distribution of "
            "the targets needs one [N, ...]. Wrap the model so that it returns its logits or predictions, or use ggn."
        )
    return found[0][0], found[0][1]


def hessian_at(objective: Objective, outputs: Any) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """``f -> (v -> H(f) v)``: the Hessian of the summed losses at other outputs, samples first; of half precision, in
    float32.
    """
    tree = objective.problem.batch.outputs(outputs)
    end, axis = single_output(objective, outputs)

    def at(f: Tensor) -> Callable[[Tensor], Tensor]:
        leaf = wide(f.detach()).requires_grad_()
        moved = leaf.movedim(0, axis).clone()  # which loss_fn may change in place
        replaced = Tree([moved if x is end else x for x in tree.leaves], tree.spec, tree.axes).whole()
        try:
            losses = objective.losses(replaced)
        except RuntimeError as error:
            if leaf.dtype is end.dtype:
                raise
            raise LossError(
                f"the Hessian of the losses is computed in float32 where outputs are {end.dtype}, and loss_fn can't "
                f"take such outputs: {error}. Give it weights in float32."
            ) from error
        (slope,) = gradient([losses.sum()], [leaf], None, create_graph=True)
        return lambda v: gradient([slope], [leaf], [v])[0].detach()

    return at


def likelihood_of(objective: Objective) -> Likelihood:
    """The distribution of targets at the model's outputs."""
    with objective.forward() as outputs:
        objective.loss_at(outputs)  # refuses penalties
        end, axis = single_output(objective, outputs)
        return identify(end.detach().movedim(axis, 0), hessian_at(objective, outputs))
