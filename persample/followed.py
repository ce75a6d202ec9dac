"""What every tensor of a forward pass is, while it runs under `persample.capture`.

* **shared**: it depends on no sample.  Parameters, buffers, and what is computed from shared tensors only
  (``weight.t()``, ``wpe(arange(T))``, a normalised weight); the latter are `Derivation` objects, to be pulled back
  later.
* **sampled**: it depends on the model's inputs.  Its `Layout` says where the samples are.
* neither: a constant made on the way.  It counts as shared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from . import rules
from .aten import UNKNOWN
from .calls import Derivation, Shared, arguments, behind, function_name, tensors_in
from .errors import BatchCoupledError, SampleAxisError
from .layout import Layout, Operation, only
from .mixing import SHIFTS, extent
from .moves import RESHAPED
from .probing import Source, note, places_in, probed, upstream
from .propagate import lone_sample, propagate
from .writing import above, beneath, rewritten, writes_into

BATCH_DIM = "if the model takes its samples on another axis, say where they are with batch_dim="


@dataclass(slots=True)
class SampledTensor:
    layout: Layout | None
    lost: str = ""  # where there is no layout: the call in which it was lost
    total: int = 0  # surely made of all samples together, see `mixing.extent`


@dataclass(slots=True)
class SharedTensor:
    derivation: Derivation | None  # None: a parameter or a buffer
    version: int = -1  # of the tensor: what is changed through a view of it is another tensor


@dataclass(slots=True)
class Acts:
    """How samples act on each other, as far as that was seen; and where what was seen may be otherwise in the next
    batch.
    """

    coupled: bool = False  # by a call that nobody differentiates through (a frozen backbone)
    totals: bool = False  # numbers of the whole batch act on single samples, with or without a gradient
    hidden: bool = False  # they may act where it isn't seen: read by Python, or as ranks and running counts
    ranks: bool = False  # the latter, which are seldom there to be looked at only
    read: tuple[int, ...] = ()  # numbers that decide what the model does: counts and tests of the batch, or of buffers
    ragged: bool = False  # some samples lie where they do by the values of this batch
    called: set[Callable[..., Any]] = field(default_factory=set)  # the functions


class Followed:
    """The tensors between `begin` and `forget`."""

    def __init__(self, wanted: set[int]) -> None:
        """``wanted``: ids of the parameters whose gradients are asked for."""
        self.wanted = wanted
        self.known: dict[int, tuple[weakref.ref[Tensor], SampledTensor | SharedTensor, int]] = {}
        self.many = 0  # of these, when those that are gone were last looked for
        self.forwards = 0
        self.n = 0
        self.derived = 0  # how many tensors were
        self.acts = Acts()

    def begin(self, n: int, shared: Iterable[Tensor], inputs: Iterable[tuple[Tensor, int | Layout | None]]) -> None:
        """These tensors are shared, and these the inputs, each with its sample axis (``None``: shared)."""
        self.n = n
        self.forwards += 1
        if len(self.known) > 2 * self.many + 100:  # or a with-block around a whole training would keep all
            self.known = {key: entry for key, entry in self.known.items() if entry[0]() is not None}
            self.many = len(self.known)
        root = SharedTensor(None)
        for t in shared:
            self.mark(t, root)
        for t, axis in inputs:
            if axis is None:
                self.mark(t, root)
            else:
                at = axis if isinstance(axis, Layout) else Layout(n, axis % max(1, t.ndim))
                self.mark(t, SampledTensor(lone_sample(t) if n == 1 else at))

    @property
    def couples(self) -> bool:
        """Whether samples act on each other in what was seen, other than through recorded calls."""
        return self.acts.coupled or self.acts.totals

    def forget(self) -> None:
        self.known.clear()

    def next_batch(self) -> None:
        """What is kept of the samples so far is a constant to those that come: nobody's, a memory of all."""
        self.known = {key: entry for key, entry in self.known.items() if isinstance(entry[1], SharedTensor)}
        self.acts = Acts()

    def mark(self, t: Tensor, kind: SampledTensor | SharedTensor) -> None:
        self.known[id(t)] = (weakref.ref(t), kind, self.forwards)

    def kind(self, t: Tensor) -> SampledTensor | SharedTensor | None:
        entry = self.known.get(id(t))
        kind = entry[1] if entry is not None and entry[0]() is t else None
        if isinstance(kind, SampledTensor):  # what is kept of an earlier forward, and detached, is a constant
            return kind if t.requires_grad or entry is None or entry[2] == self.forwards else None
        if not t.requires_grad or t.grad_fn is None:
            return kind
        seen = (kind is not None and kind.version == t._version) or is_wrapped([t])
        return kind if seen else self._unseen(t)

    def samples_of(self, t: Tensor) -> tuple[int, ...] | None:
        """Where the samples are in a tensor, as far as it was followed; ``(-1,)`` for sampled ones that were lost."""
        kind = self.kind(t)
        if not isinstance(kind, SampledTensor):
            return None
        return (-1,) if kind.layout is None else (kind.layout.axis, kind.layout.outer, kind.layout.inner)

    def is_sampled(self, t: Tensor) -> bool:
        """Whether a tensor depends on the samples, as far as calls were seen."""
        return isinstance(self.kind(t), SampledTensor)

    def check_order(self, losses: Tensor) -> None:
        """Raise for losses ``[N]`` (or what they are made of, ``[N, *]``) that are not in the order of the samples, as
        far as they were followed.
        """
        kind = self.kind(losses)
        layout = kind.layout if isinstance(kind, SampledTensor) else None
        if layout is None or layout.plain or layout.alone is not None or layout.axis != 0:
            return
        if layout.n == len(losses) > 1:
            owners = layout.owners().tolist()
            i = next((i for i, sample in enumerate(owners) if sample != i), 0)
            raise SampleAxisError(
                f"losses [{len(losses)}] are not in the order of the samples, as rows are: losses[{i}] is that of "
                f"sample {owners[i]}. Don't sort losses, or pick from them, before they are given."
            )

    def _unseen(self, t: Tensor) -> SampledTensor | SharedTensor:
        """What a tensor is whose making the mode has not seen (a custom ``autograd.Function``, a change through a
        view), by its graph.
        """
        calls, leaves = behind(t)
        if calls:
            layout = self._found_again(t)
            note(t, layout)
            lost = "" if layout is not None else f"a call that could not be seen (output {tuple(t.shape)})"
            kind: SampledTensor | SharedTensor = SampledTensor(layout, lost)
        else:
            sources = [Shared(p, None) for p in leaves if id(p) in self.wanted]
            self.derived += 1
            made = Derivation(behind, (), {}, get_gradient_edge(t), t.shape, sources, self.derived, {})
            kind = SharedTensor(made if sources else None, t._version)
        self.mark(t, kind)
        return kind

    def _found_again(self, t: Tensor) -> Layout | None:
        """Where the samples are in what an unseen function has made."""
        if self.n == 1:
            return lone_sample(t)
        begin, sources = upstream(t)
        at = sources[0] if len(sources) == 1 and sources[0].shape == t.shape else None
        if (
            at is not None and at.edge.node is begin.node and at.edge.output_nr == begin.output_nr
        ):  # handed on by a hook
            return at.layout
        places, ahead = places_in(t, sources), {node for node, _ in begin.node.next_functions}
        sure = len(places) == 1 and all(source.layout is not None and source.edge.node in ahead for source in sources)
        if sure and (places[0].owner is None or at is not None):
            return places[0]
        try:
            return probed(t, begin, sources, places)
        except Exception:  # a backward that can't be run like this
            return None

    def lost_in(self, op: Operation) -> str:
        """The call in which the samples of one of the arguments were lost."""
        kinds = (self.kind(t) for t, at in op.sampled if at is None)
        return next((kind.lost for kind in kinds if isinstance(kind, SampledTensor) and kind.lost), "")

    def check_apart(self, losses: Tensor) -> None:
        """Raise for losses ``[N]`` each of which is made of all samples, or all of one, and for what they are made of,
        ``[N, *]``, with the samples on another axis.
        """
        kind = self.kind(losses)
        if not isinstance(kind, SampledTensor) or self.n == 1:
            return
        if kind.layout is None and kind.total > 1:
            raise BatchCoupledError(
                f"every one of the losses [{len(losses)}] is made of all samples: these were reduced in {kind.lost}, "
                "and another axis is as long. Reduce all axes but that of the samples (outputs [N, 1] and targets [N] "
                f"broadcast to [N, N]: squeeze(-1) the first); {BATCH_DIM}."
            )
        if kind.layout is not None and kind.layout.alone is not None:
            raise BatchCoupledError(
                f"all of the losses [{len(losses)}] are those of one sample, {kind.layout.alone}, which was picked "
                f"from the batch of {self.n}. Keep the axis of the samples; {BATCH_DIM}."
            )
        if kind.layout is not None and kind.layout.axis:
            raise SampleAxisError(
                f"the samples are on axis {kind.layout.axis} of outputs {tuple(losses.shape)}, whose losses are those "
                f"of axis 0. Transpose them; {BATCH_DIM}."
            )

    def lost_together(self, outputs: Sequence[Tensor]) -> bool:
        """Whether every one of these is made of all samples, in some function that left them no axis."""
        kinds = [self.kind(t) for t in outputs]
        return bool(kinds) and all(isinstance(k, SampledTensor) and k.layout is None and k.total > 1 for k in kinds)

    # ---- what a call is given ---------------------------------------------------------------------------------------

    def given(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Operation, list[Tensor], list[tuple[Tensor, SharedTensor]]]:
        """A call; and of its arguments, those that are numbers of all samples, and those that are shared."""
        tensors = arguments(args, kwargs)
        if func in rules.LIKE:
            tensors = tensors[:1]  # the other argument only lends its type or shape
        written = func is Tensor.copy_ and len(tensors) == 2 and self.is_sampled(tensors[1])
        sampled: list[tuple[Tensor, Layout | None]] = []
        known: list[tuple[Tensor, Layout]] = []
        totals: list[Tensor] = []
        shared: list[tuple[Tensor, SharedTensor]] = []
        for t in tensors[1:] if written else tensors:  # what was there before is gone
            kind = self.kind(t)
            if isinstance(kind, SampledTensor):
                sampled.append((t, kind.layout))
                if kind.layout is not None:
                    known.append((t, kind.layout))
                if kind.total:
                    totals.append(t)
            elif kind is not None:
                shared.append((t, kind))
        return Operation(func, args, kwargs, tensors, sampled, known, self._seen), totals, shared

    def meet(self, op: Operation, totals: Sequence[Tensor]) -> bool:
        """Whether a number of all samples acts on single ones, and has a gradient.  A largest number is mostly there to
        be subtracted before an exponential, which changes nothing.
        """
        if len(totals) == len(op.sampled) or (op.func in rules.INERT and op.func not in rules.COMPARES):
            return False
        if op.func in SHIFTS and self._level(totals) == 2:
            return False
        self.acts.totals = True
        return op.func not in rules.INERT and any(t.requires_grad for t in totals)

    def reads(self, op: Operation, totals: Sequence[Tensor], value: Any) -> None:
        """Python got a number, or several, which may decide what the model does."""
        if self._level(totals) > 1:
            self.acts.hidden = True
        elif op.sampled and all(at is not None and (at.n == 1 or only(at) is not None) for _, at in op.sampled):
            pass  # of one sample
        elif type(value) is bool or (type(value) is int and op.sampled):
            self.acts.read = (*self.acts.read, value)
        elif any(t.is_floating_point() or t.is_complex() for t, _ in op.sampled):
            self.acts.hidden = True
        else:
            self.acts.ragged |= bool(op.sampled)  # all their lengths, or routes

    def _level(self, totals: Sequence[Tensor]) -> int:
        return max((kind.total for t in totals if isinstance(kind := self.kind(t), SampledTensor)), default=0)

    # ---- what the outputs of a call are -----------------------------------------------------------------------------

    def follow(self, op: Operation, totals: list[Tensor], out: Any) -> None:
        """What a call of sampled tensors has made; ``totals``: those that are numbers of all samples."""
        level, mutates = self._level(totals) if len(totals) == len(op.sampled) else 0, rules.mutates(op.func)
        for t in results_of(op.args, op.kwargs, out, mutates):
            if any(t is x for x, _ in op.sampled):
                self._handed_on(op, t, level)
            elif mutates or not any(t is x for x in op.tensors) or "out" in op.kwargs:
                self._made(op, t, level, mutates)

    def _handed_on(self, op: Operation, t: Tensor, level: int) -> None:
        """What was changed in place, or handed through: the samples stay where they are, but for what was put in."""
        if len(op.sampled) > 1 and writes_into(op, t):
            layout = rewritten(op)
            self.mark(t, self._found(op, t, layout, level))
            if layout is not op.of(t):
                self._written(op, t, layout)
        elif op.of(t) is None:  # what was a number of all samples still is one
            self.mark(t, SampledTensor(None, self.lost_in(op), max(level, self._level([t]))))

    def _made(self, op: Operation, t: Tensor, level: int, mutates: bool) -> None:
        """A new tensor, or a constant into which samples were put."""
        layout = propagate(op, t) if op.known else None
        if layout is None and op.func in UNKNOWN and not op.lost and not mutates:
            layout = self._probed(op, t)
        if op.func in rules.FRESH or (op.func in rules.SHAPED and (layout is None or layout.alone is not None)):
            return  # a constant
        total = level or (extent(op, t) if layout is None else 0)
        if total == 2 and not (level or t.is_floating_point()):
            total = 3  # the place of the largest number, which nobody subtracts before an exponential
        self.mark(t, self._found(op, t, layout, total))
        if mutates:
            self._written(op, t, layout)

    def _written(self, op: Operation, part: Tensor, layout: Layout | None) -> None:
        """What a view is of that was written into, where there is one."""
        whole = part._base
        if whole is None:
            return
        entry = self.known.get(id(whole))
        kind = entry[1] if entry is not None and entry[0]() is whole else None
        if isinstance(kind, SampledTensor):
            if kind.layout is not None and self.n > 1:
                self.mark(whole, self._found(op, whole, beneath(op, whole, part, layout, kind.layout), 0))
            return
        found = lone_sample(whole) if self.n == 1 else beneath(op, whole, part, layout)
        if found is not None and self.n > 1:
            self.mark(part, self._found(op, part, above(whole, part, found), 0))
        if found is not None or not whole.requires_grad:  # else its graph may tell
            self.mark(whole, self._found(op, whole, found, 0))

    def _probed(self, op: Operation, t: Tensor) -> Layout | None:
        """Where the samples are in what an operation has made of which nothing is known."""
        if t.grad_fn is None or is_wrapped([t]):
            return None
        sources = [Source(get_gradient_edge(x), x.shape, layout) for x, layout in op.known if x.requires_grad]
        try:
            return probed(t, get_gradient_edge(t), sources, places_in(t, sources))
        except Exception:  # a backward that can't be run like this
            return None

    def _found(self, op: Operation, out: Tensor, layout: Layout | None, total: int) -> SampledTensor:
        self.acts.ragged |= layout is not None and layout.owner is not None
        lost = "" if layout is not None else self.lost_in(op) or f"{function_name(op.func)} (output {_shape(out)})"
        return SampledTensor(layout, lost, total)

    def _seen(self) -> list[Layout]:
        """The layouts of tensors so far, as far as their places aren't taken by others."""
        kinds = (kind for _, kind, _ in self.known.values())
        return [kind.layout for kind in kinds if isinstance(kind, SampledTensor) and kind.layout is not None]

    def follow_reshaped(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kind: SampledTensor
    ) -> Any:
        """A call that changes the shape of its argument in place: the samples go where a new tensor has them."""
        before = args[0].detach()
        out = func(*args, **kwargs)
        op = Operation(func, (before, *args[1:]), kwargs, [before], [(before, kind.layout)])
        layout = None
        if (new := RESHAPED[func]) is not None and kind.layout is not None:
            layout = propagate(replace(op, func=new, known=[(before, kind.layout)]), args[0])
        self.mark(args[0], self._found(op, args[0], layout, kind.total))
        return out

    def derive(self, op: Operation, sources: list[Shared], before: dict[int, int], out: Any) -> None:
        """What a call of shared tensors only has made; ``before``: the versions of its arguments."""
        for t in results_of(op.args, op.kwargs, out, rules.mutates(op.func)):
            if any(t is s.tensor for s in sources) and not rules.mutates(op.func):
                continue  # handed through
            if not t.requires_grad or t.grad_fn is None:
                if self.kind(t) is None:
                    self.mark(t, SharedTensor(None))
            else:
                self.derived += 1
                edge = get_gradient_edge(t)
                made = Derivation(op.func, op.args, op.kwargs, edge, t.shape, sources, self.derived, before)
                self.mark(t, SharedTensor(made if sources else None, t._version))


def results_of(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, mutates: bool) -> list[Tensor]:
    """What a call made: its outputs, or the tensor it changed."""
    if isinstance(out, Tensor) and "out" not in kwargs:
        return [out]
    results = list(tensors_in(args[0] if out is None and mutates else out))
    if isinstance(into := kwargs.get("out"), Tensor) and into is not out:
        results.append(into)
    return results


def _shape(t: Tensor) -> str:
    return "nested" if t.is_nested else str(tuple(t.shape))


def is_wrapped(tensors: Sequence[Tensor]) -> bool:
    """Inside a user's own vmap or grad, samples are not on an axis of their own."""
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None and any(map(functorch.is_functorch_wrapped_tensor, tensors))
