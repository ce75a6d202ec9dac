"""Opacus: fill ``p.grad_sample`` for its ``DPOptimizer``.

Opacus keeps per-sample gradients ``[N, *P]``, of unscaled losses, on the parameters.  Its optimizer clips, sums, adds
noise and divides by ``expected_batch_size``; with persample there is no ``GradSampleModule``, and no hook on the
model.
"""

from __future__ import annotations

from torch import nn

from ..errors import QuantityError
from ..gradients import Gradients


def fill_grad_sample(G: Gradients, model: nn.Module) -> None:
    """Set ``p.grad_sample = G[name]``, ``[N, *P]``, on the parameters of ``model`` that require grad.

    It writes ``[N, D]`` numbers.  Raises `QuantityError` where a parameter that requires grad has no rows: the
    optimizer would leave it out of the norms that it clips.  Privacy accounting, Poisson sampling and refusing
    batch-coupled layers remain the user's; `persample.gradients` has raised for the latter.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in G]
    if missing:
        raise QuantityError(
            f"parameter '{missing[0]}' requires grad, but has no rows in {G!r}: clipping needs all of them."
        )
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad_sample = G[name]  # type: ignore[attr-defined]
