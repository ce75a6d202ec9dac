"""Where a parameter meets a sample: every such call of a forward pass, recorded while it runs.

A `Call` is recorded where a shared tensor that requires grad meets a sampled one (`persample.calls`).  The graph itself
is left as it is, so whoever owns it may differentiate it as usual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from . import aten, rules
from .calls import APART, KEY, MIXES, Call, Shared, arguments, function_name, mapped, metadata, reached
from .errors import HigherOrderError, SampleAxisError
from .followed import Followed, SampledTensor, SharedTensor, is_wrapped, results_of
from .layout import Layout, Operation
from .lone import NORMALISE, put_right
from .mixing import ALONG, ORDERS, PLACES, acts_across, in_order, mixes, ranks
from .moves import RESHAPED
from .patched import unpatched
from .state import named_modules

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
        asked: Any = None,
        begun: Callable[[Call, int], None] | None = None,
    ) -> None:
        """``wanted``: ids of the parameters to record calls for; ``listener``: of all calls, from the start;
        ``couplers``: which calls, counted from the start, are known to couple the batch although their function
        needn't; ``once``: the graph will be differentiated just once, with respect to recorded calls only; ``owner``:
        of the calls, see `reached`; ``asked``: what they carry, see `Call.asked`; ``begun``: told of every backward
        that comes to a call, by its number.
        """
        super().__init__()
        self.once = once
        self.owner, self.asked, self.begun = owner, asked, begun  # not itself: it would hold on to the parameters
        self.recorded: list[weakref.ref[Call]] = []
        self.many = 0  # of these, when those that are gone were last looked for
        self.active = False
        self.followed = Followed(wanted)
        self.listener = listener
        self.want(model, wanted)
        self.couplers = couplers
        self.ordinal = 0  # of the call that is running
        self.differentiates = False  # a backward runs, between `start` and `stop`
        self.trusts = False  # the call that runs is taken apart: what numbers of the batch do in it is known

    def want(self, model: nn.Module, wanted: set[int]) -> None:
        """From now on, record calls for these parameters of the model, as it is now."""
        self.wanted = self.followed.wanted = wanted
        self.roots: list[Tensor] = []
        self.names: dict[int, str] = {}
        for prefix, module in named_modules(model):
            for own in (module._parameters, module._buffers):
                for name, t in own.items():
                    if t is not None and id(t) not in self.names:
                        self.roots.append(t)
                        self.names[id(t)] = prefix + name
        known = self.followed.known  # tensors derived before remember the parameters that were wanted then
        for key in [key for key, (_, kind, _) in known.items() if isinstance(kind, SharedTensor)]:
            del known[key]

    def start(self, n: int, inputs: Iterable[tuple[Tensor, int | Layout | None]]) -> None:
        """Begin with these inputs, each with its sample axis (``None``: shared)."""
        if not self.active:
            self.followed.forget()
            self.ordinal = 0
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, Capture):
                mode.over()
        self.followed.begin(n, self.roots, inputs)
        self.active = True

    def next_batch(self) -> None:
        """Rows of the samples so far were asked for: the next forward is of others."""
        self.followed.next_batch()

    def stop(self) -> None:
        self.active = False
        self.followed.forget()

    def over(self) -> bool:
        """Whether there is nothing to record any more: also where a forward was interrupted, which nobody says."""
        if self.active and self.owner is not None and self.owner.interrupted():
            self.stop()  # without leaving: the call that asks puts this mode back where it was
        return not self.active

    def leave(self) -> None:
        """Take this mode off, wherever it is: with-blocks of several tasks (asyncio) end in any order, and what is
        interrupted leaves modes of others behind.
        """
        above: list[TorchFunctionMode] = []
        try:
            if any(mode is self for mode in _get_current_function_mode_stack()):
                while (mode := _pop_mode()) is not self:
                    above.append(mode)
        finally:
            for mode in reversed(above):
                _push_mode(mode)

    @property
    def path(self) -> frozenset[Any]:
        """What tells a pass from others: the functions that were called, and what Python read of the whole batch."""
        acts = self.followed.acts
        return frozenset({*acts.called, acts.read} if acts.read else acts.called)

    # ---- one call -----------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = unpatched(func)
        kwargs = kwargs or {}
        if not self.active or func in rules.ASKS:
            return func(*args, **kwargs)
        self.ordinal += 1
        if not self.ordinal % OFTEN and self.over():
            return func(*args, **kwargs)
        self.followed.acts.called.add(func)
        if type(func) in aten.OPERATIONS and (run := aten.in_torch(func, args, kwargs)) is not None:
            with self:  # all that is known of functions is known by this spelling
                return run()
        if kwargs and len(args) < 2:
            args, kwargs = in_order(func, args, kwargs)
        if func in _DIFFERENTIATES:
            return self._differentiate(func, args, kwargs)
        if func in rules.OPEN:
            with self:  # it hides calls of its own: run its body under the mode
                out = rules.OPEN[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in _INDEXES and len(args) > 1 and _has_tensor_bounds(args[1]):
            with self:  # slices read them where it can't be seen
                args = (args[0], _read_bounds(args[1]), *args[2:])
        if func in RESHAPED and args and isinstance(kind := self.followed.kind(args[0]), SampledTensor):
            return self.followed.follow_reshaped(func, args, kwargs, kind)
        op, totals, shared = self.followed.given(func, args, kwargs)
        if func in rules.READS:
            out = func(*args, **kwargs)
            if op.sampled or shared:
                self.followed.reads(op, totals, out)
            return out
        live = self._live(shared) if shared and func not in rules.INERT else []
        if not op.sampled or (shared and func in rules.PICKS and _is_choice(op)):
            before = {id(t): t._version for t in op.tensors}
            out = func(*args, **kwargs)
            if shared:
                self.followed.derive(op, live, before, out)
            return out
        couples = self._couples(op, totals)
        if (live or couples) and torch.is_grad_enabled() and not is_wrapped(op.tensors):
            return self._record(op, totals, live, couples)
        self.followed.acts.coupled |= bool(couples) and not is_wrapped(op.tensors)
        out = func(*args, **kwargs)
        if func in NORMALISE:
            put_right(out)
        self.followed.follow(op, totals, out)
        return out

    def _couples(self, op: Operation, totals: list[Tensor]) -> str:
        """Why a call makes samples depend on each other, as far as is known; empty if it doesn't."""
        if self.trusts:
            couples = ""
        elif self.ordinal in self.couplers:
            couples = APART
        elif mixes(op) or (totals and self.followed.meet(op, totals)):
            couples = MIXES
        elif (across := acts_across(op)) is not False:
            # what can't be told, and what nobody differentiates (a number that nobody needs, maybe), is verified
            differentiable = torch.is_grad_enabled() and any(x.requires_grad for x, _ in op.sampled)
            couples = MIXES if across and differentiable else ""
            self.followed.acts.totals |= not couples
        else:
            couples = rules.coupling(op.func, op.args, op.kwargs)
        if op.func in ORDERS and (not couples or op.func in PLACES) and ranks(op):
            if op.func in ALONG and op.sampled[0][0].is_floating_point():  # a softmax of inputs: all act on each
                self.followed.acts.totals = True
            self.followed.acts.hidden = self.followed.acts.ranks = True
        return couples

    def _live(self, shared: Sequence[tuple[Tensor, SharedTensor]]) -> list[Shared]:
        """Those of the shared arguments whose gradient is asked for, each once."""
        found: dict[int, Shared] = {}
        for t, kind in shared:
            if id(t) in found:
                found[id(t)].places += 1
            elif (kind.derivation is not None or id(t) in self.wanted) and t.requires_grad:
                found[id(t)] = Shared(t, kind.derivation)
        return list(found.values())

    def _record(self, op: Operation, totals: list[Tensor], live: list[Shared], couples: str) -> Any:
        """Run a call in which parameters meet samples, or samples each other, and keep what its rule will need."""
        mutates = rules.mutates(op.func)
        call = self._call(op, live, couples, mutates)
        out = self._run(call, op)
        if op.func in NORMALISE:
            put_right(out)
        if op.func in rules.NESTED and call.replay is None:
            out = tuple(t.clone() for t in out)
        self.followed.follow(op, totals, out)
        given = () if mutates or "out" in op.kwargs else [*map(id, op.tensors)]  # handed through, from other calls
        made = results_of(op.args, op.kwargs, out, mutates)
        outputs = [t for t in made if id(t) not in given and t.requires_grad and t.grad_fn is not None]
        self.followed.acts.coupled |= bool(couples) and not outputs
        for t in outputs:
            kind = self.followed.kind(t)
            if t.is_nested:
                raise SampleAxisError(
                    f"{function_name(op.func)} makes a nested tensor, in which samples can't be followed. Pad, and "
                    "mask what was added; or use engine='loop'."
                )
            call.outputs.append((t.shape, kind.layout if isinstance(kind, SampledTensor) else None))
        if op.func in rules.KEEPS:
            call.results = tuple(t.detach() for t in outputs)
            call.versions.update((id(t), t._version) for t in call.results)
        self._attach(call, [_end(t, op.tensors, mutates) for t in outputs])
        return out

    def _call(self, op: Operation, live: list[Shared], couples: str, mutates: bool) -> Call:
        """The record of a call that is about to run, with its arguments as they are now."""
        keep = [id(s.tensor) for s in live]
        inputs: list[Node] = []
        saved: dict[int, Tensor] = {}
        for t in op.tensors:
            kept, changes = id(t) in keep, mutates and t is op.args[0]
            if (not kept or (changes and t._base is not None)) and (node := t.grad_fn) is not None:
                inputs.append(node)  # of a part that is changed, the rest stays what it was
            if changes:
                saved[id(t)] = t.detach().clone()
                live = [replace(s, tensor=saved[id(t)]) if s.tensor is t else s for s in live]
            elif not kept and id(t) not in saved:
                saved[id(t)] = t.detach()
        swap = lambda t: saved.get(id(t), t)  # noqa: E731
        return Call(
            op.func,
            mapped(swap, op.args),
            mapped(swap, op.kwargs),
            live,
            {id(saved[id(t)]): layout for t, layout in op.sampled},
            [],
            inputs,
            {id(t): t._version for t in (*saved.values(), *[s.tensor for s in live])},
            next((name for t in op.tensors if (name := self.names.get(id(t)))), ""),
            couples,
            self.followed.lost_in(op),
            self.listener,
        )

    def _run(self, call: Call, op: Operation) -> Any:
        """The function itself, or what puts it into a graph that is ours alone."""
        if (
            self.once
            and call.shared
            and op.func in rules.REPLAYED
            and not op.kwargs
            and all(at is None or at.alone is None for at in call.layouts.values())  # no rule serves lone samples
            and not saves_elsewhere()
        ):
            out = rules.REPLAYED[op.func](call, *op.args)
            if out is not NotImplemented:
                return out
        return op.func(*op.args, **op.kwargs)

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
        call.owner, call.asked, call.begun = self if self.owner is None else self.owner, self.asked, self.begun
        call.within, call.again = self.followed.acts, saves_elsewhere()
        self.recorded.append(weakref.ref(call))

    def _holds_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what is differentiated depends on recorded parameters, and not on another model's alone."""
        ends = arguments(args[:1], {key: x for key, x in kwargs.items() if key in ("outputs", "tensors")})
        found = reached((t.grad_fn for t in ends), self if self.owner is None else self.owner)
        return not ends or any(call.shared for call in found.calls) or bool(found.leaves & self.wanted)

    def _differentiate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A backward pass of the model's own."""
        if self.over():
            return func(*args, **kwargs)
        position = 4 if func is torch.autograd.grad else 3
        own = is_wrapped(arguments(args, kwargs))  # a torch.func transform of the user's
        again = kwargs.get("create_graph", len(args) > position and args[position])
        if again and not own and self._holds_parameters(args, kwargs):
            raise HigherOrderError(
                f"torch.autograd.{func.__name__} with create_graph=True inside the model's forward or the loss: they "
                "differentiate the model, and its parameters act through a gradient. Let the model's forward compute "
                "these derivatives, by torch.func with engine='vmap', or as it is with engine='loop' (docs/losses.md)."
            )
        self.differentiates = True
        try:
            return func(*args, **kwargs)
        finally:
            self.differentiates = False


