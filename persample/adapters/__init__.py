"""Plugs for other libraries, each a few lines over `persample.Gradients`, with that library's conventions converted.

=============  ============================================================================================
opacus         ``p.grad_sample [N, *P]`` for its ``DPOptimizer``: clipping, noise and accounting are Opacus'
torchjd        a ``Weighting`` of the Gram matrix, or an ``Aggregator`` of the rows, then one weighted sum
captum         an influence function whose embeddings are the rows
trak           a gradient computer for ``TRAKer``
dattri         the gradient function of an ``AttributionTask``
laplace        a curvature backend: ``gradients`` and ``jacobians``
curvlinops     our operators as ``PyTorchLinearOperator``
transformers   a ``TrainerCallback`` that logs gradient noise scale and norms
lightning      the same for Lightning
=============  ============================================================================================

Each module imports its library only when used, and says what to install.  Rows are gradients of unscaled losses.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

NAMES = ("captum", "curvlinops", "dattri", "laplace", "lightning", "opacus", "torchjd", "trak", "transformers")


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"no adapter {name!r}; there are {', '.join(NAMES)}")


def needed(module: str, package: str) -> Any:
    """The library an adapter is for, or an ImportError that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this adapter needs {package}: pip install {package}") from error
