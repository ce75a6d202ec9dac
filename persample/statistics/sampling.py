"""Which samples matter: importance sampling by gradient norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import number
from ..errors import ArgumentError, QuantityError
from ..quantities import Quantities


@dataclass(frozen=True)
class ImportanceWeights:
    """Probabilities ``p`` of drawing each sample, and weights ``1 / (N p)`` that keep the mean gradient unbiased."""

    probability: Tensor  # [N], sums to 1
    weight: Tensor  # [N]

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``[count]``: indices drawn with replacement."""
        return torch.multinomial(self.probability, count, replacement=True, generator=generator)


def importance_weights(G: Quantities | Tensor, smoothing: float = 0.0) -> ImportanceWeights:
    """``p_i ~ |g_i|`` and ``w_i = 1/(N p_i)``, so that ``E_{i ~ p}[w_i g_i] = gbar``, with the least variance of all
    ``p``.

    Zhao and Zhang 2015, "Stochastic optimization with importance sampling", eq. 11; Katharopoulos and Fleuret 2018.
    ``smoothing`` mixes in the uniform distribution and so bounds the weights by ``1/smoothing``.  Samples of zero
    norm are never drawn without it, and have weight 0; if all norms are zero, ``p`` is uniform. ``G`` may be norms
    ``[N]`` already: those of a whole data set (`Norms`), or cheaper bounds such as the last layer's.  Integers and half
    precision become float32.  Needs ``quantities=["norm"]``.
    """
    if not isinstance(G, (Quantities, Tensor)):
        raise ArgumentError(f"G must be per-sample gradients or a tensor of norms [N], got {type(G).__name__}.")
    norm = G if isinstance(G, Tensor) else G.norm()
    if norm.ndim != 1 or not len(norm) or norm.is_complex() or not bool(((norm >= 0) & norm.isfinite()).all()):
        raise QuantityError(
            f"importance weights need norms [N], finite and not negative, of at least one sample; got shape "
            f"{list(norm.shape)}{' with others among them' if norm.ndim == 1 and len(norm) else ''}."
        )
    if not 0 <= number(smoothing) <= 1:
        raise ArgumentError(f"smoothing must be between 0 and 1, got {smoothing!r}.")
    n, norm = len(norm), norm.to(torch.promote_types(norm.dtype, torch.float32))
    uniform, largest = torch.full_like(norm, 1 / n), norm.max()
    share = norm / largest if bool(largest > 0) else uniform  # whose sum does not overflow
    p = (1 - smoothing) * share / share.sum() + smoothing * uniform
    return ImportanceWeights(p, torch.where(p > 0, 1 / (n * p), 0.0))
