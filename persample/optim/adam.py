"""Adam whose second moment is taken over samples, or over groups of ``k`` of them, instead of over steps only."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, EmptyBatchError, QuantityError
from ..factors import Factors, cast, dense, dtype, fold
from ..gradients import Gradients
from ..quantities import Quantities
from ..reductions import square_sum
from ..statistics.parts import check_measured, energy
from .updates import Named, adapt, parts, started, summing


def group_second_moment(G: Quantities, size: int) -> dict[str, Tensor]:
    """``mean_j |ghat_j|^2``, ``{name: [*P]}``: ``ghat_j`` is the mean of the ``j``-th ``size`` consecutive rows.

    ``size=1`` is `Gradients.second_moment`, ``size=N`` the square of the mean.  No rows are written, groups are folded
    into the factors.  Real for complex parameters, and in no less than single precision.
    """
    check_measured(G)
    n = len(G)
    check_size(size)
    if size == 1:
        return G.second_moment()
    if n % size:
        raise QuantityError(f"group_size={size} must divide the batch, but N = {n}.")
    if size == n:
        return {name: energy(m) for name, m in G.wide_mean().items()}
    if not isinstance(G, Gradients):
        raise QuantityError("second moments of groups need the rows: compute gradients without quantities=.")
    return {name: square_sum(fold(_single(G.factors[name]), size)) / (size * n) for name in G.names}


def _single(g: Factors) -> Factors:
    """In no less than single precision: sums of rows in half precision may overflow."""
    return cast(g, torch.promote_types(dtype(g), torch.float32))


def check_size(size: int) -> None:
    """Raise for a size of groups that is no number of samples."""
    if not isinstance(size, Integral) or size < 1:
        raise ArgumentError(f"the size of a group must be a number of samples, 1 or more, got {size!r}.")


def second_moment_of_parts(G: Quantities, name: str, size: int) -> Tensor:
    """`group_second_moment` of the real and imaginary parts of a complex parameter, ``[*P, 2]``; it writes rows."""
    if not isinstance(G, Gradients):
        raise QuantityError(
            f"parameter '{name}' is complex, and second moments of its real and imaginary parts need the rows: compute "
            "gradients without quantities=."
        )
    return (parts(dense(fold(G.factors[name], size))) / size).square().mean(0)


class PerSampleAdam(Named):
    """Adam with ``v <- b2 v + (1 - b2) mean_j (ghat_j)^2`` over groups of ``group_size`` samples; otherwise AdamW.

    Wang and Aitchison 2024, "Batch size invariant Adam" (arXiv 2402.18824): with the second moment of micro-batches
    of a fixed size, its expectation no longer depends on the batch size, so that training does not either when the
    learning rate (``lr ~ B``) and the betas (``b ~ b^B``) scale with it.  ``group_size=1`` is the per-sample second
    moment ``mean g_i^2``, ``group_size=N`` ordinary Adam, ``(mean g)^2``.  The per-sample one contains the noise of
    single samples: steps are shorter by up to ``sqrt(N)``, so it wants a larger learning rate than Adam.

    ``step(G)`` takes `Gradients`, or for ``group_size=1`` `Statistics` of ``quantities=["mean", "second_moment"]``.
    Parameters that no loss of a batch uses have a gradient of zero, so that moments and weight decay move them, where
    `torch.optim.AdamW` leaves alone those whose ``.grad`` is ``None``.
    A complex entry is two real ones, as in `torch.optim.AdamW`: its parts have second moments of their own, which need
    `Gradients` (unless the group is the batch), and have their rows written.

    Args:
        params: ``model.named_parameters()``.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW` (weight decay 0 by default).
        group_size: consecutive samples per group; it must divide every batch.  ``None``: the whole batch, ordinary
            Adam.
    """

    own = ("group_size",)

    def __init__(
        self, params: Any, lr: float = 1e-3, *, group_size: int | None = 1, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if group_size is not None:
            check_size(group_size)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.group_size = None if group_size is None else int(group_size)
        super().__init__(params, defaults)

    def step(self, G: Quantities | None = None, *, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the mean gradient, scaled by the second moment of groups."""
        if not started(self, G, closure):
            self._step(summing(G))

    def _step(self, G: Quantities) -> None:
        if not len(G):
            raise EmptyBatchError("a step needs the gradients of one sample at least: leave empty batches out.")
        mean = G.mean()
        size = self.group_size or len(G)
        if size == len(G):
            adapt(self, mean)
        else:
            square = group_second_moment(G, size)
            apart = {name: second_moment_of_parts(G, name, size) for name, m in mean.items() if m.is_complex()}
            adapt(self, mean, square | apart)