OFTEN = 256  # calls between which a forward that was interrupted may go unnoticed
_DIFFERENTIATES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, passes are the library's own: whoever records at this moment doesn't see them, whatever model they are
    of.
    """
    recording = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Capture) and not mode.over()]
    for mode in recording:
        mode.active = False
    try:
        yield
    finally:
        for mode in recording:
            mode.active = True


_INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


def _has_tensor_bounds(index: Any) -> bool:
    """Whether a tensor says where a slice begins or ends (``x[:, : lengths.max()]``)."""
    if type(index) is slice:
        return any(isinstance(bound, Tensor) for bound in (index.start, index.stop, index.step))
    return type(index) is tuple and any(type(i) is slice and _has_tensor_bounds(i) for i in index)


def _read_bounds(index: Any) -> Any:
    """The same index, with numbers."""
    if type(index) is slice:
        bounds = (index.start, index.stop, index.step)
        return slice(*(int(bound) if isinstance(bound, Tensor) else bound for bound in bounds))
    return tuple(map(_read_bounds, index)) if type(index) is tuple else index


def _is_choice(op: Operation) -> bool:
    """Whether only numbers of the batch as a whole (the experts that are hit, the longest length) pick from shared
    tensors.
    """
    return all(at is None and not t.is_floating_point() for t, at in op.sampled)


def saves_elsewhere() -> bool:
    """Whether saved-tensor hooks are active (checkpointing): they count what a forward saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _end(t: Tensor, arguments: Sequence[Tensor], mutates: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
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
