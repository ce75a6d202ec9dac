"""Any function without a rule: differentiate that one call, sample by sample.

First all samples at once (``vmap`` of ``vjp`` over slices that keep their sample axis); where that fails or the call
doesn't act on every sample alone, once per sample with the output gradient of that sample only, which is always right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..calls import Call, arguments, common_type, tensors_in
from ..errors import CaptureError, InplaceError, RandomnessError
from ..factors import Dense, strided
from ..layout import Layout, samples_first
from . import DROPS, mutates, spellings
from .apart import Lone

_DRAWS = DROPS.union(spellings("rrelu", "bernoulli", "gumbel_softmax"))
_GATHERS = spellings("gather")
_BY_PLACE = {
    *_GATHERS, *spellings("scatter", "scatter_add", "scatter_reduce", "scatter_", "scatter_add_", "scatter_reduce_"),
    *spellings("masked_scatter", "masked_scatter_", "diagonal_scatter", "select_scatter"),
}  # fmt: skip
_CHANNELS = {f: -1 - d for d in (1, 2, 3) for f in spellings(f"conv{d}d", f"conv_transpose{d}d")}  # their axis


def by_samples(call: Call, grads: Sequence[Tensor | None], wanted: list[Tensor]) -> Iterator[tuple[Tensor, Dense]]:
    """Rows ``[N, *P]`` for every tensor in ``wanted``."""
    if call.func in _DRAWS:
        raise _random(call)
    try:
        together = call.couples or _in_groups(call) or _by_place(call)
        rows = _one_by_one(call, grads, wanted) if together else _vectorised(call, grads, wanted)
    except InplaceError:
        raise
    except Exception:  # vmap has many ways to refuse; the loop below is always right
        rows = _one_by_one(call, grads, wanted)
    yield from ((t, Dense(strided(r))) for t, r in zip(wanted, rows, strict=True))


def _in_groups(call: Call) -> bool:
    """Whether samples are among the channels of a convolution: one alone would be cut into the groups of all."""
    shape, at = call.outputs[0]
    channels = 1 - len(shape) if call.func is torch.convolution else _CHANNELS.get(call.func)
    return channels is not None and at is not None and at.axis == len(shape) + channels


def _by_place(call: Call) -> bool:
    """Whether one sample's index would take from the first places of what is shared, and fit there, too; not where it
    takes along the samples' axis.
    """
    if call.func not in _BY_PLACE:
        return False
    shape, at = call.outputs[0]
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    along = type(dim) is int and at is not None and len(shape) > 0 and dim % len(shape) == at.axis
    return call.func not in _GATHERS or not along


def _random(call: Call) -> RandomnessError:
    return RandomnessError(
        f"{call.name} draws random numbers and has no rule, so it can't be run again. Use engine='loop', or register "
        "a rule."
    )


def _runner(call: Call, wanted: list[Tensor]) -> Any:
    """The call as a function of the wanted tensors and a replacement for its other arguments.

    Arguments of several types are brought to their common one.
    """
    for x in (given := tree_leaves((call.args, call.kwargs))):
        if isinstance(x, Tensor):
            call.read(x)
    common = common_type(given)
    place = {id(t): i for i, t in enumerate(wanted)}

    def run(values: Sequence[Tensor], replace: dict[int, Tensor]) -> list[Tensor]:
        def swap(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = values[place[id(t)]] if id(t) in place else replace.get(id(t), t)
            return t if common is None or not t.is_floating_point() else t.to(common)

        args, kwargs = tree_map(swap, call.args), tree_map(swap, call.kwargs)
        if mutates(call.func):
            args = (args[0].clone(), *args[1:])
            out = call.func(*args, **kwargs)
            out = args[0] if out is None else out
        else:
            out = call.func(*args, **kwargs)
            given = arguments(args, kwargs)
            out = [t for t in tensors_in(out) if not any(t is a for a in given)]  # handed through
        return [t for t in tensors_in(out) if (t.is_floating_point() or t.is_complex())]

    return run


def _vectorised(call: Call, grads: Sequence[Tensor | None], wanted: list[Tensor]) -> list[Tensor]:
    run = _runner(call, wanted)
    arguments = {id(t): t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor) and call.sampled(t)}
    layouts = [_known(call.layouts[i]) for i in arguments]
    outputs = [(g, _known(layout)) for g, (_, layout) in zip(grads, call.outputs, strict=True) if g is not None]

    def one(pieces: list[Tensor], gs: list[Tensor]) -> tuple[Tensor, ...]:
        replace = {i: x.movedim(0, at.axis) for i, x, at in zip(arguments, pieces, layouts, strict=True)}
        outs, pull = vjp(lambda *values: run(values, replace), *(t.detach() for t in wanted))[:2]
        given = iter(gs)
        cotangents = []
        for out, g, (_, at) in zip(outs, grads, call.outputs, strict=True):
            cotangents.append(torch.zeros_like(out) if g is None else next(given).movedim(0, _known(at).axis))
            if cotangents[-1].shape != out.shape:
                raise ValueError("the call does not act on every sample alone")
        return tuple(pull(cotangents))

    pieces = [call.samples(x) for x in arguments.values()]
    rows = vmap(one, randomness="error")(pieces, [samples_first(g, at) for g, at in outputs])
    with torch.no_grad():  # vmap lets shapes pass that don't fit a sample (index_copy): one alone, without it
        run(wanted, {i: x[0].movedim(0, at.axis) for i, x, at in zip(arguments, pieces, layouts, strict=True)})
    return [r.detach() for r in rows]


def _known(layout: Layout | None) -> Layout:
    if layout is None or layout.owner is not None or layout.alone is not None:
        raise ValueError("samples are not on an axis of their own")
    return layout


def _again(call: Call, grads: Sequence[Tensor | None], wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The call once more, with a graph: its outputs, and the wanted tensors that they depend on."""
    run = _runner(call, wanted)
    before = torch.get_rng_state()
    with torch.enable_grad():
        values = [t.detach().requires_grad_() for t in wanted]
        outs = [out for out in run(values, {}) if out.requires_grad]  # as when they were recorded
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise _random(call)
    if len(outs) != len(grads):
        raise CaptureError(
            f"{call.name}: its outputs can't be told apart when it is run again. Register a rule, or use engine='loop'."
        )
    return outs, values


