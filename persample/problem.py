"""What every engine is given: a model, a criterion, a batch, and the parameters that are asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from . import replicas
from .arguments import check_module
from .batch import Batch
from .calls import reached
from .errors import NOTIONS, ArgumentError, BatchCoupledError, CaptureError, LossError, UnknownParameterError
from .factors import Factors
from .losses import CRITERIA, LossFunction
from .state import modules_of, named_modules, parameters_of

Selection = str | re.Pattern[str] | Iterable[str] | Callable[[str, Tensor], bool] | None
Emit = Callable[[str, Factors], None]


@dataclass(frozen=True)
class Problem:
    """Per-sample gradients of ``loss_fn(model(inputs), targets)`` with respect to ``parameters``."""

    model: nn.Module
    loss_fn: LossFunction
    batch: Batch
    parameters: dict[str, nn.Parameter]  # those asked for, by their first name
    aliases: dict[str, str] = field(default_factory=dict)  # further names of tied parameters -> first name

    @property
    def owners(self) -> tuple[nn.Module, LossFunction]:
        """What has buffers, which a pass may change."""
        return self.model, self.loss_fn


@dataclass(frozen=True)
class Pass:
    """What an engine reports besides the factors that it emits."""

    losses: Tensor | None  # [N], detached; None where only somebody else knows them
    outputs: Any  # detached
    unused: tuple[str, ...] = ()  # parameters that no loss depends on
    coupled: bool = False  # some call couples the batch, though not for these parameters
    called: frozenset[Any] = frozenset()  # what the model and the criterion did, where it was seen (`Capture.path`)
    totals: bool = False  # numbers of the whole batch act on single samples: another batch may be coupled by them
    hidden: bool = False  # or they may do so where it isn't seen (a branch, ranks among the samples)
    read: bool = False  # Python read counts or tests of the batch: another one may go another way
    ragged: bool = False  # samples lie where they do by this batch's values, or as long as it has them
    served: dict[str, list[tuple[Callable[..., Any], str]]] = field(
        default_factory=dict
    )  # the functions that used a parameter, and how


def named_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Parameters that require grad by their first name, and the further names of tied ones."""
    first: dict[int, str] = {}
    found: dict[str, nn.Parameter] = {}
    aliases: dict[str, str] = {}
    for prefix, module in named_modules(model):
        for own, p in module._parameters.items():
            if p is None:
                continue
            name = prefix + own
            if id(p) in first:
                aliases[name] = first[id(p)]
            else:
                first[id(p)] = name
                if p.requires_grad:
                    found[name] = p
    return found, {alias: name for alias, name in aliases.items() if name in found}


def select(
    available: dict[str, Any], aliases: dict[str, str], params: Selection, frozen: Iterable[str] = ()
) -> list[str]:
    """The names that a selection means: a regular expression (``re.match``, so from the beginning of a name), names, or
    a predicate ``(name, parameter)``.
    """
    if params is None:
        return list(available)
    if isinstance(params, (str, re.Pattern)):
        hint = _meant(params, available) if isinstance(params, str) else ""
        try:
            chosen = {aliases.get(name, name) for name in [*available, *aliases] if re.match(params, name)}
        except (re.error, TypeError) as error:
            raise UnknownParameterError(
                f"params={params!r} is no regular expression for names: {error}.{hint} Escape what is meant as it "
                "stands, or give a list of names."
            ) from None
        if not chosen:
            raise UnknownParameterError(
                f"params={params!r} matches none of the parameters {_some(available)}: it is a regular expression for "
                f"the beginning of a name.{hint}"
            )
    elif callable(params):
        try:
            chosen = {name for name, p in available.items() if params(name, p)}
        except TypeError as error:
            raise UnknownParameterError(
                f"the predicate params= can't be called with (name, parameter): {error}."
            ) from error
        if not chosen:
            raise UnknownParameterError(f"the predicate params= accepts none of the parameters {_some(available)}.")
    elif isinstance(params, Iterable):
        wanted = list(params)
        if any(isinstance(name, Tensor) for name in wanted):
            raise UnknownParameterError(
                "params= takes the names of parameters, not the tensors: [name for name, p in model.named_parameters() "
                "if ...]."
            )
        chosen = {aliases.get(name, name) for name in wanted}
        if not wanted:
            raise UnknownParameterError("params= is empty: it names no parameter. Leave it out for all of them.")
        if unknown := [name for name in wanted if aliases.get(name, name) not in available]:
            why = " (it does not require grad)" if set(unknown) & set(frozen) else ""
            raise UnknownParameterError(f"no parameter {unknown[0]!r}{why}; there are {_some(available)}.")
    else:
        raise UnknownParameterError(
            f"params= must be a regular expression, names, or a predicate (name, parameter), got {params!r}."
        )
    return [name for name in available if name in chosen]


