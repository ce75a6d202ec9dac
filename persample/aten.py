"""Operations as exported and traced graphs call them (``torch.ops.aten.transpose.int``), in the spelling of torch.

Everything that is known of functions is known by their spelling in torch.  Most operations are a function of torch, a
method of tensors or one of `torch.nn.functional` with the same arguments in the same order, as both are generated from
one schema; the rest of those that matter are spelled out here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]
OPERATIONS = {torch._ops.OpOverload, torch._ops.OpOverloadPacket}  # types, looked up at every call; see `in_torch`
UNKNOWN: set[Function] = set()  # operations without another spelling, that were met

_SPACES = (
    *(torch, Tensor, torch._C._nn),
    *(getattr(torch._C, name) for name in ("_linalg", "_fft", "_special")),  # with its name in front of theirs
)


def in_torch(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The same call in the spelling of torch; ``None`` where there is none."""
    overload = operation
    if isinstance(operation, torch._ops.OpOverloadPacket):
        name = torch._C._jit_resolve_packet(operation._qualified_op_name, *args, **kwargs)
        overload = getattr(operation, name or "default")
    function = spelled(overload)
    if function is None:
        UNKNOWN.add(operation)
        return None
    return partial(call, overload, function, args, kwargs)


@lru_cache(maxsize=4096)
def spelled(overload: Any) -> Function | None:
    """An operation as a function of torch, or as one that calls these; ``None`` where there is none."""
    namespace, _, name = overload._schema.name.partition("::")
    if namespace != "aten" or overload._overloadname.startswith("prim_"):  # (of TorchScript: numbers for types)
        return None
    return SPELLED.get(name) or next((f for space in _SPACES if (f := _generated(space, name))), None)


def _generated(space: Any, name: str) -> Function | None:
    """A function that was generated from the schema, not written in Python (those take other arguments)."""
    found = getattr(space, name, None)
    return found if isinstance(found, (BuiltinFunctionType, MethodDescriptorType)) else None


def call(overload: Any, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what `spelled` has found as the overload was called.

    Its schema says what the names of arguments are in torch's order, and what is left out: torch's own functions take
    a ``reduction`` that is left out for another one.
    """
    schema = overload._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    if function in BY_NAME:
        return function(given.pop("self"), **given)
    inner = [a for a in schema if not a.kwarg_only]
    last = max((i for i, a in enumerate(inner) if a.name in given or a.name == "reduction"), default=-1)
    positions = [given.get(a.name, a.default_value) for a in inner[: last + 1]]
    return function(*positions, **{a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given})


def writes(operation: Any) -> bool:
    """Whether an operation changes its first argument."""
    if not isinstance(operation, torch._ops.OpOverload) or not operation._schema.arguments:
        return str(getattr(operation, "__name__", "")).endswith("_")
    alias = operation._schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def _index(input: Tensor, indices: Any) -> Any:
    return input[_indices(indices)]


def _indices(indices: Any) -> tuple[Any, ...]:
    """Numbers in tensors are broadcast; in brackets, they would be taken before the others."""
    several = any(i is not None and i.ndim for i in indices)
    return tuple(slice(None) if i is None else i.reshape(1) if several and not i.ndim else i for i in indices)


def _index_put_(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate:
        return input.index_put_(_filled(input, indices), values, True)
    input[_indices(indices)] = values
    return input


def _filled(input: Tensor, indices: Any) -> tuple[Tensor, ...]:
    """With all numbers of an axis for ``None``; masks as the places at which they are true."""
    if all(index is not None for index in indices):
        return tuple(indices)
    given: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype is torch.bool
        given += index.nonzero().unbind(1) if mask else [index]
    free = [d for d, index in enumerate(given) if index is None]
    places = [d for d, index in enumerate(given) if index is not None]
    inner = max(index.ndim for index in given if index is not None)
    # The dims of the indices are where these stand, or in front if they stand apart.
    ahead = [d for d in free if d < places[0]] if places[-1] - places[0] < len(places) else []
    dims = [*ahead, *[-1] * inner, *[d for d in free if d not in ahead]]
    behind = len(free) - len(ahead)

    def at(d: int, index: Tensor | None) -> Tensor:
        if index is not None:
            return index.reshape((*index.shape, *[1] * behind))
        return torch.arange(input.shape[d], device=input.device).view((-1, *[1] * (len(dims) - 1 - dims.index(d))))

    return tuple(at(d, index) for d, index in enumerate(given))


def _index_put(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate or all(isinstance(i, Tensor) for i in indices):
        return input.index_put(_filled(input, indices), values, accumulate)
    return _index_put_(input.clone(), indices, values)


def _slice(input: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    found: Tensor = input[(slice(None),) * (dim % input.ndim) + (slice(start, end, step),)]
    return found


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _beside(function: Function, *args: Any) -> tuple[Tensor, ...]:
    """What an operation returns beside its output: without gradient, as it is there for its backward."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        found: tuple[Tensor, ...] = function(*args)[1:]
    return found


def _embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale: bool = False, mode: int = 0, sparse: bool = False,
    weights: Tensor | None = None, last: bool = False, padding: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    name = ("sum", "mean", "max")[mode]
    out = F.embedding_bag(indices, weight, offsets, None, 2.0, scale, name, sparse, weights, last, padding)
    given = (weight, indices, offsets, scale, mode, sparse, weights, last, padding)
    return out, *_beside(torch._C._VariableFunctions.embedding_bag, *given)


def _bare_embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale: bool = False, mode: int = 0, sparse: bool = False,
    weights: Tensor | None = None, last: bool = False, padding: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """That has -1 for none."""
    padded = None if padding < 0 else padding
    return _embedding_bag(weight, indices, offsets, scale, mode, sparse, weights, last, padded)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *settings: bool,
) -> Tensor:  # fmt: skip
    d = weight.ndim - 2

    def each(x: Any) -> tuple[Any, ...]:
        return tuple(x) * d if len(x) == 1 else tuple(x)

    run: Function = getattr(F, f"conv_transpose{d}d" if transposed else f"conv{d}d")
    given = (each(output_padding), groups, each(dilation)) if transposed else (each(dilation), groups)
    found: Tensor = run(input, weight, bias, each(stride), each(padding), *given)
    return found


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *settings: bool
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _native_layer_norm(input: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    out = F.layer_norm(input, shape, weight, bias, eps)
    return out, *_beside(torch.native_layer_norm, input, shape, weight, bias, eps)


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *settings: bool
) -> Tensor:
    return F.group_norm(input, num_groups, weight, bias, eps)


