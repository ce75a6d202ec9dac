"""Which kernel serves which shape: the one cost model.

All kernels of a primitive compute the same numbers; the choice is about time and memory only.  Figures are from
measurements on a CPU, relative to the weight gradient that an ordinary backward pass computes for the same layer.
`using` replaces figures, or forces a kernel, for the calling context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Costs:
    """The figures; counts are numbers of entries."""

    block: int = 1 << 20  # of a streamed block, some samples x a slice of the parameter: stays in cache
    wide: int = 1 << 22  # of a block that has all samples, for Grams
    tiny: int = 1 << 15  # up to so many, the number of calls is all that counts
    samples: int = 512  # of a tile of a Gram
    long: int = 1 << 14  # from this row length on, one call per row beats one call per block
    tokens: int = 32  # products of tokens with each other are taken by halves, of at least so many
    token_norm: float = 0.8  # norms from products of tokens, against streaming rows
    token_gram: float = 0.8  # the same for all pairs of samples
    pixel_norm: float = 1.4  # norms of convolutions from products of pixels
    pixel_gram: float = 1.0  # the same for all pairs of samples
    pixel_pass: float = 80  # multiplications that one pass over products of pixels is worth
    native_channels: int = 32  # up to so many input channels, a grouped convolution beats one product per offset,
    native_positions: int = 256  # and from so many output positions on
    unfold: float = 1.5  # for rows in the parameter's layout, unfold up to so many positions per output channel
    few: int = 8  # up to so many samples, moments are always centred while streaming
    outer_norm: Literal["tokens", "stream"] | None = None  # None: decide by shape
    outer_gram: Literal["tokens", "stream"] | None = None
    outer_moments: Literal["products", "stream"] | None = None
    conv_norm: Literal["pixels", "stream"] | None = None
    conv_gram: Literal["pixels", "stream"] | None = None
    conv_rows: Literal["offsets", "native", "tokens"] | None = None


_costs: ContextVar[Costs] = ContextVar("costs", default=Costs())  # noqa: B039 (frozen)


def costs() -> Costs:
    return _costs.get()


@contextmanager
def using(**changes: Any) -> Iterator[Costs]:
    """Replace figures, or force kernels, inside a ``with`` block: ``with cost.using(outer_norm="stream"): ...``."""
    token = _costs.set(replace(_costs.get(), **changes))
    try:
        yield _costs.get()
    finally:
        _costs.reset(token)


def halvings(t: int) -> int:
    """How often ``T`` tokens are halved for their products with each other, of which no half is computed twice."""
    return max(0, (t // max(1, costs().tokens)).bit_length() - 1)


def outer_norm(n: int, t: int, o: int, i: int) -> str:
    """Norms of sums of ``T`` outer products: a good half of ``T^2 (O + I)`` against ``T O I`` multiplications per
    sample.
    """
    c = costs()
    tiny = n * o * i <= c.tiny  # fewer calls
    others = t * (1 + 2 ** -halvings(t)) / 2  # tokens that each is multiplied with
    return c.outer_norm or ("tokens" if others * (o + i) < c.token_norm * o * i and not tiny else "stream")


def outer_gram(n: int, m: int, t: int, s: int, o: int, i: int) -> str:
    """Inner products of ``N x M`` sums of outer products: of all tokens, against streaming and multiplying rows."""
    c = costs()
    rows = n * m * o * i + (n * t + m * s) * o * i
    return c.outer_gram or ("tokens" if n * t * m * s * (o + i) < c.token_gram * rows else "stream")


def outer_moments(n: int, t: int) -> str:
    """One token: two products of tokens, checked for cancellation; else rows are centred as they stream by."""
    c = costs()
    if t != 1:
        return "stream"
    return c.outer_moments or ("products" if n > c.few else "stream")


def conv_norm(channels: int, outputs: int, pixels: int, positions: int, offsets: int) -> str:
    """Per group: products of ``pixels`` (padded input) and ``positions`` (output), against one product per offset."""
    c = costs()
    gram = pixels**2 * channels + positions**2 * outputs + c.pixel_pass * pixels**2
    fits = pixels**2 <= 4 * c.block
    return c.conv_norm or (
        "pixels" if fits and gram < c.pixel_norm * positions * outputs * channels * offsets else "stream"
    )


def conv_alone(channels: int, outputs: int, pixels: int, positions: int, offsets: int) -> bool:
    """Whether inner products from products of pixels are cheaper than multiplying rows that are there anyway."""
    gram = pixels**2 * channels + positions**2 * outputs + costs().pixel_pass * pixels**2
    return gram < outputs * channels * offsets


def conv_gram(n: int, m: int, channels: int, outputs: int, pixels: int, positions: int, offsets: int) -> str:
    """Per group, for all pairs of samples: products of pixels and positions, against streaming and multiplying rows."""
    c = costs()
    gram = n * m * (pixels**2 * channels + positions**2 * outputs + c.pixel_pass * pixels**2)
    rows = (n * m + (n + m) * positions) * outputs * channels * offsets
    fits = m * pixels**2 <= 4 * c.wide
    return c.conv_gram or ("pixels" if fits and gram < c.pixel_gram * rows else "stream")


def conv_rows(like: Tensor, channels: int, positions: int, kernel: tuple[int, ...]) -> str:
    """How the rows of a convolution are computed: unfolded to tokens, per kernel offset, by a grouped convolution."""
    c = costs()
    possible = len(kernel) <= 3  # dims of torch's convolutions
    if c.conv_rows and (possible or c.conv_rows != "native"):
        return c.conv_rows
    if prod(kernel) == 1 or positions == 1:
        return "tokens"
    fast = like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    wide = channels > c.native_channels and positions < c.native_positions
    return "native" if fast and possible and not wide else "offsets"


def conv_unfolds(positions: int, outputs: int) -> bool:
    """Whether unfolding the input is cheaper than writing rows transposed, one kernel offset at a time."""
    return positions < costs().unfold * outputs


def chunk(row: int, entries: int | None = None) -> int:
    """How many samples with ``row`` entries each make up a block."""
    return max(1, (entries or costs().block) // max(1, row))


def cancelled(dtype: torch.dtype) -> float:
    """Below this fraction of its terms, a sum has lost too many digits to be used (4 digits are left in float32)."""
    return float(16 * torch.finfo(dtype).eps ** 0.5)
