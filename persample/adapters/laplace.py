"""laplace-torch: curvature backends whose gradients and Jacobians come from persample.

``Laplace(model, "classification", hessian_structure="full", backend=empirical_fisher_backend())``.  Its losses are
sums over samples, with a factor 1/2 for regression in its own code; rows here are of the unscaled ``lossfunc`` with
reduction "mean" over a batch of one, which is what its own backends compute.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import api
from . import needed


@cache
def empirical_fisher_backend() -> type:
    """An ``EFInterface`` that takes per-sample gradients ``[N, D]`` of any model from persample."""
    curvature = needed("laplace.curvature", "laplace-torch")

    class PersampleEF(curvature.EFInterface):  # type: ignore[misc, name-defined]
        def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            own = {id(p) for p in self._model.parameters()}  # of the last layer alone, where that is what is asked for
            which = lambda name, p: id(p) in own  # noqa: E731
            G = api.gradients(self.model, lambda f, t: self.lossfunc(f, t), _inputs(x), y, params=which)
            rows = G.flat()
            chosen = self.subnetwork_indices
            return rows if chosen is None else rows[:, chosen], G.losses.sum()

    return PersampleEF


def _inputs(x: Any) -> Any:
    """A batch as laplace calls models with it: ``model(x)``, also for a dict, which is one positional argument."""
    return (dict(x),) if hasattr(x, "keys") else x


def _output(c: int, out: Tensor, _: Any) -> Tensor:
    return out[:, c]


@cache
def ggn_backend() -> type:
    """A ``GGNInterface`` whose Jacobians ``[N, C, D]`` are per-sample gradients of the model's outputs, one pass
    each.
    """
    curvature = needed("laplace.curvature", "laplace-torch")

    class PersampleGGN(curvature.GGNInterface):  # type: ignore[misc, name-defined]
        def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
            if enable_backprop:
                raise NotImplementedError("rows of persample are not differentiable; use laplace's own backend here")
            inputs = _inputs(x)
            with torch.no_grad():
                f = self.model(x)
            J = torch.stack(
                [api.gradients(self.model, partial(_output, c), inputs).flat() for c in range(f.shape[1])], 1
            )
            chosen = self.subnetwork_indices
            return (J if chosen is None else J[:, :, chosen]), f

    return PersampleGGN
