"""How kernels compute: into reused memory, without autograd and without autocast.

Fresh memory costs more than arithmetic: writing into pages that the system has to hand out first runs at a tenth of the
speed of writing into pages in use.  `borrow` hands out parts of buffers that the calling thread keeps for next time.
Other devices than the CPU have allocators of their own that do this, aware of streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

KEPT = 1 << 26  # bytes: what is larger goes back to the system

P = ParamSpec("P")
R = TypeVar("R")


class _Pool(threading.local):
    """The buffers of one thread that nobody uses at the moment."""

    def __init__(self) -> None:
        self.free: dict[torch.dtype, list[Tensor]] = {}


_pool = _Pool()


@contextmanager
def borrow(like: Tensor, *shape: int) -> Iterator[Tensor]:
    """An uninitialised tensor of the given shape, with the dtype and device of ``like``, until the end of the block."""
    size = prod(shape)
    if like.device.type != "cpu":
        yield like.new_empty(shape)
        return
    free = _pool.free.setdefault(like.dtype, [])
    fitting = [b for b in free if b.numel() >= size]
    if fitting:
        buffer = min(fitting, key=Tensor.numel)
        free[:] = [b for b in free if b is not buffer]
    else:
        if free:  # grow instead of keeping every size
            del free[0]
        with torch.inference_mode(False):  # or the next one could not write into it
            buffer = torch.empty(size, dtype=like.dtype)
    try:
        yield buffer[:size].view(shape)
    finally:
        if buffer.numel() * buffer.element_size() <= KEPT:
            free.append(buffer)
            free.sort(key=Tensor.numel)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` on plain numbers: no graph, no reduced precision from an autocast region around it."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()):  # most often, within another kernel
            return function(*args, **kwargs)
        with torch.no_grad():
            active = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(device)]
            if not active:
                return function(*args, **kwargs)
            with _without_autocast(active):
                return function(*args, **kwargs)

    return run


@contextmanager
def _without_autocast(devices: list[str]) -> Iterator[None]:
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)
