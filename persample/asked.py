"""Which parameters rows are of, where a model may change between one forward and the next: layers are replaced or
added, parametrised, frozen and thawed.

What counts is the model as it was when a forward began.  Every recorded call carries that (`Call.asked`), so that
losses which are given later have rows of the parameters that they were computed from, or an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calls import Reached
from .errors import CaptureError, UnknownParameterError
from .problem import Selection, asked_for
from .state import named_modules, parameters_of


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """The parameters that are asked for, by their first name, and the further names of these."""

    parameters: dict[str, nn.Parameter]
    aliases: dict[str, str]

    @property
    def wanted(self) -> set[int]:
        """Their ids, for a `Capture`."""
        return {id(p) for p in self.parameters.values()}

    def same(self, other: Asked) -> bool:
        """Whether these are the same parameters, under the same names."""
        mine, theirs = self.parameters, other.parameters
        return self is other or (
            mine.keys() == theirs.keys() and all(p is q for p, q in zip(mine.values(), theirs.values(), strict=True))
        )


class Asking:
    """What a selection of parameters means, in a model that may change."""

    def __init__(self, model: nn.Module, params: Selection) -> None:
        self.model = model
        self.params = list(params) if isinstance(params, Iterable) and not isinstance(params, str) else params
        self._seen: list[tuple[str, int, bool]] = []
        self.last = self._named = Asked(*asked_for(model, self.params))  # when somebody asked; if not all were frozen

    def now(self) -> Asked:
        """The parameters of the model as it is: the same object as before where nothing has changed."""
        with torch._C.DisableTorchFunction():  # under a mode, every attribute of a tensor is a call
            seen = [
                (prefix + own, id(p), p.requires_grad)
                for prefix, module in named_modules(self.model)
                for own, p in module._parameters.items()
                if p is not None
            ]
            if seen == self._seen and not callable(self.params):
                return self.last  # which holds its parameters, so that nobody else has their ids
            if any(map(_stands_in, parameters_of(self.model))):
                return self.last
            try:
                asked = self._named = Asked(*asked_for(self.model, self.params))
            except UnknownParameterError:
                if any(p.requires_grad for p in self._named.parameters.values()):
                    raise
                asked = Asked({}, {})  # a model that is frozen for a while (the discriminator of a GAN)
            if seen != self._seen or not asked.same(self.last):
                self._seen, self.last = seen, asked
            return self.last


def _stands_in(p: Tensor) -> bool:
    """Whether a tensor is in the place of a parameter for one call only (``torch.func.functional_call``), and rows are
    still of the parameter, which it may be computed from.
    """
    return not isinstance(p, nn.Parameter) and (
        torch._C._functorch.is_functorch_wrapped_tensor(p) or p.grad_fn is not None or not p.requires_grad
    )


def asked_in(found: Reached, now: Asked) -> Asked:
    """What was asked for in the forwards that losses come from; ``now``: where they come from none."""
    sets: list[Asked] = list({id(call.asked): call.asked for call in found.calls}.values()) or [now]
    for other in sets[1:]:
        if not other.same(sets[0]):
            raise CaptureError(
                f"{_difference(sets[0].parameters, other.parameters)} between two forwards that these losses come "
                "from, so they have no rows in common. Give the losses of each forward by themselves."
            )
    return sets[0]


def check_unchanged(asked: Asked, now: Asked, losses: Tensor) -> None:
    """Raise for losses that depend on parameters which the model got after the forward that they come from, or whose
    parameters have been frozen since.
    """
    if asked.same(now):
        return
    with torch._C.DisableTorchFunction():
        used = _leaves(losses)
        known = asked.wanted
        new = next((name for name, p in now.parameters.items() if id(p) in used and id(p) not in known), "")
        frozen = next((name for name, p in asked.parameters.items() if not p.requires_grad), "")
    if new:
        raise CaptureError(
            f"parameter '{new}' acts in these losses, but it wasn't asked for when the forward that they come from "
            "began: the model has changed since. Run the forward again after the change (other methods: say "
            "recorder.samples(x) again)."
        )
    if frozen:
        raise CaptureError(
            f"parameter '{frozen}' was frozen after the forward that these losses come from. Call gradients(losses) "
            "before requires_grad_(False), or run the forward after it."
        )


def _leaves(losses: Tensor) -> set[int]:
    """The ids of all leaves that these losses were computed from, whether a recorded call used them or not."""
    leaves, seen, stack = set[int](), set(), [losses.grad_fn]
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            stack.extend(n for n, _ in node.next_functions)
    return leaves


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    name = next(name for name in {**one, **other} if one.get(name) is not other.get(name))
    how = "was replaced" if name in one and name in other else "was frozen, thawed, added or removed"
    return f"parameter '{name}' {how}"
