"""Steps along ``w^T G`` where the weights ``w [N]`` come from the Gram matrix ``K = G G^T``: one Gram, one weighted
sum.

Natural gradients, gradient surgery and the aggregators of multi-objective optimization have this form.  Any function
from ``[N, N]`` to ``[N]`` is a weighting.  With another optimizer, write the direction into ``.grad``:
``G.backward(w)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_positive
from ..attribution.scores import influence_from_gram
from ..errors import ArgumentError, QuantityError
from ..quantities import Quantities, check_adds_up
from ..scratch import kernel
from .updates import Named, descend, started, summing

Weighting = Callable[[Tensor], Tensor]


# ---- natural gradient -------------------------------------------------------------------------------------------


@torch.no_grad()
def natural_weights(K: Tensor, damping: float) -> Tensor:
    """``w = (K/N + damping I)^-1 1/N``, ``[N]``: then ``w^T G = (G^T G/N + damping I)^-1 gbar``.

    The Woodbury identity: the ``[D, D]`` system of the empirical Fisher matrix ``G^T G/N`` (gradients of unscaled
    losses) is solved as an ``[N, N]`` one, in float64 by Cholesky.

    Raises:
        ArgumentError: ``damping`` is no positive number, or ``K`` no real ``[N, N]`` tensor.
        QuantityError: ``K`` has numbers that aren't finite, or is no Gram matrix (or one whose rounding errors are
            larger than ``N damping``).
    """
    check_gram(K)
    ones = torch.full((len(K), 1), 1 / len(K), dtype=torch.float64, device=K.device)
    return influence_from_gram(K, ones, damping).squeeze(1).to(K.dtype)


def check_gram(K: Any) -> None:
    """Raise for what is no square matrix of real numbers."""
    if not (isinstance(K, Tensor) and K.is_floating_point() and K.ndim == 2 and len(K) == K.shape[1] > 0):
        got = f"{K.dtype} {list(K.shape)}" if isinstance(K, Tensor) else type(K).__name__
        raise ArgumentError(
            f"K must be a Gram matrix [N, N] of real numbers, got {got}: of gradients G, it is G.gram()."
        )


class NaturalGradient(Named):
    """SGD along the natural gradient of the empirical Fisher matrix of the batch, ``(G^T G/N + damping I)^-1 gbar``.

    Amari 1998; in this form for batches, Ren and Goldfarb 2019, "Efficient subsampled Gauss-Newton and natural
    gradient methods for training neural networks".  It costs one Gram matrix and an ``[N, N]`` solve.  The empirical
    Fisher is not the Fisher (Kunstner et al. 2019): as training losses go to zero it vanishes with the gradients, and
    steps grow until ``damping`` holds them.

    ``step(G)`` takes `Gradients`.

    Args:
        params: ``model.named_parameters()``.
        lr: the length along the natural gradient.
        damping: added to the eigenvalues of ``G^T G/N``; large damping is SGD with learning rate ``lr/damping``.
        momentum, nesterov, weight_decay: as in `torch.optim.SGD`, of the natural gradient.
    """

    own = ("damping",)

    def __init__(
        self, params: Any, lr: float = 1e-1, *, damping: float = 1e-1, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        check_positive(damping=damping)
        self.damping = damping
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def step(self, G: Quantities | None = None, *, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the damped natural gradient of a batch."""
        if not started(self, G, closure):
            rows = summing(G)
            descend(self, rows.sum(natural_weights(rows.gram(), self.damping)))


# ---- gradient surgery -------------------------------------------------------------------------------------------


@kernel
def pcgrad_weights(K: Tensor) -> Tensor:
    """``w [N]`` of projected conflicting gradients: ``w^T G`` is the mean of the rows after surgery.

    Yu et al. 2020, "Gradient surgery for multi-task learning", algorithm 1: row ``i`` loses its component along every
    other row ``j`` that it conflicts with (``g_i . g_j < 0``), one after the other.  The order is that of the rows (the
    paper draws it at random), and the result is their mean (the paper's is the sum).
    """
    check_gram(K)
    n = len(K)
    C = torch.eye(n, dtype=K.dtype, device=K.device)  # row i is C[i] @ G
    for j in range(n):
        along = C @ K[:, j]
        conflict = (along < 0) & (K[j, j] > 0)
        conflict[j] = False
        C[:, j] -= torch.where(conflict, along / K[j, j], 0.0)
    return C.mean(0)


