"""All inner products between two data sets, in bounded memory: `cross_gram`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..api import gradients
from ..errors import ArgumentError, StoreError
from ..losses import LossFunction
from ..problem import Selection
from .appendable import Appendable
from .projection import Projection
from .scores import Features, grad_dot
from .store import Unpack, check_ordered, describe, missing


def cross_gram(
    model: nn.Module, loss_fn: LossFunction, train_loader: Iterable[Any], test_loader: Iterable[Any], *,
    block: int | None = None, projection: Projection | None = None, out: str | os.PathLike[str] | None = None,
    params: Selection = None, unpack: Unpack = lambda batch: batch, progress: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """``g_i . h_j``, ``[n_train, n_test]``: the cross-Gram of the per-sample gradients of two data sets.

    The gradients of ``block`` test batches are held while all training batches go by, one at a time; then comes the
    next block.  So the training set is differentiated once per block (``None``: all test batches are one block), and
    memory is that of ``block`` test batches and one training batch, as factors, or as projected rows ``[N, dim]``
    with ``projection``.

    With ``out``, a directory, every training batch is committed as it comes: a killed run that is called again goes
    on where it was, and refuses if model, parameters, scale, projection or block are others.
    ``out/columns-00000.npy`` etc. side by side are the result, which is memory-mapped if it is one block.

    Args:
        model, loss_fn, params, options: as in `persample.gradients`.
        train_loader, test_loader: batches that ``unpack`` turns into inputs and targets; in the same order every time.
        block: how many test batches to hold.
        projection: compare projected rows: an estimate, cheaper in memory.
        out: where to keep the result; in memory by default.
        progress: show a bar over training batches (needs tqdm).
    """
    check_ordered(test_loader)
    axis = options.get("batch_dim", 0)

    def left(done: int) -> Iterator[tuple[int, Any, Any]]:
        return missing(train_loader, done, unpack, progress, axis)

    def features(inputs: Any, targets: Any) -> Any:
        if projection is None:
            return gradients(model, loss_fn, inputs, targets, params=params, **options)
        asked = [("project", {"projection": projection})]
        return gradients(model, loss_fn, inputs, targets, params=params, quantities=asked, **options).project()

    meta = {**describe(model, params, projection, "unscaled"), "block": block}
    columns = []
    for number, batches in enumerate(_blocks(test_loader, block, unpack)):
        table = None if out is None else _opened(out, number, meta)
        if table is None or not table.meta.get("complete"):
            held = [features(*batch) for batch in batches]
            parts = _column(held, features, left, table)
        columns.append(torch.cat(parts) if table is None else torch.from_numpy(table.rows()))
    if not columns:
        raise StoreError("the test loader is empty.")
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _column(held: list[Features], features: Any, left: Any, table: Appendable | None) -> list[Tensor]:
    """Products of all training batches with the test batches that are held; kept, or committed one by one."""
    parts: list[Tensor] = []
    for first, inputs, targets in left(0 if table is None else len(table)):
        mine = features(inputs, targets)
        products = torch.cat([grad_dot(mine, theirs) for theirs in held], 1).cpu()[first:]
        if table is None:
            parts.append(products)
        else:
            table.append(products.numpy())
    if table is not None:
        table.commit(complete=True)
    return parts


def _blocks(loader: Iterable[Any], size: int | None, unpack: Unpack) -> Iterator[list[tuple[Any, Any]]]:
    if size is not None and size < 1:
        raise ArgumentError(f"block must be at least one batch, got {size}.")
    batches = iter(loader)
    while block := [unpack(batch) for batch in islice(batches, size)]:
        yield block


def _opened(out: str | os.PathLike[str], number: int, meta: dict[str, Any]) -> Appendable:
    table = Appendable(out, f"columns-{number:05d}")
    if table.json.exists():
        for key, mine in meta.items():
            if table.meta[key] != mine:
                raise StoreError(f"{table.json} is of another {key}; use another directory, or delete this one.")
    else:
        table.commit(**meta)
    return table
