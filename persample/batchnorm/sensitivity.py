"""What becomes of a BatchNorm's statistics and outputs in another batch or mode, exactly, from ``xh`` alone.

With ``m_n`` the mean of sample ``n`` over its positions and ``q_n`` its mean square distance from the batch mean (per
channel), a sample enters the statistics of its group of ``N`` samples through these two numbers only:

* without it, ``mean - (m_n - mean) / (N - 1)`` and ``(N variance - q_n) / (N - 1) - ((m_n - mean) / (N - 1))^2``;
* with weights ``w`` in both, ``d mean / d w_n = (m_n - mean) / N`` and ``d variance / d w_n = (q_n - variance) / N``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from persample.errors import BatchNormError

if TYPE_CHECKING:
    from persample.batchnorm.jacobian import BatchNormJacobian


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Statistics of every group without sample ``n``, ``[N, C]``: row ``n`` is about the batch that lacks it."""

    mean: Tensor  # [N, C]
    variance: Tensor  # [N, C], biased
    jacobian: BatchNormJacobian

    def outputs(self, n: int) -> Tensor:
        """The outputs of the whole batch when sample ``n`` does not count in the statistics, ``[N, C, *S]``.

        Row ``n`` is that sample's own output, normalised by the others. Samples of other groups keep theirs.
        """
        J = self.jacobian
        member = (J.group == J.group[n])[:, None]
        mean = torch.where(member, self.mean[n], J.mean[J.group])
        variance = torch.where(member, self.variance[n], J.variance[J.group])
        return _normalise(J, mean, variance)

    def own_outputs(self) -> Tensor:
        """Every sample normalised by the statistics of all the others, ``[N, C, *S]``: row ``n`` of ``outputs(n)``."""
        return _normalise(self.jacobian, self.mean, self.variance)


@dataclass(frozen=True, eq=False)
class WeightDerivatives:
    """Derivatives of its group's statistics in the weight ``w_n`` of each sample, at ``w = 1``, ``[N, C]``.

    ``mean = sum w m / sum w`` and ``variance = sum w q / sum w``; the rows of a group sum to 0, as a common factor of
    all weights is no change.
    """

    mean: Tensor  # [N, C]
    variance: Tensor  # [N, C]
    jacobian: BatchNormJacobian

    def outputs(self, n: int) -> Tensor:
        """``d y / d w_n`` of the batch, ``[N, C, *S]``: to first order, outputs without ``n`` are ``y`` less it."""
        J = self.jacobian
        member = (J.group == J.group[n])[:, None]
        shift = torch.where(member, self.mean[n], 0.0)
        stretch = torch.where(member, self.variance[n], 0.0) / (2 * J.deviation[J.group])
        return -_spread(J.scale[J.group], J) * (_spread(shift, J) + _spread(stretch, J) * J.normed)


class TrainEvalGap(NamedTuple):
    """Evaluation mode normalises this batch to ``scale * xh + shift`` instead of ``xh``."""

    scale: Tensor  # [G, C], sqrt(variance + eps) / sqrt(running_var + eps)
    shift: Tensor  # [G, C], (mean - running_mean) / sqrt(running_var + eps)
    output: Tensor  # [N, C, *S], output in evaluation mode minus output in training mode


def leave_one_out(J: BatchNormJacobian) -> LeaveOneOut:
    """The formulas at the top; a sample that carries nearly all of the variance is left out by counting again.

    Raises ``BatchNormError`` if a group has a single sample. In evaluation mode nothing changes.
    """
    mean, variance = J.mean[J.group], J.variance[J.group]
    if not J.coupled:
        return LeaveOneOut(mean, variance, J)
    samples = torch.bincount(J.group)
    if int(samples.min()) < 2:
        raise BatchNormError(
            "leave_one_out() needs two samples in every group: without its only one there are no statistics"
        )
    others = samples[J.group][:, None] - 1
    offset, square = _sample_moments(J)
    without = ((others + 1) * variance - square) / others - (offset / others).square()
    for n, c in (
        (without < variance / 16).nonzero().tolist()
    ):  # cancellation; with 3 samples or more, one n per c at most
        rest = J.group == J.group[n]
        rest[n] = False
        without[n, c] = J.normed[rest, c].var(correction=0) * J.deviation[J.group[n], c].square()
    return LeaveOneOut(mean - offset / others, without, J)


def sample_weight_derivatives(J: BatchNormJacobian) -> WeightDerivatives:
    """``(m_n - mean) / N`` and ``(q_n - variance) / N``; 0 in evaluation mode."""
    samples = torch.bincount(J.group)[J.group][:, None]
    offset, square = _sample_moments(J)
    coupled = float(J.coupled)
    return WeightDerivatives(coupled * offset / samples, coupled * (square - J.variance[J.group]) / samples, J)


def train_eval_gap(J: BatchNormJacobian, running_mean: Tensor | None, running_var: Tensor | None) -> TrainEvalGap:
    """See ``BatchNormJacobian.train_eval_gap``. Raises ``BatchNormError`` in evaluation mode: there is no batch
    statistic; and for running statistics that are not ``[C]``.
    """
    if not J.coupled:
        raise BatchNormError(
            "train_eval_gap() compares batch with running statistics; this Jacobian is in evaluation mode"
        )
    for name, given in (("running_mean", running_mean), ("running_var", running_var)):
        if given is not None and (not isinstance(given, Tensor) or given.shape != J.mean.shape[1:]):
            got = list(given.shape) if isinstance(given, Tensor) else repr(given)
            raise BatchNormError(f"{name} must be a tensor {list(J.mean.shape[1:])}, one number per channel, got {got}")
    count = J.operator.count
    mean = J.mean if running_mean is None else running_mean.detach().to(J.mean)[None]
    variance = J.variance * count / (count - 1) if running_var is None else running_var.detach().to(J.mean)[None]
    deviation = (variance + J.eps).sqrt()
    scale, shift = J.deviation / deviation, (J.mean - mean) / deviation
    normed = _spread(scale[J.group], J) * J.normed + _spread(shift[J.group], J)
    return TrainEvalGap(scale, shift, J.affine(normed) - J.output)


def _sample_moments(J: BatchNormJacobian) -> tuple[Tensor, Tensor]:
    """``m_n - mean`` and ``q_n``, ``[N, C]`` each."""
    rows, deviation = J.normed.reshape(*J.normed.shape[:2], -1), J.deviation[J.group]
    return rows.mean(2) * deviation, rows.square().mean(2) * deviation.square()


def _normalise(J: BatchNormJacobian, mean: Tensor, variance: Tensor) -> Tensor:
    """Outputs of the batch with statistics ``[N, C]`` of one's choice per sample."""
    own = J.group
    centred = J.normed * _spread(J.deviation[own], J) + _spread(J.mean[own] - mean, J)
    return J.affine(centred / _spread((variance + J.eps).sqrt(), J))


def _spread(statistic: Tensor, J: BatchNormJacobian) -> Tensor:
    """``[N, C]`` in a form that broadcasts against ``[N, C, *S]``."""
    return statistic.reshape(*statistic.shape, *[1] * (J.normed.ndim - 2))
