"""Convolutions without unfolding: a convolution weight's gradient is one sum of outer products per kernel offset.

Row ``n`` of the gradient of a convolution's weight is, at kernel offset ``a``,

    ``sum_p grad[n, :, p] (x) input[n, :, p * stride + a * dilation - padding]``.

Cut the padded input into its ``stride x stride`` *phase images* and lay ``grad`` out at the same row pitch (zeros
between the rows).  Then ``p * stride + a * dilation`` is a constant distance in one of the phase images, so that the
input at offset ``a`` is a plain *view*: `shifted` returns the tokens of ``grad`` once and one view of the input per
offset, and nothing is copied per offset.  A convolution is a direct sum of ``Outer`` forms that share their left side.

Where one of torch's own convolutions forms whole rows faster (`native`), or their sum, it is used; `persample.cost`
decides.  Knows tensors and geometry only.  Any number of spatial dims; positions outside of the input read zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from . import cost
from .scratch import borrow, fresh


@dataclass(frozen=True)
class Geometry:
    """How kernel offsets meet positions; one int per spatial dim, ``K`` groups."""

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    deep: bool = False  # whether the first dim is not the weight's: uses and samples that were folded in

    @property
    def offsets(self) -> int:
        return prod(self.kernel)

    def reach(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """How many entries of the padded input the given output positions read, per dim."""
        sides = zip(positions, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((length - 1) * s + (k - 1) * e + 1 if length else 0 for length, k, s, e in sides)

    def widened(self, positions: tuple[int, ...]) -> list[int]:
        """The size of a phase image: at its row pitch, every kernel offset is a shifted view."""
        sides = zip(positions, self.kernel, self.stride, self.dilation, strict=True)
        return [length + (k - 1) * e // s for length, k, s, e in sides]

    def tokens(self, positions: tuple[int, ...]) -> int:
        """How many tokens such a view has, from the first position to the last."""
        size = self.widened(positions)
        return 1 + sum((p - 1) * prod(size[d + 1 :]) for d, p in enumerate(positions)) if prod(positions) else 0

    def pixels(self, positions: tuple[int, ...]) -> int:
        """How many pixels of the padded input they read."""
        return prod(self.reach(positions))


@lru_cache(maxsize=4096)
def sizes(input: Size, grad: Size, geo: Geometry) -> cost.Convolution:
    """What decides which kernel is the fastest, from the shapes of both sides."""
    positions, k = tuple(grad[2:]), geo.groups
    pixels, tokens = geo.pixels(positions), geo.tokens(positions)
    channels, outputs = input[1] // max(1, k), grad[1] // max(1, k)
    unfolds = any(e > 1 for e in geo.dilation) or geo.kernel[-1] >= 14  # as oneDNN does, but for wide vectors
    return cost.Convolution(grad[0] * k, channels, outputs, pixels, prod(positions), tokens, geo.offsets, unfolds)


def shifted(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, list[Tensor]]:
    """Tokens of ``grad`` ``[N, K, T, O]`` and, per kernel offset, tokens of ``input`` ``[N, K, T, I]`` (views)."""
    positions = tuple(grad.shape[2:])
    size, tokens = geo.widened(positions), geo.tokens(positions)
    pitch = [prod(size[d + 1 :]) for d in range(len(size))]
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


def _at(slices: Iterable[Any]) -> tuple[Any, ...]:
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


def dense(input: Tensor, grad: Tensor, geo: Geometry, shape: Size, out: Tensor | None) -> Tensor:
    """All rows ``[N, *P]``, into ``out`` if there is one, some samples at a time.

    By kernel offset, the fastest layout in memory has the kernel's dims first; it is what a new tensor gets.
    """
    n, step = len(input), cost.chunk(input[:1].numel() + grad[:1].numel())
    how = cost.conv_rows(grad, sizes(input.shape, grad.shape, geo), out is not None)
    if how == "native":
        step = native_step(input, grad, shape)
    elif how == "offsets" and out is None:
        out = fresh(grad, *shape[2:], n, *shape[:2]).movedim((-3, -2, -1), (0, 1, 2))
    elif how == "offsets":
        step = min(step, cost.chunk(shape.numel()))
    elif how == "tokens":
        step = min(step, cost.chunk(unfolded_size(input, grad, geo)))
    out = fresh(grad, n, *shape) if out is None else out
    write = {"tokens": _write_tokens, "native": _write_native, "offsets": _write_offsets}[how]
    for i in range(0, n, step):
        write(input[i : i + step], grad[i : i + step], geo, out[i : i + step])
    return out


def _write_offsets(input: Tensor, grad: Tensor, geo: Geometry, out: Tensor) -> None:
    left, rights = shifted(input, grad, geo)
    rows = out.movedim((0, 1, 2), (-3, -2, -1))
    offsets = list(product(*map(range, out.shape[3:])))
    if rows[offsets[0]].is_contiguous():
        _write_each(left, rights, offsets, rows)
        return
    with borrow(grad, *rows.shape) as block:  # entries of one offset are far from each other
        _write_each(left, rights, offsets, block)
        rows.copy_(block)


def _write_each(left: Tensor, rights: list[Tensor], offsets: list[tuple[int, ...]], out: Tensor) -> None:
    for offset, right in zip(offsets, rights, strict=True):
        write_products(left, right, out[offset])


def _write_tokens(input: Tensor, grad: Tensor, geo: Geometry, out: Tensor) -> None:
    with unfolded(input, grad, geo) as (left, right):
        write_products(left, right, out)


def _write_native(input: Tensor, grad: Tensor, geo: Geometry, out: Tensor) -> None:
    out.copy_(native(input, grad, geo).reshape(out.shape))


def write_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``sum_t left[n, k, t] (x) right[n, k, t]`` into ``out``, of as many entries.

    A single token writes its products where they belong.  Matrix products are only fast into memory of their own: for
    rows inside of a wider matrix, they go through blocks that stay in cache.
    """
    (n, k, t, o), i = left.shape, right.shape[3]
    if t == 1 and out[:1].is_contiguous():
        torch.mul(left.mT, right, out=out.view(n, k, o, i))
        return
    left, right = left.flatten(0, 1).mT, right.flatten(0, 1)
    if out.is_contiguous() and out.dtype == left.dtype:
        torch.bmm(left, right, out=out.view(n * k, o, i))
        return
    step = cost.chunk(k * o * i)
    with borrow(left, min(n, step) * k, o, i) as block:
        for start in range(0, n, step):
            at = slice(start * k, (start + step) * k)
            rows = out[start : start + step]
            rows.copy_(torch.bmm(left[at], right[at], out=block[: len(rows) * k]).view(rows.shape))


