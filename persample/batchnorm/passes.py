"""Passes through a model at one point: the same parameters, batch and random masks every time, and no trace left
behind.

Everything about a coupled batch is made of two kinds of passes: ordinary autograd through the whole batch, with
BatchNorm's statistics as explicit tensors (`Point.forward`), and the hook engine, which gives the factors of all
samples' rows (`Point.recorded`).  Every forward pass and every vector-Jacobian product is counted.  Dropout draws the
same masks in every pass; buffers (running statistics, counters), ``.grad`` and the random state stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointError

from ..batch import Batch, Tree, call_model, detached
from ..calls import Reached, reached
from ..capture import Capture
from ..collect import Collect
from ..curvature.objective import Start, named_derivatives, refuse_once_differentiable
from ..curvature.products import set_to
from ..engines.hooks import Seeds, along, forward
from ..errors import ArgumentError, CaptureError, InplaceError
from ..factors import strided
from ..losses import batch_losses
from ..problem import Emit, Problem, check_no_hooks
from ..refusals import check_complete, check_only
from ..remembered import Settings, changed, lasting
from ..state import Buffers, RandomState, random_state
from ..verify import with_own_inputs
from .statistics import CHECKPOINTED, READ, Explicit, Layer, Node, Pool, Replace, Replacement

CHUNK = 1 << 21  # numbers that several vector-Jacobian products may hold together: with more, one by one is faster

Grads = list[Tensor | None]  # None: nothing depends on that input


@dataclass
class Passes:
    """What was run so far: forward passes of the batch, and vector-Jacobian products (one of ``k`` rows at once counts
    ``k``).
    """

    forward: int = 0
    backward: int = 0
    drawn: RandomState | None = field(default=None, repr=False)  # the random state that a forward pass leaves


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass with its graph."""

    inputs: Tree
    outputs: Any
    losses: Tensor  # [N]
    nodes: list[Node]


