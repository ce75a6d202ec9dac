"""From gradients by name to parameters: how an optimizer finds its parameters, and the two update rules all share.

An optimizer here is an ordinary `torch.optim.Optimizer` built from ``model.named_parameters()``, whose ``step(G)``
takes per-sample gradients.  Names connect the two, and saved states with both; ``.grad`` is neither read nor written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import check_at_least, number
from ..errors import ArgumentError, UnknownParameterError
from ..quantities import Quantities, check_adds_up
from ..replicas import check_only_copy

COMPILED = "_orig_mod."  # what torch.compile puts before names of parameters; `gradients` names those of the model
# What schedulers write into groups for themselves, labels of groups, and torch.optim's ways to compute the same step.
HARMLESS = {
    "initial_lr",
    "base_momentum",
    "max_momentum",
    "min_lr",
    "max_lr",
    "swa_lr",
    "lr_scale",
    "name",
    "group_name",
    "foreach",
    "fused",
    "capturable",
}
# Options of torch.optim for which there is nothing here, at the values that ask for nothing.
UNUSED = {"maximize": False, "dampening": 0, "amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}


class Slot(NamedTuple):
    """A parameter, what is kept for it, and the options of its group."""

    p: nn.Parameter
    state: dict[str, Any]
    group: dict[str, Any]


class Named(Optimizer):
    """A `torch.optim.Optimizer` of named parameters: gradients and saved states belong to names, whatever their order.

    Copied or pickled together with the model, it goes on with the copy: ``own`` are the attributes that go along beside
    those of torch.
    """

    own: ClassVar[tuple[str, ...]] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters, with options of its own."""
        super().add_param_group(param_group)
        if "param_names" in param_group:
            param_group["param_names"] = [name.removeprefix(COMPILED) for name in param_group["param_names"]]
        try:
            check_named(self)
        except ArgumentError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state by the names of parameters; one without names (of an optimizer that was built from
        ``model.parameters()``) by their order.

        Raises:
            ArgumentError: the groups lack an option of this optimizer, or have one that it would not follow.
            UnknownParameterError: the groups are of other parameters.
        """
        handle = self.register_load_state_dict_pre_hook(by_name)  # behind those of others, which may rename
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.own}}


def by_name(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state in the order of the optimizer's parameters: torch would take it by position, names included."""
    groups = [dict(group) for group in state["param_groups"]]
    for i, (saved, group) in enumerate(zip(groups, optimizer.param_groups, strict=False)):  # torch compares numbers
        if missing := optimizer.defaults.keys() - saved.keys():
            raise ArgumentError(
                f"group {i} of the saved state has no option {min(missing)!r}, which {type(optimizer).__name__} needs: "
                "it is the state of another kind of optimizer."
            )
        check_options(optimizer, saved)
        names, mine = saved.get("param_names"), group["param_names"]
        if names is None or len(names) != len(mine):
            check_shapes(state, saved, group)
            continue
        names = [name.removeprefix(COMPILED) for name in names]
        if different := set(names) ^ set(mine):
            name = min(different)
            theirs, ours = ("has", "has not") if name in names else ("has not", "has")
            raise UnknownParameterError(
                f"group {i} of the saved state {theirs} parameter '{name}', and that of the optimizer {ours}. Build "
                "the optimizer with the same parameters in every group; or delete 'param_names' from the groups of the "
                "state, where it is to be loaded by the order of parameters."
            )
        position = dict(zip(names, saved["params"], strict=True))
        saved.update(params=[position[name] for name in mine], param_names=list(mine))
        check_shapes(state, saved, group)
    return {**state, "param_groups": groups}


