"""Run a model over a data loader and feed accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..api import gradients
from ..attribution.loaders import check_loader, unpacked
from ..errors import ArgumentError
from ..losses import LossFunction
from ..progress import bar
from .accumulate import Accumulator


def accumulate(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    *accumulators: Accumulator[Any],
    unpack: Callable[[Any], tuple[Any, Any]] = lambda batch: batch,
    progress: bool = False,
    **options: Any,
) -> None:
    """Update all accumulators with every batch of a loader, in one backward pass each.

    ``unpack(batch)`` gives inputs and targets (and is the place to move them to a device); ``options`` go to
    `persample.gradients`.  If no accumulator needs rows, none are kept: peak memory stays that of the plain backward
    pass.  A batch that is refused by one of them counts for none.
    """
    if wrong := [a for a in accumulators if not isinstance(a, Accumulator)]:
        raise ArgumentError(f"accumulators are objects such as Moments(), got {wrong[0]!r}.")
    if not accumulators:
        raise ArgumentError("there is nothing to accumulate: give one accumulator or more, such as Moments().")
    check_loader(loader)
    if "quantities" in options:
        raise ArgumentError("accumulators say by themselves what they need: leave quantities= out.")
    needs = (
        None
        if any(a.needs is None for a in accumulators)
        else list(dict.fromkeys(q for a in accumulators for q in a.needs or ()))
    )
    for batch in bar(loader, progress, "accumulate"):
        inputs, targets = unpacked(batch, unpack)
        G = gradients(model, loss_fn, inputs, targets, quantities=needs, **options)
        before = [accumulator.value for accumulator in accumulators]
        try:
            for accumulator in accumulators:
                accumulator.update(G)
        except BaseException:
            for accumulator, value in zip(accumulators, before, strict=True):
                accumulator.value = value  # values are never written into
            raise
