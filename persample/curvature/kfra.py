"""KFRA: the averaged loss Hessian is propagated backwards through a sequence of modules, once for the whole batch.

With ``f_l`` the output of module ``l`` and ``J_n = d f_l / d f_{l-1}`` of sample ``n`` (Botev, Ritter and Barber 2017):

    ``Gbar_L = mean_n H_n``,   ``Gbar_{l-1} = mean_n J_n^T Gbar_l J_n``.

For a linear module this is ``W^T Gbar W``, for an elementwise ``phi`` it is ``Gbar o mean_n phi'_n phi'_n^T``; here
any module is fine, since the recursion is done on a square root of ``Gbar``, column by column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..errors import KroneckerError
from ..hook import Hook
from ..losses import HOOKS, LossFunction
from ..problem import Selection, pose
from ..scratch import kernel
from ..telling import telling
from ..verify import with_own_inputs
from ..watch import Watch
from .columns import loss_roots, root
from .kfac import kfac
from .kronecker import Kronecker
from .layers import Layer
from .likelihood import wide
from .matrices import hessian_at
from .objective import Objective

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@telling
def kfra(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, *,
    approximation: str = "expand", bias: str = "joined", params: Selection = None, reduction: str = "mean",
    verify: bool | None = None,
) -> Kronecker:  # fmt: skip
    """``blockdiag(G (x) A)``, ``[D, D]``, as `kfac`, but ``G [O, O]`` by recursion: ``c N Gbar`` at the layer's output.

    For an ``nn.Sequential`` (nested ones are flattened) of modules that take and return one tensor ``[N, ...]``, each
    used once.  Of the blocks of ``Gbar`` between positions ``t, s``, "expand" sums those with ``t = s``, "reduce"
    all.  The other arguments are those of `kfac`; samples are in front, so there is no ``batch_dim``.

    Raises:
        KroneckerError: for another model, or hooks on its modules (use `kflr`, which propagates every sample's own
            Hessian).
        BatchCoupledError, LossError: as `kfac`.

    Cost: as many backward passes through each module as its output has entries per sample.
    """
    one_of("approximation", approximation, ("expand", "reduce"))
    modules = list(_chain(model))
    plain = kfac(
        model,
        loss_fn,
        inputs,
        targets,
        type="empirical",
        approximation=approximation,
        bias=bias,
        params=params,
        reduction=reduction,
        verify=verify,
    )
    objective = Objective.of(pose(model, loss_fn, inputs, targets, params=params), reduction)
    objective.silent[0] = True  # kfac has said it
    names = {id(p): name for name, p in objective.parameters.items()}
    factors: dict[str, Tensor] = {}
    for module, shape, curvature in _recursion(objective, modules):
        for p in module.parameters(recurse=False):
            block = plain.blocks.get(names.get(id(p), ""))
            if block is not None and type(module) in (nn.Linear, *_CONVOLUTIONS):
                if block.layer.weight in factors:
                    raise KroneckerError(f"'{block.layer.weight}' is used twice in the sequence: use kflr.")
                factors[block.layer.weight] = _outputs(module, block.layer, shape, curvature, approximation)
    if missing := sorted(plain.blocks.keys() - factors.keys()):
        raise KroneckerError(
            f"'{missing[0]}' does not belong to a linear or convolution module of the sequence itself: use kflr."
        )
    scale = objective.scale * objective.problem.batch.n
    blocks = {name: replace(block, gradients=scale * factors[name]) for name, block in plain.blocks.items()}
    return replace(plain, title=f"KFRA ({approximation}, {reduction})", blocks=blocks)


def _chain(model: nn.Module, name: str = "") -> Iterator[nn.Module]:
    if type(model) is not nn.Sequential:
        raise KroneckerError(
            f"kfra needs an nn.Sequential, got {type(model).__name__}: use kflr, which works for any model."
        )
    _check_no_hooks(model, name)
    seen: set[nn.Module] = set()
    for key, module in zip(model._modules, model, strict=True):
        for part in _chain(module, f"{name}{key}.") if type(module) is nn.Sequential else [module]:
            if part in seen and any(True for _ in part.parameters()):
                raise KroneckerError(f"{type(part).__name__} with parameters is used twice in the sequence: use kflr.")
            seen.add(part)
            if part is module:
                _check_no_hooks(part, f"{name}{key}.")
            yield part


def _check_no_hooks(module: nn.Module, name: str) -> None:
    """Parts are run one by one: hooks of sequences wouldn't be, and those of a layer are no part of its matrix."""
    if any(not isinstance(hook, Hook) for hooks in HOOKS for hook in getattr(module, hooks).values()):
        whose = f"module '{name.removesuffix('.')}'" if name else "the model"
        raise KroneckerError(
            f"{whose} has a hook (register_forward_hook, or one before or in the backward pass), which may change what "
            "kfra propagates through the sequence. Remove it meanwhile; or use kflr, which runs the model as it is."
        )