def _native_group_norm(
    input: Tensor, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float
) -> tuple[Tensor, ...]:
    out = F.group_norm(input, group, weight, bias, eps)
    return out, *_beside(torch.native_group_norm, input, weight, bias, N, C, HxW, group, eps)


def _instance_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float, eps: float,
    *settings: bool,
) -> Tensor:  # fmt: skip
    return F.instance_norm(input, mean, var, weight, bias, use_input_stats, momentum, eps)


def _native_batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = [None if x is None else x.clone() for x in (mean, var)]
    out = torch.batch_norm(input, weight, bias, mean, var, training, momentum, eps, False)
    return out, *_beside(torch.native_batch_norm, input, weight, bias, *given, training, momentum, eps)


def _batch_norm_legit(input: Tensor, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    """With running statistics, or without any: ``training, momentum, eps``."""
    return _native_batch_norm(input, weight, bias, *(args if len(args) == 5 else (None, None, *args)))


def _batch_norm_functional(
    input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """That leaves running statistics alone, and returns the new ones."""
    mean, var = mean.clone(), var.clone()
    return *_native_batch_norm(input, weight, bias, mean, var, *args), mean, var


def _batch_norm_no_training(
    input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    return _native_batch_norm(input, weight, bias, mean, var, False, momentum, eps)


def _batch_norm_with_update(
    input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    reserved = torch.empty(0, dtype=torch.uint8, device=input.device)
    return *_native_batch_norm(input, weight, bias, mean, var, True, momentum, eps), reserved


def _batch_norm_with_update_functional(
    input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *args: float
) -> tuple[Tensor, ...]:
    mean, var = mean.clone(), var.clone()
    return *_batch_norm_with_update(input, weight, bias, mean, var, *args), mean, var


def _to(input: Tensor, **given: Any) -> Tensor:
    other = [given["other"]] if "other" in given else []  # has no name in torch
    found: Tensor = input.to(*other, **{name: x for name, x in given.items() if x is not None and name in _TO})
    return found


_TO = {"dtype", "device", "non_blocking", "copy", "memory_format"}


def _to_copy(input: Tensor, **given: Any) -> Tensor:
    return _to(input, **given, copy=True)


BY_NAME = {_to, _to_copy}  # overloads have other orders


def _softmax(input: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.softmax(input, dim, torch.float32 if half_to_float else None)


def _log_softmax(input: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.log_softmax(input, dim, torch.float32 if half_to_float else None)


SPELLED: dict[str, Function] = {
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "index_put_": _index_put_,
    "_unsafe_index_put": _index_put,
    "slice": _slice,
    "split": lambda input, size, dim=0: torch.split(input, size, dim),
    "alias": lambda input: input.view_as(input),
    "_unsafe_view": lambda input, size: input.reshape(size),
    "_reshape_alias": lambda input, size, stride: input.reshape(size),
    "numpy_T": lambda input: input.T,
    "mT": lambda input: input.mT,
    "mH": lambda input: input.mH,
    "matrix_H": lambda input: input.H,
    "nonzero_numpy": lambda input: input.nonzero(as_tuple=True),
    "einsum": lambda equation, tensors, **kwargs: torch.einsum(equation, *tensors),
    "tensordot": lambda input, other, dims, dims_other: torch.tensordot(input, other, (dims, dims_other)),
    "cdist": lambda x1, x2, p=2.0, compute_mode=None: torch.cdist(x1, x2, p),
    "norm": lambda input, p=2, *args, **kwargs: torch.norm(input, 2 if p is None else p, *args, **kwargs),
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "_embedding_bag": _bare_embedding_bag,
    "convolution": _convolution,
    "_convolution": _convolution,
    "layer_norm": _layer_norm,
    "native_layer_norm": _native_layer_norm,
    "rms_norm": lambda input, shape, weight=None, eps=None: F.rms_norm(input, shape, weight, eps),
    "group_norm": _group_norm,
    "native_group_norm": _native_group_norm,
    "instance_norm": _instance_norm,
    "native_batch_norm": _native_batch_norm,
    "_native_batch_norm_legit": _batch_norm_legit,
    "_native_batch_norm_legit_functional": _batch_norm_functional,
    "_native_batch_norm_legit_no_training": _batch_norm_no_training,
    "_batch_norm_with_update": _batch_norm_with_update,
    "_batch_norm_with_update_functional": _batch_norm_with_update_functional,
    "to": _to,
    "_to_copy": _to_copy,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "item": Tensor.item,
    "_local_scalar_dense": Tensor.item,
}
