"""A batch as the user gives it: inputs, targets, and where the samples are in each of their tensors.

By default every tensor has the same size ``N`` at axis 0.  Tensors without axes, and with size 1 at axis 0 while
others have more, are shared by all samples.  ``batch_dim`` says otherwise: an int for all tensors, or a tuple
``(inputs, targets)`` or ``(inputs, targets, outputs)`` with, for each, an int, ``None`` (shared), or a pytree of those
in the shape of (a prefix of) that argument, as for ``torch.vmap``'s ``in_dims``.  ``list`` in the place of an int says
that a list has an entry for each sample (images of several sizes), which is one leaf here: `Listed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import PyTree, tree_flatten, tree_leaves, tree_map, tree_unflatten

from .errors import ArgumentError, EmptyBatchError, SampleAxisError
from .layout import Layout
from .state import OWN, modules_of

Axis = int | None


@dataclass(frozen=True, eq=False)
class Listed:
    """A list with an entry for each sample: to be cut like a tensor that has the samples on axis 0."""

    items: list[Any]
    ndim = 1
    layout = torch.strided
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int]:
        return (len(self.items),)

    def narrow(self, _: int, start: int, length: int) -> Listed:
        return Listed(self.items[start : start + length])

    def index_select(self, _: int, index: Tensor) -> Listed:
        return Listed([self.items[i] for i in index.tolist()])

    def tensors(self) -> list[tuple[Tensor, Layout]]:
        """Each is one sample's alone."""
        n = len(self.items)
        owned = ((x, i) for i, item in enumerate(self.items) for x in tree_leaves(item) if isinstance(x, Tensor))
        return [(x, Layout(n, alone=i)) for x, i in owned]

    def over(self, f: Callable[[Tensor, int], Tensor]) -> Listed:
        return Listed(tree_map(lambda x: f(x, 0) if isinstance(x, Tensor) else x, self.items))


@dataclass(frozen=True)
class Tree:
    """Tensors in a structure, each with its sample axis (``None``: shared; anything else than a tensor is shared, but
    for what is `Listed`).
    """

    leaves: list[Any]
    spec: Any
    axes: list[Axis]

    def whole(self) -> Any:
        return unflatten([x.items if type(x) is Listed else x for x in self.leaves], self.spec)

    def tensors(self) -> list[tuple[Tensor, Axis | Layout]]:
        """All of them, each with where its samples are."""
        found: list[tuple[Tensor, Axis | Layout]] = []
        for x, axis in zip(self.leaves, self.axes, strict=True):
            if isinstance(x, Tensor):
                found.append((x, axis))
            elif type(x) is Listed:
                found += x.tensors()
        return found

    def sampled(self) -> list[tuple[Tensor, int]]:
        """The tensors that have samples, each with its sample axis."""
        pairs = zip(self.leaves, self.axes, strict=True)
        return [(x, axis) for x, axis in pairs if axis is not None and type(x) is not Listed]

    def one(self, pieces: Iterable[Tensor]) -> Any:
        """A batch of one, given what of `sampled` is that sample's, without its sample axis."""
        it, pairs = iter(pieces), zip(self.leaves, self.axes, strict=True)
        return unflatten([x if axis is None else next(it).unsqueeze(axis) for x, axis in pairs], self.spec)

    def over(self, f: Callable[[Tensor, int], Tensor]) -> Tree:
        """The same with ``f(tensor, axis)`` for every tensor that has samples."""
        pairs = zip(self.leaves, self.axes, strict=True)
        leaves = [x if axis is None else x.over(f) if type(x) is Listed else f(x, axis) for x, axis in pairs]
        return Tree(leaves, self.spec, self.axes)

    def map(self, f: Callable[[Tensor, int], Tensor]) -> Any:
        """The structure of `over`."""
        return self.over(f).whole()

    def sample(self, n: int) -> Any:
        """Sample ``n`` alone, as a batch of one."""
        return self.narrow(n, 1).whole()

    def select(self, index: Tensor) -> Tree:
        """The samples of ``index``."""
        return self._cut(lambda x, axis: x.index_select(axis, index.to(x.device)))

    def narrow(self, start: int, length: int) -> Tree:
        """Consecutive samples, as views where tensors are strided."""

        def cut(x: Tensor, axis: int) -> Tensor:
            if x.layout is torch.strided:
                return x.narrow(axis, start, length)
            return x.index_select(axis, torch.arange(start, start + length, device=x.device))

        return self._cut(cut)

    def _cut(self, cut: Callable[[Tensor, int], Tensor]) -> Tree:
        pairs = zip(self.leaves, self.axes, strict=True)
        return Tree([x if axis is None else _cut(cut, x, axis) for x, axis in pairs], self.spec, self.axes)


