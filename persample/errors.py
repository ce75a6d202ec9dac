"""Everything the library refuses to do, by name; and how it warns.

Every message names the parameter, module, function or argument, the reason, and the way out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator

import torch


class PersampleError(Exception):
    """The parent of every error this library raises on purpose."""


class ArgumentError(PersampleError, ValueError):
    """An argument that is none of what it may be."""


class LossError(PersampleError, ValueError):
    """The losses are not one number per sample, and can't be made so."""


class SampleAxisError(PersampleError, ValueError):
    """A tensor has no sample axis, or not where it was said to be."""


class EmptyBatchError(PersampleError, ValueError):
    """There is no sample."""


class UnknownParameterError(PersampleError, KeyError):
    """A parameter name, pattern or selection that the model does not have."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class CaptureError(PersampleError, RuntimeError):
    """A parameter meets samples where the hook engine can't see or can't attribute it."""


class InplaceError(PersampleError, RuntimeError):
    """A recorded tensor was changed in place before its gradient was computed."""


class HigherOrderError(PersampleError, RuntimeError):
    """The model differentiates itself (``create_graph=True``), which the engine can't follow."""


class RandomnessError(PersampleError, RuntimeError):
    """A random draw of the forward pass can't be repeated by this engine."""


# The way out under BatchNorm.
NOTIONS = (
    "Say which is meant with persample.gradients(..., coupled=): 'loss' (the derivative of one loss: the plain "
    "meaning), 'influence' (what a sample's weight does: gradient noise, attribution), 'copy' (what hooks give: credit "
    "to a sample's activations), 'frozen' (statistics held fixed: curvature) or 'eval' (running statistics: what "
    "happens after training), see persample.coupling and docs/batchnorm.md; or call model.eval(). Under extend, "
    "gradients(losses, coupled=) has 'loss' and 'copy', and a handle none: give it the params= that are behind."
)

# The way out where something else couples.
RECORDED = (
    "The ordinary gradient of every loss of this batch is recorder.gradients(losses, coupled='loss') in a with-block, "
    "`with persample.extend(model) as recorder:`."
)


class BatchCoupledError(PersampleError, RuntimeError):
    """The loss of one sample depends on the other samples, so "its gradient" is not one thing.

    ``parameters`` names those that are coupled, where that is known.
    """

    def __init__(self, message: str, parameters: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parameters = parameters


class VerificationError(PersampleError, RuntimeError):
    """What the engine computed is not what the definition (one sample alone) gives."""


class QuantityError(PersampleError, ValueError):
    """A quantity that is unknown, was not asked for, or can't be had from what was kept."""


class EinsumError(PersampleError, ValueError):
    """An einsum expression that can't be read, or operands that don't fit it."""


class DirectionError(PersampleError, ValueError):
    """A vector that does not have the entries of the parameters."""


class KroneckerError(PersampleError, ValueError):
    """Parameters or losses for which there are no Kronecker factors."""


class BatchNormError(PersampleError, ValueError):
    """A BatchNorm layer, input or argument for which the structure asked for does not exist."""


class StoreError(PersampleError, ValueError):
    """Rows on disk that are of another model, layout, scale or projection, or that can't be gone on with."""


_OURS = (
    *(os.path.dirname(str(module.__file__)) + os.sep for module in (sys.modules[__package__], torch)),
    contextlib.__file__,  # between a with statement of ours, and what it enters
    functools.__file__,  # between whoever reads a cached property of ours, and what computes it
)


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """What the model or the criterion raises inside, with a note of what was done to them."""
    try:
        yield
    except PersampleError:
        raise
    except Exception as error:
        if hasattr(error, "add_note"):  # not before Python 3.11
            error.add_note(f"persample: {note}")
        raise


def warn(message: str) -> None:
    """A ``UserWarning`` at the line of the user's that led here: the first outside of this library and PyTorch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
