"""What is left of `torch.nn` and its utilities: adaptive softmax, lazy modules, checkpointing, wrappers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .case import VMAP_NUMBERS, Case, D, N, Problem, T, normal, on, readout

CHECKPOINT = {"vmap": ("CaptureError", "torch.func does not support saved-tensor hooks")}


class _Adaptive(nn.Module):
    """Frequent classes in the head, rare ones in tails that only some samples reach."""

    def __init__(self, log_prob: bool, **options: Any) -> None:
        super().__init__()
        self.inp, self.log_prob = nn.Linear(D, 8), log_prob
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 10, cutoffs=[3, 6], div_value=2.0, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.inp(x).tanh()
        return self.softmax.log_prob(x) if self.log_prob else self.softmax(x, target).output


class _LinearCrossEntropy(nn.Module):
    """The last layer and its loss in one function, on hidden states: losses [N] are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(D, 8), nn.LinearCrossEntropyLoss(8, 6, bias=True, reduction="none")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head(self.inp(x).tanh(), target)


def _criterion_with_parameters() -> Problem:
    """The criterion has parameters of its own, which are not the model's."""
    return Problem(nn.Linear(D, 8), nn.LinearCrossEntropyLoss(8, 6), torch.randn(N, D), torch.randint(6, (N,)))


def _lazy(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Problem]:
    """A lazy layer, materialised by a first call; in eval, since some of them are batch norms."""

    def build() -> Problem:
        model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), make(), nn.Tanh()).eval()
        model(torch.randn(shape))
        return Problem(model, readout, torch.randn(shape))

    return build


_CHANNELS = ((N, 2, 5), (N, 2, 4, 5), (N, 2, 3, 4, 5))
_KINDS: list[tuple[str, tuple[object, ...]]] = [
    ("Conv", (3, 2)), ("ConvTranspose", (3, 2)), ("BatchNorm", ()), ("InstanceNorm", (0.1, 0.1, True)),
]  # fmt: skip
lazy = [
    Case("lazy_linear", _lazy(lambda: nn.LazyLinear(4), N, D)),
    *(Case(f"lazy_{kind.lower()}{len(shape) - 2}d", _lazy(functools.partial(
        getattr(nn, f"Lazy{kind}{len(shape) - 2}d"), *args), *shape))
      for kind, args in _KINDS
      for shape in _CHANNELS),
]  # fmt: skip


class _Checkpointed(nn.Module):
    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D), nn.LayerNorm(D))
        self.out, self.how = nn.Linear(D, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.how(self.body, x)
        return self.out(self.how(self.body, x))  # twice, so that a parameter is in two regions


class _Jitter(nn.Module):
    """Modules in containers: lists, dictionaries, partial functions, and a layer that is held but no child."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(D, 3), "b": nn.Linear(D, 2)})
        self.body = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        self.partial = functools.partial(F.linear, weight=self.body[0].get_parameter("weight"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.body:
            x = layer(x).relu()
        x = self.partial(x)
        return {k: head(x) for k, head in self.heads.items()}


class _SubMode(nn.Module):
    """A part of the model is in another mode, and one runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.frozen = nn.BatchNorm1d(D).eval(), nn.Linear(D, 3), nn.Linear(D, D)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.linear(self.norm(x))


class _GradInside(nn.Module):
    """Gradients are enabled again inside of a region without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
            with torch.enable_grad():
                return self.b(x).tanh()


def _copied() -> Problem:
    """A deep copy of a model that has tied parameters and has been differentiated before."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    model[2].weight = model[0].weight
    model(torch.randn(2, D)).sum().backward()
    model.zero_grad()
    return Problem(copy.deepcopy(model), readout, torch.randn(N, D))


def _moved_axis(dim: int) -> Callable[[], Problem]:
    """Softmax, cumulative sums and sorting over features, which do not couple samples."""

    def forward(x: Tensor) -> Tensor:
        return x.sort(-1).values.cumsum(-1).softmax(-1).flip(-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(forward(self.a(x)))

    return on(Model, normal(N, *[T] * dim, D))


cases = [
    Case(
        "adaptive_softmax",
        on(lambda: _Adaptive(False), normal(N, D), lambda: torch.tensor([0, 4, 8, 5])),
        raises=VMAP_NUMBERS,
    ),
    Case("adaptive_softmax_log_prob", on(lambda: _Adaptive(True), normal(N, D), lambda: torch.tensor([0, 4, 8, 5]))),
    Case(
        "adaptive_softmax_head_bias",
        on(lambda: _Adaptive(False, head_bias=True), normal(N, D), lambda: torch.tensor([9, 1, 4, 2])),
        raises=VMAP_NUMBERS,
    ),
    Case("linear_cross_entropy_in_model", on(_LinearCrossEntropy, normal(N, D), lambda: torch.randint(6, (N,)))),
    Case("criterion_with_parameters", _criterion_with_parameters),
    *lazy,
    Case(
        "wrapped_in_data_parallel", on(lambda: nn.DataParallel(nn.Sequential(nn.Linear(D, 3), nn.Tanh())), normal(N, D))
    ),
    Case(
        "checkpoint",
        on(lambda: _Checkpointed(lambda body, x: checkpoint(body, x, use_reentrant=False)), normal(N, D)),
        raises=CHECKPOINT,
    ),
    Case(
        "checkpoint_sequential",
        on(
            lambda: _Checkpointed(lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=False)),
            normal(N, T, D),
        ),
        raises=CHECKPOINT,
    ),
    Case(
        "module_containers",
        on(_Jitter, normal(N, D)),
        raises={"vmap": ("CaptureError", "a parameter is held in a partial function, where torch.func can't swap it")},
    ),
    Case("parts_in_another_mode", on(_SubMode, normal(N, D))),
    Case("grad_enabled_inside_no_grad", on(_GradInside, normal(N, D)), unused=("a.weight", "a.bias")),
    Case("copied_model", _copied),
    Case("features_sorted", _moved_axis(0)),
    Case("features_sorted_rank3", _moved_axis(1)),
]
