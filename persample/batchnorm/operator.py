"""Scaled identity minus rank two, per channel and group: the one shape every matrix of a BatchNorm layer has.

For a channel whose values are normalised together,

    A = scale (I - ones 11^T / M - slope xh xh^T / M),

with ``xh`` the normalised input of the channel and ``M`` the number of values that share the statistics. The Jacobian
of a training-mode BatchNorm has ``ones = slope = 1``; that of evaluation mode ``ones = slope = 0``; the pseudo-inverse
another ``slope``. Channels never mix, and neither do groups of the batch with statistics of their own (ghost batches).

Everything costs ``O(M)`` per channel in time and memory, except ``dense`` and the ``N x N`` table of ``block_norms``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persample.errors import BatchNormError
from persample.scratch import kernel

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

CACHED = 2**17  # elements of a temporary that stays in the cache


def group_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum over the samples of each group, ``[..., N, C] -> [..., G, C]``."""
    if groups == 1:
        return values.sum(-2, keepdim=True)
    zeros = values.new_zeros(*values.shape[:-2], groups, values.shape[-1])
    return zeros.index_add(-2, group, values)


@dataclass(frozen=True, eq=False, repr=False)
class RankTwo:
    """``scale (I - ones 11^T/M - slope xh xh^T/M)``: a symmetric operator on tensors shaped like the input, ``[N, C,
    *S]``.
    """

    scale: Tensor  # [G, C]
    ones: Tensor  # [G, C]
    slope: Tensor  # [G, C]
    normed: Tensor  # [N, C, *S], xh
    group: Tensor  # [N], which of the G groups a sample belongs to

    def __matmul__(self, v: Tensor) -> Tensor:
        """``A v`` for ``v [..., N, C, *S]``; leading dimensions are a batch of vectors."""
        rows, normed = self._positions_last(v), self._positions_last(self.normed)
        mean = self.ones / self.count * self._sum(rows.sum(-1))
        slope = self.slope / self.count * self._sum((rows * normed).sum(-1))
        product = torch.addcmul(-self._rows(self.scale * mean), rows, self._rows(self.scale))
        return torch.addcmul(product, self._rows(self.scale * slope), normed, value=-1).reshape(v.shape)

    @property
    def T(self) -> RankTwo:
        """The transpose: the operator is symmetric."""
        return self

    @property
    def count(self) -> Tensor:
        """``M`` of each group, ``[G, 1]``: samples of the group times positions."""
        samples = torch.bincount(self.group, minlength=len(self.scale))
        return samples[:, None] * self.positions

    @property
    def positions(self) -> int:
        """How many values one sample has per channel."""
        return self.normed[0, 0].numel()

    def dense(self) -> Tensor:
        """``[C, M, M]``, ``M = N x positions`` of the whole batch, samples outermost: the only ``O(M^2)`` method."""
        normed = self._positions_last(self.normed).movedim(1, 0).flatten(1)  # [C, M]
        scale, ones, slope = (
            self._samples(a).T.repeat_interleave(self.positions, 1)[:, :, None]
            for a in (self.scale, self.ones / self.count, self.slope / self.count)
        )
        member = self.group.repeat_interleave(self.positions)
        shared = (ones + slope * normed[:, :, None] * normed[:, None, :]) * (member[:, None] == member)
        return scale * (torch.eye(len(member), dtype=normed.dtype, device=normed.device) - shared)

    def diagonal(self) -> Tensor:
        """The diagonal entries ``d y_i / d x_i``, shaped like the input, ``[N, C, *S]``."""
        normed = self._positions_last(self.normed)
        shared = self._rows(self.ones / self.count) + self._rows(self.slope / self.count) * normed.square()
        return (self._rows(self.scale) * (1 - shared)).reshape(self.normed.shape)

    def block(self, n: int, m: int) -> Tensor:
        """How sample ``m`` moves sample ``n``, ``[C, P, P]`` with ``P`` the positions of a sample (1 for inputs ``[N,
        C]``).
        """
        n, m = range(len(self.group))[n], range(len(self.group))[m]
        normed = self._positions_last(self.normed)
        a, b = normed[n], normed[m]  # [C, P] each
        if self.group[n] != self.group[m]:
            return a.new_zeros(*a.shape, a.shape[1])
        scale, ones, slope = (
            self._samples(t)[n][:, None, None] for t in (self.scale, self.ones / self.count, self.slope / self.count)
        )
        own = torch.eye(a.shape[1], dtype=a.dtype, device=a.device) if n == m else 0.0
        return scale * (own - ones - slope * a[:, :, None] * b[:, None, :])

    @kernel
    def block_norms(self, per_channel: bool = False) -> Tensor:
        """Frobenius norms of the blocks, ``[N, N]`` over all channels together, or ``[C, N, N]``.

        In closed form from two numbers per sample and channel. With ``a`` the mean of ``xh`` over the positions of a
        sample and ``r`` the sum of squares around it, ``ones 11^T + slope xh_n xh_m^T`` has the squared norm

            P^2 (ones + slope a_n a_m)^2 + slope^2 (P a_n^2 r_m + P a_m^2 r_n + r_n r_m):

        no term is negative, so norms that vanish come out as zero, not as the square root of the rounding error.
        """
        numbers = self._block_numbers()
        if not per_channel:
            return _squared_norms(self.positions, self.group, *numbers).sqrt()
        single = zip(*(t.split(1, dim=1) for t in numbers), strict=True)
        return torch.stack([_squared_norms(self.positions, self.group, *channel) for channel in single]).sqrt()

    def shared_energy(self) -> tuple[Tensor, Tensor]:
        """``|scale (ones 11^T + slope xh xh^T) / M|_F^2``, ``[C]``: of all of it, and of its diagonal blocks."""
        scale, count, a, r, ones, slope = self._block_numbers()
        P = self.positions
        own = P**2 * (ones + slope * a**2) ** 2 + slope**2 * (2 * P * a**2 + r) * r
        total = self.ones**2 + (self.slope / self.count * self._sum(P * a**2 + r)) ** 2
        return (self.scale**2 * total).sum(0), ((scale / count) ** 2 * own).sum(0)

    def to_scipy(self) -> LinearOperator:
        """The operator on flattened inputs, ``[N C S, N C S]``, for ``scipy.sparse.linalg``. Needs scipy."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs scipy: pip install persample[scipy]") from error

        def product(v: object) -> object:
            vector = torch.as_tensor(v, dtype=self.normed.dtype, device=self.normed.device)
            return (self @ vector.reshape(self.normed.shape)).flatten().cpu().numpy()

        size = self.normed.numel()
        dtype = self.normed.new_empty(0).cpu().numpy().dtype
        return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=dtype)

    def _block_numbers(self) -> tuple[Tensor, ...]:
        """``scale``, ``M``, mean of ``xh`` over positions, square sum around it, ``ones``, ``slope``: ``[N, C]``."""
        normed = self._positions_last(self.normed)
        mean = normed.mean(-1)
        spread = (normed - mean[..., None]).square().sum(-1)
        scale, count, ones, slope = (
            self._samples(t) for t in (self.scale, self.count.expand_as(self.scale), self.ones, self.slope)
        )
        return scale, count, mean, spread, ones, slope

    def _sum(self, values: Tensor) -> Tensor:
        return group_sum(values, self.group, len(self.scale))

    def _samples(self, statistic: Tensor) -> Tensor:
        """One row per sample instead of one per group, ``[..., G, C] -> [..., N, C]``."""
        return statistic.index_select(-2, self.group)

    def _rows(self, statistic: Tensor) -> Tensor:
        """``[..., G, C]`` in a form that broadcasts against ``[..., N, C, P]``."""
        return (statistic if len(self.scale) == 1 else self._samples(statistic))[..., None]

    def _positions_last(self, v: Tensor) -> Tensor:
        """``[..., N, C, *S] -> [..., N, C, P]``."""
        shape = self.normed.shape
        if not isinstance(v, Tensor) or v.shape[v.ndim - len(shape) :] != shape:
            raise BatchNormError(
                f"a vector for this operator has the shape of the layer's input, {tuple(shape)}, with any leading "
                f"dimensions for several vectors; got {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
            )
        return v.reshape(*v.shape[: v.ndim - len(shape)], shape[0], shape[1], -1)


def _squared_norms(
    P: int, group: Tensor, scale: Tensor, count: Tensor, a: Tensor, r: Tensor, ones: Tensor, slope: Tensor
) -> Tensor:
    """Squared norms of the blocks, ``[N, N]``, summed over channels, from their ``_block_numbers``, ``[N, C]`` each."""
    weight = scale / count
    level, tilt = P * weight * ones, P * weight * slope * a
    norms = weight.new_empty(len(group), len(group))
    size = max(1, CACHED // a.numel())
    for n in range(0, len(group), size):  # expanding the square would make it one matrix product, and cancel
        rows = slice(n, n + size)
        norms[rows] = torch.addcmul(level[rows, None], tilt[rows, None], a).square_().sum(2)
    if P > 1:
        r_n, a_n = r * (weight * slope) ** 2, P * (weight * slope * a) ** 2
        norms += r_n @ (P * a**2 + r).T + a_n @ r.T
    norms *= group[:, None] == group
    # a sample's own block: I minus the shared part, in the basis (1, xh around its mean, the rest of the positions)
    own = (1 - P * (ones + slope * a**2) / count) ** 2
    if P > 1:
        own += 2 * P * r * (slope * a / count) ** 2 + (1 - slope * r / count) ** 2 + (P - 2)
    norms.diagonal().copy_((scale**2 * own).sum(1))
    return norms
