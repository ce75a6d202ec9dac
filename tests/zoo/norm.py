"""Normalisation layers that do not couple the batch: with and without affine, bias, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, N, Problem, T, alone, fn, inner, readout


def _trained(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The layer with affine parameters and running statistics that are not the initial ones, in eval."""

    def build() -> nn.Module:
        layer = make().eval()
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn_like(p))
            for b in layer.buffers():
                if b.is_floating_point():
                    b.copy_(torch.rand_like(b) + 0.5)
        return layer

    return build


def _eval_net() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        _trained(lambda: nn.BatchNorm2d(3))(),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(36, 5),
        _trained(lambda: nn.BatchNorm1d(5))(),
    )
    return Problem(model.eval(), readout, torch.randn(N, 2, 5, 6))


def _instance_train(**options: Any) -> Callable[[], nn.Module]:
    """InstanceNorm in training mode: it normalises by the instance."""
    return lambda: nn.InstanceNorm1d(5, affine=True, **options)


class _OwnRMSNorm(nn.Module):
    """As most language models write it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


_layers: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("layer", lambda: nn.LayerNorm(6), (N, T, 6)),
    ("layer_rank2", lambda: nn.LayerNorm(6), (N, 6)),
    ("layer_no_bias", lambda: nn.LayerNorm(6, bias=False), (N, T, 6)),
    ("layer_no_affine", lambda: nn.LayerNorm(6, elementwise_affine=False), (N, T, 6)),
    ("layer_two_axes", lambda: nn.LayerNorm((T, 6), eps=0.1), (N, 2, T, 6)),
    ("layer_whole_sample", lambda: nn.LayerNorm((T, 6)), (N, T, 6)),
    ("layer_t_equals_n", lambda: nn.LayerNorm(6), (3, 3, 6)),
    ("group", lambda: nn.GroupNorm(2, 6), (N, 6, 5)),
    ("group_rank4", lambda: nn.GroupNorm(3, 6, eps=0.1), (N, 6, 2, 3)),
    ("group_rank2", lambda: nn.GroupNorm(2, 6), (N, 6)),
    ("group_no_affine", lambda: nn.GroupNorm(2, 6, affine=False), (N, 6, 5)),
    ("rms", lambda: nn.RMSNorm(6), (N, T, 6)),
    ("rms_two_axes", lambda: nn.RMSNorm((T, 6), eps=0.1), (N, 2, T, 6)),
    ("rms_no_affine", lambda: nn.RMSNorm(6, elementwise_affine=False), (N, T, 6)),
    ("rms_handwritten", lambda: _OwnRMSNorm(6), (N, T, 6)),
    ("instance_1d", lambda: nn.InstanceNorm1d(5, affine=True), (N, 5, 6)),
    ("instance_1d_plain", lambda: nn.InstanceNorm1d(5), (N, 5, 6)),
    ("instance_2d", lambda: nn.InstanceNorm2d(5, affine=True, eps=0.1), (N, 5, 2, 3)),
    ("instance_3d", lambda: nn.InstanceNorm3d(2, affine=True), (N, 2, 2, 3, 2)),
    ("instance_running_eval", lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True), (N, 5, 2, 3)),
    ("instance_running_no_affine_eval", lambda: nn.InstanceNorm1d(5, track_running_stats=True), (N, 5, 3)),
    ("batch_1d_eval", lambda: nn.BatchNorm1d(6), (N, 6)),
    ("batch_1d_rank3_eval", lambda: nn.BatchNorm1d(5, eps=0.1), (N, 5, 3)),
    ("batch_2d_eval", lambda: nn.BatchNorm2d(5), (N, 5, 2, 3)),
    ("batch_3d_eval", lambda: nn.BatchNorm3d(2), (N, 2, 2, 3, 2)),
    ("sync_batch_eval", lambda: nn.SyncBatchNorm(5), (N, 5, 3)),
    ("batch_no_affine_eval", lambda: nn.BatchNorm2d(5, affine=False), (N, 5, 2, 3)),
    ("batch_channels_equal_n_eval", lambda: nn.BatchNorm1d(4), (4, 4)),
    ("local_response", lambda: nn.Sequential(nn.Conv1d(5, 5, 1), nn.LocalResponseNorm(2)), (N, 5, 3)),
]

cases = [Case(f"norm_{name}", inner(_trained(make), *shape)) for name, make, shape in _layers] + [
    Case("norm_layer_first", alone(_trained(lambda: nn.LayerNorm(6)), N, T, 6)),
    Case("norm_group_first", alone(_trained(lambda: nn.GroupNorm(2, 6)), N, 6, 5)),
    Case("norm_batch_first_eval", alone(_trained(lambda: nn.BatchNorm2d(5)), N, 5, 2, 3)),
    Case("norm_batch_eval_net", _eval_net),
    Case("norm_instance_train", inner(_instance_train(), N, 5, 6)),
    Case(
        "norm_layer_functional", fn(lambda p, x: F.layer_norm(x, (6,), weight=p.w, bias=p.b), (N, T, 6), w=(6,), b=(6,))
    ),
    Case("norm_layer_bias_only", fn(lambda p, x: F.layer_norm(x, (6,), bias=p.b), (N, T, 6), b=(6,))),
    Case("norm_group_functional", fn(lambda p, x: F.group_norm(x, 2, p.w, p.b), (N, 6, 5), w=(6,), b=(6,))),
    Case("norm_rms_functional", fn(lambda p, x: F.rms_norm(x, (6,), p.w, 1e-5), (N, T, 6), w=(6,))),
    Case(
        "norm_instance_functional", fn(lambda p, x: F.instance_norm(x, weight=p.w, bias=p.b), (N, 5, 6), w=(5,), b=(5,))
    ),
    Case(
        "norm_layer_of_parameter_scale",
        fn(lambda p, x: F.layer_norm(x * p.s, (6,), p.w.exp()), (N, T, 6), s=(6,), w=(6,)),
    ),
]
