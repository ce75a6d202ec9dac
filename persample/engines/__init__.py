"""Where the factors come from.  One contract: ``engine(problem, emit)`` calls ``emit(name, factors)`` once per
parameter that is asked for, complete, and returns the losses and outputs of the very same pass.

========  =================================================================================================
hooks     the default: one forward and backward of the whole batch, factors from the recorded calls
vmap      ``torch.func``: the model on single samples, vectorised; always `Dense`
compiled  the same, by ``torch.compile``
loop      one sample at a time with plain autograd: the definition where samples are independent
========  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ArgumentError
from ..problem import Emit, Pass, Problem
from .compiled import compiled
from .hooks import hooks
from .loop import loop
from .vmap import vmap

ENGINES: dict[str, Callable[[Problem, Emit], Pass]] = {"hooks": hooks, "vmap": vmap, "compiled": compiled, "loop": loop}


def check_engine(engine: str) -> None:
    """Raise for what is no engine's name."""
    if engine not in list(ENGINES):
        raise ArgumentError(f"engine must be one of {list(ENGINES)}, got {engine!r}.")


__all__ = ["ENGINES", "check_engine", "compiled", "hooks", "loop", "vmap"]
