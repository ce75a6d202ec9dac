"""Data attribution: which training samples made a prediction.

Scores are ``[n_train, n_test]``, from gradients of *unscaled* losses, positive where the training sample helps.
"""

from __future__ import annotations

from .cross import cross_gram
from .evaluate import leave_one_out_correlation, linear_datamodelling_score, mislabel_auc
from .kernel import margin, trak
from .projection import Projection
from .scores import (
    empirical_fisher_influence,
    grad_cos,
    grad_dot,
    influence,
    influence_from_gram,
    self_influence,
    tracin,
)
from .store import GradientStore

__all__ = [
    "GradientStore",
    "Projection",
    "cross_gram",
    "empirical_fisher_influence",
    "grad_cos",
    "grad_dot",
    "influence",
    "influence_from_gram",
    "leave_one_out_correlation",
    "linear_datamodelling_score",
    "margin",
    "mislabel_auc",
    "self_influence",
    "tracin",
    "trak",
]
