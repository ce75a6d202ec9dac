"""Which training samples made a prediction: scores ``[n_train, n_test]`` from per-sample gradients.

``g_i`` is the gradient of the unscaled loss of training sample ``i``, ``h_j`` that of test sample ``j``, both at the
same parameters.  **Scores have training samples in rows, test samples in columns, and are positive where the training
sample helps**: where weighing it up lowers the loss of the test sample.  (captum's are test x train, dattri's train x
test.)

Gradients may be `persample.Gradients`, or features ``[n, k]``: rows, or projected ones, which have the same inner
products on average (`Projection`, `GradientStore`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, QuantityError
from ..quantities import Quantities

Features = Quantities | Tensor
Several = Tensor | Sequence[Tensor]


# ---- inner products ---------------------------------------------------------------------------------------------


def grad_dot(train: Features, test: Features) -> Tensor:
    """``g_i . h_j``, ``[n_train, n_test]``: what one step of SGD on sample ``i`` takes off the loss of ``j``, per
    learning rate and to first order (Pruthi et al. 2020, sec. 3).
    """
    if isinstance(train, Quantities) and isinstance(test, Quantities):
        return train.gram(test)  # type: ignore[no-any-return]
    if isinstance(train, Quantities) or isinstance(test, Quantities):
        raise QuantityError("give gradients on both sides, or features [n, k] of the same projection on both.")
    return train @ test.mT


def grad_cos(train: Features, test: Features) -> Tensor:
    """``g_i . h_j / (|g_i| |h_j|)``, ``[n_train, n_test]``; 0 where a gradient is 0 (Charpiat et al. 2019)."""
    scale = squared_norm(train).sqrt()[:, None] * squared_norm(test).sqrt()
    return torch.where(scale > 0, grad_dot(train, test) / scale, 0.0)


def tracin(checkpoints: Iterable[tuple[float, Features, Features]]) -> Tensor:
    """``sum_c lr_c g_i(c) . h_j(c)``, ``[n_train, n_test]``, over checkpoints ``(lr, train, test)``.

    Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent", TracInCP.  ``lr`` is that of
    the *mean* loss of batches of ``b`` times ``1/b`` if the number is to estimate a change of loss per epoch;
    rankings don't depend on it.  A generator keeps one checkpoint in memory at a time.
    """
    return _weighted_sum((lr, grad_dot(train, test)) for lr, train, test in checkpoints)


def self_influence(train: Features | Iterable[tuple[float, Features]]) -> Tensor:
    """``|g_i|^2``, ``[n_train]``, or ``sum_c lr_c |g_i(c)|^2`` over checkpoints ``(lr, train)``.

    The diagonal of TracIn on the training set itself (Pruthi et al. 2020, sec. 4.1): large for samples that only they
    themselves explain, such as mislabelled ones.
    """
    if isinstance(train, (Quantities, Tensor)):
        return squared_norm(train)
    return _weighted_sum((lr, squared_norm(features)) for lr, features in train)


def squared_norm(features: Features) -> Tensor:
    """``|g_i|^2``, ``[n]``."""
    return features.square().sum(1) if isinstance(features, Tensor) else features.squared_norm()


# ---- inverse curvature ------------------------------------------------------------------------------------------


def empirical_fisher_influence(train: Features, test: Features, *, damping: float) -> Tensor:
    """``g_i^T (F + damping I)^-1 h_j``, ``[n_train, n_test]``, with the empirical Fisher ``F = (1/n) sum_i g_i g_i^T``.

    From Gram blocks only, by `influence_from_gram`: ``[n, n]`` is solved, never ``[D, D]``.  Divided by ``n`` it
    estimates by how much the loss of ``j`` rises when ``i`` is left out (Koh and Liang 2017, with ``F`` for the
    Hessian). Divide by nothing where only the ranking matters.  ``damping`` is in units of ``F``: mean squared
    gradient entries.
    """
    return influence_from_gram(grad_dot(train, train), grad_dot(train, test), damping)


def influence_from_gram(K: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``(K/n + damping I)^-1 K_tt'``, ``[n_train, n_test]``, from ``K [n, n]`` and ``cross = K_tt' [n, n_test]``.

    By the push-through identity it equals ``J (J^T J/n + damping I)^-1 J'^T`` for any rows ``J``, ``J'`` with ``K = J
    J^T``, ``K_tt' = J J'^T``, and ``[K_tt' - K (K + n damping I)^-1 K_tt'] / damping`` without its cancellation.
    Solved in float64 by Cholesky.
    """
    n = len(K)
    if K.shape != (n, n) or cross.shape[:1] != (n,):
        raise QuantityError(f"K must be [n, n] and cross [n, n_test], got {list(K.shape)} and {list(cross.shape)}.")
    if not damping > 0:
        raise ArgumentError(f"damping must be positive, got {damping}.")
    system = K.double() / n
    system = (system + system.mT) / 2
    system.diagonal().add_(damping)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system)).to(cross.dtype)


