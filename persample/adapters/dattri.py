"""dattri: the gradient function of an ``AttributionTask``.

dattri asks its task for ``grad(params, batch) -> [N, D]``, gradients of the task's loss for each sample, with
``params`` one flat vector.  Its loss acts on single samples of a functional model; here the model itself runs, with
those parameters, in whatever mode it is in (dattri's own runs on samples alone, so that BatchNorm must be in
evaluation mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import api
from ..losses import LossFunction
from . import needed


def grad_function(model: nn.Module, loss_fn: LossFunction, **options: Any) -> Callable[[Any, Any], Tensor]:
    """``grad(params, (*inputs, targets)) -> [N, D]``; ``params`` is a flat ``[D]`` or ``{name: [*P]}``, and is loaded
    for the call.
    """

    def grad(params: Any, batch: Any) -> Tensor:
        *inputs, targets = batch
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        saved = {name: p.detach().clone() for name, p in own.items()}
        given = params if isinstance(params, dict) else _split(params, own)
        try:
            _load(own, given)
            rows: Tensor = api.gradients(model, loss_fn, tuple(inputs), targets, **options).flat()
        finally:
            _load(own, saved)
        return rows

    return grad


def attach(task: Any, loss_fn: LossFunction, **options: Any) -> Any:
    """Let a ``dattri.task.AttributionTask`` take its gradients from persample; returns the task.

    Gradients with respect to single layers (dattri's ``layer_name``) become ``params=`` of `persample.gradients`.
    """
    needed("dattri.task", "dattri")

    def get_grad_loss_func(in_dims: Any = None, layer_name: Any = None, ckpt_idx: int | None = None) -> Any:
        if layer_name is None:
            return grad_function(task.model, loss_fn, **options)
        task._load_checkpoints(ckpt_idx)
        names = [layer_name] if isinstance(layer_name, str) else list(layer_name)
        rows = grad_function(task.model, loss_fn, params=names, **options)
        current = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        return lambda params, batch: rows(current | _split(params, {n: current[n] for n in names}), batch)

    task.get_grad_loss_func = get_grad_loss_func
    return task


def _split(flat: Tensor, like: dict[str, Any]) -> dict[str, Tensor]:
    pieces = flat.split_with_sizes([p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def _load(own: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(values[name].reshape(p.shape))
