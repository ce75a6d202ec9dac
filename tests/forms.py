"""Forms with random entries, each next to the matrix ``G [N, *P]`` that it stands for, built without the library."""

from __future__ import annotations

import functools
from math import prod

import torch
from hypothesis import strategies as st
from torch import Size, Tensor
from torch.nn import functional as F

from persample.factors import Across, Conv, Dense, Factors, Outer, Pulled, Rows

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def make_dense(seed: int, n: int, shape: tuple[int, ...]) -> tuple[Dense, Tensor]:
    value = randn(seed, n, *shape)
    return Dense(value), value.clone()


def make_outer(seed: int, n: int, k: int, t: int, o: int, i: int) -> tuple[Outer, Tensor]:
    left, right = randn(seed, n, k, t, o), randn(seed + 1, n, k, t, i)
    rows = torch.stack([
        torch.stack([sum((torch.outer(left[a, b, c], right[a, b, c]) for c in range(t)), torch.zeros(o, i).double())
                     for b in range(k)]) for a in range(n)
    ]) if n and k else torch.zeros(n, k, o, i).double()  # fmt: skip
    return Outer(left, right, Size((k * o, i))), rows.reshape(n, k * o, i)


def make_rows(seed: int, n: int, t: int, v: int, d: int) -> tuple[Rows, Tensor]:
    index = torch.randint(v, (n, t), generator=generator(seed))
    value = randn(seed, n, t, d)
    rows = torch.zeros(n, v, d, dtype=torch.float64)
    for a in range(n):
        for b in range(t):
            rows[a, index[a, b]] += value[a, b]
    return Rows(index, value, Size((v, d))), rows


def make_conv(
    seed: int, n: int, groups: int, o: int, i: int, size: tuple[int, ...], kernel: tuple[int, ...],
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    transposed: bool = False, output_padding: tuple[int, ...] | None = None,
) -> tuple[Conv, Tensor]:  # fmt: skip
    """One autograd call per sample; for transposed convolutions ``o`` and ``i`` are in and out channels."""
    weight = randn(seed, groups * o, i, *kernel).requires_grad_()
    x = randn(seed + 1, n, groups * (o if transposed else i), *size)

    def call(x: Tensor) -> Tensor:
        if transposed:
            extra = output_padding or (0,) * len(size)
            return CONV_TRANSPOSE[len(size)](x, weight, None, stride, padding, extra, groups, dilation)
        return CONV[len(size)](x, weight, None, stride, padding, dilation, groups)

    grad = randn(seed + 2, *call(x).shape)
    rows = [torch.autograd.grad(call(x[m : m + 1]), weight, grad[m : m + 1])[0] for m in range(n)]
    entry, exit = (grad, x) if transposed else (x, grad)
    rows = torch.stack(rows) if rows else torch.zeros(0, *weight.shape, dtype=torch.float64)
    return Conv(entry, exit, stride, padding, dilation, weight.shape), rows


def make_pulled(seed: int, form: tuple[Factors, Tensor], entries: bool) -> tuple[Pulled, Tensor]:
    """Led back through a product entry by entry, or through one with a matrix from the left and a sine."""
    g, rows = form
    slope = randn(seed + 7, *g.shape)
    if entries:
        return Pulled(g, slope, g.shape), rows * slope
    matrix = randn(seed + 8, 2, g.shape[0])
    back = lambda x: torch.einsum("ab,nb...->na...", matrix, x * slope)  # noqa: E731
    return Pulled(g, back, Size((2, *g.shape[1:]))), back(rows)


def make_across(form: tuple[Factors, Tensor], axes: tuple[int, ...]) -> tuple[Pulled, Tensor]:
    """Without what lies along unit vectors, the same for all seeds; the first of several is zero."""
    g, rows = form
    unit = randn(55, *g.shape)
    unit /= unit.square().sum(axes, keepdim=True).sqrt()
    if 0 not in axes:
        unit[0] = 0
    along = (rows * unit).sum([a + 1 for a in axes], keepdim=True)
    return Pulled(g, Across(unit, axes), g.shape), rows - along * unit


