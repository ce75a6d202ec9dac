"""What a pass of a model changes besides giving results: the random state, and buffers (running statistics, counters).

A sample alone has to find both as the batch found them, or it is another function: in training mode, spectral norms
iterate and statistics run at every forward.
"""

from __future__ import annotations

import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy
from torch.nn.utils.stateless import _reparametrize_module

from .errors import CaptureError, RandomnessError

P = ParamSpec("P")
R = TypeVar("R")

OWN: ContextVar[bool] = ContextVar("own", default=False)  # the pass that runs is the library's, not the user's


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once.  The generators behind ``model.modules()`` take several times as long."""
    found = {model: None}
    queue = [model]
    for module in queue:
        for child in module._modules.values() if module._modules else ():
            if child is not None and child not in found:
                found[child] = None
                queue.append(child)
    return queue


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names, with the dot that its members' names go on after, in the order
    of torch's own (slower) generators with ``remove_duplicate=False``.
    """
    found, stack = [], [("", model)]
    while stack:
        prefix, module = stack.pop()
        found.append((prefix, module))
        if module._modules:
            stack += [(f"{prefix}{name}.", m) for name, m in reversed([*module._modules.items()]) if m is not None]
    return found


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside of what `torch.compile`, `DataParallel` and `DistributedDataParallel` put around it, and what
    that puts before its names.
    """
    prefix = ""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is not None:
            model, prefix = inner, f"{prefix}_orig_mod."
        elif type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel):  # others may run it otherwise
            inner = model.module
            model, prefix = inner, f"{prefix}module."
        else:
            return model, prefix


def parameters_of(model: nn.Module) -> list[Tensor]:
    """The parameters of every module; tied ones under each."""
    return [p for module in modules_of(model) for p in module._parameters.values() if p is not None]


_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Lock:
    """A lock that weak references can be made to."""

    def __init__(self) -> None:
        self.lock = threading.RLock()


def taking_turns(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of a model (its first argument) run in one thread at a time, for some swap its parameters for
    their own; and as it is written, also where a compiled function calls it.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with _GUARD:
            own = _LOCKS.setdefault(id(getattr(model, "_orig_mod", model)), _Lock())
        with own.lock:
            plain: Callable[P, R] = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
            return plain(*args, **kwargs)

    return run


_GUARD = threading.Lock()


@dataclass(frozen=True, eq=False)
class RandomState:
    """Of the CPU's generator, those of the devices that a model's parameters live on, and those of NumPy and Python, by
    which some models draw (masks of spectra).
    """

    torch: list[tuple[torch.device, Tensor]]
    numpy: Any
    python: Any

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and all(torch.equal(x, y) for (_, x), (_, y) in zip(self.torch, other.torch, strict=True))
            and _alike(self.numpy, other.numpy)
            and bool(self.python == other.python)
        )


def _alike(a: Any, b: Any) -> bool:
    """Whether two states of NumPy's, of whichever generator, are the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(x, b[key]) for key, x in a.items())
    return bool(np.array_equal(a, b))


def random_state(model: nn.Module) -> RandomState:
    """The state of all generators that a pass of the model may draw from."""
    return RandomState(_torch_state(model), np.random.get_state(legacy=False), random.getstate())  # noqa: NPY002 (models draw from it)


def set_random_state(state: RandomState) -> None:
    """Back to what `random_state` returned."""
    _set_torch_state(state.torch)
    np.random.set_state(state.numpy)  # noqa: NPY002
    random.setstate(state.python)


def _torch_state(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    devices = {p.device for p in parameters_of(model)} - {torch.device("cpu")}
    own = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices if d.type != "meta"]
    return [(torch.device("cpu"), torch.get_rng_state()), *own]


def _set_torch_state(state: list[tuple[torch.device, Tensor]]) -> None:
    for device, value in state:
        if device.type == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


def drawn_since(before: RandomState, model: nn.Module) -> bool:
    """Whether random numbers were drawn."""
    return before != random_state(model)


@contextmanager
def random_kept(devices: list[int] | None = None) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU and these devices (``None``: all), afterwards nothing was."""
    numpy, python = np.random.get_state(legacy=False), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, all generators begin with this seed; outside, nothing was drawn."""
    with random_kept():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield


def check_generator(generator: Any) -> None:
    """Raise for what is neither a generator nor ``None``, the global one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise RandomnessError(f"generator must be a torch.Generator, got {type(generator).__name__}.")


def seed_of(generator: torch.Generator | None, below: int = 2**63 - 1) -> int:
    """The next draw of a generator (``None``: the global one), as the seed of another.

    So what is drawn has a stream of its own: from the global state itself, targets would be made of the same random
    numbers as the dropout masks of the forward pass, which begin there too.
    """
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(below, (), generator=generator, device=device))


AutocastState = list[tuple[str, bool, torch.dtype]]


def autocast_state() -> AutocastState:
    """Of every kind of device: whether autocast is on, and to what type."""
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda", "mps", "xpu")]


@contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """Inside, autocast is what it was at `autocast_state`."""
    with ExitStack() as stack:
        for now, (device, enabled, dtype) in zip(autocast_state(), state, strict=True):
            if now != (device, enabled, dtype) and (enabled or now[1]):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield


class Buffers:
    """Buffers of a model (and a criterion) as they are now, to be put back, or at the end of a with-block: those that a
    forward changes, and those that it replaces.
    """

    def __init__(self, *owners: Any) -> None:
        self.owners = [owner for owner in owners if isinstance(owner, nn.Module)]
        self.values = [
            (module, name, b, b.detach().clone(), 0 if b.is_inference() else b._version)
            for owner in self.owners
            for module in modules_of(owner)
            for name, b in module._buffers.items()
            if b is not None and not is_lazy(b) and b.layout is torch.strided and not b.is_meta
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.restore()

    def moved(self) -> str:
        """The name of one of floating point that is another one now; empty if there is none."""
        pairs = (
            (name, now, value) for m, name, _, value, _ in self.values if (now := m._buffers.get(name)) is not None
        )
        return next((name for name, now, value in pairs if now.is_floating_point() and not _same(now, value)), "")

    def restore(self) -> None:
        """As they were, also for graphs of the user's that have saved them."""
        with torch.no_grad():
            for module, name, buffer, value, version in self.values:
                module._buffers[name] = buffer
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                if not _same(buffer, value):  # versions don't tell: native batch norm doesn't count its writes
                    buffer.copy_(value)
                if not buffer.is_inference() and buffer._version != version:
                    torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))


