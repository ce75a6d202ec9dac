"""What a persistent handle of `extend` does: someone else calls ``backward()``, and it listens.

The first gradient that arrives at a recorded call begins a collection of that backward's rows, the end of the backward
completes it, and the callback gets the result.  A backward that isn't a whole one (towards some inputs only, of an
earlier backward, with another in its middle) has no rows, and is skipped with a warning or refused.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .asked import Asked
from .batch import flatten
from .calls import CHECKED, Call, Reached, behind, metadata, reached
from .collect import Collect
from .errors import ArgumentError, CaptureError, SampleAxisError, warn
from .gradients import Sink
from .problem import Pass
from .refusals import check_complete, check_uncoupled, couplers, parameters_of
from .statistics_run import Request

Reduction = str | float | Callable[[], float] | None


class Listener:
    """Collects the rows of every backward through calls of ``owner``, and hands them to ``on_backward``."""

    def __init__(
        self,
        on_backward: Callable[[Any], None],
        reduction: Reduction,
        quantities: list[Request] | None,
        owner: Any,
        asked: Asked,
        asleep: Callable[[], bool],
    ) -> None:
        """``asked``: the parameters; ``asleep``: whether this thread makes passes that are not the user's."""
        if not callable(on_backward):
            raise ArgumentError(f"on_backward must be a function of the result, got {on_backward!r}.")
        if not callable(reduction) and reduction not in ("sum", "mean"):
            _number(reduction)
        self.on_backward, self.reduction, self.quantities = on_backward, reduction, quantities
        self.owner, self.asleep = owner, asleep
        self.asked = asked  # in the last forward
        self.outputs: Any = None  # of the last forward
        self._outside: list[str] = []  # parameters that act outside of the forward
        self._coupled = False  # a forward since the last report, though not for these parameters
        self._reported = False  # a backward has come through the last forward
        self._lock = threading.Lock()
        self._calls: list[weakref.ref[Call]] = []
        self._many = 0  # of these, when those that are gone were last looked for
        self.running: list[weakref.ref[Call]] = []  # those of a forward, or a with-block, that goes on
        self._collect: Collect | None = None
        self._sink: Sink | None = None
        self._displaced: set[int] = set()  # backwards in the middle of which another began
        self._spoilt = -1  # a backward that differentiates an earlier one
        self._task = -1  # the backward that it collects
        self._of = asked  # in the forward that it is of
        self._ends = -1  # the backward whose end is awaited
        self._endings: dict[int, weakref.ref[Any]] = {}  # told when backwards are over
        self._arrived: list[Call] = []
        self._from: tuple[int, list[Any]] = -1, []  # a backward, and the outputs of forwards that it came through
        self._creates = False  # that backward is recorded for differentiation

    def forward_ends(self, output: Any, coupled: bool) -> None:
        """The backward to come may be of what this forward has computed."""
        self.check(output, coupled)
        self._calls += self.running
        self.running = []
        self._many = alive(self._calls, self._many)

    def check(self, output: Any, coupled: bool) -> None:
        """Raise for outputs that don't have gradients of single samples; be told when a backward comes to them.

        ``coupled``: by what nobody differentiates through (a frozen backbone).
        """
        leaves = flatten(output)[0]
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        nodes = {t.grad_fn for t in tensors if t.grad_fn is not None}
        parameters = self.asked.parameters
        found = reached(nodes, self.owner, self.asked)  # a state goes through all forwards before: each is walked once
        used = found.leaves.union(id(t) for t in tensors if t.grad_fn is None)
        if any(id(p) in used for p in parameters.values()):
            for t in tensors:
                self._check_sampled(t)
        check_complete(found, parameters)
        coupling = couplers(found, parameters)
        if coupling and all(couplers(reached([node], self.owner), parameters) for node in nodes):
            check_uncoupled(found, parameters)  # or else the backward tells, by where it goes
        self._coupled = self._coupled or coupled
        for node in nodes:
            if self.asked not in (checked := metadata(node).setdefault(CHECKED, set())):
                node.register_prehook(self._passes)
                if not coupling:
                    checked.add(self.asked)
        for t in inside(leaves):  # nobody can tell what they are: the end of the backward looks at what led to them
            if t.grad_fn is not None:
                t.grad_fn.register_prehook(self._passes)

    def _check_sampled(self, t: Tensor) -> None:
        """Raise for an output that is computed from parameters only."""
        calls, leaves = ([], [t]) if t.grad_fn is None else behind(t)
        name = next((name for name, p in self.asked.parameters.items() if any(p is leaf for leaf in leaves)), "")
        if name and not calls:
            raise CaptureError(
                f"an output of shape {tuple(t.shape)} is computed from parameter '{name}' and from no sample, so what "
                "comes back to it in a backward is the gradient of all losses together. Use a with-block and "
                "gradients(losses), or leave the parameter out by params=."
            )

    def _passes(self, grads: Any) -> None:
        """A backward has come to an output of a forward."""
        if not self.asleep():
            task = torch._C._current_graph_task_id()
            if task != self._from[0]:
                self._from = task, []
            self._from[1].append(torch._C._current_autograd_node())

    def forget(self) -> None:
        """Listen to nothing any more."""
        for call in self._live():
            call.listener = None
        self._calls, self.running, self.outputs, self._collect, self._from = [], [], None, None, (-1, [])

    def _live(self) -> list[Call]:
        return [call for ref in [*self._calls, *self.running] if (call := ref()) is not None]

    def begun(self, call: Call, task: int) -> None:
        """A backward has come to a recorded call: be there when it ends, and when it goes through derivations."""
        if task != self._ends and not self.asleep():
            self._ends = task
            ends = partial(self._finish, task)
            torch.autograd.Variable._execution_engine.queue_callback(ends)
            self._endings[task] = weakref.ref(ends, lambda _: self._ended(task))
            if call.shared and len(call.outputs) > 1:  # that may not all have a gradient
                with self._lock:
                    self._collecting(call, task)

    def _ended(self, task: int) -> None:
        """That backward is over: where it raised, nobody else says so, and what it has led to would be held on to."""
        del self._endings[task]
        if self._task == task:
            if self._collect is not None:
                self._collect.detach()
            self._collect, self._sink, self._arrived, self._from = None, None, [], (-1, [])

    def listen(self, call: Call, grads: Any) -> None:
        """The first arrival of a backward begins a collection; the end of that backward completes it."""
        if self.asleep():
            return
        if not call.asked.parameters:  # a model that is frozen for a while
            return
        if call.couples:  # in the loss, or what leads to one of several outputs
            check_uncoupled(Reached([call]), call.asked.parameters)
            self._coupled = True
        task = torch._C._current_graph_task_id()
        task = self._ends if task == -1 else task  # at the end of that backward
        with self._lock:
            collect = self._collecting(call, task)
            self._arrived.append(call)
        if call.shared and call.layout.n != collect.n:
            raise SampleAxisError(
                f"this backward is of losses of {collect.n} and of {call.layout.n} samples, so its rows are not "
                "those of one batch: call backward() for each of them."
            )
        if not call.asked.same(self._of):
            raise CaptureError(
                "this backward is of two forwards between which parameters of the model were replaced, added, frozen "
                "or thawed, so there are no rows that are of both: call backward() for each of them."
            )
        collect.arrive(call, grads)

    def _collecting(self, call: Call, task: int) -> Collect:
        """The collection of this backward."""
        if task in self._displaced:
            raise CaptureError(
                "another backward of the extended model ran in the middle of this one, so its rows are lost. Let them "
                "take turns, or give each thread a copy of the model. Where a hook of the model differentiates it "
                "(implicit layers), take a with-block, or persample.gradients."
            )
        if self._collect is None or task not in (self._task, -1):
            if self._collect is not None:
                self._collect.detach()
                self._displaced.add(self._task)
            self._task, self._arrived, self._creates = task, [], torch.is_grad_enabled()
            n = call.layout.n
            calls = [c for c in self._live() if not c.shared or c.layout.n == n]
            for c in calls:
                c.parts = c.parts if c.task == task else {}
            recorded = {id(p) for p in parameters_of(Reached(calls))}
            self._of = call.asked
            others = self._of.parameters.items() if calls else ()  # in a with-block, the loss is recorded too
            self._outside = [name for name, p in others if id(p) not in recorded and _gets_gradient(p)]
            self._sink = Sink(self.owner.model, self._of.parameters, self._of.aliases, self.quantities)
            self._collect = Collect(
                Reached(calls),
                self._of.parameters,
                self._sink.emit,
                n,
                release=False,
                scale=self._scale(n),
                listen=False,
            )
        return self._collect

    def _scale(self, n: int) -> float:
        if self.reduction == "mean":
            return float(n)
        if self.reduction == "sum":
            return 1.0
        assert not isinstance(self.reduction, str) and self.reduction is not None
        return 1.0 / _number(self.reduction() if callable(self.reduction) else self.reduction)

    def _finish(self, task: int) -> None:
        for call in self._live():
            if call.task == task:
                call.flush()
        if task in self._displaced:
            _skipped("another one of the same model ran in the middle of it")
            return
        collect, self._collect = self._collect, None
        sink, self._sink = self._sink, None  # or what the callback is given would be held until the next backward
        arrived, self._arrived = self._arrived, []
        if collect is not None:
            collect.detach()
        if collect is None or task == self._spoilt:
            self._from = -1, []
            return
        if self._from[0] != task and torch._C._current_autograd_node() is not None:  # of a part, by a hook in another
            _skipped("it ran in the middle of another one")
            return
        self._reported = True
        if self._creates:  # what comes back from derivatives of this backward is no gradient of the losses
            for call in arrived:
                call.listener = self._second
        found, came = self._upstream(arrived, task), set(arrived)
        missing = next((c for c in found.calls if c.shared and c not in came and c.task != task), None)
        if missing is not None:
            _skipped(f"it ran towards some inputs only, and did not come to {missing.name}")
            return
        if self._outside:
            raise CaptureError(
                f"parameter '{self._outside[0]}' gets a gradient in this backward, but nothing that was recorded in "
                "the model's forward uses it: it acts in the loss, where a persistent handle doesn't see it. Use a "
                "with-block and gradients(losses), or leave it out by params=."
            )
        check_complete(found, self._of.parameters)  # of outputs that nobody could look into
        unused = collect.finish()
        coupled, self._coupled = self._coupled, False
        assert sink is not None
        self.on_backward(sink.result(Pass(None, self.outputs, unused, coupled)))

    def _second(self, call: Call, grads: Any) -> None:
        """In place of `listen`, once a backward was itself recorded for differentiation."""
        if not self.asleep() and self._spoilt != self._ends:
            self._spoilt = self._ends
            _skipped("it differentiates an earlier backward (create_graph=True)")

    def _upstream(self, arrived: list[Call], task: int) -> Reached:
        """The calls, and leaves, that what this backward came to is computed from: calls, and outputs."""
        (since, outputs), self._from = self._from, (-1, [])
        nodes = [node for call in arrived for node in call.inputs] + (outputs if since == task else [])
        return reached(nodes, self.owner)


