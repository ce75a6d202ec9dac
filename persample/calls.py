"""What is recorded of a forward pass: `Call`, the place where parameters met samples, and the walk that finds it again.

A call lives in the metadata of the autograd node of its output, and nowhere else: a graph that is dropped drops its
calls, and nothing is ever stored on the user's modules, parameters or tensors.  `reached` walks the graph from the
losses to the recorded calls.  At a call it goes on with the call's *sampled* inputs only, so every parameter it still
arrives at was used where `persample.capture` can't see: nothing is missed silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from .errors import InplaceError, SampleAxisError
from .layout import Layout, samples_first

KEY = "persample"  # of a recorded call in its autograd node's metadata


# What is called inside of functions that users write; and, as they are asked for, the names of torch's functions: it
# touches the filters of warnings to look one up, and whatever was said once would be said again.
_WRITTEN: dict[Callable[..., Any], str] = {
    torch._C._VariableFunctions._pad_packed_sequence: "torch.nn.utils.rnn.pad_packed_sequence (which pads to the "
    "longest of the batch, unless total_length=x.shape[1] says otherwise)"
}


def function_name(func: Callable[..., Any]) -> str:
    """How a user would write the function: ``torch.nn.functional.linear``."""
    if func not in _WRITTEN and (name := resolve_name(func)):
        _WRITTEN[func] = name
    return _WRITTEN.get(func) or getattr(func, "__qualname__", None) or repr(func)


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
    places: int = 1  # how many arguments of the call it is


def leaves_of(d: Derivation) -> list[Tensor]:
    """The parameters that a tensor was derived from."""
    found: dict[int, Tensor] = {}
    stack, seen = [d], {d}
    while stack:
        for source in stack.pop().sources:
            if source.derivation is None:
                found[id(source.tensor)] = source.tensor
            elif source.derivation not in seen:
                seen.add(source.derivation)
                stack.append(source.derivation)
    return list(found.values())


@dataclass(eq=False, slots=True, weakref_slot=True)
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
    lost: str = ""  # the call in which it was lost where the samples of its arguments are
    listener: Callable[[Call, Sequence[Tensor | None]], None] | None = None  # gets the gradients of the outputs
    begun: Callable[[Call, int], None] | None = None  # is told that a backward has come here
    heeds: Callable[[int], bool] | None = None  # which backwards count: not those that hooks of the model run in it
    results: tuple[Tensor, ...] = ()  # the outputs, detached, where the rule needs them
    replay: Any = None  # what a node of ours in the graph has to hand on (see `rules.REPLAYED`)
    expected: int = 0  # how many outputs the losses depend on
    parts: dict[int, Tensor | None] = field(
        default_factory=dict
    )  # gradients of some outputs, in a backward that goes on
    task: int = -1  # that backward
    owner: Any = None  # who had it recorded: several may watch one model
    within: Any = None  # how samples act on each other in its forward, as far as that was seen (`followed.Acts`)
    asked: Any = None  # the parameters that this one asked for, when the forward began (`persample.asked`)
    hooks: list[RemovableHandle] = field(default_factory=list)  # that tell it the gradients of its outputs

    @property
    def name(self) -> str:
        return function_name(self.func) + (f" (with '{self.where}')" if self.where else "")

    def arrive(self, i: int, grad: Tensor | None) -> None:
        """Called by autograd with the gradient of output ``i``."""
        if self.listener is None:
            return
        task = torch._C._current_graph_task_id()
        if self.heeds is not None and not self.heeds(task):
            return
        if task != self.task:
            self.task, self.parts = task, {}
            if self.begun is not None:
                self.begun(self, task)
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
                f"{self.name}: can't tell where the samples are in an output of shape {tuple(self.outputs[0][0])}"
                f"{self._since}. Keep the samples on one axis of their own, say where it is with batch_dim=, or use "
                "persample.gradients with engine='loop'."
            )
        return layout

    @property
    def _since(self) -> str:
        return f", as they were lost in {self.lost}" if self.lost else ""

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
                f"{self.name}: can't tell where the samples are in an argument of shape {tuple(x.shape)}{self._since}."
            )
        try:
            return samples_first(self.read(x), layout)
        except SampleAxisError as error:
            raise SampleAxisError(f"{self.name}: {error}") from None

    def tokens(self, x: Tensor, features: int = 1) -> Tensor:
        """``[N, T, *features]``: everything before the last axes is a token of its sample."""
        x = self.samples(x)
        return x if x.ndim == features + 2 else x.flatten(1, x.ndim - features - 1) if features else x.flatten(1)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments; the common cases, up to flat lists, without a pytree."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, _CONTAINERS) and not _SCALARS.issuperset(map(type, x)):
            if isinstance(x, dict) or any(isinstance(item, _CONTAINERS) for item in x):
                return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            found.extend(item for item in x if isinstance(item, Tensor))
    return found


_CONTAINERS = (tuple, list, dict)
_SCALARS = {int, float, bool, str, type(None)}


def common_type(values: Iterable[Any]) -> torch.dtype | None:
    """What holds the real types of all tensors, where there are several, which only autocast multiplies with each
    other; ``None`` where there is one, a complex one, or nothing holds them (float8).
    """
    kinds = {t.dtype for t in values if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())}
    if len(kinds) < 2 or any(kind.is_complex or kind.itemsize < 2 for kind in kinds):
        return None
    return functools.reduce(torch.promote_types, kinds)


def tensors_in(out: Any) -> Iterator[Tensor]:
    """The tensors of what a function returned; also of named results (``sort``), which pytrees take for leaves."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from tensors_in(item)


