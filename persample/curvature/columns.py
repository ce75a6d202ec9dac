"""One recorded forward pass, and a backward pass for each column of output gradients: what Kronecker factors and
diagonals of Fisher and Gauss-Newton matrices are made of.

A column ``u`` is a gradient for the outputs, ``[N, ...]``: of the losses at the given targets ("empirical"), at
targets drawn from the model ("mc"), or one of those of a square root of the loss Hessian, ``sum_j u_nj u_nj^T = H_n``
("exact").  Each backward pass gives the factors of the rows ``J_n^T u_n`` of every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_samples
from ..calls import Call, Reached, leaves_of, reached
from ..capture import Capture
from ..collect import Collect
from ..engines import hooks
from ..errors import ArgumentError, LossError
from ..problem import Emit, Problem
from ..refusals import check_complete, check_uncoupled
from ..remembered import verified
from ..state import restored, seed_of
from ..verify import chosen, run_verified, with_own_inputs
from .kronecker import eigh
from .likelihood import check_finite, identify, wide
from .matrices import hessian_at, single_output
from .objective import Objective
from .products import gradient

Column = list[tuple[Tensor, Tensor]]  # where the backward starts, and with which gradient
HessianAt = Callable[[Tensor], Callable[[Tensor], Tensor]]  # f [N, ...] -> (v -> H(f) v)


@dataclass(frozen=True)
class Passes:
    """A recorded forward pass, and the columns by which it is to be differentiated."""

    objective: Objective
    found: Reached
    columns: list[Column]

    def uses(self, parameter: Tensor) -> int:
        """How many calls use it."""
        return sum(call.wants(parameter) for call in self.found.calls)

    def sweep(self, parameters: dict[str, nn.Parameter], emit: Emit) -> set[str]:
        """One backward pass per column, each of which emits the rows of these parameters; which of them a column gave
        no gradient.
        """
        ids, unused = {id(p) for p in parameters.values()}, set[str]()
        found = replace(self.found, calls=[call for call in self.found.calls if ids & _parameters(call)])
        for column in self.columns if parameters else ():
            ends, seeds = zip(*column, strict=True)
            collect = Collect(found, parameters, emit, self.objective.problem.batch.n, release=False)
            try:
                collect.differentiate(ends, seeds, retain_graph=True)
                unused.update(collect.finish())
            finally:
                collect.detach()
        return unused


def _parameters(call: Call) -> set[int]:
    """Ids of what a call uses, itself or in derived tensors."""
    return {id(p) for s in call.shared for p in ([s.tensor] if s.derivation is None else leaves_of(s.derivation))}


@contextmanager
def passes(
    objective: Objective, type: str, samples: int, generator: torch.Generator | None, verify: bool | None
) -> Iterator[Passes]:
    """A forward pass under the hook engine's capture, with its columns."""
    check_samples(samples)
    objective.silent[0] |= _verify(objective.problem, verify)  # which warns
    seed = seed_of(generator) if type == "mc" else None  # outside of the forward pass, which restores random states
    parameters = objective.parameters
    capture = Capture(objective.problem.model, {id(p) for p in parameters.values()})
    with objective.forward(capture) as outputs:
        ends = [x for x, _ in objective.problem.batch.outputs(outputs).tensors()]
        found = reached(x.grad_fn for x in ends)
        check_complete(found, parameters)
        check_uncoupled(found, parameters)
        yield Passes(objective, found, _columns(objective, outputs, type, samples, seed))


def _verify(problem: Problem, verify: bool | None) -> bool:
    """Hold a row of the per-sample gradients, which have the same tokens, against that sample alone, if this is due."""
    if verify not in (None, True, False):
        raise ArgumentError(f"verify must be True, False or None (at the first call), got {verify!r}")
    if due := verify or (verify is None and not verified(problem, "hooks")):
        problem = with_own_inputs(problem)  # which a forward may change in place
        with restored(*problem.owners):
            run = lambda emit, couplers: hooks(problem, emit, couplers=couplers)  # noqa: E731
            run_verified(problem, "hooks", lambda *_: None, run, chosen(problem.batch.n, 0, problem.batch.sizes))
    return due


def _columns(objective: Objective, outputs: Any, type: str, samples: int, seed: int | None) -> list[Column]:
    ends, leaves, losses = objective.loss_at(outputs)
    if type == "empirical":
        return [list(zip(ends, (g.detach() for g in gradient([losses.sum()], leaves, None)), strict=True))]
    end, axis = single_output(objective, outputs)
    f = end.detach().movedim(axis, 0)
    if seed is not None:
        drawn = identify(f, hessian_at(objective, outputs)).draws(samples, seed) / samples**0.5
    else:
        drawn = loss_roots(f, hessian_at(objective, outputs)).movedim(2, 0).to(f.dtype)
    return [[(end, u.view_as(f).movedim(0, axis))] for u in drawn]


def loss_hessians(f: Tensor, hessian_at: HessianAt) -> Tensor:
    """``H_n [N, F, F]``, the Hessian of every sample's loss with respect to its ``F`` output entries."""
    product = hessian_at(f)
    units = torch.eye(f[0].numel(), dtype=wide(f).dtype, device=f.device)
    columns = [product(e.view(f.shape[1:]).expand_as(f).contiguous()).reshape(len(f), -1) for e in units]
    return torch.stack(columns, 2)


def loss_roots(f: Tensor, hessian_at: HessianAt, mean: bool = False) -> Tensor:
    """``S [N, F, r]`` with ``S_n S_n^T = H_n``; or ``[F, r]``, of their ``mean``.

    Where a classifier is sure, ``H_n`` is the difference of numbers much larger than it, and not positive beyond their
    rounding.  How large they are is what the Hessian at outputs of zero tells, where nothing is saturated.
    """

    def hessians(f: Tensor) -> Tensor:
        found = loss_hessians(f, hessian_at)
        return found.mean(0) if mean else found

    def scale() -> Tensor:
        return hessians(torch.zeros_like(f)).nan_to_num(0, 0, 0).flatten(-2).abs().amax(-1)

    matrices = hessians(f)
    check_finite(matrices)
    return root(matrices, scale)


def root(matrices: Tensor, scale: Callable[[], Tensor] | None = None) -> Tensor:
    """``S [..., F, r]`` with ``S S^T`` the given positive semi-definite matrices ``[..., F, F]``, each up to the
    rounding of its largest eigenvalue, or of ``scale [...]``.
    """
    values, vectors = eigh(matrices)
    least, eps = values[..., 0], torch.finfo(values.dtype).eps
    allowed = 1e4 * eps * values.abs().amax(-1)
    if scale is not None and bool((least < -allowed).any()):
        allowed = torch.maximum(allowed, 64 * eps * scale())
    if bool((bad := least < -allowed).any()):
        raise LossError(
            f"the loss is not convex in the outputs (its Hessian has an eigenvalue {float(least[bad].min()):.3g}), so "
            "there is no square root of it to propagate: use type='empirical', or ggn as an operator."
        )
    needed = (values > 0).flatten(0, -2).any(0) if values.ndim > 1 else values > 0
    needed[-1] = True  # the largest; where the Hessian is zero (absolute errors), a column of zeros
    scaled: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return scaled[..., needed]
