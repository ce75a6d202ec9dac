"""What is true of a case, by plain autograd on one sample at a time.

Nothing here uses the library. `Rows` is the answer to compare every engine with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .case import Problem, call, sample, size


@dataclass(frozen=True)
class Rows:
    """Rows {name: [N, *P]} and losses [N] of a problem, and the parameters that no loss depends on."""

    rows: dict[str, Tensor]
    losses: Tensor
    unused: tuple[str, ...]

    @property
    def flat(self) -> Tensor:
        return torch.cat([matrix(r) for r in self.rows.values()], 1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """[D, *rest] -> {name: [*P, *rest]}."""
        pieces = flat.split([r[0].numel() for r in self.rows.values()])
        return {k: x.reshape((*r.shape[1:], *x.shape[1:])) for (k, r), x in zip(self.rows.items(), pieces, strict=True)}


def matrix(r: Tensor) -> Tensor:
    """[N, *P] -> [N, |P|], also for P = () and for empty parameters."""
    return r.reshape(len(r), r[0].numel())


def lone(p: Problem, n: int, batch_dim: int) -> tuple[Any, Tensor]:
    """Outputs and loss of sample n, alone."""
    outputs = call(p.model, sample(p.inputs, n, batch_dim))
    loss = p.loss_fn(outputs, sample(p.targets, n, batch_dim))
    if loss.shape not in [(), (1,)]:
        raise AssertionError(f"the loss of a sample alone has shape {tuple(loss.shape)}")
    return outputs, loss.sum()


def rows(p: Problem, batch_dim: int = 0) -> Rows:
    """The definition: the gradient of the loss of each sample alone."""
    parameters = {k: v for k, v in p.model.named_parameters() if v.requires_grad}
    found: list[dict[str, Tensor | None]] = []
    losses = []
    for i in range(size(p.inputs, batch_dim)):
        loss = lone(p, i, batch_dim)[1]
        grads: list[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
        found.append(dict(zip(parameters, grads, strict=True)))
        losses.append(loss.detach())
    stacked = {k: torch.stack([_or_zero(g[k], v) for g in found]) for k, v in parameters.items()}
    return Rows(stacked, torch.stack(losses), tuple(k for k in parameters if all(g[k] is None for g in found)))


def _or_zero(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of an output, also of a dataclass."""
    if hasattr(tree, "__dataclass_fields__") and not isinstance(tree, dict):
        tree = list(vars(tree).values())
    return [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
