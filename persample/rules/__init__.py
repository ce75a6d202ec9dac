"""How one function's gradient factors: the table of rules, and what else is known about functions.

A **rule** belongs to a function and has that function's own signature after ``(call, g)``, with ``g`` the gradient of
the output.  For each argument that may be shared it yields ``(argument, lambda: factors)``; the lambda runs only if
that argument's gradient is asked for.  ``call.samples(x)`` and ``call.tokens(x)`` bring an argument or ``g`` into the
sample-first shapes ``[N, k, *rest]`` and ``[N, T, D]``, whatever the layout was.

A rule is an optimisation, never a requirement: what no rule serves goes through `persample.rules.fallback`.

A **pull-back** is the same for tensors derived from parameters only (``weight.t()``): ``(derivation, factors,
*arguments)`` to ``(argument, lambda: factors)``.  What none serves is differentiated by autograd, some rows at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..aten import OPERATIONS, writes

if TYPE_CHECKING:
    from .apart import Rowlike

Function = Callable[..., Any]
Yields = Iterator[tuple[Any, "Callable[[], Rowlike]"]]
R = TypeVar("R", bound=Callable[..., Any])

RULES: dict[Function, Callable[..., Yields]] = {}
PULLBACKS: dict[Function, Callable[..., Yields]] = {}
COUPLES: dict[Function, Callable[..., str]] = {}


def rule(*functions: Function) -> Callable[[R], R]:
    """Register a rule for ``functions``; the rule gets a ``remove()`` that puts back what was there before."""
    return _registrar(RULES, functions)


def pullback(*functions: Function) -> Callable[[R], R]:
    """Register how the gradient of ``functions``' output, all arguments shared, goes back to the arguments."""
    return _registrar(PULLBACKS, functions)


def couples(*functions: Function) -> Callable[[R], R]:
    """Register a predicate with the function's signature: why this call couples the batch, or ``""``."""
    return _registrar(COUPLES, functions)


_LAYERS: dict[tuple[int, Function], list[Any]] = {}  # what was registered for a function, one over the other
_VERSION = [0]


def version() -> int:
    """How often what is registered has changed."""
    return _VERSION[0]


def _registrar(table: dict[Function, Any], functions: tuple[Function, ...]) -> Callable[[R], R]:
    if not functions or not all(callable(f) for f in functions):
        raise TypeError("name the function(s) to register for, e.g. @rule(torch.nn.functional.linear)")

    def register(entry: R) -> R:
        def remove() -> None:
            for f in functions:
                layers = _LAYERS[id(table), f]
                if entry in layers:
                    layers.remove(entry)
                    if layers[-1] is None:
                        table.pop(f, None)
                    else:
                        table[f] = layers[-1]
            _VERSION[0] += 1

        with contextlib.suppress(AttributeError):  # methods and built-in functions take none
            if callable(entry):
                entry.remove = remove  # type: ignore[attr-defined]
        if getattr(entry, "remove", None) is not remove:
            raise TypeError(f"what is registered must be a function, which gets a remove(); got {entry!r}")
        for f in functions:
            _LAYERS.setdefault((id(table), f), [table.get(f)]).append(entry)
            table[f] = entry
        _VERSION[0] += 1
        return entry

    return register


def spellings(*names: str) -> list[Function]:
    """All ways to call a function: ``torch.add``, ``Tensor.add``, ``Tensor.__add__``, ``F.add`` ..."""
    dunder = [f"__{name}__" for name in names]
    found = [getattr(space, name, None) for space in (torch, Tensor, F) for name in (*names, *dunder)]
    return [f for f in dict.fromkeys(found) if callable(f)]


