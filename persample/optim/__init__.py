"""Optimizers that use the gradient of every sample: ``opt.step(G)`` in the place of ``loss.backward(); opt.step()``.

They are ordinary `torch.optim.Optimizer` (groups, schedulers, ``state_dict``) built from ``model.named_parameters()``:

>>> import torch, persample
>>> from persample.optim import ClippedSGD
>>> model = torch.nn.Linear(3, 2)
>>> opt = ClippedSGD(model.named_parameters(), lr=0.1, max_norm=1.0)
>>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
>>> opt.step(persample.gradients(model, torch.nn.CrossEntropyLoss(), x, y))

``lr`` is that of the *mean* loss.  ``.grad`` is neither read nor written.

Every step is that of one process: for the parameters of a `DistributedDataParallel` of several it is refused.
"""

from __future__ import annotations

from .adam import PerSampleAdam, group_second_moment
from .batch_size import AdaptiveBatchSize, by_cabs, by_noise_scale, by_norm_test
from .clipped import ClippedAdam, ClippedSGD
from .weighted import GradientSurgery, NaturalGradient, natural_weights, pcgrad_weights, surgery_weights

__all__ = [
    "AdaptiveBatchSize",
    "ClippedAdam",
    "ClippedSGD",
    "GradientSurgery",
    "NaturalGradient",
    "PerSampleAdam",
    "by_cabs",
    "by_noise_scale",
    "by_norm_test",
    "group_second_moment",
    "natural_weights",
    "pcgrad_weights",
    "surgery_weights",
]