def _same(a: Tensor, b: Tensor) -> bool:
    """With NaN where there was NaN."""
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan()).all())
    )


class Averaged:
    """What forwards of some samples each, all begun with the same buffers, leave of these: their mean, by the number of
    samples.  That is what one forward of all samples leaves, where it is a mean over samples or the same in each.

    Parameters have to stay: a forward that writes them (``p.data``) would run later samples at other values.
    """

    def __init__(self, begin: Buffers) -> None:
        self.count, self.owners = 0, begin.owners
        self.first: dict[tuple[int, str], int] = {}  # the parameters after the first forward
        self.passes = 0
        self.totals = [
            (module, name, value, torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32)))
            for module, name, _, value, _ in begin.values
            if value.is_floating_point() or value.is_complex()
        ]

    def take(self, n: int) -> None:
        """After a forward of ``n`` samples."""
        self.passes += 1
        if self.passes == 1:
            self.first = self._parameters()
        elif self.passes == 2:  # some changes come back with the third
            self._compare()
        self.count += n
        for module, name, _, total in self.totals:
            if (now := getattr(module, name, None)) is not None and now.shape == total.shape:
                total.add_(now.detach(), alpha=n)

    def leave(self) -> None:
        """After the last forward; raise where the parameters aren't those of the first."""
        if self.passes > 2:
            self._compare()
        with torch.no_grad():
            for module, name, before, total in self.totals:
                now = getattr(module, name, None)
                if now is not None and now.shape == total.shape and not _same(now, before):
                    with _unsafe_preserve_version_counter(now):  # it is the forwards that count
                        now.copy_(total / self.count)

    def _compare(self) -> None:
        now = self._parameters()
        if moved := [key for key, before in self.first.items() if now.get(key, before) != before]:
            raise CaptureError(
                f"'{moved[0][1]}' changes whenever the model runs (its forward writes it, by .data or in a way that "
                "torch doesn't count), so samples that run one after the other have gradients at different values. "
                "Change it outside of the forward; or run the batch at once: engine='hooks', verify=False, without "
                "max_bytes=."
            )

    def _parameters(self) -> dict[tuple[int, str], int]:
        """A number of each parameter that tells whether it was changed, without a copy of it."""
        named = [(i, *pair) for i, owner in enumerate(self.owners) for pair in owner.named_parameters()]
        return {(i, name): _digest(p.detach()) for i, name, p in named if _has_numbers(p)}


def _has_numbers(p: Tensor) -> bool:
    """Whether its entries can be read: not those of wrappers, lazy and sparse ones."""
    plain = type(p).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(p)
    return plain and p.layout is torch.strided and not p.is_meta


def _digest(p: Tensor) -> int:
    """The sum of all entries' bits, each times a number that tells its place: no change is too small to be seen."""
    p = p.int_repr() if p.is_quantized else torch.view_as_real(p.resolve_conj()) if p.is_complex() else p
    p = p.permute(sorted(range(p.ndim), key=p.stride, reverse=True))  # channels last, too, as it lies in memory
    weights, found = _weights(p.device), torch.zeros((), dtype=torch.int64, device=p.device)
    for part in p.reshape(-1).contiguous().view(_BITS[p.element_size()]).split(len(weights)):
        found = found * 31 + (part.long() * weights[: len(part)]).sum()  # modulo 2**64
    return int(found)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """One for each entry of a block; odd, so that every bit of every entry counts."""
    drawn = torch.randint(2**31, (2**16,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return (drawn | 1).to(device)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class undone_on_error:
    """What raises inside leaves random state (that of torch) and buffers as they were."""

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        self.random, self.buffers = _torch_state(model), Buffers(model, loss_fn)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            _set_torch_state(self.random)
            self.buffers.restore()


@contextmanager
def restored(model: nn.Module, loss_fn: Any = None, *, begin: Buffers | None = None) -> Iterator[None]:
    """Afterwards, random state and buffers (those of a criterion too) are what they are now; inside, buffers begin as
    those in ``begin``.
    """
    drawn, buffers = random_state(model), Buffers(model, loss_fn)
    if begin is not None:
        begin.restore()
    try:
        yield
    finally:
        set_random_state(drawn)
        buffers.restore()


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has other parameters and buffers; afterwards its own, also if Ctrl-C comes while these are put
    back.
    """
    pairs = [(m._parameters, m._buffers) for m in modules_of(model)]
    held: list[dict[str, Any]] = [own for pair in pairs for own in pair if isinstance(own, dict)]  # not of scripts
    before = [dict(own) for own in held]
    try:
        with _reparametrize_module(model, dict(tensors), tie_weights=True, stack_weights=True):
            yield
    finally:
        for now, then in zip(held, before, strict=True):
            if any(now.get(name) is not t for name, t in then.items()):
                now.update(then)
