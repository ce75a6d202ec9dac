"""dattri: the gradient function of an ``AttributionTask``.

dattri asks its task for ``grad(params, batch) -> [N, D]``, gradients of the task's loss for each sample, with
``params`` one flat vector.  Its loss acts on single samples of a functional model; here the model itself runs, with
those parameters, in whatever mode it is in (dattri's own runs on samples alone, so that BatchNorm must be in
evaluation mode).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import api
from ..errors import ArgumentError
from ..losses import LossFunction
from ..problem import named_parameters, select
from . import needed


def grad_function(model: nn.Module, loss_fn: LossFunction, **options: Any) -> Callable[[Any, Any], Tensor]:
    """``grad(params, (*inputs, targets)) -> [N, D]``; ``params`` is a flat ``[D]`` or ``{name: [*P]}``, and is loaded
    for the call.

    With ``params=`` among the options, ``D`` counts the parameters that it chooses, and ``grad`` takes these, or all.
    Those that aren't given are the model's.  A flat vector is in the model's order.

    Raises:
        ArgumentError: by ``grad``, for parameters that the model doesn't have, or not in this shape (or flat).
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one, the original: gradients have its names

    def grad(params: Any, batch: Any) -> Tensor:
        *inputs, targets = batch
        found, aliases = named_parameters(model)
        chosen = {name: found[name] for name in select(found, aliases, options.get("params"))}
        every = dict(model.named_parameters(remove_duplicate=False))
        given = _by_name(params, every) if isinstance(params, Mapping) else _split(params, chosen, found)
        saved = {name: every[name].detach().clone() for name in given}
        try:
            _load(every, given)
            rows: Tensor = api.gradients(model, loss_fn, tuple(inputs), targets, **options).flat()
        finally:
            _load(every, saved)
        return rows

    return grad


def attach(task: Any, loss_fn: LossFunction, **options: Any) -> Any:
    """Let a ``dattri.task.AttributionTask`` take its gradients from persample; returns the task.

    Gradients with respect to single layers (dattri's ``layer_name``) become ``params=`` of `persample.gradients`.
    Samples are where dattri's ``in_dims`` says: on axis 0, or, as its influence functions have them and its default is,
    on axis 1 behind an axis of one, which goes.

    Raises:
        ArgumentError: by the task, for a ``layer_name`` that is not in the order of the model (flat parameters and
            gradients are), or together with ``params=`` among the options; and for samples elsewhere.
    """
    needed("dattri.task", "dattri")

    def get_grad_loss_func(in_dims: Any = (None, 1), layer_name: Any = None, ckpt_idx: int | None = None) -> Any:
        grad = of_layers(layer_name, ckpt_idx)
        return lambda params, batch: grad(params, _samples_first(batch, in_dims))

    def of_layers(layer_name: Any, ckpt_idx: int | None) -> Any:
        if layer_name is None:
            return grad_function(task.model, loss_fn, **options)
        if "params" in options:
            raise ArgumentError(
                "params= was given to attach, and layer_name to the task: they mean the same, give one."
            )
        task._load_checkpoints(ckpt_idx)
        names = [layer_name] if isinstance(layer_name, str) else list(layer_name)
        original = getattr(task.model, "_orig_mod", task.model)
        ordered = [name for name in named_parameters(original)[0] if name in names]
        if names != ordered:
            raise ArgumentError(
                f"layer_name must be names of parameters that require grad, once each, in the order of the model "
                f"(those there are: {ordered}), got {names}."
            )
        return grad_function(task.model, loss_fn, params=names, **options)

    task.get_grad_loss_func = get_grad_loss_func
    return task


def _samples_first(batch: Any, in_dims: Any) -> tuple[Any, ...]:
    """A batch with its samples in front: dattri has a batch of one of each, with samples behind that axis, or none."""
    batch, dims = tuple(batch), in_dims[1] if isinstance(in_dims, (tuple, list)) and len(in_dims) == 2 else in_dims
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,) * len(batch)
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in batch]
    ones = [isinstance(x, Tensor) and x.ndim > 1 and len(x) == 1 for x in batch]
    if len(dims) != len(batch) or not all(d == 0 or (d == 1 and one) for d, one in zip(dims, ones, strict=True)):
        raise ArgumentError(
            f"in_dims={in_dims!r} for tensors {shapes}: samples must be on axis 0, in_dims=(None, 0), or on axis 1 of "
            "[1, N, ...], in_dims=(None, 1), which is dattri's default."
        )
    return tuple(x[0] if d == 1 else x for x, d in zip(batch, dims, strict=True))


def _by_name(values: Mapping[str, Any], every: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Values that were given by name (also by that of a compiled model), once they fit the parameters."""
    values = {name.removeprefix("_orig_mod."): value for name, value in values.items()}
    for name, value in values.items():
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if name not in every:
            raise ArgumentError(f"params has '{name}' {got}, which is no parameter of the model.")
        shape = every[name].shape
        if not isinstance(value, Tensor) or value.shape not in (shape, (shape.numel(),)):
            raise ArgumentError(f"params has '{name}' {got}, which is {list(shape)} in the model.")
    return values


def _split(flat: Any, *groups: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Values of the first group of parameters that has as many entries."""
    sizes = [sum(p.numel() for p in group.values()) for group in groups]
    if not isinstance(flat, Tensor) or flat.ndim != 1 or len(flat) not in sizes:
        got = list(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
        raise ArgumentError(
            "params must be {name: tensor}, or a flat vector in the model's order, of the parameters that params= "
            f"chooses ({sizes[0]} numbers) or of all that require grad ({sizes[-1]}), got {got}."
        )
    group = groups[sizes.index(len(flat))]
    return dict(zip(group, flat.split_with_sizes([p.numel() for p in group.values()]), strict=True))


def _load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value.reshape(parameters[name].shape))
