"""Losses: criterions that return a scalar, meant for one sample alone, and losses [N]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import VMAP_NUMBERS, Case, D, N, Problem, T

V = 6  # classes


class _Classifier(nn.Module):
    """Logits [N, V], or [N, V, T] for tokens (the layout of `CrossEntropyLoss`)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 8), nn.Linear(8, V)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(torch.tanh(self.a(x)))
        return out.movedim(-1, 1) if out.dim() > 2 else out


def _criterion(
    make: Callable[[], Callable[..., Tensor]], targets: Callable[[], Any], *shape: int, head: nn.Module | None = None
) -> Callable[[], Problem]:
    def build() -> Problem:
        model: nn.Module = _Classifier() if head is None else nn.Sequential(_Classifier(), head)
        return Problem(model, make(), torch.randn(shape or (N, D)), targets())

    return build


def _labels() -> Tensor:
    return torch.tensor([0, 2, 5, 2])


def _token_labels() -> Tensor:
    labels = torch.randint(V, (N, T))
    labels[0, 1:] = -100
    labels[2, 0] = -100
    return labels


def _real() -> Tensor:
    return torch.randn(N, V)


def _weights() -> Tensor:
    return torch.arange(1, V + 1, dtype=torch.float64)


def _signs() -> Tensor:
    return torch.randn(N, V).sign()


class _Module(nn.Module):
    """A criterion that is a module with a buffer and no reduction argument."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(outputs, targets).square()


def _unbatched_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over everything but the batch, and no reduction of a library."""
    return ((outputs - targets) ** 2).mean()


def _penalty_by_attribute() -> Problem:
    """A penalty on parameters inside losses [N], read from the model at the time of the call."""
    model = _Classifier()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + 0.1 * model.a.weight.square().sum()

    return Problem(model, loss, torch.randn(N, D), _labels())


def _penalty_by_list() -> Problem:
    """The same on a list of parameters taken before."""
    model = _Classifier()
    parameters = list(model.parameters())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + 0.1 * sum(p.square().sum() for p in parameters)

    return Problem(model, loss, torch.randn(N, D), _labels())


def _penalty_in_scalar() -> Problem:
    model = _Classifier()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * model.b.weight.abs().sum()

    return Problem(model, loss, torch.randn(N, D), _labels())


def _penalty_only() -> Problem:
    """A parameter that only the penalty sees."""
    model = _Classifier()
    model.extra = nn.Parameter(torch.randn(3))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + model.extra.square().sum()  # type: ignore[operator]

    return Problem(model, loss, torch.randn(N, D), _labels())


def _weighted_penalty() -> Problem:
    """A penalty whose strength belongs to the sample."""
    model = _Classifier()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + outputs[:, 0] * model.a.weight.square().mean()

    return Problem(model, loss, torch.randn(N, D), _labels())


