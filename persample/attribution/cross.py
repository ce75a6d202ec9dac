"""All inner products between two data sets, in bounded memory: `cross_gram`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..api import gradients
from ..arguments import check_module
from ..errors import ArgumentError, StoreError
from ..losses import LossFunction
from ..problem import Selection
from ..remembered import Settings, lasting, settings
from ..state import Buffers, unwrapped
from .appendable import Appendable, same
from .called import called, digest
from .features import Features
from .loaders import Ends, Unpack, check_ordered, missing, unpacked
from .projection import Projection
from .scores import grad_dot
from .store import another, describe, same_parameters, same_settings


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

    With ``out``, a directory, every training batch is committed as it comes: a killed run that is called again goes on
    where it was, and refuses if the model (parameters, buffers, modes, settings), loss function, ``coupled``,
    parameters, projection, block or test batches are others, or the training set has another length, first sample, or
    last one where it goes on, or its batches are others and ``coupled`` (but "eval") makes rows depend on them; so
    training data are read once more even where all is there. ``out/columns-00000.npy`` etc. side by side are the
    result, which is memory-mapped if it is one block.

    Every batch finds the model's buffers (running statistics, power iterations) as they were given, and so are they
    afterwards: results don't depend on ``block``.

    Args:
        model, loss_fn, params, options: as in `persample.gradients`.
        train_loader, test_loader: batches that ``unpack`` turns into inputs and targets; in the same order every time.
        block: how many test batches to hold.
        projection: compare projected rows: an estimate, cheaper in memory.
        out: where to keep the result; in memory by default.
        progress: show a bar over training batches (needs tqdm).

    Raises:
        ArgumentError: ``block`` is no positive integer, or given with training data that can be read only once; or
            ``quantities=`` is.
        StoreError: a loader that shuffles or is empty, training samples (or batches of coupled ones) that aren't the
            same for every block, or ``out`` of something else, or damaged.
    """
    _check(train_loader, test_loader, block, options)
    check_module(model)
    runs, model = model, unwrapped(model)[0]  # with what was put around it; names are those inside
    chosen = same_parameters(model, params)

    def left(done: int, ends: Ends) -> Iterator[tuple[int, Any, Any, Ends]]:
        return missing(train_loader, done, ends, unpack, progress, options)

    def features(inputs: Any, targets: Any) -> Any:
        with Buffers(model):
            if projection is None:
                return gradients(runs, loss_fn, inputs, targets, params=chosen, **options)
            asked = [("project", {"projection": projection})]
            return gradients(runs, loss_fn, inputs, targets, params=chosen, quantities=asked, **options).project()

    meta: dict[str, Any] = {"block": block, "loss": called(loss_fn), "coupled": options.get("coupled")}
    if out is not None:
        meta |= describe(model, params, projection, "unscaled")
    own, columns = settings(model), list[Tensor]()
    train: dict[str, Any] = {}  # how many samples there are, and their ends
    for batches in _blocks(test_loader, block, unpack):
        parts: list[Tensor] = []
        table = None if out is None else _opened(out, len(columns), {**meta, "test_samples": digest(batches)}, own)
        if table is not None and table.meta.get("complete"):
            if not columns and any(True for _ in left(len(table), table.meta["samples"])):
                raise StoreError(f"{table.json} is of {len(table)} training samples, but the loader gives more.")
            mine = {"rows": len(table), **table.meta["samples"]}
        else:
            mine = _column(model, [features(*batch) for batch in batches], features, left, table, parts)
        if not mine["rows"]:
            raise StoreError("the train loader is empty, or it can be read only once and has been.")
        train = train or mine
        if mine != train:
            raise StoreError(
                f"the train loader gave {mine['rows']} samples to one block of test batches and {train['rows']} to "
                "another, or other ones, or in other batches: its samples, their order, and with coupled= also its "
                "batches must be the same every time."
            )
        if table is not None and not table.meta.get("complete"):
            table.commit(complete=True)
        columns.append(torch.cat(parts) if table is None else torch.from_numpy(table.rows()))
    if not columns:
        raise StoreError("the test loader is empty.")
    if out is not None and Appendable(out, _name(len(columns))).there:
        raise StoreError(f"{out} holds more columns than there are test batches now; use another directory.")
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _check(train_loader: Iterable[Any], test_loader: Iterable[Any], block: Any, options: dict[str, Any]) -> None:
    """Raise for what can't be computed, before anything is."""
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ArgumentError(f"block must be at least one batch, an integer, got {block!r}.")
    if block is not None and isinstance(train_loader, Iterator):
        raise ArgumentError(
            f"the train loader is a {type(train_loader).__name__}, which can be read only once, but block= reads it "
            "once per block: give a DataLoader or a list, or leave block= out."
        )
    if "quantities" in options:
        raise ArgumentError("quantities= is not asked for here: products are what cross_gram computes.")
    for loader in (train_loader, test_loader):
        check_ordered(loader)


def _column(
    model: nn.Module, held: list[Features], features: Any, left: Any, table: Appendable | None, parts: list[Tensor]
) -> dict[str, Any]:
    """Products of all training batches with the test batches that are held: into ``parts``, or committed one by one.

    What is returned is how many training samples there are, and their ends.
    """
    rows, ends = (0, {}) if table is None else (len(table), table.meta.get("samples", {}))
    for first, inputs, targets, samples in left(rows, ends):
        mine = features(inputs, targets)
        products = torch.cat([grad_dot(mine, theirs) for theirs in held], 1).cpu()[first:]
        rows, ends = rows + len(products), samples
        if table is None:
            parts.append(products)
        else:
            own = lasting(table.meta["settings"], settings(model))  # but what the passes change
            table.append(products.numpy(), samples=samples, settings=own)
    return {"rows": rows, **ends}


def _blocks(loader: Iterable[Any], size: int | None, unpack: Unpack) -> Iterator[list[tuple[Any, Any]]]:
    batches = iter(loader)
    while block := [unpacked(batch, unpack) for batch in islice(batches, size)]:
        yield block


def _name(number: int) -> str:
    return f"columns-{number:05d}"


def _opened(out: str | os.PathLike[str], number: int, meta: dict[str, Any], own: Settings) -> Appendable:
    table = Appendable(out, _name(number))
    if table.there:
        for key, mine in meta.items():
            if not same(theirs := table.meta.get(key), mine):
                raise StoreError(
                    f"{table.json} is {another(key, theirs, mine)} Use another directory, or delete this one."
                )
    table.commit(**meta, settings=same_settings(table, own))
    return table