def asked_for(model: nn.Module, params: Selection) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters that a selection means, by their first name, and the further names of these."""
    check_module(model)
    found, aliases = named_parameters(model)
    frozen = (name for name, p in model.named_parameters() if not p.requires_grad)
    chosen = {name: found[name] for name in select(found, aliases, params, frozen)}
    return chosen, {alias: name for alias, name in aliases.items() if name in chosen}


def _meant(pattern: str, names: Iterable[str]) -> str:
    """A hint at the regular expression for what a shell pattern (``*.weight``) or a part of a name must have meant."""
    glob = re.sub(r"([*?])", r".\1", pattern.replace(".", r"\.")).replace(".?", ".")
    for meant in (glob, ".*" + re.escape(pattern.lstrip("*."))):
        if meant != pattern and any(re.match(meant, name) for name in names):
            return f" Is r'{meant}' meant?"
    return ""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (
        ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") or "(none that require grad)"
    )


def check_model(model: Any) -> None:
    """Raise for what is no module, for one without values, and where there can be no graph; remember copies."""
    check_module(model)
    modules = modules_of(model)
    made = [p for module in modules for p in module._parameters.values() if p is not None and not is_lazy(p)]
    if empty := [p for p in made if p.is_meta]:
        raise ArgumentError(
            f"parameter '{_name(model, empty[0])}' is on the device 'meta', where it has no values. Give it some first "
            "(model.to_empty(device=...), then load a state)."
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in made):
        raise ArgumentError(
            "inside torch.inference_mode() there are no graphs, and tensors that were made there never have one. Call "
            "this outside of it, with a model that was made (or cloned) outside."
        )
    if kind := _sharded(model, made):
        raise ArgumentError(
            f"{kind}: its parameters are put together and taken apart behind autograd's back, so that gradients don't "
            "arrive at them. Take per-sample gradients of the model before it is sharded (DistributedDataParallel "
            "works), or of a copy with the full state."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        _check_scripted(model)
    replicas.see(model)


def _check_scripted(model: nn.Module) -> None:
    """Raise for scripted and traced modules that couple the batch where no engine can see it."""
    for prefix, module in named_modules(model):
        kind = str(getattr(module, "original_name", "")) if isinstance(module, torch.jit.ScriptModule) else ""
        if "BatchNorm" in kind and (module.training or getattr(module, "running_mean", None) is None):
            raise BatchCoupledError(
                f"module '{prefix.removesuffix('.')}' is a scripted or traced {kind} that normalises by the batch, so "
                "that samples are coupled where it can't be seen. Give the original module, and say what is meant; or "
                f"the scripted model in evaluation mode. {NOTIONS}"
            )


def _check_apart(tree: Any, what: str, parameters: Mapping[str, Tensor]) -> None:
    """Raise for what is given as data, and was computed from parameters: rows would miss that path."""
    names = {id(p): name for name, p in parameters.items()}
    for x in tree_leaves(tree):
        if isinstance(x, Tensor) and x.requires_grad:
            leaves = {id(x)} if x.grad_fn is None else reached([x.grad_fn]).leaves
            if name := next((names[i] for i in leaves if i in names), ""):
                raise CaptureError(
                    f"{what} of shape {tuple(x.shape)} is computed from parameter '{name}', outside of the model's "
                    "forward, where it isn't seen. Compute it inside (a module around both); or detach() it, if it is "
                    "data."
                )


def check_no_hooks(parameters: Mapping[str, Tensor]) -> None:
    """Raise for parameters with a function that changes their gradient."""
    for name, p in parameters.items():
        if p._backward_hooks:
            raise CaptureError(
                f"parameter '{name}' has a hook (register_hook), which acts on the gradient of each loss by itself. "
                "Remove it while per-sample gradients are computed and apply it to the rows; or use engine='loop'."
            )


def _name(model: nn.Module, parameter: Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)


def _sharded(model: nn.Module, parameters: Iterable[Tensor]) -> str:
    """What of the model is spread over processes, if anything is; nothing can be before its library is imported."""
    fsdp, dtensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrappers = tuple(k for n in ("FullyShardedDataParallel", "FSDPModule") if (k := getattr(fsdp, n, None)) is not None)
    tensors = getattr(dtensor, "DTensor", ())
    for name, module in model.named_modules() if wrappers else ():
        if isinstance(module, wrappers):
            return (f"module '{name}'" if name else "the model") + f" is a {type(module).__name__}"
    for p in parameters if tensors else ():
        if isinstance(p, tensors) or isinstance(p.data, tensors):
            return f"parameter '{_name(model, p)}' is a DTensor"
    return ""


def pose(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    params: Selection = None,
    batch_dim: Any = 0,
) -> Problem:
    """Check and gather what the user gave; of a compiled model, the original."""
    model = getattr(model, "_orig_mod", model)
    check_model(model)
    if isinstance(loss_fn, type):
        raise LossError(f"loss_fn is the class {loss_fn.__name__}; give an instance of it: {loss_fn.__name__}().")
    if not callable(loss_fn):
        raise LossError(
            f"loss_fn must be a function (outputs, targets) or a criterion, got a {type(loss_fn).__name__}. "
            "The order is (model, loss_fn, inputs, targets)."
        )
    if isinstance(inputs, (DataLoader, Dataset)):
        raise ArgumentError(
            f"inputs is a {type(inputs).__name__}, and this takes one batch: for x, y in loader, give x and y. The "
            "curvature of all batches is curvature.merge(ggn(model, loss_fn, x, y) for x, y in loader), or kfac in the "
            "place of ggn; statistics of all are those of persample.statistics.accumulate."
        )
    if targets is None and (type(loss_fn).__module__ == "torch.nn.modules.loss" or loss_fn in CRITERIA.values()):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise LossError(
            f"{name} compares outputs with targets, and there are none: persample.gradients(model, loss_fn, inputs, "
            "targets). Of a model that returns all that it compares (pairs, triplets), take "
            "loss_fn=lambda outputs, _: criterion(*outputs)."
        )
    chosen, aliases = asked_for(model, params)
    if not chosen:
        swapped = isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in parameters_of(loss_fn))
        raise UnknownParameterError(
            "the model has no parameter that requires grad, so there is no gradient to take."
            + (" Are model and loss_fn swapped? The order is (model, loss_fn, inputs, targets)." if swapped else "")
        )
    _check_apart(inputs, "an input", chosen)
    _check_apart(targets, "a target", chosen)
    return Problem(model, loss_fn, Batch.of(inputs, targets, batch_dim), chosen, aliases)
