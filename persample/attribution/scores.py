"""Which training samples made a prediction: scores ``[n_train, n_test]`` from per-sample gradients.

``g_i`` is the gradient of the unscaled loss of training sample ``i``, ``h_j`` that of test sample ``j``, both at the
same parameters.  **Scores have training samples in rows, test samples in columns, and are positive where the training
sample helps**: where weighing it up lowers the loss of the test sample.  (captum's are test x train, dattri's train x
test.)

Gradients may be `persample.Gradients`, or features ``[n, k]``: rows, or projected ones, which have the same inner
products on average (`Projection`, `GradientStore`).  Features of half precision are multiplied and added up in
float32, which the scores are then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import number
from ..errors import ArgumentError, QuantityError
from ..gradients import Gradients
from ..quantities import Quantities
from ..statistics_run import Statistics
from .features import Features, both, check_finite, unit, wide

# ---- inner products ---------------------------------------------------------------------------------------------


def grad_dot(train: Features, test: Features) -> Tensor:
    """``g_i . h_j``, ``[n_train, n_test]``: what one step of SGD on sample ``i`` takes off the loss of ``j``, per
    learning rate and to first order (Pruthi et al. 2020, sec. 3).

    Raises:
        QuantityError: gradients on one side only, of different parameters, or features that don't fit each other.
    """
    if isinstance(train, Quantities) and isinstance(test, Quantities):
        return train.gram(test)  # type: ignore[no-any-return]
    if isinstance(train, Quantities) or isinstance(test, Quantities):
        raise QuantityError(
            "give gradients on both sides, or features [n, k] of the same projection on both: G.flat() beside whole "
            "rows of a store (store.rows()), G.project(R) beside rows that were projected by R."
        )
    a, b = both(train, test)
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def grad_cos(train: Features, test: Features) -> Tensor:
    """``g_i . h_j / (|g_i| |h_j|)``, ``[n_train, n_test]``; 0 where a gradient is 0 (Charpiat et al. 2019).

    Raises:
        QuantityError: as `grad_dot`.
    """
    if isinstance(train, Tensor) and isinstance(test, Tensor):
        a, b = both(train, test)
        return grad_dot(unit(a), unit(b))
    products = grad_dot(train, test)
    scale = squared_norm(train).sqrt()[:, None] * squared_norm(test).sqrt()
    return torch.where(scale == 0, 0.0, products / scale)


def tracin(checkpoints: Iterable[tuple[float, Features, Features]]) -> Tensor:
    """``sum_c lr_c g_i(c) . h_j(c)``, ``[n_train, n_test]``, over checkpoints ``(lr, train, test)``.

    Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent", TracInCP.  ``lr`` is that of
    the *mean* loss of batches of ``b`` times ``1/b`` if the number is to estimate a change of loss per epoch;
    rankings don't depend on it.  A generator keeps one checkpoint in memory at a time.

    Raises:
        ArgumentError: a checkpoint that is no such tuple, or has no finite ``lr``.
        QuantityError: no checkpoint, others of other samples, or features that don't fit.
    """
    triples = _checkpoints(checkpoints, ("lr", "train", "test"))
    return _weighted_sum((lr, grad_dot(train, test)) for lr, train, test in triples)


def self_influence(train: Features | Iterable[tuple[float, Features]]) -> Tensor:
    """``|g_i|^2``, ``[n_train]``, or ``sum_c lr_c |g_i(c)|^2`` over checkpoints ``(lr, train)``.

    The diagonal of TracIn on the training set itself (Pruthi et al. 2020, sec. 4.1): large for samples that only they
    themselves explain, such as mislabelled ones.

    Raises:
        ArgumentError, QuantityError: as `tracin`.
    """
    if isinstance(train, (Quantities, Tensor)):
        return squared_norm(train)
    return _weighted_sum((lr, squared_norm(features)) for lr, features in _checkpoints(train, ("lr", "train")))


def squared_norm(features: Features) -> Tensor:
    """``|g_i|^2``, ``[n]``."""
    if isinstance(features, Quantities):
        return features.squared_norm()  # type: ignore[no-any-return]
    return wide(features, "train").square().sum(1)


# ---- inverse curvature ------------------------------------------------------------------------------------------


def empirical_fisher_influence(train: Features, test: Features, *, damping: float) -> Tensor:
    """``g_i^T (F + damping I)^-1 h_j``, ``[n_train, n_test]``, with the empirical Fisher ``F = (1/n) sum_i g_i g_i^T``.

    From Gram blocks only, by `influence_from_gram`: ``[n, n]`` is solved, never ``[D, D]``.  Divided by ``n`` it
    estimates by how much the loss of ``j`` rises when ``i`` is left out (Koh and Liang 2017, with ``F`` for the
    Hessian). Divide by nothing where only the ranking matters.  ``damping`` is in units of ``F``: mean squared
    gradient entries.

    Raises:
        ArgumentError, QuantityError: as `grad_dot` and `influence_from_gram`.
    """
    return influence_from_gram(grad_dot(train, train), grad_dot(train, test), damping)


def influence_from_gram(K: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``(K/n + damping I)^-1 K_tt'``, ``[n_train, n_test]``, from ``K [n, n]`` and ``cross = K_tt' [n, n_test]``.

    By the push-through identity it equals ``J (J^T J/n + damping I)^-1 J'^T`` for any rows ``J``, ``J'`` with ``K = J
    J^T``, ``K_tt' = J J'^T``, and ``[K_tt' - K (K + n damping I)^-1 K_tt'] / damping`` without its cancellation.
    Solved in float64 by Cholesky.

    Raises:
        ArgumentError: ``damping`` is no positive number.
        QuantityError: shapes that don't fit, numbers that aren't finite, or a ``K`` that is no Gram matrix (or one
            whose rounding errors are larger than ``n damping``).
    """
    if not isinstance(K, Tensor) or not isinstance(cross, Tensor):
        raise QuantityError(f"K and cross must be tensors, got {_what(K)} and {_what(cross)}.")
    n = len(K)
    if K.shape != (n, n) or cross.shape[:1] != (n,) or cross.ndim != 2:
        raise QuantityError(f"K must be [n, n] and cross [n, n_test], got {list(K.shape)} and {list(cross.shape)}.")
    if not number(damping) > 0:
        raise ArgumentError(f"damping must be positive, and a finite number, got {damping!r}.")
    check_finite(K=K, cross=cross)
    system = K.double() / n
    system = (system + system.mT) / 2
    system.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise QuantityError(
            f"K/n + damping I is not positive definite: K is no Gram matrix, or damping={damping} is smaller than its "
            "rounding errors. Give a larger damping=, or features of a higher precision."
        )
    return torch.cholesky_solve(cross.double(), factor).to(torch.promote_types(cross.dtype, torch.float32))


