"""Normalisations: the gain's gradient is ``g * x_hat``, the bias' is ``g``, summed over what shares them.

Layer, group, instance and rms norm act on each sample alone.  Batch norm does so with running statistics; with batch
statistics it couples the samples, and the rule's rows are those of the gain and bias *of this very layer* only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..factors import Dense
from . import Yields, couples, rule
from .conv import channels

# As they are now: somebody may put wrappers in their places.
_layer_norm, _rms_norm, _group_norm = F.layer_norm, F.rms_norm, F.group_norm
_instance_norm, _batch_norm = F.instance_norm, F.batch_norm


def _input(call: Call, x: Tensor, g: Tensor, gain: Tensor) -> Tensor:
    """What is normalised, in the gain's own type: a coarser one (autocast) would round the products."""
    return call.read(x).to(torch.promote_types(torch.promote_types(x.dtype, g.dtype), gain.dtype))


def _features(call: Call, g: Tensor, p: Tensor) -> Dense:
    """A parameter on the last axes: ``[N, T, *P]`` summed over ``T``."""
    rows = call.tokens(g, p.ndim)
    return Dense(rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1))


@rule(F.layer_norm)
def layer_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Yields:
    if weight is not None:
        yield (
            weight,
            lambda: _features(
                call, _layer_norm(_input(call, input, g, weight), normalized_shape, eps=eps).mul_(g), weight
            ),
        )
    if bias is not None:
        yield bias, lambda: _features(call, g, bias)


@rule(F.rms_norm)
def rms_norm(
    call: Call, g: Tensor, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Yields:
    if eps is None:  # that of the type it was computed in
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if weight is not None:
        yield (
            weight,
            lambda: _features(
                call, _rms_norm(_input(call, input, g, weight), normalized_shape, eps=eps).mul_(g), weight
            ),
        )


@rule(F.group_norm)
def group_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Yields:
    if weight is not None:
        yield (
            weight,
            lambda: channels(call, _group_norm(_input(call, input, g, weight), num_groups, eps=eps).mul_(g)),
        )
    if bias is not None:
        yield bias, lambda: channels(call, g)


@rule(F.instance_norm)
def instance_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Yields:
    def normalised() -> Tensor:
        assert weight is not None
        x = _input(call, input, g, weight)
        if use_input_stats:
            return _instance_norm(x, eps=eps)
        return _instance_norm(x, running_mean, running_var, use_input_stats=False, eps=eps)

    if weight is not None:
        yield weight, lambda: channels(call, normalised().mul_(g))
    if bias is not None:
        yield bias, lambda: channels(call, g)


@rule(F.batch_norm)
def batch_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Yields:
    def normalised() -> Tensor:
        batch = training or running_mean is None
        assert weight is not None
        x = _input(call, input, g, weight)
        return _batch_norm(x, None if batch else running_mean, None if batch else running_var, training=batch, eps=eps)

    if weight is not None:
        yield weight, lambda: channels(call, normalised().mul_(g))
    if bias is not None:
        yield bias, lambda: channels(call, g)


@rule(torch.batch_norm)
def native_batch_norm(
    call: Call, g: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Yields:  # fmt: skip
    yield from batch_norm(call, g, input, running_mean, running_var, weight, bias, training, momentum, eps)


@couples(F.batch_norm)
def batch_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> str:
    if running_mean is None:
        return "normalises with the statistics of the batch (it has no running statistics)"
    return "normalises with the statistics of the batch (training mode)" if training else ""


@couples(torch.batch_norm, torch.native_batch_norm, torch._batch_norm_impl_index)
def native_batch_statistics(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    *args: Any,
    **kwargs: Any,
) -> str:
    return batch_statistics(input, running_mean, running_var, weight, bias, training)


@couples(torch._native_batch_norm_legit)
def legit_batch_statistics(input: Tensor, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> str:
    """With running statistics and ``training``, or without any."""
    if isinstance(args[0] if args else kwargs.get("running_mean"), Tensor):
        return native_batch_statistics(input, weight, bias, *args, **kwargs)
    return batch_statistics(input, None, None)