@functools.cache  # most of what the tests that pick one of them took
def examples(seed: int = 0, n: int = 3) -> dict[str, tuple[Factors, Tensor]]:
    """One of each kind, and of each kernel's special cases."""
    k33, one, zero = (3, 3), (1, 1), (0, 0)
    conv = make_conv
    return {
        "scalar": make_dense(seed, n, ()),
        "dense": make_dense(seed, n, (4, 5)),
        "outer_one_token": make_outer(seed, n, 1, 1, 4, 5),
        "outer": make_outer(seed, n, 1, 3, 4, 5),
        "outer_blocks": make_outer(seed, n, 3, 2, 4, 5),
        "outer_many_tokens": make_outer(seed, n, 1, 30, 4, 5),
        "outer_no_token": make_outer(seed, n, 2, 0, 4, 5),
        "rows": make_rows(seed, n, 6, 5, 3),
        "rows_no_token": make_rows(seed, n, 0, 5, 3),
        "conv": conv(seed, n, 1, 4, 3, (6, 5), k33, one, one, one),
        "conv_pointwise": conv(seed, n, 1, 4, 3, (3, 2), one, one, zero, one),
        "conv_strided": conv(seed, n, 2, 2, 3, (8, 7), k33, (2, 3), (2, 1), (1, 2)),
        "conv_stride_beyond_kernel": conv(seed, n, 1, 2, 3, (9, 7), (2, 1), (3, 2), zero, one),
        "conv_dilated": conv(seed, n, 1, 2, 3, (8, 8), k33, one, (2, 2), (2, 2)),
        "conv_depthwise": conv(seed, n, 4, 2, 1, (5, 5), k33, one, one, one),
        "conv_one_position": conv(seed, n, 1, 4, 3, (3, 3), k33, one, zero, one),
        "conv1d": conv(seed, n, 2, 2, 3, (9,), (3,), (2,), (1,), (1,)),
        "conv3d": conv(seed, n, 1, 2, 3, (4, 5, 3), (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
        "transposed": conv(seed, n, 1, 3, 2, (4, 3), k33, (2, 2), one, one, True, (1, 0)),
        "transposed_groups": conv(seed, n, 2, 3, 2, (4, 3), k33, (3, 2), (1, 0), (1, 2), True, (2, 1)),
        "transposed1d": conv(seed, n, 1, 3, 2, (4,), (4,), (2,), (1,), (1,), True),
        "transposed3d": conv(seed, n, 1, 3, 2, (3, 2, 2), (2, 2, 3), (2, 1, 2), (0, 1, 1), (1, 1, 1), True, (1, 0, 1)),
        "pulled_entries_one_token": make_pulled(seed, make_outer(seed, n, 1, 1, 4, 5), True),
        "pulled_entries": make_pulled(seed, make_outer(seed, n, 1, 3, 4, 5), True),
        "pulled_entries_blocks": make_pulled(seed, make_outer(seed, n, 3, 2, 4, 5), True),
        "pulled_entries_conv": make_pulled(seed, conv(seed, n, 1, 4, 3, (6, 5), k33, one, one, one), True),
        "pulled": make_pulled(seed, make_outer(seed, n, 1, 1, 4, 5), False),
        "pulled_dense": make_pulled(seed, make_dense(seed, n, (4, 5)), False),
        "pulled_rows": make_pulled(seed, make_rows(seed, n, 6, 5, 3), False),
        "pulled_conv": make_pulled(seed, conv(seed, n, 1, 4, 3, (6, 5), k33, one, one, one), False),
        "across_one_token": make_across(make_outer(seed, n, 1, 1, 4, 5), (1,)),
        "across_columns_one_token": make_across(make_outer(seed, n, 1, 1, 4, 5), (0,)),
        "across_all_one_token": make_across(make_outer(seed, n, 1, 1, 4, 5), (0, 1)),
        "across_numbers_one_token": make_across(make_outer(seed, n, 1, 1, 4, 1), (1,)),
        "across": make_across(make_outer(seed, n, 1, 3, 4, 5), (1,)),
        "across_columns": make_across(make_outer(seed, n, 1, 3, 4, 5), (0,)),
        "across_blocks": make_across(make_outer(seed, n, 3, 2, 4, 5), (1,)),
        "across_dense": make_across(make_dense(seed, n, (4, 5)), (1,)),
        "across_rows": make_across(make_rows(seed, n, 6, 5, 3), (1,)),
        "across_conv": make_across(conv(seed, n, 1, 4, 3, (6, 5), k33, one, one, one), (1, 2, 3)),
        "across_conv_groups": make_across(conv(seed, n, 2, 2, 3, (8, 7), k33, (2, 3), (2, 1), (1, 2)), (1, 2, 3)),
        "across_conv_channels": make_across(conv(seed, n, 1, 4, 3, (6, 5), k33, one, one, one), (0, 2, 3)),
        "across_transposed": make_across(
            conv(seed, n, 2, 3, 2, (4, 3), k33, (3, 2), (1, 0), (1, 2), True, (2, 1)), (1, 2, 3)
        ),
        "across_pointwise": make_across(conv(seed, n, 1, 4, 3, (3, 2), one, one, zero, one), (1, 2, 3)),
        "pulled_twice": make_pulled(seed + 1, make_pulled(seed, make_outer(seed, n, 1, 1, 4, 5), True), False),
    }


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Conv, Tensor]:
    """Any convolution of any geometry."""
    dims = draw(st.integers(1, 3))
    ints = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation, padding = ints(1, 3), ints(1, 3), ints(1, 2), ints(0, 2)
    transposed = draw(st.booleans())
    reach = [(k - 1) * e + 1 for k, e in zip(kernel, dilation, strict=True)]
    output_padding = tuple(draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True))
    if transposed:
        size = ints(1, 3)
        lengths = [(m - 1) * s - 2 * p + r + q for m, s, p, r, q in
                   zip(size, stride, padding, reach, output_padding, strict=True)]  # fmt: skip
        padding = tuple(p if length > 0 else 0 for p, length in zip(padding, lengths, strict=True))
    else:
        size = tuple(max(1, r - 2 * p) + draw(st.integers(0, 3)) for r, p in zip(reach, padding, strict=True))
    n, groups, o, i = (draw(st.integers(1, 3)) for _ in range(4))
    seed = draw(st.integers(0, 1000))
    return make_conv(seed, n, groups, o, i, size, kernel, stride, padding, dilation, transposed, output_padding)


@st.composite
def forms(draw: st.DrawFn) -> tuple[Factors, Tensor]:
    """Any form."""
    seed, n = draw(st.integers(0, 1000)), draw(st.integers(0, 4))
    size = lambda: draw(st.integers(1, 5))  # noqa: E731
    match draw(st.sampled_from(["dense", "outer", "rows", "conv", "across"])):
        case "across":
            outer = make_outer(seed, n, 1, draw(st.integers(0, 3)), size(), size())
            return make_across(outer, draw(st.sampled_from([(0,), (1,), (0, 1)])))
        case "dense":
            return make_dense(seed, n, tuple(draw(st.lists(st.integers(1, 4), max_size=3))))
        case "outer":
            return make_outer(seed, n, draw(st.integers(1, 3)), draw(st.integers(0, 6)), size(), size())
        case "rows":
            return make_rows(seed, n, draw(st.integers(0, 6)), size(), size())
        case _:
            return draw(convolutions())


def flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), prod(rows.shape[1:]))
