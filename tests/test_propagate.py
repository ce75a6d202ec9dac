"""Layouts: what an operation's output says of its samples is what happens when one sample's values change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from persample import layout as layouts
from persample import propagate
from persample.capture import Capture
from persample.followed import SampledTensor
from persample.layout import Layout, only

Operation = Callable[[Tensor], Tensor]


def recorded(operation: Operation, x: Tensor, layout: Layout) -> tuple[Tensor, Layout | None]:
    """The output and the layout that the capture mode gives it."""
    capture = Capture(nn.Module(), set())
    with capture:
        capture.start(layout.n, [])
        capture.followed.mark(x, SampledTensor(layout))
        out = operation(x)
        kind = capture.followed.kind(out)
    capture.stop()
    assert isinstance(kind, SampledTensor)
    return out, kind.layout


def check(operation: Operation, x: Tensor, layout: Layout) -> Layout | None:
    """Changing the values of one sample changes entries of that sample only."""
    out, found = recorded(operation, x, layout)
    if found is None:
        return None
    assert found.alone is not None or out.shape[found.axis] == found.size
    for n in range(layout.n):
        mine = (layout.owners() == n).view([-1 if a == layout.axis else 1 for a in range(x.ndim)])
        other = operation(torch.where(mine, 1 - 1.7 * x, x))
        if other.shape != out.shape:
            continue  # a selection by value
        allowed = torch.tensor(found.alone == n)  # all of it is of one sample
        if found.alone is None:
            allowed = (found.owners() == n).view([-1 if a == found.axis else 1 for a in range(out.ndim)])
        assert not ((other != out) & ~allowed).any(), f"entries of other samples than {n} changed"
    return found


W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([2, 0, 3, 1])

MOVES: dict[str, Operation] = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "new_axis_last": lambda x: x[..., None],
    "new_axis_first": lambda x: x[None],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "flatten_tokens": lambda x: x.flatten(0, 1),
    "flatten_and_back": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "heads": lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2),
    "part": lambda x: x[:, 1:],
    "part_of_samples": lambda x: x[1:],
    "every_other": lambda x: x[::2],
    "narrow": lambda x: x.narrow(0, 1, 2),
    "split": lambda x: x.split([1, 2, 1])[1],
    "chunk": lambda x: x.chunk(2, 0)[1],
    "chunk_features": lambda x: x.chunk(2, -1)[1],
    "flip": lambda x: x.flip(0),
    "flip_tokens": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 0),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "tile_new": lambda x: x.tile(3, 1, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 0),
    "repeat_tokens": lambda x: torch.repeat_interleave(x, torch.arange(x.shape[1]), dim=1),
    "repeat_features": lambda x: x.repeat_interleave(2, -1),
    "expand": lambda x: x.expand(5, *x.shape),
    "by_index": lambda x: x[IDS],
    "by_mask": lambda x: x[IDS > 1],
    "by_mask_of_tokens": lambda x: x[(IDS > 1)[:, None].expand(4, x.shape[1])],
    "by_list": lambda x: x[[3, 0]],
    "tokens_by_index": lambda x: x[:, IDS[:3] % x.shape[1]],
    "pairs": lambda x: x[IDS, IDS % x.shape[1]],
    "index_select": lambda x: x.index_select(0, IDS[:2]),
    "index_select_tokens": lambda x: x.index_select(1, IDS[:3] % x.shape[1]),
    "gather": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long)),
    "cat_samples": lambda x: torch.cat([x, x.sin()], 0),
    "cat_reversed": lambda x: torch.cat([x, x.flip(0)], 0),
    "cat_tokens": lambda x: torch.cat([x, x.sin()], 1),
    "stack": lambda x: torch.stack([x, x.sin()], 0),
    "stack_many": lambda x: torch.stack([x] * 4, 1),
    "sort_tokens": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "sum_tokens": lambda x: x.sum(1),
    "mean_keepdim": lambda x: x.mean((1, 2), keepdim=True),
    "amax": lambda x: x.amax(-1),
    "sum_of_several": lambda x: torch.sum(x, dim=(1, -1)),
    "sum_by_name": lambda x: torch.sum(input=x, dim=1, keepdim=True),
    "max_with_places": lambda x: x.max(-1)[0],
    "logsumexp": lambda x: torch.logsumexp(x, (2,), True),
    "std": lambda x: x.std(1, False),
    "max": lambda x: x.max(2)[0],
    "linear": lambda x: F.linear(x, torch.randn(4, x.shape[-1])),
    "matmul_left": lambda x: torch.randn(4, x.shape[1]) @ x,
    "scores": lambda x: x @ x.mT,
    "softmax": lambda x: x.softmax(1),
    "conv": lambda x: F.conv1d(x, torch.ones(4, x.shape[1], 1, dtype=x.dtype)),
    "einsum": lambda x: torch.einsum("ntd,nsd->tns", x, x),
    "put_back": lambda x: torch.zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=x.dtype).index_add_(
        0, torch.arange(0, x.shape[0] * x.shape[1], 2), x.flatten(0, 1)[::2]
    ),
    "embedding": lambda x: F.embedding((x[:, 0, 0].abs() * 3).long() % 4, W),
    "table": lambda x: W[(x[:, :, 0].abs() * 3).long() % 4],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 4, 4), (4, 2, 4), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_one_operation(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) if name not in ("linear", "matmul_left") else torch.randn(shape)
    operation = MOVES[name]
    if name in ("linear", "matmul_left"):
        inner = operation

        def operation(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            return inner(x)

    assert check(operation, x, Layout(4)) is not None


COMMON: dict[str, Operation] = {
    "linear": lambda x: F.linear(x, W[:3]),
    "matmul": lambda x: x @ W[:, :3],
    "mm": lambda x: torch.mm(x.flatten(1), torch.ones(x[0].numel(), 4)),
    "conv": lambda x: F.conv2d(x, torch.ones(4, x.shape[1], 2, 1)),
    "conv_transpose": lambda x: F.conv_transpose2d(x, torch.ones(x.shape[1], 4, 2, 1)),
    "max_pool": lambda x: F.max_pool2d(x, 2, 1),
    "adaptive_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "embedding": lambda x: F.embedding((x[..., 0].abs() * 3).long() % 4, W),
    "scores": lambda x: x @ x.mT[..., :3],
    "products": lambda x: torch.bmm(x.flatten(1, 2), x.flatten(1, 2).mT),
    "gate": lambda x: x * x[:, :, :1, :1],
    "distance": lambda x: x[:, :1] - x[..., :1],
    "cross_attention": lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3]),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_functions_are_not_run_twice_where_sizes_coincide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as features: the functions of nearly every model are known, and cost no second run for shapes."""
    monkeypatch.setattr(propagate, "_grown", lambda *_: pytest.fail(f"{name} was run once more"))
    found = check(COMMON[name], torch.randn(4, 4, 4, 4), Layout(4))
    assert found is not None and found.axis == 0


