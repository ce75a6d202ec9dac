"""Convolutions and transposed convolutions, 1 to 3 spatial dimensions, every option.

A transposed convolution is the adjoint of a convolution: for the weight, input and output gradient trade places.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..factors import Conv, Dense, Factors, fold
from . import Yields, rule

Placing = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values: tuple[int, ...] = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _images(call: Call, x: Tensor) -> tuple[Tensor, int]:
    """``[N * k, C, *S]``, the ``k`` images of a sample in a row, and ``k``."""
    at = call.layouts.get(id(x)) or call.layout
    if at.plain and at.axis == 0:
        return call.read(x), 1
    x = call.samples(x)
    if not x.shape[1]:  # nobody has any: a black one each
        x = x.new_zeros(len(x), 1, *x.shape[2:])
    return x.flatten(0, 1), x.shape[1]


def _batched(call: Call, input: Tensor, weight: Tensor) -> bool:
    """Whether the samples are on the batch axis, and not taken for channels or positions; and there is a weight."""
    at = call.layouts.get(id(input))
    return at is not None and input.ndim == weight.ndim and at.alone is None and at.axis == 0 and weight.numel() > 0


def _kernel(call: Call, x: Tensor, g: Tensor, weight: Tensor, geometry: Placing) -> Factors:
    (images, k), (grads, _) = _images(call, x), _images(call, g)
    factors = Conv(images, grads, *geometry, weight.shape)
    return factors if k == 1 else fold(factors, k)


def channels(call: Call, g: Tensor) -> Dense:
    """A bias per channel: ``[N, k, C, *S]`` summed over everything else."""
    at = call.layout
    if at.axis == 1:
        raise NotImplementedError  # samples among the channels, each with a part of the bias
    if at.plain and at.axis == 0 and g.ndim > 2:
        return Dense(g.sum(tuple(range(2, g.ndim))))
    g = call.samples(g).movedim(2 if at.axis == 0 else 3, 1)  # behind an axis that stood before the samples
    return Dense(g.flatten(2).sum(2))


@rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Yields:
    dims = weight.ndim - 2
    if call.sampled(weight) or not _batched(call, input, weight):
        return
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    if padding == "same":  # what doesn't divide goes to the high end
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True))
    padding = _tuple(0 if padding == "valid" else padding, dims)
    yield weight, lambda: _kernel(call, input, g, weight, (stride, padding, dilation))
    if bias is not None:
        yield bias, lambda: channels(call, g)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Yields:
    dims = weight.ndim - 2
    if call.sampled(weight) or not _batched(call, input, weight):
        return
    geometry = (_tuple(stride, dims), _tuple(padding, dims), _tuple(dilation, dims))
    yield weight, lambda: _kernel(call, g, input, weight, geometry)
    if bias is not None:
        yield bias, lambda: channels(call, g)
