"""Hessian, Gauss-Newton and Fisher products: of the whole batch, by autograd alone.

With ``l_n`` the unscaled loss of sample ``n``, ``f_n`` the model's output, ``J_n = df_n/dtheta`` and ``c`` the
reduction (``1/N`` for "mean", 1 for "sum"):

=================  ==========================================================================
hvp                ``c sum_n d2 l_n / dtheta2``
ggn                ``c sum_n J_n^T H_n J_n``, ``H_n = d2 l_n / df_n2``
fisher             ``c sum_n J_n^T E[u_n u_n^T] J_n``, ``u_n`` gradients at sampled targets
empirical_fisher   ``c sum_n g_n g_n^T``, ``g_n = d l_n / dtheta`` at the given targets
=================  ==========================================================================

All but the first are ``c J^T M J`` with ``J`` the Jacobian of *everything the batch returns* with respect to the
parameters.  No sample is taken apart, so nothing changes where samples are coupled: under BatchNorm in training mode
these are exactly the matrices of the batch loss, its sum structure kept.  ``J v`` is the derivative of ``J^T u`` with
respect to ``u`` (two reverse passes: any operation that can be differentiated twice is good enough).

That holds where the backward pass is linear and autograd can follow it.  Hooks, and the backward of an
``autograd.Function``, may be neither, so ``w^T (J v) = (J^T w)^T v`` is checked: once at ``v = J^T w``, which is far
from zero, and for every product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, InplaceError, VerificationError
from ..factors import strided
from ..problem import Problem
from ..remembered import Settings, changed, lasting, settings
from ..rounding import slack, tolerance
from ..state import Buffers, restored
from .objective import Objective, named_derivatives, refuse_once_differentiable
from .operator import Operator, unflatten

Tensors = Sequence[Tensor]
Middle = Callable[[Tensors], Tensors]


def operator(title: str, objective: Objective, apply: Callable[[Tensor], Tensor]) -> Operator:
    """An `Operator` over the objective's parameters."""
    samples = objective.problem.batch.n
    parameters = objective.parameters
    kind = reduce(torch.promote_types, (p.dtype for p in parameters.values()))
    shapes, device = {name: p.shape for name, p in parameters.items()}, next(iter(parameters.values())).device
    products = Products(title, apply)
    return Operator(title, shapes, kind, device, products, samples=samples, reduction=objective.reduction)


@dataclass(frozen=True, eq=False)
class Products:
    """What an operator computes, of the one model and batch that it was made for: copies share it, as they would a
    function, and there are no pickles.
    """

    title: str
    apply: Callable[[Tensor], Tensor]

    def __call__(self, matrix: Tensor) -> Tensor:
        return self.apply(matrix)

    def __deepcopy__(self, memo: Any) -> Products:
        return self

    def __reduce__(self) -> Any:
        raise ArgumentError(
            f"{self.title} is known by products with a model and a batch, and can't be pickled. Pickle these, and make "
            "it again there; or pickle the matrix itself, dense()."
        )


def hessian(objective: Objective) -> Callable[[Tensor], Tensor]:
    """``V [D, k] -> c sum_n (d2 l_n / dtheta2) V``, by differentiating the gradient."""
    parameters = list(objective.parameters.values())

    def apply(matrix: Tensor) -> Tensor:
        with objective.forward() as outputs:
            loss = objective.losses(outputs).sum() * objective.scale
            grads = gradient([loss], parameters, None, create_graph=True)
            return _columns(objective, matrix, lambda v: gradient(grads, parameters, v))

    return pinned(objective.problem, apply)


