"""Do the samples agree?  Diversity, confusion and stiffness: what the Gram matrix ``K_ij = g_i . g_j`` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantities import Quantities
from .parts import By, HasMoments, check_measured, divisor, per_group, products, several, square_total


class Stiffness(NamedTuple):
    """Means over pairs of different samples."""

    sign: Tensor  # of sign(K_ij)
    cosine: Tensor  # of the cosine


def diversity(G: HasMoments, by: By = None) -> Any:
    """``sum_i |g_i|^2 / |sum_i g_i|^2``, a scalar: ``1/N`` if all samples agree, 1 if they are orthogonal.

    Yin et al. 2018, "Gradient diversity: a key ingredient for scalable distributed learning", def. 1; ``N`` times it is
    their bound on the batch size.  Needs ``quantities=["norm", "mean"]``.
    """
    check_measured(G)
    n = len(G)
    return per_group(by, lambda squares, mean: squares / (n * n * mean), square_total(G), divisor(G, by))


def confusion(G: Quantities, by: By = None) -> Any:
    """``min_{i != j} g_i . g_j``, a scalar: the strongest disagreement between two samples.

    Sankararaman et al. 2020, "The impact of neural network overparameterization on gradient confusion", def. 2.1: the
    confusion bound ``eta`` is minus this, where negative.  Needs ``quantities=["gram"]``.
    """
    several(G, "confusion")
    return per_group(by, lambda K: _pairs(K).min(), products(G))


def stiffness(G: Quantities, by: By = None) -> Any:
    """Mean sign and mean cosine of ``g_i . g_j`` over ``i != j``, a `Stiffness`; zero rows count with 0.

    Fort et al. 2019, "Stiffness: a new perspective on generalization in neural networks", secs. 2.1-2.2.  Needs
    ``quantities=["gram"]``.
    """
    several(G, "stiffness")

    def means(K: Tensor) -> Stiffness:
        norm = K.diagonal().sqrt()
        scale = norm[:, None] * norm
        sign = torch.where(K.isnan(), K, K.sign())  # torch's sign of NaN is 0
        return Stiffness(_pairs(sign).mean(), _pairs(torch.where(scale == 0, 0.0, K / scale)).mean())

    return per_group(by, means, products(G))


def _pairs(K: Tensor) -> Tensor:
    """The entries off the diagonal."""
    return K[~torch.eye(len(K), dtype=torch.bool, device=K.device)]
