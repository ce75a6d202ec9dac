"""Recurrences: ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``, padded and packed, and their cells.

Several layers in one call are opened into one call per layer (with dropout in between, so its mask is that of the forward
at hand).  What is left is one layer of one or two directions, in ``R`` *rows*: the states of all sequences at step 0, then those at step 1, ...
``B`` of them at every step, or as many as are still running if packed.  A cell is a layer of one step.

A layer's output *is* its sequence of states, so nothing is run again: all gates come from two products over all rows, and all derivatives of one step
with respect to its gates are elementwise over all rows.  Given these, backpropagation through time is a linear recurrence:
each step is one product with the recurrent weight and three to five elementwise operations.  It leaves the gradient at every pre-activation, the left factors;
the layer's inputs and previous states are the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BatchCoupledError
from ..factors import Dense
from ..layout import samples_first
from . import KEEPS, OPEN, Yields, rule
from .affine import product
from .derived import apart

if TYPE_CHECKING:
    from ..capture import Call

LAYERS: dict[Callable[..., Any], str] = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu"}
CELLS: dict[Callable[..., Any], str] = {
    torch.lstm_cell: "lstm", torch.gru_cell: "gru", torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu",
}  # fmt: skip
KEEPS.update({*LAYERS, *CELLS})


# ---- several layers are several calls -----------------------------------------------------------------------------


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` layer by layer, time first; ``NotImplemented`` if it is called like that already."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9:
            return NotImplemented
        packed = isinstance(args[3], (tuple, list))
        if packed:
            x, sizes, hx, weights, biases, layers, dropout, train, both = args
            batch_first = False
        else:
            x, hx, weights, biases, layers, dropout, train, both, batch_first = args
        if layers == 1 and not batch_first:
            return NotImplemented
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        x = x.transpose(0, 1) if batch_first else x
        directions, each = 2 if both else 1, len(weights) // layers
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            own = [s.narrow(0, layer * directions, directions) for s in states] if layers > 1 else list(states)
            h = own[0] if function is not torch.lstm else own
            w = list(weights[layer * each : (layer + 1) * each])
            if packed:
                x, *last = function(x, sizes, h, w, biases, 1, 0.0, train, both)
            else:
                x, *last = function(x, h, w, biases, 1, 0.0, train, both, False)
            finals.append(tuple(last))
            if dropout and train and layer < layers - 1:
                x = F.dropout(x, dropout)
        last = [torch.cat(parts) if layers > 1 else parts[0] for parts in zip(*finals, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *last)

    return run


OPEN.update({function: opened(function) for function in LAYERS})


# ---- one direction of one layer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Which sequences run at which step: ``sizes[t]`` of them, the first ones; step by step backwards if ``reverse``."""

    sizes: Sequence[int]
    reverse: bool = False

    def order(self) -> range:
        return range(len(self.sizes) - 1, -1, -1) if self.reverse else range(len(self.sizes))

    def before(self, rows: Tensor, initial: Tensor) -> Tensor:
        """What each row's sequence had one step before: ``[R, *]`` from rows ``[R, *]`` and initial states ``[B, *]``."""
        if len(self.sizes) == 1:
            return initial
        if self.sizes[0] == self.sizes[-1]:
            b = self.sizes[0]
            return torch.cat([rows[b:], initial] if self.reverse else [initial, rows[:-b]])
        pieces, steps = [], rows.split(list(self.sizes))
        for t, size in enumerate(self.sizes):
            if self.reverse:
                later = self.sizes[t + 1] if t + 1 < len(self.sizes) else 0
                pieces += [steps[t + 1], initial[later:size]] if later else [initial[:size]]
            else:
                pieces.append(steps[t - 1][:size] if t else initial)
        return torch.cat(pieces)


class Weights(NamedTuple):
    """Of one direction."""

    ih: Tensor  # [G H, I]
    hh: Tensor  # [G H, H]
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None = None  # [P, H]: what makes states of lstm's cells, by default the identity


class Solved(NamedTuple):
    """Gradients at all pre-activations, and at the initial state."""

    ih: Tensor  # [R, G H]
    hh: Tensor  # [R, G H]; differs from ih for gru only
    initial: list[Tensor]  # [B, H] for each state
    hr: tuple[Tensor, Tensor] | None = None  # of a projection: gradient at its output, its input


def _gates(x: Tensor, w: Tensor, b: Tensor | None, count: int) -> Tensor:
    """``[R, G, H]``."""
    return F.linear(x, w, b).unflatten(1, (count, -1))