def influence(train: Quantities, test: Any, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """``g_i^T H^-1 h_j``, ``[n_train, n_test]``, for any curvature: ``solve [D, n_test] -> [D, n_test]`` applies
    ``H^-1``.

    Koh and Liang 2017, "Understanding black-box predictions via influence functions", with the Hessian of the *mean*
    loss (and its regulariser): divided by ``n``, it estimates the rise of the loss of ``j`` when ``i`` is left out.
    ``test`` are `Gradients`, of the same parameters in the same order.
    """
    return train.project(solve(test.flat().mT))


def trak(train: Several, test: Several, residual: Several, *, damping: float = 0.0) -> Tensor:
    """``Q Phi (Phi^T Phi + damping I)^-1 phi^T``, ``[n_train, n_test]``: TRAK.

    Park et al. 2023, "TRAK: attributing model behavior at scale", eq. 17.  ``Phi [n_train, k]`` and ``phi [n_test,
    k]`` are projected gradients of the `margin` (not of a loss), ``Q = diag(residual)`` with ``residual [n_train] = 1
    - p_i``, the probability that is missing from the correct class.  Lists are several models: both factors are
    averaged over them apart, as in the paper.

    >>> from persample import gradients
    >>> from persample.attribution import Projection, margin, trak
    >>> model, R = torch.nn.Linear(4, 3), Projection(8)
    >>> x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    >>> G = gradients(model, margin, x, y)
    >>> trak(G.project(R), G.project(R), torch.sigmoid(-G.losses)).shape  # losses are the margins: 1 - p
    torch.Size([20, 20])
    """
    if isinstance(train, Tensor) or isinstance(test, Tensor) or isinstance(residual, Tensor):
        assert isinstance(train, Tensor) and isinstance(test, Tensor) and isinstance(residual, Tensor)
        train, test, residual = [train], [test], [residual]
    kernels = [_kernel(a, b, damping) for a, b in zip(train, test, strict=True)]
    missing = torch.stack(list(residual)).mean(0)
    return missing[:, None] * torch.stack(kernels).mean(0)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """``log p/(1 - p)`` of the correct class, ``[N]``, from logits ``[N, C]``: the output that TRAK linearises.

    ``1 - p`` is the sigmoid of minus it.  Pass it as ``loss_fn`` to `persample.gradients`.
    """
    correct = outputs.gather(1, targets[:, None])
    others = outputs.scatter(1, targets[:, None], -torch.inf)
    return correct.squeeze(1) - others.logsumexp(1)


def _kernel(train: Tensor, test: Tensor, damping: float) -> Tensor:
    a, b = train.double(), test.double()
    system = a.mT @ a
    system.diagonal().add_(damping)
    kernel: Tensor = a @ torch.linalg.solve(system, b.mT)
    return kernel.to(train.dtype)


def _weighted_sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    total: Tensor | None = None
    for weight, term in terms:
        total = weight * term if total is None else total + weight * term
    if total is None:
        raise QuantityError("there is no checkpoint: give at least one.")
    return total
