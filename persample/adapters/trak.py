"""TRAK: a gradient computer for ``TRAKer``.

TRAK's features are projected gradients of a *model output function* (for classification the margin ``log p/(1-p)``),
and ``Q`` its derivative of the loss.  ``TRAKer(..., gradient_computer=gradient_computer(output_fn))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .. import api
from ..attribution import kernel
from ..errors import ArgumentError
from . import needed

OutputFunction = Callable[[Any, Tensor], Tensor]


def margin(outputs: Any, targets: Tensor) -> Tensor:
    """`persample.attribution.margin`, also of outputs that have ``.logits``."""
    return kernel.margin(getattr(outputs, "logits", outputs), targets)


@contextmanager
def _requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, frozen parameters are not."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def gradient_computer(output_fn: OutputFunction = margin, **options: Any) -> type:
    """A class for TRAK's ``gradient_computer=``: per-sample gradients of ``output_fn(outputs, targets)`` by persample.

    Batches are ``(*inputs, targets)``.  The loss derivative ``compute_loss_grad`` is the task's own.  ``options``
    (``engine=``, ...) go to `persample.gradients`.  Gradients are those of the parameters that ``TRAKer`` counts: of
    all, frozen ones too, or those that its ``grad_wrt=`` names.

    Raises:
        ArgumentError: by the class, for ``params=`` among the options that means other parameters.
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
            grad_wrt: Iterable[str] | None = None,
            **_: Any,
        ) -> None:
            super().__init__(model, task, grad_dim, dtype, device)
            self.grad_wrt = None if grad_wrt is None else set(grad_wrt)
            self.load_model_params(model)

        def load_model_params(self, model: nn.Module) -> None:
            self.model = model

        def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
            *inputs, targets = batch
            counted = {k: p for k, p in self.model.named_parameters() if self.grad_wrt is None or k in self.grad_wrt}
            chosen = {**options, "params": list(counted) if options.get("params") is None else options["params"]}
            with _requiring_grad(counted.values()):
                rows: dict[str, Tensor] = api.gradients(self.model, output_fn, tuple(inputs), targets, **chosen).dense()
            if different := set(rows) ^ set(counted):
                name = min(different)
                does, counts = ("chooses", "doesn't count") if name in rows else ("leaves out", "counts")
                raise ArgumentError(
                    f"params= {does} parameter '{name}', which TRAKer {counts}. Leave params= out, and name those that "
                    "are meant to TRAKer(grad_wrt=[names])."
                )
            return rows

        def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
            weights, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
            grads: Tensor = self.modelout_fn.get_out_to_loss_grad(self.model, weights, buffers, batch)
            return grads

    return GradientComputer
