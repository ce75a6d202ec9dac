"""Is the batch large enough?  Tests of the mean gradient ``gbar`` against the noise it carries, and CABS.

``g_i`` is the gradient of the unscaled loss of sample ``i``, ``B`` the number of samples, ``K_ij = g_i . g_j``.
Each test returns the smallest threshold that the batch meets: the batch is too small for a threshold below it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import check_positive
from ..errors import QuantityError
from ..gradients import Gradients
from ..quantities import Quantities
from .parts import (
    LOST,
    By,
    HasMoments,
    across_mean,
    along_mean,
    cancelled,
    centred_total,
    check_drawn,
    check_measured,
    divisor,
    mean_loss,
    per_group,
    refuse,
    several,
)


def norm_test(G: HasMoments, by: By = None) -> Any:
    """``theta = sqrt(S / (B |gbar|^2))``, a scalar, with ``S`` the trace of the unbiased covariance.

    Byrd et al. 2012, "Sample size selection in optimization methods for machine learning", eq. 3.9: the relative
    error of the mean gradient.  A threshold ``theta0`` asks for ``B (theta / theta0)^2`` samples.  Needs
    ``quantities=["norm", "mean"]``.
    """
    n = several(G, "the norm test")
    check_drawn(G)
    means = divisor(G, by)

    def theta(centred: Tensor, mean: Tensor) -> Tensor:
        return (centred.clamp_min(0) / (n - 1) / (n * mean)).sqrt()

    return per_group(by, theta, centred_total(G, means, by), means)


def inner_product_test(G: Quantities, by: By = None) -> Any:
    """``theta = sqrt(Var(g_i . gbar) / (B |gbar|^4))``, a scalar; unbiased variance over ``i``.

    Bollapragada et al. 2018, "Adaptive sampling strategies for stochastic optimization", eq. 2.6 with the sample mean
    for the gradient: the error along the descent direction only.  Needs ``quantities=["gram"]``, or rows, which make
    it cheap.
    """
    n = several(G, "the inner-product test")
    check_drawn(G)
    along, squares = along_mean(G), divisor(G, by)
    if not isinstance(G, Gradients):
        refuse(per_group(by, lambda a, square: cancelled(a.std(), square), along, squares), LOST)
    return per_group(by, lambda a, square: (a / square).std() / n**0.5, along, squares)


def orthogonality_test(G: Quantities, by: By = None) -> Any:
    """``nu = sqrt((sum_i |g_i|^2 - sum_i (g_i . gbar)^2 / |gbar|^2) / (B - 1) / (B |gbar|^2))``, a scalar.

    Bollapragada et al. 2018, eq. 3.3: the error across the descent direction.  ``theta^2 + nu^2`` of the
    inner-product test and this one is that of the norm test.  Needs ``quantities=["gram"]``, or rows.
    """
    n = several(G, "the orthogonality test")
    check_drawn(G)
    squares = divisor(G, by)
    across = across_mean(G, squares, by)

    def nu(across: Tensor, square: Tensor) -> Tensor:
        return (across.clamp_min(0) / (n - 1) / (n * square)).sqrt()

    return per_group(by, nu, across, squares)


def cabs(G: HasMoments, lr: float, by: By = None) -> Any:
    """``lr tr(Sigma) / L``, a scalar: the batch size that CABS proposes, with ``L`` the mean loss.

    Balles et al. 2017, "Coupling adaptive batch sizes with learning rates", eq. 22: *population* covariance, plain
    SGD with learning rate ``lr``, a loss whose infimum is 0.  Round and bound it yourself, or by
    `persample.optim.AdaptiveBatchSize`. Needs ``quantities=["norm", "mean"]``, or ``["variance"]``.
    """
    check_measured(G)
    check_drawn(G)
    check_positive(lr=lr)
    loss = loss_above_zero(G)
    if not bool(loss > 0):
        raise QuantityError(INFIMUM.format(float(loss)))
    return per_group(by, lambda centred: lr * centred.clamp_min(0) / len(G) / loss, centred_total(G, by=by))


INFIMUM = "CABS divides by the mean loss, taken to have infimum 0, but it is {:.4g}."


def loss_above_zero(G: HasMoments) -> Tensor:
    """The mean loss, which can't be negative where its infimum is 0."""
    if getattr(G, "losses", None) is None:
        raise QuantityError(
            "CABS divides by the mean loss, and a callback is never told the losses: take gradients(...) or the "
            "recorder of a with-block (persample.extend), or another rule."
        )
    loss = mean_loss(G)
    if bool(loss < 0):
        raise QuantityError(INFIMUM.format(float(loss)))
    return loss
