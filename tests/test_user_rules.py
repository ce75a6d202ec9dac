"""Rules of the user's own: a new function in at most ten lines, checked by `persample.check`, and gone when removed."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import persample
from persample.factors import Outer
from persample.rules import RULES

N, D = 6, 4


class Signs(torch.autograd.Function):
    """``x @ sign(w)``, with the gradient passed straight through the sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.sign().T, x.flatten(0, -2).T @ g.flatten(0, -2)


@wrap_torch_function(lambda x, w: (x, w))
def signs(x: Tensor, w: Tensor) -> Any:
    return Signs.apply(x, w)


def rule_of_signs(call: Any, g: Tensor, x: Tensor, w: Tensor) -> Iterator[Any]:
    yield w, lambda: Outer(call.tokens(x).unsqueeze(1), call.tokens(g).unsqueeze(1), w.shape)


def rule_of_distances(call: Any, g: Tensor, x1: Tensor, x2: Tensor, p: float = 2.0, **_: Any) -> Iterator[Any]:
    if p == 2.0:
        away = x2 - call.tokens(x1)[:, 0].unsqueeze(1)  # [N, K, D]
        yield x2, lambda: call.tokens(g)[:, 0].unsqueeze(2) * away / away.norm(dim=2, keepdim=True)


class Uses(nn.Module):
    def __init__(self, function: Any, *shape: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.w = nn.Linear(D, 5).double(), nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.function, self.options = function, options

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.first(x).tanh(), self.w, **self.options)
        return out


def losses(out: Tensor, _: Any = None) -> Tensor:
    return (out.sin() + out.square()).flatten(1).sum(1)


def served(model: nn.Module, x: Tensor) -> str:
    report = persample.check(model, losses, x)
    report.raise_if_bad()
    return {row.name: row.served for row in report.rows}["w"]


@pytest.mark.parametrize(
    ("function", "rule", "shape", "inputs"),
    [
        (signs, rule_of_signs, (5, 3), (N, D)),
        (signs, rule_of_signs, (5, 3), (N, 2, D)),
        (torch.cdist, rule_of_distances, (3, 5), (N, D)),
    ],
    ids=["own function", "own function, tokens", "cdist"],
)
def test_a_rule_serves_a_new_function(function: Any, rule: Any, shape: Any, inputs: Any) -> None:
    assert len(inspect.getsource(rule).splitlines()) + 1 <= 10  # with its decorator
    model, x = Uses(function, *shape), torch.randn(inputs, dtype=torch.float64)
    without = persample.gradients(model, losses, x, verify=False)
    assert "fallback" in served(model, x) and function not in RULES
    registered = persample.rule(function)(rule)
    try:
        assert "rule" in served(model, x)
        torch.testing.assert_close(
            persample.gradients(model, losses, x, verify=False)["w"], without["w"], rtol=0, atol=1e-12
        )
    finally:
        registered.remove()
    assert "fallback" in served(model, x) and function not in RULES


def test_what_a_rule_leaves_open_goes_through_the_fallback() -> None:
    registered = persample.rule(torch.cdist)(rule_of_distances)
    try:
        assert "fallback" in served(Uses(torch.cdist, 3, 5, p=1.0), torch.randn(N, D, dtype=torch.float64))
    finally:
        registered.remove()


def test_a_wrong_rule_does_not_pass() -> None:
    @persample.rule(signs)
    def wrong(call: Any, g: Tensor, x: Tensor, w: Tensor) -> Iterator[Any]:
        yield w, lambda: Outer(call.tokens(x).unsqueeze(1), 2 * call.tokens(g).unsqueeze(1), w.shape)

    model, x = Uses(signs, 5, 3), torch.randn(N, D, dtype=torch.float64)
    try:
        with pytest.raises(persample.VerificationError, match="'w'"):
            served(model, x)
        with pytest.raises(persample.VerificationError, match="'w'"):
            persample.gradients(model, losses, x)
    finally:
        wrong.remove()  # type: ignore[attr-defined]
    assert persample.check(model, losses, x).ok


def test_names_are_needed() -> None:
    with pytest.raises(TypeError, match="name the function"):
        persample.rule()
    with pytest.raises(TypeError, match="name the function"):
        persample.rule("signs")  # type: ignore[arg-type]


def test_what_can_not_be_removed_is_not_registered() -> None:
    """Methods and built-in functions take no attribute: the error came when they were in the table."""
    before = RULES[nn.functional.linear]
    other = types.SimpleNamespace()
    for entry in (3, other, nn.Linear(2, 2).forward, torch.addmm):
        with pytest.raises(TypeError, match="must be a function"):
            persample.rule(nn.functional.linear)(entry)  # type: ignore[type-var]
    assert RULES[nn.functional.linear] is before and not vars(other)
