"""Is an attribution any good?  Against retrained models, leaving samples out, and labels known to be wrong."""

from __future__ import annotations

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
    """
    if subsets.ndim != 2 or scores.shape != (subsets.shape[1], outputs.shape[1]) or len(subsets) != len(outputs):
        raise QuantityError(
            "expected scores [n_train, n_test], subsets [models, n_train] and outputs [models, n_test], got "
            f"{list(scores.shape)}, {list(subsets.shape)} and {list(outputs.shape)}."
        )
    return spearman(subsets.double() @ scores.double(), outputs.double())


def leave_one_out_correlation(scores: Tensor, changes: Tensor) -> Tensor:
    """``[n_test]``: Pearson correlation, over left-out samples, between scores and true changes of every test loss.

    Args:
        scores: ``[n, n_test]`` of the ``n`` samples that were left out, one at a time.
        changes: ``[n, n_test]``: the test loss without the sample minus the loss with it (positive: it helped).
    """
    if scores.shape != changes.shape or scores.ndim != 2:
        raise QuantityError(
            f"scores and changes must both be [n, n_test], got {list(scores.shape)} and {list(changes.shape)}."
        )
    return pearson(scores.double(), changes.double())


def mislabel_auc(scores: Tensor, wrong: Tensor) -> float:
    """The area under the ROC curve of finding ``wrong [n]`` (bools) by large ``scores [n]``.

    The probability that a wrong sample scores higher than a right one, ties counting half (Mann and Whitney): 0.5 by
    chance.
    """
    if scores.ndim != 1 or scores.shape != wrong.shape:
        raise QuantityError(f"scores and wrong must both be [n], got {list(scores.shape)} and {list(wrong.shape)}.")
    wrong = wrong.bool()
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        raise QuantityError("the AUC needs samples that are wrong and samples that are right.")
    above = float(ranks(scores.double())[wrong].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of every column of ``a`` with that of ``b``; NaN for a constant column."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale: Tensor = a.norm(dim=0) * b.norm(dim=0)
    return (a * b).sum(0) / scale


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of ranks, column by column; ties share their mean rank."""
    return pearson(torch.stack([ranks(x) for x in a.mT], 1), torch.stack([ranks(x) for x in b.mT], 1))


def ranks(x: Tensor) -> Tensor:
    """``[n]``: 1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    rank: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return rank[which].double()