def of_one(
    call: Call, grads: Sequence[Tensor | None], wanted: list[Tensor], sample: int
) -> Iterator[tuple[Tensor, Lone]]:
    """A call in which only one sample takes part: its gradient is that sample's row."""
    outs, values = _again(call, grads, wanted)
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in pairs], values, [g for _, g in pairs], materialize_grads=True)
    yield from ((t, Lone(g, sample, call.n)) for t, g in zip(wanted, found, strict=True))


def _one_by_one(call: Call, grads: Sequence[Tensor | None], wanted: list[Tensor]) -> list[Tensor]:
    outs, values = _again(call, grads, wanted)
    rows = []
    for i in range(call.n):
        seeds = [
            None if g is None else _only(g, at if at is not None else call.layout, i)
            for g, (_, at) in zip(grads, call.outputs, strict=True)
        ]
        pairs = [(o, s) for o, s in zip(outs, seeds, strict=True) if s is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs], values, [s for _, s in pairs], retain_graph=True, allow_unused=True
        )
        rows.append([torch.zeros_like(v) if f is None else strided(f) for v, f in zip(values, found, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _only(g: Tensor, at: Layout, n: int) -> Tensor:
    """The output gradient of sample ``n`` alone."""
    if at.alone is not None:
        return g if at.alone == n else torch.zeros_like(g)
    keep = (at.owners() == n).to(g.device).view([-1 if a == at.axis else 1 for a in range(g.ndim)])
    return g.masked_fill(~keep, 0)  # not times zero: other samples may have no numbers
