"""The Jacobian of one BatchNorm layer, as the structured operator it is.

Per channel, with ``M`` values that are normalised together, ``v`` their biased variance, ``s = sqrt(v + eps)`` and
``xh = (x - mean) / s``, a BatchNorm that uses the statistics of the batch has the Jacobian

    J = d y / d x = (weight / s) (I - 11^T / M - xh xh^T / M):

a scaled identity minus rank two. Each of its eigenvectors has a meaning: a shift of the whole batch (``1``) does not
move the output at all, a change of its scale (``xh``) almost not, ``eps / (v + eps)``, and on the other ``M - 2``
directions the layer is multiplication by ``weight / s``. The rank-two part is all that links the samples. So ``xh`` and
a handful of numbers per channel hold everything, and every method below is a short formula in them, ``O(M)`` in time
and memory.

* ``operator.py``: scaled identity minus rank two, as linear algebra (products, blocks, block norms)
* ``linearize.py``: which numbers a layer and its input put there
* here: what follows from them: the spectrum, parameters, curvature
* ``sensitivity.py``: what becomes of the statistics without a sample, with other weights, in evaluation mode
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persample.batchnorm import display, sensitivity
from persample.batchnorm.operator import RankTwo, group_sum
from persample.errors import BatchNormError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a symmetric operator per channel: ``values[c, k]`` occurs ``multiplicity[k]`` times."""

    values: Tensor  # [C, K]
    multiplicity: Tensor  # [K], at least 1; they sum to M

    def expand(self) -> Tensor:
        """Every eigenvalue as often as it occurs, ascending, ``[C, M]``, as ``torch.linalg.eigvalsh`` gives them."""
        return self.values.repeat_interleave(self.multiplicity, 1).sort(1).values


