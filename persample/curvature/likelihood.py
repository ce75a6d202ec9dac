"""The distribution that a loss is the negative logarithm of, and output gradients of targets sampled from it.

The loss is not asked for its name: its *Hessian* with respect to the outputs is compared with that of the known
families, each with non-negative weights ``w`` (``1/O`` for a mean over ``O`` outputs, zero for ignored targets, ...).

===========  ===============================  ==========================  ==========================
family       losses, for instance             Hessian                     sampled output gradient
===========  ===============================  ==========================  ==========================
categorical  cross entropy over axis 1 or -1  ``w (diag(p) - p p^T)``     ``sqrt(w) (p - onehot(y))``
gaussian     mean or sum of squared errors    ``w I``                     ``sqrt(w) normal``
bernoulli    BCE with logits                  ``w diag(p (1 - p))``       ``sqrt(w) (p - y)``
===========  ===============================  ==========================  ==========================

So the second moment of sampled gradients is the loss Hessian, whatever the scale of the loss, and the Fisher matrix is
the Gauss-Newton matrix.  (``nn.MSELoss`` of ``O`` outputs, ``|f - y|^2 / O``, is thereby read as the negative
log-likelihood of a Gaussian with variance ``O/2``; a mean over ``T`` tokens as ``T`` tokens that count ``1/T`` each.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LossError

Product = Callable[[Tensor], Tensor]  # [N, ...] -> [N, ...]


@dataclass(frozen=True)
class Likelihood:
    """A family at outputs ``f [N, ...]`` with weights ``w`` that broadcast against ``f``."""

    family: str
    outputs: Tensor
    weight: Tensor
    axis: int  # of the classes; unused for the others

    def curvature(self, v: Tensor) -> Tensor:
        """The Hessian of the losses, times ``v``, ``[N, ...]``."""
        p = self._mean()
        if self.family == "categorical":
            return self.weight * p * (v - (p * v).sum(self.axis, keepdim=True))
        return self.weight * (v if self.family == "gaussian" else p * (1 - p) * v)

    def draws(self, samples: int, seed: int) -> Tensor:
        """``[samples, N, ...]``: `sample` after `sample`, from a generator of their own."""
        generator = torch.Generator(self.outputs.device).manual_seed(seed)
        return torch.stack([self.sample(generator) for _ in range(samples)])

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Output gradients ``u [N, ...]`` at targets drawn from the model; ``E[u_n u_n^T]`` is the loss Hessian."""
        p = self._mean()
        if self.family == "gaussian":
            noise = torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        elif self.family == "bernoulli":
            noise = p - torch.bernoulli(p, generator=generator)
        else:
            classes = p.movedim(self.axis, -1)
            drawn = torch.multinomial(classes.reshape(-1, classes.shape[-1]), 1, generator=generator)
            onehot = torch.zeros_like(classes).scatter_(-1, drawn.view(*classes.shape[:-1], 1), 1)
            noise = p - onehot.movedim(-1, self.axis)
        return (self.weight.sqrt() * noise).to(self.outputs.dtype)

    def _mean(self) -> Tensor:
        """The expected target."""
        f = wide(self.outputs)
        if self.family == "categorical":
            return f.softmax(self.axis)
        return f if self.family == "gaussian" else f.sigmoid()


def wide(x: Tensor) -> Tensor:
    """Half precision in float32: what is compared with a tolerance, summed over the batch, or has its eigenvalues
    taken.
    """
    return x.float() if x.dtype.itemsize < 4 else x


def check_finite(curvature: Tensor) -> None:
    """Raise for a loss Hessian that isn't."""
    if not bool(curvature.isfinite().all()):
        raise LossError(
            "the Hessian of the losses with respect to the outputs has entries that are NaN or infinite: look for such "
            "values in inputs, targets, parameters and outputs."
        )


def identify(outputs: Tensor, hessian_at: Callable[[Tensor], Product]) -> Likelihood:
    """The family whose curvature the losses have at ``outputs [N, ...]``.

    ``hessian_at(f)`` multiplies by the Hessian of the summed losses at outputs ``f``; in float32 for half precision,
    in which families can't be told apart.

    Raises:
        LossError: if it is none of the known ones.
    """
    if outputs.is_complex():
        raise LossError(
            "the outputs are complex, and loss_fn is the negative log-likelihood of no known distribution over complex "
            "numbers, so there is nothing to sample targets from. Give outputs as real ones (torch.view_as_real in the "
            "model); or use the empirical Fisher matrix or hvp."
        )
    zero = torch.zeros_like(outputs)
    product, at_zero = hessian_at(outputs), hessian_at(zero)
    probe = torch.arange(outputs.numel(), dtype=wide(zero).dtype, device=outputs.device).view_as(outputs).sin() + 0.5
    actual = product(probe)
    check_finite(actual)
    for likelihood in _candidates(outputs, at_zero):
        weight = likelihood.weight
        if bool((weight >= 0).all()) and bool((weight > 0).any()):
            expected = likelihood.curvature(probe)
            tolerance = 1e3 * torch.finfo(probe.dtype).eps * float(weight.max()) * float(probe.abs().max())
            if bool(((expected - actual).abs() <= tolerance).all()):
                return likelihood
    if not bool(at_zero(torch.ones_like(probe)).any() | at_zero(probe).any() | actual.any()):
        raise LossError(
            "the losses of this batch have no curvature in the outputs (every target is ignored, or the loss is "
            "piecewise linear in them, as NLLLoss is behind a log-softmax in the model), so that no distribution of "
            "targets can be told from it. Let the model return logits for CrossEntropyLoss; leave such a batch out; or "
            "use ggn or kflr, which are zero there."
        )
    raise LossError(
        "loss_fn is not the negative log-likelihood of a categorical, Gaussian or Bernoulli distribution with the "
        "outputs as its logits or mean (cross entropy, squared error, binary cross entropy with logits), so there is "
        "nothing to sample targets from. Use the Gauss-Newton matrix (ggn, kflr), or the empirical one."
    )


def _candidates(outputs: Tensor, at_zero: Product) -> list[Likelihood]:
    """Weights from the Hessian at zero outputs, where every family's is known and nothing is saturated."""
    like = wide(outputs)
    ones = at_zero(torch.ones_like(like))
    found = [Likelihood("gaussian", outputs, ones, 0), Likelihood("bernoulli", outputs, 4 * ones, 0)]
    for axis in dict.fromkeys((1, outputs.ndim - 1)):
        if outputs.ndim > 1 and (classes := outputs.shape[axis]) > 1:
            first = torch.zeros_like(like)
            first.select(axis, 0).fill_(1)
            slope = at_zero(first).narrow(axis, 0, 1)
            found.append(Likelihood("categorical", outputs, slope / ((1 - 1 / classes) / classes), axis))
    return found