def sandwich(objective: Objective, middle: Callable[[object], tuple[Tensors, Middle]]) -> Callable[[Tensor], Tensor]:
    """``V [D, k] -> c J^T M J V``: ``middle(outputs)`` says whose Jacobian ``J`` is, and what ``M`` does."""
    parameters = list(objective.parameters.values())
    model, checked = objective.problem.model, False

    def apply(matrix: Tensor) -> Tensor:
        nonlocal checked
        with objective.forward() as outputs:
            ends, multiply = middle(outputs)
            seeds = [_generic(x).requires_grad_() for x in ends]
            pulled = gradient(ends, parameters, seeds, create_graph=True)  # J^T u, linear in u
            if not checked:
                v = [F.normalize(x.detach().flatten(), dim=0).view_as(x) for x in pulled]
                _check_adjoint(model, ends, seeds, gradient(pulled, seeds, v), pulled, v)
                checked = True

            def product(v: Tensors) -> Tensors:
                pushed = gradient(pulled, seeds, v)  # J v
                weighted = [objective.scale * x for x in multiply(pushed)]
                result = gradient(ends, parameters, weighted)
                _check_adjoint(model, ends, weighted, pushed, result, v)
                return result

            return _columns(objective, matrix, product)

    return pinned(objective.problem, apply)


def _generic(x: Tensor) -> Tensor:
    """A tensor of that shape and type without zeros, to differentiate at: some backward passes take its logarithm."""
    u = torch.arange(x.numel(), dtype=torch.float32, device=x.device).sin().add_(0.1)
    return u.view(x.shape).to(x.dtype)


def _check_adjoint(model: nn.Module, ends: Tensors, w: Tensors, pushed: Tensors, pulled: Tensors, v: Tensors) -> None:
    """Raise where ``w^T (J v)`` with ``pushed = J v`` is not ``(J^T w)^T v`` with ``pulled = J^T w``."""
    one, other, kinds = _inner(w, pushed), _inner(pulled, v), [x.dtype for x in (*ends, *v)]
    off = (one - other).abs()
    if off <= tolerance(*kinds) * other.abs() or not (_norm(pulled) * _norm(v)).isfinite():
        return  # or the model has diverged
    if off.isfinite():  # where J v is nothing but rounding errors, what is nothing is told by all parameters
        whole = gradient(ends, [p for p in model.parameters() if p.requires_grad], w)
        tiny = max(torch.finfo(kind).tiny for kind in kinds) * (_norm(w, 1) + _norm(v, 1))
        if off <= max(map(slack, kinds)) * _norm(whole) * _norm(v) + tiny:
            return
    what = "not linear, or computes with detached values" if off.isfinite() else "NaN or infinite at gradients of zero"
    raise VerificationError(
        f"the Jacobian J of the model is had by differentiating its backward pass, which is {what}: w^T (J v) = "
        f"{float(one):.6g} and (J^T w)^T v = {float(other):.6g}. Usual causes: a hook (register_hook) or the backward "
        "of an autograd.Function, such as an implicit gradient, that autograd can't follow; or half precision, in "
        "which gradients vanish. Write it with operations that can be differentiated again, or use what takes one "
        "backward pass: empirical_fisher(..., method='rows'), kfac."
    )


