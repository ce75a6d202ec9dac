"""Per-sample gradients on disk, whole or projected: computed once, for any number of attributions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..api import gradients
from ..batch import Batch
from ..errors import StoreError
from ..losses import LossFunction
from ..problem import Selection, named_parameters, select
from ..progress import bar
from ..quantities import Quantities
from ..statistics_run import Statistics
from .appendable import Appendable
from .projection import Projection

Unpack = Callable[[Any], tuple[Any, Any]]


class GradientStore:
    """Rows ``[n, D]``, or projected ones ``[n, k]``, in ``path/rows.npy``, described by ``path/rows.json``.

    The JSON names the parameters and their shapes in the order of columns (``layout``), the scale of the losses, the
    projection, a SHA-256 of the model's parameters and buffers, and how many rows are committed.  A store that is
    opened again with anything else refuses.  It is safe to kill the process at any moment, see
    `persample.attribution.appendable`.

    Args:
        path: a directory; made if needed.
        model: whose gradients are to be added.  ``None``: reading only.
        projection: keep ``G.project(projection)`` instead of rows.
        params: which parameters, as in `persample.gradients`.
        scale: what the losses are, in words.  Rows are unscaled; say here if your own loss function is scaled, so
            that two scales are never mixed.
        dtype: of what is written.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module | None = None, *, projection: Projection | None = None,
        params: Selection = None, scale: str = "unscaled", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.table = Appendable(path, "rows")
        self.model, self.projection, self.dtype = model, projection, dtype
        if model is None:
            if not self.table.json.exists():
                raise StoreError(f"there is no store at {path}; give a model to begin one.")
            return
        meta = describe(model, params, projection, scale)
        self.names = list(meta["layout"])
        self._versions = self._state()
        for key, mine in meta.items() if self.table.json.exists() else ():
            if (theirs := self.table.meta[key]) != mine:
                raise StoreError(
                    f"the store at {path} is of another {key}: {_brief(theirs)} there, {_brief(mine)} here."
                )
        self.table.commit(**meta)

    def __len__(self) -> int:
        return len(self.table)

    def rows(self) -> Tensor:
        """``[n, D]`` or ``[n, k]``: the committed rows, memory-mapped (what you write to it is not saved)."""
        return torch.from_numpy(self.table.rows())

    def append(self, G: Quantities, first: int = 0) -> None:
        """Add the rows of one batch (from sample ``first`` on), and commit them.

        ``G`` are `Gradients`, or with a projection also `Statistics` of ``[("project", {"projection": projection})]``.
        """
        self._check(G)
        rows = G.flat() if self.projection is None else G.project(self.projection)  # type: ignore[attr-defined]
        self.table.append(rows[first:].detach().to("cpu", self.dtype).numpy())

    def extend(
        self, loss_fn: LossFunction, loader: Iterable[Any], *, unpack: Unpack = lambda batch: batch,
        progress: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Add all samples of a loader that are not there yet.

        After a kill, call it again: as many samples as are committed are skipped without computing anything, also if
        the batches are of another size now.  The order must be the same, so a loader that shuffles is refused.
        """
        if self.model is None:
            raise StoreError("this store was opened for reading; give it a model.")
        quantities = None if self.projection is None else [("project", {"projection": self.projection})]
        axis = options.get("batch_dim", 0)
        for first, inputs, targets in missing(loader, len(self), unpack, progress, axis):
            G = gradients(self.model, loss_fn, inputs, targets, params=self.names, quantities=quantities, **options)
            self.append(G, first)

    def _check(self, G: Quantities) -> None:
        if self.model is None:
            raise StoreError("this store was opened for reading; give it a model.")
        if {name: list(shape) for name, shape in G.shapes.items()} != self.table.meta["layout"]:
            raise StoreError(
                f"these gradients are of other parameters than the store's {self.names}; use params= or select()."
            )
        if self._versions != self._state():
            raise StoreError(
                "the model has changed since the store was opened; begin another store for its new parameters."
            )
        if self.projection is None and isinstance(G, Statistics):
            raise StoreError("whole rows need the rows: compute gradients without quantities=.")

    def _state(self) -> list[tuple[int, int]]:
        assert self.model is not None
        return [(p.data_ptr(), p._version) for p in self.model.parameters()]

    def __repr__(self) -> str:
        meta = self.table.meta
        return f"GradientStore({len(self)} rows of {meta.get('width', '?')}, projection={meta['projection']})"


def describe(model: nn.Module, params: Selection, projection: Projection | None, scale: str) -> dict[str, Any]:
    """What has to agree between rows that are compared: layout, scale, projection, model."""
    found, aliases = named_parameters(model)
    return {
        "layout": {name: list(found[name].shape) for name in select(found, aliases, params)},
        "scale": scale,
        "projection": None if projection is None else projection.spec(),
        "model": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, t in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def missing(
    loader: Iterable[Any], done: int, unpack: Unpack, progress: bool, batch_dim: Any
) -> Iterator[tuple[int, Any, Any]]:
    """Batches beyond the first ``done`` samples of a loader: the first sample that is not done, inputs, targets."""
    check_ordered(loader)
    seen = 0
    for batch in bar(loader, progress, "gradients"):
        inputs, targets = unpack(batch)
        n = Batch.of(inputs, targets, batch_dim).n
        if seen + n > done:
            yield max(0, done - seen), inputs, targets
        seen += n


def check_ordered(loader: Iterable[Any]) -> None:
    """Raise for a loader that shuffles."""
    if isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler):
        raise StoreError("the loader shuffles, but rows keep its order, and are resumed by it: use shuffle=False.")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