def test_what_contracts_samples_goes_no_short_way() -> None:
    x, at, images = torch.randn(4, 4), Layout(4), torch.randn(3, 4, 6)
    for func, args, sampled in (
        (F.embedding, (IDS.expand(4, 4), x), [(x, at)]),  # samples of the table, not of what is looked up
        (F.conv1d, (images, W[..., None].expand(4, 4, 3)), [(images, Layout(4, 1))]),  # on the channels
        (torch.matmul, (x[:, :3], x[:3]), [(x[:, :3], at), (x[:3], Layout(3))]),
        (torch.matmul, (x, x.mT), [(x, at), (x.mT, Layout(4, 1))]),
        (torch.mul, (x[:, :1], x[:, :1].mT), [(x[:, :1], at), (x[:, :1].mT, Layout(4, 1))]),
    ):
        assert not propagate._stays(layouts.Operation(func, args, known=sampled), func(*args))


def test_selection_by_value() -> None:
    x = torch.arange(12.0).view(4, 3)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    for operation in (
        lambda m: x[m],
        lambda m: m.nonzero(),
        lambda m: torch.where(m)[0],
        lambda m: m.nonzero(as_tuple=True)[1],
    ):
        _, found = (
            recorded(operation, mask, Layout(4))
            if operation(mask).dtype is torch.int64
            else recorded(lambda x: x[mask], x, Layout(4))
        )
        assert found is not None and found.owners().tolist() == [0, 0, 2, 2, 2, 3]
    _, found = recorded(lambda x: x.masked_select(mask), x, Layout(4))
    assert found is not None and found.owners().tolist() == [0, 0, 2, 2, 2, 3]
    lengths = torch.tensor([2, 3, 1, 2])
    _, found = recorded(torch.repeat_interleave, lengths, Layout(4))
    assert found is not None and found.owners().tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    _, found = recorded(lambda v: v.sort(descending=True)[1], lengths, Layout(4))
    assert found is not None and found.owners().tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("operation", [lambda x: x.mean(0), lambda x: x.sum((0, 1)), lambda x: x.sort(0)[0]])
def test_samples_that_are_gone(operation: Operation) -> None:
    assert check(operation, torch.randn(4, 4, 4), Layout(4)) is None


def starts() -> Iterator[tuple[tuple[int, ...], Layout]]:
    yield (4, 3, 6), Layout(4)
    yield (3, 4, 6), Layout(4, 1)
    yield (4, 4, 4), Layout(4, 1)
    yield (8, 4, 4), Layout(4, 0, 1, 2)
    yield (8, 4, 4), Layout(4, 0, 2, 1)
    yield (5, 4, 6), Layout(4, 0, owner=torch.tensor([0, 2, 1, 1, 3]))
    yield (1, 4, 6), Layout(1)


