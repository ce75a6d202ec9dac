"""What was verified, and for how long that holds: once for a model, as long as nothing about the call has changed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .problem import Problem
from .rules import version
from .state import modules_of, named_modules


@dataclass
class Known:
    """What was found: the calls that couple, and the functions that were called (by attributes that are no numbers)."""

    couplers: tuple[int, ...]
    called: set[frozenset[Any]] = field(default_factory=set)
    ragged: bool = False  # samples lie where they do by the values of a batch
    calls: int = 0  # of ragged ones, since

    def due(self) -> bool:
        """Whether ragged samples are verified once more: in the first batches, and in some of the later ones."""
        self.calls += 1
        return self.ragged and not self.couplers and (self.calls < OFTEN or self.calls % OFTEN == 0)


@dataclass
class Memory:
    """What was verified of a model."""

    model: weakref.ref[nn.Module]
    known: dict[Any, Known] = field(default_factory=dict)
    mistrusted: set[Any] = field(default_factory=set)  # kinds of calls of which some were refused
    counts: bool = False  # a forward pass changes numbers among the attributes of its modules


OFTEN = 8  # batches of ragged samples are verified before it is only every so many
KEPT = 256  # kinds of calls for each model
_VERIFIED: dict[int, Memory] = {}  # by id: modules may have an __eq__


def signature(problem: Problem, engine: str) -> Any:
    """What a verification is good for: shapes, types, modules with their modes and settings, parameters, engine,
    criterion, and the rules that there are.
    """
    leaves = tree_leaves((problem.batch.inputs.whole(), problem.batch.targets.whole()))
    plain = (bool, str) if _memory(problem.model).counts else PLAIN
    return (
        engine,
        version(),
        tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _identity(x) for x in leaves),
        _settings(problem.model, plain),
        tuple(problem.parameters),
        tuple(problem.batch.inputs.axes),
        tuple(problem.batch.targets.axes),
        _identity(problem.loss_fn),
    )


PLAIN = (bool, str, int, float)


# Hooks, and what `nn.Module` and `torch.compile` keep in a module.
BOOKKEEPING = {*vars(nn.Module()), "_is_torch_compile", "_compile_kwargs", "_compiled_call_impl"}

# What modules are and are set to, by name; ``None`` for what passes of the model change, or what isn't there.
Settings = dict[str, str | None]


def _settings(module: nn.Module, plain: tuple[type, ...] = PLAIN) -> tuple[Any, ...]:
    """Of every module, its type, and attributes that are numbers or words, its mode among them."""
    return tuple((type(m), *[x for x in m.__dict__.values() if type(x) in plain]) for m in modules_of(module))


def settings(model: nn.Module) -> Settings:
    """The same (but modes) in words that don't depend on the process, with functions by their names and code, and what
    is made of these.
    """
    found: Settings = {}
    for prefix, module in named_modules(model):
        found[prefix.removesuffix(".")] = words(type(module))
        for name, x in module.__dict__.items():
            if name not in BOOKKEEPING and (told := _told(x)) is not None:
                found[prefix + name] = told
    return found


def _told(x: Any) -> str | None:
    """In words, as far as it can be told; lists are mostly records of something."""
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or type(x) in PLAIN or isinstance(x, torch.dtype):
        return repr(x)
    if isinstance(x, BuiltinFunctionType):
        return words(x)
    if isinstance(x, FunctionType):  # lambdas share their names
        code = x.__code__
        return words(x) + (f" {code.co_code.hex()} {_told(code.co_consts)}" if code.co_name == "<lambda>" else "")
    if isinstance(x, partial):
        x = (x.func, x.args, x.keywords)
    parts = [*x.items()] if isinstance(x, dict) else x if isinstance(x, tuple) else None
    found = None if parts is None else [_told(part) for part in parts]
    return None if found is None or None in found else f"({', '.join(map(str, found))})"


def words(kind: Any) -> str:
    """What a class or function is called."""
    return f"{kind.__module__}.{kind.__qualname__}"


def lasting(before: Settings, after: Settings) -> Settings:
    """Of settings before and after a pass those that it left alone: counters say nothing about what is computed."""
    return {key: before.get(key) if before.get(key) == after.get(key) else None for key in {**before, **after}}


def changed(before: Settings, now: Settings) -> list[str]:
    """The names of settings that are others now."""
    return [key for key in before if key in now and before[key] != now[key] and None not in (before[key], now[key])]


def _identity(x: Any, depth: int = 4) -> Any:
    """What a criterion or an argument is, as far as can be told: its code, and what is bound to it."""
    if x is None or isinstance(x, int | float | str | torch.dtype):
        return x
    if not depth or isinstance(x, Tensor):
        return type(x)
    if isinstance(x, nn.Module):
        return _settings(x)
    inner = partial(_identity, depth=depth - 1)
    if isinstance(x, tuple | list):
        return tuple(map(inner, x))
    if isinstance(x, dict):
        return tuple((str(key), inner(value)) for key, value in x.items())
    if isinstance(x, partial):
        return inner(x.func), inner(x.args), inner(x.keywords)
    if isinstance(x, MethodType):
        return inner(x.__func__), inner(x.__self__)
    if isinstance(x, FunctionType):
        cells = tuple(content(cell) for cell in x.__closure__ or ())
        names = tuple(x.__globals__.get(name) for name in x.__code__.co_names)
        return (
            x.__code__,
            inner(x.__defaults__ or ()),
            inner(cells),
            tuple(v for v in names if type(v) in PLAIN),
        )
    return type(x), getattr(x, "__qualname__", ""), inner(getattr(x, "__dict__", {}))


def content(cell: CellType) -> Any:
    """What a function has closed over."""
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def recall(problem: Problem, engine: str) -> Known | None:
    """What an earlier verification of such a call found."""
    known = _memory(problem.model).known
    return known.get(signature(problem, engine)) if known else None


def verified(problem: Problem, engine: str) -> bool:
    """Whether such a call was verified."""
    return recall(problem, engine) is not None


def remember(
    problem: Problem,
    engine: str,
    couplers: tuple[int, ...] = (),
    called: frozenset[Any] = frozenset(),
    ragged: bool = False,
) -> None:
    """The model was verified, with these couplers, when it called these functions."""
    memory, kind = _memory(problem.model), signature(problem, engine)
    if kind in memory.mistrusted and not couplers:
        return
    if len(memory.known) >= KEPT:
        memory.known.clear()
    known = memory.known.setdefault(kind, Known(couplers))
    if len(known.called) >= KEPT:  # what Python reads may be another number every time
        known.called.clear()
    known.called.add(called)
    known.ragged |= ragged


def mistrust(problem: Problem, engine: str) -> None:
    """A sample had another loss within the batch: such calls are verified every time, as one may pass by chance."""
    memory = _memory(problem.model)
    if len(memory.mistrusted) >= KEPT:
        memory.mistrusted.clear()
    kind = signature(problem, engine)
    memory.mistrusted.add(kind)
    memory.known.pop(kind, None)


def counting(model: nn.Module) -> None:
    """A forward pass of this model changes numbers among the attributes of its modules."""
    _memory(model).counts = True


def _memory(model: nn.Module) -> Memory:
    key = id(model)
    if (memory := _VERIFIED.get(key)) is None or memory.model() is not model:
        memory = _VERIFIED[key] = Memory(weakref.ref(model, lambda _: _VERIFIED.pop(key, None)))
    return memory
