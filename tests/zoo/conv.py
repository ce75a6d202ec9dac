"""Convolutions: every geometry, every padding mode, every memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, N, Problem, alone, fn, inner, on, readout


def _conv(dim: int, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](*args, **kwargs)


def _transposed(dim: int, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1](*args, **kwargs)


class _OutputSize(nn.Module):
    """`output_size` given at the call, which decides `output_padding`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(10, 8))


def _channels_last() -> Problem:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, stride=2))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Problem(model, readout, torch.randn(N, 3, 6, 5).to(memory_format=torch.channels_last))


def _net() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(N, 1, 8, 8), torch.randint(3, (N,)))


C1, C2, C3 = (N, 2, 9), (N, 2, 6, 7), (N, 2, 4, 5, 3)  # [N, C, *S]

_geometries = [
    ("1d", _conv(1, 2, 3, 3), C1),
    ("1d_no_bias", _conv(1, 2, 3, 3, bias=False), C1),
    ("1d_pointwise", _conv(1, 2, 3, 1), C1),
    ("1d_stride_padding_dilation", _conv(1, 2, 3, 3, stride=2, padding=2, dilation=2), C1),
    ("1d_grouped", _conv(1, 4, 6, 3, groups=2), (N, 4, 9)),
    ("1d_depthwise", _conv(1, 3, 6, 3, groups=3, padding=1), (N, 3, 9)),
    ("1d_same_even_kernel", _conv(1, 2, 3, 4, padding="same"), C1),
    ("1d_valid", _conv(1, 2, 3, 4, padding="valid"), C1),
    ("1d_stride_leaves_a_rest", _conv(1, 2, 3, 2, stride=3), (N, 2, 10)),
    ("1d_stride_past_the_input", _conv(1, 2, 3, 3, stride=9, padding=2), (N, 2, 4)),
    ("1d_wide", _conv(1, 9, 10, 3), (N, 9, 5)),
    ("2d", _conv(2, 2, 3, 3), C2),
    ("2d_no_bias", _conv(2, 2, 3, (3, 2), bias=False), C2),
    ("2d_pointwise", _conv(2, 2, 3, 1), C2),
    ("2d_stride_padding", _conv(2, 2, 3, (3, 2), stride=(2, 1), padding=(0, 1)), C2),
    ("2d_dilated", _conv(2, 2, 3, 2, dilation=(2, 3)), C2),
    ("2d_grouped_strided_dilated", _conv(2, 4, 6, 2, groups=2, stride=2, dilation=2, padding=1), (N, 4, 6, 7)),
    ("2d_depthwise", _conv(2, 3, 3, 3, groups=3), (N, 3, 6, 5)),
    ("2d_depthwise_multiplier", _conv(2, 3, 6, 2, groups=3, bias=False), (N, 3, 5, 4)),
    ("2d_same_even_kernel_dilated", _conv(2, 2, 3, (2, 3), padding="same", dilation=(1, 2)), C2),
    ("2d_valid", _conv(2, 2, 3, 2, padding="valid", stride=2), C2),
    ("2d_kernel_is_the_image", _conv(2, 2, 3, (6, 7)), C2),
    ("2d_patches", _conv(2, 2, 3, 3, stride=3), (N, 2, 6, 6)),
    ("2d_all_sizes_equal", _conv(2, 4, 4, 1), (4, 4, 4, 4)),
    ("3d", _conv(3, 2, 3, 2), C3),
    ("3d_grouped_strided", _conv(3, 2, 4, (2, 3, 1), groups=2, stride=(1, 2, 1), padding=(1, 0, 1)), C3),
    ("3d_dilated_same", _conv(3, 2, 3, (1, 2, 3), dilation=(1, 2, 1), padding="same", bias=False), C3),
    ("transposed_1d", _transposed(1, 2, 3, 3), C1),
    (
        "transposed_1d_all_options",
        _transposed(1, 4, 6, 3, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
        (N, 4, 5),
    ),
    ("transposed_1d_no_bias", _transposed(1, 2, 3, 2, stride=2, bias=False), C1),
    ("transposed_2d", _transposed(2, 2, 3, 3), C2),
    ("transposed_2d_output_padding", _transposed(2, 2, 3, 3, stride=2, padding=1, output_padding=1), C2),
    (
        "transposed_2d_all_options",
        _transposed(2, 4, 2, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2)),
        (N, 4, 3, 4),
    ),
    ("transposed_2d_depthwise", _transposed(2, 3, 3, 2, groups=3, stride=2, bias=False), (N, 3, 4, 3)),
    ("transposed_3d", _transposed(3, 2, 3, 2), C3),
    (
        "transposed_3d_all_options",
        _transposed(3, 2, 4, 2, stride=2, padding=(1, 0, 1), output_padding=(1, 0, 1), groups=2, dilation=(2, 1, 1)),
        C3,
    ),
]

