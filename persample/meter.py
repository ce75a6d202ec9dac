"""How much memory a computation takes: the most that its tensors hold at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While it is active, ``most`` is the most bytes that what is computed has taken at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, weakref.ref[Any]] = {}  # storages
        self.now = self.most = 0
        self.resting = False

    def __enter__(self) -> Meter:
        self._token = _counting.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _counting.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.resting:
            return func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs)):
            self._see(t, computed=False)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            self._see(t, computed=True)
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without counting what is computed inside, or by a function decorated with it."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before

    def _see(self, t: Any, computed: bool) -> None:
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if computed else 0
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


_counting: ContextVar[Meter | None] = ContextVar("counting", default=None)


@contextmanager
def uncounted() -> Iterator[None]:
    """`Meter.paused` of whichever is active: for what is no part of the computation, such as verifying it."""
    meter = _counting.get()
    with nullcontext() if meter is None else meter.paused():
        yield
