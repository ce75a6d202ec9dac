"""Parameters used more than once, not at all, or by way of another tensor; operations in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .case import Case, D, N, Problem, T, fn, normal, on, readout


class _Twice(nn.Module):
    """One module, called twice in a row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class _Branches(_Twice):
    """One module in two branches that run side by side, with different inputs."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x), self.layer(x.flip(-1) * 0.5)
        return a * b.tanh()


class _LengthsDiffer(_Twice):
    """One module on inputs with different numbers of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), self.layer(x[:, :1])], 1).tanh() + self.layer(x.mean(1)).unsqueeze(1)


class _Nested(nn.Module):
    """A module inside of two others, which share it."""

    def __init__(self) -> None:
        super().__init__()
        core = nn.Linear(D, D)
        self.first = nn.Sequential(core, nn.Tanh())
        self.second = nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.Tanh(), core))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _SharedWeight(nn.Module):
    """Two layers with one weight and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class _Recursion(nn.Module):
    """A weight used T times, as in a hand-written recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.inp = nn.Linear(D, D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.size(1)):
            h = torch.tanh(self.cell(h) + self.inp(x[:, t]))
        return h


class _OutputNamed(nn.Module):
    """Children with names that a library may want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.inputs, self.hook = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inputs(self.hook(x).tanh()))


class _Residual(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(D, D), nn.Linear(D, D), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        y = self.b(y)
        y += x
        return self.act(y) * 2


class _InplaceEverywhere(nn.Module):
    """In-place operations right after every layer, on its output and on views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv(x) + 0.1)
        y = self.norm(x).mul_(1.5)
        y[:, 0].add_(1)
        z = self.linear(y.flatten(1))
        z[:, :2] *= 2
        return z.sigmoid_()


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.a.requires_grad_(False)
        self.c.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class _Unused(nn.Module):
    """A layer that is never called, and a branch whose result no loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.dropped = nn.Linear(D, 3), nn.Linear(D, 2), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x)


class _CutByDetach(nn.Module):
    """A layer whose every use is detached: no loss depends on it; another is cut in one of two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.b(x).sigmoid()
        return self.b(self.a(x).detach() * scale).tanh()


class _NoGradThenShared(nn.Module):
    """A statistic of the weights is taken without grad, and used with the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, 6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.w.norm(dim=0)
        return x @ (self.w / norm)


def _weight_norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: parametrizations.weight_norm(make())


def _spectral(make: Callable[[], nn.Module], train: bool) -> Callable[[], nn.Module]:
    """In eval the singular vectors stay. In training every forward moves them, so let them arrive first."""

    def build() -> nn.Module:
        layer = parametrizations.spectral_norm(make())
        for _ in range(400 if train else 3):
            _ = layer.weight  # one power iteration
        return layer.train(train)

    return build


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


def _symmetric() -> nn.Module:
    layer = nn.Linear(D, D)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return layer


def _old_weight_norm() -> nn.Module:
    """The weight recomputed by a forward pre-hook, the way it was before parametrizations."""

    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(D, 6)
            self.g = nn.Parameter(torch.rand(6, 1) + 0.5)
            self.v = nn.Parameter(self.weight.detach().clone())
            del self.weight

    def compute(layer: nn.Module, _: object) -> None:
        layer.weight = layer.g * layer.v / layer.v.norm(dim=1, keepdim=True)  # type: ignore[operator]

    layer = Layer()
    layer.register_forward_pre_hook(compute)
    return layer


def _hooked() -> nn.Module:
    """The user's own forward hooks change inputs and outputs."""
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def _net(middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(D, D), middle(), nn.Tanh())


def _cached_weight() -> Problem:
    model = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(D, D)) for _ in range(2)])

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return self.net(self.net(x).tanh())

    return Problem(Cached(), readout, torch.randn(N, D))


