"""A table on disk that grows row by row and survives being killed: ``<name>.npy`` and ``<name>.json``.

The array is an ordinary ``.npy`` file, the JSON says how many of its rows are *committed* (and what they are).  An
append writes rows behind the committed ones, syncs, corrects the shape in the header of the ``.npy`` (numpy leaves
room for that), syncs, and then replaces the JSON by a rename.  That rename is the commit: a process that dies before
it leaves the old count, and what was written beyond is overwritten by the next append.  Nothing is lost that an
append has returned from, and nothing is counted twice.  Without the library: ``np.load("x.npy", mmap_mode="r")[:
json["rows"]]``.

One writer at a time: whoever appends or commits finds the JSON as it left it, or raises.  It looks and writes under a
lock, ``<name>.lock``, so that nobody else's rows come in between; readers need none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from .lock import locked

HEADER = 128  # bytes of a version 1.0 header, which has room for a growing first axis
NOTHING: dict[str, Any] = {"rows": 0}  # what is said of no file


class Appendable:
    """Rows of ``width`` numbers at ``directory/name``; opened if it is there, else made by the first `append`.

    Raises:
        StoreError: the JSON can't be read, or the array is shorter than it says.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str) -> None:
        self.data, self.json = Path(directory, f"{name}.npy"), Path(directory, f"{name}.json")
        self.lock = Path(directory, f"{name}.lock")
        found = _read(self.json)
        self.there = found is not None  # the JSON, when it was last read or written
        self.meta: dict[str, Any] = found or dict(NOTHING)
        self._check_whole()

    def __len__(self) -> int:
        return int(self.meta["rows"])

    def append(self, rows: NDArray[Any], **meta: Any) -> None:
        """Add rows ``[n, width]`` and entries of the JSON, and commit both."""
        known = {"width": rows.shape[1], "dtype": rows.dtype.newbyteorder("<").str}
        if len(self) and known != (mine := {key: self.meta[key] for key in known}):
            raise StoreError(f"{self.data} holds rows of {mine}, these are {known}.")
        before, after = len(self), len(self) + len(rows)
        with locked(self.lock):
            self._check_mine(_read(self.json))
            self._check_whole()
            with self.data.open("r+b" if self.data.exists() else "w+b") as file:
                file.truncate(HEADER + before * rows.shape[1] * rows.dtype.itemsize)  # what was never committed
                file.seek(0, os.SEEK_END)
                file.write(np.ascontiguousarray(rows, dtype=known["dtype"]).data)
                _sync(file)
                file.seek(0)
                file.write(_header(known["dtype"], after, rows.shape[1]))
                _sync(file)
            begun = {} if before else {"begun": uuid4().hex}  # tells these rows from any that may be here later
            self._replace({**self.meta, "rows": after, **known, **begun, **meta})

    def commit(self, **meta: Any) -> None:
        """Add entries of the JSON, if they aren't there."""
        new = {**self.meta, **meta}
        if self.there and same(new, self.meta):
            return
        with locked(self.lock):
            found = _read(self.json)
            if found is None or not same(found, new):  # somebody may have said the same
                self._check_mine(found)
                self._replace(new)
            else:
                self.meta, self.there = found, True

    def _replace(self, new: dict[str, Any]) -> None:
        """Replace the JSON, by a rename."""
        temporary = self.json.with_suffix(".json.new")
        with temporary.open("w") as file:
            json.dump(new, file, indent=1)
            _sync(file)
        os.replace(temporary, self.json)
        self.meta, self.there = json.loads(json.dumps(new)), True  # as it will be read

    def rows(self) -> NDArray[Any]:
        """``[rows, width]``: the committed rows, memory-mapped (changes stay in memory)."""
        if not len(self):
            return np.empty((0, self.meta.get("width", 0)), self.meta.get("dtype", "<f4"))
        self._check_begun()
        self._check_whole()
        shape = (len(self), self.meta["width"])
        return np.memmap(self.data, self.meta["dtype"], mode="c", offset=HEADER, shape=shape)

    def _check_mine(self, found: dict[str, Any] | None) -> None:
        """Raise if somebody else has committed since: their rows would be cut off, or counted as others."""
        if not same(found or NOTHING, self.meta):
            raise StoreError(
                f"{self.json} is not what this handle last read or wrote: it says {(found or NOTHING)['rows']} rows, "
                f"not {len(self)}, or something else about them. One writer at a time: open it again, and go on with "
                "that."
            )

    def _check_begun(self) -> None:
        """Raise if the rows there are no longer those that this handle knows, or followed by more."""
        found = _read(self.json) or NOTHING
        if found.get("begun") != self.meta.get("begun") or found["rows"] < len(self):
            raise StoreError(
                f"{self.data} holds other rows than when this handle was opened: it was deleted, or begun anew, since. "
                "Open it again."
            )

    def _check_whole(self) -> None:
        """Raise if committed rows are not there: the file would be filled up with zeros."""
        if not len(self):
            return
        needed = HEADER + len(self) * self.meta["width"] * np.dtype(self.meta["dtype"]).itemsize
        found = self.data.stat().st_size if self.data.exists() else 0
        if found < needed:
            raise StoreError(
                f"{self.data} is damaged: it has {found} bytes, but {len(self)} rows were written, which take "
                f"{needed}. Restore it from a copy, or delete the directory and begin again."
            )


def same(a: Any, b: Any) -> bool:
    """Whether two entries of a JSON are equal, also in the order of their names, which is that of columns."""
    return json.dumps(a) == json.dumps(b)


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON, if it says what it must; ``None`` if there is none."""
    try:
        meta = json.loads(path.read_text())
        if meta["rows"] > 0:
            np.dtype(meta["dtype"]), int(meta["width"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged, or of something else: {type(error).__name__}: {error}. Restore it from a copy, or "
            "delete the directory and begin again."
        ) from error
    return dict(meta)


def _header(dtype: str, rows: int, width: int) -> bytes:
    """A header of exactly `HEADER` bytes, whatever the number of rows."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
