"""Per-sample quantities of any PyTorch model: individual gradients, norms, inner products, moments, projections.

The alphabet of shapes, used in every docstring: ``N, M`` samples; ``T, S`` tokens or positions; ``K`` blocks;
``O, I`` out and in features; ``P`` a parameter's shape; ``D`` all parameters, or a width; ``V`` a vocabulary; ``C``
channels.
"""

from . import adapters, attribution, batchnorm, curvature, einsum, factors, optim, statistics
from .api import gradients
from .batchnorm.coupling import Coupling, coupling
from .check import check
from .errors import (
    ArgumentError,
    BatchCoupledError,
    CaptureError,
    EmptyBatchError,
    HigherOrderError,
    InplaceError,
    LossError,
    PersampleError,
    QuantityError,
    RandomnessError,
    SampleAxisError,
    UnknownParameterError,
    VerificationError,
)
from .explain import explain
from .gradients import Gradients
from .recorder import extend
from .rules import pullback, rule
from .statistics_run import Statistics

__all__ = [
    "ArgumentError",
    "BatchCoupledError",
    "CaptureError",
    "Coupling",
    "EmptyBatchError",
    "Gradients",
    "HigherOrderError",
    "InplaceError",
    "LossError",
    "PersampleError",
    "QuantityError",
    "RandomnessError",
    "SampleAxisError",
    "Statistics",
    "UnknownParameterError",
    "VerificationError",
    "adapters",
    "attribution",
    "batchnorm",
    "check",
    "coupling",
    "curvature",
    "einsum",
    "explain",
    "extend",
    "factors",
    "gradients",
    "optim",
    "pullback",
    "rule",
    "statistics",
]
__version__ = "0.1.0"
