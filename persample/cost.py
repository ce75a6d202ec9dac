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
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Costs:
    """The figures; counts are numbers of entries."""

    block: int = 1 << 20  # of a streamed block, some samples x a slice of the parameter: stays in cache
    wide: int = 1 << 22  # of a block that has all samples, for Grams
    pulled: int = 1 << 19  # of a block that is led back to what a tensor was derived from, by several operations
    held: int = 1 << 26  # bytes of factors that are kept until their checks are read, on other devices than the CPU
    tiny: int = 1 << 15  # up to so many, the number of calls is all that counts
    samples: int = 512  # of a tile of a Gram
    long: int = 1 << 14  # from this row length on, one call per row beats one call per block
    short: int = 64  # with fewer tokens, a block has more than one sample where it can
    tokens: int = 32  # products of tokens with each other are taken by halves, of at least so many
    banded: int = 128  # tokens of all samples, from which on a symmetric Gram is computed in four bands
    token_norm: float = 0.8  # norms from products of tokens, against streaming rows
    token_gram: float = 1.1  # the same for all pairs of samples, of rows that are more than a block
    pixel_gram: float = 1.0  # inner products of convolutions from products of pixels
    pixel_pass: float = 80  # multiplications that one pass over products of pixels is worth
    # What the kernels of convolutions cost, in multiplications of `offsets`:
    offsets: tuple[float, ...] = (10, 55, 5e3, 84, 5e6)  # per entry of a side, of a row, product, entry copied, call
    streamed: tuple[float, ...] = (1.5, 1.1)  # how much dearer rows are in pieces: by offsets, unfolded
    transposed: float = 100  # per entry of a row by offsets that is copied into the parameter's layout
    unfolded: tuple[float, ...] = (1.3, 18, 690, 33, 33, 1.6e7)  # each product, entry unfolded, line, row, side, call
    native: tuple[float, ...] = (1.85, 94, 40, 48, 3.1e7)  # per multiplication, entry of a row, pixel, position; call
    filled: float = 20  # per entry of a side that is filled up to whole vectors
    odd: tuple[float, ...] = (1.2, 72, 109, 74, 28, 1e5)  # where it unfolds, as `unfolded`; the last is for each group
    dilated: float | None = None  # how much dearer it is with dilation or a long kernel; None: it unfolds
    depthwise: float = 16  # per entry unfolded, where groups have one channel and one output
    correlated: tuple[float, ...] = (1.2, 12, 176, 71, 41, 2.8e7)  # per multiplication, entry, row, pixel, side; call
    single: tuple[float, ...] = (3, 230)  # the same for one channel and one output: per multiplication, position
    pixels: tuple[float, ...] = (1.4, 110, 3.6e4, 4.2e7)  # per multiplication, product of two pixels, group, call
    formed: float = 20  # per entry of rows of all samples that are formed first, and read again
    added: tuple[float, ...] = (1.2, 2e7)  # rows that are formed and added up, against a weight gradient: margin, call
    few: int = 6  # up to so many samples, moments are always centred while streaming
    pairs: int = 4  # up to so many tokens, moments are made of products of pairs of them
    outer_norm: Literal["tokens", "stream"] | None = None  # None: decide by shape
    outer_gram: Literal["tokens", "stream"] | None = None
    outer_moments: Literal["products", "stream"] | None = None
    conv_norm: Literal["pixels", "stream"] | None = None
    conv_gram: Literal["pixels", "stream"] | None = None
    conv_rows: Literal["offsets", "native", "tokens"] | None = None


# The same with wider vectors, for which oneDNN has other kernels: weight gradients are faster than all else.
AVX512: dict[str, Any] = {
    "offsets": (5.7, 48, 9.4e3, 52, 3.7e6),
    "streamed": (1.52, 1.15),
    "transposed": 194,
    "unfolded": (0.79, 40, 500, 16.6, 16.5, 5.9e6),
    "native": (1.35, 94, 21, 79, 3.1e7),
    "filled": 30,
    "odd": (1.95, 59, 91, 109, 42, 8.1e4),
    "dilated": 2.5,
    "correlated": (1.76, 8.4, 148, 31, 56, 3.2e7),
    "added": (1.5, 2e7),
}


