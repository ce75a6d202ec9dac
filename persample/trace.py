"""Which call couples the samples?  The first whose value for one of them changes with the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .calls import function_name
from .capture import Capture
from .dropout import NoDropout
from .engines.hooks import forward
from .followed import SampledTensor, results_of
from .layout import one_sample as part_of
from .patched import unpatched
from .problem import Problem
from .rounding import LOSS, tolerance
from .rules import mutates
from .state import restored


class _Trace(Capture):
    """Keeps what every call gives for one sample."""

    def __init__(self, model: nn.Module, sample: int) -> None:
        super().__init__(model, set())
        self.sample = sample
        self.log: list[tuple[str, int, Tensor | None]] = []  # None: its samples are on no axis of their own any more

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        ordinal = self.ordinal + 1
        out = super().__torch_function__(func, types, args, kwargs)
        if self.active:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                for t in results_of(args, kwargs or {}, out, mutates(func)):
                    kind = self.followed.kind(t)
                    if isinstance(kind, SampledTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(t):
                        value = None if kind.layout is None else part_of(t, kind.layout, self.sample).detach().clone()
                        self.log.append((function_name(func), ordinal, value))
        return out


def find_coupling(problem: Problem, n: int, certain: bool = False) -> tuple[str, int]:
    """The first call (its name, and its place among all calls) whose value for sample ``n`` changes when all other
    samples are replaced by copies of it; else, unless it has to be ``certain``, the first after which samples are on no
    axis of their own; ``("", 0)`` if there is none.
    """
    logs = []
    for batch in (problem.batch, problem.batch.select(torch.full((problem.batch.n,), n, device="cpu"))):
        trace = _Trace(problem.model, n)
        with restored(*problem.owners), NoDropout(), contextlib.suppress(Exception), torch.enable_grad():
            forward(Problem(*problem.owners, batch, problem.parameters), trace)
        logs.append(trace.log)
    places = ("", 0)  # integers may only tell where samples are among others
    for (name, ordinal, a), (other, _, b) in zip(*logs, strict=False):
        if name == other and (a is None or b is None or _close(a, b)):
            continue
        if name == other and a is not None and b is not None and a.shape == b.shape and not a.is_floating_point():
            places = places if places[1] else (name, ordinal)
        else:
            return name, ordinal
    if places[1]:
        return places
    return next(((name, ordinal) for name, ordinal, a in logs[0] if a is None and not certain), ("", 0))


def influence(problem: Problem, n: int) -> int:
    """The place of a call through which other samples depend on sample ``n``, whose own loss depends on none of them
    (the one that attains a maximum over the batch); 0 if there is none.
    """
    return next(
        (at for m in range(min(problem.batch.n, 8)) if m != n and (at := find_coupling(problem, m, True)[1])), 0
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=tolerance(a.dtype, of=LOSS), atol=1e-3 * tolerance(a.dtype), equal_nan=True)