STEPS: list[Any] = [
    lambda x: x.transpose(0, 1),
    lambda x: x.transpose(1, 2),
    lambda x: x.flatten(0, 1).unsqueeze(0),
    lambda x: x.flatten(1).unsqueeze(1),
    lambda x: x.reshape(-1, 2, x[0].numel() // 2) if len(x) and x[0].numel() % 2 == 0 else x,
    lambda x: x.flip(0),
    lambda x: x[:, :1],
    lambda x: x[: max(1, len(x) // 2)],
    lambda x: x.repeat(1, 2, 1),
    lambda x: x.repeat(2, 1, 1),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: torch.cat([x, x.cos()], 0),
    lambda x: torch.cat([x, x.cos()], 2),
    lambda x: x.sum(1, keepdim=True),
    lambda x: x.index_select(0, torch.arange(len(x)).flip(0)),
    lambda x: x[torch.arange(len(x)) % 2 == 0],
    lambda x: x @ x.mT,
    lambda x: x.sin(),
    lambda x: torch.stack([x, x], 1).flatten(0, 1),
    lambda x: x.unfold(2, 2, 2).flatten(2) if x.shape[2] > 1 else x,
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(list(starts())), st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=5))
def test_chains(start: tuple[tuple[int, ...], Layout], steps: list[int]) -> None:
    """Any chain of operations gives a true layout, or none; whatever the sizes."""
    shape, layout = start

    def chain(x: Tensor) -> Tensor:
        for step in steps:
            if x.numel() < 20_000:
                x = STEPS[step](x)
        return x

    x = torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).sin().view(shape)
    check(chain, x, layout)


REDUCTIONS: list[Operation] = [
    lambda x: x.sum(),
    lambda x: x.mean(0),
    lambda x: x.softmax(0) * x.amax(),
    lambda x: x.transpose(0, -1) @ x.transpose(0, -1).transpose(-1, -2),
    lambda x: F.pad(x, (0, 0, 1, 1)),
    lambda x: torch.einsum("...d,...d->", x, x),
    lambda x: torch.stack([x, x.square()]).logsumexp(0),
    lambda x: x.squeeze(),
    lambda x: x * x.sum(0, keepdim=True),
    lambda x: torch.cat([x.reshape(-1), x.sum()[None]]),
    lambda x: x.sort(0)[0].cumsum(0),
]


@pytest.mark.filterwarnings("ignore:Tensor.mT is deprecated on 0-D")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([slice(1, 2), slice(3, None), [2], 0, torch.tensor(1)]),
    st.lists(st.integers(0, len(STEPS) + len(REDUCTIONS) - 1), min_size=1, max_size=5),
)
def test_chains_of_one_sample(part: Any, steps: list[int]) -> None:
    """Whatever is done to a part that is one sample's is that sample's, and nothing in it couples the batch."""
    x, sample = torch.linspace(-1, 2, 96, dtype=torch.float64).sin().view(4, 4, 6), int(torch.arange(4)[part])
    done = [*STEPS, *REDUCTIONS]

    def chain(x: Tensor) -> Tensor:
        out = x[part]
        with contextlib.suppress(IndexError, RuntimeError, TypeError):  # too few axes
            for step in steps:
                out = done[step](out) if out.numel() < 20_000 else out
        return out

    w = torch.ones(4, 4, 6, dtype=torch.float64, requires_grad=True)
    capture = Capture(nn.Module(), {id(w)})
    with capture:
        capture.start(4, [(x, 0)])
        out = chain(x * w)
        kind = capture.followed.kind(out)
    capture.stop()
    if out.numel():
        assert isinstance(kind, SampledTensor) and kind.layout is not None and only(kind.layout) == sample
    assert not any(call.couples for ref in capture.recorded if (call := ref()) is not None)


ELSEWHERE: dict[str, tuple[Operation, bool]] = {  # of a square matrix of four samples; whether they are somewhere
    "inner_second": (lambda x: torch.inner(W, x), True),
    "inner_first": (lambda x: torch.inner(x, W), True),
    "addmm_second": (lambda x: torch.addmm(W, W, x), False),
    "addmm_first": (lambda x: torch.addmm(W, x, W), True),
    "addmm_turned": (lambda x: torch.addmm(W[:, :1], W, x.T), True),
    "addbmm_second": (lambda x: torch.addbmm(W, W[None], x[None]), False),
    "multi_dot_middle": (lambda x: torch.linalg.multi_dot([W, x, W]), False),
    "multi_dot_last": (lambda x: torch.linalg.multi_dot([W, W, x.T]), True),
    "solve_right": (lambda x: torch.linalg.solve(W, x.T), True),
    "solve_summed": (lambda x: torch.linalg.solve(W, x), False),
    "solve_left": (lambda x: torch.linalg.solve(W, x, left=False), True),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_factors_that_are_as_large_as_their_product(name: str) -> None:
    operation, known = ELSEWHERE[name]
    torch.manual_seed(0)
    assert (check(operation, torch.randn(4, 4), Layout(4)) is not None) == known
