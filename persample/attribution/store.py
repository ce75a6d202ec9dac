"""Per-sample gradients on disk, whole or projected: computed once, for any number of attributions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..api import gradients
from ..errors import ArgumentError, StoreError
from ..losses import LossFunction
from ..problem import Selection, asked_for, named_parameters
from ..quantities import COUPLED, Quantities, notion_of
from ..remembered import Settings, changed, lasting, settings
from ..state import Buffers, unwrapped
from ..statistics_run import Statistics
from .appendable import Appendable, same
from .called import called
from .loaders import Unpack, check_ordered, fingerprint, grown, missing
from .projection import Projection

DTYPES = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)  # that numpy knows


class GradientStore:
    """Rows ``[n, D]``, or projected ones ``[n, k]``, in ``path/rows.npy``, described by ``path/rows.json``.

    The JSON names the parameters and their shapes in the order of columns (``layout``), the scale of the losses, the
    projection, a SHA-256 of the model's parameters and buffers (and of its modes), what its modules are set to, how
    many rows are committed and of which notion (of coupled samples), and of those that `extend` added the loss
    function, digests of the first and the last sample, and of coupled ones the sizes of their batches.  A store that
    is opened or gone on with by anything else refuses.  It is safe to kill the process at any moment, see
    `persample.attribution.appendable`.

    Args:
        path: a directory; made if needed.
        model: whose gradients are to be added.  ``None``: reading only.
        projection: keep ``G.project(projection)`` instead of rows.  Of a store opened for reading, ``projection`` is
            the one that it was written with: what test rows have to be projected with, too.
        params: which parameters, as in `persample.gradients`.
        scale: what the losses are, in words.  Rows are unscaled; say here if your own loss function is scaled, so
            that two scales are never mixed.
        dtype: of what is written: float32 by default, float16, float64, or complex for complex rows.  Entries below
            6e-8 are 0 in float16, rows that overflow or vanish in it are an error.

    Raises:
        ArgumentError: a ``dtype`` that is none of these, or a ``projection`` that is none.
        StoreError: there is no store and no model, or one of something else, or a damaged one.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module | None = None, *, projection: Projection | None = None,
        params: Selection = None, scale: str = "unscaled", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise ArgumentError(
                f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}: numpy has no bfloat16 (take "
                "float32), and integers would lose what is behind the point."
            )
        self.table = Appendable(path, "rows")
        self._runs = model  # with what was put around it; names are those inside
        model = None if model is None else unwrapped(model)[0]
        self.model, self.projection, self.dtype = model, projection, dtype
        if model is None:
            if not self.table.there:
                raise StoreError(f"there is no store at {path}; give a model to begin one.")
            self.projection = self._read_projection()
            if projection is not None and _spec(projection) != (theirs := _spec(self.projection)):
                raise StoreError(
                    f"the store at {path} is {another('projection', theirs, _spec(projection))} Open it with that."
                )
            return
        meta = describe(model, params, projection, scale)
        self.names = list(meta["layout"])
        self._versions = self._state()
        if self.table.there:
            kind = {"dtype": np.dtype(str(dtype).removeprefix("torch.")).newbyteorder("<").str}
            self._check_same(meta | (kind if "dtype" in self.table.meta else {}))
        self.table.commit(**meta, settings=self._settings())

    def _read_projection(self) -> Projection | None:
        spec = self.table.meta.get("projection")
        try:
            return None if spec is None else Projection(**spec)
        except (TypeError, ArgumentError) as error:
            raise StoreError(
                f"the projection of the store at {self.table.data.parent} can't be read: {spec!r} ({error}). It may be "
                "of another version."
            ) from error

    def __len__(self) -> int:
        return len(self.table)

    def rows(self) -> Tensor:
        """``[n, D]`` or ``[n, k]``: the committed rows, memory-mapped (what you write to it is not saved)."""
        return torch.from_numpy(self.table.rows())

    def append(self, G: Quantities, first: int = 0) -> None:
        """Add the rows of one batch (from sample ``first`` on), and commit them.

        ``G`` are `Gradients`, or with a projection also `Statistics` of ``[("project", {"projection": projection})]``.
        Of what loss and samples they are is not known to the store; ``scale`` is there to say it.  Rows without the
        beginning of their batch can't be gone on with by `extend` if they are coupled.

        Raises:
            ArgumentError: ``first`` is no sample of ``G``.
            StoreError: other parameters than the store's, another model than when it was opened (or one that was
                written to since ``G`` was computed), rows of another notion (``coupled=``) than those that are there,
                or that the store's dtype can't hold, or another handle has written since.
        """
        if not isinstance(G, Quantities):
            raise ArgumentError(
                f"append() takes the gradients of a batch (persample.gradients(...)), got {type(G).__name__}."
            )
        samples = self.table.meta.get("samples", {"first": None})
        batches = [] if first else grown(samples.get("batches", []), len(G))
        self._append(G, first, samples={**samples, "last": None, "batches": batches})

    def _append(self, G: Quantities, first: int, own: Settings | None = None, **meta: Any) -> None:
        self._check(G)
        kind = self._notion(G)
        own = own or self._settings(counters=True)
        if not hasattr(first, "__index__") or not 0 <= first <= len(G):
            raise ArgumentError(f"first must be a sample of the batch, 0 to {len(G)}, got {first!r}.")
        rows = G.flat() if self.projection is None else G.project(self.projection)  # type: ignore[attr-defined]
        self.table.append(_written(rows[first:].detach().cpu(), self.dtype).numpy(), settings=own, notion=kind, **meta)

    def extend(
        self, loss_fn: LossFunction, loader: Iterable[Any], *, unpack: Unpack = lambda batch: batch,
        progress: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Add all samples of a loader that are not there yet.

        After a kill, call it again: as many samples as are committed are skipped without computing anything, also if
        the batches are of another size now.  The samples and their order must be the same, so a loader that shuffles is
        refused, and so is one that begins with another sample, or has another one where the store ends.  With
        ``coupled`` (but "eval") a row depends on its whole batch, so the batches must be the same as well.

        Every batch finds the model's buffers (running statistics, power iterations) as they were given, and so are
        they afterwards.

        Args:
            loss_fn, options: as in `persample.gradients`.
            loader: batches that ``unpack`` turns into inputs and targets.
            unpack: a function from a batch to ``(inputs, targets)``.
            progress: show a bar (needs tqdm).

        Raises:
            ArgumentError: an option that the store sets itself, or a batch that is no pair.
            StoreError: as `append`, and for another loss function, ``coupled`` or samples than before, or coupled
                samples in other batches.
        """
        if self.model is None or self._runs is None:
            raise StoreError("this store was opened for reading; give it a model.")
        if callable(loader) and not callable(loss_fn):
            raise ArgumentError(
                "extend takes the loss function first, and then the loader: extend(loss_fn, loader), got "
                f"{type(loss_fn).__name__} and {type(loader).__name__}."
            )
        for option, where in (("params", "params="), ("quantities", "projection=")):
            if option in options:
                raise ArgumentError(f"{option}= is not asked for here: what is kept is said by GradientStore({where}).")
        check_ordered(loader)
        if fingerprint(self.model) != self.table.meta["model"]:  # also what no version tells (p.data)
            raise _changed()
        asked = {"loss": called(loss_fn), "coupled": options.get("coupled")}
        if len(self):
            self._check_same({key: mine for key, mine in asked.items() if key in self.table.meta})
        quantities = None if self.projection is None else [("project", {"projection": self.projection})]
        done, ends, own = len(self), self.table.meta.get("samples", {}), self._settings()
        for first, inputs, targets, samples in missing(loader, done, ends, unpack, progress, options):
            with Buffers(self.model):
                chosen = same_parameters(self.model, self.names)
                G = gradients(self._runs, loss_fn, inputs, targets, params=chosen, quantities=quantities, **options)
            own = lasting(own, settings(self.model))
            self._append(G, first, own, samples=samples, **asked)

    def _check(self, G: Quantities) -> None:
        if self.model is None:
            raise StoreError("this store was opened for reading; give it a model.")
        if not same(
            {name.removeprefix(G._wrapper): list(shape) for name, shape in G.shapes.items()}, self.table.meta["layout"]
        ):
            raise StoreError(
                f"these gradients are of other parameters than the store's {self.names}; use params= or select()."
            )
        for name, p in named_parameters(self.model)[0].items():
            theirs = G._parameters.get(G._wrapper + name)
            if theirs is not None and theirs is not p and not torch.equal(theirs, p):
                raise StoreError(
                    f"these gradients are of another model than the store's: parameter '{name}' has other values. A "
                    "store holds rows of one model; begin another one for each checkpoint."
                )
        if moved := G._moved():
            raise StoreError(
                f"parameter '{moved[0]}' was written to after these gradients were computed (a step of an optimizer, "
                "load_state_dict, or a move to another device or type), so they may be of another model than the "
                "store's. Append them before the model changes, or compute them again."
            )
        if self._versions != self._state():  # BatchNorm's statistics are written, and put back, in training mode
            if fingerprint(self.model) != self.table.meta["model"]:
                raise _changed()
            self._versions = self._state()
        if self.projection is None and isinstance(G, Statistics):
            raise StoreError("whole rows need the rows: compute gradients without quantities=.")

    def _notion(self, G: Quantities) -> str | None:
        """What the rows of the store are, these included; ``None``: a sample that was alone doesn't tell."""
        mine = notion_of(G)
        theirs: str | None = self.table.meta.get("notion") if len(self) else None
        if theirs is None:  # there are none, or those of an earlier version, which kept nothing of it
            return mine if mine or len(G) > 1 else None
        alone = len(G) == 1 and {mine, theirs} == {"", COUPLED}  # no other sample is there to act on it
        if mine != theirs and not alone:
            there, here = (repr(x) if x else "of independent samples" for x in (theirs, mine))
            raise StoreError(
                f"these rows are of another notion than those in the store at {self.table.data.parent}: {there} there, "
                f"{here} here. Compute them as those were (coupled=, verify=, the same recorder), or begin in another "
                "directory."
            )
        return theirs

    def _check_same(self, meta: dict[str, Any]) -> None:
        for key, mine in meta.items():
            if not same(theirs := self.table.meta.get(key), mine):
                raise StoreError(
                    f"the store at {self.table.data.parent} is {another(key, theirs, mine)} Open it with the same, or "
                    "begin in another directory."
                )

    def _settings(self, counters: bool = False) -> Settings:
        """As `same_settings`; with ``counters``, integers may differ, which may count passes made elsewhere."""
        assert self.model is not None
        return same_settings(self.table, settings(self.model), counters)

    def _state(self) -> list[tuple[int, int] | bool]:
        assert self.model is not None
        tensors = (*self.model.parameters(), *self.model.buffers())
        return [*((t.data_ptr(), t._version) for t in tensors), *(module.training for module in self.model.modules())]

    def __repr__(self) -> str:
        meta = self.table.meta
        return f"GradientStore({len(self)} rows of {meta.get('width', '?')}, projection={meta.get('projection')})"


def describe(model: nn.Module, params: Selection, projection: Projection | None, scale: str) -> dict[str, Any]:
    """What has to agree between rows that are compared: layout, scale, projection, model."""
    return {
        "layout": {name: list(p.shape) for name, p in asked_for(model, params)[0].items()},
        "scale": scale,
        "projection": _spec(projection),
        "model": fingerprint(model),
    }


def _spec(projection: Any) -> dict[str, int] | None:
    if projection is not None and not isinstance(projection, Projection):
        raise ArgumentError(f"projection must be a persample.attribution.Projection, got {type(projection).__name__}.")
    return None if projection is None else projection.spec()


def same_parameters(model: nn.Module, params: Selection) -> Callable[[str, Tensor], bool]:
    """A selection of the same parameters by whichever names: those that a wrapper gives them."""
    chosen = {id(p) for p in asked_for(model, params)[0].values()}
    return lambda _, p: id(p) in chosen


def same_settings(table: Appendable, now: Settings, counters: bool = False) -> Settings:
    """The settings that rows on disk and a model agree in; they have to, but for what passes of the model change."""
    there: Settings | None = table.meta.get("settings")
    if not len(table):
        return now
    if there is None:
        raise StoreError(
            f"{table.json} is of an earlier version, which didn't keep what the model is set to, so that it can be "
            "read, but not gone on with. Begin in another directory."
        )
    for key in changed(there, now):
        a, b = there.get(key, "not set"), now.get(key, "not set")
        if not (counters and _integer(a) and _integer(b)):
            which = f"'{key}'" if key else "it"
            raise StoreError(
                f"the rows of {table.data} are of a model that was set to something else: {which} was {a} then, and is "
                f"{b} now. Set it back, or begin in another directory."
            )
    return lasting(there, now)


def _integer(text: str | None) -> bool:
    return text is not None and text.lstrip("-").isdigit()


def another(key: str, theirs: Any, mine: Any) -> str:
    """What differs between an entry of the JSON and what was given."""
    a, b = str(theirs), str(mine)
    if key == "loss":  # whose beginning is often long, and the same
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        begin = alike - 30 if alike > 60 else 0
        a, b = (("..." if begin else "") + text[begin:] for text in (a, b))
    what = {
        "model": " (or of other buffers, or modes: train, eval)",
        "loss": " (or one that is set to something else)",
    }.get(key, "")
    return f"of another {key}{what}: {_brief(a)} there, {_brief(b)} here."


def _changed() -> StoreError:
    return StoreError(
        "the model has changed since the store was opened: its parameters, buffers (running statistics), or modes "
        "(train, eval). Begin another store for what it is now; or put it back."
    )


def _written(rows: Tensor, kind: torch.dtype) -> Tensor:
    """Rows in the type of the store, which has to hold them."""
    if rows.dtype.is_complex and not kind.is_complex:
        raise StoreError(f"the rows are complex, and the store's dtype {kind} is not: give dtype=torch.complex128.")
    kept = rows.to(kind)
    overflow = (rows.isfinite() & ~kept.isfinite()).any(1)
    vanished = (kept == 0).all(1) & (rows != 0).any(1)
    if bad := int((overflow | vanished).sum()):
        raise StoreError(
            f"{bad} row(s) would be {'infinite' if overflow.any() else 'zero'} in the store's dtype {kind}, which has "
            f"numbers from {torch.finfo(kind).tiny:.0e} to {torch.finfo(kind).max:.0e}. Give a larger dtype=."
        )
    return kept


def _brief(text: str) -> str:
    return text if len(text) < 100 else f"{text[:97]}..."