def native_step(input: Tensor, grad: Tensor, shape: Size) -> int:
    """For how many samples at a time: both sides may be copied, and rows are formed."""
    return min(cost.shared(shape.numel()), cost.chunk(input[:1].numel() + grad[:1].numel(), cost.costs().wide // 2))


def native(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    """All rows ``[N, K O, I, *kernel]`` by a convolution of torch, of up to 3 dims: the weight gradient of one with
    ``N K`` groups, or `_correlated`.
    """
    n, k, channels, outputs = len(input), geo.groups, input.shape[1] // geo.groups, grad.shape[1] // geo.groups
    if not grad.numel() or not input.numel():
        return grad.new_zeros(n, grad.shape[1], channels, *geo.kernel)
    if cost.correlates(grad, sizes(input.shape, grad.shape, geo)):
        return _correlated(input, grad, geo)
    full, full_outputs = cost.vectors(grad, sizes(input.shape, grad.shape, geo))
    one, one_grad = _as_one(input, k, full), _as_one(grad, k, full_outputs)
    rows = _weight_gradient(one, one_grad, replace(geo, groups=n * k)).view(n, k, full_outputs, full, *geo.kernel)
    return rows[:, :, :outputs, :channels].flatten(1, 2)


def _correlated(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    """The same as a convolution of images with output gradients, stride and dilation in each other's place: channels of
    a group are images of a batch, its outputs are kernels.

    A CPU has fast kernels for that, also where its weight gradients unfold.
    """
    channels, outputs = input.shape[1] // geo.groups, grad.shape[1] // geo.groups
    images = input.reshape(-1, channels, *input.shape[2:])
    kernels = grad.reshape(len(images), outputs, *grad.shape[2:])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geo.kernel) - 1]
    step, full = cost.correlated(len(images), channels, outputs)
    found = []
    for i in range(0, len(images), step):
        image = _read(images[i : i + step].transpose(0, 1), tuple(grad.shape[2:]), geo)
        kernel = _as_one(kernels[i : i + step], 1, full)[0].unsqueeze(1)
        rows = convolve(image, kernel, None, geo.dilation, 0, geo.stride, image.shape[1])
        found.append(rows.unflatten(1, (-1, full))[:, :, :outputs].movedim(0, 2))
    rows = torch.cat(found) if len(found) > 1 else found[0]
    return rows.reshape(*grad.shape[:2], channels, *geo.kernel)


def _as_one(x: Tensor, groups: int, full: int) -> Tensor:
    """All samples as groups of one, each of ``full`` channels: ``[1, N K full, *S]``."""
    x = x.unflatten(1, (groups, x.shape[1] // groups))
    if full > x.shape[2]:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, full - x.shape[2]))
    return x.reshape(1, len(x) * groups * full, *x.shape[3:])


@contextmanager
def unfolded(input: Tensor, grad: Tensor, geo: Geometry) -> Iterator[tuple[Tensor, Tensor]]:
    """The convolution as outer products of tokens: ``[N, K, T, O]`` and, in reused memory, ``[N, K, T, I offsets]``."""
    if geo.offsets == 1 or not (input.numel() and grad.numel()):
        left, rights = shifted(input, grad, geo)
        yield left, rights[0]
        return
    given = windows(input, tuple(grad.shape[2:]), geo)
    with borrow(input, *given.shape) as out:
        out.copy_(given)
        yield _split(grad.flatten(2), geo.groups), out.flatten(2, 2 + len(geo.kernel)).flatten(3).mT


def windows(input: Tensor, positions: tuple[int, ...], geo: Geometry) -> Tensor:
    """What every position reads, ``[N, K, I, *kernel, *positions]``: a view of the padded input."""
    input = _read(input, positions, geo)
    n, k, channels = len(input), geo.groups, input.shape[1] // geo.groups
    sample, channel, *sides = input.stride()
    taps = [step * e for step, e in zip(sides, geo.dilation, strict=True)]
    moves = [step * s for step, s in zip(sides, geo.stride, strict=True)]
    shape = (n, k, channels, *geo.kernel, *positions)
    return input.as_strided(shape, (sample, channels * channel, channel, *taps, *moves))


def unfolded_size(input: Tensor, grad: Tensor, geo: Geometry) -> int:
    """About how many entries per sample `unfolded` adds to the input."""
    positions = prod(grad.shape[2:])
    return positions * input.shape[1] * geo.offsets if geo.offsets > 1 and positions > 1 else 0


def summed(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    """The sum of all rows, ``[K O, I, *kernel]``: the ordinary weight gradient, or of rows, where these take less."""
    input, grad, geo = _without_depth(input, grad, geo)
    shape = Size((grad.shape[1], input.shape[1] // geo.groups, *geo.kernel))
    if not grad.numel() or not input.numel() or not cost.summed(grad, sizes(input.shape, grad.shape, geo), geo.groups):
        step = native_step(input, grad, shape) if input.ndim == 5 else max(1, len(grad))  # padded in a copy
        total = _weight_gradient(input[:step], grad[:step], geo)
        for i in range(step, len(grad), step):
            total += _weight_gradient(input[i : i + step], grad[i : i + step], geo)
        return total
    total, step = grad.new_zeros(shape), native_step(input, grad, shape)
    with borrow(grad, min(step, len(grad)), *shape) as block:
        for i in range(0, len(grad), step):
            some = grad[i : i + step]
            total += dense(input[i : i + step], some, geo, shape, block[: len(some)]).sum(0)
    return total


def applied(input: Tensor, grad: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """Inner products of all rows with ``weight [K O, I, *kernel]``, of each output, ``[N, K O]``: convolve by it,
    multiply by ``grad``.
    """
    n, outputs = len(input), grad.shape[1]
    input, grad, geo = _without_depth(input, grad, geo)
    if not grad.numel() or not input.numel():
        return grad.new_zeros(n, outputs)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geo.kernel) - 1]
    input, padding = _padded(input, tuple(grad.shape[2:]), geo)
    weight = weight.reshape(-1, weight.shape[1], *geo.kernel)
    moved = convolve(input, weight, None, geo.stride, padding, geo.dilation, geo.groups)
    return moved.mul_(grad).flatten(2).sum(2).view(n, -1, outputs).sum(1)


def pixel_products(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Squared norms of all rows ``[N]`` without forming them, and ``[N]`` the size of the terms they are sums of.

    ``sum_{p, q} <grad_p, grad_q> sum_a <x_{p + a}, x_{q + a}>``: products of all pixels once, then, for one dim after
    the other, sums along the diagonals.
    """
    n, k, positions = len(input), geo.groups, tuple(grad.shape[2:])
    pixels = _read(input, positions, geo)
    sides = tuple(pixels.shape[2:])
    x, g = (t.reshape(n * k, t.shape[1] // k, prod(t.shape[2:])) for t in (pixels, grad))
    with ExitStack() as stack:
        a = torch.bmm(x.mT, x, out=stack.enter_context(borrow(x, n * k, prod(sides), prod(sides))))
        a = a.view(n * k, *sides, *sides)
        for d, length in enumerate(positions):
            a = _diagonal_sums(a, (1 + d, 1 + d + len(sides)), d, length, geo, stack)
        a = a.reshape(n * k, prod(positions) ** 2)
        b = stack.enter_context(borrow(g, n * k, prod(positions), prod(positions)))
        b = torch.bmm(g.mT, g, out=b).view(a.shape)
        return multiplied(a, b, n)


def pixel_gram(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], geo: Geometry) -> Tensor:
    """Inner products of all rows of two batches ``(input, grad)``, ``[N, M]``, in the way of `pixel_products`."""
    n, m, positions = len(a[0]), len(b[0]), tuple(a[1].shape[2:])
    x, sides = _pixels(*a, geo)
    y = x if b[0] is a[0] else _pixels(*b, geo)[0]
    g, h = (_tokens(grad, geo.groups) for grad in (a[1], b[1]))
    found, p = x.new_empty(n, m), prod(positions)
    step = cost.chunk(geo.groups * m * prod(sides) ** 2, cost.costs().wide)
    for i in range(0, n, step):
        s = min(step, n - i)
        with ExitStack() as stack:
            left, right = (t[:, i * size : (i + s) * size] for t, size in ((x, prod(sides)), (g, p)))
            products = torch.bmm(left, y.mT, out=stack.enter_context(borrow(x, len(x), left.shape[1], y.shape[1])))
            products = products.view(len(x), s, *sides, m, *sides)
            for d, length in enumerate(positions):
                products = _diagonal_sums(products, (2 + d, 3 + d + len(sides)), d, length, geo, stack)
            own = torch.bmm(right, h.mT, out=stack.enter_context(borrow(g, len(g), s * p, m * p)))
            found[i : i + s] = own.view(-1, s, p, m, p).mul_(products.reshape(-1, s, p, m, p)).sum((0, 2, 4))
    return found


def _pixels(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """What is read of the padded input, ``[K, N pixels, I]``, and how many pixels that is per dim."""
    pixels = _read(input, tuple(grad.shape[2:]), geo)
    return _tokens(pixels, geo.groups), tuple(pixels.shape[2:])


def _tokens(x: Tensor, groups: int) -> Tensor:
    """``[N, K C, *S]`` to the tokens of all samples ``[K, N S, C]``."""
    return _split(x.flatten(2), groups).transpose(0, 1).flatten(1, 2)


def _diagonal_sums(a: Tensor, axes: tuple[int, int], d: int, length: int, geo: Geometry, stack: ExitStack) -> Tensor:
    """``sum_j a[.., p s + j e, .., q s + j e, ..]``: the ``axes`` of the ``d``-th spatial dim become positions."""
    count, step, gap = geo.kernel[d], geo.stride[d], geo.dilation[d]
    terms = []
    for j in range(count):
        cut = [slice(None)] * a.ndim
        cut[axes[0]] = cut[axes[1]] = slice(j * gap, j * gap + (length - 1) * step + 1, step)
        terms.append(a[tuple(cut)])
    if count == 1:
        return terms[0]
    total = torch.add(terms[0], terms[1], out=stack.enter_context(borrow(a, *terms[0].shape)))
    for term in terms[2:]:
        total += term
    return total


def multiplied(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Inner products of the rows of ``a`` and ``b`` ``[N K, *]``, summed over ``K``: ``[N]``, and a bound, ``[N]``;
    overwrites ``a``.
    """
    size = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    value = a.mul_(b).sum(1)  # a batched product of vectors is several times slower
    return value.view(n, -1).sum(1), size.view(n, -1).sum(1)


def _without_depth(input: Tensor, grad: Tensor, geo: Geometry) -> tuple[Tensor, Tensor, Geometry]:
    """What was folded in as more samples, where all is summed in the end."""
    if not geo.deep:
        return input, grad, geo
    rest = Geometry(geo.groups, geo.kernel[1:], geo.stride[1:], geo.padding[1:], geo.dilation[1:])
    return input.transpose(1, 2).flatten(0, 1), grad.transpose(1, 2).flatten(0, 1), rest


def _read(input: Tensor, positions: tuple[int, ...], geo: Geometry) -> Tensor:
    """The padded input, cut to exactly what the positions read."""
    before: list[int] = []
    after: list[int] = []
    for size, p, reach in zip(input.shape[2:], geo.padding, geo.reach(positions), strict=True):
        before, after = [p, 0, *before], [0, reach - p - size, *after]
    if all(size + cut >= 0 for size, cut in zip(reversed(input.shape), after[1::2], strict=False)):
        pads = [a + b for a, b in zip(before, after, strict=True)]
        return F.pad(input, pads) if any(pads) else input
    return F.pad(F.pad(input, before), after)  # `F.pad` cuts first, and can't cut zeros that it is about to add


def _padded(
    input: Tensor, positions: tuple[int, ...], geo: Geometry, first: bool = False
) -> tuple[Tensor, tuple[int, ...]]:
    """``input`` and a symmetric padding with which torch's convolution gives exactly these positions.

    ``first``: the input is padded beforehand.
    """
    reach = zip(input.shape[2:], geo.padding, geo.kernel, geo.stride, geo.dilation, strict=True)
    lengths = tuple((size + 2 * p - (k - 1) * e - 1) // s + 1 for size, p, k, s, e in reach)
    if lengths == positions and not first:
        return input, geo.padding
    return _read(input, positions, geo), (0,) * len(positions)


def _weight_gradient(input: Tensor, grad: Tensor, geo: Geometry) -> Tensor:
    shape = (grad.shape[1], input.shape[1] // geo.groups, *geo.kernel)
    if not grad.numel() or not input.numel():
        return grad.new_zeros(shape)
    unfolds = input.ndim == 5 and input.device.type == "cpu"  # where it isn't padded beforehand
    input, padding = _padded(input, tuple(grad.shape[2:]), geo, first=unfolds)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, input, grad.new_empty(shape), None,
        geo.stride, padding, geo.dilation, False, [0] * len(padding), geo.groups, (False, True, False),
    )[1]  # fmt: skip
    return found