class GradientSurgery(Named):
    """SGD along ``w^T G`` for weights ``w = weighting(K)`` of the Gram matrix ``K`` of samples, or of groups of
    samples.

    ``weighting`` is any function ``[M, M] -> [M]``: `pcgrad_weights`, or a ``Weighting`` of TorchJD such as
    ``UPGradWeighting()``.  ``step(G)`` weighs samples (``M = N``); ``step(G, groups)`` with an integer ``[N]`` per
    sample weighs groups (tasks, classes), of which each counts as the mean of its rows: ``K`` is then ``A G G^T A^T``
    with ``A`` the averages, and ``A^T w`` the weights of samples.  A group whose mean is too small against its rows for
    ``K`` to tell its direction is refused (`QuantityError`).

    Args:
        params: ``model.named_parameters()``.
        weighting: from a Gram matrix to weights; the step is ``lr`` times the weighted sum, so ``1/M`` each is the
            mean.
        lr, momentum, nesterov, weight_decay: as in `torch.optim.SGD`.
    """

    own = ("weighting",)

    def __init__(
        self, params: Any, weighting: Weighting = pcgrad_weights, lr: float = 1e-2, *, momentum: float = 0.0,
        nesterov: bool = False, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not callable(weighting):
            raise ArgumentError(f"weighting must be a function of a Gram matrix, [M, M] -> [M], got {weighting!r}.")
        self.weighting = weighting
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def step(  # type: ignore[override]
        self, G: Quantities | None = None, groups: Tensor | None = None, *, closure: None = None
    ) -> None:
        """Take a step along the weighted gradients of samples, or of groups of samples."""
        if not started(self, G, closure):
            rows = summing(G)
            weight = surgery_weights(rows.gram(), self.weighting, groups)
            check_adds_up(rows, weight)
            descend(self, rows.sum(weight))


def surgery_weights(K: Tensor, weighting: Weighting, groups: Tensor | None = None) -> Tensor:
    """``[N]``: what a weighting of samples, or of groups of samples, makes of every sample's weight."""
    check_gram(K)
    if groups is not None:
        check_groups(groups, len(K))
    with torch.autocast(K.device.type, enabled=False):
        if groups is None:
            return weighed(weighting, K)
        members, which = groups.unique(return_inverse=True)
        A = torch.nn.functional.one_hot(which, len(members)).to(K.device, torch.float64).T
        A = A / A.sum(1, keepdim=True)
        means = A @ K.double() @ A.T  # whose rounding is not that of K, which averages to less than that of a row
        if len(
            lost := members[means.diagonal() < torch.finfo(K.dtype).eps ** 0.5 * (A.square() @ K.diagonal().double())]
        ):
            raise QuantityError(
                f"the mean gradient of group {lost[0].item()} is so small against the gradients of its samples that "
                "inner products can't tell its direction in this precision: compute in a higher one, or leave the "
                "group out."
            )
        return A.T.to(K) @ weighed(weighting, means.to(K))


def check_groups(groups: Any, n: int) -> None:
    """Raise for what doesn't say which group each of ``n`` samples is of."""
    what = f"groups must be a tensor [{n}], one integer per sample"
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = str(groups.dtype) if isinstance(groups, Tensor) else type(groups).__name__
        raise ArgumentError(f"{what}, got {got}: torch.tensor(groups) of integers.")
    if groups.shape != (n,):
        raise QuantityError(f"{what}, got shape {list(groups.shape)}.")


def weighed(weighting: Weighting, K: Tensor) -> Tensor:
    """The weights of a Gram matrix, which must be one number per row, in its type."""
    weights = weighting(K)
    if not isinstance(weights, Tensor) or weights.shape != (len(K),):
        got = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise QuantityError(f"the weighting returned {got} for a Gram matrix of {len(K)} rows: it must be [{len(K)}].")
    return weights.to(K)
