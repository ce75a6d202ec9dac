"""Lightning: a callback that logs gradient noise scale and per-sample norms, through `persample.extend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import warn
from . import needed
from ._log import GradientLog


def callback(module: Callable[[Any], nn.Module] = lambda pl_module: pl_module, **options: Any) -> Any:
    """``Trainer(callbacks=[callback()])``: logs ``gradient_noise_scale`` and norms at every training batch.

    ``module`` picks the part of the ``LightningModule`` whose *forward* sees the batch: itself where
    ``training_step`` calls ``self(x)``, else for example ``lambda m: m.net``; where nothing of it was recorded, a
    warning says so.  The loss is taken for a mean (``reduction="sum"``: a sum), and what the trainer divides it by for
    accumulation, and scales it by for mixed precision, is undone; not so for a ``reduction=`` that is a number or a
    function, which says all that the loss is.
    """
    base = needed("pytorch_lightning", "pytorch-lightning").Callback

    class GradientStatistics(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.gradients = GradientLog(**options)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.gradients.factor = lambda: _divisor(trainer)
            self.gradients.start(module(pl_module))
            self.told = False

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.gradients.norms = {}  # a batch that is skipped has none

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            figures = self.gradients.figures()
            skipped = outputs is None or (isinstance(outputs, dict) and not outputs)
            silent = not figures and not skipped
            if silent and not self.told:
                warn(
                    "persample's callback has seen no backward of the module: only what runs in its forward is "
                    "recorded. Give the part that training_step calls: callback(lambda m: m.net)."
                )
            self.told = self.told or silent or bool(figures)
            pl_module.log_dict(figures)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.gradients.stop()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.gradients.stop()

    return GradientStatistics()


def _divisor(trainer: Any) -> float:
    """What the trainer has divided the loss by."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(trainer.accumulate_grad_batches / (1.0 if scaler is None else scaler.get_scale()))
