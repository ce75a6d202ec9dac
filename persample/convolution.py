"""Convolutions without unfolding: a convolution weight's gradient is one sum of outer products per kernel offset.

Row ``n`` of the gradient of a convolution's weight is, at kernel offset ``a``,

    ``sum_p grad[n, :, p] (x) input[n, :, p * stride + a * dilation - padding]``.

Cut the padded input into its ``stride x stride`` *phase images* and lay ``grad`` out at the same row pitch (zeros between
the rows).  Then ``p * stride + a * dilation`` is a constant distance in one of the phase images, so that the input at
offset ``a`` is a plain *view*: `shifted` returns the tokens of ``grad`` once and one view of the input per offset, and
nothing is ever copied per offset.  A convolution is thus a direct sum of ``Outer`` forms that share their left side.

Knows tensors and geometry only.  Any number of spatial dims; positions outside of the input read zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """How kernel offsets meet positions; one int per spatial dim, ``K`` groups."""

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def offsets(self) -> int:
        return prod(self.kernel)

    def reach(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """How many entries of the padded input the given output positions read, per dim."""
        sides = zip(positions, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((length - 1) * s + (k - 1) * e + 1 if length else 0 for length, k, s, e in sides)


def shifted(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, list[Tensor]]:
    """Tokens of ``grad`` ``[N, K, T, O]`` and, per kernel offset, tokens of ``input`` ``[N, K, T, I]`` (views)."""
    positions = tuple(grad.shape[2:])
    steps = [(k - 1) * e // s for k, s, e in zip(geo.kernel, geo.stride, geo.dilation, strict=True)]
    size = [length + q for length, q in zip(positions, steps, strict=True)]  # of a phase image
    pitch = [prod(size[d + 1 :]) for d in range(len(size))]
    tokens = 1 + sum((length - 1) * p for length, p in zip(positions, pitch, strict=True)) if prod(positions) else 0
    left = _split(_widened(grad, size)[..., :tokens], geo.groups)
    images: dict[tuple[int, ...], Tensor] = {}
    right = []
    for offset in product(*map(range, geo.kernel)):
        reach = [a * e for a, e in zip(offset, geo.dilation, strict=True)]
        phase = tuple(r % s for r, s in zip(reach, geo.stride, strict=True))
        if phase not in images:
            images[phase] = _phase_image(input, phase, size, geo)
        start = sum(r // s * p for r, s, p in zip(reach, geo.stride, pitch, strict=True))
        right.append(_split(images[phase][..., start : start + tokens], geo.groups))
    return left, right


def _split(x: Tensor, groups: int) -> Tensor:
    """``[N, K C, T]`` to tokens of groups ``[N, K, T, C]``."""
    n, channels, tokens = x.shape
    return x.reshape(n, groups, channels // groups, tokens).mT


def _widened(grad: Tensor, size: list[int]) -> Tensor:
    """``grad`` at the row pitch of a phase image, zeros between its rows: ``[N, K O, T']``."""
    if list(grad.shape[3:]) == size[1:]:
        return grad.flatten(2)
    wide = grad.new_zeros(*grad.shape[:3], *size[1:])
    wide[_at([slice(length) for length in grad.shape[3:]])] = grad
    return wide.flatten(2)


def _at(slices: list[slice]) -> tuple[Any, ...]:
    return (..., *slices)


def _phase_image(input: Tensor, phase: tuple[int, ...], size: list[int], geo: Geometry) -> Tensor:
    """``input`` at positions ``j * stride + phase - padding``, zero outside of it: ``[N, K I, prod(size)]``."""
    target, source = [], []
    for length, r, s, p, m in zip(input.shape[2:], phase, geo.stride, geo.padding, size, strict=True):
        first = max(0, -((r - p) // s))  # the first j whose position is not negative
        last = min(m, (length - 1 - r + p) // s + 1)
        last = max(first, last)
        target.append(slice(first, last))
        begin = first * s + r - p
        source.append(slice(begin, begin + (last - first - 1) * s + 1 if last > first else begin, s))
    view = input[_at(source)]
    if list(view.shape[2:]) == size:
        return view.flatten(2)
    image = input.new_zeros(*input.shape[:2], *size)
    image[_at(target)] = view
    return image.flatten(2)


def dense(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    """All rows ``[N, K O, I, *kernel]``, a permuted view of one product per kernel offset."""
    left, right = shifted(input, grad, geo)
    n, k, _, o = left.shape
    i = right[0].shape[3]
    out = grad.new_empty(geo.offsets, n * k, o, i)
    for a, tokens in enumerate(right):
        torch.bmm(left.flatten(0, 1).mT, tokens.flatten(0, 1), out=out[a])
    return out.view(*geo.kernel, n, k * o, i).permute(-3, -2, -1, *range(len(geo.kernel)))


def unfolded(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """The convolution as outer products of tokens: ``[N, K, T, O]`` and ``[N, K, T, I * offsets]``."""
    left, right = shifted(input, grad, geo)
    return left, torch.stack(right, -1).flatten(3)


def merged(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, Tensor, Geometry]:
    """Leading spatial dims that are mere repetition (kernel 1, stride 1, no padding) as samples."""
    while (
        len(geo.kernel) > 1
        and (geo.kernel[0], geo.stride[0], geo.padding[0]) == (1, 1, 0)
        and input.shape[2] == grad.shape[2]
    ):
        input, grad = input.movedim(2, 1).flatten(0, 1), grad.movedim(2, 1).flatten(0, 1)
        geo = Geometry(geo.groups, geo.kernel[1:], geo.stride[1:], geo.padding[1:], geo.dilation[1:])
    return input, grad, geo


def _padded(input: Tensor, positions: tuple[int, ...], geo: Geometry) -> Tensor:
    """``input`` with explicit zeros (or cropped) so that an unpadded convolution gives exactly these positions."""
    pads: list[int] = []
    for length, p, reach in zip(input.shape[2:], geo.padding, geo.reach(positions), strict=True):
        pads = [p, reach - p - length, *pads]
    return F.pad(input, pads) if any(pads) else input


def summed(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    """The sum of all rows, ``[K O, I, *kernel]``: torch's own weight gradient."""
    input, grad, geo = merged(input, grad, geo)
    shape = (grad.shape[1], input.shape[1] // geo.groups, *geo.kernel)
    if not grad.numel() or not input.numel():
        return grad.new_zeros(shape)
    if len(geo.kernel) > 3:
        return dense(input, grad, geo).sum(0)
    input = _padded(input, tuple(grad.shape[2:]), geo)
    zeros = [0] * len(geo.kernel)
    weight = grad.new_empty(1).expand(shape)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, input, weight, None, geo.stride, zeros, geo.dilation, False, zeros, geo.groups, (False, True, False)
    )[1]
    return found


def applied(input: Tensor, weight: Tensor, positions: tuple[int, ...], geo: Geometry) -> Tensor:
    """The convolution of ``input`` by ``weight``, ``[N, K O, *positions]``."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geo.kernel) - 1]
    padded = _padded(input, positions, geo)
    return convolve(padded, weight, None, geo.stride, 0, geo.dilation, geo.groups)