def influence(train: Quantities, test: Any, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """``g_i^T H^-1 h_j``, ``[n_train, n_test]``, for any curvature: ``solve [D, n_test] -> [D, n_test]`` applies
    ``H^-1``.

    Koh and Liang 2017, "Understanding black-box predictions via influence functions", with the Hessian of the *mean*
    loss (and its regulariser): divided by ``n``, it estimates the rise of the loss of ``j`` when ``i`` is left out.
    ``test`` are `Gradients`, of the same parameters in the same order.

    Raises:
        ArgumentError: ``solve`` is no function (an operator is none).
        QuantityError: ``train`` or ``test`` are no gradients, or of other parameters; ``solve`` changed the shape.
    """
    if not (isinstance(train, Quantities) and isinstance(test, Gradients)):
        raise QuantityError(
            "train and test must be Gradients (persample.gradients without quantities=), got "
            f"{type(train).__name__} and {type(test).__name__}. For features, solve yourself: train @ solve(test.mT)."
        )
    if isinstance(train, Statistics):
        raise QuantityError("influence needs the rows of train: compute gradients without quantities=.")
    if list(train.shapes.items()) != list(test.shapes.items()):
        raise QuantityError(
            "train and test are gradients of different parameters, or in another order; use select() on both."
        )
    if not callable(solve):
        dense = "torch.linalg.solve(K.dense() + damping * torch.eye(D), columns)"
        way = "K.solve(columns, damping=1e-3)" if hasattr(solve, "solve") else dense
        raise ArgumentError(
            f"solve must be a function of columns [D, n_test], got {_what(solve)}: for a matrix K, lambda columns: "
            f"{way}."
        )
    columns = test.flat().mT
    with torch.autocast(columns.device.type, enabled=False):
        solved = solve(columns)
    if not isinstance(solved, Tensor) or solved.shape != columns.shape:
        got = list(solved.shape) if isinstance(solved, Tensor) else type(solved).__name__
        raise QuantityError(f"solve must return a tensor [D, n_test] = {list(columns.shape)}, got {got}.")
    return train.project(solved)


def _what(x: Any) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else f"a {type(x).__name__}"


def _checkpoints(checkpoints: Iterable[Any], form: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Checkpoints, each looked at."""
    if isinstance(checkpoints, (Quantities, Tensor)) or not isinstance(checkpoints, Iterable):
        raise ArgumentError(
            f"give checkpoints ({', '.join(form)}) in a list or generator, not one alone: got {_what(checkpoints)}."
        )
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, (tuple, list)) or len(checkpoint) != len(form):
            raise ArgumentError(f"a checkpoint is a tuple ({', '.join(form)}), got {_what(checkpoint)}.")
        if math.isnan(lr := number(checkpoint[0])):
            raise ArgumentError(f"lr of a checkpoint must be a finite number, got {checkpoint[0]!r}.")
        yield (lr, *checkpoint[1:])


def _weighted_sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    total: Tensor | None = None
    for weight, term in terms:
        if total is not None and total.shape != term.shape:
            raise QuantityError(
                f"the checkpoints have different samples: {list(total.shape)} scores, then {list(term.shape)}."
            )
        total = weight * term if total is None else total + weight * term
    if total is None:
        raise QuantityError("there is no checkpoint: give at least one.")
    return total
