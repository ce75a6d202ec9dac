"""Progress bars, off unless asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], show: bool, description: str) -> Iterable[T]:
    """``items``, behind a bar of tqdm if ``show``."""
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'persample[progress]'.") from error
    return tqdm(items, desc=description, total=len(items) if isinstance(items, Sized) else None)  # type: ignore[no-any-return]
