"""What the per-sample gradients of a batch, or of a data set, say about noise, agreement and importance.

Functions of one batch ``fn(G, ...)`` take `persample.Gradients`, or `persample.Statistics` of a run that was asked
for what they need; accumulators take one batch after another.  Rows are gradients of *unscaled* per-sample losses,
always.  ``by=`` takes parameters apart: ``None`` (all in one), ``"layer"`` (those of one module), ``"parameter"``, or a
function from a parameter's name to that of its group (`signal_to_noise` also ``"element"``: every entry by itself);
results are then ``{group: ...}``.
"""

from __future__ import annotations

from .accumulate import Accumulator
from .alignment import Stiffness, confusion, diversity, stiffness
from .batch_size import cabs, inner_product_test, norm_test, orthogonality_test
from .histogram import Histogram, histogram
from .loader import accumulate
from .moments import Average, DatasetMoments, Moments
from .noise import NoiseEstimate, NoiseScale, evidence_based_stopping, noise_scale, noise_scale_of_two, signal_to_noise
from .norms import Norms
from .sampling import ImportanceWeights, importance_weights

__all__ = [
    "Accumulator",
    "Average",
    "DatasetMoments",
    "Histogram",
    "ImportanceWeights",
    "Moments",
    "NoiseEstimate",
    "NoiseScale",
    "Norms",
    "Stiffness",
    "accumulate",
    "cabs",
    "confusion",
    "diversity",
    "evidence_based_stopping",
    "histogram",
    "importance_weights",
    "inner_product_test",
    "noise_scale",
    "noise_scale_of_two",
    "norm_test",
    "orthogonality_test",
    "signal_to_noise",
    "stiffness",
]
