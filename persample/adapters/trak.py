"""TRAK: a gradient computer for ``TRAKer``.

TRAK's features are projected gradients of a *model output function* (for classification the margin ``log p/(1-p)``),
and ``Q`` its derivative of the loss.  ``TRAKer(..., gradient_computer=gradient_computer(output_fn))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import api
from . import needed

OutputFunction = Callable[[Any, Tensor], Tensor]


def margin(outputs: Any, targets: Tensor) -> Tensor:
    """``log p_y - log(1 - p_y)``, ``[N]``: the logit of the correct class against all others (Park et al. 2023, eq.
    9).
    """
    logits = getattr(outputs, "logits", outputs)
    right = logits.gather(1, targets[:, None]).squeeze(1)
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    value: Tensor = right - others
    return value


def gradient_computer(output_fn: OutputFunction = margin, **options: Any) -> type:
    """A class for TRAK's ``gradient_computer=``: per-sample gradients of ``output_fn(outputs, targets)`` by persample.

    Batches are ``(*inputs, targets)``.  The loss derivative ``compute_loss_grad`` is the task's own.  ``options``
    (``engine=``, ``params=``, ...) go to `persample.gradients`.
    """
    base = needed("trak.gradient_computers", "traker").AbstractGradientComputer

    class GradientComputer(base):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            model: nn.Module,
            task: Any,
            grad_dim: int | None = None,
            dtype: Any = None,
            device: Any = None,
            **_: Any,
        ) -> None:
            super().__init__(model, task, grad_dim, dtype, device)
            self.load_model_params(model)

        def load_model_params(self, model: nn.Module) -> None:
            self.model = model

        def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
            *inputs, targets = batch
            rows: dict[str, Tensor] = api.gradients(self.model, output_fn, tuple(inputs), targets, **options).dense()
            return rows

        def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
            weights, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
            grads: Tensor = self.modelout_fn.get_out_to_loss_grad(self.model, weights, buffers, batch)
            return grads

    return GradientComputer
