"""Opacus: fill ``p.grad_sample`` for its ``DPOptimizer``.

Opacus keeps per-sample gradients ``[N, *P]``, of unscaled losses, on the parameters.  Its optimizer clips, sums, adds
noise and divides by ``expected_batch_size``; with persample there is no ``GradSampleModule``, and no hook on the
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, QuantityError
from ..gradients import Gradients
from ..optim.clipped import check_independent


def fill_grad_sample(G: Gradients | Sequence[Gradients], model: nn.Module) -> None:
    """Set ``p.grad_sample = G[name]``, ``[N, *P]``, on the parameters of ``model`` that require grad.

    It writes ``[N, D]`` numbers.  Raises `QuantityError` where a parameter that requires grad has no rows: the
    optimizer would leave it out of the norms that it clips; and for rows of another model's parameters;
    `BatchCoupledError` for rows of a batch whose samples are coupled.  Before ``optimizer.zero_grad()``, rows are put
    behind those of the call before: one batch in pieces, of which ``expected_batch_size`` is the size.  A list is such
    a batch, and the empty list an empty one, on which the optimizer steps along noise.  Privacy accounting and Poisson
    sampling remain the user's.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one, the original: gradients have its names
    pieces = list(G) if isinstance(G, Sequence) else [G]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for piece in pieces:
        if not isinstance(piece, Gradients):
            raise ArgumentError(
                "fill_grad_sample takes the result of persample.gradients(...) without quantities=, or a list of such "
                f"results, got {'' if piece is G else 'a list with '}{type(piece).__name__}."
            )
        check_independent(piece)
        _check_rows(piece, trained)
    if any(getattr(getattr(p, "grad_sample", None), "_processed", False) for p in model.parameters()):
        raise QuantityError("the optimizer has taken its step with the rows that are there: zero_grad() comes first.")
    for name, p in trained.items():
        before = getattr(p, "grad_sample", None)
        if before is not None and not getattr(before, "_persample", False):
            raise QuantityError(
                f"'{name}' has rows in .grad_sample already that are not from here: a GradSampleModule (PrivacyEngine."
                "make_private) takes its own in every backward, persample's too, and each sample would count twice. "
                "Take its hooks off (model.remove_hooks(), or make_private(..., grad_sample_mode='no_op')) and call "
                "optimizer.zero_grad(), or zero_grad() between gradients(...) and fill_grad_sample."
            )
    for name, p in trained.items():
        before = getattr(p, "grad_sample", None)
        rows = [piece[name] for piece in pieces]
        if before is None and len(rows) == 1:
            # as they are, without a copy; marks of Opacus are not for G, and AdaClipDPOptimizer takes views
            filled = rows[0].detach().contiguous()
        else:
            first = p.detach().new_zeros(0, *p.shape) if before is None else before
            filled = torch.cat([first, *rows])
        filled._persample = True  # type: ignore[attr-defined]
        p.grad_sample = filled  # type: ignore[union-attr]


def _check_rows(G: Gradients, trained: Mapping[str, Tensor]) -> None:
    """Raise unless there are rows of all these parameters."""
    if missing := [name for name in trained if name not in G]:
        raise QuantityError(
            f"parameter '{missing[0]}' requires grad, but has no rows in {G!r}: clipping needs all of them."
        )
    for name, p in trained.items():
        if G._parameters.get(name, p) is not p:
            raise QuantityError(f"{G!r} has rows of another model's '{name}'; give the model that they were taken of.")
