"""The diagonal of the Gauss-Newton (Fisher) matrix, from the factors of per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..errors import ArgumentError
from ..factors import Factors, dense
from ..losses import LossFunction
from ..problem import Selection, pose
from ..reductions import square_sum
from ..telling import telling
from .columns import passes
from .likelihood import wide
from .objective import Objective


@telling
def ggn_diagonal(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    type: str = "exact", samples: int = 1, generator: torch.Generator | None = None, per_sample: bool = False,
    params: Selection = None, batch_dim: Any = 0, reduction: str = "mean", verify: bool | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """``diag(c sum_n J_n^T H_n J_n)``, ``{name: [*P]}``: the diagonal of `ggn`, never negative.

    With ``S_n S_n^T = H_n`` a square root of the Hessian of loss ``n`` in the outputs, it is ``c sum_nj (J_n^T
    s_nj)^2``: the squares of as many rows as ``S_n`` has columns, of any model and parameter that
    `persample.gradients` serves (Dangel et al. 2020, BackPACK's DiagGGNExact and DiagGGNMC).  Where the loss is a
    negative log-likelihood, it is the diagonal of the Fisher information, too.

    Args:
        type: "exact"; or "mc", where ``samples`` targets drawn from the model (see `fisher`) take the place of ``H_n``:
            unbiased, a backward pass each.
        samples, generator: for "mc", how many targets are drawn, and from where.
        per_sample: ``{name: [N, *P]}``, the diagonal of ``J_n^T H_n J_n`` for every sample, without ``c``; their sum
            times ``c`` is the result without it.
        verify: as in `kfac`.
        model, loss_fn, inputs, targets, params, batch_dim, reduction: as in `hvp`.

    Results of half precision are float32.  For targets as they are (the empirical Fisher), take ``N c`` times
    `Gradients.second_moment`; for coupled batches, ``ggn_diagonal`` of `persample.coupling`.

    Raises:
        BatchCoupledError: if samples depend on each other through the chosen parameters.
        LossError: for "mc" without a known likelihood; for "exact" if a loss is not convex in the outputs; for models
            that don't return one tensor.
        ArgumentError: for complex parameters.

    Cost: one forward pass and, for each column (up to as many as a sample has output entries ``F``; one for each draw),
    one backward pass and the second moment of its rows.  "exact" forms the loss Hessians ``[N, F, F]``.
    """
    one_of("type", type, ("exact", "mc"))
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params, batch_dim=batch_dim), reduction)
    check_real(objective.parameters)
    n, wider = objective.problem.batch.n, partial(torch.promote_types, torch.float32)
    found = {
        name: torch.zeros((n, *p.shape) if per_sample else p.shape, dtype=wider(p.dtype), device=p.device)
        for name, p in objective.parameters.items()
    }

    def emit(name: str, g: Factors) -> None:
        if per_sample:
            rows = wide(dense(g))
            found[name].addcmul_(rows, rows)
        else:
            found[name].add_(square_sum(g), alpha=objective.scale)

    with passes(objective, type, samples, generator, verify) as run:
        run.sweep(objective.parameters, emit)
    return found


def check_real(parameters: Mapping[str, Tensor]) -> None:
    """Raise for complex parameters, of which there is no such diagonal."""
    if odd := [name for name, p in parameters.items() if p.is_complex()]:
        raise ArgumentError(
            f"parameter '{odd[0]}' is complex: the Gauss-Newton matrix mixes its real and imaginary parts, and has no "
            "diagonal in complex numbers. Hold it as a real one (torch.view_as_complex inside the model)."
        )