scalar = [
    Case("loss_cross_entropy", _criterion(nn.CrossEntropyLoss, _labels)),
    Case("loss_cross_entropy_sum", _criterion(lambda: nn.CrossEntropyLoss(reduction="sum"), _labels)),
    Case("loss_cross_entropy_none", _criterion(lambda: nn.CrossEntropyLoss(reduction="none"), _labels)),
    Case("loss_cross_entropy_functional", _criterion(lambda: F.cross_entropy, _labels)),
    Case("loss_class_weights", _criterion(lambda: nn.CrossEntropyLoss(weight=_weights()), _labels)),
    Case(
        "loss_class_weights_sum", _criterion(lambda: nn.CrossEntropyLoss(weight=_weights(), reduction="sum"), _labels)
    ),
    Case("loss_label_smoothing", _criterion(lambda: nn.CrossEntropyLoss(label_smoothing=0.2), _labels)),
    Case("loss_probability_targets", _criterion(nn.CrossEntropyLoss, lambda: torch.rand(N, V).softmax(1))),
    Case("loss_tokens_ignored", _criterion(nn.CrossEntropyLoss, _token_labels, N, T, D)),
    Case(
        "loss_tokens_ignored_weighted",
        _criterion(lambda: nn.CrossEntropyLoss(weight=_weights(), label_smoothing=0.1), _token_labels, N, T, D),
    ),
    Case("loss_tokens_t_equals_n", _criterion(nn.CrossEntropyLoss, lambda: torch.randint(V, (4, 4)), 4, 4, D)),
    Case("loss_mse_features", _criterion(nn.MSELoss, _real)),
    Case("loss_mse_sum", _criterion(lambda: nn.MSELoss(reduction="sum"), _real)),
    Case("loss_l1", _criterion(nn.L1Loss, _real)),
    Case("loss_smooth_l1", _criterion(nn.SmoothL1Loss, _real)),
    Case("loss_huber", _criterion(lambda: nn.HuberLoss(delta=0.5), _real)),
    Case(
        "loss_bce_with_logits",
        _criterion(lambda: nn.BCEWithLogitsLoss(weight=_weights(), pos_weight=_weights()), lambda: torch.rand(N, V)),
    ),
    Case("loss_bce", _criterion(nn.BCELoss, lambda: torch.rand(N, V), head=nn.Sigmoid())),
    Case("loss_nll", _criterion(nn.NLLLoss, _labels, head=nn.LogSoftmax(1))),
    Case("loss_nll_weighted", _criterion(lambda: nn.NLLLoss(weight=_weights()), _labels, head=nn.LogSoftmax(1))),
    Case("loss_poisson_nll", _criterion(nn.PoissonNLLLoss, lambda: torch.rand(N, V))),
    Case(
        "loss_kl_div_batchmean",
        _criterion(
            lambda: nn.KLDivLoss(reduction="batchmean"), lambda: torch.rand(N, V).softmax(1), head=nn.LogSoftmax(1)
        ),
    ),
    Case("loss_soft_margin", _criterion(nn.SoftMarginLoss, _signs)),
    Case("loss_hinge_embedding", _criterion(nn.HingeEmbeddingLoss, _signs)),
    Case("loss_multi_margin", _criterion(nn.MultiMarginLoss, _labels)),
    Case("loss_multi_label_soft_margin", _criterion(nn.MultiLabelSoftMarginLoss, lambda: torch.rand(N, V).round())),
    Case("loss_module_of_the_user", _criterion(_Module, _labels)),
    Case("loss_own_mean", _criterion(lambda: _unbatched_mean, _real)),
    Case(
        "loss_reads_numbers",
        _criterion(
            lambda: lambda o, y: F.cross_entropy(o, y) * (2.0 if float(o.detach().max()) > 0.1 else 0.5), _labels
        ),
        raises=VMAP_NUMBERS,
    ),
    Case("loss_scalar_one_sample", _criterion(nn.CrossEntropyLoss, lambda: torch.tensor([3]), 1, D)),
    Case(
        "loss_vector_one_sample",
        _criterion(lambda: nn.CrossEntropyLoss(reduction="none"), lambda: torch.tensor([3]), 1, D),
    ),
]

vector = [
    Case(
        "loss_vector_of_token_means",
        _criterion(
            lambda: lambda o, y: F.cross_entropy(o, y, reduction="none").mean(1),
            lambda: torch.randint(V, (N, T)),
            N,
            T,
            D,
        ),
    ),
    Case(
        "loss_vector_weighted_by_target",
        _criterion(lambda: lambda o, y: (o - y).square().mean(1) * y[:, 0].abs(), _real),
    ),
    Case("loss_penalty_by_attribute", _penalty_by_attribute),
    Case(
        "loss_penalty_by_list",
        _penalty_by_list,
        raises={"vmap": ("CaptureError", "torch.func swaps the model's parameters, not those in the user's list")},
    ),
    Case("loss_penalty_in_scalar", _penalty_in_scalar),
    Case("loss_penalty_only", _penalty_only),
    Case("loss_penalty_times_sample", _weighted_penalty),
    Case(
        "loss_constant_for_some_samples",
        _criterion(lambda: lambda o, y: torch.where(y == 2, o.detach().sum(1), o.logsumexp(1)), _labels),
    ),
]

cases = scalar + vector