def mapped(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """``f`` of every tensor in a structure; the common ones without a pytree."""
    if isinstance(tree, Tensor):
        return f(tree)
    kind = type(tree)
    if kind in _SCALARS:
        return tree
    if kind is tuple and _SCALARS.issuperset(map(type, tree)):  # a stride, a shape
        return tree
    if kind is tuple or kind is list:
        return kind([f(x) if isinstance(x, Tensor) else x if type(x) in _SCALARS else mapped(f, x) for x in tree])
    if kind is dict:
        return {key: mapped(f, x) for key, x in tree.items()} if tree else tree
    return tree_map(lambda x: f(x) if isinstance(x, Tensor) else x, tree)


def metadata(node: Node) -> dict[str, Any]:
    """What may be kept with an autograd node, for as long as its graph lives."""
    return node.metadata  # type: ignore[return-value]


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
        found = metadata(node).get(KEY, ())
        calls.update((id(call), call) for call, _ in found)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves[id(variable)] = variable
        stack.extend(n for n, _ in node.next_functions if not found)
    return list(calls.values()), list(leaves.values())


# Why a call couples: what it does with several samples, as seen; or what a sample alone has told.
MIXES = "makes a sample's values depend on the other samples"
APART = "gives a sample other values alone than within the batch"


@dataclass(eq=False)
class Reached:
    """What the losses depend on."""

    calls: list[Call] = field(default_factory=list)
    leaves: set[int] = field(default_factory=set)  # ids of tensors used outside any recorded call
    inside: dict[int, str] = field(default_factory=dict)  # of these, the autograd.Functions of the user's that use them
    roots: list[GradientEdge] = field(default_factory=list)  # outputs of the calls that have no call upstream
    opaque: list[str] = field(default_factory=list)  # nodes that hide a graph of their own


def custom_function(node: Node) -> str:
    """The name of the `autograd.Function` of somebody's own whose backward pass a node is."""
    own = getattr(type(node), "_forward_cls", None)
    return "" if own is None or own.__module__.split(".")[0] == "torch" else str(own.__qualname__)


def between(t: Tensor, owner: Any) -> frozenset[str]:
    """What was done to the outputs of recorded calls (of this owner) to compute a tensor, by the names of nodes."""
    names, stack, seen = set[str](), [t.grad_fn], set[Node]()
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            if not any(call.owner is owner for call, _ in metadata(node).get(KEY, ())):
                names.add(node.name())
                stack.extend(n for n, _ in node.next_functions)
    return frozenset(names)


def reached(start: Iterable[Node | None], owner: Any = None) -> Reached:
    """Walk the graph from these nodes; at a recorded call (of this owner), go on with its sampled inputs.

    Differentiating towards the roots passes through every recorded output, and computes no weight gradient.
    """
    result, seen = Reached(), set[Call]()
    below: dict[Node, bool] = {}  # whether a recorded call is at or upstream of a node; known after its visit
    stack: list[tuple[Node, list[Node] | None]] = [(node, None) for node in start if node is not None]
    at: dict[Node, list[tuple[Call, int]]] = {}
    while stack:
        node, visited = stack.pop()
        if visited is not None:
            upstream, found = any(below[n] for n in visited), at.get(node)
            below[node] = upstream or bool(found)
            if found and not upstream:
                result.roots.extend(GradientEdge(node, number) for _, number in found)
            continue
        if node in below:
            continue
        found = [pair for pair in metadata(node).get(KEY, ()) if owner is None or pair[0].owner is owner]
        below[node] = bool(found)
        if found:
            at[node] = found
            follow = [n for call, _ in found for n in call.inputs]
        else:
            follow = [n for n, _ in node.next_functions if n is not None]
        stack.append((node, follow))
        stack.extend((n, None) for n in follow)
        if not follow and not found and (variable := getattr(node, "variable", None)) is not None:
            result.leaves.add(id(variable))
        elif not found and (name := custom_function(node)):
            result.inside.update((id(n.variable), name) for n in follow if hasattr(n, "variable"))
        elif node.name() == "CheckpointFunctionBackward":
            result.opaque.append(node.name())
        for call, _ in found:
            if call not in seen:
                seen.add(call)
                call.expected = 0
                result.calls.append(call)
            call.expected += 1
    return result
