"""Loops over the samples of a batch: what is taken out of it one by one, and put into something new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import persample

Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BODIES: dict[str, Body] = {}
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()


def body(f: Body) -> Body:
    BODIES[f.__name__] = f
    return f


def zeros(x: Tensor, *shape: int) -> Tensor:
    return x.new_zeros(*shape)


# ---- written into a constant: x [N, 5, 4], y [N, 5, 4] with a mask, and a parameter w [4] --------------------------


@body
def one_after_the_other(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i, :k] = y[i, :k]
        found[i, k : k + 5] = x[i]
    return found * w


@body
def along_the_last_axis(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 4, 9)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i, :, :k] = y[i, :k].T
    return found.mT * w


@body
def time_first(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, 9, len(x), 4)
    for i, k in enumerate(mask.sum(1)):
        found[:k, i] = y[i, :k]
    return (found * w).transpose(0, 1)


@body
def into_a_view(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i][:k] = y[i, :k]
    return found * w


@body
def copied_into_a_view(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i, :k].copy_(y[i, :k])
    return found * w


@body
def added(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i, :k] += y[i, :k]
    return found * w


@body
def rows_that_stay_rows(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i, k in enumerate(mask.sum(1).tolist()):
        found[i : i + 1, :k] = y[i : i + 1, :k]
    return found * w


@body
def by_a_mask(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 5, 4)
    for i in range(len(x)):
        found[i, mask[i]] = y[i][mask[i]]
    return found * w


@body
def by_places(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 9, 4)
    for i in range(len(x)):
        found[i, torch.tensor([0, 3, 7])] = y[i, :3]
    return found * w


@body
def token_by_token(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x), 5, 4)
    for i in range(len(x)):
        for t in range(5):
            found[i, t] = x[i, t]
    return found * w


@body
def in_blocks(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    found = zeros(x, len(x) * 5, 4)
    for i in range(len(x)):
        found[i * 5 : (i + 1) * 5] = x[i]
    return (found * w).unflatten(0, (-1, 5))


@body
def in_blocks_of_several_sizes(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    sizes, begin = mask.sum(1).tolist(), 0
    found = zeros(x, sum(sizes), 4)
    for i, k in enumerate(sizes):
        found[begin : begin + k] = y[i, :k]
        begin += k
    return torch.stack([part.mean(0) for part in (found * w).split(sizes)])


# ---- taken out by an index of the sample's own ---------------------------------------------------------------------


@body
def picked_from_a_row(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    parts = [y[i : i + 1, mask[i].nonzero().flatten()] for i in range(len(x))]
    return torch.cat([F.pad(part, (0, 0, 0, 5 - part.shape[1])) for part in parts]) * w


@body
def picked_from_columns(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    parts = [y.mT[i, :, mask[i].nonzero().flatten()] for i in range(len(x))]
    return torch.stack([F.pad(part, (0, 5 - part.shape[1])) for part in parts]).mT * w


@body
def masked(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    return torch.stack([(y[i, mask[i]] * w).sum(0) for i in range(len(x))])


@body
def attending(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    parts = []
    for i in range(len(x)):
        h = torch.cat([x[i : i + 1], y[i : i + 1, mask[i].nonzero().flatten()]], 1)
        parts.append(F.pad(F.scaled_dot_product_attention(h, h, h), (0, 0, 0, 10 - h.shape[1])))
    return torch.cat(parts) * w


class Model(nn.Module):
    def __init__(self, f: Body) -> None:
        super().__init__()
        self.x, self.y, self.w, self.f = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4)), f

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.f(self.x(x), self.y(y), mask, self.w)


def square(out: Tensor, _: None) -> Tensor:
    return out.flatten(1).tanh().square().sum(1)


@pytest.mark.parametrize("verify", [False, None])
@pytest.mark.parametrize("name", BODIES)
def test_each_sample_is_found_again(name: str, verify: bool | None) -> None:
    model = Model(BODIES[name]).double()
    inputs = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double(), MASK
    G = persample.gradients(model, square, inputs, verify=verify)
    each = [
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in square(model(*inputs), None)
    ]
    for (parameter, _), rows in zip(model.named_parameters(), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(G[parameter], torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_an_index_of_one_sample_into_all_is_refused() -> None:
    def others(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
        return y[:, mask[1].nonzero().flatten()] * w

    inputs = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double(), MASK
    with pytest.raises(persample.SampleAxisError, match="__getitem__"):
        persample.gradients(Model(others).double(), square, inputs, verify=False)


def test_a_row_of_another_sample_is_told_apart() -> None:
    """Rows in another order than the samples: losses aren't theirs."""

    def reversed_rows(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
        found = zeros(x, len(x), 5, 4)
        for i in range(len(x)):
            found[len(x) - 1 - i, :] = x[i]
        return found * w

    inputs = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double(), MASK
    with pytest.raises(persample.PersampleError):
        persample.gradients(Model(reversed_rows).double(), square, inputs, verify=False)


# ---- drawn at random: never a wrong number -------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """Each sample of ``written`` is put to its place, as many of its ``T`` tokens as its length says."""

    n: int
    T: int
    where: str  # "rows": [n, T, 3]; "columns": [T, n, 3]; "flat": [n * T, 3]; "ragged": [sum of lengths, 3]
    how: str
    places: list[int]
    lengths: list[int]
    written: list[int]
    more: int  # rows at the end
    fill: float

    def part(self, i: int) -> tuple[Any, ...]:
        """Where the tokens of a sample go."""
        k, p = self.lengths[i], self.places[i]
        begin = p * self.T if self.where == "flat" else sum(self.lengths[:i])
        return {"rows": (p, slice(k)), "columns": (slice(k), p)}.get(self.where, (slice(begin, begin + k),))

    def __call__(self, h: Any, first: nn.Module | None, w: Tensor, b: Tensor) -> Tensor:
        rows = {"flat": self.n * self.T, "ragged": sum(self.lengths), "rows": self.n, "columns": self.T}[self.where]
        between = {"rows": (self.T,), "columns": (self.n,)}.get(self.where, ())
        out = torch.full((rows + self.more, *between, 3), self.fill, dtype=torch.float64)
        for i in self.written:
            at, value = self.part(i), h[i][: self.lengths[i]]
            if self.how == "copy":
                out[at].copy_(value)
            elif self.how == "add":
                out[at] += value
            elif self.how == "view" and self.where == "rows":
                out[at[0]][at[1]] = value
            elif self.how == "tokens" and self.where == "rows":
                for t in range(self.lengths[i]):
                    out[at[0], t] = value[t]
            else:
                out[at] = value
        out = (out if first is None else first(out)) * w + b
        return torch.stack([out[self.part(i)].tanh().square().sum() for i in range(self.n)])


@st.composite
def writings(draw: st.DrawFn) -> Writing:
    n, T = draw(st.integers(2, 4)), draw(st.integers(2, 5))
    return Writing(
        n,
        T,
        draw(st.sampled_from(["rows", "columns", "flat", "ragged"])),
        draw(st.sampled_from(["set", "copy", "add", "view", "tokens"])),
        draw(st.permutations(range(n)) | st.just(list(range(n)))),
        draw(st.lists(st.integers(1, T), min_size=n, max_size=n)),
        draw(st.permutations(range(n)) | st.just(list(range(n))) | st.just([0])),
        draw(st.sampled_from([0, 0, 1, 2])),
        draw(st.sampled_from([0.0, 1.0])),
    )


@given(writings(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_where(writing: Writing, listed: bool, behind: bool) -> None:
    """Rows are right, or refused, with nothing verified; what lies in order is served."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w, self.b = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Any) -> Tensor:
            h = x if behind else [self.first(own) for own in x] if listed else self.first(x)
            return writing(h, self.first if behind else None, self.w, self.b)

    model, x = Drawn().double(), torch.randn(writing.n, writing.T, 3).double()
    inputs: Any = (list(x),) if listed else x
    each = [
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in model(list(x) if listed else x)
    ]
    try:
        G = persample.gradients(model, lambda out, _: out, inputs, batch_dim=list if listed else 0, verify=False)
    except (persample.SampleAxisError, persample.BatchCoupledError):
        in_order = writing.places == writing.written == list(range(writing.n)) and not writing.more
        assert not (in_order and writing.where == "rows" and writing.how != "tokens")
        return
    for (name, _), rows in zip(model.named_parameters(), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(G[name], torch.stack(rows), rtol=1e-9, atol=1e-9)
