"""A batch size that follows what the gradients say: grow when noise hides the mean gradient, shrink when it doesn't.

Every rule is a ratio of two numbers of one batch, which are averaged over batches apart (exponentially) before they are
divided: ratios of single batches are biased and heavy-tailed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from ..arguments import check_positive, number
from ..errors import ArgumentError, warn
from ..quantities import Quantities, add_up
from ..statistics.batch_size import loss_above_zero
from ..statistics.noise import noise_scale
from ..statistics.parts import HasMoments, centred_total, check_drawn, check_measured, mean_square

Rule = Callable[[Quantities], tuple[Tensor, Tensor]]


def by_norm_test(theta: float) -> Rule:
    """``S / (theta^2 |gbar|^2)``: as many samples as keep the relative error of the mean gradient at ``theta`` (Byrd
    et al. 2012, eq. 3.10; `persample.statistics.norm_test`).
    """
    check_positive(theta=theta)

    def rule(G: Quantities) -> tuple[Tensor, Tensor]:
        return noise_scale(G).trace, theta**2 * add_up(mean_square(G).values())

    return rule


def by_noise_scale(factor: float = 1.0) -> Rule:
    """``factor tr Sigma / |G|^2``: a multiple of the gradient noise scale (McCandlish et al. 2018)."""
    check_positive(factor=factor)

    def rule(G: Quantities) -> tuple[Tensor, Tensor]:
        estimate = noise_scale(G)
        return factor * estimate.trace, estimate.square

    return rule


def by_cabs(lr: float) -> Rule:
    """``lr tr Sigma / L``: batch size coupled with the learning rate of plain SGD (Balles et al. 2017, eq. 22).

    The loss is taken to have infimum 0; a negative one is refused, as by `persample.statistics.cabs`.
    """
    check_positive(lr=lr)

    def rule(G: HasMoments) -> tuple[Tensor, Tensor]:
        check_drawn(G)
        return lr * add_up(centred_total(G).values()) / len(G), loss_above_zero(G)

    return rule


class AdaptiveBatchSize:
    """A controller: ``update(G)`` looks at one batch and says how large the next one is; ``size`` is what it said last.

    The proposal of the rule is rounded up, bounded by a factor ``growth`` per update (down only with ``shrink``), and
    by ``minimum`` and ``maximum``.  While the averaged denominator is not positive (the mean gradient can't be told
    from zero) the size grows.  Batches of one sample say nothing and are skipped; so are those whose numbers are not
    finite (overflow in half precision), with a warning.

    ``update`` needs ``quantities=["norm", "mean"]``.  ``batches(sampler)`` is a ``batch_sampler`` for a data loader
    without worker processes (which would fetch batches of an old size in advance).

    Args:
        size: the first batch size.
        rule: `by_norm_test`, `by_noise_scale`, `by_cabs`, or a function from ``G`` to a numerator and a denominator.
        minimum, maximum: bounds.
        decay: how much of the averages stays with every update.
        growth: the largest factor between two sizes.
        shrink: whether the size may go down.
    """

    def __init__(
        self, size: int, rule: Rule, *, minimum: int = 2, maximum: int, decay: float = 0.9, growth: float = 2.0,
        shrink: bool = False,
    ) -> None:  # fmt: skip
        sizes = (minimum, size, maximum)
        if not all(isinstance(n, Integral) for n in sizes) or not 2 <= minimum <= size <= maximum:
            raise ArgumentError(
                f"sizes must be whole numbers, 2 <= minimum <= size <= maximum, got {', '.join(map(repr, sizes))}."
            )
        if not (0 <= number(decay) < 1 and (growth == math.inf or number(growth) > 1)):
            raise ArgumentError(f"decay must be in [0, 1) and growth above 1, got {decay!r} and {growth!r}.")
        if not callable(rule):
            raise ArgumentError(f"rule must be a function of G, such as by_norm_test(1.0), got {rule!r}.")
        self.size, self.rule, self.minimum, self.maximum = size, rule, minimum, maximum
        self.decay, self.growth, self.shrink = decay, growth, shrink
        self.numerator = self.denominator = 0.0

    def update(self, G: Quantities) -> int:
        """The size of the next batch, given one."""
        check_measured(G)
        if len(G) < 2:
            return self.size
        said = self.rule(G)
        try:
            above, below = map(float, said)
        except (TypeError, ValueError):
            raise ArgumentError(
                f"a rule returns two numbers, a numerator and a denominator of the size, got {said!r}."
            ) from None
        if not (math.isfinite(above) and math.isfinite(below)):
            warn(f"a batch says {above:g} / {below:g} of the batch size: it is skipped, and the size stays.")
            return self.size
        self.numerator = self.decay * self.numerator + (1 - self.decay) * above
        self.denominator = self.decay * self.denominator + (1 - self.decay) * below
        proposal = self.numerator / self.denominator if self.denominator > 0 else math.inf
        lowest = self.size / self.growth if self.shrink else self.size
        bounded = min(max(proposal, lowest, self.minimum), self.size * self.growth, self.maximum)
        self.size = min(self.maximum, math.ceil(bounded * (1 - 1e-9)))  # 10.000000001 samples are 10
        return self.size

    def batches(self, sampler: Iterable[int]) -> Batches:
        """Lists of indices from a sampler, each as long as ``size`` is when it begins."""
        return Batches(self, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Size and averages."""
        return {"size": self.size, "numerator": self.numerator, "denominator": self.denominator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, within the bounds of this controller."""
        if missing := {"size", "numerator", "denominator"} - {*state}:
            raise ArgumentError(f"this is no state of an AdaptiveBatchSize: it has no {min(missing)!r}.")
        size, *averages = state["size"], state["numerator"], state["denominator"]
        if not isinstance(size, Integral) or any(math.isnan(number(x)) for x in averages):
            raise ArgumentError(
                f"the state of an AdaptiveBatchSize is a whole size and two finite averages, got {state}."
            )
        self.size = min(max(int(size), self.minimum), self.maximum)
        self.numerator, self.denominator = averages


@dataclass(frozen=True)
class Batches:
    """Batches of a size that may change from one to the next; the last one takes what is left."""

    controller: AdaptiveBatchSize
    sampler: Iterable[int]

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in self.sampler:
            batch.append(i)
            if len(batch) >= self.controller.size:
                yield batch
                batch = []
        if batch:
            yield batch
