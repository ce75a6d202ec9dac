"""Time and memory of a run, next to the plain pass.

**Time**: the plain pass and the run alternate in one process, and what counts is the median of the ratios of
neighbours, so that a machine which is slower for a while slows both.  Who is first alternates as well.

**Memory**: the most bytes that torch's allocator had handed out at a time during the first call, above what there was
before it, from the profiler's record of allocations.  So memory that a library keeps from call to call is counted, and
what the operating system makes of it is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timing:
    ratio: float  # median over pairs of run / plain
    low: float  # its quartiles
    high: float
    plain: float  # median, in seconds
    run: float
    pairs: int


def compare(
    plain: Callable[[], Any], run: Callable[[], Any], *, budget: float, least: int = 3, most: int = 31
) -> Timing:
    """At least ``least`` pairs; more until ``budget`` seconds are over or there are ``most``."""
    pairs: list[tuple[float, float]] = []
    own, base = Held(run), Held(plain)
    start = time.perf_counter()
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() - start < budget):
        if len(pairs) % 2:
            b, a = own.seconds(), base.seconds()
        else:
            a, b = base.seconds(), own.seconds()
        pairs.append((a, b))
    ratios = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    plains, runs = zip(*pairs, strict=True)
    return Timing(middle, low, high, statistics.median(plains), statistics.median(runs), len(pairs))


class Held:
    """A function whose result lives until it is called again, as that of a training step does, and as with libraries
    that keep theirs on the parameters.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.result: Any = None

    def seconds(self) -> float:
        """Of letting go of the last result, and of one call."""
        start = time.perf_counter()
        self.result = None
        self.result = self.run()
        return time.perf_counter() - start


def peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes in use at a time above what there was before, and what the run returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        most = max(most, used)
    return most, result
