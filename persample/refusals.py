"""What must not go unsaid: parameters that the recorded calls don't explain, and samples that depend on each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import rules
from .calls import APART, MIXES, Call, Reached, arguments, leaves_of, reached
from .errors import NOTIONS, RECORDED, BatchCoupledError, CaptureError
from .layout import spreads


def check_complete(found: Reached, parameters: Mapping[str, Tensor]) -> None:
    """Raise for parameters that the losses depend on in ways that no recorded call explains."""
    missed = [name for name, p in parameters.items() if id(p) in found.leaves]
    if missed and (function := found.inside.get(id(parameters[missed[0]]))):
        raise CaptureError(
            f"parameter '{missed[0]}'{_and_more(missed)} is used inside the custom autograd.Function {function}, where "
            f"no calls can be recorded. Call {function}.apply by a function that is announced by "
            "torch.overrides.wrap_torch_function (docs/contributing.md, 'Adding a rule'), or use engine='loop'."
        )
    if missed:
        raise CaptureError(
            f"parameter '{missed[0]}'{_and_more(missed)} is used where the recorded calls can't account for it: "
            "in a forward pass before the recording began, inside a custom autograd.Function, torch.vmap (or another "
            "transform of torch.func), a compiled, scripted or data-parallel region, an in-place write into a slice, "
            "in an output that depends on no sample, or in a method of the model other than its forward. Run the "
            "forward inside the with-block (before other methods, recorder.samples(x)), use the original module there, "
            "or engine='loop'."
        )
    if found.opaque:
        raise CaptureError(
            "torch.utils.checkpoint with use_reentrant=True hides the calls inside it from autograd's graph, "
            "and can't be differentiated by any engine. Use use_reentrant=False."
        )


def check_uncoupled(found: Reached, parameters: Mapping[str, Tensor]) -> None:
    """Raise if any of the parameters acts through statistics of the batch."""
    if coupled := couplers(found, parameters):
        listed = [name for name in parameters if name in coupled]
        call = coupled[listed[0]]
        free = [name for name in parameters if name not in coupled]
        way = f" Parameters behind it are not coupled: params={free!r} serves them." if free else ""
        raise BatchCoupledError(
            f"parameter '{listed[0]}'{_and_more(listed)}: {call.name} {call.couples}, so every loss depends on all "
            "samples and 'the gradient of sample n' is "
            f"not one thing. {_broadcast(call)}{NOTIONS if call.func in rules.COUPLES else _other_way_out(call)}{way}",
            tuple(listed),
        )


def check_only(known: Collection[Any], found: Reached, parameters: Mapping[str, Tensor]) -> None:
    """Raise if any of the parameters acts through several samples at once elsewhere than in these functions."""
    coupled = couplers(Reached([call for call in found.calls if call.func not in known]), parameters)
    if coupled:
        name, call = next((name, coupled[name]) for name in parameters if name in coupled)
        raise BatchCoupledError(
            f"parameter '{name}'{_and_more([*coupled])}: {call.name} {call.couples}, so something else than BatchNorm "
            f"couples the batch, which no notion of coupled= takes apart. {_broadcast(call)}{_other_way_out(call)}",
            tuple(name for name in parameters if name in coupled),
        )


def couplers(found: Reached, parameters: Mapping[str, Tensor]) -> dict[str, Call]:
    """For every parameter that acts through several samples at once, a call that couples them."""
    names = {id(p): name for name, p in parameters.items()}
    coupled: dict[str, Call] = {}
    for call in found.calls:
        if call.couples:
            before = reached(call.inputs, call.owner)
            upstream = {*map(id, parameters_of(before)), *before.leaves}
            coupled.update((name, call) for i, name in names.items() if i in upstream and name not in coupled)
    return coupled


def _broadcast(call: Call) -> str:
    """A hint where two of its arguments have shapes that meet sample by sample only after a squeeze."""
    shapes = [tuple(x.shape) for x in arguments(call.args, call.kwargs) if call.sampled(x)]
    pair = next(((a, b) for a in shapes for b in shapes if len(a) > len(b) and spreads(a, b)), None)
    if pair is None:
        return ""
    return f"It broadcasts {pair[0]} with {pair[1]} to {tuple(torch.broadcast_shapes(*pair))}: squeeze(-1) the first. "


def _other_way_out(call: Call) -> str:
    special = {
        MIXES: " Where a sample alone has the same values all the same, engine='loop' gives the rows.",
        APART: " If it draws random numbers from a generator of its own, verify=False gives the rows within the batch.",
    }
    attention = ""
    if call.func in _ATTENDS and call.couples == MIXES:
        attention = "Layers of attention take the samples on axis 1, unless made with batch_first=True. "
    return (
        f"{attention}Let the model (and the loss) act on every sample alone; if nothing should couple them, say where "
        f"the samples are with batch_dim=.{special.get(call.couples, '')} {RECORDED}"
    )


_ATTENDS = {F.scaled_dot_product_attention, torch.bmm, torch.baddbmm}


def parameters_of(found: Reached) -> Iterator[Tensor]:
    """The parameters that meet samples in these calls."""
    for call in found.calls:
        for shared in call.shared:
            yield from [shared.tensor] if shared.derivation is None else leaves_of(shared.derivation)


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
