"""Tensors that are put behind each other: each part brings the numbers of its samples.

In a loop over the samples, a part is one sample's alone, and stays so until all are joined again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Function, Layout, Operation, kept, only, owned, same
from .moves import MOVED, named
from .writing import WRITES, written

JOINS, STACKS = named("cat", "concat", "concatenate"), named("stack")
# What else puts tensors behind each other, and along which axis: that of lists, of tables; empty where the call says.
GATHERS: dict[Function, tuple[int, ...]] = {
    **dict.fromkeys((*STACKS, torch._C._nn.pad_sequence), ()),
    **dict.fromkeys(named("vstack", "row_stack"), (0,)),
    **dict.fromkeys(named("hstack"), (0, 1)),
    **dict.fromkeys(named("column_stack"), (1,)),
    **dict.fromkeys(named("dstack"), (2,)),
}


def joined(op: Operation, out: Tensor) -> Layout | None:
    """``cat``, or another name of it: along the sample axis each part brings its own samples; along another, they have
    to agree.
    """
    parts = [p for p in op.given(0, "tensors") if p.ndim == out.ndim]  # not the old empty [0]
    dim = _joins_at(op, parts, out)
    layouts = {id(t): at for t, at in op.known}
    known = [layouts[id(p)] for p in parts if id(p) in layouts]
    if not known:
        return None
    first = known[0]
    if any(at.axis != first.axis for at in known):
        return None
    if dim != first.axis:
        return first if all(same(at, first) for at in known) else None
    if len(known) != len(parts) and out.is_floating_point():
        return None
    nobody = [out.new_full((p.shape[dim],), -1, dtype=torch.long) for p in parts]
    owners = [
        layouts[id(p)].owners().to(out.device) if id(p) in layouts else no for p, no in zip(parts, nobody, strict=True)
    ]
    return owned(first.n, dim, torch.cat(owners))


def stacked(op: Operation, out: Tensor) -> Layout | None:
    """``stack``: the samples are where they were in each part, behind the new axis or in front of it."""
    first = op.known[0][1]
    if any(at.axis != first.axis or not same(at, first) for _, at in op.known):
        return None
    dim = _joins_at(op, op.given(0, "tensors"), out)
    return first.placed(first.axis + (dim <= first.axis))


def picked_in_bags(op: Operation) -> tuple[Layout, bool] | None:
    """Where constant indices put rows of samples in bags: whose these are, by the first entry of each, and whether
    there are entries of others in them; nothing where bags are empty.
    """
    input, table, offsets = op.given(0, "input"), op.of(op.given(1, "weight")), op.given(2, "offsets")
    constant = not any(input is x for x, _ in op.sampled)
    if table is None or table.alone is not None or table.axis != 0 or not constant or not input.numel():
        return None
    owner = table.owners().to(input.device)[input]
    if input.ndim == 2:
        return owned(table.n, 0, owner[:, 0]), bool((owner != owner[:, :1]).any())
    starts = offsets[:-1] if op.given(9, "include_last_offset") else offsets
    counts = torch.cat([starts[1:], starts.new_tensor([len(input)])]) - starts
    if not bool((counts > 0).all()):
        return None
    first = owner[starts]
    return owned(table.n, 0, first), bool((owner != first.repeat_interleave(counts)).any())


def bagged(op: Operation, out: Tensor) -> Layout | None:
    """A bag belongs to the sample of its entries, or of its offset."""
    if (picked := picked_in_bags(op)) is not None and not picked[1]:
        return picked[0]
    input, offsets = op.given(0, "input"), op.given(2, "offsets")
    layouts = {id(t): at for t, at in op.known}
    if input.ndim == 2:
        at = layouts.get(id(input), op.known[-1][1])
        return at if at.axis == 0 else None
    if (by := layouts.get(id(offsets))) is not None:
        owners = by.owners()
        if len(owners) == len(out) + 1:  # with the end of the last bag
            owners = owners[:-1] if int(owners[-1]) < 0 else owners[1:]
        return owned(by.n, 0, owners) if len(owners) == len(out) and bool((owners >= 0).all()) else None
    at = op.known[0][1]
    if at.axis != 0 or input.shape[0] != at.size:
        return None
    first = offsets[: len(out)]
    full = torch.cat([first[1:], first.new_tensor([len(input)])]) > first
    if bool(full.all()):
        return owned(at.n, 0, at.owners().to(first.device)[first])
    regular = Layout(at.n, 0, 1, len(out) // at.n)  # an empty bag doesn't say whose it is
    fits = regular.size == len(out) and torch.equal(regular.owners()[full.cpu()], at.owners()[first[full].cpu()])
    return regular if fits else None


def one_by_one(op: Operation, out: Tensor) -> Layout | None:
    """What becomes of samples that are taken out of the batch: each stays alone until they are joined again."""
    if op.func in JOINS or op.func in GATHERS:
        return _gathered(op, out)
    if op.func in WRITES and op.args and out is op.args[0] and op.of(out) is None:
        return written(op, out)
    x, first = op.known[0]
    if first.alone is None and op.args and x is op.args[0] and (follow := MOVED.get(op.func)) is not None:
        found = follow(op, first, out)  # a part of the batch, by an index of one sample's own: of its own entries only
        return found if only(found) is not None and all(only(at) == only(found) for _, at in op.known[1:]) else None
    if not all(same(at, first) for _, at in op.known):
        return None
    places = (kept(at, x.ndim, out.shape, True) for x, at in op.known if at.alone is None)
    return next((place for place in places if place is not None), Layout(first.n, alone=only(first)))


def _gathered(op: Operation, out: Tensor) -> Layout | None:
    """Parts of single samples, put behind each other."""
    layouts, n = {id(t): at for t, at in op.known}, op.known[0][1].n
    parts = op.given(0, "tensors", "sequences")
    dim = _joins_at(op, parts, out)
    new = out.ndim > parts[0].ndim  # the axis, with one entry for each
    known = [(only(layouts[id(p)]), 1 if new else p.shape[dim]) for p in parts if id(p) in layouts]
    owners = [torch.full((count,), k, dtype=torch.long, device="cpu") for k, count in known if k is not None]
    if len(owners) == len(parts):
        return owned(n, dim, torch.cat(owners))
    samples = {k for k, _ in known}
    batch = out.shape[dim] == n and len(known) < len(parts) and sum(count for _, count in known) == 1
    own = len(samples) == 1 and None not in samples and not batch
    return Layout(n, alone=samples.pop()) if own else None  # a sample's own tokens beside others (zeros, a class)


def _joins_at(op: Operation, parts: Sequence[Tensor], out: Tensor) -> int:
    """The axis along which several tensors are put behind each other."""
    if axes := GATHERS.get(op.func):
        return axes[min(max(1, parts[0].ndim), len(axes)) - 1]
    if op.func is torch._C._nn.pad_sequence:
        return 0 if op.given(1, "batch_first") else 1
    return int(op.given(1, "dim", "axis", default=0) % out.ndim)
