"""Where a parameter meets a sample: every such call of a forward pass, recorded while it runs.

While a forward runs under `Capture` (a ``TorchFunctionMode``), every tensor is one of three things:

* **shared**: it depends on no sample.  Parameters, buffers, and what is computed from shared tensors only
  (``weight.t()``, ``wpe(arange(T))``, a normalised weight); the latter are `Derivation` objects, to be pulled back
  later.
* **sampled**: it depends on the model's inputs.  Its `Layout` says where the samples are.
* neither: a constant made on the way.  It counts as shared.

A `Call` is recorded where a shared tensor that requires grad meets a sampled one.  It lives in the metadata of the
autograd node of its output, and nowhere else: a graph that is dropped drops its calls, and nothing is ever stored on
the user's modules, parameters or tensors.  The graph itself is left as it is, so whoever owns it may
differentiate it as usual.

`reached` walks the graph from the losses to the recorded calls.  At a call it goes on with the call's *sampled*
inputs only, so every parameter it still arrives at was used where the mode can't see: nothing is missed silently.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from . import rules
from .errors import BatchCoupledError, CaptureError, HigherOrderError, InplaceError, SampleAxisError
from .layout import Layout, samples_first
from .propagate import found_again, lone_sample, mixes, propagate

_KEY = "persample"  # of a recorded call in its autograd node's metadata


def function_name(func: Callable[..., Any]) -> str:
    """How a user would write the function: ``torch.nn.functional.linear``."""
    return resolve_name(func) or getattr(func, "__qualname__", None) or repr(func)


@dataclass(eq=False)
class Derivation:
    """A shared tensor that was computed from shared ones: ``out = func(*args, **kwargs)``."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: GradientEdge  # as it was before any later in-place change
    shape: torch.Size
    sources: list[Shared]  # the arguments that lead to wanted parameters
    order: int
    versions: dict[int, int]

    def read(self, x: Tensor) -> Tensor:
        """An argument, if it still is what the derivation saw."""
        if x._version != self.versions.get(id(x), x._version):
            raise InplaceError(
                f"{function_name(self.func)}: an argument of shape {tuple(x.shape)} was changed in place afterwards."
            )
        return x


@dataclass(eq=False)
class Shared:
    """A shared argument of a call: a parameter, or something derived from parameters."""

    tensor: Tensor
    derivation: Derivation | None  # None: a parameter


