"""What the training callbacks log: gradient noise scale and norms, of whatever backward passes someone else runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import QuantityError
from ..recorder import Recorder, extend
from ..statistics import NoiseScale


class GradientLog:
    """Listens to a model through `persample.extend`, and keeps running figures; training is as without it.

    What listens doesn't keep the log alive: when nothing refers to it any more, the next backward takes the hooks off.
    """

    def __init__(self, decay: float = 0.95, **options: Any) -> None:
        self.noise, self.options = NoiseScale(decay=decay), options
        self.handle: Recorder | None = None
        self.norms: dict[str, float] = {}
        self.factor: Callable[[], float] = lambda: 1.0  # what the trainer has divided a loss by

    def start(self, model: nn.Module) -> None:
        self.stop()
        options = {"reduction": "mean", "quantities": ["norm", "mean"], **self.options}
        log = weakref.ref(self)

        def add(S: Any) -> None:
            if (alive := log()) is not None:
                alive._add(S)
            else:  # only now: a garbage collection may come in the middle of a forward
                handle.remove()

        self.handle = handle = extend(model, on_backward=add, **options)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _add(self, S: Any) -> None:
        if len(S) > 1:
            with contextlib.suppress(QuantityError):  # noise too small to be told: the estimate stays what it was
                self.noise.update(S)
        own = self.options.get("reduction", "mean") not in ("mean", "sum")  # which says all factors
        norm = S.norm().float() * (1.0 if own else self.factor())
        self.norms = {"gradient_norm_median": float(norm.median()), "gradient_norm_max": float(norm.max())}

    def figures(self) -> dict[str, float]:
        """Noise scale (in samples; NaN until there is one) and norms of the last batch's per-sample gradients."""
        if not self.norms:
            return {}
        scale = float(self.noise.compute().scale) if self.noise.value is not None else float("nan")
        return {"gradient_noise_scale": scale, **self.norms}
