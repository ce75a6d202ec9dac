"""Uses of a parameter that are easy to miss: the same tensor in several places of one call, changes through views,
functions that nobody sees, derived tensors of unusual shapes.

Verification is off, so that the engine alone is on trial; the truth is plain autograd on one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

N, D = 4, 6
Body = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, body: Body, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = outputs.flatten(1)
    weight = torch.linspace(0.5, 1.5, outputs.shape[1], dtype=torch.float64)
    return ((outputs - targets).square() * weight).sum(1)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return losses(outputs, targets).mean()


def alone(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = []
    for n in range(len(x)):
        loss = losses(model(x[n : n + 1]), y[n : n + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    return {
        name: torch.stack(g) for (name, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, dtype=torch.float64), torch.randn(N, 1, dtype=torch.float64)


def exact(model: nn.Module, criterion: Any = losses) -> None:
    x, y = data()
    want = alone(model, x, y)
    G = persample.gradients(model, criterion, x, y, verify=False)
    for name, rows in want.items():
        torch.testing.assert_close(G[name], rows, rtol=1e-9, atol=1e-9)


def sequence(x: Tensor) -> Tensor:
    """``[N, D, 3]``."""
    return x.unsqueeze(2) * torch.arange(1.0, 4.0, dtype=x.dtype)


# ---- one tensor in several places of one call ---------------------------------------------------------------------


def between_two_separators(m: Any, x: Tensor) -> Tensor:
    separator = m.w.expand(len(x), -1, -1)
    return torch.cat([separator, sequence(x), separator], 1)


def both_directions_alike(m: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(2, len(x), 4)
    weights = [m.ih, m.hh, m.b, m.b] * 2
    return torch.lstm(sequence(x), (state, state), weights, True, 1, 0.0, False, True, True)[0]


def states_alike(m: Any, x: Tensor) -> Tensor:
    state = m.h.expand(1, len(x), 4).contiguous()
    return torch.lstm(sequence(x), (state, state), [m.ih, m.hh, m.b, m.c], True, 1, 0.0, False, False, True)[0]


LSTM = {"ih": (16, 3), "hh": (16, 4), "b": (16,)}
TWICE: list[tuple[Body, dict[str, tuple[int, ...]]]] = [
    (between_two_separators, {"w": (1, 1, 3)}),
    (lambda m, x: F.layer_norm(x, (D,), m.w, m.w), {"w": (D,)}),
    (lambda m, x: F.group_norm(x, 2, m.w, m.w), {"w": (D,)}),
    (lambda m, x: torch.where(x > 0, m.w, m.w), {"w": (D,)}),
    (lambda m, x: torch.addmm(m.w, x[:, :1], m.w), {"w": (1, D)}),
    (lambda m, x: torch.einsum("ij,nj,kj->nik", m.w, x, m.w), {"w": (3, D)}),
    (lambda m, x: torch.einsum("ij,nj,kl->ni", m.w, x, m.w), {"w": (3, D)}),  # one place by the rule, one not
    (both_directions_alike, LSTM),
    (states_alike, {**LSTM, "c": (16,), "h": (1, 1, 4)}),
    (lambda m, x: torch.addcmul(x, m.w, m.w), {"w": (D,)}),
]


@pytest.mark.parametrize(("body", "shapes"), TWICE)
def test_one_tensor_in_several_places_of_a_call(body: Body, shapes: dict[str, tuple[int, ...]]) -> None:
    exact(Model(body, **shapes))


# ---- derived tensors ----------------------------------------------------------------------------------------------


def blocks(m: Any, x: Tensor) -> Tensor:
    w = m.w.transpose(1, 2).reshape(2, 4, D)
    return x[:, None, None, :4].expand(-1, 2, 1, -1) @ w


def counted(m: Any, x: Tensor) -> Tensor:
    places = torch.tensor([0, 0, 1, 2, 0, 0])
    return sequence(x) + F.embedding(places, m.w, scale_grad_by_freq=True)


DERIVED: list[tuple[Body, dict[str, tuple[int, ...]]]] = [
    (lambda m, x: F.linear(x[:, :3], m.w.t().reshape(8, 3)), {"w": (D, 4)}),
    (lambda m, x: F.linear(x, m.w.transpose(1, 2).reshape(4, D)), {"w": (1, 3, 8)}),
    (blocks, {"w": (2, 3, 8)}),
    (lambda m, x: F.linear(x, m.w.t().contiguous().view(4, D)), {"w": (2, 12)}),
    (lambda m, x: F.linear(x, m.w.permute(3, 1, 0, 2).reshape(4, D)), {"w": (2, 3, 2, 2)}),
    (counted, {"w": (5, 3)}),
]


@pytest.mark.parametrize(("body", "shapes"), DERIVED)
def test_derived_tensors_of_unusual_shapes(body: Body, shapes: dict[str, tuple[int, ...]]) -> None:
    exact(Model(body, **shapes))


# ---- changes through views ----------------------------------------------------------------------------------------


def a_row_is_scaled(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w[0].mul_(2)
    return F.linear(x, w)


def a_view_from_before(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    row = w[0]
    w.mul_(2)
    return F.linear(x, w) + (x * row).sum(1, keepdim=True)


def another_parameter_is_written(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    view = w[:2]
    w[0] = m.b * 3
    return F.linear(x, view)


def another_parameter_scales_a_view(m: Any, x: Tensor) -> Tensor:
    w = m.w * 1
    w.view(-1)[:D].mul_(m.b)
    return F.linear(x, w)


def a_constant_is_written_to(m: Any, x: Tensor) -> Tensor:
    w = x.new_zeros(3, D)
    w[0].copy_(m.b)
    return F.linear(x, w)


@pytest.mark.parametrize(
    "body",
    [
        a_row_is_scaled,
        a_view_from_before,
        another_parameter_is_written,
        another_parameter_scales_a_view,
        a_constant_is_written_to,
    ],
)
def test_shared_tensors_changed_through_views(body: Body) -> None:
    exact(Model(body, w=(3, D), b=(D,)))


@pytest.mark.parametrize("write", [Tensor.copy_, Tensor.add_, Tensor.mul_])
def test_samples_written_into_a_part_of_a_derived_tensor_are_an_error(write: Callable[..., Tensor]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        tokens = m.w.expand(len(x), 3, D).clone()
        write(tokens[:, 0], x)
        return tokens

    with pytest.raises(persample.CaptureError, match=r"'w'.*in-place write into a slice"):
        persample.gradients(Model(body, w=(1, 3, D)), losses, *data(), verify=False)


# ---- functions that nobody sees -----------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """As an extension in another language would do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().sin().numpy().copy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Sign(torch.autograd.Function):
    """Straight-through; in torch, but the parameter is hidden behind a result without gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


UNSEEN: list[Body] = [
    lambda m, x: F.linear(Sine.apply(F.linear(x, m.w)), m.v),
    lambda m, x: Sine.apply(F.linear(x, m.w)),
    lambda m, x: F.linear(Sine.apply(F.linear(x, m.w)), m.v) + x,
    lambda m, x: Sine.apply(F.linear(x, m.w)) + m.b,
    lambda m, x: F.linear(Sine.apply(F.linear(x, m.w)) + m.b, m.v) * m.b,
    lambda m, x: F.linear(x, Sine.apply(m.w) + m.w),
    lambda m, x: F.linear(x, Sign.apply(m.w)),
    lambda m, x: F.linear(x, Sign.apply(m.w) + m.w),
    lambda m, x: F.linear(x, Sign.apply(m.w * m.w) * m.v),
    lambda m, x: x @ Sign.apply(m.w).t(),
]


@pytest.mark.parametrize("criterion", [losses, mean_loss])
@pytest.mark.parametrize("body", UNSEEN)
def test_functions_that_nobody_sees(body: Body, criterion: Any) -> None:
    exact(Model(body, w=(D, D), v=(D, D), b=(D,)), criterion)


def test_hooks_of_the_user_on_an_output() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.linear(F.linear(x, m.w).sin(), m.v)
        h.register_hook(lambda g: 0.1 * g)
        return h.sin()

    exact(Model(body, w=(D, D), v=(D, D)))


# ---- what is needed again has been changed ------------------------------------------------------------------------


def mask_is_changed(m: Any, x: Tensor) -> Tensor:
    mask = x > 0
    out = torch.where(mask, m.b, x)
    mask.logical_not_()
    return out


def index_is_changed(m: Any, x: Tensor) -> Tensor:
    index = (x > 0).long()
    out = m.b[index]
    index.zero_()
    return out


def parameter_is_changed(function: Body) -> Body:
    def body(m: Any, x: Tensor) -> Tensor:
        out = function(m, x)
        with torch.no_grad():
            m.b.add_(1)
        return out

    return body


def factor_is_changed(m: Any, x: Tensor) -> Tensor:
    out = F.linear(x, m.w * m.scale)
    m.scale.mul_(0.5)
    return out


CHANGED: list[Body] = [
    mask_is_changed,
    index_is_changed,
    factor_is_changed,
    parameter_is_changed(lambda m, x: x / m.b),
    parameter_is_changed(lambda m, x: x.abs() ** m.b),
    parameter_is_changed(lambda m, x: torch.addcmul(x, m.b, m.b)),
]


@pytest.mark.parametrize("body", CHANGED)
def test_what_is_needed_again_has_been_changed(body: Body) -> None:
    with pytest.raises(persample.InplaceError, match="changed in place"):
        persample.gradients(Model(body, w=(3, D), b=(D,)), losses, *data(), verify=False)


# ---- constants of a size that happens to be N ---------------------------------------------------------------------


def positions(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(x.shape[1], D)
    table[:, ::2] = torch.arange(x.shape[1], dtype=x.dtype).sin().unsqueeze(1)
    return x + F.linear(table, m.w, m.b)


def counted_positions(m: Any, x: Tensor) -> Tensor:
    return x + F.embedding(x.new_ones(x.shape[1]).cumsum(0).long() - 1, m.v)


def like_one_sample(m: Any, x: Tensor) -> Tensor:
    return x + F.linear(torch.zeros_like(x[0]) + 1, m.w, m.b)


def masked(m: Any, x: Tensor) -> Tensor:
    t = x.shape[1]
    return (x.mT @ (x.new_ones(t, t).tril() * m.v[:t, :t])).mT


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), D)
    for step in x.unbind(1):
        h = torch.tanh(h @ m.w + F.linear(h, m.v, m.b) + step)
    return h


@pytest.mark.parametrize("t", [N, N + 1])
@pytest.mark.parametrize("body", [positions, counted_positions, like_one_sample, masked, recurrent])
def test_constants_of_a_size_that_happens_to_be_n(body: Body, t: int) -> None:
    model, x = Model(body, w=(D, D), v=(D, D), b=(D,)), torch.randn(N, t, D, dtype=torch.float64)
    want = alone(model, x, torch.zeros(N, 1, dtype=torch.float64))
    G = persample.gradients(model, losses, x, torch.zeros(N, 1, dtype=torch.float64), verify=False)
    for name, rows in want.items():
        torch.testing.assert_close(G[name], rows, rtol=1e-9, atol=1e-9)


# ---- shared tensors with a row for each sample ----------------------------------------------------------------------


def hidden(x: Tensor) -> Tensor:
    """Features that nobody sees made of the samples."""
    return torch.from_numpy(np.sin(x.detach().numpy()))


GATHERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "along steps": lambda h, i: torch.gather(h, 1, i),
    "from behind": lambda h, i: h.gather(-2, i),
    "by name": lambda h, i: torch.gather(input=h, dim=-2, index=i),
    "some features": lambda h, i: h.gather(1, i[..., :2]),
    "time first": lambda h, i: h.transpose(0, 1).gather(0, i.transpose(0, 1)).transpose(0, 1),
    "of more rows": lambda h, i: torch.cat([h, h.sin()]).gather(1, i),
}


@pytest.mark.parametrize("name", GATHERED)
def test_each_sample_gathers_from_its_own_row(name: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        index = x.sum(2).argsort(1)[:, :2, None].expand(-1, -1, D)
        return GATHERED[name](F.linear(hidden(x), m.w), index)

    model, x = Model(body, w=(D, D)), torch.randn(N, 5, D, dtype=torch.float64)
    y = torch.zeros(N, 1, dtype=torch.float64)
    rows = persample.gradients(model, losses, x, y, verify=False)["w"]
    torch.testing.assert_close(rows, alone(model, x, y)["w"], rtol=1e-9, atol=1e-9)


def test_a_gather_along_the_samples_takes_any_row() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.w.gather(0, x.argsort(1)) * x

    exact(Model(body, w=(D, D)))