def taken_apart(*trees: Tree) -> tuple[list[list[Tensor]], list[list[int]]]:
    """The tensors of each that have samples, and their sample axes: arguments of ``vmap``, and its ``in_dims``."""
    if any(type(x) is Listed for tree in trees for x in tree.leaves):
        raise SampleAxisError(
            "batch_dim=list: samples in a list can't be run together by torch.vmap, which takes tensors with a sample "
            "axis. Use engine='hooks' or 'loop', or pad the samples to one size."
        )
    pairs = [tree.sampled() for tree in trees]
    return [[x for x, _ in own] for own in pairs], [[axis for _, axis in own] for own in pairs]


def _cut(cut: Callable[[Tensor, int], Tensor], x: Tensor, axis: int) -> Tensor:
    try:
        return cut(x, axis)
    except (NotImplementedError, TypeError) as error:
        raise SampleAxisError(
            f"single samples can't be taken out of a {type(x).__name__} of layout {x.layout} and shape "
            f"{tuple(x.shape)}: {str(error).split('. ')[0]}. Give a dense tensor (or torch.sparse_coo)."
        ) from None


@dataclass(frozen=True)
class Batch:
    """``N`` samples: what the model is called with, and what the criterion compares with."""

    n: int
    inputs: Tree
    targets: Tree
    output_dim: PyTree  # as given: outputs are only known later

    @staticmethod
    def of(inputs: Any, targets: Any, batch_dim: PyTree = 0) -> Batch:
        if isinstance(inputs, Mapping) and not isinstance(inputs, dict):
            inputs = dict(inputs)  # what tokenizers return is no dict, and pytrees don't know it
        dims = three_dims(batch_dim)
        if isinstance(inputs, list) and dims[0] is list:
            inputs = (inputs,)  # the one argument
        given = [
            _axes(tree, dim, what)
            for tree, dim, what in zip((inputs, targets), dims[:2], ("inputs", "targets"), strict=True)
        ]
        leaves, _, claimed, default = given[0]
        if (
            not default
            and any(isinstance(x, Tensor | Listed) for x in leaves)
            and not any(a is not None for a in claimed)
        ):
            raise SampleAxisError(
                "batch_dim= says that every tensor among the inputs is shared, so no sample is in any of them. Where "
                "one tensor holds samples of several sizes (the nodes of graphs), pad each to one size, with samples "
                "on an axis of their own; see 'Graphs in one node tensor' in docs/losses.md."
            )
        sizes = [
            x.shape[axis]
            for leaves, _, axes, _ in given
            for x, axis in zip(leaves, axes, strict=True)
            if axis is not None
        ]
        n = next((size for size in sizes if size != 1), 1) if sizes else 1
        if not sizes:
            raise SampleAxisError(
                "no tensor among the inputs and targets has a sample axis. Give batched tensors (arrays and "
                "lists aren't converted: torch.as_tensor does), or say where the samples are with batch_dim=."
            )
        if n == 0:
            raise EmptyBatchError(
                "the batch has no sample (N = 0), so there is nothing to differentiate. Skip empty "
                "batches; a step with noise takes them as []: opt.step([]) of persample.optim, "
                "fill_grad_sample([], model) for Opacus."
            )
        _check_sizes(given, n, batch_dim)
        trees = [
            Tree(leaves, spec, [a if a is None or x.shape[a] == n else None for x, a in zip(leaves, axes, strict=True)])
            for leaves, spec, axes, _ in given  # of size one where others have more: shared
        ]
        if not any(axis is not None for axis in trees[0].axes):
            raise SampleAxisError(
                f"none of the inputs has a sample axis of size N = {n}. Say where it is with batch_dim=."
                if any(isinstance(x, Tensor) for x in trees[0].leaves)
                else "there is no tensor among the inputs: arrays and lists aren't converted (torch.as_tensor does)."
            )
        for leaves, _, _, default in given:  # unless batch_dim says what they are
            if default and any(isinstance(x, np.ndarray) and x.shape[:1] == (n,) for x in leaves):
                raise SampleAxisError(
                    f"there is an array of NumPy with N = {n} entries among the inputs or targets, which isn't taken "
                    "apart by sample: make it a tensor (torch.as_tensor), or say that it is shared (batch_dim=)."
                )
        return Batch(n, trees[0], trees[1], dims[2])

    def outputs(self, outputs: Any) -> Tree:
        """The sample axes of what the model returned."""
        leaves, spec = flatten(outputs)
        try:
            dims = (
                [self.output_dim] * len(leaves)
                if isinstance(self.output_dim, int)
                else _prefix(self.output_dim, outputs)
            )
        except ValueError as error:
            raise SampleAxisError(f"batch_dim for the outputs does not fit what the model returned: {error}") from None
        axes: list[Axis] = []
        for x, dim in zip(leaves, dims, strict=True):
            places = [dim, 0] if isinstance(self.output_dim, int) else [dim]  # a sequence-first model may return [N, C]
            axes.append(next((d % x.ndim for d in places if d is not None and _has(x, d, self.n)), None))
        return Tree(leaves, spec, axes)

    def listed(self) -> str:
        """A hint where an argument is a list of as many numbers as there are samples; begins with a space."""
        whole = self.inputs.whole()
        arguments = whole.items() if isinstance(whole, Mapping) else enumerate(whole) if type(whole) is tuple else ()
        for key, x in arguments:
            if (
                isinstance(x, (tuple, list))
                and len(x) == self.n
                and not any(isinstance(t, Tensor) for t in tree_leaves(x))
            ):
                return (
                    f" inputs[{key!r}], a {type(x).__name__} of {self.n} and no tensor, goes whole to every sample: "
                    "where it has an entry for each, make it a tensor (torch.as_tensor)."
                )
        return ""

    def joinable(self, outputs: Sequence[Any]) -> bool:
        """Whether what a model returned for some samples after the other can be put together: as many tensors, and not
        where a list may have an entry for each sample, as the inputs have.
        """
        listed = any(type(x) is Listed for x in self.inputs.leaves)
        alike = len({len(flatten(output)[0]) for output in outputs}) == 1
        return alike and (not listed or all(isinstance(x, Tensor) for x in outputs))

    @property
    def sizes(self) -> list[int]:
        """How many entries each sample has, where inputs are in lists; else nothing."""
        lists = [x.tensors() for x in self.inputs.leaves if type(x) is Listed]
        return [sum(x.numel() for own in lists for x, at in own if at.alone == i) for i in range(self.n * bool(lists))]

    def select(self, index: Tensor) -> Batch:
        return Batch(len(index), self.inputs.select(index), self.targets.select(index), self.output_dim)


