"""The vmap engine through ``torch.compile``: the same vectorised pass compiled as one piece, for training loops.

Each model has a compiled function of its own, which goes with the model.  ``torch.compile`` guards what it has seen
(shapes, training modes, the criterion, hooks and attributes of the modules) and compiles again where that has changed.
Whenever it does, one sample also runs through the model as it is, watched: coupled batches, and parameters that are not
the model's attributes, can't be seen in compiled code.
"""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..losses import LossFunction
from ..problem import Emit, Pass, Problem
from .vmap import Found, Pieces, alone, eager, first, rows_of, vectorised, watching

BACKEND = "inductor"
KEPT = 64  # versions of one model's function, for different shapes and states


def compiled(problem: Problem, emit: Emit, *, max_bytes: int | None = None) -> Pass:
    """As `persample.engines.vmap.vmap`, by compiled code."""
    return vectorised(problem, emit, max_bytes, run)


def run(problem: Problem, pieces: Pieces, spec: list[Any]) -> Found:
    """By the model's compiled function; what has just been compiled is watched for one sample."""
    if torch._C._len_torch_dispatch_stack():  # somebody listens to operations, and compiled code has none
        return eager(problem, pieces, spec)
    own = _COMPILED.setdefault(problem.model, Compiled())
    own.fresh = False
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    try:
        with torch._dynamo.config.patch(recompile_limit=KEPT, skip_nnmodule_hook_guards=False):
            found = own.function(*problem.owners, pieces, spec)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, or of the model: then it is the eager engine's to raise
        if enabled:  # a compiler that fails half way leaves them switched off
            torch._C._autograd._saved_tensors_hooks_enable()
        eager(problem, pieces, [])
        reason = str(error).strip()
        if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
            reason = f"it has been, for {KEPT} combinations of shapes and states, and needs another one."
        raise CaptureError(
            f"torch.compile can't compile this model: {reason}\nUse engine='vmap', which runs the same without it, or "
            "engine='hooks'."
        ) from error
    if own.fresh:
        try:
            with torch.random.fork_rng(), torch.enable_grad(), watching(problem) as watch:
                alone(*problem.owners, first(pieces), [], watch)
        except BaseException:
            del _COMPILED[problem.model]
            raise
    return found


def _rows(model: nn.Module, loss_fn: LossFunction, pieces: Pieces, spec: list[Any]) -> Found:
    """What is compiled: `rows_of`, with ``None`` for what can't leave compiled code (the caches of language models)."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off here.")
    found = rows_of(model, loss_fn, pieces, spec)
    spec[2] = [x if x is None or isinstance(x[0], (bool, int, float, str)) else (None,) for x in spec[2]]
    return found


@dataclass
class Compiled:
    """The compiled function of one model."""

    function: Callable[..., Found] = field(init=False)
    fresh: bool = False  # whether the last call had to compile

    def __post_init__(self) -> None:
        # What is compiled is kept with the code object: each model gets one of its own, which goes with the model.
        own = types.FunctionType(_rows.__code__.replace(), _rows.__globals__)
        self.function = torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)

    def _backend(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.fresh = True
        with warnings.catch_warnings():  # about how it compiles
            warnings.simplefilter("ignore")
            return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


_COMPILED: weakref.WeakKeyDictionary[nn.Module, Compiled] = weakref.WeakKeyDictionary()
