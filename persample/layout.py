"""Where the samples of a batch lie inside a tensor, and how an operation moves them.

A tensor that depends on samples carries a `Layout`.  Its axis has ``outer * N * inner`` entries, and entry ``i``
belongs to sample ``(i // inner) % N``: batch-first (``axis=0``), sequence-first (``axis=1``), flattened tokens
(``inner=T``), heads folded into the batch (``inner=heads``) are all of this kind.  Where rows were picked by an
index (packed sequences, experts that see some of the tokens), ``owner`` says to which sample each entry belongs.

`propagate` derives the layout of an operation's output.  Operations that only move entries are followed exactly;
for all others the samples stay where their size is found again.  ``None`` means "can't tell", and is an error only
where a parameter meets such a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Layout:
    """Entry ``i`` of ``axis`` belongs to sample ``owner[i]``, by default ``(i // inner) % N``."""

    n: int
    axis: int = 0
    outer: int = 1
    inner: int = 1
    owner: Tensor | None = None  # [size]

    @property
    def size(self) -> int:
        """How many entries the axis has."""
        return self.outer * self.n * self.inner if self.owner is None else len(self.owner)

    @property
    def plain(self) -> bool:
        """Whether each sample has exactly one entry, in order."""
        return self.owner is None and self.outer == self.inner == 1

    def fits(self, shape: Sequence[int], axis: int) -> bool:
        return -len(shape) <= axis < len(shape) and shape[axis] == self.size

    def owners(self) -> Tensor:
        """The sample of every entry, ``[size]``."""
        if self.owner is not None:
            return self.owner
        return torch.arange(self.n).repeat_interleave(self.inner).repeat(self.outer)


def samples_first(x: Tensor, layout: Layout) -> Tensor:
    """``[N, k, *rest]``: the entries of every sample, in order; ragged ones are filled up with zeros."""
    x = x.movedim(layout.axis, 0)
    if layout.owner is None:
        x = x.unflatten(0, (layout.outer, layout.n, layout.inner))
        return x.transpose(0, 1).flatten(1, 2)
    owner = layout.owner.to(x.device)
    count = torch.bincount(owner, minlength=layout.n)
    order = owner.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(owner), device=x.device) - (count.cumsum(0) - count)[owner[order]]
    out = x.new_zeros(layout.n, int(count.max()) if len(owner) else 0, *x.shape[1:])
    out[owner, rank] = x
    return out


def one_sample(x: Tensor, layout: Layout, n: int) -> Tensor:
    """What belongs to sample ``n``: a slice along the layout's axis that keeps the axis."""
    if layout.plain:
        return x.narrow(layout.axis, n, 1)
    return x.index_select(layout.axis, (layout.owners() == n).nonzero().squeeze(1).to(x.device))


# ---- how operations move samples --------------------------------------------------------------------------------


def _named(*names: str) -> set[Callable[..., Any]]:
    found = [getattr(space, name, None) for name in names for space in (torch, Tensor)]
    return {f for f in found if f is not None}