@dataclass(eq=False)
class Call:
    """One call in which shared tensors that require grad met sampled ones."""

    func: Callable[..., Any]
    args: tuple[Any, ...]  # sampled tensors are detached: a call never keeps its own output alive
    kwargs: dict[str, Any]
    shared: list[Shared]
    layouts: dict[int, Layout | None]  # id of a sampled argument -> where its samples are
    outputs: list[tuple[torch.Size, Layout | None]]
    inputs: list[Node]  # where the walk goes on
    versions: dict[int, int]
    where: str  # a parameter or buffer among its arguments
    couples: str = ""  # why this call makes samples depend on each other
    listener: Callable[[Call, Sequence[Tensor | None]], None] | None = None  # gets the gradients of the outputs
    begun: Callable[[int], None] | None = None  # is told that a backward has come here
    results: tuple[Tensor, ...] = ()  # the outputs, detached, where the rule needs them
    replay: Any = None  # what a node of ours in the graph has to hand on (see `rules.REPLAYED`)
    expected: int = 0  # how many outputs the losses depend on
    parts: dict[int, Tensor | None] = field(
        default_factory=dict
    )  # gradients of some outputs, in a backward that goes on
    task: int = -1  # that backward
    owner: Any = None  # who had it recorded: several may watch one model
    hooks: list[RemovableHandle] = field(default_factory=list)  # that tell it the gradients of its outputs

    @property
    def name(self) -> str:
        return function_name(self.func) + (f" (with '{self.where}')" if self.where else "")

    def arrive(self, i: int, grad: Tensor | None) -> None:
        """Called by autograd with the gradient of output ``i``."""
        if self.listener is None:
            return
        if (task := torch._C._current_graph_task_id()) != self.task:
            self.task, self.parts = task, {}
            if self.begun is not None:
                self.begun(task)
        self.parts[i] = grad
        if len(self.parts) >= (self.expected or len(self.outputs)):
            self.flush()

    def hear_last(self) -> None:
        """Be told of gradients after the user's own hooks have changed them."""
        for handle in self.hooks:
            if (hooks := handle.hooks_dict_ref()) and next(reversed(hooks)) != handle.id:
                hooks[handle.id] = hooks.pop(handle.id)

    def flush(self) -> None:
        """Pass on the gradients of all outputs that have one."""
        parts, self.parts = self.parts, {}
        if any(g is not None for g in parts.values()) and self.listener is not None:
            self.listener(self, [parts.get(i) for i in range(len(self.outputs))])

    def release(self) -> None:
        """Let go of everything that takes memory."""
        self.args, self.kwargs, self.shared, self.layouts, self.results, self.parts = (), {}, [], {}, (), {}

    @property
    def layout(self) -> Layout:
        """Where the samples are in the output (and its gradient)."""
        layout = self.outputs[0][1]
        if layout is None:
            raise SampleAxisError(
                f"{self.name}: can't tell where the samples are in an output of shape {tuple(self.outputs[0][0])}. "
                "Keep the samples on one axis of their own, say where it is with batch_dim=, or use engine='loop'."
            )
        return layout

    @property
    def n(self) -> int:
        return self.layout.n

    def wants(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is a shared argument whose gradient is asked for."""
        return any(s.tensor is tensor for s in self.shared)

    def sampled(self, tensor: Any) -> bool:
        return id(tensor) in self.layouts

    def read(self, x: Tensor) -> Tensor:
        """A recorded argument, if it still is what the call saw."""
        if x._version != self.versions.get(id(x), x._version):
            raise InplaceError(
                f"{self.name}: an argument of shape {tuple(x.shape)} was changed in place after the call. "
                "Its gradient needs the old value: use the out-of-place operation, or engine='loop'."
            )
        return x

    def outcome(self) -> tuple[Tensor, ...]:
        """The outputs; computed once more if they were changed in place since."""
        if any(x._version != self.versions[id(x)] for x in self.results):
            args, kwargs = tree_map(lambda x: self.read(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
            return tuple(tensors_in(self.func(*args, **kwargs)))
        return self.results

    def samples(self, x: Tensor) -> Tensor:
        """``[N, k, *rest]``: an argument or output gradient, sample by sample (``k`` entries each)."""
        layout = self.layouts.get(id(x)) if id(x) in self.layouts else self.layout
        if layout is None:
            raise SampleAxisError(
                f"{self.name}: can't tell where the samples are in an argument of shape {tuple(x.shape)}."
            )
        return samples_first(self.read(x), layout)

    def tokens(self, x: Tensor, features: int = 1) -> Tensor:
        """``[N, T, *features]``: everything before the last axes is a token of its sample."""
        x = self.samples(x)
        return x.flatten(1, x.ndim - features - 1) if features else x.flatten(1)


@dataclass(frozen=True)
class _Sampled:
    layout: Layout | None


@dataclass(frozen=True)
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
        ``couplers``: which calls, counted
        from the start, are known to couple the batch although their function needn't; ``once``: the graph will be
        differentiated just once, with respect to recorded calls only; ``owner``: of the calls, see `reached`;
        ``begun``: told of
        every backward that comes to a call, by its number.
        """
        super().__init__()
        self.once = once
        self.owner, self.begun = self if owner is None else owner, begun
        self.recorded: list[weakref.ref[Call]] = []
        self.active = False
        self.wanted = wanted
        self.listener = listener
        self.roots = dict(
            reversed([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        )
        self.names = {id(t): name for name, t in self.roots.items()}
        self.known: dict[int, tuple[weakref.ref[Tensor], _Sampled | _Derived]] = {}
        self.couplers = couplers
        self.ordinal = 0  # of the call that is running
        self.count = 0
        self.n = 0

    def start(self, n: int, inputs: Iterable[tuple[Tensor, int | None]]) -> None:
        """Begin with these inputs, each with its sample axis (``None``: shared)."""
        self.n = n
        if not self.active:
            self.known.clear()
            self.ordinal = 0
        for t in self.roots.values():
            self._mark(t, _Derived(None))
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
        seen = (kind is not None and kind.version == t._version) or _is_wrapped([t])
        return kind if seen else self._unseen(t)

    def _unseen(self, t: Tensor) -> _Sampled | _Derived:
        """What a tensor is whose making the mode has not seen (a custom ``autograd.Function``, a change through a
        view), by its graph.
        """
        calls, leaves = behind(t)
        if calls:
            layout = next((layout for call in calls for _, layout in call.outputs if layout is not None), None)
            kind: _Sampled | _Derived = _Sampled(None if layout is None else found_again(layout, t))
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
        if func in _DIFFERENTIATES:
            self._refuse_higher_order(func, args, kwargs)
            return func(*args, **kwargs)
        if func in rules.OPEN:
            with self:  # it hides calls of its own: run its body under the mode
                out = rules.OPEN[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = [t for t in _flat(args, kwargs) if isinstance(t, Tensor)]
        if func in rules.LIKE:
            tensors = tensors[:1]  # the other argument only lends its type or shape
        kinds = [self._kind(t) for t in tensors]
        sampled = [(t, k.layout) for t, k in zip(tensors, kinds, strict=True) if isinstance(k, _Sampled)]
        if not sampled or (func in rules.PICKS and self._is_choice(kinds, sampled)):
            before = {id(t): t._version for t in tensors} if tensors else {}
            out = func(*args, **kwargs)
            if any(isinstance(k, _Derived) for k in kinds):
                self._derive(func, args, kwargs, [] if func in rules.INERT else self._live(tensors, kinds), before, out)
            return out
        couples = (
            "makes a sample's values depend on the other samples"
            if self.ordinal in self.couplers or mixes(func, args, kwargs, sampled)
            else rules.coupling(func, args, kwargs)
        )
        live = [] if func in rules.INERT else self._live(tensors, kinds)
        if not (live or couples) or not torch.is_grad_enabled() or _is_wrapped(tensors):
            out = func(*args, **kwargs)
            self._propagate(func, args, kwargs, tensors, sampled, out)
            return out
        return self._record(func, args, kwargs, tensors, sampled, live, couples)

    def _is_choice(
        self, kinds: Sequence[_Sampled | _Derived | None], sampled: Sequence[tuple[Tensor, Layout | None]]
    ) -> bool:
        """Whether only numbers of the batch as a whole (the experts that are hit, the longest length) pick from shared
        tensors.
        """
        numbers = all(at is None and not t.is_floating_point() for t, at in sampled)
        return numbers and any(isinstance(k, _Derived) for k in kinds)

    def _live(self, tensors: list[Tensor], kinds: Sequence[_Sampled | _Derived | None]) -> list[Shared]:
        """The shared arguments whose gradient is asked for, each once."""
        found = {
            id(t): Shared(t, k.derivation)
            for t, k in zip(tensors, kinds, strict=True)
            if isinstance(k, _Derived) and t.requires_grad and (k.derivation is not None or id(t) in self.wanted)
        }
        return list(found.values())

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        sampled: list[tuple[Tensor, Layout | None]],
        live: list[Shared],
        couples: str,
    ) -> Any:
        keep = {id(s.tensor) for s in live}
        layouts = {id(t): layout for t, layout in sampled}
        mutates = rules.mutates(func)
        part = {id(args[0])} if mutates and args[0]._base is not None else set()  # the rest of it stays what it was
        inputs = [t.grad_fn for t in tensors if t.grad_fn is not None and id(t) not in keep - part]
        saved: dict[int, Tensor] = {}
        for t in tensors:
            if mutates and t is args[0]:
                saved[id(t)] = t.detach().clone()
                live = [Shared(saved[id(t)], s.derivation) if s.tensor is t else s for s in live]
            elif id(t) not in keep and id(t) not in saved:
                saved[id(t)] = t.detach()
        swap = lambda t: saved.get(id(t), t)  # noqa: E731
        call = Call(
            func,
            mapped(swap, args),
            mapped(swap, kwargs),
            live,
            {id(saved[i]): layout for i, layout in layouts.items()},
            [],
            inputs,
            {id(t): t._version for t in [*saved.values(), *(s.tensor for s in live)]},
            next((self.names[id(t)] for t in tensors if id(t) in self.names), ""),
            couples,
            self.listener,
        )
        out = self._run(call, func, args, kwargs)
        if func in rules.NESTED and call.replay is None:
            out = tuple(t.clone() for t in out)
        self._propagate(func, args, kwargs, tensors, sampled, out)
        outputs = [t for t in _results(args, kwargs, out, mutates) if t.requires_grad and t.grad_fn is not None]
        for t in outputs:
            kind = self._kind(t)
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
            _metadata(end.grad_fn).setdefault(_KEY, []).append((call, end.output_nr))
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
        out: Any,
    ) -> None:
        known = [(t, layout) for t, layout in sampled if layout is not None]
        for t in _results(args, kwargs, out, rules.mutates(func)):
            if any(t is a for a, _ in sampled):
                continue  # changed in place, or handed through: the samples stay where they are
            with torch._C.DisableTorchFunction(), torch.no_grad():
                layout = propagate(func, args, kwargs, known, tensors, t) if known else None
            if func in rules.FRESH or (func in rules.SHAPED and (layout is None or layout.alone is not None)):
                continue  # a constant
            self._mark(t, _Sampled(layout))
            if t._base is not None and not isinstance(self._kind(t._base), _Sampled) and rules.mutates(func):
                self._mark(t._base, _Sampled(None))

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
            if not t.requires_grad or t.grad_fn is None:
                if self._kind(t) is None:
                    self._mark(t, _Derived(None))
            else:
                self.count += 1
                made = Derivation(func, args, kwargs, get_gradient_edge(t), t.shape, sources, self.count, before)
                self._mark(t, _Derived(made if sources else None, t._version))

    def _refuse_higher_order(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = 4 if func is torch.autograd.grad else 3
        if _is_wrapped([t for t in _flat(args, kwargs) if isinstance(t, Tensor)]):
            return  # a torch.func transform of the user's own
        if kwargs.get("create_graph", len(args) > position and args[position]):
            raise HigherOrderError(
                f"torch.autograd.{func.__name__} with create_graph=True inside the model's forward: it "
                "differentiates itself, and its parameters act through a gradient. Use engine='loop' (or 'vmap' with "
                "torch.func)."
            )


class Watch(TorchFunctionMode):
    """For engines that run samples alone: raises where that would be another function, or miss a parameter."""

    def __init__(self, hidden: Mapping[int, str] | None = None, shared: Iterable[Tensor] = ()) -> None:
        """``hidden``: parameters (by id) that must not be used as they are, because functional copies stand for
        them; ``shared``: tensors without samples, on which statistics couple nothing (standardised weights).
        """
        super().__init__()
        self.hidden = hidden or {}
        self.shared: dict[int, weakref.ref[Tensor]] = {}
        self.share(shared)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """These have no samples, nor has what is computed from them alone."""
        self.shared.update((id(t), weakref.ref(t)) for t in tensors)

    def _all_shared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = [t for t in _flat(args, kwargs) if isinstance(t, Tensor)]
        return bool(tensors) and all((ref := self.shared.get(id(t))) is not None and ref() is t for t in tensors)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shared = bool(self.shared) and self._all_shared(args, kwargs)
        if (reason := rules.coupling(func, args, kwargs)) and not shared:
            raise BatchCoupledError(
                f"{function_name(func)} {reason}, so a sample alone is another function than a sample of this batch. "
                "Use "
                "engine='hooks' with coupled='eval', 'frozen', 'copy', 'loss' or 'influence', or call model.eval()."
            )
        if self.hidden:
            for t in _flat(args, kwargs):
                if isinstance(t, Tensor) and id(t) in self.hidden:
                    raise CaptureError(
                        f"parameter '{self.hidden[id(t)]}' is used through a reference of its own, not through the "
                        "model's attribute, so torch.func does "
                        "not see it. Refer to it as model.<name> (also in loss_fn), or use engine='hooks'."
                    )
        out = func(*args, **kwargs)
        if shared:
            self.share(tensors_in(out))
        return out


_DIFFERENTIATES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of the arguments; the common flat case without a pytree."""
    if any(isinstance(a, (tuple, list, dict)) for a in args) or any(
        isinstance(v, (tuple, list, dict)) for v in kwargs.values()
    ):
        return tree_leaves((args, kwargs))
    return [*args, *kwargs.values()]


def tensors_in(out: Any) -> Iterator[Tensor]:
    """The tensors of what a function returned; also of named results (``sort``), which pytrees take for leaves."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from tensors_in(item)


def _results(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, mutates: bool) -> Iterator[Tensor]:
    """What a call made: its outputs, or the tensor it changed."""
    if out is None and mutates:
        out = args[0]
    yield from tensors_in(out)
    if isinstance(into := kwargs.get("out"), Tensor) and into is not out:
        yield into


def mapped(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """``f`` of every tensor in a structure; the common ones without a pytree."""
    if isinstance(tree, Tensor):
        return f(tree)
    if type(tree) in (tuple, list):
        return type(tree)(mapped(f, x) for x in tree)
    if type(tree) is dict:
        return {key: mapped(f, x) for key, x in tree.items()}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    return tree_map(lambda x: f(x) if isinstance(x, Tensor) else x, tree)


def _saves_elsewhere() -> bool:
    """Whether saved-tensor hooks are active (checkpointing): they count what a forward saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _metadata(node: Node) -> dict[str, Any]:
    """What may be kept with an autograd node, for as long as its graph lives."""
    return node.metadata  # type: ignore[return-value]


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


def _is_wrapped(tensors: list[Tensor]) -> bool:
    """Inside a user's own vmap or grad, samples are not on an axis of their own."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


# ---- the walk ---------------------------------------------------------------------------------------------------


def behind(t: Tensor) -> tuple[list[Call], list[Tensor]]:
    """The recorded calls and, without passing through these, the leaves that a tensor was computed from."""
    calls: dict[int, Call] = {}
    leaves: dict[int, Tensor] = {}
    stack, seen = [t.grad_fn], set[Node]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = _metadata(node).get(_KEY, ())
        calls.update((id(call), call) for call, _ in found)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves[id(variable)] = variable
        stack.extend(n for n, _ in node.next_functions if not found)
    return list(calls.values()), list(leaves.values())


@dataclass(eq=False)
class Reached:
    """What the losses depend on."""

    calls: list[Call] = field(default_factory=list)
    leaves: set[int] = field(default_factory=set)  # ids of tensors used outside any recorded call
    roots: list[GradientEdge] = field(default_factory=list)  # outputs of the calls that have no call upstream
    opaque: list[str] = field(default_factory=list)  # nodes that hide a graph of their own


def reached(start: Iterable[Node | None], owner: Any = None) -> Reached:
    """Walk the graph from these nodes; at a recorded call (of this owner), go on with its sampled inputs.

    Differentiating towards the roots passes through every recorded output, and computes no weight gradient.
    """
    result, seen = Reached(), set[Call]()
    below: dict[Node, bool] = {}  # whether a recorded call is at or upstream of a node; known after its visit
    stack: list[tuple[Node, list[Node] | None]] = [(node, None) for node in start if node is not None]
    while stack:
        node, visited = stack.pop()
        found = [pair for pair in _metadata(node).get(_KEY, ()) if owner is None or pair[0].owner is owner]
        if visited is None:
            if node in below:
                continue
            below[node] = bool(found)
            follow = (
                [n for call, _ in found for n in call.inputs]
                if found
                else [n for n, _ in node.next_functions if n is not None]
            )
            stack.append((node, follow))
            stack.extend((n, None) for n in follow)
            if not found and (variable := getattr(node, "variable", None)) is not None:
                result.leaves.add(id(variable))
            elif node.name() == "CheckpointFunctionBackward":
                result.opaque.append(node.name())
            for call, _ in found:
                if call not in seen:
                    seen.add(call)
                    call.expected = 0
                    result.calls.append(call)
                call.expected += 1
            continue
        upstream = any(below[n] for n in visited)
        below[node] = upstream or bool(found)
        if found and not upstream:
            result.roots.extend(GradientEdge(node, number) for _, number in found)
    return result
