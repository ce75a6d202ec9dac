"""BatchNorm in training mode couples the samples of a batch: the structure of one layer, and of a whole network.

The layer: :func:`jacobian` gives ``d y / d x`` as a structured operator; :func:`convert` makes the BatchNorm modules of
a model expose it after every forward, without changing anything else about them.

The network: `persample.coupling`, and of what it returns the pictures ``plot_layers``, ``plot_spectrum``,
``plot_notions``, ``plot_decay``.
"""

from persample.batchnorm.jacobian import BatchNormJacobian, Spectrum
from persample.batchnorm.linearize import jacobian, linearize, uses_batch_statistics
from persample.batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert, revert
from persample.batchnorm.operator import RankTwo
from persample.batchnorm.plots import plot_decay, plot_layers, plot_notions, plot_spectrum
from persample.batchnorm.sensitivity import LeaveOneOut, TrainEvalGap, WeightDerivatives

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormJacobian",
    "LeaveOneOut",
    "RankTwo",
    "Spectrum",
    "TrainEvalGap",
    "WeightDerivatives",
    "convert",
    "jacobian",
    "linearize",
    "plot_decay",
    "plot_layers",
    "plot_notions",
    "plot_spectrum",
    "revert",
    "uses_batch_statistics",
]
