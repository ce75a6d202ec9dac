"""The hook engine: record the calls in which parameters meet samples, differentiate once, factor on arrival.

The backward runs towards the earliest recorded outputs and no further, so autograd computes no weight gradient.  Each
call's output gradient becomes factors as it arrives (`persample.collect`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Tree, call_model, detached, flatten, suspended, unflatten
from ..calls import reached
from ..capture import Capture
from ..collect import Collect
from ..errors import PersampleError, SampleAxisError
from ..losses import (
    check_not_broadcast,
    check_outputs,
    ignored,
    is_per_sample,
    lone_losses,
    reduced,
    unreduced,
    unrelated,
    valued,
    warn_if_not_mean,
)
from ..problem import Emit, Pass, Problem, check_no_hooks
from ..refusals import check_complete, check_uncoupled
from ..state import restored


def hooks(problem: Problem, emit: Emit, *, couplers: Collection[int] = ()) -> Pass:
    """One forward and one backward pass of the whole batch;
    ``couplers``: see `Capture`.
    """
    wanted = {id(p) for p in problem.parameters.values()}
    capture = Capture(problem.model, wanted, couplers=couplers, once=True)
    with torch.enable_grad():
        outputs, losses, seeds, criterion = forward(problem, capture)
    found = reached((t.grad_fn for t, *_ in seeds), capture)
    check_no_hooks(problem.parameters)
    check_complete(found, problem.parameters)
    check_uncoupled(found, problem.parameters)
    collect = Collect(found, problem.parameters, emit, problem.batch.n, release=True)
    try:
        if criterion is not None:
            collect.direct(criterion)
        if found.roots:
            tensors, grads, _ = zip(*seeds, strict=True)
            collect.differentiate(tensors, grads)
        unused = collect.finish()
    finally:
        collect.detach()
    acts = capture.followed.acts
    return Pass(
        losses.detach(),
        detached(outputs),
        unused,
        acts.coupled or any(call.couples for call in found.calls),
        capture.path,
        acts.totals,
        acts.hidden,
        bool(acts.read),
        acts.ragged or any(type(value) is int for value in acts.read),
        collect.served_by(),
    )


Seeds = list[tuple[Tensor, Tensor, int | None]]  # where the backward starts, with which gradient, and its sample axis


def forward(problem: Problem, capture: Capture) -> tuple[Any, Tensor, Seeds, Tensor | None]:
    """Outputs, losses ``[N]``, the seeds of the backward pass, and the criterion's own graph where it is a separate
    one.
    """
    batch, followed = problem.batch, capture.followed
    inputs = batch.inputs.over(lambda x, _: x.detach())  # nobody's gradient, the inputs' included, is touched
    try:
        with capture, eager():
            capture.start(batch.n, [*inputs.tensors(), *batch.targets.tensors()])
            outputs = call_model(problem.model, inputs.whole())
            check_outputs(problem.loss_fn, outputs)
            targets = batch.targets.whole()
            ordered = whole = None
            acts = replace(followed.acts)
            if batch.targets.axes == [0] and isinstance(batch.output_dim, int) and batch.output_dim == 0:
                with torch._C.DisableTorchFunction():  # losses are in the order of outputs: nobody has to follow
                    if isinstance(outputs, Tensor) and followed.is_sampled(outputs):
                        ordered = whole = unreduced(problem.loss_fn, outputs, targets, batch.n)
            if whole is None:  # containers of its own, which it may take things out of
                own = outputs if isinstance(outputs, Tensor) else unflatten(*flatten(outputs))
                whole = valued(problem.loss_fn, own, targets)
        # outside of the mode, to which every attribute of a tensor is a call
        if each := is_per_sample(whole, batch.n):
            followed.check_order(whole if ordered is None else outputs)
            followed.check_apart(whole if ordered is None else outputs)
        tree = batch.outputs(outputs)
        shared = [i for i, x in enumerate(tree.leaves) if tree.axes[i] is not None and not followed.is_sampled(x)]
        reach = {i: x for i, x in enumerate(tree.leaves) if isinstance(x, Tensor) and x.requires_grad}
        ends = {i: x for i, x in reach.items() if followed.is_sampled(x)}  # the others are parameters of the criterion
    finally:
        capture.stop()
    if not each:
        followed.acts = acts  # samples meet in the criterion's number only, which is thrown away
    if shared and not each:
        tree = told_apart(problem, tree, shared)
    if ordered is None:
        check_not_broadcast(problem.loss_fn, whole, tree, batch.targets, batch.n)
    if each:
        return outputs, whole, [(whole, torch.ones_like(whole), 0)] if whole.requires_grad else [], None
    losses, seeds = _apart(problem, tree, ends, whole)
    return outputs, losses, seeds, losses


def _apart(problem: Problem, tree: Tree, ends: dict[int, Tensor], whole: Tensor) -> tuple[Tensor, Seeds]:
    """The losses ``[N]`` behind a criterion that returns ``whole``, in a graph of their own, and their gradients in
    those outputs that are the samples' (``ends``).
    """
    batch = problem.batch
    cut = {i: x.detach().requires_grad_() for i, x in ends.items()}
    tree = Tree([cut.get(i, x) for i, x in enumerate(tree.leaves)], tree.spec, tree.axes)
    losses = lone_losses(problem.loss_fn, tree, batch.targets, batch.n)
    bad = ignored(problem.loss_fn, losses, tree, batch.targets)
    if bad is None:
        warn_if_not_mean(problem.loss_fn, whole, losses, tree, batch.targets)
    else:
        losses = losses.masked_fill(bad, 0)
    seeds: Seeds = []
    if cut and losses.requires_grad:
        grads = torch.autograd.grad(
            losses, list(cut.values()), torch.ones_like(losses), allow_unused=True, retain_graph=True
        )
        if all(g is None for g in grads):
            raise unrelated()
        for i, g in zip(cut, grads, strict=True):
            if g is not None and tree.axes[i] is None:
                raise reduced([tuple(ends[i].shape)], batch.n)
            if g is not None:
                seeds.append((ends[i], g if bad is None else along(g, ~bad, tree.axes[i]), tree.axes[i]))
    return losses, seeds


def told_apart(problem: Problem, tree: Tree, doubtful: list[int]) -> Tree:
    """The outputs, with no sample axis where an output that was computed from no sample has the size of the batch by
    chance (class centres): where it is of this size for another number of samples too.
    """
    batch, axes = problem.batch, list(tree.axes)
    others = batch.select(torch.zeros(2 if batch.n == 1 else 1, dtype=torch.long, device="cpu"))
    with suspended(problem.model), restored(*problem.owners), torch.enable_grad():  # the model may hook its gradients
        try:
            leaves = flatten(call_model(problem.model, others.inputs.map(lambda x, _: x.detach())))[0]
        except (PersampleError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise SampleAxisError(
                f"whether an output of shape {tuple(tree.leaves[doubtful[0]].shape)} has the size of the batch by "
                f"chance is told by another number of samples, and the model, which runs with {batch.n}, doesn't run "
                f"with {others.n} ({type(error).__name__}: {error}). Let it take any number of samples, or return "
                "nothing that isn't the samples'; or let loss_fn return [N], and use verify=False for the rows within "
                "this batch."
            ) from error
    for i in doubtful if len(leaves) == len(axes) else ():
        if isinstance(leaves[i], Tensor) and leaves[i].shape == tree.leaves[i].shape:
            axes[i] = None
    return Tree(tree.leaves, tree.spec, axes)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Runs compiled submodules as they were written, if there may be any: calls inside compiled regions can't be
    seen.  The switch is one for all threads: the first throws it, the last puts it back.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _LOCK:
        if not _STANCES:
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
        else:
            stance = _STANCES[-1]
        _STANCES.append(stance)
    try:
        yield
    finally:
        with _LOCK:
            _STANCES.pop()
            if not _STANCES:
                stance.__exit__(None, None, None)


_LOCK = threading.Lock()
_STANCES: list[Any] = []  # the same, for each that is inside


def along(g: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """``g`` with every sample times its weight; zero stays zero, also where ``g`` isn't finite."""
    if axis is None:
        return g
    shape = [-1 if a == axis else 1 for a in range(g.ndim)]
    scaled = g * weight.view(shape)
    return scaled.masked_fill((weight == 0).view(shape), 0)