_modes = [
    (f"{dim}d_{mode}", _conv(dim, 2, 3, 3, padding=padding, padding_mode=mode, **options), shape)
    for mode in ("circular", "reflect", "replicate", "zeros")
    for dim, padding, options, shape in (
        (1, 2, {"dilation": 2}, C1),
        (2, (1, 2), {"stride": 2}, C2),
        (3, 1, {}, (N, 2, 4, 3, 4)),
    )
]

layouts = [
    Case("conv_2d_channels_last", _channels_last),
    Case("conv_2d_non_contiguous", on(_conv(2, 3, 4, 3), lambda: torch.randn(N, 7, 6, 3).permute(0, 3, 1, 2))),
    Case("conv_2d_batch_not_outermost", on(_conv(2, 3, 4, 3), lambda: torch.randn(6, 7, 3, N).permute(3, 2, 0, 1))),
    Case("conv_2d_expanded_input", on(_conv(2, 3, 4, 3), lambda: torch.randn(N, 1, 6, 5).expand(N, 3, 6, 5))),
    Case("conv_2d_one_sample", inner(_conv(2, 2, 3, 3), 1, 2, 6, 7)),
    Case("conv_1d_first", alone(_conv(1, 2, 3, 3), *C1)),
    Case("conv_2d_first", alone(_conv(2, 2, 3, 3, padding=1), *C2)),
    Case("conv_net", _net),
    Case(
        "conv_circular_same_grouped",
        inner(_conv(2, 4, 6, (3, 2), padding="same", padding_mode="circular", groups=2), N, 4, 6, 7),
    ),
    Case("conv_transposed_output_size", on(_OutputSize, lambda: torch.randn(N, 2, 5, 4))),
    Case(
        "functional_conv", fn(lambda p, x: F.conv1d(x, p.w, p.b, stride=2, padding=1), (N, 2, 9), w=(3, 2, 3), b=(3,))
    ),
    Case(
        "functional_conv_string_padding",
        fn(lambda p, x: F.conv2d(x, weight=p.w, padding="same", groups=2), (N, 4, 5, 6), w=(6, 2, 3, 2)),
    ),
    Case(
        "functional_conv_transpose",
        fn(lambda p, x: F.conv_transpose1d(x, p.w, stride=2, output_padding=1), (N, 2, 5), w=(2, 3, 3)),
    ),
    Case("torch_conv", fn(lambda p, x: torch.conv2d(x, p.w, p.b), (N, 2, 5, 6), w=(3, 2, 2, 3), b=(3,))),
    Case(
        "conv_weight_with_two_numbers_of_groups",
        fn(
            lambda p, x: F.conv2d(x, p.w, groups=2).flatten(1) + F.conv2d(x[:, 1:3], p.w).flatten(1).cos(),
            (N, 4, 5, 6),
            w=(4, 2, 3, 2),
        ),
    ),
    Case("conv_samples_as_positions", fn(lambda p, x: F.conv1d(x.T[None], p.w)[0].T, (N, 3), w=(2, 3, 1))),
    Case("conv_weight_flipped", fn(lambda p, x: F.conv1d(x, p.w.flip(-1)), (N, 2, 9), w=(3, 2, 3))),
    Case("unfold_then_matmul", fn(lambda p, x: p.w @ F.unfold(x, 3, padding=1), (N, 2, 5, 4), w=(3, 18))),
]

cases = [Case(f"conv_{name}", inner(make, *shape)) for name, make, shape in _geometries + _modes] + layouts