_RESHAPES = _named("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "squeeze", "unsqueeze")
_MOVES = _named(
    "transpose",
    "swapaxes",
    "swapdims",
    "permute",
    "movedim",
    "moveaxis",
    "t",
    "adjoint",
    "select",
    "narrow",
    "chunk",
    "split",
    "unbind",
    "tensor_split",
    "split_with_sizes",
    "diagonal",
    "unfold",
    "hsplit",
    "vsplit",
    "dsplit",
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
_SPREADS = _named("expand", "expand_as", "broadcast_to", "repeat", "tile")
_REDUCES = _named(
    "sum",
    "nansum",
    "mean",
    "nanmean",
    "prod",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "median",
    "nanmedian",
    "mode",
    "quantile",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "logsumexp",
    "any",
    "all",
    "argmax",
    "argmin",
    "count_nonzero",
    "kthvalue",
) | {torch.linalg.vector_norm, torch.linalg.norm}
_SORTS = _named("sort", "argsort", "msort")
_RECURRENCES = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_PACK = torch._C._VariableFunctions._pack_padded_sequence
_UNPACK = torch._C._VariableFunctions._pad_packed_sequence


def propagate(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sequence[tuple[Tensor, Layout]],
    tensors: Sequence[Tensor],
    out: Tensor,
) -> Layout | None:
    """The layout of ``out = func(*args, **kwargs)``; ``sampled`` are those of its ``tensors`` that depend on
    samples.
    """
    found = _followed(func, args, kwargs, sampled, tensors, out)
    if found is None and sampled[0][1].n == 1 and out.ndim and len(out):
        return Layout(1, inner=len(out))  # wherever it is, all belongs to the one sample
    return found


def _followed(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sequence[tuple[Tensor, Layout]],
    tensors: Sequence[Tensor],
    out: Tensor,
) -> Layout | None:
    first, layout = sampled[0]
    if args and first is args[0]:
        if func in _RESHAPES and out.numel() == first.numel():
            return _reshaped(layout, first.shape, out.shape)
        if func in _MOVES or (func is Tensor.__getitem__ and _is_basic(args[1])):
            return _moved(layout, func, args, kwargs, out)
        if func is Tensor.__getitem__ or func in _SELECTS:
            return _picked(layout, func, first, args, kwargs, out)
        if func is _PACK:
            return _packed(layout, args, out)
    if func is Tensor.__setitem__ and out is args[0]:
        return _assigned(args, sampled, out)
    if func is _UNPACK:
        return _unpacked(layout, args, out)
    if func in _RECURRENCES:
        return _recurred(layout, first, args, out)
    if func is torch.einsum:
        return _einsum(args, sampled, out)
    if func in _SORTS and first is args[0]:
        return _sorted(layout, func, args, kwargs, out)
    if func in _REDUCES and len(sampled) == 1:
        return _probed(layout, func, args, kwargs, sampled, out)
    broadcast = func in _SPREADS or any(t.ndim == out.ndim for t in tensors)
    for x, candidate in sorted(sampled, key=lambda pair: -pair[0].numel()):
        ambiguous = x.shape != out.shape and sum(size == candidate.size for size in out.shape) > 1
        found = _probed(candidate, func, args, kwargs, sampled, out) if ambiguous else None
        if (found := found or _kept(candidate, x.ndim, out.shape, broadcast)) is not None:
            return found
    return None


def _probed(
    layout: Layout,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sampled: Sequence[tuple[Tensor, Layout]],
    out: Tensor,
) -> Layout | None:
    """Several axes have the right size: call the function once more for its shapes only, with more samples."""
    axis_of = {id(t): at.axis for t, at in sampled if at.size == layout.size}

    def grown(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        axis = axis_of.get(id(t))
        shape = [size + (a == axis) for a, size in enumerate(t.shape)]
        return torch.empty(shape, dtype=t.dtype, device="meta")

    try:
        more = func(*tree_map(grown, args), **tree_map(grown, kwargs))
    except Exception:  # a function that can't tell shapes, or was told this size as a number
        return None
    shapes = [m.shape for m in tree_leaves(more) if isinstance(m, Tensor) and m.ndim == out.ndim]
    found = {a for shape in shapes for a in range(out.ndim) if shape[a] == out.shape[a] + 1 == layout.size + 1}
    return replace(layout, axis=found.pop()) if len(found) == 1 else None


def _kept(layout: Layout, ndim: int, shape: Sequence[int], broadcast: bool = False) -> Layout | None:
    """The samples of an argument found again in an output of this shape."""
    aligned = layout.axis + len(shape) - ndim  # broadcasting aligns at the right
    for axis in (aligned, layout.axis) if broadcast and len(shape) > ndim else (layout.axis, aligned):
        if axis >= 0 and layout.fits(shape, axis):
            return replace(layout, axis=axis)
    places = [axis for axis in range(len(shape)) if layout.fits(shape, axis)]
    if len(places) == 1:
        return replace(layout, axis=places[0])
    if layout.plain and layout.axis == 0 and shape and shape[0] and shape[0] % layout.n == 0:
        return replace(layout, inner=shape[0] // layout.n)
    return None


def _reshaped(layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """Reshaping keeps the order of all entries: follow the sample's place in the flat index."""
    behind = prod(old[layout.axis + 1 :])
    same = [a for a in range(len(new)) if new[a] == layout.size and prod(new[a + 1 :]) == behind]
    if same or layout.owner is not None:
        return replace(layout, axis=same[0]) if same else None
    stride = layout.inner * behind
    found = []
    for axis in range(len(new)):
        below = prod(new[axis + 1 :])
        if below and stride % below == 0 and new[axis] % (layout.n * (stride // below)) == 0 and new[axis]:
            inner = stride // below
            found.append(Layout(layout.n, axis, new[axis] // (layout.n * inner), inner))
    return min(found, key=lambda at: (at.axis == len(new) - 1, at.outer), default=None)  # a choice for N = 1 only


def _moved(
    layout: Layout, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Layout | None:
    """Views: do the same to a shadow in which only the sample axis has a stride."""
    x = args[0]
    size = max(2, x.shape[layout.axis])  # strides say nothing about an axis of length one
    shape = [size if a == layout.axis else s for a, s in enumerate(x.shape)]
    shadow = torch.empty(size, dtype=torch.uint8).as_strided(shape, [int(a == layout.axis) for a in range(x.ndim)])
    moved = func(shadow, *args[1:], **kwargs)
    parts = (
        [moved]
        if isinstance(moved, Tensor)
        else [m for m in moved if m.numel() == out.numel() // x.shape[layout.axis] * size]
    )
    if not parts or not x.shape[layout.axis]:
        return None
    places = [a for a in range(out.ndim) if parts[0].stride(a) and parts[0].shape[a] == size]
    return replace(layout, axis=places[0]) if len(places) == 1 else None


def _is_basic(index: Any) -> bool:
    index = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or (isinstance(i, (int, slice)) and not isinstance(i, bool)) for i in index)


def _assigned(args: tuple[Any, ...], sampled: Sequence[tuple[Tensor, Layout]], out: Tensor) -> Layout | None:
    """``out[index] = value``: the axis of ``out`` that the index would bring to where the samples are in ``value``."""
    value, layout = sampled[-1]
    if value is not args[2] or not _is_basic(args[1]) or layout.owner is not None:
        return None
    for axis in range(out.ndim):
        if out.shape[axis] == layout.size:
            piece = _moved(replace(layout, axis=axis), Tensor.__getitem__, (out, args[1]), {}, out[args[1]])
            if piece is not None and piece.axis == layout.axis + out[args[1]].ndim - value.ndim:
                return replace(layout, axis=axis)
    return None


_SELECTS = _named("index_select", "take_along_dim", "masked_select")


def _picked(
    layout: Layout, func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Layout | None:
    """Rows picked by an index: pick their owners by the same index."""
    if (func is Tensor.__getitem__ and layout.axis == 0) or x.ndim == 1:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if layout.axis == 0 and isinstance(index[0], slice) and index[0] == slice(None):
            return _kept(layout, x.ndim, out.shape)
        owners = layout.owners().to(x.device).view(-1, *[1] * (x.ndim - 1)).expand(x.shape)
        picked = func(owners, *args[1:], **kwargs)
        flat = picked.reshape(picked.shape[0], -1)[:, :1]
        if picked.ndim == 0 or not bool((picked.reshape(picked.shape[0], -1) == flat).all()):
            return None
        return _owned(layout.n, 0, flat.squeeze(1))
    if func in _SELECTS and func not in _named("masked_select", "take_along_dim"):
        dim, index = _bind(args[1:], kwargs, "dim", "index")
        if dim % x.ndim == layout.axis:
            return _owned(layout.n, layout.axis, layout.owners().to(x.device)[index])
    return _kept(layout, x.ndim, out.shape)


def _owned(n: int, axis: int, owner: Tensor) -> Layout:
    """The plain layout where the owners are just all samples in order."""
    if len(owner) and len(owner) % n == 0:
        inner = len(owner) // n
        if torch.equal(owner, torch.arange(n, device=owner.device).repeat_interleave(inner)):
            return Layout(n, axis, 1, inner)
    return Layout(n, axis, owner=owner)


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _packed(layout: Layout, args: tuple[Any, ...], out: Tensor) -> Layout | None:
    """``_pack_padded_sequence(input, lengths, batch_first)``: time-major, the longest sample first."""
    _, lengths, batch_first = args[:3]
    if layout.axis != (0 if batch_first else 1) or out.shape[:1] != (int(lengths.sum()),):
        return None
    owners = layout.owners()
    return _owned(layout.n, 0, torch.cat([owners[: int((lengths > t).sum())] for t in range(int(lengths.max()))]))


def _unpacked(layout: Layout, args: tuple[Any, ...], out: Tensor) -> Layout | None:
    """``_pad_packed_sequence(data, batch_sizes, batch_first, ...)``: the first step names every sample."""
    _, batch_sizes, batch_first = args[:3]
    if out.ndim < 2:  # the lengths
        return None
    return _owned(layout.n, 0 if batch_first else 1, layout.owners()[: int(batch_sizes[0])])


def _sorted(
    layout: Layout, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Layout | None:
    """A list of samples in another order; a table sorted over the samples mixes them."""
    x = args[0]
    dim = (
        0
        if func in _named("msort")
        else next((a for a in (*args[1:2], kwargs.get("dim")) if isinstance(a, int) and not isinstance(a, bool)), -1)
    )
    if dim % max(1, x.ndim) != layout.axis:
        return layout
    if x.ndim > 1:
        return None
    made = func(*args, **kwargs)
    order = made if func in _named("argsort") else made[1] if isinstance(made, tuple) else x.argsort()
    return _owned(layout.n, 0, layout.owners().to(order.device)[order])


def _recurred(layout: Layout, x: Tensor, args: tuple[Any, ...], out: Tensor) -> Layout | None:
    """One layer, time first or packed: its outputs, and its last states ``[directions, B, H]``."""
    if isinstance(args[3], (tuple, list)):  # packed
        if x is not args[0]:
            return None
        return layout if out.ndim == 2 else _owned(layout.n, 1, layout.owners()[: int(args[1][0])])
    return layout if layout.axis == 1 and out.ndim == 3 else None  # anything else: samples one after the other in time


def _einsum(args: tuple[Any, ...], sampled: Sequence[tuple[Tensor, Layout]], out: Tensor) -> Layout | None:
    """The sample axis keeps its letter."""
    operands = args[1:] if not isinstance(args[1], (list, tuple)) else tuple(args[1])
    if isinstance(args[0], str) and "." not in args[0] and "->" in args[0]:
        left, right = args[0].replace(" ", "").split("->")
        for x, layout in sampled:
            for letters, operand in zip(left.split(","), operands, strict=True):
                if operand is x and letters[layout.axis] in right:
                    return replace(layout, axis=right.index(letters[layout.axis]))
    return next((k for x, layout in sampled if (k := _kept(layout, x.ndim, out.shape)) is not None), None)