def coupling(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call makes samples depend on each other; empty if it doesn't (as far as is known)."""
    predicate = COUPLES.get(func)
    return predicate(*args, **kwargs) if predicate is not None else ""


@lru_cache(maxsize=4096)
def mutates(func: Function) -> bool:
    """Whether the function changes its first argument: ``add_``, ``__iadd__``, ``__setitem__``."""
    if type(func) in OPERATIONS:
        return writes(func)
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return (name.startswith("__i") and name not in _NOT_INPLACE) or name == "__setitem__"
    return name.endswith("_")


_NOT_INPLACE = {"__init__", "__invert__", "__index__", "__int__", "__iter__", "__instancecheck__"}


def opened(func: Function) -> Function:
    """A Python function of torch as it is, except that it doesn't hand itself over to an active mode as one call."""
    assert isinstance(func, FunctionType)
    unguarded = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    copy = FunctionType(
        func.__code__, {**func.__globals__, **unguarded}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# What runs instead of a function that hides several calls; a function of torch that returns ``NotImplemented`` has
# none to show.
OPEN: dict[Function, Function] = {}


def _broadcast(*tensors: Any) -> Any:
    """``broadcast_tensors``, one after the other: each stays what it is."""
    given = tensors[0] if tensors and isinstance(tensors[0], (tuple, list)) else tensors
    shape: torch.Size = torch.broadcast_shapes(*(x.shape for x in given))
    return tuple(x.expand(shape) if x.shape != shape else x for x in given)


def _each(function: Function) -> Function:
    """A function of several tensors, one after the other."""

    def run(*tensors: Any) -> Any:
        given = tensors[0] if tensors and isinstance(tensors[0], (tuple, list)) else tensors
        return NotImplemented if given is tensors and len(given) == 1 else tuple(map(function, given))

    return run


def _grid(*tensors: Any, indexing: str | None = None) -> Any:
    """``meshgrid``, one after the other."""
    given = tensors[0] if tensors and isinstance(tensors[0], (tuple, list)) else tensors
    if indexing not in (None, "ij", "xy") or any(x.ndim > 1 for x in given):
        return NotImplemented
    shape = [x.numel() for x in given]
    axes = [[-1 if a == i else 1 for a in range(len(given))] for i in range(len(given))]
    grids = (x.reshape(axis).expand(shape) for x, axis in zip(given, axes, strict=True))
    return tuple(g.transpose(0, 1) if indexing == "xy" and len(given) > 1 else g for g in grids)


OPEN[torch.broadcast_tensors] = _broadcast
OPEN[torch.meshgrid] = _grid
OPEN.update({f: _each(f) for f in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)})


def _with_grad(enabled: bool, body: Function, *args: Any) -> Any:
    """What an exported program runs inside ``torch.no_grad()``."""
    with torch.set_grad_enabled(enabled):
        return body(*args)


def _with_autocast(
    device: str, dtype: Any, enabled: bool, cache_enabled: Any, body: Function, *args: Any, **kwargs: Any
) -> Any:
    with torch.autocast(device, dtype, enabled, cache_enabled):
        return body(*args, **kwargs)


OPEN[torch.ops.higher_order.wrap_with_set_grad_enabled] = _with_grad
OPEN[torch.ops.higher_order.wrap_with_autocast] = _with_autocast
OPEN[torch.ops.higher_order.cond] = lambda pred, true, false, args=(): (true if pred else false)(*args)

# Whose outputs are computed from each other: copied, so that the gradient of one doesn't come through another.
NESTED: set[Function] = {torch.lstm_cell}

# What runs a function as one node of the graph, whose gradients come from the rule: ``(call, *arguments)`` to the
# outputs, or ``NotImplemented``.
REPLAYED: dict[Function, Function] = {}

# Whose rule needs ``call.results``, the outputs.
KEEPS: set[Function] = set()

# Whose outputs depend on every argument each: before a backward comes to any of these, it has come to all outputs.
TOGETHER: set[Function] = set()

# What picks entries from a shared tensor.
PICKS: set[Function] = {
    Tensor.__getitem__,
    *spellings("index_select", "select", "narrow", "gather", "take_along_dim"),
    F.embedding,
}

# What takes only type and place from an argument: a constant, whatever its size.
FRESH: set[Function] = {*spellings("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")}

# What takes the shape of an argument, but no value.
SHAPED: set[Function] = {
    *spellings("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
}

# What compares numbers with each other.
COMPARES: set[Function] = {*spellings("eq", "ne", "lt", "le", "gt", "ge")}

# What brings numbers to Python: they may decide what the model does.
READS: set[Function] = {
    *spellings("item", "tolist", "numpy", "allclose", "equal", "is_nonzero"),
    *(getattr(Tensor, f"__{kind}__") for kind in ("bool", "int", "float", "index", "contains", "array")),
}

# What Python asks of a tensor without reading its numbers.
ASKS: set[Function] = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_mps", "is_sparse", "is_nested", "is_leaf")),
    *spellings("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"),
    *spellings("is_floating_point", "is_complex", "is_contiguous", "is_tensor"),
    Tensor.__len__,
}

# What drops entries at random.
DROPS: set[Function] = {
    *spellings("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_dropout"),
    *spellings("dropout1d", "dropout2d", "dropout3d"),
}

# What passes no gradient on.
INERT: set[Function] = {
    *FRESH,
    *SHAPED,
    *COMPARES,
    *spellings("result_type", "is_same_size"),
    *spellings("isnan", "isinf", "isfinite", "argmax", "argmin", "argsort", "sign", "detach"),
}

# What takes only type or shape from arguments other than the first.
LIKE: set[Function] = {*spellings("type_as", "expand_as", "view_as", "reshape_as", "to")}

from . import affine, attention, bag, conv, derived, elementwise, embedding, norm, recurrent, scaling  # noqa: E402, F401
