"""Where the samples are in the result of a function that can't be seen, or isn't known: its gradient tells.

What a custom `autograd.Function`, a scripted function or an operation of somebody else does to the axes of a tensor is
told by sizes only where one axis fits.  Where several do, or samples stand in an order of their own, its backward is
run with numbers at some of the samples: those, and no others, have to get gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .calls import KEY, metadata
from .layout import Layout, same
from .mixing import PRODUCTS
from .moves import numbered

FOUND = "persample layouts"  # in the metadata of a node: where the samples are in outputs that were asked for before
_HANDS_ON = "BackwardHookFunctionBackward"  # of hooks of modules: its outputs are its inputs


@dataclass
class Source:
    """A tensor of which it is known where its samples are, upstream of one of which it isn't."""

    edge: GradientEdge
    shape: torch.Size
    layout: Layout | None
    flat: bool = False  # its edge may be that of a tensor of the same entries in another shape


def upstream(t: Tensor) -> tuple[GradientEdge, list[Source]]:
    """Where a tensor begins that may have been handed on by hooks of modules, and the nearest tensors behind it of
    which the samples were followed.
    """
    assert t.grad_fn is not None
    edge, seen, sources = GradientEdge(t.grad_fn, t.output_nr), set[Node](), list[Source]()
    while edge.node.name() == _HANDS_ON and not _known(edge.node):
        node, number = edge.node.next_functions[edge.output_nr]
        if node is None:
            break
        edge = GradientEdge(node, number)
    stack = [edge.node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found = _known(node)
        sources += found
        stack.extend(n for n, _ in node.next_functions if n is not None and not found)
    return edge, sources


def _known(node: Node) -> list[Source]:
    found = metadata(node)
    if not (pairs := found.get(KEY, ())):
        noted = found.get(FOUND, {}).items()
        return [Source(GradientEdge(node, i), shape, layout) for i, (shape, layout) in noted]
    sources = []
    for call in dict.fromkeys(call for call, _ in pairs):
        numbers = [i for other, i in pairs if other is call]
        whole = len(numbers) == len(call.outputs)  # else it isn't known which of its outputs these are
        for i, (shape, layout) in zip(numbers, call.outputs, strict=False):
            sources.append(Source(GradientEdge(node, i), shape, layout if whole else None, call.func in PRODUCTS))
    return sources


def note(t: Tensor, layout: Layout | None) -> None:
    """Where the samples are in this tensor, for what comes behind it."""
    assert t.grad_fn is not None
    metadata(t.grad_fn).setdefault(FOUND, {})[t.output_nr] = (t.shape, layout)


def places_in(t: Tensor, sources: Sequence[Source]) -> list[Layout]:
    """All layouts of these tensors that fit somewhere in ``t``, told by sizes."""
    found: list[Layout] = []
    for source in sources:
        for axis in range(t.ndim):
            if source.layout is not None and source.layout.fits(t.shape, axis):
                place = replace(source.layout, axis=axis)
                if not any(at.axis == axis and same(at, place) for at in found):
                    found.append(place)
    return found


def probed(t: Tensor, begin: GradientEdge, sources: Sequence[Source], places: Sequence[Layout]) -> Layout | None:
    """The one of these ``places`` by which every sample gets gradients from its own entries of ``t`` only."""
    if any(source.layout is None for source in sources) or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None  # (saved tensors may be there only once)
    with torch._C.DisableTorchFunction():
        passing = [at for at in places if _apart(t, begin, sources, at)]
    return passing[0] if len(passing) == 1 else None


def _apart(t: Tensor, begin: GradientEdge, sources: Sequence[Source], at: Layout) -> bool:
    mine, touched = numbered(at, t), False
    for bit in range(max(1, (at.n - 1).bit_length())):
        for part in (0, 1):
            given = torch.ones_like(t).masked_fill((mine >> bit) & 1 != part, 0)
            grads = torch.autograd.grad(
                [begin], [source.edge for source in sources], [given], retain_graph=True, allow_unused=True
            )
            for source, g in zip(sources, grads, strict=True):
                if g is None:
                    continue
                theirs = _numbers(source, g)
                if theirs is None or bool(g[(theirs >> bit) & 1 != part].any()):
                    return False
                touched |= bool(g.any())
    return touched


def _numbers(source: Source, g: Tensor) -> Tensor | None:
    """The sample of every entry of a source's gradient; ``None`` where it is arranged otherwise than the source."""
    assert source.layout is not None
    if g.shape != source.shape and not (source.flat and g.numel() == source.shape.numel()):
        return None
    numbers = numbered(source.layout, g.new_empty(1).expand(source.shape))
    return numbers if g.shape == source.shape else numbers.reshape(g.shape)