def _inner(a: Tensors, b: Tensors) -> Tensor:
    """The real inner product, 0-dim."""
    products = [torch.vdot(_wide(x), _wide(y)).real.double() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum()


def _norm(a: Tensors, p: float = 2) -> Tensor:
    norms: Tensor = torch.stack([_wide(x).norm(p).double() for x in a]).norm(p)
    return norms


def _wide(x: Tensor) -> Tensor:
    """Flat, in no less than single precision."""
    return x.detach().flatten().to(torch.promote_types(x.dtype, torch.float32))


def pinned(
    problem: Problem, apply: Callable[[Tensor], Tensor], known: Settings | None = None
) -> Callable[[Tensor], Tensor]:
    """``apply``, always at the point where things stand now: buffers begin as they are now, as any forward pass may
    move running statistics; after other changes, `InplaceError`.  ``known`` are the `set_to` to hold on to, if
    ``apply`` doesn't run the model.
    """
    before, buffers, own = _point(problem), Buffers(*problem.owners), known or set_to(problem)

    def same(matrix: Tensor) -> Tensor:
        if frozen := [name for name, p in problem.parameters.items() if not p.requires_grad]:
            raise InplaceError(
                f"parameter '{frozen[0]}' does not require grad any more, so that nothing can be differentiated with "
                "respect to it. Take all products before it is frozen, or requires_grad_(True) again."
            )
        if (now := _point(problem)) != before:
            raise _moved(next((x or y)[0] for x, y in zip_longest(now, before) if x != y))
        nonlocal own
        at = set_to(problem)
        with restored(*problem.owners, begin=buffers):
            product = apply(matrix)
        at = lasting(at, set_to(problem))  # what a pass changes by itself is no setting: counters
        if found := changed(own, at):
            raise _moved(found[0])
        own = lasting(own, at)
        return product

    return same


def _moved(what: str) -> InplaceError:
    return InplaceError(
        f"{what} changed since the operator was made, so its products would belong to different points. Take all "
        "products before the change, or make the operator again after it."
    )


def set_to(problem: Problem) -> Settings:
    """What model and criterion are set to: numbers, words and functions among the attributes of their modules."""
    both = (("model", problem.model), ("loss_fn", problem.loss_fn))
    return {
        f"{whose}: '{key}'": value
        for whose, module in both
        if isinstance(module, nn.Module)
        for key, value in settings(module).items()
    }


def _point(problem: Problem) -> list[tuple[str, Any]]:
    """What the batch loss is a function of, by name: what is in its tensors, and the modes of modules."""
    found: list[tuple[str, Any]] = []
    for module, whose in ((problem.model, "model"), (problem.loss_fn, "loss_fn")):
        if isinstance(module, nn.Module):
            found += [(f"{whose}: parameter '{k}'", _content(p)) for k, p in module.named_parameters()]
            found += [(f"{whose}: the mode of module '{k}'", m.training) for k, m in module.named_modules()]
    if isinstance(problem.loss_fn, nn.Module):  # those of the model are put back
        found += [(f"loss_fn: buffer '{k}'", _content(b)) for k, b in problem.loss_fn.named_buffers()]
    for tree, what in ((problem.batch.inputs, "an input"), (problem.batch.targets, "a target")):
        found += [(f"{what} of shape {tuple(x.shape)}", _content(x)) for x, _ in tree.tensors()]
    return found


def _content(x: Tensor) -> tuple[int, int]:
    """The version, and a checksum: fused optimizers, and writes through ``.data`` or numpy, leave the version alone."""
    checksum = 0
    if x.numel() > 0:
        with torch.no_grad(), contextlib.suppress(NotImplementedError):  # of sparse tensors, for instance
            checksum = int(torch.hash_tensor(torch.view_as_real(x) if x.is_complex() else x).view(torch.int64))
    return x._version, checksum


def loss_curvature(objective: Objective) -> Callable[[object], tuple[Tensors, Middle]]:
    """``M = blockdiag(H_n)``: the exact Hessian of the losses with respect to the outputs."""

    def middle(outputs: object) -> tuple[Tensors, Middle]:
        ends, leaves, losses = objective.loss_at(outputs)
        slopes = gradient([losses.sum()], leaves, None, create_graph=True)
        return ends, lambda v: gradient(slopes, leaves, v)

    return middle


def gradient(
    outputs: Tensors, inputs: Tensors, seeds: Iterable[Tensor] | None, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """``autograd.grad`` that keeps the graph, with zeros where nothing depends on an input.

    Raises:
        CaptureError: where a gradient is to be differentiated once more, and can't be.
    """
    given = [None] * len(outputs) if seeds is None else list(seeds)
    live = [(y, s) for y, s in zip(outputs, given, strict=True) if y.requires_grad]
    if not live:
        return tuple(map(torch.zeros_like, inputs))
    ends, starts = zip(*live, strict=True)
    if create_graph:
        refuse_once_differentiable(ends, inputs)
    with named_derivatives():
        found = torch.autograd.grad(
            ends, inputs, starts, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    return tuple(torch.zeros_like(x) if g is None else strided(g) for x, g in zip(inputs, found, strict=True))


def _columns(objective: Objective, matrix: Tensor, product: Callable[[Tensors], Tensors]) -> Tensor:
    """Column by column, through one graph."""
    parameters = objective.parameters
    shapes = {name: p.shape for name, p in parameters.items()}
    results = torch.empty_like(matrix)
    for i, column in enumerate(matrix.T):
        pieces = unflatten(column, shapes)
        v = [pieces[name].to(p.dtype) for name, p in parameters.items()]
        results[:, i] = torch.cat([x.detach().reshape(-1).to(matrix.dtype) for x in product(v)])
    return results