def _only(leaves: list[object]) -> Tensor:
    """The input of a chain, however it was given."""
    if len(leaves) != 1 or not isinstance(leaves[0], Tensor):
        raise KroneckerError(f"kfra needs a model with one tensor as its input, got {len(leaves)} values: use kflr.")
    return leaves[0]


def _recursion(objective: Objective, modules: list[nn.Module]) -> Iterator[tuple[nn.Module, torch.Size, Tensor]]:
    """Modules, the last one first, with the shape of their output ``[N, ...]`` and ``Gbar [F, F]`` there; down to the
    first that has chosen parameters.
    """
    chosen = {id(p) for p in objective.parameters.values()}
    first = next(i for i, module in enumerate(modules) if any(id(p) in chosen for p in module.parameters()))
    with objective.start.again(objective.problem):
        x = _only(with_own_inputs(objective.problem).batch.inputs.leaves).detach()
        for module in modules[:first]:  # samples may be coupled here, as nothing is propagated so far
            x = module(x)
        with Watch():
            steps: list[tuple[nn.Module, Tensor, Tensor]] = []
            for module in modules[first:]:
                leaf = x.detach().requires_grad_(x.is_floating_point())
                x = module(leaf.clone())
                steps.append((module, leaf, x))
            columns = loss_roots(x.detach(), hessian_at(objective, x), mean=True)
            curvature = _square(columns.mT)
            while steps:
                module, leaf, out = steps.pop()
                yield module, out.shape, curvature
                if steps:
                    curvature = _pulled(leaf, out, curvature)


def _pulled(leaf: Tensor, out: Tensor, curvature: Tensor) -> Tensor:
    """``mean_n J_n^T Gbar J_n``, ``[F', F']``."""
    size = leaf[0].numel()
    total = wide(leaf.new_zeros(size, size))
    for column in root(curvature).T:
        seed = column.to(out.dtype).view(out.shape[1:]).expand_as(out)
        (rows,) = torch.autograd.grad(out, leaf, seed, retain_graph=True)
        rows = wide(rows.reshape(len(rows), -1))
        total += _square(rows) / len(rows)
    return total


@kernel
def _square(rows: Tensor) -> Tensor:
    """``sum_n rows_n rows_n^T``, in the precision of the rows, in a region of autocast too."""
    return rows.T @ rows


def _outputs(module: nn.Module, layer: Layer, shape: torch.Size, curvature: Tensor, approximation: str) -> Tensor:
    """``[K, O, O]``: ``Gbar`` between the features of the output, positions summed."""
    features = layer.outputs
    last = type(module) is nn.Linear
    size = shape[1:].numel() // features
    full = curvature.reshape((size, features) * 2 if last else (features, size) * 2)
    if last:
        full = full.permute(1, 0, 3, 2)  # [O, T, O, T]
    summed = torch.einsum("otpt->op", full) if approximation == "expand" else full.sum((1, 3))
    grouped = summed.view(layer.groups, features // layer.groups, layer.groups, features // layer.groups)
    return torch.einsum("kokp->kop", grouped)
