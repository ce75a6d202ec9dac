"""Backpropagation through time, by hand: the gradient at every pre-activation of one direction of a recurrent layer.

A layer is ``R`` *rows*: the states of all sequences at step 0, then those at step 1, ...; ``B`` of them at every step,
or as many as are still running (packed sequences, the longest first).  A cell is a layer of one step.

The layer's outputs ``h [R, H]`` are given, so no recurrence runs again: all gates come from two products over all
rows, and the derivatives of a step with respect to its gates are elementwise over all rows.  Given these,
backpropagation is a *linear* recurrence: a step is one product with the recurrent weight and three to six elementwise
operations on ``[B, H]``.  This module knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_sigmoid_backward: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.sigmoid_backward
_tanh_backward: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.tanh_backward


class Weights(NamedTuple):
    """Of one direction, with ``G`` gates of width ``H``; ``P = H`` but for projected states."""

    ih: Tensor  # [G H, I]
    hh: Tensor  # [G H, P]
    b_ih: Tensor | None = None  # [G H]
    b_hh: Tensor | None = None  # [G H]
    hr: Tensor | None = None  # [P, H]


@dataclass(frozen=True)
class Steps:
    """``sizes[t]`` sequences run at step ``t``, the first ones of all; against time if ``reverse``."""

    sizes: Sequence[int]
    reverse: bool = False

    def before(self, rows: Tensor, initial: Tensor) -> Tensor:
        """What each row's sequence had one step before: ``[R, *]`` from rows ``[R, *]``, initial states ``[B, *]``."""
        sizes, b = self.sizes, self.sizes[0]
        if len(sizes) == 1:
            return initial
        if sizes[-1] == b:
            return torch.cat([rows[b:], initial] if self.reverse else [initial, rows[:-b]])
        steps = rows.split(list(sizes))
        if not self.reverse:
            return torch.cat([initial, *(step[:size] for step, size in zip(steps, sizes[1:], strict=False))])
        pieces = [
            piece for step, size in zip(steps[1:], sizes, strict=False) for piece in (step, initial[len(step) : size])
        ]
        return torch.cat([*pieces, initial[: sizes[-1]]])

    def forwards(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows of each step, in the order in which the recurrence ran."""
        steps = list(zip(*(torch.split(r, list(self.sizes)) for r in rows), strict=True))
        return iter(reversed(steps) if self.reverse else steps)

    def backwards(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return Steps(self.sizes, not self.reverse).forwards(*rows)


class Given(NamedTuple):
    """One direction of a layer as it ran, and the gradients at what it gave out."""

    steps: Steps
    x: Tensor  # [R, I]
    h: Tensor  # [R, P] its outputs
    initial: list[Tensor]  # [B, P], and for lstm the cells' [B, H]
    grad: Tensor  # [R, P] at the outputs
    final: list[Tensor]  # [B, P], [B, H] at the last states; overwritten


class Solved(NamedTuple):
    """Gradients at all pre-activations and at the initial states, and the states that met the recurrent weight."""

    ih: Tensor  # [R, G H]
    hh: Tensor  # [R, G H]; differs from ih for gru only
    before: Tensor  # [R, P]
    initial: list[Tensor]  # [B, P], [B, H]
    hr: tuple[Tensor, Tensor] | None = None  # of a projection: gradient at its output [R, P], its input [R, H]


def _gates(x: Tensor, w: Tensor, b: Tensor | None, count: int) -> Tensor:
    """``[R, G, H]``."""
    gates: Tensor = F.linear(x, w, b).unflatten(1, (count, -1))
    return gates


def simple(w: Weights, given: Given, relu: bool) -> Solved:
    """``h = act(a)``: the derivative of either activation is known from its value."""
    h = given.h
    slope = (h > 0).to(h.dtype) if relu else 1 - h * h
    gate = torch.empty_like(h)
    (state,) = given.final
    for g, k, out in given.steps.backwards(given.grad, slope, gate):
        s = state[: len(g)]
        torch.mul(s.add_(g), k, out=out)
        torch.mm(out, w.hh, out=s)
    return Solved(gate, gate, given.steps.before(h, given.initial[0]), [state])


def gru(w: Weights, given: Given) -> Solved:
    """``h = (1 - z) n + z before`` with ``r, z = sigmoid(a_ih + a_hh)`` and ``n = tanh(a_ih + r a_hh)``."""
    before = given.steps.before(given.h, given.initial[0])
    a, b = _gates(given.x, w.ih, w.b_ih, 3), _gates(before, w.hh, w.b_hh, 3)
    r, z = a[:, :2].add_(b[:, :2]).sigmoid_().unbind(1)
    n = torch.addcmul(a[:, 2], r, b[:, 2]).tanh_()
    new = _tanh_backward(1 - z, n)  # of h with respect to what n is the tanh of
    k = torch.stack([_sigmoid_backward(new * b[:, 2], r), _sigmoid_backward(before - n, z), new * r], 1)
    hidden, gate = torch.empty_like(given.h), b  # b isn't needed any more
    (state,) = given.final
    for g, k_t, z_t, dh, out in given.steps.backwards(given.grad, k, z, hidden, gate):
        s = state[: len(g)]
        torch.add(s, g, out=dh)
        torch.mul(dh.unsqueeze(1), k_t, out=out)
        torch.mul(dh, z_t, out=s).addmm_(out.flatten(1), w.hh)
    ih = torch.cat([gate[:, :2], (hidden * new).unsqueeze(1)], 1)
    return Solved(ih.flatten(1), gate.flatten(1), before, [state])


def lstm(w: Weights, given: Given) -> Solved:
    """``c = f c_before + i n``, ``h = o tanh(c)``, possibly projected, with ``i, f, o`` sigmoids and ``n`` a tanh."""
    steps = given.steps
    before = steps.before(given.h, given.initial[0])
    bias = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
    a = F.linear(given.x, w.ih, bias).addmm_(before, w.hh.mT).unflatten(1, (4, -1))
    i, f, n, o = a.unbind(1)
    a[:, :2].sigmoid_()
    n = n.clone().tanh_()  # in place, between the others, takes three times as long
    o.sigmoid_()
    c, at = i * n, given.initial[1]
    for f_t, c_t in steps.forwards(f, c):
        c_t.addcmul_(f_t, at[: len(c_t)])
        at = c_t if len(c_t) == len(at) else torch.cat([c_t, at[len(c_t) :]])
    c_before, c = steps.before(c, given.initial[1]), c.tanh()
    hidden = o * c if w.hr is not None else None
    through, keep = _tanh_backward(o, c), f.clone()  # of h with respect to c, of c with respect to the one before
    # In place of the gates, the slopes of c, and for the last of h, with respect to the pre-activations.
    torch.ops.aten.tanh_backward(i, n, grad_input=a[:, 2])
    torch.ops.aten.sigmoid_backward(n, i, grad_input=i)
    torch.ops.aten.sigmoid_backward(c_before, f, grad_input=f)
    torch.ops.aten.sigmoid_backward(c, o, grad_input=o)
    gates = a.flatten(1)
    left = torch.empty_like(given.grad) if w.hr is not None else given.grad
    state, cell = given.final
    for g, k, of_c, of_h, through_t, keep_t, left_t in steps.backwards(
        given.grad, gates, a[:, :3], a[:, 3], through, keep, left
    ):
        dh, dc = state[: len(g)].add_(g), cell[: len(g)]
        if w.hr is not None:
            dh = left_t.copy_(dh) @ w.hr
        dc.addcmul_(dh, through_t)
        of_c.mul_(dc.unsqueeze(1))  # the slopes become the gradients
        of_h.mul_(dh)
        dc.mul_(keep_t)
        torch.mm(k, w.hh, out=state[: len(g)])
    return Solved(gates, gates, before, [state, cell], None if hidden is None else (left, hidden))
