"""Captum: an influence function whose embeddings are per-sample gradients.

Captum orients scores ``[test, train]``; `persample.attribution` has ``[n_train, n_test]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import api
from ..attribution.loaders import check_ordered
from ..errors import ArgumentError
from ..losses import LossFunction
from . import needed


def intermediate_quantities(
    model: nn.Module, loss_fn: LossFunction, batches: Iterable[Any], *, aggregate: bool = False, **options: Any
) -> Tensor:
    """``[N, D]``: the per-sample gradients of all ``(*inputs, targets)`` batches one below the other.

    ``aggregate``: their sum, ``[1, D]``.  ``options`` go to `persample.gradients`.

    Raises:
        ArgumentError: there is no batch.
        StoreError: a loader that shuffles, whose samples could not be told by the numbers of their rows.
    """
    if not aggregate:
        check_ordered(batches)
    rows = []
    for *inputs, targets in batches:
        G = api.gradients(model, loss_fn, tuple(inputs), targets, **options)
        rows.append(torch.cat([g.flatten() for g in G.sum().values()])[None] if aggregate else G.flat())
    if not rows:
        raise ArgumentError(
            "there is no batch to take gradients of: the data are empty, or can be read only once, and have been."
        )
    return torch.cat(rows).sum(0, keepdim=True) if aggregate else torch.cat(rows)


def influence_function(model: nn.Module, loss_fn: LossFunction, train: Iterable[Any], **options: Any) -> Any:
    """Captum's ``IntermediateQuantitiesInfluenceFunction`` with gradients as embeddings: grad-dot influence.

    ``influence(test)`` is ``[n_test, n_train]``; with ``k``, the indices and values of the ``k`` largest, ``[n_test,
    k]`` each (`ArgumentError` if there are fewer training samples).  ``self_influence()`` is ``[n_train]``, squared
    norms.
    ``train`` is anything that can be iterated over several times and gives ``(*inputs, targets)`` batches; ``test`` is
    that, or one batch: a tuple, or a list that ends with a tensor.  Samples are told by their numbers, so both must
    come in the same order every time.

    Raises:
        ArgumentError: ``train`` can be read only once; and by the function, for data without a batch.
        StoreError: a loader that shuffles, for ``train``, or given to the function.
    """
    if isinstance(train, Iterator):
        raise ArgumentError(
            f"train is a {type(train).__name__}, which can be read only once, but every call reads it: give a "
            "DataLoader or a list."
        )
    check_ordered(train)
    return _influence_class()(model, loss_fn, train, options)


@cache
def _influence_class() -> type:
    core = needed("captum.influence._core.influence_function", "captum")

    class GradientInfluence(core.IntermediateQuantitiesInfluenceFunction):  # type: ignore[misc, name-defined]
        def __init__(
            self, model: nn.Module, loss_fn: LossFunction, train: Iterable[Any], options: dict[str, Any]
        ) -> None:
            self.model, self.loss_fn, self.train, self.options = model, loss_fn, train, options

        def compute_intermediate_quantities(
            self,
            inputs_dataset: Any,
            aggregate: bool = False,
            show_progress: bool = False,
            return_on_cpu: bool = True,
            test: bool = False,
        ) -> Tensor:
            # A tuple is one batch, and so is a list that ends with targets, as a DataLoader gives it.
            last = inputs_dataset[-1] if isinstance(inputs_dataset, list) and inputs_dataset else None
            single = isinstance(inputs_dataset, tuple) or isinstance(last, Tensor)
            batches = [inputs_dataset] if single else inputs_dataset
            rows = intermediate_quantities(self.model, self.loss_fn, batches, aggregate=aggregate, **self.options)
            return rows.cpu() if return_on_cpu else rows

        def influence(self, inputs: Any, k: int | None = None, proponents: bool = True, **_: Any) -> Any:
            rows, others = (self.compute_intermediate_quantities(batches) for batches in (inputs, self.train))
            with torch.autocast(rows.device.type, enabled=False):
                scores = rows @ others.T
            if k is None:
                return scores
            if not 1 <= k <= scores.shape[1]:
                raise ArgumentError(f"k must be from 1 to {scores.shape[1]}, the number of training samples, got {k}.")
            best = scores.topk(k, largest=proponents)
            return core.KMostInfluentialResults(best.indices, best.values)

        _influence = influence

        def self_influence(self, inputs: Any = None, **_: Any) -> Tensor:
            return self.compute_intermediate_quantities(self.train if inputs is None else inputs).square().sum(1)

        def _get_k_most_influential(self, inputs: Any, k: int = 5, proponents: bool = True, **_: Any) -> Any:
            return self.influence(inputs, k, proponents)

    return GradientInfluence