def _simple(
    steps: Steps, x: Tensor, before: Tensor, h: Tensor, w: Weights, g: Tensor, final: list[Tensor], initial: list[Tensor], relu: bool
) -> Solved:
    """``h = act(a)``: the derivative of either activation is known from its value."""
    slope = (h > 0).to(h.dtype) if relu else 1 - h * h
    gate = torch.empty_like(h)
    state = final[0]
    for t, (g_t, k, out) in _backwards(steps, g, slope, gate):
        s = state[: steps.sizes[t]]
        torch.mul(s.add_(g_t), k, out=out)
        torch.mm(out, w.hh, out=s)
    return Solved(gate, gate, [state])


def _gru(
    steps: Steps, x: Tensor, before: Tensor, h: Tensor, w: Weights, g: Tensor, final: list[Tensor], initial: list[Tensor]
) -> Solved:
    """``h = (1 - z) n + z before`` with ``r, z = sigmoid(a_ih + a_hh)``, ``n = tanh(a_ih + r a_hh)``."""
    a, b = _gates(x, w.ih, w.b_ih, 3), _gates(before, w.hh, w.b_hh, 3)
    r, z = (a[:, :2] + b[:, :2]).sigmoid_().unbind(1)
    n = torch.addcmul(a[:, 2], r, b[:, 2]).tanh_()
    new = _tanh_backward(1 - z, n)  # of h with respect to what n is the tanh of
    k = torch.stack([_sigmoid_backward(new * b[:, 2], r), _sigmoid_backward(before - n, z), new * r], 1)
    hidden, gate = torch.empty_like(h), torch.empty_like(k)
    state = final[0]
    for t, (g_t, k_t, z_t, dh, out) in _backwards(steps, g, k, z, hidden, gate):
        s = state[: steps.sizes[t]]
        torch.add(s, g_t, out=dh)
        torch.mul(dh.unsqueeze(1), k_t, out=out)
        torch.mul(dh, z_t, out=s)
        s.addmm_(out.flatten(1), w.hh)
    ih = torch.cat([gate[:, :2], (hidden * new).unsqueeze(1)], 1)
    return Solved(ih.flatten(1), gate.flatten(1), [state])


def _lstm(
    steps: Steps, x: Tensor, before: Tensor, h: Tensor, w: Weights, g: Tensor, final: list[Tensor], initial: list[Tensor]
) -> Solved:
    """``c = f c_before + i n``, ``h = o tanh(c)``, possibly projected, with ``i, f, o`` sigmoids and ``n`` a tanh."""
    a = _gates(x, w.ih, w.b_ih, 4)
    a += _gates(before, w.hh, w.b_hh, 4)
    a[:, :2].sigmoid_(), a[:, 2].tanh_(), a[:, 3].sigmoid_()
    i, f, n, o = a.unbind(1)
    c = i * n
    state = initial[1].clone()
    for t, (f_t, c_t) in _forwards(steps, f, c):
        s = state[: steps.sizes[t]]
        s.copy_(c_t.addcmul_(f_t, s))
    c_before = steps.before(c, initial[1])
    c = c.tanh_()
    k = torch.empty_like(a)
    for out, value in zip(k.unbind(1), (_sigmoid_backward(n, i), _sigmoid_backward(c_before, f), _tanh_backward(i, n), _sigmoid_backward(c, o)), strict=True):
        out.copy_(value)
    through = _tanh_backward(o, c)  # of h with respect to c
    gate = torch.empty_like(a)
    hidden = torch.empty_like(g) if w.hr is not None else None
    state, cell = final
    parts = [g, k, through, f, gate] + ([hidden] if hidden is not None else [])
    for t, (g_t, k_t, through_t, f_t, out, *proj) in _backwards(steps, *parts):
        s, sc = state[: steps.sizes[t]], cell[: steps.sizes[t]]
        dh = s.add_(g_t)
        if w.hr is not None:
            proj[0].copy_(dh)
            dh = dh @ w.hr
        sc.addcmul_(dh, through_t)
        torch.mul(sc.unsqueeze(1), k_t[:, :3], out=out[:, :3])
        torch.mul(dh, k_t[:, 3], out=out[:, 3])
        sc.mul_(f_t)
        torch.mm(out.flatten(1), w.hh, out=s)
    gates = gate.flatten(1)
    return Solved(gates, gates, [state, cell], None if hidden is None else (hidden, o * c))


def _forwards(steps: Steps, *rows: Tensor) -> Any:
    """The rows of each step, in the order in which the recurrence ran."""
    pieces = list(zip(*(r.split(list(steps.sizes)) for r in rows), strict=True))
    return ((t, pieces[t]) for t in steps.order())


def _backwards(steps: Steps, *rows: Tensor) -> Any:
    return _forwards(Steps(steps.sizes, not steps.reverse), *rows)


