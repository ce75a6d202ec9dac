"""How a model is called and what it returns; what a loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, D, N, Problem, T, readout


class _Two(nn.Module):
    """Two inputs, an optional third, a number: as the caller likes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, power: int = 1) -> Tensor:
        out = self.a(x).tanh() * self.b(y) ** power
        return out if mask is None else out * mask


class _NestedInput(_Two):
    def forward(self, batch: dict[str, Any], extra: tuple[Tensor, list[Tensor]]) -> Tensor:  # type: ignore[override]
        return self.a(batch["x"]).tanh() * self.b(batch["inner"]["y"]) + extra[0].unsqueeze(1) * extra[1][0]


class _KeywordChild(nn.Module):
    """Children called with keywords, `None`, numbers; a child that returns a tuple, and one that returns a dict."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, *, hidden: Tensor, mask: Tensor | None, times: int) -> tuple[Tensor, dict[str, Any]]:
            for _ in range(times):
                hidden = F.linear(input=torch.tanh(hidden), weight=self.linear.weight, bias=self.linear.bias)
            return hidden, {"state": hidden * 2, "nothing": None}

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def forward(self, x: Tensor) -> Tensor:
        hidden, rest = self.child(hidden=x, mask=None, times=2)
        return hidden + rest["state"].sin()


@dataclass
class _Output:
    logits: Tensor
    hidden: Tensor
    extra: None = None


class _Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class _Many(nn.Module):
    """Two outputs, packed by `pack`; the second one is used by the first."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.pack = nn.Linear(D, 6), nn.Linear(6, 3), pack

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).tanh()
        return self.pack(self.b(hidden), hidden)


def _both(outputs: Any, targets: Tensor | None = None) -> Tensor:
    """Losses [N] of both outputs, whatever holds them."""
    if isinstance(outputs, dict):
        outputs = (outputs["logits"], outputs["hidden"][0])
    elif not isinstance(outputs, tuple):
        outputs = (outputs.logits, outputs.hidden)
    return readout(list(outputs))


def _many(pack: Callable[[Tensor, Tensor], Any]) -> Callable[[], Problem]:
    return lambda: Problem(_Many(pack), _both, torch.randn(N, D), torch.randint(3, (N,)))


class _Flat(nn.Module):
    """Outputs [N T, V]: samples and tokens in one axis, sample-major."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.reshape(-1, D))))


class _SequenceFirst(nn.Module):
    """Inputs [T, N, D] (batch_dim=1): everything has the sample axis second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.pos = nn.Parameter(torch.randn(8, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x) + self.pos[: x.size(0)])))


def _sum_tokens_dim1(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(1, 0).movedim(-1, 1), targets.t(), reduction="none").sum(1)


def _two(*inputs: Callable[[], Any]) -> Callable[[], Problem]:
    return lambda: Problem(_Two(), readout, tuple(i() for i in inputs))


def _x() -> Tensor:
    return torch.randn(N, D)


def _y() -> Tensor:
    return torch.randn(N, 3)


def _keywords() -> Problem:
    return Problem(_Two(), readout, {"y": _y(), "x": _x(), "mask": None, "power": 2})


def _nested() -> Problem:
    batch = {"x": _x(), "inner": {"y": _y()}, "name": "kept", "nothing": None}
    return Problem(_NestedInput(), readout, (batch, (torch.randn(N), [torch.randn(N, 6)])))


def _dict_targets() -> Problem:
    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["label"], reduction="none") * targets["weight"]

    return Problem(nn.Linear(D, 3), loss, _x(), {"label": torch.randint(3, (N,)), "weight": torch.rand(N)})


def _tuple_targets() -> Problem:
    def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    return Problem(_Many(lambda a, b: (a, b)), loss, _x(), (torch.randint(3, (N,)), torch.randn(N, 6)))


def _input_requires_grad() -> Problem:
    return Problem(nn.Sequential(nn.Linear(D, 6), nn.Tanh()), readout, torch.randn(N, D, requires_grad=True))


cases = [
    Case("inputs_tuple", _two(_x, _y)),
    Case("inputs_tuple_with_none_and_int", _two(_x, _y, lambda: None, lambda: 3)),
    Case("inputs_tuple_with_mask", _two(_x, _y, lambda: torch.rand(N, 6) > 0.3)),
    Case("inputs_shared_leaf_of_size_one", _two(_x, _y, lambda: torch.rand(1, 6))),
    Case("inputs_keywords", _keywords),
    Case("inputs_nested", _nested),
    Case("inputs_require_grad", _input_requires_grad),
    Case("children_called_with_keywords", lambda: Problem(_KeywordChild(), readout, torch.randn(N, T, D))),
    Case("outputs_tuple", _many(lambda a, b: (a, b))),
    Case("outputs_dict", _many(lambda a, b: {"logits": a, "hidden": [b, None]})),
    Case("outputs_named_tuple", _many(_Pair)),
    Case("outputs_dataclass", _many(_Output), samples_in_outputs=False),
    Case(
        "outputs_list_second_unused",
        lambda: Problem(_Many(lambda a, b: [a, b.detach()]), lambda o, y: readout(o[0]), _x()),
    ),
    Case(
        "outputs_flattened_tokens",
        lambda: Problem(
            _Flat(),
            lambda o, y: F.cross_entropy(o, y.reshape(-1), reduction="none").view(y.shape).sum(1),
            torch.randn(N, T, D),
            torch.randint(3, (N, T)),
        ),
        samples_in_outputs=False,
    ),
    Case(
        "outputs_scalar_per_sample",
        lambda: Problem(nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)), lambda o, y: o.sin(), _x()),
    ),
    Case("targets_dict", _dict_targets),
    Case("targets_tuple", _tuple_targets),
    Case("targets_none", lambda: Problem(nn.Linear(D, 3), lambda o, y: o.logsumexp(1), _x())),
    Case(
        "batch_dim_one",
        lambda: Problem(_SequenceFirst(), _sum_tokens_dim1, torch.randn(T, N, D), torch.randint(3, (T, N))),
        batch_dim=1,
    ),
    Case(
        "batch_dim_one_t_equals_n",
        lambda: Problem(_SequenceFirst(), _sum_tokens_dim1, torch.randn(3, 3, D), torch.randint(3, (3, 3))),
        batch_dim=1,
    ),
]