def measured(capability: str) -> Costs:
    """The figures for a CPU's instructions, as `torch.backends.cpu.get_cpu_capability` calls them."""
    return Costs(**AVX512) if capability.startswith("AVX512") else Costs()


_costs: ContextVar[Costs] = ContextVar("costs", default=measured(torch.backends.cpu.get_cpu_capability()))  # noqa: B039 (frozen)


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
    """Inner products of ``N x M`` sums of outer products: of all tokens, against streaming and multiplying rows, which
    are there at once, and cheaper than products of tokens, if they are few.
    """
    c = costs()
    rows = n * m * o * i + (n * t + m * s) * o * i
    few = 1 if t == s == 1 else min(1, max(n, m) * o * i / max(1, c.block)) ** 0.5
    return c.outer_gram or ("tokens" if n * t * m * s * (o + i) < c.token_gram * few * rows else "stream")


def outer_moments(n: int, t: int) -> str:
    """One token: two products of tokens; a few: products of all pairs of them; both checked for cancellation.  Else
    rows are squared or centred as they stream by.
    """
    c = costs()
    if not n * t or (n <= c.few or t > max(1, c.pairs) if c.outer_moments is None else c.outer_moments == "stream"):
        return "stream"
    return "products" if t == 1 else "pairs"


class Convolution(NamedTuple):
    """The sizes of a convolution that decide."""

    batch: int  # samples x groups
    channels: int  # of one group, as all that follows
    outputs: int
    pixels: int  # of the padded input that are read
    positions: int  # of the output
    tokens: int  # the same with what separates rows in a view that is shifted
    offsets: int  # of the kernel
    unfolds: bool = False  # a CPU's weight gradient may, for this geometry


def conv_norm(like: Tensor, conv: Convolution) -> str:
    """Norms from products of ``pixels`` and ``positions``, against streaming rows."""
    c = costs()
    if c.conv_norm or conv.positions == 1 or conv.pixels**2 > 4 * c.block:
        return c.conv_norm or "stream"
    each, pair, group, call = c.pixels
    products = each * _pairs(conv) + pair * (conv.pixels**2 + conv.positions**2) + group
    return "pixels" if conv.batch * products + call < min(_rows(like, conv, streamed=True).values()) else "stream"


def conv_alone(conv: Convolution) -> bool:
    """Whether inner products from products of pixels are cheaper than multiplying rows that are there anyway."""
    return _pairs(conv) + costs().pixel_pass * conv.pixels**2 < conv.outputs * conv.channels * conv.offsets


def conv_gram(n: int, m: int, conv: Convolution) -> str:
    """For all pairs of samples: products of pixels and positions, against streaming and multiplying rows."""
    c = costs()
    gram = n * m * (_pairs(conv) + c.pixel_pass * conv.pixels**2)
    rows = (n * m + (n + m) * conv.positions) * conv.outputs * conv.channels * conv.offsets
    fits = m * conv.pixels**2 <= 4 * c.wide
    return c.conv_gram or ("pixels" if fits and gram < c.pixel_gram * rows else "stream")


def conv_rows(like: Tensor, conv: Convolution, transposed: bool = False, streamed: bool = False) -> str:
    """How the rows of a convolution are computed: unfolded to tokens, per kernel offset, by a convolution of torch.

    ``like`` is the output gradient; ``transposed``: rows are wanted in the parameter's layout; ``streamed``: in pieces.
    """
    possible = like.ndim <= 5  # dims of torch's convolutions
    forced = costs().conv_rows
    if forced and (possible or forced != "native"):
        return forced
    found = _rows(like, conv, transposed, streamed)
    return min(found, key=found.__getitem__)


