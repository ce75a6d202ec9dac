"""The Gauss-Newton (Fisher) matrix of a coupled batch, ``c sum_n J_n^T H_n J_n``, ``J_n = df_n/dtheta`` with the
statistics.

The sum over the outputs of the samples is kept under BatchNorm, and with it matrix-free products and Monte Carlo over
the outputs.  What is lost is the sum over the samples' *inputs*: ``J_n`` depends on all of them, so that there is no
backward pass per layer that gives the diagonal or a block from each sample alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import check_samples
from ..curvature.diagonal import check_real
from ..curvature.matrices import likelihood_of, single_output
from ..curvature.objective import Objective
from ..curvature.operator import Operator, unflatten
from ..curvature.products import loss_curvature, operator, sandwich
from ..state import seed_of
from .network import Network


def ggn(network: Network, reduction: str) -> Operator:
    """``[D, D]``, by products: each about three backward passes."""
    objective = _objective(network, reduction)
    return operator(f"Gauss-Newton ({reduction})", objective, sandwich(objective, loss_curvature(objective)))


def diagonal(
    network: Network, draws: int | None, generator: torch.Generator | None, reduction: str
) -> dict[str, Tensor]:
    """``{name: [*P]}``: exactly, by ``D`` products, or without bias from ``draws`` targets drawn from the model.

    With ``u_n`` the gradient of loss ``n`` with respect to the outputs at a drawn target, ``E[u u^T]`` is the block
    diagonal of all ``H_n`` (draws are independent), so that the square of ``J^T u`` is the diagonal in the mean: one
    backward pass each.
    """
    objective = _objective(network, reduction)
    check_real(objective.parameters)
    if draws is None:
        matrix = ggn(network, reduction)
        return unflatten(matrix.dense().diagonal(), matrix.shapes)
    check_samples(draws, "draws")
    drawn = likelihood_of(objective).draws(draws, seed_of(generator))  # before the pass, which restores random states
    total = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
    with objective.forward() as outputs:
        end, axis = single_output(objective, outputs)
        for u in drawn:
            found = network.point.gradient([end], list(objective.parameters.values()), [u.movedim(0, axis)])
            for square, g in zip(total.values(), found, strict=True):
                if g is not None:
                    square.addcmul_(g, g, value=objective.scale / draws)
    return {name: square.detach() for name, square in total.items()}


def _objective(network: Network, reduction: str) -> Objective:
    """The same point: parameters, batch, random masks."""
    network.point.check()
    return replace(Objective.of(network.problem, reduction), start=network.point.start, silent=[True])