def alive(calls: list[weakref.ref[Call]], many: int) -> int:
    """Drop those whose graph is gone, where there may be many; how many were left when that was last done."""
    if len(calls) <= 2 * many + 10:
        return many
    calls[:] = [ref for ref in calls if ref() is not None]
    return len(calls)


def inside(leaves: list[Any]) -> Iterator[Tensor]:
    """The tensors that objects hold which pytrees don't know (distributions)."""
    stack, seen = [x for x in leaves if not isinstance(x, Tensor)], set[int]()
    while stack and len(seen) < 100:  # one may refer to anything
        if isinstance(x := stack.pop(), Tensor):
            yield x
        elif id(x) not in seen and hasattr(x, "__dict__") and not isinstance(x, type | nn.Module) and not callable(x):
            seen.add(id(x))
            stack.extend(flatten(list(vars(x).values()))[0])


def _gets_gradient(p: Tensor) -> bool:
    """Whether the backward that runs comes to this parameter."""
    try:
        return p.requires_grad and torch._C._will_engine_execute_node(get_gradient_edge(p).node)
    except RuntimeError:  # so PyTorch says it of a leaf that autograd.grad was asked for
        return True


def _skipped(why: str) -> None:
    warn(f"persample.extend reports nothing of a backward: {why}.")


def _number(reduction: Any) -> float:
    """What the loss is of the sum of the per-sample losses."""
    try:
        factor = float("nan") if isinstance(reduction, str) else float(reduction)
    except (TypeError, ValueError):
        factor = float("nan")
    if not math.isfinite(factor) or factor == 0:
        raise ArgumentError(
            "reduction must be 'sum', 'mean', a number c other than 0 (the loss is c times the sum of the samples' "
            f"losses), or a function that returns c, got {reduction!r}."
        )
    return factor
