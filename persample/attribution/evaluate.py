"""Is an attribution any good?  Against retrained models, leaving samples out, and labels known to be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import QuantityError


def linear_datamodelling_score(scores: Tensor, subsets: Tensor, outputs: Tensor) -> Tensor:
    """``[n_test]``: Spearman correlation, over models, between what a test output is and what the scores predict for
    it.

    Park et al. 2023, "TRAK", def. 2.3: model ``s`` was trained on the samples with ``subsets[s, i]``; the prediction
    for test sample ``j`` is ``sum_{i in subset} scores[i, j]``.  Report the mean over test samples; attribution at
    random gives 0.

    Args:
        scores: ``[n_train, n_test]``, positive for training samples that help.
        subsets: ``[models, n_train]`` of bools: what each model was trained on.
        outputs: ``[models, n_test]``, larger is better: margins, or losses *negated*.

    Raises:
        QuantityError: shapes that don't fit, ``subsets`` that aren't bools (or 0 and 1), numbers that aren't finite.
    """
    scores, subsets, outputs = _tensors(scores=scores, subsets=subsets, outputs=outputs)
    if (
        subsets.ndim != 2
        or outputs.ndim != 2
        or scores.shape != (subsets.shape[1], outputs.shape[1])
        or len(subsets) != len(outputs)
    ):
        raise QuantityError(
            "expected scores [n_train, n_test], subsets [models, n_train] and outputs [models, n_test], got "
            f"{list(scores.shape)}, {list(subsets.shape)} and {list(outputs.shape)}."
        )
    _check(scores=scores, outputs=outputs)
    return spearman(_bools(subsets, "subsets").double() @ scores.double(), outputs.double())


def leave_one_out_correlation(scores: Tensor, changes: Tensor) -> Tensor:
    """``[n_test]``: Pearson correlation, over left-out samples, between scores and true changes of every test loss.

    Args:
        scores: ``[n, n_test]`` of the ``n`` samples that were left out, one at a time.
        changes: ``[n, n_test]``: the test loss without the sample minus the loss with it (positive: it helped).

    Raises:
        QuantityError: shapes that don't fit, or numbers that aren't finite.
    """
    scores, changes = _tensors(scores=scores, changes=changes)
    if scores.shape != changes.shape or scores.ndim != 2:
        raise QuantityError(
            f"scores and changes must both be [n, n_test], got {list(scores.shape)} and {list(changes.shape)}."
        )
    _check(scores=scores, changes=changes)
    return pearson(scores.double(), changes.double())


def mislabel_auc(scores: Tensor, wrong: Tensor) -> float:
    """The area under the ROC curve of finding ``wrong [n]`` (bools) by large ``scores [n]``.

    The probability that a wrong sample scores higher than a right one, ties counting half (Mann and Whitney): 0.5 by
    chance.

    Raises:
        QuantityError: shapes that don't fit, ``wrong`` that aren't bools (or 0 and 1) or all the same, scores that
            aren't finite.
    """
    scores, wrong = _tensors(scores=scores, wrong=wrong)
    if scores.ndim != 1 or scores.shape != wrong.shape:
        raise QuantityError(f"scores and wrong must both be [n], got {list(scores.shape)} and {list(wrong.shape)}.")
    _check(scores=scores)
    wrong = _bools(wrong, "wrong")
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        raise QuantityError("the AUC needs samples that are wrong and samples that are right.")
    above = float(ranks(scores.double())[wrong].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of every column of ``a`` with that of ``b``; NaN for a constant column."""
    constant = (a == a[:1]).all(0) | (b == b[:1]).all(0)  # what is left of those is rounding errors
    a, b = a - a.mean(0), b - b.mean(0)
    scale: Tensor = a.norm(dim=0) * b.norm(dim=0)
    return ((a * b).sum(0) / scale).masked_fill(constant, torch.nan)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of ranks, column by column; ties share their mean rank."""
    return pearson(torch.stack([ranks(x) for x in a.mT], 1), torch.stack([ranks(x) for x in b.mT], 1))


def ranks(x: Tensor) -> Tensor:
    """``[n]``: 1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    rank: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return rank[which].double()


def _tensor(what: str, x: Any) -> Tensor:
    """As a tensor, also of an array or a list."""
    try:
        return x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise QuantityError(f"{what} must be a tensor of numbers, got {type(x).__name__}.") from None


def _tensors(**given: Any) -> list[Tensor]:
    return [_tensor(what, x) for what, x in given.items()]


def _check(**given: Tensor) -> None:
    """Raise for what has no order: ranks of NaN would be numbers."""
    for what, x in given.items():
        if bad := int((~x.isfinite()).sum()):
            raise QuantityError(
                f"{what} must be finite, but {bad} of {x.numel()} are infinite or NaN. Find out where they come from "
                "(losses or gradients that overflowed), or leave those samples out."
            )


def _bools(x: Tensor, what: str) -> Tensor:
    if not ((x == 0) | (x == 1)).all():
        raise QuantityError(
            f"{what} must be bools (or 0 and 1), one per sample; for indices, set those of a zero tensor."
        )
    return x.bool()
