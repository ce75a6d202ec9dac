"""Where a parameter meets a sample: every such call of a forward pass, recorded while it runs.

While a forward runs under `Capture` (a ``TorchFunctionMode``), every tensor is one of three things:

* **shared**: it depends on no sample.  Parameters, buffers, and what is computed from shared tensors only
  (``weight.t()``, ``wpe(arange(T))``, a normalised weight); the latter are `Derivation` objects, to be pulled back
  later.
* **sampled**: it depends on the model's inputs.  Its `Layout` says where the samples are.
* neither: a constant made on the way.  It counts as shared.

A `Call` is recorded where a shared tensor that requires grad meets a sampled one (`persample.calls`).  The graph itself
is left as it is, so whoever owns it may differentiate it as usual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from . import rules
from .calls import KEY, Call, Derivation, Shared, arguments, behind, function_name, mapped, metadata, tensors_in
from .errors import HigherOrderError, SampleAxisError
from .layout import Layout
from .mixing import ORDERS, SHIFTS, extent, mixes, ranks
from .moves import RESHAPED
from .propagate import found_again, lone_sample, propagate
from .state import named_modules
from .writing import rewritten, writes_into


@dataclass(slots=True)
class _Sampled:
    layout: Layout | None
    lost: str = ""  # where there is no layout: the call in which it was lost
    total: int = 0  # surely made of all samples together: 2, their sum or mean; 1, the largest or smallest of them


@dataclass(slots=True)
class _Derived:
    derivation: Derivation | None  # None: a parameter or a buffer
    version: int = -1  # of the tensor: what is changed through a view of it is another tensor


Listener = Callable[[Call, Sequence[Tensor | None]], None]


class Capture(TorchFunctionMode):
    """Records the calls of a forward pass between `start` and `stop`."""

    def __init__(
        self,
        model: nn.Module,
        wanted: set[int],
        listener: Listener | None = None,
        couplers: Collection[int] = (),
        once: bool = False,
        owner: Any = None,
        begun: Callable[[int], None] | None = None,
    ) -> None:
        """``wanted``: ids of the parameters to record calls for; ``listener``: of all calls, from the start;
        ``couplers``: which calls, counted from the start, are known to couple the batch although their function
        needn't; ``once``: the graph will be differentiated just once, with respect to recorded calls only; ``owner``:
        of the calls, see `reached`; ``begun``: told of every backward that comes to a call, by its number.
        """
        super().__init__()
        self.once = once
        self.owner, self.begun = self if owner is None else owner, begun
        self.recorded: list[weakref.ref[Call]] = []
        self.active = False
        self.wanted = wanted
        self.listener = listener
        self.roots: list[Tensor] = []
        self.names: dict[int, str] = {}
        for prefix, module in named_modules(model):
            for own in (module._parameters, module._buffers):
                for name, t in own.items():
                    if t is not None and id(t) not in self.names:
                        self.roots.append(t)
                        self.names[id(t)] = prefix + name
        self.known: dict[int, tuple[weakref.ref[Tensor], _Sampled | _Derived]] = {}
        self.couplers = couplers
        self.coupled = False  # by a call that nobody differentiates through (a frozen backbone)
        self.totals = False  # numbers of the whole batch act on single samples, with or without a gradient
        self.hidden = False  # they may act where it isn't seen: read by Python, or as ranks and running counts
        self.ragged = False  # some samples lie where they do by the values of this batch
        self.ordinal = 0  # of the call that is running
        self.differentiates = False  # a backward runs, between `start` and `stop`
        self.called: set[Callable[..., Any]] = set()  # the functions, part of what was verified
        self.count = 0
        self.n = 0

    def start(self, n: int, inputs: Iterable[tuple[Tensor, int | None]]) -> None:
        """Begin with these inputs, each with its sample axis (``None``: shared)."""
        self.n = n
        if not self.active:
            self.known.clear()
            self.ordinal = 0
        root = _Derived(None)
        for t in self.roots:
            self._mark(t, root)
        for t, axis in inputs:
            if axis is None:
                self._mark(t, _Derived(None))
            else:
                self._mark(t, _Sampled(lone_sample(t) if n == 1 else Layout(n, axis % max(1, t.ndim))))
        self.active = True

    def stop(self) -> None:
        self.active = False
        self.known.clear()

    def _mark(self, t: Tensor, kind: _Sampled | _Derived) -> None:
        self.known[id(t)] = (weakref.ref(t), kind)

    def _kind(self, t: Tensor) -> _Sampled | _Derived | None:
        entry = self.known.get(id(t))
        kind = entry[1] if entry is not None and entry[0]() is t else None
        if isinstance(kind, _Sampled) or not t.requires_grad or t.grad_fn is None:
            return kind
        seen = (kind is not None and kind.version == t._version) or is_wrapped([t])
        return kind if seen else self._unseen(t)

    def samples_of(self, t: Tensor) -> tuple[int, ...] | None:
        """Where the samples are in a tensor, as far as it was followed; ``(-1,)`` for sampled ones that were lost."""
        kind = self._kind(t)
        if not isinstance(kind, _Sampled):
            return None
        return (-1,) if kind.layout is None else (kind.layout.axis, kind.layout.outer, kind.layout.inner)

    def is_sampled(self, t: Tensor) -> bool:
        """Whether a tensor depends on the samples, as far as calls were seen."""
        return isinstance(self._kind(t), _Sampled)

    def check_order(self, losses: Tensor) -> None:
        """Raise for losses ``[N]`` (or what they are made of, ``[N, *]``) that are not in the order of the samples, as
        far as they were followed.
        """
        kind = self._kind(losses)
        layout = kind.layout if isinstance(kind, _Sampled) else None
        if layout is None or layout.plain or layout.alone is not None or layout.axis != 0:
            return
        if layout.n == len(losses) > 1:
            owners = layout.owners().tolist()
            i = next((i for i, sample in enumerate(owners) if sample != i), 0)
            raise SampleAxisError(
                f"losses [{len(losses)}] are not in the order of the samples, as rows are: losses[{i}] is that of "
                f"sample {owners[i]}. Don't sort losses, or pick from them, before they are given."
            )

    def _unseen(self, t: Tensor) -> _Sampled | _Derived:
        """What a tensor is whose making the mode has not seen (a custom ``autograd.Function``, a change through a
        view), by its graph.
        """
        calls, leaves = behind(t)
        if calls:
            layout = next((layout for call in calls for _, layout in call.outputs if layout is not None), None)
            layout = None if layout is None else found_again(layout, t)
            lost = "" if layout is not None else f"a call that could not be seen (output {tuple(t.shape)})"
            kind: _Sampled | _Derived = _Sampled(layout, lost)
        else:
            sources = [Shared(p, None) for p in leaves if id(p) in self.wanted]
            self.count += 1
            made = Derivation(behind, (), {}, get_gradient_edge(t), t.shape, sources, self.count, {})
            kind = _Derived(made if sources else None, t._version)
        self._mark(t, kind)
        return kind

    # ---- one call -----------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        self.ordinal += 1
        self.called.add(func)
        if func in _DIFFERENTIATES:
            self._refuse_higher_order(func, args, kwargs)
            self.differentiates = True
            try:
                return func(*args, **kwargs)
            finally:
                self.differentiates = False
        if func in rules.OPEN:
            with self:  # it hides calls of its own: run its body under the mode
                out = rules.OPEN[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in RESHAPED and args and isinstance(kind := self._kind(args[0]), _Sampled):
            return self._reshaped(func, args, kwargs, kind)
        tensors = arguments(args, kwargs)
        if func in rules.LIKE:
            tensors = tensors[:1]  # the other argument only lends its type or shape
        sampled: list[tuple[Tensor, Layout | None]] = []
        totals: list[Tensor] = []
        shared: list[tuple[Tensor, _Derived]] = []
        for t in tensors:
            kind = self._kind(t)
            if isinstance(kind, _Sampled):
                sampled.append((t, kind.layout))
                if kind.total:
                    totals.append(t)
            elif kind is not None:
                shared.append((t, kind))
        if totals and func in rules.READS:
            self.hidden = True
        live = self._live(shared) if shared and func not in rules.INERT else []
        if not sampled or (shared and func in rules.PICKS and _is_choice(sampled)):
            before = {id(t): t._version for t in tensors}
            out = func(*args, **kwargs)
            if shared:
                self._derive(func, args, kwargs, live, before, out)
            return out
        couples = (
            "makes a sample's values depend on the other samples"
            if self.ordinal in self.couplers
            or mixes(func, args, kwargs, sampled)
            or (totals and self._meet(func, totals, sampled))
            else rules.coupling(func, args, kwargs)
        )
        if func in ORDERS and not couples and ranks(func, args, kwargs, sampled):
            self.hidden = True
        if not (live or couples) or not torch.is_grad_enabled() or is_wrapped(tensors):
            self.coupled |= bool(couples) and not is_wrapped(tensors)
            out = func(*args, **kwargs)
            self._propagate(func, args, kwargs, tensors, sampled, totals, out)
            return out
        return self._record(func, args, kwargs, tensors, sampled, totals, live, couples)

    def _reshaped(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kind: _Sampled) -> Any:
        """A call that changes the shape of its argument in place: the samples go where a new tensor has them."""
        before = args[0].detach()
        out = func(*args, **kwargs)
        new, layout = RESHAPED[func], kind.layout
        if layout is not None:
            given = (before, *args[1:])
            layout = None if new is None else propagate(new, given, kwargs, [(before, layout)], [before], args[0])
        self._mark(args[0], self._found(func, [(before, kind.layout)], args[0], layout, kind.total))
        return out

    def _meet(
        self,
        func: Callable[..., Any],
        totals: Sequence[Tensor],
        sampled: Sequence[tuple[Tensor, Layout | None]],
    ) -> bool:
        """Whether a number of all samples acts on single ones, and has a gradient.  A largest number is mostly there to
        be subtracted before an exponential, which changes nothing.
        """
        if len(totals) == len(sampled) or (func in rules.INERT and func not in rules.COMPARES):
            return False
        if func in SHIFTS and self._level(totals) < 2:
            return False
        self.totals = True
        return func not in rules.INERT and any(t.requires_grad for t in totals)

    def _level(self, totals: Sequence[Tensor]) -> int:
        return max((kind.total for t in totals if isinstance(kind := self._kind(t), _Sampled)), default=0)

    def _live(self, shared: Sequence[tuple[Tensor, _Derived]]) -> list[Shared]:
        """Those of the shared arguments whose gradient is asked for, each once."""
        found: dict[int, Shared] = {}
        for t, kind in shared:
            if (kind.derivation is not None or id(t) in self.wanted) and t.requires_grad:
                found[id(t)] = Shared(t, kind.derivation)
        return list(found.values())

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        sampled: list[tuple[Tensor, Layout | None]],
        totals: list[Tensor],
        live: list[Shared],
        couples: str,
    ) -> Any:
        keep = [id(s.tensor) for s in live]
        mutates = rules.mutates(func)
        inputs: list[Node] = []
        saved: dict[int, Tensor] = {}
        for t in tensors:
            kept, changes = id(t) in keep, mutates and t is args[0]
            if (not kept or (changes and t._base is not None)) and (node := t.grad_fn) is not None:
                inputs.append(node)  # of a part that is changed, the rest stays what it was
            if changes:
                saved[id(t)] = t.detach().clone()
                live = [Shared(saved[id(t)], s.derivation) if s.tensor is t else s for s in live]
            elif not kept and id(t) not in saved:
                saved[id(t)] = t.detach()
        swap = lambda t: saved.get(id(t), t)  # noqa: E731
        call = Call(
            func,
            mapped(swap, args),
            mapped(swap, kwargs),
            live,
            {id(saved[id(t)]): layout for t, layout in sampled},
            [],
            inputs,
            {id(t): t._version for t in (*saved.values(), *[s.tensor for s in live])},
            next((name for t in tensors if (name := self.names.get(id(t)))), ""),
            couples,
            self._lost(sampled),
            self.listener,
        )
        out = self._run(call, func, args, kwargs)
        if func in rules.NESTED and call.replay is None:
            out = tuple(t.clone() for t in out)
        self._propagate(func, args, kwargs, tensors, sampled, totals, out)
        given = () if mutates or "out" in kwargs else [*map(id, tensors)]  # handed through, from other calls
        made = _results(args, kwargs, out, mutates)
        outputs = [t for t in made if id(t) not in given and t.requires_grad and t.grad_fn is not None]
        self.coupled |= bool(couples) and not outputs
        for t in outputs:
            kind = self._kind(t)
            if t.is_nested:
                raise SampleAxisError(
                    f"{function_name(func)} makes a nested tensor, in which samples can't be followed. Pad, and mask "
                    "what was added; or use engine='loop'."
                )
            call.outputs.append((t.shape, kind.layout if isinstance(kind, _Sampled) else None))
        if func in rules.KEEPS:
            call.results = tuple(t.detach() for t in outputs)
            call.versions.update((id(t), t._version) for t in call.results)
        self._attach(call, [_end(t, tensors, mutates) for t in outputs])
        return out

    def _run(self, call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function itself, or what puts it into a graph that is ours alone."""
        if self.once and call.shared and func in rules.REPLAYED and not kwargs and not _saves_elsewhere():
            out = rules.REPLAYED[func](call, *args)
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)

    def _attach(self, call: Call, given: list[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        """Tie the call to the autograd nodes of its outputs: they own it, and tell it their gradients."""
        for i, (end, gradient) in enumerate(given):
            assert end.grad_fn is not None
            metadata(end.grad_fn).setdefault(KEY, []).append((call, end.output_nr))
            hook = lambda g, i=i, gradient=gradient: call.arrive(i, g if g is None else gradient(g))  # noqa: E731
            if self.listener is None:
                call.hooks.append(end.register_hook(hook))
            else:  # whoever calls backward() executes the node, after all hooks that change its gradient
                end.grad_fn.register_prehook(lambda gs, hook=hook, number=end.output_nr: hook(gs[number]))
        call.owner, call.begun = self.owner, self.begun
        self.recorded.append(weakref.ref(call))

    # ---- what the outputs are -----------------------------------------------------------------------------------

    def _propagate(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        sampled: list[tuple[Tensor, Layout | None]],
        totals: list[Tensor],
        out: Any,
    ) -> None:
        known = [(t, layout) for t, layout in sampled if layout is not None]
        level, mutates = self._level(totals) if len(totals) == len(sampled) else 0, rules.mutates(func)
        for t in _results(args, kwargs, out, mutates):
            if (before := next((layout for a, layout in sampled if a is t), self)) is not self:
                if len(sampled) > 1 and writes_into(func, args, t):
                    layout = rewritten(func, args, kwargs, sampled)
                    self._mark(t, self._found(func, sampled, t, layout, level))
                elif before is None:
                    self._mark(t, _Sampled(None, self._lost(sampled)))
                continue  # changed in place, or handed through: the samples stay where they are
            if not mutates and any(t is a for a in tensors) and "out" not in kwargs:
                continue  # handed through, without samples
            lost = len(known) < len(sampled)
            layout = propagate(func, args, kwargs, known, tensors, t, lost, self._seen) if known else None
            if func in rules.FRESH or (func in rules.SHAPED and (layout is None or layout.alone is not None)):
                continue  # a constant
            total = level or (extent(func, args, kwargs, sampled) if layout is None else 0)
            self._mark(t, self._found(func, sampled, t, layout, total))
            if mutates and t._base is not None and not isinstance(self._kind(t._base), _Sampled):
                self._mark(t._base, self._found(func, sampled, t._base, None, 0))

    def _found(
        self,
        func: Callable[..., Any],
        sampled: Sequence[tuple[Tensor, Layout | None]],
        out: Tensor,
        layout: Layout | None,
        total: int,
    ) -> _Sampled:
        self.ragged |= layout is not None and layout.owner is not None
        lost = "" if layout is not None else self._lost(sampled) or f"{function_name(func)} (output {_shape(out)})"
        return _Sampled(layout, lost, total)

    def _seen(self) -> list[Layout]:
        """The layouts of tensors so far, as far as their places aren't taken by others."""
        kinds = (kind for _, kind in self.known.values())
        return [kind.layout for kind in kinds if isinstance(kind, _Sampled) and kind.layout is not None]

    def _lost(self, sampled: Sequence[tuple[Tensor, Layout | None]]) -> str:
        """The call in which the samples of one of these were lost."""
        kinds = (self._kind(t) for t, at in sampled if at is None)
        return next((kind.lost for kind in kinds if isinstance(kind, _Sampled) and kind.lost), "")

    def _derive(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: list[Shared],
        before: dict[int, int],
        out: Any,
    ) -> None:
        for t in _results(args, kwargs, out, rules.mutates(func)):
            if any(t is s.tensor for s in sources) and not rules.mutates(func):
                continue  # handed through
            if not t.requires_grad or t.grad_fn is None:
                if self._kind(t) is None:
                    self._mark(t, _Derived(None))
            else:
                self.count += 1
                made = Derivation(func, args, kwargs, get_gradient_edge(t), t.shape, sources, self.count, before)
                self._mark(t, _Derived(made if sources else None, t._version))

    def _refuse_higher_order(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = 4 if func is torch.autograd.grad else 3
        if is_wrapped(arguments(args, kwargs)):
            return  # a torch.func transform of the user's own
        if kwargs.get("create_graph", len(args) > position and args[position]):
            raise HigherOrderError(
                f"torch.autograd.{func.__name__} with create_graph=True inside the model's forward: it "
                "differentiates itself, and its parameters act through a gradient. Use engine='loop' (or 'vmap' with "
                "torch.func)."
            )


_DIFFERENTIATES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def _is_choice(sampled: Sequence[tuple[Tensor, Layout | None]]) -> bool:
    """Whether only numbers of the batch as a whole (the experts that are hit, the longest length) pick from shared
    tensors.
    """
    return all(at is None and not t.is_floating_point() for t, at in sampled)


def _results(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, mutates: bool) -> list[Tensor]:
    """What a call made: its outputs, or the tensor it changed."""
    if isinstance(out, Tensor) and "out" not in kwargs:
        return [out]
    results = list(tensors_in(args[0] if out is None and mutates else out))
    if isinstance(into := kwargs.get("out"), Tensor) and into is not out:
        results.append(into)
    return results


def _shape(t: Tensor) -> str:
    return "nested" if t.is_nested else str(tuple(t.shape))


def _saves_elsewhere() -> bool:
    """Whether saved-tensor hooks are active (checkpointing): they count what a forward saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _end(t: Tensor, arguments: list[Tensor], mutates: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensor whose gradient tells that of ``t``, and how.

    That is ``t`` itself; but its base where a function returns a view of what it has just computed (``F.linear`` and
    ``einsum`` do), as an in-place operation on such a view rewrites the graph around the view's own node; and the
    base where ``t`` is a part that was changed in place (``h[:, 0] += p``), as later uses don't go through the part.
    """
    base = t._base
    if base is None or base.grad_fn is None:
        return t, lambda g: g
    known = {id(a) for x in arguments for a in (x, x._base) if a is not None}
    if not mutates and (base.numel() != t.numel() or id(base) in known):
        return t, lambda g: g
    whole, part = (base.shape, base.stride()), (t.shape, t.stride(), t.storage_offset() - base.storage_offset())

    def gradient(g: Tensor) -> Tensor:
        same = g.stride() == whole[1] and g.storage_offset() == 0
        return (g if same else g.new_empty_strided(*whole).copy_(g)).as_strided(*part)

    return base, gradient


def is_wrapped(tensors: list[Tensor]) -> bool:
    """Inside a user's own vmap or grad, samples are not on an axis of their own."""
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None and any(map(functorch.is_functorch_wrapped_tensor, tensors))
