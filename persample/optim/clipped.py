"""Steps along clipped and noised gradients, as in differentially private training.

Every row is scaled to an L2 norm over all parameters of at most ``max_norm = C``, the rows are summed, Gaussian noise
is added to the sum, and the result is divided by a fixed number (Abadi et al. 2016, "Deep learning with differential
privacy", algorithm 1):

    ``g = (sum_n min(1, C / |g_n|) g_n + sigma C xi) / expected_batch_size``,  ``xi ~ N(0, I)``.

``C`` is a bound on gradients of *unscaled* losses: the same number whatever the batch size or the criterion's
reduction.

**This is the mechanism, not a privacy guarantee.**  Accounting is the user's: how batches are drawn (Poisson sampling,
with ``expected_batch_size = q N``, where a batch may be empty), how many steps, the epsilon that follows, and a source
of noise fit for the purpose (`torch.Generator` is no cryptographic one).  What is checked is that samples are
independent, as far as that is known of the rows: in a batch-coupled model (BatchNorm in training mode) one sample
changes the gradients of all others, clipping bounds nothing, and the step is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import check_at_least, check_positive, number
from ..errors import ArgumentError, BatchCoupledError
from ..quantities import COUPLED, Quantities, notion_of
from ..state import check_generator
from .updates import Named, adapt, check_same, descend, named, parts, quantities, started

Batches = Quantities | Sequence[Quantities]


@dataclass(frozen=True)
class Clipping:
    """``sum_n min(1, C / |g_n|) g_n``, noised and divided."""

    max_norm: float
    noise_multiplier: float = 0.0
    expected_batch_size: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (number(self.max_norm) > 0 or self.max_norm == math.inf):
            raise ArgumentError(f"max_norm must be a positive number, got {self.max_norm!r}.")
        check_at_least(0, noise_multiplier=self.noise_multiplier)
        if self.noise_multiplier and self.max_norm == math.inf:
            raise ArgumentError(
                f"max_norm must be finite with noise, of standard deviation noise_multiplier * max_norm: got "
                f"noise_multiplier={self.noise_multiplier} and max_norm=inf. Bound the norms, or leave the noise out."
            )
        check_generator(self.generator)
        if self.expected_batch_size is not None:
            check_positive(expected_batch_size=self.expected_batch_size)

    def gradient(self, G: Batches | None, optimizer: Optimizer) -> dict[str, Tensor]:
        """``{name: [*P]}``: the clipped sum over a batch (in pieces), noised once, per expected sample."""
        batches = [quantities(batch) for batch in (G if isinstance(G, (list, tuple)) else [G])]
        for batch in batches:
            check_independent(batch)
        expected = self.expected_batch_size
        size = sum(len(batch) for batch in batches) if expected is None else number(expected)
        if len({frozenset(batch.names) for batch in batches}) > 1:
            raise ArgumentError("the pieces of a batch must be gradients of the same parameters: the same params=.")
        for batch in batches:
            check_same(optimizer, batch.shapes)  # before noise is drawn
        if not size:
            raise ArgumentError("an empty batch needs expected_batch_size=, the number that its noise is divided by.")
        clipped = [batch.wide_clip(self.max_norm) for batch in batches]
        totals = clipped[0] if clipped else {name: torch.zeros_like(slot.p) for name, slot in named(optimizer).items()}
        return {name: self._noised(sum((c[name] for c in clipped[1:]), t)) / size for name, t in totals.items()}

    def _noised(self, total: Tensor) -> Tensor:
        if not self.noise_multiplier:
            return total
        xi = torch.empty_like(total)
        parts(xi).normal_(generator=self.generator)  # a complex entry is two real ones, each with noise of its own
        return total.add(xi, alpha=number(self.noise_multiplier) * number(self.max_norm))


def check_independent(G: Quantities) -> None:
    """Raise unless the rows are those of independent samples (``coupled="eval"`` included)."""
    notion = notion_of(G)
    if notion == "eval" and str(getattr(G, "note", "")).endswith(COUPLED):  # by something else than statistics
        notion = COUPLED
    if notion not in ("", "eval"):
        asked = notion != COUPLED
        raise BatchCoupledError(
            f"these gradients are of coupled samples ({f'coupled={notion!r}' if asked else notion}): every sample "
            "moves the rows of all others (also of parameters behind batch statistics), so clipping its own row bounds "
            "nothing. Use a model without batch statistics (GroupNorm, LayerNorm, .eval()) and a loss of every sample "
            "alone" + (", and leave coupled= out, which asks for coupled rows." if asked else ".")
        )


class ClippedSGD(Named):
    """SGD on clipped and noised per-sample gradients; `persample.optim.clipped` has the formula, and what it
    doesn't promise.

    ``step(G)`` takes the `Gradients` of the optimizer's parameters, or cheaper, `Statistics` of a run with
    ``quantities=[("clip", {"max_norm": C})]`` of the same ``C``, which keeps factors (rows where these are smaller)
    until all norms are known.  A list of them is one batch in pieces (gradient accumulation: noise is added once), and
    the empty list an empty batch.  The rest is `torch.optim.SGD`, to which it is equal for ``C`` large and no noise;
    but for parameters that no loss of a batch uses: their gradient is zero (and noise), so that momentum and weight
    decay move them, where torch's leaves alone those whose ``.grad`` is ``None``.  State (``state_dict``) is the
    momentum; the generator's is yours.

    Args:
        params: ``model.named_parameters()``.
        lr: the learning rate, for the gradient *per expected sample*.
        max_norm: the bound ``C`` on the norm of every row.
        noise_multiplier: ``sigma``: the noise on the sum has standard deviation ``sigma C`` (on each part of a complex
            entry).
        expected_batch_size: what the sum is divided by; the number of samples by default, which is not private.
        generator: of the noise.
    """

    own = ("clipping",)

    def __init__(
        self, params: Any, lr: float = 1e-2, *, max_norm: float, noise_multiplier: float = 0.0,
        expected_batch_size: float | None = None, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float = 0.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.clipping = Clipping(max_norm, noise_multiplier, expected_batch_size, generator)
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def step(self, G: Batches | None = None, *, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the clipped and noised gradient of a batch, or of a batch in pieces."""
        if not started(self, G, closure):
            descend(self, self.clipping.gradient(G, self))


class ClippedAdam(Named):
    """Adam (with decoupled weight decay: AdamW) on clipped and noised per-sample gradients; see `ClippedSGD`.

    Parameters that no loss of a batch uses have a gradient of zero (and noise): moments and weight decay move them,
    where `torch.optim.AdamW` leaves alone those whose ``.grad`` is ``None``.
    """

    own = ("clipping",)

    def __init__(
        self, params: Any, lr: float = 1e-3, *, max_norm: float, noise_multiplier: float = 0.0,
        expected_batch_size: float | None = None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.clipping = Clipping(max_norm, noise_multiplier, expected_batch_size, generator)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, G: Batches | None = None, *, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the clipped and noised gradient of a batch, or of a batch in pieces."""
        if not started(self, G, closure):
            adapt(self, self.clipping.gradient(G, self))
