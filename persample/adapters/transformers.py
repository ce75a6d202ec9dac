"""Hugging Face ``Trainer``: a callback that logs gradient noise scale and per-sample norms, through
`persample.extend`.
"""

from __future__ import annotations

from typing import Any

from . import needed
from ._log import GradientLog


def callback(**options: Any) -> Any:
    """``Trainer(..., callbacks=[callback()])``: adds ``gradient_noise_scale`` and norms to what the trainer logs.

    The trainer owns loss and backward; nothing of the training changes.  Its loss is a mean over tokens, so a
    sample's row is N times its share; with gradient accumulation each micro-batch counts as a batch, and what the
    trainer divides its loss by is undone.  ``options`` (``params=``, ``reduction=``, ...) go to `persample.extend`; a
    ``reduction`` that is a number or a function says all factors itself.

    The trainer doesn't tell its callbacks of an exception (Ctrl-C): what listens then stays on the model until this
    callback's next training ends, until ``callback.gradients.stop()``, or, when nothing refers to trainer and
    callback any more, until the next backward.
    """
    base = needed("transformers", "transformers").TrainerCallback

    class GradientStatistics(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.gradients = GradientLog(**options)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.gradients.factor = lambda: float(args.gradient_accumulation_steps)
            self.gradients.start(model)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is not None and "loss" in logs:
                figures = self.gradients.figures()
                logs.update(figures)  # for the callbacks behind this one
                state.log_history[-1].update(figures)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.gradients.stop()

    return GradientStatistics()
