"""How noisy the mean gradient is: noise scale, signal-to-noise, evidence that training should stop.

Throughout, ``g_i`` is the gradient of the unscaled loss of sample ``i``, ``gbar`` the mean of the ``B`` samples at
hand, ``Sigma`` the covariance of one sample's gradient, and ``G`` its expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_at_least, number
from ..errors import ArgumentError, QuantityError, warn
from ..quantities import Quantities
from .accumulate import Accumulator, adding, check_alike
from .parts import (
    By,
    HasMoments,
    centred_total,
    check_drawn,
    check_measured,
    energy,
    mean_square,
    means,
    named,
    per_group,
    several,
)


@dataclass(frozen=True, repr=False)
class NoiseEstimate:
    """Unbiased estimates of ``tr Sigma`` and of ``|G|^2``, kept apart; their ratio, ``scale``, is the noise scale.

    On one batch the estimate of ``|G|^2`` can be negative, which says that the batch is too small to tell the mean
    gradient from zero.  Average numerators and denominators over batches first (`NoiseScale`), and divide last.
    """

    trace: Tensor  # tr Sigma
    square: Tensor  # |G|^2

    @property
    def negative(self) -> bool:
        """Whether ``|G|^2`` is not positive, so that the ratio means nothing."""
        return not bool(self.square > 0)

    @property
    def scale(self) -> Tensor:
        """``tr Sigma / |G|^2``, in samples; infinite if the denominator is `negative`."""
        return torch.where(self.square <= 0, torch.inf, self.trace / self.square)  # NaN stays NaN

    def __repr__(self) -> str:
        return f"NoiseEstimate(scale={self.scale}, trace={self.trace}, square={self.square})"


def noise_scale(G: HasMoments, by: By = None) -> Any:
    """``B_simple = tr Sigma / |G|^2``: the batch size beyond which more samples stop to pay, a `NoiseEstimate`.

    McCandlish et al. 2018, "An empirical model of large-batch training", eq. 2.9 and appendix A.1 with batches of one
    and of ``B``:

        ``tr Sigma = B/(B - 1) (mean_i |g_i|^2 - |gbar|^2)``,  ``|G|^2 = (B |gbar|^2 - mean_i |g_i|^2) / (B - 1)``.

    The first is the trace of the unbiased (``ddof=1``) covariance.  Needs ``quantities=["norm", "mean"]``, or
    ``["mean", "variance"]``.
    """
    n = several(G, "the noise scale")
    check_drawn(G)
    means = mean_square(G)

    def estimate(centred: Tensor, mean: Tensor) -> NoiseEstimate:
        trace = centred / (n - 1)
        return NoiseEstimate(trace, mean - trace / n)

    return per_group(by, estimate, centred_total(G, means, by), means)


def noise_scale_of_two(small_square: Tensor | float, small: int, big_square: Tensor | float, big: int) -> NoiseEstimate:
    """The same from the squared norms of the mean gradients of two batch sizes (McCandlish et al. 2018, eqs. A.2, A.3).

    ``|G|^2 = (big |G_big|^2 - small |G_small|^2) / (big - small)``,
    ``tr Sigma = (|G_small|^2 - |G_big|^2) / (1/small - 1/big)``.
    """
    if not 0 < number(small) < number(big):
        raise ArgumentError(f"the batch sizes must be 0 < small < big, got {small!r} and {big!r}.")
    for name, square in (("small_square", small_square), ("big_square", big_square)):
        if not isinstance(square, Tensor) and math.isnan(number(square)):
            raise ArgumentError(f"{name} must be a tensor or a number, got {square!r}.")
    small_square, big_square = (
        x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")
        for x in (small_square, big_square)
    )
    trace = (small_square - big_square) / (1 / small - 1 / big)
    return NoiseEstimate(trace, (big * big_square - small * small_square) / (big - small))


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """Sums over batches of ``B - 1``, ``(B - 1) tr Sigma`` and ``(B - 1) |G|^2``, per group."""

    weight: float
    trace: dict[str, Tensor]
    square: dict[str, Tensor]
    names: list[str]  # of the parameters

    def __add__(self, other: NoiseSums) -> NoiseSums:
        check_alike(self.names, other.names)
        check_alike(self.trace, other.trace)
        trace = {group: v + other.trace[group] for group, v in self.trace.items()}
        square = {group: v + other.square[group] for group, v in self.square.items()}
        return NoiseSums(self.weight + other.weight, trace, square, self.names)

    def times(self, factor: float) -> NoiseSums:
        """All sums times a number."""
        trace = {group: factor * v for group, v in self.trace.items()}
        square = {group: factor * v for group, v in self.square.items()}
        return NoiseSums(factor * self.weight, trace, square, self.names)


class NoiseScale(Accumulator[NoiseSums]):
    """`noise_scale` over many batches: ``tr Sigma`` and ``|G|^2`` averaged apart, divided last: a `NoiseEstimate`.

    A batch of ``B`` counts with weight ``B - 1``, its degrees of freedom: ``tr Sigma`` is then the pooled variance,
    and a batch of one contributes nothing, as it should.  With ``decay < 1`` older batches fade while training moves
    on (an exponential moving average, started without bias).  ``{group: NoiseEstimate}`` with ``by``.  Needs
    ``quantities=["norm", "mean"]``.
    """

    needs = ("norm", "mean")
    kind = NoiseSums

    def __init__(self, by: By = None, decay: float = 1.0) -> None:
        super().__init__()
        if not 0 < number(decay) <= 1:
            raise ArgumentError(f"decay must be in (0, 1], got {decay!r}.")
        self.by, self.decay = by, decay

    def of(self, G: Quantities) -> NoiseSums:
        check_measured(G)
        check_drawn(G)
        n, means = len(G), mean_square(G)
        centred = (
            centred_total(G, means, self.by) if n > 1 else {name: torch.zeros_like(m) for name, m in means.items()}
        )
        sums = per_group(self.by, lambda c, mean: (c, (n - 1) * mean - c / n), centred, means)
        groups = sums if isinstance(sums, dict) else {"": sums}
        traces, squares = ({g: v[i] for g, v in groups.items()} for i in range(2))
        return NoiseSums(float(n - 1), traces, squares, list(means))

    def update(self, G: Quantities) -> None:
        """Let older batches fade by ``decay``, and add one; a batch that is refused leaves everything as it was, and so
        does one whose numbers are not finite (overflow in half precision), with a warning.
        """
        new = self.of(G)
        if not all(bool(x.isfinite().all()) for x in (*new.trace.values(), *new.square.values())):
            warn("the gradients of a batch are not finite: it is skipped, and the noise scale stays what it was.")
            return
        with adding:
            self.value = new if self.value is None else self.value.times(self.decay) + new

    def compute(self) -> Any:
        """A `NoiseEstimate`, or ``{group: NoiseEstimate}``."""
        sums = self._seen()
        if not sums.weight > 0:
            raise QuantityError("the noise scale needs a batch of at least 2 samples; all batches so far were of one.")
        found = {g: NoiseEstimate(t / sums.weight, sums.square[g] / sums.weight) for g, t in sums.trace.items()}
        return found[""] if self.by is None else found

    def _settings(self) -> dict[str, Any]:
        return {"by": named(self.by), "decay": self.decay}


def signal_to_noise(G: HasMoments, *, ddof: int = 0, eps: float = 0.0, by: By = "element") -> Any:
    """``gbar^2 / (Var(g) + eps)`` of every entry, ``{name: [*P]}``; its mean over the entries of a group for another
    ``by``.

    The gradient signal-to-noise ratio of Liu et al. 2020, "Understanding why neural networks generalize well through
    GSNR of parameters".  Population variance by default.  An entry that is zero for all samples has no signal: 0.
    Needs ``quantities=["mean", "variance"]``.
    """
    check_measured(G)
    check_drawn(G)
    check_at_least(0, eps=eps)
    average, variances = means(G), G.variance(ddof)
    ratios = {name: _ratio(energy(average[name]), variances[name] + eps) for name in average}
    if by == "element":
        return ratios
    sums = {name: r.sum() for name, r in ratios.items()}
    counts = {name: r.new_tensor(r.numel()) for name, r in ratios.items()}
    return per_group(by, lambda total, count: total / count, sums, counts)


def evidence_based_stopping(G: HasMoments, *, eps: float = 0.0, by: By = None) -> Any:
    """``1 - B mean_d(gbar_d^2 / (Var_d + eps))``, a scalar: stop training (or this group) when it is positive.

    Mahsereci et al. 2017, "Early stopping without a validation set", eq. 7: the mean over the ``D`` entries, unbiased
    (``ddof=1``) variances.  It is positive when the mean gradient is smaller than sampling noise alone would make it.
    Entries that are zero for all samples count with 0, so dead parameters speak for stopping: leave them out by
    ``params=`` or ``by``. Needs ``quantities=["mean", "variance"]``.
    """
    n = several(G, "evidence-based stopping")
    ratio = signal_to_noise(G, ddof=1, eps=eps, by=by)
    return {group: 1 - n * r for group, r in ratio.items()} if isinstance(ratio, dict) else 1 - n * ratio


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` with ``0 / 0 = 0``."""
    return torch.where(a == 0, 0.0, a / b)
