"""Curvature of a batch loss: Hessian, Gauss-Newton and Fisher matrices as operators, and their Kronecker factors."""

from __future__ import annotations

from .diagonal import ggn_diagonal
from .kfac import ekfac, kfac, kflr
from .kfra import kfra
from .kronecker import Kronecker
from .matrices import empirical_fisher, fisher, ggn, hvp
from .merging import merge
from .operator import Operator
from .per_sample import per_sample_hvp

__all__ = [
    "Kronecker",
    "Operator",
    "ekfac",
    "empirical_fisher",
    "fisher",
    "ggn",
    "ggn_diagonal",
    "hvp",
    "kfac",
    "kflr",
    "kfra",
    "merge",
    "per_sample_hvp",
]