@dataclass(frozen=True, eq=False)
class Point:
    """A model, a criterion and a batch, with the random state in which every forward pass begins."""

    problem: Problem
    start: Start
    buffers: Buffers  # in which every forward pass begins, too: "eval" is of these running statistics
    state: list[tuple[str, Any]]  # what must not change between passes
    settings: Settings  # nor these
    passes: Passes = field(default_factory=Passes)

    @staticmethod
    def of(problem: Problem) -> Point:
        if lazy := [name for name, p in problem.parameters.items() if is_lazy(p)]:
            raise ArgumentError(f"parameter '{lazy[0]}' has no values yet (a lazy module): run the model once.")
        start, buffers = Start.now(problem.model), Buffers(*problem.owners)
        return Point(problem, start, buffers, _state(problem), set_to(problem))

    def __reduce__(self) -> Any:
        same = [now == before for now, before in zip(_state(self.problem), self.state, strict=False)]
        return _copied, (self.problem, self.start, self.buffers, same, self.settings, self.passes)

    @property
    def n(self) -> int:
        return self.problem.batch.n

    @contextmanager
    def forward(
        self, pool: Pool | None = None, batch: Batch | None = None, *, inputs: bool = False
    ) -> Iterator[Forward]:
        """The losses with their graph, statistics pooled by ``pool`` (``None``: the model as it is).

        ``batch``: another one; ``inputs``: whether to differentiate with respect to them too.
        """
        problem = with_own_inputs(self.problem if batch is None else replace(self.problem, batch=batch))
        tree = problem.batch.inputs.over(lambda x, _: x.detach().requires_grad_(inputs and x.is_floating_point()))
        explicit = Explicit(pool) if pool is not None else None
        capture = Capture(problem.model, set())
        with self._same(), ExitStack() as modes:
            if explicit is not None:
                modes.enter_context(capture)
                modes.enter_context(Replace(problem.model, capture, explicit))
                capture.start(problem.batch.n, tree.tensors())
            try:
                outputs = call_model(problem.model, tree.whole())
            finally:
                capture.stop()
            batch = problem.batch
            losses = batch_losses(problem.loss_fn, batch.outputs(outputs), batch.targets, batch.n)
            modes.close()
            self.passes.drawn = random_state(problem.model)
            check_only(READ, reached([losses.grad_fn], capture), problem.parameters)
            yield Forward(tree, outputs, losses, [] if explicit is None else explicit.nodes)

    @contextmanager
    def recorded(self, by: Replacement | None = None) -> Iterator[Recorded]:
        """A forward pass of the hook engine, coupled calls replaced by ``by`` (``None``: as they are)."""
        problem = with_own_inputs(self.problem)
        capture = Capture(problem.model, {id(p) for p in problem.parameters.values()})
        if by is not None:
            mode = Replace(problem.model, capture, by)
            problem = replace(problem, model=_Under(mode, problem.model), loss_fn=_under(mode, problem.loss_fn))
        with self._same():
            outputs, losses, seeds, criterion = forward(problem, capture)
            self.passes.drawn = random_state(self.problem.model)
            calls = reached(t.grad_fn for t, *_ in seeds).calls
            followed = capture.followed
            coupled = followed.couples or followed.acts.ranks or any(call.couples for call in calls)
            yield Recorded(self, detached(outputs), losses.detach(), seeds, criterion, coupled)

    @contextmanager
    def _same(self) -> Iterator[None]:
        """Once more from the same state, and back to the one before."""
        at = self.check()
        with self.start.again(self.problem):
            self.buffers.restore()  # again() puts back those of now
            self.passes.forward += 1
            try:
                yield
            except CheckpointError as error:
                raise CaptureError(CHECKPOINTED) from error
        self.state[:] = _state(self.problem)  # some forwards switch modes
        self.settings.update(lasting(at, set_to(self.problem)))  # or count themselves, which is no setting

    def check(self) -> Settings:
        """Raise if anything has changed that results depend on, and for hooks on parameters, through which derivatives
        by autograd go; the settings as they are now.
        """
        check_no_hooks(self.problem.parameters)
        for (what, now), (_, before) in zip(_state(self.problem), self.state, strict=False):
            if now != before:
                raise _moved(what)
        if found := changed(self.settings, at := set_to(self.problem)):
            raise _moved(found[0])
        return at

    def rows(self, out: Tensor, inputs: Sequence[Tensor], step: int) -> Iterator[tuple[slice, Grads]]:
        """``d out / d inputs`` for ``out [R]``, ``step`` rows at a time: which rows, and ``[r, *shape]`` for each
        input.
        """
        for start in range(0, len(out), step):
            at = slice(start, min(len(out), start + step))
            self.passes.backward += at.stop - at.start
            if out.requires_grad and inputs:
                yield at, _pull(out, inputs, at)
            else:
                yield at, [None] * len(inputs)

    def gradient(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], *, again: bool = False
    ) -> Grads:
        """One vector-Jacobian product; ``again``: one that can be differentiated again."""
        self.passes.backward += 1
        live = [(y, s) for y, s in zip(outs, seeds, strict=True) if y.requires_grad]
        if not live or not inputs:
            return [None] * len(inputs)
        ends, starts = zip(*live, strict=True)
        if again:
            refuse_once_differentiable(ends)
        with named_derivatives():
            found = torch.autograd.grad(ends, inputs, starts, retain_graph=True, create_graph=again, allow_unused=True)
        return [None if g is None else strided(g) for g in found]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded forward pass: the rows of all samples, for any weights of the losses, by one backward pass each."""

    point: Point
    outputs: Any
    losses: Tensor  # [N], detached
    seeds: Seeds
    criterion: Tensor | None
    coupled: bool = False  # samples act on each other by what nobody differentiates through (ranks, thresholds)

    def rows(
        self, emit: Emit, weight: Tensor | None = None, *, extra: Sequence[tuple[Tensor, Tensor]] = (),
        wrt: Sequence[Tensor] = (),
    ) -> tuple[tuple[str, ...], Grads]:  # fmt: skip
        """Emit the factors for ``sum_n weight[n] l_n``, row ``m`` with respect to the parameters that sample ``m``
        uses.

        ``extra`` are pairs ``(tensor, its gradient)`` to start from besides the losses.  Returns the names of unused
        parameters, and the gradients of ``wrt``.
        """
        self.point.passes.backward += 1
        extra = [(t, g) for t, g in extra if t.requires_grad]
        ends = [t for t, *_ in self.seeds] + [t for t, _ in extra]
        starts = [g if weight is None else along(g, weight.to(g.dtype), axis) for _, g, axis in self.seeds]
        found = reached(t.grad_fn for t in ends)
        check_complete(found, self.point.problem.parameters)
        check_only(READ, found, self.point.problem.parameters)
        collect = Collect(found, self.point.problem.parameters, emit, self.point.n, release=False)
        try:
            if self.criterion is not None:
                collect.direct(self.criterion if weight is None else self.criterion * weight.to(self.criterion.dtype))
            grads = _towards(ends, starts + [g for _, g in extra], found, wrt)
            return collect.finish(), grads
        finally:
            collect.detach()


def _towards(ends: list[Tensor], starts: list[Tensor], found: Reached, wrt: Sequence[Tensor]) -> Grads:
    """Differentiate past all recorded calls, whose gradients are listened to; those of ``wrt`` are returned."""
    targets: list[Any] = [*wrt, *found.roots]
    if not ends or not targets:
        return [None] * len(wrt)
    return list(torch.autograd.grad(ends, targets, starts, allow_unused=True, retain_graph=True)[: len(wrt)])


def _moved(what: str) -> InplaceError:
    how = " (or was written to, as by load_state_dict)" if what.startswith(("parameter ", "buffer ")) else ""
    return InplaceError(
        f"{what} changed{how} since the coupling was set up, so its results would belong to different points. Ask for "
        "what you need before the change, or call persample.coupling again after it."
    )


def _copied(
    problem: Problem, start: Start, buffers: Buffers, same: list[bool], settings: Settings, passes: Passes
) -> Point:
    """A point whose tensors lie elsewhere, and count changes anew; what had changed before remains changed."""
    state = [(what, now if kept else None) for (what, now), kept in zip(_state(problem), same, strict=False)]
    return Point(problem, start, buffers, state, settings, passes)


def _state(problem: Problem) -> list[tuple[str, Any]]:
    """Versions and places of the batch and of what model and criterion are made of, and the modes of the modules.

    The running statistics of a layer that normalises by the batch say nothing about it, and change with every forward.
    """
    found: list[tuple[str, Any]] = []
    for owner, of in zip(problem.owners, ("", " of loss_fn"), strict=True):
        for path, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            dot, batchwise = f"{path}." if path else "", isinstance(module, Layer) and module.training
            found.append((f"the mode of module '{path}'{of}", module.training))
            found.append((f"the eps of module '{path}'{of}", getattr(module, "eps", None)))
            found += [(f"parameter '{dot}{name}'{of}", _place(p)) for name, p in module.named_parameters(recurse=False)]
            for name, b in module.named_buffers(recurse=False):
                found.append((f"buffer '{dot}{name}'{of}", None if batchwise else _place(b)))
    batch = [x for tree in (problem.batch.inputs, problem.batch.targets) for x, _ in tree.tensors()]
    return found + [("the batch", x._version) for x in batch]


def _place(t: Tensor) -> tuple[int, int]:
    return t._version, t.data_ptr()


class _Under(nn.Module):
    """A model with its calls under a mode."""

    def __init__(self, mode: Replace, model: nn.Module) -> None:
        super().__init__()
        self.model, self.call = model, _under(mode, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _under(mode: Replace, f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return f(*args, **kwargs)

    return call


def _pull(out: Tensor, inputs: Sequence[Tensor], at: slice) -> Grads:
    """Some rows of a Jacobian, at once where that is possible."""
    seeds = out.detach().new_zeros(at.stop - at.start, len(out))
    seeds[:, at].fill_diagonal_(1)
    if len(seeds) > 1:
        try:
            return list(
                torch.autograd.grad(out, inputs, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True)
            )
        except RuntimeError:  # a backward that vmap doesn't support
            pass
    with named_derivatives():
        found = [torch.autograd.grad(out, inputs, seed, retain_graph=True, allow_unused=True) for seed in seeds]
    return [None if rows[0] is None else torch.stack([strided(g) for g in rows]) for rows in zip(*found, strict=True)]