def _has(x: Any, dim: int, n: int) -> bool:
    return isinstance(x, Tensor) and -x.ndim <= dim < x.ndim and x.shape[dim] == n


def three_dims(batch_dim: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """Of inputs, targets and outputs."""
    if batch_dim is list:
        return list, list, 0
    if isinstance(batch_dim, int):
        return batch_dim, batch_dim, batch_dim
    if isinstance(batch_dim, tuple) and len(batch_dim) in (2, 3):
        return batch_dim[0], batch_dim[1], batch_dim[2] if len(batch_dim) == 3 else 0
    if isinstance(batch_dim, (dict, list)):
        return batch_dim, 0, 0
    raise SampleAxisError(
        "batch_dim must be an int, list, a pytree of these for the inputs, or a tuple (inputs, targets[, outputs]), "
        f"got {batch_dim!r}."
    )


def _listed(dims: PyTree, tree: Any) -> tuple[PyTree, Any]:
    """``tree`` with the lists that ``dims`` says to have an entry for each sample as one leaf each; and where the
    samples are then.
    """
    if dims is list and isinstance(tree, list):
        return 0, Listed(tree)
    if dims is list and isinstance(tree, (tuple, dict)) and not hasattr(tree, "_fields"):
        dims = dict.fromkeys(tree, list) if isinstance(tree, dict) else [list] * len(tree)
    if dims is list:
        return 0, tree
    if isinstance(tree, dict) and isinstance(dims, Mapping) and not tree.keys() - dims.keys():
        pairs = {key: _listed(dims[key], x) for key, x in tree.items()}
        return {key: dim for key, (dim, _) in pairs.items()}, {key: x for key, (_, x) in pairs.items()}
    if type(tree) in (tuple, list) and isinstance(dims, (tuple, list)) and len(tree) == len(dims):
        both = [_listed(dim, x) for dim, x in zip(dims, tree, strict=True)]
        return [dim for dim, _ in both], type(tree)(x for _, x in both)
    return dims, tree


def _prefix(dims: PyTree, tree: Any) -> list[Axis]:
    """``dims`` spread over the leaves of ``tree``."""
    if dims is None or isinstance(dims, int):
        return [dims] * len(tree_leaves(tree))
    if isinstance(tree, Mapping) and isinstance(dims, Mapping):
        if missing := tree.keys() - dims.keys():
            raise ValueError(f"no entry for {sorted(map(str, missing))}")
        return [axis for key in tree for axis in _prefix(dims[key], tree[key])]
    if isinstance(tree, Sequence) and isinstance(dims, Sequence) and len(tree) == len(dims):
        return [axis for dim, branch in zip(dims, tree, strict=True) for axis in _prefix(dim, branch)]
    raise ValueError(f"{dims!r} for a {type(tree).__name__}")


def _check_not_packed(tree: Any, dims: list[Axis], what: str) -> None:
    """Raise for packed sequences whose samples are asked for."""
    at = 0
    for x in tree_leaves(tree, is_leaf=lambda x: isinstance(x, PackedSequence)):
        size = len(tree_leaves(x)) if isinstance(x, PackedSequence) else 1
        if isinstance(x, PackedSequence) and any(axis is not None for axis in dims[at : at + size]):
            raise SampleAxisError(
                f"{what}: the samples of a PackedSequence are on no axis. Pass the padded tensor and the lengths, as a "
                "tensor, and pack inside the model (torch.nn.utils.rnn.pack_padded_sequence)."
            )
        at += size


def _axes(tree: Any, dim: PyTree, what: str) -> tuple[list[Any], Any, list[Axis], bool]:
    """Leaves, structure and claimed axes; whether they were the default."""
    default = isinstance(dim, int) or dim is list
    if not isinstance(dim, int):
        dim, tree = _listed(dim, tree)
    leaves, spec = tree_flatten(tree)
    try:
        dims = _prefix(dim, tree)
    except ValueError as error:
        raise SampleAxisError(f"batch_dim does not fit the {what}: {error}") from None
    if len(leaves) > 1 and any(axis is not None for axis in dims):
        _check_not_packed(tree, dims, what)
    axes: list[Axis] = []
    for x, claimed in zip(leaves, dims, strict=True):
        if isinstance(x, Tensor) and x.is_nested:
            raise SampleAxisError(
                f"{what}: a nested tensor has samples of several shapes, which the recorded calls can't be told apart "
                "by. Pad them to one (torch.nested.to_padded_tensor) and mask what was added."
            )
        if isinstance(x, Tensor) and x.is_inference():
            raise SampleAxisError(
                f"{what}: a tensor of shape {tuple(x.shape)} was made inside torch.inference_mode(), where autograd "
                "can't keep it. clone() it outside."
            )
        if not isinstance(x, Tensor | Listed) or claimed is None or (x.ndim == 0 and default):
            axes.append(None)
        elif not -x.ndim <= claimed < x.ndim:
            if default and x.ndim == 1 and what == "targets":
                axes.append(0)  # labels [N] of sequence-first inputs
                continue
            raise SampleAxisError(f"{what}: a tensor of shape {tuple(x.shape)} has no axis {claimed} (batch_dim).")
        else:
            axes.append(claimed % x.ndim)
    return leaves, spec, axes, default


def _check_sizes(given: list[tuple[list[Any], Any, list[Axis], bool]], n: int, batch_dim: PyTree) -> None:
    """Raise for a tensor that has another number of samples than the first of them."""
    found = [
        (what, x, axis, default)
        for what, (leaves, _, axes, default) in zip(("inputs", "targets"), given, strict=True)
        for x, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]
    first, y, at, _ = next(entry for entry in found if entry[1].shape[entry[2]] == n)
    for what, x, axis, default in found:
        if x.shape[axis] == n or (x.shape[axis] == 1 and default):
            continue
        spelled = repr(batch_dim).replace(repr(list), "list")
        said = "" if type(batch_dim) is int and batch_dim == 0 else f" (batch_dim={spelled})"
        fronts = {x.shape[0] for _, x, _, _ in found}
        way = f" At axis 0, all have size {fronts.pop()}: leave batch_dim= out?" if said and len(fronts) == 1 else ""
        if what == first and axis == at == 0 and x.ndim > 1 and x.shape[1:] == y.shape[1:]:
            way += (
                " If these are sequences, one for each sample, give them as a list (no tuple), with batch_dim=list, or "
                "padded (torch.nn.utils.rnn.pad_sequence)."
            )
        raise SampleAxisError(
            f"{what}: {_shown(x)} has size {x.shape[axis]} at axis {axis}, but the {first}, {_shown(y)}, "
            f"have N = {n} samples at axis {at}{said}.{way} Give as many of each, or say "
            "where the samples are with batch_dim= (None: shared by all samples)."
        )


def _shown(x: Tensor | Listed) -> str:
    return f"a list of {len(x.items)}" if isinstance(x, Listed) else f"a tensor of shape {tuple(x.shape)}"


def cat(parts: Sequence[Any], axis: Axis) -> Any:
    """What a model has returned for some samples after the other; without a sample axis, what is the same for all.

    ``None`` where neither can be, as where sequences are padded to the longest of the samples that are run together.
    """
    first, *others = parts
    if axis is not None:
        alike = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in parts}
        return torch.cat(list(parts), axis) if len(alike) == 1 else None
    if isinstance(first, Tensor):
        return first if all(x.shape == first.shape and torch.equal(x, first) for x in others) else None
    return first


