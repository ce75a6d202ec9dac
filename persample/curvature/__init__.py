"""Curvature of a batch loss: Hessian, Gauss-Newton and Fisher matrices as operators, and their Kronecker factors."""

from __future__ import annotations

from .matrices import empirical_fisher, fisher, ggn, hvp
from .operator import Operator
from .per_sample import per_sample_hvp

__all__ = ["Operator", "empirical_fisher", "fisher", "ggn", "hvp", "per_sample_hvp"]
