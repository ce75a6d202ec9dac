"""Samples in a list, one entry for each (``batch_dim=list``): images, sequences and graphs of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import persample

LENGTHS = (3, 5, 2, 4)
N, D = len(LENGTHS), 4
MODELS: dict[str, type[nn.Module]] = {}


def model(made: type[nn.Module]) -> type[nn.Module]:
    MODELS[made.__name__] = made
    return made


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(D, D), nn.Linear(D, 3), nn.Parameter(torch.randn(D))


@model
class Padded(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        mask = pad_sequence([torch.ones(len(x)) for x in xs], batch_first=True).to(xs[0])
        h = self.first(pad_sequence(xs, batch_first=True)).tanh() * mask[..., None]
        return self.last(h.sum(1))


@model
class TimeFirst(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.last(nn.functional.linear(pad_sequence(xs), self.first.weight).tanh().sum(0))


@model
class Packed(Net):
    """All tokens behind each other, as those who avoid padding do."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        h = self.first(torch.cat(xs)).tanh() * self.scale
        return self.last(torch.stack([part.mean(0) for part in h.split([len(x) for x in xs])]))


@model
class ByNumber(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        owner = torch.arange(len(xs)).repeat_interleave(torch.tensor([len(x) for x in xs]))
        h = self.first(torch.cat(xs)).tanh()
        return self.last(h.new_zeros(len(xs), D).index_add(0, owner, h))


@model
class OneByOne(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.stack([self.last((self.first(x).tanh() * self.scale).mean(0)) for x in xs])


@model
class Canvas(Net):
    """Put into one large tensor, as detectors do with images."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        canvas = xs[0].new_zeros(len(xs), max(map(len, xs)), D)
        for i, x in enumerate(xs):
            canvas[i, : len(x)].copy_(x)
        return self.last(nn.functional.linear(canvas, self.first.weight).tanh().sum(1))


@model
class Written(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        canvas = xs[0].new_zeros(len(xs), max(map(len, xs)), D)
        for i, x in enumerate(xs):
            canvas[i, : len(x)] = self.first(x).tanh()
        return self.last((canvas * self.scale).sum(1))


@model
class Attending(Net):
    """One sequence of all, with a mask that keeps samples apart."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        owner = torch.arange(len(xs)).repeat_interleave(torch.tensor([len(x) for x in xs]))
        h = self.first(torch.cat(xs))[None]
        h = nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=owner[:, None] == owner)[0]
        return self.last(torch.stack([part.sum(0) for part in h.split([len(x) for x in xs])]))


def sequences() -> list[Tensor]:
    return [torch.randn(length, D) for length in LENGTHS]


def square(out: Tensor, targets: Any) -> Tensor:
    return (out - targets).square().sum(1)


def definition(net: nn.Module, loss: Callable[[Any, Any], Tensor], xs: list[Any], y: Any) -> dict[str, Tensor]:
    rows = []
    for i in range(len(xs)):
        value = loss(net([xs[i]]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(grads)
    return {name: torch.stack(g) for (name, _), g in zip(net.named_parameters(), zip(*rows, strict=True), strict=True)}


def close(G: persample.Gradients, expected: dict[str, Tensor]) -> None:
    for name, rows in expected.items():
        torch.testing.assert_close(G[name], rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_lists(name: str, engine: str) -> None:
    net, xs, y = MODELS[name]().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    G = persample.gradients(net, square, xs, y, batch_dim=list, engine=engine)
    close(G, definition(net, square, xs, y))
    assert len(G) == N


@pytest.mark.parametrize("name", MODELS)
def test_nothing_verified_and_in_slices(name: str) -> None:
    net, xs, y = MODELS[name]().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    expected = definition(net, square, xs, y)
    close(persample.gradients(net, square, xs, y, batch_dim=list, verify=False), expected)
    close(persample.gradients(net, square, xs, y, batch_dim=list, max_bytes=1, verify=False), expected)
    S = persample.gradients(net, square, xs, y, batch_dim=list, quantities=["norm", "gram"], max_bytes=1)
    flat = torch.cat([rows.flatten(1) for rows in expected.values()], 1)
    torch.testing.assert_close(S.norm(), flat.norm(dim=1))
    torch.testing.assert_close(S.gram(), flat @ flat.mT)


@pytest.mark.parametrize("batch_dim", [list, (list, 0), (list, list), ([list], 0), ({"xs": list}, 0)])
def test_ways_to_say_it(batch_dim: Any) -> None:
    net, xs, y = Padded().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    inputs: Any = {"xs": xs} if isinstance(batch_dim, tuple) and isinstance(batch_dim[0], dict) else (xs,)
    close(persample.gradients(net, square, inputs, y, batch_dim=batch_dim), definition(net, square, xs, y))


class Graphs(nn.Module):
    """Each sample is a dict: nodes, and which of them are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other, self.out = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 3)

    def forward(self, graphs: list[dict[str, Tensor]], shift: Tensor) -> Tensor:
        found = []
        for graph in graphs:
            x, (source, target) = graph["x"], graph["edges"]
            h = (self.own(x) + torch.zeros_like(x).index_add(0, target, self.other(x)[source])).tanh()
            found.append(h.mean(0))
        return self.out(torch.stack(found)) + shift


def graphs() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(k, D).double(), "edges": torch.randint(k, (2, 2 * k))} for k in LENGTHS]


def test_entries_may_be_structures() -> None:
    net, xs, y, shift = Graphs().double(), graphs(), torch.randn(N, 3).double(), torch.randn(N, 3).double()
    G = persample.gradients(net, square, (xs, shift), y, batch_dim=list)
    rows = [
        torch.autograd.grad(square(net([x], s[None]), t[None]).sum(), list(net.parameters()))
        for x, s, t in zip(xs, shift, y, strict=True)
    ]
    close(G, {n: torch.stack(g) for (n, _), g in zip(net.named_parameters(), zip(*rows, strict=True), strict=True)})


@pytest.mark.parametrize("verify", [False, None])
def test_entries_without_tensors(verify: bool | None) -> None:
    """Texts, which become tensors inside of the model."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(128, D), nn.Linear(D, 3)

        def forward(self, texts: list[str]) -> Tensor:
            found = [self.table(torch.tensor([ord(letter) for letter in text])).tanh().mean(0) for text in texts]
            return self.head(torch.stack(found))

    net, texts, y = Reads().double(), ["one", "another one", "a", "last"], torch.randn(N, 3).double()
    G = persample.gradients(net, square, texts, y, batch_dim=list, verify=verify)
    close(G, definition(net, square, texts, y))


def test_targets_in_a_list_and_one_number() -> None:
    """A criterion that returns one number is applied to one sample at a time, with a list of one target."""

    class Tagger(Net):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.last(self.first(pad_sequence(xs, batch_first=True)).tanh())

    def tags(out: Tensor, targets: list[Tensor]) -> Tensor:
        parts = [nn.functional.cross_entropy(o[: len(t)], t) for o, t in zip(out, targets, strict=True)]
        return torch.stack(parts).mean()

    net, xs = Tagger().double(), [x.double() for x in sequences()]
    y = [torch.randint(3, (length,)) for length in LENGTHS]
    close(persample.gradients(net, tags, xs, y, batch_dim=list), definition(net, tags, xs, y))
    each = persample.gradients(
        net, lambda out, t: torch.stack([tags(out[i : i + 1], t[i : i + 1]) for i in range(len(t))]), xs, y,
        batch_dim=list,
    )  # fmt: skip
    close(each, definition(net, tags, xs, y))


def test_under_a_handle() -> None:
    net, xs, y = Packed().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    expected = definition(net, square, xs, y)
    with persample.extend(net, batch_dim=list) as handle:
        close(handle.gradients(square(net(xs), y)), expected)
        close(handle.gradients(square(net(xs=xs), y)), expected)


def test_curvature() -> None:
    net, xs, y = Padded().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    op = persample.curvature.empirical_fisher(net, square, xs, y, batch_dim=list)
    flat = torch.cat([rows.flatten(1) for rows in definition(net, square, xs, y).values()], 1)
    v = torch.randn(flat.shape[1]).double()
    torch.testing.assert_close(op @ v, flat.mT @ (flat @ v) / N)
    assert persample.check(net, square, xs, y, batch_dim=list).ok


def test_what_is_coupled_is_refused() -> None:
    class Centred(Net):
        def forward(self, xs: list[Tensor]) -> Tensor:
            h = self.first(torch.cat(xs))
            h = h - h.mean(0)
            return self.last(torch.stack([part.square().mean(0) for part in h.split([len(x) for x in xs])]))

    net, y = Centred().double(), torch.randn(N, 3).double()
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(net, square, [x.double() for x in sequences()], y, batch_dim=list)


@pytest.mark.parametrize("turn", range(N))
def test_padding_that_counts_is_noted(turn: int) -> None:
    """A mean over what all are padded to is another one alone, but for the longest sample: rows are of this batch's
    own losses then, and say so, whichever is the longest.
    """

    class Averaged(Net):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.last(self.first(pad_sequence(xs)).tanh().mean(0))

    xs = [x.double() for x in sequences()]
    net, xs, y = Averaged().double(), xs[turn:] + xs[:turn], torch.randn(N, 3).double()
    G = persample.gradients(net, square, xs, y, batch_dim=list)
    assert "batch-coupled" in G.note
    each = [torch.autograd.grad(loss, net.last.weight, retain_graph=True)[0] for loss in square(net(xs), y)]
    torch.testing.assert_close(G["last.weight"], torch.stack(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["vmap", "compiled"])
def test_vmap_takes_no_lists(engine: str) -> None:
    with pytest.raises(persample.SampleAxisError, match=r"batch_dim=list.*hooks"):
        persample.gradients(Padded(), square, sequences(), torch.randn(N, 3), batch_dim=list, engine=engine)


def test_lists_of_another_length() -> None:
    with pytest.raises(persample.SampleAxisError, match=r"N = 4|size 4"):
        persample.gradients(Padded(), square, sequences(), torch.randn(N - 1, 3), batch_dim=list)
    with pytest.raises(persample.EmptyBatchError):
        persample.gradients(Padded(), square, [], torch.randn(0, 3), batch_dim=list)


def test_sequences_without_it_are_told_of_it() -> None:
    with pytest.raises(persample.SampleAxisError, match="batch_dim=list"):
        persample.gradients(Padded(), square, (sequences(),), torch.randn(N, 3))


def test_inputs_stay_as_they_are() -> None:
    xs = sequences()
    before = [x.clone() for x in xs]

    class Changing(Padded):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return super().forward([x.mul(2) for x in xs])

    persample.gradients(Changing(), square, xs, torch.randn(N, 3), batch_dim=list)
    assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(xs, before, strict=True))


def test_under_a_handle_by_another_method() -> None:
    class Other(Packed):
        def read(self, xs: list[Tensor]) -> Tensor:
            return self.forward(xs)

    net, xs, y = Other().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    with persample.extend(net, batch_dim=list) as handle:
        handle.samples(xs)
        close(handle.gradients(square(net.read(xs), y)), definition(net, square, xs, y))


@pytest.mark.parametrize("lengths", [LENGTHS, (2, 2, 2, 2)])
def test_outputs_in_a_list(lengths: tuple[int, ...]) -> None:
    """Rows are right in slices and one by one, whose outputs aren't put together."""

    class Tags(Net):
        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [self.last(self.first(x).tanh()) for x in xs]

    def each(out: list[Tensor], targets: list[Tensor]) -> Tensor:
        return torch.stack([nn.functional.cross_entropy(o, t) for o, t in zip(out, targets, strict=True)])

    net, xs = Tags().double(), [torch.randn(k, D).double() for k in lengths]
    y = [torch.randint(3, (k,)) for k in lengths]
    expected = definition(net, each, xs, y)
    whole = persample.gradients(net, each, xs, y, batch_dim=list)
    close(whole, expected)
    assert [len(out) for out in whole.outputs] == list(lengths)
    for how in ({"engine": "loop"}, {"max_bytes": 1}):
        G = persample.gradients(net, each, xs, y, batch_dim=list, **how)
        close(G, expected)
        assert G.outputs is None


def test_a_handle_is_told_of_lists() -> None:
    """It can't tell from the loss how many samples there are: entries that are equally long might be batches."""
    net, xs = OneByOne().double(), [torch.randn(5, D).double() for _ in range(N)]
    found: list[Any] = []
    persample.extend(net, on_backward=found.append, reduction="mean")
    with pytest.raises(persample.SampleAxisError, match=r"extend\(\.\.\., batch_dim=list\)"):
        net(xs)
    net, y = OneByOne().double(), torch.randn(N, 3).double()
    with_lists = persample.extend(net, on_backward=found.append, reduction="mean", batch_dim=list)
    square(net(xs), y).mean().backward()
    with_lists.remove()
    (G,) = found
    close(G, definition(net, square, xs, y))

    class Views(Net):  # a list of batches: two views of each sample
        def forward(self, views: list[Tensor]) -> Tensor:
            return self.last(sum(self.first(view).tanh() for view in views))

    both = Views().double()
    persample.extend(both, on_backward=found.append, reduction="mean")
    square(both(xs[:2]), torch.randn(5, 3).double()).mean().backward()
    assert len(found[-1]) == 5


def test_what_is_behind_a_batch_norm_is_served() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, xs: list[Tensor]) -> Tensor:
            h = self.norm(self.first(torch.cat(xs))).tanh()
            return self.last(torch.stack([part.mean(0) for part in h.split([len(x) for x in xs])]))

    net, xs, y = Normed().double(), [x.double() for x in sequences()], torch.randn(N, 3).double()
    G = persample.gradients(net, square, xs, y, batch_dim=list, params=["last.weight", "last.bias"])
    assert "batch-coupled" in G.note
    for name, p in (("last.weight", net.last.weight), ("last.bias", net.last.bias)):
        each = [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in square(net(xs), y)]
        torch.testing.assert_close(G[name], torch.stack(each), rtol=1e-9, atol=1e-9)
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(net, square, xs, y, batch_dim=list)
