"""How single functions move the samples of a tensor: the functions of `MOVED`, each for some spellings of torch.

A *view* is done again to a shadow of the tensor in which only the sample axis has a stride; *indexing, repeating,
sorting* are done again to the samples' numbers instead of their entries; *sequences* are packed and padded as their
lengths say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .errors import SampleAxisError
from .layout import Function, Layout, Operation, kept, owned

Follow = Callable[[Operation, Layout, Tensor], "Layout | None"]  # the layouts of the first argument, and of the output


# ---- views ------------------------------------------------------------------------------------------------------


def _reshaped(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """Reshaping keeps the order of all entries: follow the sample's place in the flat index."""
    old, new = op.args[0].shape, out.shape
    axis = layout.axis
    if old[: axis + 1] == new[: axis + 1] and op.args[0].numel() == out.numel() > 0:
        return layout  # most often, features or tokens alone are cut or joined
    if prod(old) != prod(new):  # view(dtype)
        return kept(layout, len(old), new)
    behind = prod(old[layout.axis + 1 :])
    places = [a for a in range(len(new)) if new[a] == layout.size and prod(new[a + 1 :]) == behind]
    if places:
        return layout.placed(places[0])
    if layout.owner is not None:
        return read(layout, numbered(layout, op.args[0]).reshape(new), out)
    stride = layout.inner * behind
    for axis in range(len(new)):
        below = prod(new[axis + 1 :])
        if below and stride % below == 0 and new[axis] % (layout.n * (stride // below)) == 0 and new[axis]:
            inner = stride // below
            return Layout(layout.n, axis, new[axis] // (layout.n * inner), inner)
    return None


def _viewed(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """Do the same to a shadow in which only the sample axis has a stride."""
    x = op.args[0]
    if not x.numel():
        return kept(layout, x.ndim, out.shape)
    if op.func in _TURNS and not op.kwargs:
        how = tuple(tuple(dims) if isinstance(dims, list) else dims for dims in op.args[1:])
        return layout.placed(_turned(op.func, x.ndim, layout.axis, how))
    size = max(2, x.shape[layout.axis])  # strides say nothing about an axis of length one
    shape = [size if a == layout.axis else s for a, s in enumerate(x.shape)]
    shadow = torch.empty(size, dtype=torch.uint8, device="cpu").as_strided(
        shape, [int(a == layout.axis) for a in range(x.ndim)]
    )
    view = _one_of(op.again(shadow), lambda: op.again(x), out)
    places = [a for a in range(view.ndim) if view.stride(a)]  # new axes of size one may have a stride, too
    places = [a for a in places if view.shape[a] > 1] or places
    if view.ndim == out.ndim and not places:  # one sample is taken out, or a part of it (x[n, t])
        return Layout(layout.n, alone=int(layout.owners()[min(int(view.storage_offset()), layout.size - 1)]))
    if len(places) != 1 or view.ndim != out.ndim:
        return None
    axis = places[0]
    if view.shape[axis] == size and view.stride(axis) == 1:
        return layout.placed(axis)
    some: Tensor = (
        torch.arange(view.shape[axis], device="cpu").mul(view.stride(axis)).add(view.storage_offset())
    )  # a part of the samples
    return owned(layout.n, axis, layout.owners()[some.clamp(max=layout.size - 1)])


@lru_cache(maxsize=1024)
def _turned(func: Function, ndim: int, axis: int, how: tuple[Any, ...]) -> int:
    """Where an axis is after axes were put into another order, whatever their sizes: looked up once."""
    shadow = torch.empty(2, dtype=torch.uint8, device="cpu").as_strided(
        [2] * ndim, [int(a == axis) for a in range(ndim)]
    )
    return func(shadow, *how).stride().index(1)  # type: ignore[no-any-return]


def _distinct(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """Different values, and how often each occurs, are nobody's, however many there are; where each entry's value is
    among them, is the entry's.
    """
    x = op.args[0]
    if not op.kwargs.get("return_inverse") or op.kwargs.get("dim") is not None or out.shape != x.shape:
        return None
    return layout if torch.equal(op.again(x)[1], out) else None


def _one_of(made: Any, again: Callable[[], Any], out: Tensor) -> Tensor:
    """The one that corresponds to ``out`` among several views (``split``, ``unbind``)."""
    if isinstance(made, Tensor):
        return made
    views = again()
    at = [i for i, v in enumerate(views) if v.data_ptr() == out.data_ptr() and v.shape == out.shape]
    places = {(made[i].storage_offset(), made[i].stride()) for i in at}
    if len(places) > 1 and out.numel():
        raise SampleAxisError("several views of the same entries")  # of an input expanded along its samples
    found: Tensor = made[at[0] if at else 0]
    return found


# ---- indexing, repeating: the same with the samples' numbers ----------------------------------------------------


def numbered(layout: Layout, x: Tensor, thin: bool = False) -> Tensor:
    """``x`` with every entry replaced by the number of its sample; ``thin``: of size 1 but along the sample axis."""
    numbers = layout.owners().to(x.device).view([-1 if a == layout.axis else 1 for a in range(x.ndim)])
    return numbers if thin else numbers.expand(x.shape)


def read(layout: Layout, numbers: Tensor, out: Tensor) -> Layout | None:
    """The axis along which the numbers of samples change, if it is only one."""
    if not numbers.numel():
        if layout.owner is None and layout.fits(numbers.shape, layout.axis):
            return layout
        empty = [a for a in range(numbers.ndim) if numbers.shape[a] == 0]
        axis = layout.axis if layout.axis in empty else next(iter(empty), None)
        return None if axis is None else Layout(layout.n, axis, owner=numbers.new_zeros(0))
    last = numbers.ndim - 1  # features, most likely, if all is one sample's
    axes = [a for a in range(numbers.ndim) if numbers.shape[a] == out.shape[a]]  # others are thin
    for axis in sorted(axes, key=lambda a: (a == last, numbers.shape[a] == 1, a != layout.axis)):
        line = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
        if bool((line == line[:, :1]).all()):
            return owned(layout.n, axis, line[:, 0])
    return None


def indexed(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    x, index = op.args[0], op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    if out.is_floating_point() and any(map(_is_number, index)):  # a sample by a tensor that is its number
        index = tuple(int(i) if _is_number(i) else i for i in index)
        op = Operation(op.func, (x, index))
    if all(i is None or i is Ellipsis or (isinstance(i, (int, slice)) and not isinstance(i, bool)) for i in index):
        return _viewed(op, layout, out)
    numbers = numbered(layout, x)
    if all(isinstance(i, (slice, Tensor)) for i in index):  # what it doesn't pick from needn't be there
        used = [i.ndim if isinstance(i, Tensor) and i.dtype is torch.bool else 1 for i in index]
        whole = {sum(used[:j]) for j, i in enumerate(index) if i == slice(None)} | {*range(sum(used), x.ndim)}
        numbers = numbers[tuple(slice(0, 1) if a in whole - {layout.axis} else slice(None) for a in range(x.ndim))]
    return read(layout, op.again(numbers), out)


def _is_number(i: Any) -> bool:
    return isinstance(i, Tensor) and i.ndim == 0 and i.dtype is not torch.bool


def _selected(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    dim, index = op.given(1, "dim"), op.given(2, "index")
    if dim % max(1, op.args[0].ndim) != layout.axis:
        return layout
    return owned(layout.n, layout.axis, layout.owners().to(index.device)[index.reshape(-1)])


def _moved(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    return read(layout, op.again(numbered(layout, op.args[0])), out)


def _shifted(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """Each axis is moved along by itself."""
    return read(layout, op.again(numbered(layout, op.args[0], thin=True)), out)


def _shuffled(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    return layout if layout.axis != 1 else _moved(op, layout, out)  # the channels


def _strided(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """``as_strided`` reads memory: where entries lie there in order, the numbers of their samples do so, too."""
    x = op.args[0]
    if x.storage_offset() or not x.is_contiguous():
        return None
    return read(layout, op.again(numbered(layout, x).contiguous()), out)


def _repeated(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    x = op.args[0]
    if op.func in named("repeat_interleave"):
        if len(op.args) == 1 and "repeats" not in op.kwargs:  # (counts): every sample's number as often as it says
            return owned(layout.n, 0, layout.owners().to(out.device).repeat_interleave(x))
        dim = op.given(2, "dim")
        if is_axis(dim) and dim % x.ndim != layout.axis:
            return layout  # of tokens or features, each as often as it says
    return read(layout, op.again(numbered(layout, x, thin=out.ndim > 1)), out)


def nonzero_of(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """Where a mask is true: as many entries as there are, each of its place's sample."""
    return whether(op.args[0], layout)


def whether(mask: Tensor, layout: Layout) -> Layout:
    """Of the entries at which a mask is true, one after the other: each of its place's sample."""
    return owned(layout.n, 0, layout.owners().to(mask.device)[mask.nonzero()[:, layout.axis]])


def is_choice(op: Operation) -> bool:
    """``where(condition, this, that)``, not ``where(condition)``."""
    return len(op.args) > 1 and MOVED.get(op.func) is nonzero_of


def sorted_along(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """A list of samples in another order; a table sorted over the samples mixes them."""
    x = op.args[0]
    if sort_axis(op) != layout.axis:
        return layout
    if x.ndim > 1:
        return None
    made = op.again(x)
    order = made if op.func in named("argsort") else made[1] if isinstance(made, tuple) else x.argsort()
    return owned(layout.n, 0, layout.owners().to(order.device)[order])


def is_axis(dim: Any) -> bool:
    """Whether this is the number of an axis, also one of NumPy's."""
    return type(dim) is int or (isinstance(dim, Integral) and not isinstance(dim, bool))


def sort_axis(op: Operation) -> int:
    place = 2 if op.func in named("topk") else 1
    given = [a for a in (*op.args[place : place + 2], op.kwargs.get("dim")) if is_axis(a)]
    dim = given[0] if given else 0 if op.func in named("msort") else -1
    return int(dim % max(1, op.args[0].ndim))


# ---- sequences --------------------------------------------------------------------------------------------------


def _packed(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """``_pack_padded_sequence(input, lengths, batch_first)``: time-major, the longest sample first."""
    _, lengths, batch_first = op.args[:3]
    if layout.axis != (0 if batch_first else 1) or out.shape[:1] != (int(lengths.sum()),):
        return None
    owners = layout.owners()
    return owned(layout.n, 0, torch.cat([owners[: int((lengths > t).sum())] for t in range(int(lengths.max()))]))


def _unpacked(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """``_pad_packed_sequence(data, batch_sizes, batch_first, ...)``: the first step names every sample."""
    _, batch_sizes, batch_first = op.args[:3]
    if out.ndim < 2:  # the lengths
        return None
    return owned(layout.n, 0 if batch_first else 1, layout.owners()[: int(batch_sizes[0])])


def recurred(op: Operation, layout: Layout, out: Tensor) -> Layout | None:
    """One layer, time first or packed: its outputs, and its last states ``[directions, B, H]``."""
    if isinstance(op.args[3], (tuple, list)):  # packed
        return layout if out.ndim == 2 else owned(layout.n, 1, layout.owners()[: int(op.args[1][0])])
    return layout if layout.fits(out.shape, layout.axis) else None  # if not 1, samples one after the other in time


# ---- the table --------------------------------------------------------------------------------------------------


def named(*names: str) -> set[Function]:
    found = [getattr(space, name, None) for name in names for space in (torch, Tensor)]
    return {f for f in found if f is not None}


_RESHAPES = "view reshape flatten unflatten ravel view_as reshape_as squeeze unsqueeze view_copy squeeze_copy"
_RESHAPES += " unsqueeze_copy"
_TURNED = "transpose swapaxes swapdims permute movedim moveaxis t adjoint"
_VIEWS = """select narrow chunk split unbind tensor_split split_with_sizes diagonal unfold hsplit vsplit dsplit"""
_TURNS = named(*_TURNED.split()) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
# What changes the shape of its argument in place: as if a new tensor was made by another function, if one is known.
RESHAPED: dict[Function, Function | None] = {
    **{
        function: getattr(Tensor, name)
        for name in ["t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze"]
        for function in named(f"{name}_")
    },
    **dict.fromkeys(named("as_strided_", "resize_", "resize_as_", "set_")),
}
MOVED: dict[Function, Follow] = {
    **dict.fromkeys(named(*_RESHAPES.split()), _reshaped),
    **dict.fromkeys(named(*_VIEWS.split()) | _TURNS | {torch.linalg.diagonal}, _viewed),
    Tensor.__getitem__: indexed,
    **dict.fromkeys(named("index_select"), _selected),
    **dict.fromkeys(
        named("masked_select", "gather", "take_along_dim", "take", "roll", "flip", "flipud", "fliplr", "rot90"), _moved
    ),
    **dict.fromkeys((torch.fft.fftshift, torch.fft.ifftshift), _shifted),
    **dict.fromkeys((torch.channel_shuffle, torch.nn.functional.channel_shuffle), _shuffled),
    **dict.fromkeys(named("as_strided"), _strided),
    **dict.fromkeys(named("repeat", "tile", "repeat_interleave"), _repeated),
    **dict.fromkeys(named("nonzero", "argwhere", "where"), nonzero_of),
    **dict.fromkeys(named("sort", "argsort", "msort", "topk"), sorted_along),
    **dict.fromkeys(named("unique", "unique_consecutive"), _distinct),
    torch._C._VariableFunctions._pack_padded_sequence: _packed,
    torch._C._VariableFunctions._pad_packed_sequence: _unpacked,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), recurred),
}
