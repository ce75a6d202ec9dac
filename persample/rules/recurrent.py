"""Recurrences: ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``, padded and packed, and their cells.

Several layers in one call are opened into one call per layer, with dropout in between: its mask is that of the forward
at hand.  The gradients at the pre-activations of a layer (`persample.recurrence`) are the left factors of its weights;
its inputs and previous states are the right ones.

Where nobody else differentiates the graph, a layer is put into it as one node with a backward of its own (`replayed`),
so that backpropagation through time runs once, not once for the factors and once for what comes before the layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import Call
from ..errors import BatchCoupledError
from ..factors import Dense, Outer
from ..layout import samples_first
from ..recurrence import Given, Solved, Steps, Weights, gru, lstm, simple
from . import KEEPS, OPEN, REPLAYED, RULES, TOGETHER, Yields, rule
from .affine import product
from .apart import apart

Solver = Callable[[Weights, Given], Solved]
Function = Callable[..., Any]

LAYERS: dict[Function, Solver] = {
    torch.lstm: lstm,
    torch.gru: gru,
    torch.rnn_tanh: partial(simple, relu=False),
    torch.rnn_relu: partial(simple, relu=True),
}
CELLS: dict[Function, Solver] = {
    torch.lstm_cell: lstm,
    torch.gru_cell: gru,
    torch.rnn_tanh_cell: partial(simple, relu=False),
    torch.rnn_relu_cell: partial(simple, relu=True),
}
KEEPS.update({*LAYERS, *CELLS})
TOGETHER.update({*LAYERS, *CELLS})


# ---- several layers are several calls -----------------------------------------------------------------------------


def opened(function: Function) -> Function:
    """``function`` layer by layer, time first; ``NotImplemented`` if it is called like that already."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9:
            return NotImplemented
        packed = isinstance(args[3], (tuple, list))
        x, *args_ = args
        batch_first = False if packed else args_.pop()
        sizes = [args_.pop(0)] if packed else []
        hx, weights, biases, layers, dropout, train, both = args_
        if layers == 1 and not batch_first:
            return NotImplemented
        x = x.transpose(0, 1) if batch_first else x
        directions, each = 2 if both else 1, len(weights) // layers
        lasts = []
        for layer in range(layers):
            own = [s.narrow(0, layer * directions, directions) if layers > 1 else s for s in _states(hx)]
            w = list(weights[layer * each : (layer + 1) * each])
            rest = [own if function is torch.lstm else own[0], w, biases, 1, 0.0, train, both]
            x, *last = function(x, *sizes, *rest, *([] if packed else [False]))
            lasts.append(last)
            if dropout and train and layer < layers - 1:
                x = F.dropout(x, dropout)
        last = [torch.cat(parts) if layers > 1 else parts[0] for parts in zip(*lasts, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *last)

    return run


OPEN.update({function: opened(function) for function in LAYERS})


def _states(hx: Any) -> list[Tensor]:
    return list(hx) if isinstance(hx, (tuple, list)) else [hx]


# ---- one layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The arguments of a layer, or of a cell, in one form."""

    solver: Solver
    input: Tensor  # [T, B, I], packed [R, I], of a cell [B, I]
    states: list[Tensor]  # [directions, B, H], of a cell [B, H]
    weights: list[Tensor]
    biases: bool
    directions: int
    sizes: list[int]

    def of(self, direction: int, wide: torch.dtype) -> Weights:
        each = len(self.weights) // self.directions
        w = [w.to(wide) for w in self.weights[direction * each : (direction + 1) * each]]
        return Weights(*w) if self.biases else Weights(w[0], w[1], None, None, *w[2:])

    @property
    def wide(self) -> torch.dtype:
        """What it is computed in: half precision would lose too much on the way back."""
        return torch.promote_types(self.weights[0].dtype, torch.float32)


@rule(*LAYERS)
def layer(call: Call, g: Any, input: Tensor, *args: Any) -> Yields:
    packed = isinstance(args[2], (tuple, list))
    sizes = args[0].tolist() if packed else [input.shape[1]] * input.shape[0]
    hx, weights, biases, layers, _, _, both = args[1:8] if packed else args[:7]
    if layers != 1 or (not packed and args[7]):
        return  # not opened: somebody else's call
    if not packed and call.layout.axis != 1 and call.n > 1:
        raise BatchCoupledError(
            f"{call.name}: the samples lie on the time axis, so the recurrence runs from sample to sample. Give the "
            "layer batches of sequences (batch_first=True if the batch comes first), or say where the samples are with "
            "batch_dim=."
        )
    weights = [call.read(w) for w in weights]
    one = _Layer(LAYERS[call.func], input, _states(hx), weights, biases, 2 if both else 1, sizes)
    yield from _rows(call, one, g)


@rule(*CELLS)
def cell(
    call: Call,
    g: Any,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Yields:
    if input.ndim == 2 and (b_ih is None) == (b_hh is None):
        weights = [call.read(w) for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
        one = _Layer(CELLS[call.func], input, _states(hx), weights, b_ih is not None, 1, [len(input)])
        g = [g] if isinstance(g, Tensor) else g
        yield from _rows(call, one, [g[0], None, *g[1:]])


def _rows(call: Call, one: _Layer, grads: Sequence[Tensor | None]) -> Yields:
    """All shared arguments; ``grads`` of the output, of the last state, and of lstm's last cell."""
    at = call.layout

    @cache
    def solved(direction: int) -> Solved:
        return _solved(call, one, grads, direction)

    def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[N, T, *]``, from rows in the order of the output."""
        x = x.to(dtype)
        if at.n == 1:
            return x.unsqueeze(0)
        return samples_first(x if at.axis == 0 else x.unflatten(0, (len(one.sizes), -1)), at).flatten(1, -2)

    @cache
    def left(direction: int, recurrent: bool, dtype: torch.dtype) -> Tensor:
        s = solved(direction)
        return rows(s.hh if recurrent else s.ih, dtype)

    @cache
    def summed(direction: int, recurrent: bool, dtype: torch.dtype) -> Tensor:
        return left(direction, recurrent, dtype).sum(1)

    def weight(p: Tensor, direction: int, which: int) -> Outer | Dense:
        """The factors of ``w_ih, w_hh, b_ih, b_hh, w_hr``."""
        s = solved(direction)
        if which == 4:
            assert s.hr is not None
            return product(rows(s.hr[0], p.dtype), rows(s.hr[1], p.dtype), p.shape)
        recurrent = which % 2 == 1 and s.hh is not s.ih  # all but gru add both up, and so have one gradient there
        if which > 1:
            return Dense(summed(direction, recurrent, p.dtype))
        x = s.before if which else call.read(one.input).reshape(len(s.before), -1)
        return product(left(direction, recurrent, p.dtype), rows(x, p.dtype), p.shape)

    def input_gradient() -> Tensor:
        parts = [solved(d).ih @ one.of(d, one.wide).ih for d in range(one.directions)]
        return torch.stack(parts).sum(0).view(one.input.shape).to(one.input.dtype)

    def state_gradient(i: int) -> Tensor:
        p = one.states[i]
        return torch.stack([solved(d).initial[i] for d in range(one.directions)]).view(p.shape).to(p.dtype)

    each = len(one.weights) // one.directions
    for i, p in enumerate(one.weights):
        direction, which = divmod(i, each)
        which = which if one.biases or which < 2 else 4
        yield p, partial(weight, p, direction, which)
    if not call.sampled(one.input):
        yield one.input, lambda: apart(input_gradient(), at)
    for i, p in enumerate(one.states):
        if not call.sampled(p):
            yield p, lambda i=i: apart(state_gradient(i), call.outputs[-1][1] or at)  # type: ignore[misc]
    if call.replay is not None:
        wanted = call.replay.wanted
        call.replay.passed = [
            (input_gradient() if i == 0 else state_gradient(i - 1)) if want else None for i, want in enumerate(wanted)
        ]


def _solved(call: Call, one: _Layer, grads: Sequence[Tensor | None], direction: int) -> Solved:
    def flat(x: Tensor) -> Tensor:
        return x.to(one.wide).reshape(-1, x.shape[-1])

    def slots(x: Tensor) -> Tensor:
        """``[B, H]``, a copy: initial states, or gradients of last ones."""
        return (x if x.ndim == 2 else x[direction]).to(one.wide, copy=True)

    h = flat(call.outcome()[0].chunk(one.directions, -1)[direction])
    g = torch.zeros_like(h) if grads[0] is None else flat(grads[0].chunk(one.directions, -1)[direction])
    initial = [slots(call.read(s)) for s in one.states]
    final = [torch.zeros_like(s) if x is None else slots(x) for x, s in zip(grads[1:], initial, strict=True)]
    given = Given(Steps(one.sizes, direction == 1), flat(call.read(one.input)), h, initial, g, final)
    return one.solver(one.of(direction, one.wide), given)


# ---- a layer as one node of the graph -----------------------------------------------------------------------------


@dataclass(eq=False)
class Replay:
    """What a layer's node in the graph has to hand on to the layer's inputs."""

    wanted: list[bool]  # of the input and the initial states: whether they have a gradient
    passed: list[Tensor | None] | None = None  # by the rule


class _Node(torch.autograd.Function):
    """Outputs that are already there, with the rule's gradients of the inputs."""

    @staticmethod
    def forward(ctx: Any, call: Call, outputs: list[Tensor], anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: Call = ctx.call
        assert call.replay is not None
        with torch._C.DisableTorchFunction():
            if call.replay.passed is None:  # nobody listened
                deque(RULES[call.func](call, grads if len(grads) > 1 else grads[0], *call.args), maxlen=0)
        passed, call.replay.passed = call.replay.passed, None
        assert passed is not None
        return None, None, None, *passed


def replayed(call: Call, input: Tensor, *args: Any) -> Any:
    """Run a layer or a cell outside of autograd, and put it back into the graph as one node."""
    packed = call.func in LAYERS and isinstance(args[2], (tuple, list))
    hx, *rest = args[1:] if packed else args
    weights = rest[0] if call.func in LAYERS else rest
    if any(w is not None and w.requires_grad and not call.wants(w) for w in weights):
        return NotImplemented  # they have a gradient of their own in this graph
    with torch.no_grad():
        out = call.func(input, *args)
    inputs = [x.detach() if call.wants(x) else x for x in (input, *_states(hx))]
    call.replay = Replay([x.requires_grad for x in inputs])
    anchor = torch.empty(
        0, device="cpu", requires_grad=True
    )  # there is a gradient, also where none of the inputs has one
    outputs = _Node.apply(call, [out] if isinstance(out, Tensor) else list(out), anchor, *inputs)  # type: ignore[no-untyped-call]
    return outputs[0] if isinstance(out, Tensor) else outputs


REPLAYED.update(dict.fromkeys((*LAYERS, *CELLS), replayed))
