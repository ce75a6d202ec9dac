"""How to get a quantity from this library's engines.  `benchmarks.peers` does the same for other libraries.

An engine is a function ``(model, x, y, quantity) -> run``, with ``run() -> Result``, which may prepare what a user
prepares once: buffers, hooks, wrappers.  It raises `Unserved` where there is nothing to call, and lets errors through.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import persample
from persample.capture import Capture

from .measure import peak
from .quantities import QUANTITIES, Result, norm
from .workloads import losses

Run = Callable[[], Result]
Engine = Callable[[nn.Module, Tensor, Tensor, str], Run]


class Unserved(Exception):
    """There is no way to ask for this."""


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """What everything is compared with: the forward and backward pass of an ordinary training step."""

    def run() -> None:
        model.zero_grad()
        losses(model(x), y).mean().backward()

    return run


def kept(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """Rows kept as factors, then asked."""
    if quantity == "Q1r":
        out = {name: p.new_empty(len(x), *p.shape) for name, p in model.named_parameters()}
        return lambda: persample.gradients(model, losses, x, y, verify=False).dense(out=out)
    return lambda: QUANTITIES[quantity].ask(persample.gradients(model, losses, x, y, verify=False))


def streamed(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """Reduced on arrival."""
    q = QUANTITIES[quantity]
    if not q.requests:
        raise Unserved("a statistics run keeps no rows")
    return lambda: q.ask(persample.gradients(model, losses, x, y, quantities=q.requests, verify=False))


def sliced(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """Reduced on arrival, within the memory of the plain pass."""
    q = QUANTITIES[quantity]
    if not q.requests:
        raise Unserved("a statistics run keeps no rows")
    bound, _ = peak(plain(model, x, y))
    model.zero_grad()
    return lambda: q.ask(persample.gradients(model, losses, x, y, quantities=q.requests, max_bytes=bound, verify=False))


def by(engine: str, **options: object) -> Engine:
    """With rows from another engine of this library."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
        if quantity == "Q1r":
            raise Unserved("rows are made in fresh memory")
        ask = QUANTITIES[quantity].ask
        return lambda: ask(persample.gradients(model, losses, x, y, engine=engine, verify=False, **options))

    return prepare


OURS: dict[str, Engine] = {
    "persample": streamed,
    "persample, max_bytes": sliced,
    "persample, rows kept": kept,
    "persample, vmap": by("vmap"),
    "persample, compiled": by("compiled"),
    "persample, loop": by("loop"),
}


# ---- what surrounds a run of norms ------------------------------------------------------------------------------


def verified(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """With one sample run alone and compared, as at the first call."""
    return lambda: norm(persample.gradients(model, losses, x, y, quantities=["norm"], verify=True))


def reducing(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """With a criterion that returns a mean, and is taken apart."""

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    return lambda: norm(persample.gradients(model, criterion, x, y, quantities=["norm"], verify=False))


def captured(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """The plain pass with every call recorded and nobody listening."""
    wanted = {id(p) for p in model.parameters()}

    def run() -> Result:
        model.zero_grad()
        capture = Capture(model, wanted)
        with capture:
            capture.start(len(x), [(x, 0), (y, 0)])
            loss = losses(model(x), y)
        capture.stop()
        loss.mean().backward()
        return {}

    return run


def unread(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Run:
    """Factors of everything, and nothing computed from them: the floor of the hook engine."""

    def run() -> Result:
        persample.gradients(model, losses, x, y, verify=False)
        return {}

    return run


AROUND: dict[str, Engine] = {"verify": verified, "criterion": reducing, "capture": captured, "floor": unread}
