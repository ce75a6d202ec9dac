"""How kernels compute: into reused memory or large pages, without autograd and without autocast.

Fresh memory costs more than arithmetic: writing into pages that the system has to hand out first runs at a tenth of the
speed of writing into pages in use.  `borrow` hands out parts of buffers that the calling thread keeps for next time;
`fresh` is for results that the caller keeps: it hands out the memory of those that were dropped.
Other devices than the CPU have allocators of their own, aware of streams.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import prod
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

KEPT = 1 << 26  # bytes: what is larger goes back to the system
LARGE = 1 << 22  # bytes, from which on a result has whole large pages (2 MB, most often)
SPARE = 1 << 30  # bytes of results, at most, that nobody holds any more; of each thread

P = ParamSpec("P")
R = TypeVar("R")


class _Pool(threading.local):
    """The buffers of one thread that nobody uses at the moment."""

    def __init__(self) -> None:
        self.free: dict[torch.dtype, list[Tensor]] = {}
        self.idle: list[_Block] = []  # of results that were dropped, the longest idle first


_pool = _Pool()


class borrow:
    """An uninitialised tensor of the given shape, with the dtype and device of ``like``, until the end of the block."""

    def __init__(self, like: Tensor, *shape: int) -> None:
        self.like, self.shape = like, shape
        self.buffer: Tensor | None = None

    def __enter__(self) -> Tensor:
        like, size = self.like, prod(self.shape)
        if like.device.type != "cpu":
            return like.new_empty(self.shape)
        self.free = _pool.free.setdefault(like.dtype, [])  # from the smallest to the largest
        at = next((i for i, b in enumerate(self.free) if b.numel() >= size), None)
        if at is not None:
            self.buffer = self.free.pop(at)
        else:
            if self.free:  # grow instead of keeping every size
                del self.free[0]
            with torch.inference_mode(False):  # or the next one could not write into it
                self.buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        return self.buffer[:size].view(self.shape)

    def __exit__(self, *_: object) -> None:
        if self.buffer is not None and self.buffer.numel() * self.buffer.element_size() <= KEPT:
            self.free.append(self.buffer)
            self.free.sort(key=Tensor.numel)


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of the given shape, with the device of ``like`` and, unless given, its dtype, that lives
    on.

    If large, it lies in the memory of an earlier one that nobody holds any more, or else in large pages, where a system
    has them for those who ask (Linux): to fill it takes a seventh and a quarter of the time of ordinary pages.
    """
    kind = like.dtype if dtype is None else dtype
    size = prod(shape) * kind.itemsize
    if _ADVISE is None or size < LARGE or like.device.type != "cpu" or not _plain(like):
        return like.new_empty(shape, dtype=dtype)
    block = _taken(_pool.idle, size) or _Block.new(size)
    memory = block.bytes.numpy()[:]  # lives as long as what is made of it, and no longer
    weakref.finalize(memory, _give_back, block, _pool.idle).atexit = False
    out = torch.empty(0, dtype=kind, device="cpu")
    out.data = torch.frombuffer(memory, dtype=kind).view(shape)  # without being a view, as a new tensor
    return out


def zeros(like: Tensor, *shape: int) -> Tensor:
    """As `fresh`, filled with zeros."""
    return fresh(like, *shape).zero_()


def _plain(like: Tensor) -> bool:
    """Not inside a transform or a trace, which would have to know of the memory."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


class _Block(NamedTuple):
    """Memory, and its whole pages: as numbers, as nothing may be asked of tensors when a result is dropped."""

    bytes: Tensor
    size: int
    pages: tuple[int, int]  # where they begin, and how many bytes they are

    @classmethod
    def new(cls, size: int) -> _Block:
        """Of large pages, where the system has them."""
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (memory.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        block = cls(memory, size, (begin, max(0, end - begin)))
        block.advise(mmap.MADV_HUGEPAGE)
        return block

    def advise(self, how: int) -> None:
        """A wish, which may be refused."""
        if _ADVISE is not None:
            _ADVISE(*self.pages, how)


def _taken(idle: list[_Block], size: int) -> _Block | None:
    """A block of this size; if there is none, as much goes back to the system as will be taken from it."""
    for i in reversed(range(len(idle))):
        if idle[i].size == size:
            return idle.pop(i)
    while idle and size > 0:
        size -= idle.pop(0).size
    return None


def _give_back(block: _Block, idle: list[_Block]) -> None:
    """Called when a result is dropped, which may be by any thread, in the middle of anything: so it only appends."""
    if block.size + sum(other.size for other in idle.copy()) <= SPARE:
        block.advise(mmap.MADV_FREE)  # if the system is short of memory, it may have it
        idle.append(block)


def _advice() -> Callable[[int, int, int], int] | None:
    """``madvise`` of the C library, which Python has for memory of its own only."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


_ADVISE = _advice()


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
