"""What a function is called and set to, in words that are the same in every process: no addresses, no identities.

It tells two loss functions apart whose rows must not be mixed.  Looked into are attributes (also of sub-modules, and
those with ``_``), the arguments of a `functools.partial`, the object of a bound method, and of functions that are not
PyTorch's own the defaults and what they closed over.  Of these, numbers, strings, tensors, containers, dataclasses,
namespaces, modules and whatever can be called are told by their values; any other object by its type alone.  What a
function's code does, the globals that it reads, and the settings of a scripted module can't be known.
"""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AnySet
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..remembered import BOOKKEEPING, content, words

PLAIN = (str, int, float)
Within = tuple[int, ...]  # ids of what is being described: something may hold itself


def called(function: Callable[..., Any]) -> str:
    """The qualified name of a function, criterion or other callable, and what it is set to.

    Two functions of one name that closed over the same, such as two lambdas in one place, are the same to it.
    """
    return _called(function, ())


def digest(tree: Any) -> str:
    """SHA-256 of all tensors, numbers and strings of a structure."""
    found = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            update(found, "", leaf)
        elif isinstance(leaf, Mapping):  # what tokenizers return is no dict, and pytrees don't know it
            found.update(digest(dict(leaf)).encode())
        elif leaf is None or isinstance(leaf, PLAIN):
            found.update(f"{leaf!r}\n".encode())
    return found.hexdigest()


def update(digest: Any, name: str, t: Tensor) -> None:
    """Put name, type, shape and values of a tensor into a digest."""
    dense = t.detach() if t.layout is torch.strided else t.detach().to_dense()
    digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
    if not t.is_meta:
        digest.update(dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _called(x: Any, within: Within) -> str:
    if id(x) in within:
        return "itself"
    within = (*within, id(x))
    for compiled in ("_orig_mod", "_torchdynamo_orig_callable"):
        if (original := getattr(x, compiled, None)) is not None:
            return _called(original, within)
    if isinstance(x, functools.partial):
        given = [_value(value, within) for value in x.args]
        return f"{_called(x.func, within)}({', '.join([*given, *_settings(x.keywords, within)])})"
    if isinstance(x, nn.Module):
        settings, state = ", ".join(_attributes(x, within)), digest([*x.parameters(), *x.buffers()])[:16]
        return f"{words(type(x))}({settings}; {state})"
    if isinstance(x, types.MethodType):
        return f"{words(x.__func__)} of {_value(x.__self__, within, inside=True)}"
    if isinstance(x, types.FunctionType):
        own = str(x.__module__).split(".")[0] != "torch"
        settings = ", ".join(_of_function(x, within)) if own else ""
    elif hasattr(x, "__qualname__"):  # a class, or a function of C
        return words(x)
    else:
        settings = ", ".join(_settings(_held(x), within))
        x = type(x)
    return f"{words(x)}({settings})" if settings else words(x)


def _of_function(f: types.FunctionType, within: Within) -> Iterable[str]:
    """Its defaults, what it closed over, and its attributes."""
    defaults = {f"default {i}": value for i, value in enumerate(f.__defaults__ or ())}
    cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
    closed = {name: content(cell) for name, cell in cells}
    given = {name: value for name, value in vars(f).items() if name[:2] != "__"}
    return _settings({**defaults, **(f.__kwdefaults__ or {}), **closed, **given}, within)


def _attributes(module: nn.Module, within: Within) -> list[str]:
    """Settings of a module and those below; parameters and buffers are told by the digest of the whole."""
    own = {name: value for name, value in vars(module).items() if name not in BOOKKEEPING}
    below = [
        f"{name}={type(child).__qualname__}({', '.join(_attributes(child, (*within, id(child))))})"
        for name, child in module.named_children()
        if id(child) not in within
    ]
    return [*_settings(own, within), *below]


def _held(x: Any) -> dict[str, Any]:
    """The attributes of an object, in ``__dict__`` or in slots."""
    slots = (vars(kind).get("__slots__", ()) for kind in type(x).__mro__)
    names = [name for found in slots for name in ([found] if isinstance(found, str) else found)]
    return {
        **{name: getattr(x, name) for name in names if name[:2] != "__" and hasattr(x, name)},
        **getattr(x, "__dict__", {}),
    }


def _settings(values: Mapping[str, Any], within: Within) -> list[str]:
    return [f"{name}={_value(value, within)}" for name, value in sorted(values.items())]


def _value(x: Any, within: Within, inside: bool = False) -> str:
    """One value; with ``inside``, that of an object is what it holds, also if it can't be called."""
    if x is None or isinstance(x, (*PLAIN, complex, bytes, torch.dtype, torch.device, np.generic)):
        return repr(x)
    if isinstance(x, enum.Enum):
        return f"{words(type(x))}.{x.name}"
    if isinstance(x, Tensor):
        return f"{type(x).__name__} {digest(x)[:16]}"
    if isinstance(x, np.ndarray) and not x.dtype.hasobject:
        return f"ndarray {x.dtype.str} {list(x.shape)} {hashlib.sha256(x.tobytes()).hexdigest()[:16]}"
    if id(x) in within:
        return "itself"
    deeper = (*within, id(x))
    if isinstance(x, (list, tuple)):
        if all(part is None or isinstance(part, (*PLAIN, Tensor)) for part in x):
            return f"{type(x).__name__} {digest(list(x))[:16]}"
        return f"{type(x).__name__} [{', '.join(_value(part, deeper) for part in x)}]"
    if isinstance(x, AnySet):
        return f"{{{', '.join(sorted(_value(part, deeper) for part in x))}}}"
    if isinstance(x, Mapping):
        return f"{{{', '.join(sorted(f'{_value(k, deeper)}: {_value(v, deeper)}' for k, v in x.items()))}}}"
    if callable(x):
        return _called(x, within)
    known = (types.SimpleNamespace, argparse.Namespace)
    if inside or isinstance(x, known) or is_dataclass(x):
        return f"{words(type(x))}({', '.join(_settings(_held(x), deeper))})"
    return words(type(x))
