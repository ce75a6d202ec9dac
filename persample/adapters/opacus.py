"""Opacus: fill ``p.grad_sample`` for its ``DPOptimizer``.

Opacus keeps per-sample gradients ``[N, *P]``, of unscaled losses, on the parameters.  Its optimizer clips, sums, adds
noise and divides by ``expected_batch_size``; with persample there is no ``GradSampleModule``, and no hook on the
model.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import QuantityError
from ..gradients import Gradients
from ..optim.clipped import check_independent


def fill_grad_sample(G: Gradients, model: nn.Module) -> None:
    """Set ``p.grad_sample = G[name]``, ``[N, *P]``, on the parameters of ``model`` that require grad.

    It writes ``[N, D]`` numbers.  Raises `QuantityError` where a parameter that requires grad has no rows: the
    optimizer would leave it out of the norms that it clips; and for rows of another model's parameters;
    `BatchCoupledError` for rows of a batch whose samples are coupled.  Before ``optimizer.zero_grad()``, rows are put
    behind those of the call before: one batch in pieces, of which ``expected_batch_size`` is the size.  Privacy
    accounting and Poisson sampling remain the user's.
    """
    check_independent(G)
    model = getattr(model, "_orig_mod", model)  # of a compiled one, the original: gradients have its names
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in G]
    if missing:
        raise QuantityError(
            f"parameter '{missing[0]}' requires grad, but has no rows in {G!r}: clipping needs all of them."
        )
    for name, p in model.named_parameters():
        if p.requires_grad and G._parameters.get(name, p) is not p:
            raise QuantityError(f"{G!r} has rows of another model's '{name}'; give the model that they were taken of.")
    if any(getattr(getattr(p, "grad_sample", None), "_processed", False) for p in model.parameters()):
        raise QuantityError("the optimizer has taken its step with the rows that are there: zero_grad() comes first.")
    for name, p in model.named_parameters():
        if p.requires_grad:
            before = getattr(p, "grad_sample", None)
            p.grad_sample = G[name] if before is None else torch.cat([before, G[name]])  # type: ignore[union-attr]