def _sigmoid_backward(g: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(g, y)


def _tanh_backward(g: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(g, y)


# ---- rules --------------------------------------------------------------------------------------------------------


SOLVERS: dict[str, Callable[..., Solved]] = {
    "lstm": _lstm,
    "gru": _gru,
    "tanh": lambda *args: _simple(*args, relu=False),
    "relu": lambda *args: _simple(*args, relu=True),
}


@rule(*LAYERS)
def layer(call: Call, g: Any, input: Tensor, *args: Any) -> Yields:
    packed = isinstance(args[2], (tuple, list))
    sizes, (hx, weights, biases, layers, _, _, both) = (args[0].tolist(), args[1:8]) if packed else ([], args[:7])
    if layers != 1 or (not packed and args[7]):
        return  # not opened: somebody else's call
    if not packed:
        if call.layout.axis != 1 and call.n > 1:
            raise BatchCoupledError(
                f"{call.name}: the samples lie on the time axis, so the recurrence runs from sample to sample. Give the layer "
                "batches of sequences (batch_first=True if the batch comes first), or say where the samples are with batch_dim=."
            )
        sizes = [input.shape[1]] * input.shape[0]
    yield from _rows(call, LAYERS[call.func], g, input, hx, list(weights), biases, both, sizes)


@rule(*CELLS)
def cell(call: Call, g: Any, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Yields:
    if input.ndim == 2 and (b_ih is None) == (b_hh is None):
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
        g = [g] if isinstance(g, Tensor) else g
        yield from _rows(call, CELLS[call.func], [g[0], None, *g[1:]], input, hx, weights, b_ih is not None, False, [len(input)])


def _rows(
    call: Call, kind: str, grads: Sequence[Tensor | None], input: Tensor, hx: Any, weights: list[Tensor], biases: bool, both: bool, sizes: list[int]
) -> Yields:
    """All shared arguments of a layer; ``grads`` of the output, of the last state, and of lstm's last cell."""
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    directions = 2 if both else 1
    each = len(weights) // directions
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    at, b = call.layout, sizes[0]

    def flat(x: Tensor, width: int) -> Tensor:
        return call.read(x).to(wide).reshape(-1, width)  # [R, width]

    def slots(x: Tensor | None, d: int, like: Tensor) -> Tensor:
        """``[B, H]``: direction ``d`` of an initial state, or of the gradient of a last one."""
        x = torch.zeros_like(like) if x is None else x
        return (x if x.ndim == 2 else x[d]).to(wide, copy=True)

    @cache
    def solved(d: int) -> tuple[Weights, Tensor, Tensor, Solved]:
        given = [w.to(wide) for w in weights[d * each : (d + 1) * each]]
        w = Weights(*given) if biases else Weights(given[0], given[1], None, None, *given[2:])
        out = call.outcome()[0].chunk(directions, -1)[d]
        h = flat_of(out)
        g = torch.zeros_like(h) if grads[0] is None else flat_of(grads[0].chunk(directions, -1)[d])
        steps = Steps(sizes, d == 1)
        initial = [slots(call.read(s), d, s) for s in states]
        final = [slots(x, d, s) for x, s in zip(grads[1:], states, strict=True)]
        x = flat(input, input.shape[-1])
        before = steps.before(h, initial[0])
        return w, x, before, SOLVERS[kind](steps, x, before, h, w, g, final, initial)

    def flat_of(x: Tensor) -> Tensor:
        return x.to(wide).reshape(-1, x.shape[-1])

    def tokens(rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``[N, T, *]``, from rows in the order of the output."""
        rows = rows.to(dtype)
        if at.n == 1:
            return rows.unsqueeze(0)
        rows = rows if call.func in CELLS or at.axis == 0 else rows.unflatten(0, (len(sizes), b))
        return samples_first(rows, at).flatten(1, -2)

    for i, p in enumerate(weights):
        d, which = divmod(i, each)
        yield p, lambda p=p, d=d, which=which: _weight(solved(d), which if biases or which < 2 else 4, p, tokens)
    if not call.sampled(input):
        yield input, lambda: apart(sum(s.ih @ w.ih for w, _, _, s in map(solved, range(directions))).view(input.shape).to(input.dtype), at)
    for i, p in enumerate(states):
        if not call.sampled(p):
            yield p, lambda i=i, p=p: apart(
                torch.stack([solved(d)[3].initial[i] for d in range(directions)]).view(p.shape).to(p.dtype), call.outputs[-1][1] or at
            )


def _weight(solved: tuple[Weights, Tensor, Tensor, Solved], which: int, p: Tensor, tokens: Callable[[Tensor, torch.dtype], Tensor]) -> Any:
    """The factors of ``w_ih, w_hh, b_ih, b_hh, w_hr``."""
    _, x, before, s = solved
    if which == 4:
        assert s.hr is not None
        left, right = s.hr
    else:
        left, right = (s.hh if which % 2 else s.ih), (before if which else x)
    if which in (2, 3):
        return Dense(tokens(left, p.dtype).sum(1))
    return product(tokens(left, p.dtype), tokens(right, p.dtype), p.shape)