def conv_slice(like: Tensor, conv: Convolution, n: int, groups: int) -> int:
    """For how many outputs at a time the rows of all samples are formed: about `wide` entries, of whole groups, or of
    whole vectors of outputs.  0 where going through kernel offsets is cheaper: a piece of rows is in cache then, while
    every slice has the whole input to read.
    """
    c, outputs = costs(), groups * conv.outputs
    size = n * outputs * conv.channels * conv.offsets
    parts = -(-size // max(1, c.wide))
    if not parts or c.conv_rows == "offsets":
        return 0
    few = groups == 1 and outputs < 16 * parts  # so that none is a whole vector of torch's convolutions
    unit = conv.outputs if groups > 1 else 1 if few else 16
    step = min(outputs, unit * -(-outputs // (unit * parts)))
    if c.conv_rows:
        return step
    if few and parts > 1:
        return 0
    one = conv._replace(batch=n * step // conv.outputs) if groups > 1 else conv._replace(batch=n, outputs=step)
    sliced = -(-outputs // step) * min(_rows(like, one, transposed=True).values()) + c.formed * size
    return step if sliced < _rows(like, conv._replace(batch=n * groups), streamed=True)["offsets"] else 0


def _rows(like: Tensor, conv: Convolution, transposed: bool = False, streamed: bool = False) -> dict[str, float]:
    """What the rows cost by each kernel, in multiplications."""
    return _rows_of(like.ndim, conv, like.ndim <= 5 and _vectorized(like), transposed, streamed, costs())


@lru_cache(maxsize=4096)
def _rows_of(
    ndim: int, conv: Convolution, native: bool, transposed: bool, streamed: bool, c: Costs
) -> dict[str, float]:
    n, channels, outputs, pixels, positions, tokens, offsets, _ = conv
    row = outputs * channels * offsets
    if 1 in (offsets, positions):  # an outer product as it stands
        return {"tokens": n * positions * row}
    side, entry, product, copied, call = c.offsets
    entry += c.transposed * transposed
    each = offsets * (tokens * side * (outputs + channels) + product) + copied * (pixels * channels + tokens * outputs)
    found = {"offsets": n * (row * (tokens + entry) + each) + call * offsets}
    each, unfolded, line, entry, side, call = c.unfolded
    unfolded = (unfolded + line / _line(ndim, conv)) * channels * offsets
    found["tokens"] = n * (positions * (each * row + unfolded + side * outputs) + entry * row) + call
    if streamed:
        found = {how: found[how] * factor for how, factor in zip(found, c.streamed, strict=True)}
    if native:
        gradient = n * min(_grouped(ndim, conv, c).values()) + c.native[-1]
        found["native"] = min(gradient, _correlated(conv, c))
    return found


@lru_cache(maxsize=4096)
def _grouped(ndim: int, conv: Convolution, c: Costs) -> dict[tuple[int, int], float]:
    """What one group costs in the weight gradient of torch's grouped convolution, by the channels and outputs that it
    is filled up to with zeros: as it is, or to multiples of 8, for which a CPU has fast kernels.

    Other numbers of channels, and some geometries, are unfolded and multiplied.
    """
    full = width, height = conv.channels + -conv.channels % 8, conv.outputs + -conv.outputs % 8
    found = {}
    if not (unfolds := conv.unfolds and c.dilated is None):
        copied = (width != conv.channels) * conv.pixels * width + (height != conv.outputs) * conv.positions * height
        found[full] = _by_vectors(conv, c) + c.filled * copied
    if unfolds or full != (conv.channels, conv.outputs):
        found[conv.channels, conv.outputs] = _by_unfolding(ndim, conv, c)
    return found


def _by_vectors(conv: Convolution, c: Costs, rows: int = 1) -> float:
    """A weight gradient with all channels and outputs filled up, and ``rows`` for each group to be written."""
    width, height = conv.channels + -conv.channels % 8, conv.outputs + -conv.outputs % 8
    each, entry, pixel, position, _ = c.native
    work = (each * conv.positions + entry * rows) * width * height * conv.offsets
    dearer = c.dilated if conv.unfolds and c.dilated is not None else 1
    return dearer * (work + pixel * conv.pixels * width + position * conv.positions * height)


def _by_unfolding(ndim: int, conv: Convolution, c: Costs, rows: int = 1) -> float:
    _, channels, outputs, _, positions, _, offsets, _ = conv
    each, unfolded, line, entry, position, group = c.odd
    row, unfolded = outputs * channels * offsets, (unfolded + line / _line(ndim, conv)) * channels * offsets
    if channels == outputs == 1:  # 3x3 has a kernel of its own
        each, unfolded = 0, (8 if ndim == 4 and offsets == 9 else c.depthwise * (3 if ndim == 3 else 1)) * offsets
    return positions * (each * row + unfolded + position * outputs) + entry * rows * row + group


def _line(ndim: int, conv: Convolution) -> float:
    """About how many positions there are in a line."""
    return float(max(1, conv.positions) ** (1 / max(1, ndim - 2)))


def vectors(like: Tensor, conv: Convolution) -> tuple[int, int]:
    """The channels and outputs to which a group is filled up with zeros before torch's grouped convolution."""
    if like.device.type != "cpu":
        return conv.channels, conv.outputs
    found = _grouped(like.ndim, conv, costs())
    return min(found, key=found.__getitem__)


def correlates(like: Tensor, conv: Convolution) -> bool:
    """Whether rows are a convolution of images with output gradients, not a weight gradient."""
    c = costs()
    if like.device.type != "cpu":
        return False
    return _correlated(conv, c) < conv.batch * min(_grouped(like.ndim, conv, c).values()) + c.native[-1]


def summed(like: Tensor, conv: Convolution, groups: int) -> bool:
    """Whether rows that are formed and added up take less than the ordinary weight gradient, of one group or several:
    where this unfolds, or fills up few channels.
    """
    c, single = costs(), conv.channels == conv.outputs == 1
    if like.ndim > 5 or not _vectorized(like) or 1 in (conv.offsets, conv.positions):
        return False
    if single and like.ndim == 4 and conv.offsets == 9 and not conv.unfolds:  # has a kernel of its own
        return False
    odd = groups > 1 and bool(conv.channels % 8 or conv.outputs % 8)
    unfolds = odd or (conv.unfolds and c.dilated is None)
    gradient = _by_unfolding(like.ndim, conv, c, 0) if unfolds else _by_vectors(conv._replace(unfolds=False), c, 0)
    formed = c.formed * conv.batch * conv.channels * conv.outputs * conv.offsets
    rows, margin, call = min(_rows(like, conv, transposed=True).values()), *c.added
    return margin * (rows + formed) + call < conv.batch * gradient


def correlated(batch: int, channels: int, outputs: int) -> tuple[int, int]:
    """How many groups that convolution has at a time, and up to how many outputs they are filled up: so that a CPU has
    fast kernels.
    """
    return (batch, 1) if channels == outputs == 1 else (4, outputs + -outputs % 8)


@lru_cache(maxsize=4096)
def _correlated(conv: Convolution, c: Costs) -> float:
    n, channels, outputs, pixels, positions, _, offsets, _ = conv
    each, read, entry, pixel, position, call = c.correlated
    if channels == outputs == 1:
        each, position = c.single
        return n * positions * (each * offsets + position) + call
    step, full = correlated(n, channels, outputs)
    row = full * channels * offsets
    group = positions * (each * row + read * channels * offsets + position * full) + pixel * pixels * channels
    return n * (group + entry * row) + call * -(-n // step)


def _vectorized(like: Tensor) -> bool:
    """Whether torch's convolutions are those that the figures are of."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())


def _pairs(conv: Convolution) -> int:
    return conv.pixels**2 * conv.channels + conv.positions**2 * conv.outputs


def chunk(row: int, entries: int | None = None) -> int:
    """How many samples with ``row`` entries each make up a block: as many for every thread, if there are so many."""
    found, threads = max(1, (entries or costs().block) // max(1, row)), torch.get_num_threads()
    return found - found % threads if found > threads else found


def pulled(row: int) -> int:
    """How many rows of a derived tensor, with ``row`` entries each, are led back at a time."""
    return chunk(row, costs().pulled)


def shared(row: int) -> int:
    """The same, with a sample for every thread if that fits a wide block: kernels that share out samples, not the work
    for one of them, leave the other threads idle.
    """
    found, threads = chunk(row), torch.get_num_threads()
    return threads if found < threads and threads * row <= costs().wide else found


def lanes(like: Tensor, n: int, row: int) -> int:
    """Into how many totals, of ``row`` entries each, ``n`` samples are added up: one for every thread, where there are
    some for each, but few in a block, and all totals together fit a wide block.
    """
    c, threads = costs(), torch.get_num_threads()
    several = like.device.type == "cpu" and n >= 4 * threads
    return threads if several and 16 * row >= c.block and threads * row <= c.wide else 1


def cancelled(dtype: torch.dtype) -> float:
    """Below this fraction of its terms, a sum has lost too many digits to be used (4 digits are left in float32)."""
    return float(16 * torch.finfo(dtype).eps ** 0.5)
