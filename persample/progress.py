"""Progress bars, off unless asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], show: bool, description: str, total: int | None = None) -> Iterable[T]:
    """``items``, behind a bar of tqdm if ``show``."""
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'persample[progress]'.") from error
    known = total if total is not None else len(items) if isinstance(items, Sized) else None
    return tqdm(items, desc=description, total=known)  # type: ignore[no-any-return]
