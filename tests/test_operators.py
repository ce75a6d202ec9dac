"""Every function of PyTorch's own test database, with samples on each axis of its input: exact, or refused.

Nothing is verified by the library (`verify=False`), so this is about what it sees of the calls themselves.  The
definition is ``N`` ordinary gradients of the losses of the batch.  Sizes coincide, as PyTorch chose them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import persample

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about functions that will go
GROUPS = 24
SAMPLES = 3  # sets of arguments, of all that a function has
KNOWN = {  # what goes unsaid without verification: samples that are lost, and no parameter meets them afterwards
    "take_along_dim": "other samples for each feature",
    "tensordot": "over the samples: of which there may be as many again",
}
LEFT_OUT = {
    "lu_unpack": "crashes for pivots that are none",
    "as_strided_scatter": "PyTorch's own gradient depends on where its input lies in memory",
}


@functools.cache
def functions() -> list[tuple[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # which other tests may need
        from torch.testing._internal.common_methods_invocations import op_db
    named = [(f"{op.name}.{op.variant_test_name}".rstrip("."), op) for op in op_db if op.supports_autograd]
    return [(name, op) for name, op in named if name not in LEFT_OUT and not name.startswith(("_", "torch.ops"))]


class Gains(nn.Module):
    """A function of ``x * w`` with the samples of ``x [N, *]`` on ``axis``; its other arguments are parameters, too, if
    they are to be ``learned``.
    """

    def __init__(self, act: Callable[..., Any], x: Tensor, axis: int, rest: Any, learned: bool) -> None:
        super().__init__()
        self.act, self.axis, self.rest = act, axis, rest
        self.w = nn.Parameter(0.8 + 0.4 * torch.rand(x.shape[1:], dtype=x.dtype))
        self.learned = nn.ParameterList([nn.Parameter(t) for t in tree_leaves(rest) if floats(t)] if learned else [])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        learned = iter(self.learned)
        args, kwargs = tree_map(lambda t: next(learned) if len(self.learned) and floats(t) else t, self.rest)
        out = self.act((x * self.w).movedim(0, self.axis), *args, **kwargs)
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad and t.ndim > self.axis]
        return tuple(t.movedim(self.axis, 0) for t in found if t.shape[self.axis] == len(x))


class Alone(nn.Module):
    """A function of parameters alone; what it gives is a gain of every sample, or a layer."""

    def __init__(self, act: Callable[..., Any], w: Tensor, rest: Any, layer: bool) -> None:
        super().__init__()
        self.act, self.rest, self.layer = act, rest, layer
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.rest
        found = [t for t in tree_leaves(self.act(self.w, *args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not found or not found[0].numel():
            return ()
        p = torch.view_as_real(found[0]) if found[0].is_complex() else found[0]
        p = p.reshape(-1, p.shape[-1]) if self.layer and p.ndim else p.reshape(1, -1)
        x = (x[:, :1] * torch.arange(1, p.shape[1] + 1)).sin()
        return (x @ p.mT if self.layer else x * p,)


def floats(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype is torch.float64


def losses(outputs: tuple[Tensor, ...], _: Any) -> Tensor:
    total = torch.zeros(len(outputs[0]), dtype=torch.float64)
    for i, out in enumerate(outputs):
        out = (torch.view_as_real(out) if out.is_complex() else out).flatten(1)
        weight = torch.cos(0.7 * torch.arange(out.shape[1], dtype=torch.float64) + i)
        total = total + (out * weight).sum(1) + 0.5 * (out.square() * weight.abs()).sum(1)
    return total


def models(op: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
    torch.manual_seed(0)
    given = [*islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), 60)]
    for sample in given[:: max(1, len(given) // SAMPLES)]:
        x, rest = sample.input, (sample.args, sample.kwargs)
        if not floats(x) or x.layout is not torch.strided or not 0 < x.numel() <= 500:
            continue
        for axis in range(x.ndim):
            if 2 <= x.shape[axis] <= 8:
                moved = x.movedim(axis, 0).contiguous()
                for learned in (False, True) if any(map(floats, tree_leaves(rest))) else (False,):
                    yield f"axis {axis}{', learned' * learned}", Gains(op.op, moved, axis, rest, learned), moved
        for layer in (False, True):
            batch = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
            yield f"parameters{', layer' * layer}", Alone(op.op, x, rest, layer), batch


def definition(model: nn.Module, x: Tensor) -> list[Tensor] | None:
    """``[N, *P]`` for each parameter; ``None`` where it can't be had, isn't finite, or isn't the same twice."""
    parameters, found = list(model.parameters()), []
    for _ in range(2):
        try:
            each = losses(model(x), None)
            rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in each]
        except (RuntimeError, ValueError, IndexError, TypeError):  # of a function with its input on other axes
            return None
        found.append([torch.stack(column) for column in zip(*rows, strict=True)])
    same = all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*found, strict=True))
    return found[0] if same else None


def outcome(model: nn.Module, x: Tensor, rows: list[Tensor]) -> str:
    try:
        G = persample.gradients(model, losses, x, verify=False)
    except persample.PersampleError:
        return "refused"
    names = [name for name, _ in model.named_parameters()]
    right = (
        torch.allclose(G[name], row, rtol=1e-9, atol=1e-9 * (1 + float(row.abs().max()) if row.numel() else 1))
        for name, row in zip(names, rows, strict=True)
    )
    return "served" if all(right) else "wrong"


@pytest.mark.parametrize("group", range(GROUPS))
def test_rows_are_right_or_refused(group: int) -> None:
    seen, wrong = Counter[str](), {}
    for name, op in functions()[group::GROUPS]:
        for case, model, x in models(op):
            if (rows := definition(model, x)) is not None:
                seen[how := outcome(model, x, rows)] += 1
                if how == "wrong":
                    wrong[name] = case
    assert {name: case for name, case in wrong.items() if name not in KNOWN} == {}
    assert seen["served"] > 50 and seen["refused"] > 0


def test_what_is_known_is_so() -> None:
    found = {
        name
        for name, op in functions()
        if name in KNOWN
        for _, model, x in models(op)
        if (rows := definition(model, x)) is not None and outcome(model, x, rows) == "wrong"
    }
    assert found == {*KNOWN}