def detached(tree: Any) -> Any:
    """The same structure, cut off from autograd."""
    leaves, spec = flatten(tree)
    return unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], spec)


@dataclass(frozen=True)
class _Fields:
    """The structure of a dataclass that pytrees don't know: an instance to copy, and the structure of its fields."""

    like: Any
    spec: Any


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a structure of tuples, lists, dicts, and (at the top) any dataclass; and the structure."""
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree and is_dataclass(tree) and not isinstance(tree, type):
        leaves, spec = tree_flatten({f.name: getattr(tree, f.name) for f in fields(tree)})
        like = copy(tree)
        for f in fields(tree):  # the structure holds no tensors
            object.__setattr__(like, f.name, None)
        return leaves, _Fields(like, spec)
    return leaves, spec


def unflatten(leaves: list[Any], spec: Any) -> Any:
    """Back from `flatten`."""
    if not isinstance(spec, _Fields):
        return tree_unflatten(leaves, spec)
    made = copy(spec.like)
    for name, value in tree_unflatten(leaves, spec.spec).items():
        object.__setattr__(made, name, value)
    return made


def call_model(model: nn.Module, inputs: Any) -> Any:
    """A tuple or list is positional arguments, a dict keyword arguments, anything else the one argument.

    Recorders that the user has attached (`persample.extend`) don't notice.
    """
    with suspended(model):
        return apply(model, inputs)


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """What runs meanwhile is not the user's: recorders of this model, or of parts of it, don't listen."""
    with ExitStack() as stack:
        stack.callback(OWN.reset, OWN.set(True))
        for module in modules_of(model):
            for hook in module._forward_pre_hooks.values():
                if (pause := getattr(hook, "suspended", None)) is not None:
                    stack.enter_context(pause())
        yield


def apply(model: nn.Module, inputs: Any) -> Any:
    """`call_model`, with recorders listening."""
    args: Sequence[Any] = (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        args = inputs
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if (signature := _unfit(model, args, kwargs)) is None:
            raise
        raise ArgumentError(
            f"the model can't be called with these inputs: {error}; it has forward{signature}. inputs= is one tensor, "
            "a tuple of positional arguments, or a dict of all arguments by name. For both kinds at once, name the "
            "positional ones too: {'x': x, 'scale': scale}; where they have no names (*args), wrap the model in a "
            "module that gives them some."
        ) from error


def _unfit(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> inspect.Signature | None:
    """The signature of ``forward``, if these can't be its arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return signature
    return None