def check_shapes(state: Mapping[str, Any], saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raise for a state of parameters of other shapes, in the order of the optimizer's: a step would fail halfway."""
    for place, name, p in zip(saved["params"], group["param_names"], group["params"], strict=False):
        for what, kept in state["state"].get(place, {}).items():
            if isinstance(kept, Tensor) and kept.ndim and kept.shape != p.shape:
                raise UnknownParameterError(
                    f"{what} of parameter '{name}' has shape {list(kept.shape)} in the saved state, but the parameter "
                    f"is {list(p.shape)}: they belong to different models."
                )


def check_named(optimizer: Optimizer) -> None:
    """Raise unless the optimizer was made of named parameters, in groups that say nothing it would not do."""
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ArgumentError(
            f"{type(optimizer).__name__} finds the rows of a parameter by its name: pass model.named_parameters() (or "
            "groups whose 'params' are pairs of name and parameter), not model.parameters()."
        )
    count = Counter(name for group in optimizer.param_groups for name in group["param_names"])
    if twice := [name for name in count if count[name] > 1]:
        raise ArgumentError(
            f"'{twice[0]}' is the name of two parameters, and gradients have one for it: an optimizer for each model, "
            "or names of one module that has both."
        )
    for group in optimizer.param_groups:
        check_options(optimizer, group)
        conjugate = [name for name, p in zip(group["param_names"], group["params"], strict=True) if p.is_conj()]
        if conjugate and "betas" in group:  # which takes real and imaginary parts, and here would do so of a copy
            raise ArgumentError(
                f"parameter '{conjugate[0]}' is the conjugate of what its memory holds (is_conj()), so that "
                f"{type(optimizer).__name__} can't write to its parts: nn.Parameter(p.detach().resolve_conj())."
            )


def check_options(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Raise for options of a group that are none of what they may be, or that the optimizer would not follow."""
    kind = type(optimizer).__name__
    check_at_least(0, **{name: group[name] for name in ("lr", "momentum", "weight_decay", "eps") if name in group})
    check_betas(group.get("betas", (0, 0)))
    if group.get("nesterov") and not group["momentum"] > 0:
        raise ArgumentError("nesterov=True needs momentum > 0, as in torch.optim.SGD.")
    for name in sorted(group.keys() - optimizer.defaults.keys() - HARMLESS - {"params", "param_names"}):
        if name not in UNUSED:
            raise ArgumentError(
                f"{kind} has no option {name!r} for a group of parameters; there are {sorted(optimizer.defaults)}. "
                "What acts on whole rows (max_norm) is for all groups together."
            )
        if name == "decoupled_weight_decay" and not group["weight_decay"]:
            continue
        if group[name] != UNUSED[name]:
            raise ArgumentError(
                f"{kind} has no option {name!r}, and the group says {name}={group[name]!r}, without which the steps "
                f"would be others. Use an optimizer of torch.optim, or a group with {name}={UNUSED[name]!r}."
            )


def check_betas(betas: Any) -> None:
    """Raise for decay rates of averages that don't decay."""
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= number(b) < 1 for b in betas):
        raise ArgumentError(f"betas must be two numbers, 0 or more and below 1, got {betas}.")


def quantities(G: Any) -> Quantities:
    """Raise for what is no result of a batch."""
    if not isinstance(G, Quantities):
        raise ArgumentError(
            f"step() takes the per-sample gradients of a batch (persample.gradients(...)), got {type(G).__name__}."
            + (" A closure would compute what is given here." if callable(G) else "")
        )
    return G


def summing(G: Any) -> Quantities:
    """Raise for what is no result of a batch, or of rows that don't add up to its gradient."""
    check_adds_up(quantities(G))
    return G  # type: ignore[no-any-return]


def named(optimizer: Optimizer) -> dict[str, Slot]:
    """The optimizer's parameters that require grad, by name."""
    return {
        name: Slot(p, optimizer.state[p], options)
        for group in optimizer.param_groups
        for options in [_scalars(group)]
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.requires_grad
    }


def _scalars(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group; those that are tensors of one element without axes, as torch.optim takes them."""
    return {name: x.squeeze() if isinstance(x, Tensor) else x for name, x in group.items()}


def started(optimizer: Optimizer, G: Any, closure: Any) -> bool:
    """Whether no step is asked for, but a state of every parameter: `torch.distributed.checkpoint` loads into the one
    that ``step(closure=None)`` leaves, called with every ``lr`` and all of ``.grad`` at zero.  Raises for closures.
    """
    if closure is not None:
        quantities(closure)
    if G is not None:
        return False
    found = named(optimizer).values()
    if any(number(group["lr"]) for group in optimizer.param_groups) or not all(
        p.grad is not None and not p.grad.any() for p, *_ in found
    ):
        quantities(G)
    for p, state, group in found:
        if not state:
            state.update(_start(p, group))
    return True


def _start(p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept for a parameter before its first step."""
    if "betas" in group:
        return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}


def slots(optimizer: Optimizer, gradient: Mapping[str, Tensor]) -> Iterator[tuple[str, Slot]]:
    """The optimizer's parameters, which must be those of the gradient, by the names that they have there."""
    names = check_same(optimizer, {name: g.shape for name, g in gradient.items()})
    return ((names[name], slot) for name, slot in named(optimizer).items())


def check_same(optimizer: Optimizer, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """Raise unless gradients are those of the optimizer's parameters, of which there is one copy; the names that they
    have there.
    """
    found = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.requires_grad
    }
    check_only_copy(found.values(), "step()")
    names = {name.removeprefix(COMPILED): name for name in shapes}
    if different := found.keys() ^ names.keys():
        name = min(different)
        where = "the gradients don't have it" if name in found else "the optimizer doesn't hold it"
        raise UnknownParameterError(
            f"parameter '{name}': {where}. Give step() the rows of the optimizer's parameters: params=, select()."
        )
    for name, p in found.items():
        if p.shape != (shape := shapes[names[name]]):
            both = f"{list(p.shape)} in the optimizer, {list(shape)} in the gradients"
            raise UnknownParameterError(f"parameter '{name}' has shape {both}: they belong to different models.")
    return names


def parts(x: Tensor) -> Tensor:
    """A complex tensor as the real one of real and imaginary parts ``[..., 2]`` that shares its memory."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@torch.no_grad()
def descend(optimizer: Optimizer, direction: Mapping[str, Tensor]) -> None:
    """One step of SGD along minus ``direction``, as `torch.optim.SGD` would with it for gradient.

    ``d <- d + weight_decay p``;  ``m <- momentum m + d``;  ``p <- p - lr m`` (with ``nesterov``: ``d + momentum m``).
    """
    for name, (p, state, group) in slots(optimizer, direction):
        d = direction[name].to(p)
        if group["weight_decay"]:  # of infinite parameters (masks), no part is NaN
            d = d.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            if state.get("momentum_buffer") is not None:  # older states of torch's hold None where there was none
                state["momentum_buffer"].mul_(group["momentum"]).add_(d)
            else:
                state["momentum_buffer"] = d.clone()
            m = state["momentum_buffer"]
            d = d.add(m, alpha=group["momentum"]) if group["nesterov"] else m
        p.add_(d, alpha=-group["lr"])


@torch.no_grad()
def adapt(optimizer: Optimizer, gradient: Mapping[str, Tensor], square: Mapping[str, Tensor] | None = None) -> None:
    """One step of `torch.optim.AdamW`, with ``square`` in the place of ``gradient^2``.

    ``m <- b1 m + (1 - b1) gradient``;  ``v <- b2 v + (1 - b2) square``;  ``p <- (1 - lr weight_decay) p``;
    ``p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.  A complex entry is two real ones, as in
    `torch.optim.AdamW`: ``square`` is then that of its `parts`.
    """
    for name, (p, state, group) in slots(optimizer, gradient):
        b1, b2 = map(number, group["betas"])
        if not state:
            state.update(_start(p, group))
        # torch's is a float32 tensor, in which 1 - b^t would be computed, and which belongs to the other optimizer too
        t = state["step"] = int(state["step"]) + 1
        x, g, m, v = (parts(z) for z in (p, gradient[name].to(p), state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(g, 1 - b1)
        v.mul_(b2)  # and no square in the type of v, in half precision: it would be infinite from 256 on
        v.addcmul_(g, g, value=1 - b2) if square is None else v.add_(square[name].to(v.device), alpha=1 - b2)
        x.mul_(1 - group["lr"] * group["weight_decay"])
        scale = v.sqrt().div_(math.sqrt(1 - b2**t)).add_(group["eps"])
        x.addcdiv_(m, scale, value=-group["lr"] / (1 - b1**t))