@dataclass(frozen=True, eq=False, repr=False)
class BatchNormJacobian:
    """``J = d y / d x`` of one BatchNorm layer at one input ``x [N, C, *S]``: symmetric, no two channels mix.

    ``J @ v`` takes and gives tensors shaped like ``x`` (with leading dimensions for several at once) and equals what
    autograd gives for that layer, forward or backward. Nothing is ever dense but ``dense()``. Quantities of the
    spectrum (``rank``, ``trace``, ...) are per channel, ``[C]``: what ``torch.linalg`` says of the batch of matrices
    ``dense() [C, M, M]``.

    In evaluation mode (``coupled`` is False) ``J`` is diagonal, and everything that links two samples is exactly 0.
    With ghost batches (``G > 1`` groups of samples with statistics of their own) ``J`` is block diagonal over the
    groups.

    Everything is detached: nothing here is differentiable with respect to the layer or its input. Half precision inputs
    are computed in float32. Get one from :func:`jacobian`, :func:`linearize` or the ``jacobian`` of a converted module.
    """

    normed: Tensor  # [N, C, *S], xh
    mean: Tensor  # [G, C], the statistics used: those of the groups, or the running ones (G = 1)
    variance: Tensor  # [G, C], biased when they are those of the batch
    group: Tensor  # [N], which group a sample belongs to
    eps: float
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    coupled: bool  # whether the statistics are those of the batch

    # -- the numbers everything is made of

    @property
    def scale(self) -> Tensor:
        """``weight / sqrt(variance + eps)``, ``[G, C]``: the factor of the identity in ``J``."""
        return (1.0 if self.weight is None else self.weight) / self.deviation

    @property
    def deviation(self) -> Tensor:
        """``s = sqrt(variance + eps)``, ``[G, C]``."""
        return (self.variance + self.eps).sqrt()

    @property
    def shrinkage(self) -> Tensor:
        """``eps / (variance + eps) = 1 - |xh|^2 / M``, ``[G, C]``: what ``J / scale`` leaves of ``xh``."""
        return self.eps / (self.variance + self.eps)

    @property
    def operator(self) -> RankTwo:
        """``J`` as scaled identity minus rank two."""
        scale = self.scale
        shared = torch.full_like(scale, float(self.coupled))
        return RankTwo(scale, shared, shared, self.normed, self.group)

    @property
    def output(self) -> Tensor:
        """What the layer returns, ``[N, C, *S]``."""
        return self.affine(self.normed)

    def affine(self, normed: Tensor) -> Tensor:
        """``weight * normed + bias`` for any ``normed [..., N, C, *S]``."""
        shape = (-1, *[1] * (self.normed.ndim - 2))
        scaled = normed if self.weight is None else normed * self.weight.view(shape)
        return scaled if self.bias is None else scaled + self.bias.view(shape)

    # -- as a linear operator

    def __matmul__(self, v: Tensor) -> Tensor:
        """``J v``, shaped like ``v [..., N, C, *S]``: the output's change when the input moves along ``v``."""
        return self.operator @ v

    @property
    def T(self) -> BatchNormJacobian:
        """The transpose, ``J`` itself: ``J.T @ g`` is BatchNorm's backward pass."""
        return self

    def dense(self) -> Tensor:
        """``J`` as ``[C, M, M]``, ``M = N x positions`` with samples outermost. For small inputs: ``O(C M^2)``."""
        return self.operator.dense()

    def diagonal(self) -> Tensor:
        """``d y_i / d x_i``, shaped like the input; 0 for a value alone against all the others (at ``eps = 0``)."""
        return self.operator.diagonal()

    def block(self, n: int, m: int) -> Tensor:
        """``d y_n / d x_m``, ``[C, P, P]``: how sample ``m`` moves sample ``n``. Rank at most 2 unless ``n == m``."""
        return self.operator.block(n, m)

    def block_norms(self, per_channel: bool = False) -> Tensor:
        """``|d y_n / d x_m|_F``, ``[N, N]`` over all channels, or ``[C, N, N]``: how this layer couples the samples.

        Closed form, ``O(M + C N^2)``; off the diagonal of the order ``1 / N``, and exactly 0 in evaluation mode and
        between ghost batches.
        """
        return self.operator.block_norms(per_channel)

    def coupling_share(self) -> Tensor:
        """Share of ``|J|_F^2`` that lies between different samples, ``[C]``, from 0 to 1.

        About ``2 / N`` for inputs ``[N, C]``. NaN for a channel with ``J = 0`` (zero weight).
        """
        operator, energy = self.operator, self.frobenius_norm().square()
        if self.coupled and int(operator.count.max()) == 2:  # all of J is a difference of what is nearly equal
            return (0.5 if operator.positions == 1 else 0.0) * energy / energy
        shared, own = operator.shared_energy()
        return (shared - own).clamp(min=0) / energy

    def to_scipy(self) -> LinearOperator:
        """``J`` on flattened inputs, ``[N C S, N C S]``, as ``scipy.sparse.linalg.LinearOperator`` (needs scipy)."""
        return self.operator.to_scipy()

    # -- spectrum

    def eigenvalues(self) -> Spectrum:
        """``Spectrum(values [C, K], multiplicity [K])``, in closed form.

        For each group 0 (once, a shift), ``scale * shrinkage`` (once, a change of scale) and ``scale`` (``M - 2``
        times, absent when ``M = 2``); in evaluation mode ``scale``, ``M`` times. ``.expand()`` gives the ``M``
        eigenvalues one by one.
        """
        scale, count = self.scale, self.operator.count
        if not self.coupled:
            return Spectrum(scale.T, count[:, 0])
        once = torch.ones_like(count)
        values = torch.cat([torch.zeros_like(scale), scale * self.shrinkage, scale])
        multiplicity = torch.cat([once, once, count - 2])[:, 0]
        present = multiplicity > 0
        return Spectrum(values[present].T, multiplicity[present])

    def rank(self) -> Tensor:
        """``[C]``, int64: ``M - 1`` per group (``M - 2`` for ``eps = 0``), 0 for a zero weight.

        The rank of the formula, not that of rounded numbers up to a tolerance.
        """
        spectrum = self.eigenvalues()
        return ((spectrum.values != 0) * spectrum.multiplicity).sum(1)

    def trace(self) -> Tensor:
        """``[C]``: ``scale (M - 2 + shrinkage)``, summed over the groups."""
        spectrum = self.eigenvalues()
        return (spectrum.values * spectrum.multiplicity).sum(1)

    def frobenius_norm(self) -> Tensor:
        """``[C]``: ``|scale| sqrt(M - 2 + shrinkage^2)``."""
        spectrum = self.eigenvalues()
        return (spectrum.values.square() * spectrum.multiplicity).sum(1).sqrt()

    def determinant(self) -> Tensor:
        """``[C]``: exactly 0 in training mode (a shift is lost); ``scale ** M`` in evaluation mode.

        That power may under- or overflow.
        """
        spectrum = self.eigenvalues()
        return (spectrum.values**spectrum.multiplicity).prod(1)

    def pinv(self) -> RankTwo:
        """The Moore-Penrose pseudo-inverse, an operator of the same form: ``@``, ``dense()``, ``block_norms()``, ...

            (1 / scale) (I - 11^T/M + (v + eps) / eps xh xh^T/M),    with the coefficient -1 of xh xh^T/M at eps = 0

        and zero for a channel whose weight is zero. The condition number of ``J`` on its range is ``(v + eps) / eps``:
        in float32 and with the usual ``eps = 1e-5`` the component along ``xh`` is only good to a few per cent.
        """
        scale, shrinkage = self.scale, self.shrinkage
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        ones = torch.full_like(scale, float(self.coupled))
        slope = torch.where(shrinkage == 0, 1.0, -1 / shrinkage) * ones
        return RankTwo(inverse, ones, slope, self.normed, self.group)

    def solve(self, v: Tensor) -> Tensor:
        """The ``u`` of least norm among those that minimise ``|J u - v|``, shaped like ``v``; ``pinv() @ v``.

        The residual ``J u - v`` is what no change of the input reaches: the channel means of ``v`` (per group), its
        component along ``xh`` for ``eps = 0``, and all of a channel whose weight is 0.
        """
        return self.pinv() @ v

    def leverage(self) -> Tensor:
        """``[N, C]``: share of sample ``n`` in the two statistics, the sum of ``(1 + xh^2) / M`` over its positions.

        For inputs ``[N, C]`` and ``eps = 0`` the leverage of ordinary least squares on ``(1, x)``, between ``1 / M``
        and 1; a sample's own block has the trace ``scale (P - leverage)``. Sums to ``1 + |xh|^2 / M``, at most 2, per
        group. 0 in evaluation mode.
        """
        operator = self.operator
        squares = self.normed.reshape(*self.normed.shape[:2], -1).square().sum(-1)
        count = operator.count[self.group]
        return (operator.positions + squares) / count * float(self.coupled)

    # -- parameters and curvature

    def weight_jacobian(self) -> Tensor:
        """``d y_i / d weight_c = xh_i`` where ``i`` is in channel ``c``, else 0: ``[N, C, *S]``.

        Raises ``BatchNormError`` if the layer has no weight.
        """
        if self.weight is None:
            raise BatchNormError("this BatchNorm has no weight (affine=False); the normalised input is `.normed`")
        return self.normed

    def bias_jacobian(self) -> Tensor:
        """``d y_i / d bias_c = 1`` where ``i`` is in channel ``c``, else 0: ``[N, C, *S]``.

        Raises ``BatchNormError`` if the layer has no bias.
        """
        if self.bias is None:
            raise BatchNormError("this BatchNorm has no bias (affine=False or bias=False)")
        return torch.ones_like(self.normed)

    def second_derivative(self, u: Tensor, v: Tensor) -> Tensor:
        """``d^2 y [u, v]``, ``[..., N, C, *S]``: the second derivative, contracted with two directions of that shape.

        Per channel ``-(weight / (M s)) (xh u^T A v + A u xh^T v + A v xh^T u)`` with ``A = J / weight``: the tensor
        behind it is fully symmetric, since ``xh`` is itself the gradient of the convex ``M sqrt(variance + eps)``. 0 in
        evaluation mode.
        """
        if not self.coupled:
            return torch.zeros_like(self @ u) + torch.zeros_like(self @ v)
        shared = torch.ones_like(self.deviation)
        hessian = RankTwo(1 / self.deviation, shared, shared, self.normed, self.group)
        hu, hv = hessian @ u, hessian @ v
        bend = self.normed * self._inner(u, hv) + hu * self._inner(self.normed, v) + hv * self._inner(self.normed, u)
        return -self._like_input(self.scale / hessian.count) * bend

    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        """``<u, v>`` per group and channel, in a form that broadcasts against ``[..., N, C, *S]``."""
        product = u * v
        several = product.shape[: product.ndim - self.normed.ndim]
        sums = product.reshape(*several, *self.normed.shape[:2], -1).sum(-1)
        return self._like_input(group_sum(sums, self.group, len(self.mean)))

    def _like_input(self, statistic: Tensor) -> Tensor:
        """``[..., G, C]`` as ``[..., N, C, 1, ...]``."""
        rows = statistic.index_select(-2, self.group)
        return rows.reshape(*rows.shape, *[1] * (self.normed.ndim - 2))

    # -- other batches, other modes

    def leave_one_out(self) -> sensitivity.LeaveOneOut:
        """Exact ``mean`` and ``variance [N, C]`` without each sample, and ``outputs(n)``: see :class:`LeaveOneOut`."""
        return sensitivity.leave_one_out(self)

    def sample_weight_derivatives(self) -> sensitivity.WeightDerivatives:
        """``d mean`` and ``d variance`` by ``d w_n``, ``[N, C]``; ``outputs(n)``: see :class:`WeightDerivatives`."""
        return sensitivity.sample_weight_derivatives(self)

    def train_eval_gap(
        self, running_mean: Tensor | None = None, running_var: Tensor | None = None
    ) -> sensitivity.TrainEvalGap:
        """How evaluation mode would change the output of this batch: see :class:`TrainEvalGap`.

        By default with the running statistics that this very batch leaves behind at ``momentum=1``; what remains is
        that the running variance is unbiased while training mode divides by ``M``. Or with those given, ``[C]`` each.
        """
        return sensitivity.train_eval_gap(self, running_mean, running_var)

    # -- to be looked at

    def plot(self, ax: Axes | None = None, diagonal: bool = False) -> Axes:
        """Heat map of ``block_norms()``, ``[N, N]``, on ``ax`` or a new figure; returns the axes. Needs matplotlib.

        The diagonal, about ``N`` times the rest, is left out unless asked for.
        """
        return display.plot(self, ax, diagonal)

    def __repr__(self) -> str:
        return f"BatchNormJacobian({', '.join(f'{name}: {value}' for name, value in display.summary(self).items())})"

    def _repr_html_(self) -> str:
        return display.html(self)