reuse = [
    Case("reuse_linear_twice", on(lambda: _Twice(nn.Linear(D, D)), normal(N, D))),
    Case("reuse_wide_linear_twice", on(lambda: _Twice(nn.Linear(12, 12)), normal(N, 12))),
    Case("reuse_linear_rank3", on(lambda: _Twice(nn.Linear(D, D)), normal(N, T, D))),
    Case("reuse_conv_twice", on(lambda: _Twice(nn.Conv2d(2, 2, 3, padding=1)), normal(N, 2, 4, 5))),
    Case("reuse_conv_on_two_sizes", on(lambda: _Twice(nn.Conv1d(2, 2, 3)), normal(N, 2, 9))),
    Case("reuse_norm_twice", on(lambda: _Twice(nn.LayerNorm(D)), normal(N, T, D))),
    Case(
        "reuse_block_twice",
        on(lambda: _Twice(nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D))), normal(N, D)),
    ),
    Case("reuse_branches", on(lambda: _Branches(nn.Linear(D, D)), normal(N, D))),
    Case("reuse_branches_no_bias", on(lambda: _Branches(nn.Linear(9, 11, bias=False)), normal(N, 9))),
    Case("reuse_lengths_differ", on(lambda: _LengthsDiffer(nn.Linear(D, 6)), normal(N, T, D))),
    Case("reuse_nested", on(_Nested, normal(N, D))),
    Case("reuse_in_list", on(lambda: nn.Sequential(*[nn.Linear(D, D)] * 3), normal(N, D))),
    Case("reuse_shared_weight", on(_SharedWeight, normal(N, D))),
    Case("reuse_hand_written_recurrence", on(_Recursion, normal(N, T, D))),
    Case("reuse_parameter_in_two_roles", fn(lambda p, x: (x @ p.w * p.w.sum()).tanh() + p.w[0], (N, D), w=(D, D))),
    Case(
        "reuse_as_kernel_and_matrix",
        fn(lambda p, x: F.conv1d(x, p.w).flatten(1) @ p.w.flatten(1).repeat(1, 2).t(), (N, 2, 6), w=(3, 2, 3)),
    ),
    Case("children_with_reserved_names", on(_OutputNamed, normal(N, D))),
    Case("hooks_of_the_user", on(_hooked, normal(N, D))),
]

inplace = [
    Case(
        "inplace_relu", on(lambda: nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), normal(N, D))
    ),
    Case("inplace_relu_last", on(lambda: nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True)), normal(N, D))),
    Case("inplace_residual", on(lambda: _Residual(True), normal(N, D))),
    Case("residual", on(lambda: _Residual(False), normal(N, T, D))),
    Case("inplace_everywhere", on(_InplaceEverywhere, normal(N, 2, 6))),
    Case(
        "inplace_dropout_eval",
        on(lambda: nn.Sequential(nn.Linear(D, 6), nn.Dropout(inplace=True), nn.Linear(6, 3)).eval(), normal(N, D)),
    ),
]

absent = [
    Case("frozen_layers", on(_Frozen, normal(N, D))),
    Case(
        "unused_layers",
        on(_Unused, normal(N, D)),
        unused=("never.weight", "never.bias", "dropped.weight", "dropped.bias"),
    ),
    Case("cut_by_detach", on(_CutByDetach, normal(N, D)), unused=("a.weight", "a.bias")),
    Case("no_grad_statistic_of_weight", on(_NoGradThenShared, normal(N, D))),
]

derived = [
    Case("weight_norm_linear", on(_net(_weight_norm(lambda: nn.Linear(D, 6))), normal(N, D))),
    Case("weight_norm_conv", on(_net(_weight_norm(lambda: nn.Conv1d(2, 3, 3, padding=1))), normal(N, 2, D))),
    Case("weight_norm_cached", _cached_weight),
    Case("weight_norm_by_pre_hook", on(_net(_old_weight_norm), normal(N, D))),
    Case("weight_norm_reused", on(lambda: _Twice(parametrizations.weight_norm(nn.Linear(D, D))), normal(N, D))),
    Case("spectral_norm_eval", on(_net(_spectral(lambda: nn.Linear(D, 6), False)), normal(N, D))),
    Case("spectral_norm_conv_eval", on(_net(_spectral(lambda: nn.Conv1d(2, 3, 3, padding=1), False)), normal(N, 2, D))),
    Case("spectral_norm_train_converged", on(_net(_spectral(lambda: nn.Linear(D, 3), True)), normal(N, D))),
    Case(
        "orthogonal_matrix_exp",
        on(_net(lambda: parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="matrix_exp")), normal(N, D)),
    ),
    Case(
        "orthogonal_cayley",
        on(_net(lambda: parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="cayley")), normal(N, D)),
    ),
    Case(
        "orthogonal_householder",
        on(_net(lambda: parametrizations.orthogonal(nn.Linear(D, 3), orthogonal_map="householder")), normal(N, D)),
    ),
    Case("parametrized_symmetric", on(_net(_symmetric), normal(N, T, D))),
]

cases = reuse + inplace + absent + derived
