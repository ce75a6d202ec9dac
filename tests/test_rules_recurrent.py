"""Recurrent layers and cells: every option, the hook engine against one sample at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import persample

N, T, I, H = 4, 3, 5, 6


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(out: Any, _: Any = None) -> Tensor:
    """``[N]``, not linear in any of the outputs ``[N, ...]``."""
    out = out if isinstance(out, (tuple, list)) else (out,)
    return sum(
        (o.sin() * torch.arange(1.0, 1 + o[0].numel()).view(o.shape[1:]).cos()).flatten(1).sum(1)
        + o.square().flatten(1).sum(1)
        for o in out
    )


def check(
    model: nn.Module, inputs: Any, batch_dim: Any = 0, tolerance: float = 1e-12, unused: tuple[str, ...] = ()
) -> None:
    """Hook rows are the loop's."""
    G = persample.gradients(model, losses, inputs, batch_dim=batch_dim, verify=False)
    reference = persample.gradients(model, losses, inputs, batch_dim=batch_dim, engine="loop")
    assert G.names == reference.names and G.unused == reference.unused == unused
    for name in G.names:
        torch.testing.assert_close(
            G[name], reference[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rules may serve calls."""

    def refuse(call: Any, *_: Any) -> Any:
        raise AssertionError(f"the fallback served {call.name}")

    monkeypatch.setattr("persample.collect.by_samples", refuse)


KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Recurrent(nn.Module):
    """A layer after another, given sequences ``[N, T, I]`` or ``[T, N, I]``, perhaps packed, or with initial states."""

    def __init__(
        self,
        kind: str,
        lengths: bool = False,
        enforce_sorted: bool = False,
        returns: str = "all",
        learned: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        layer, own = KINDS[kind]
        self.before = nn.Linear(I, I)
        self.rnn = layer(I, H, **own, **options)
        self.lengths, self.sorted, self.returns = lengths, enforce_sorted, returns
        d = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        widths = [self.rnn.proj_size or H] + [H] * (layer is nn.LSTM)
        self.initial = nn.ParameterList(nn.Parameter(torch.randn(d, 1, w)) for w in widths) if learned else None

    def forward(self, x: Tensor, lengths: Tensor | None = None, *states: Tensor) -> Any:
        first = self.rnn.batch_first
        n = x.shape[0 if first else 1]
        if self.initial is not None:
            states = tuple(p.expand(-1, n, -1).contiguous() for p in self.initial)
        x = torch.tanh(self.before(x))
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=self.sorted)
        out, last = self.rnn(x, (states if len(states) > 1 else states[0]) if states else None)
        if lengths is not None:
            out, _ = pad_packed_sequence(out, batch_first=first, total_length=T)
        out = out if first else out.transpose(0, 1)
        last = [s.transpose(0, 1) for s in (last if isinstance(last, tuple) else (last,))]
        return {"all": (out, *last), "output": (out,), "last": (last[0],), "cell": (last[-1],)}[self.returns]


def sequences(batch_first: bool = True, n: int = N, t: int = T) -> Tensor:
    x = torch.randn(n, t, I)
    return x if batch_first else x.transpose(0, 1).contiguous()


OPTIONS = list(itertools.product([1, 2], [False, True], [True, False], [True, False]))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers, bidirectional, bias, batch_first", OPTIONS)
def test_layers_directions_bias(kind: str, layers: int, bidirectional: bool, bias: bool, batch_first: bool) -> None:
    model = Recurrent(kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    check(model, sequences(batch_first), batch_dim=(0 if batch_first else 1, 0, 0))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("returns", ["output", "last", "cell"])
def test_gradient_at_some_outputs_only(kind: str, bidirectional: bool, returns: str) -> None:
    check(Recurrent(kind, returns=returns, bidirectional=bidirectional, batch_first=True), sequences())


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layers, bidirectional, learned", [(1, False, False), (1, True, True), (2, False, True), (2, True, False)]
)
@pytest.mark.parametrize(
    "lengths, enforce_sorted",
    [([2, 3, 1, 3], False), ([3, 2, 2, 1], True), ([3, 3, 3, 3], True), ([1, 1, 2, 1], False)],
)
def test_packed(
    kind: str, layers: int, bidirectional: bool, learned: bool, lengths: list[int], enforce_sorted: bool
) -> None:
    model = Recurrent(
        kind,
        enforce_sorted=enforce_sorted,
        num_layers=layers,
        bidirectional=bidirectional,
        learned=learned,
        batch_first=True,
    )
    check(model, (sequences(), torch.tensor(lengths)))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("n", [N, 1])
def test_learned_initial_state(kind: str, layers: int, bidirectional: bool, n: int) -> None:
    check(
        Recurrent(kind, num_layers=layers, bidirectional=bidirectional, learned=True, batch_first=True), sequences(n=n)
    )


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_given_initial_state(kind: str, packed: bool) -> None:
    model = Recurrent(kind, num_layers=2, bidirectional=True, batch_first=True)
    widths = [model.rnn.proj_size or H] + [H] * (kind.startswith("lstm"))
    states = [torch.randn(4, N, w) for w in widths]
    lengths = torch.tensor([1, 3, 2, 3]) if packed else None
    check(model, (sequences(), lengths, *states), batch_dim=((0, 0, *[1] * len(states)), 0, 0))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, t", [(3, 3), (2, 2), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_coinciding_sizes(kind: str, n: int, t: int, batch_first: bool) -> None:
    """N == T, N == number of directions x layers, N == 1, T == 1."""
    model = Recurrent(kind, bidirectional=True, batch_first=batch_first)
    check(model, sequences(batch_first, n, t), batch_dim=(0 if batch_first else 1, 0, 0))


class Cells(nn.Module):
    """A cell in a loop, its first state learned or zero."""

    def __init__(self, cell: nn.Module, learned: bool) -> None:
        super().__init__()
        self.cell = cell
        self.two = isinstance(cell, nn.LSTMCell)
        self.initial = nn.Parameter(torch.randn(2 if self.two else 1, H)) if learned else None

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        if self.initial is not None:
            first = [p.expand(len(x), H) for p in self.initial]
            state = tuple(first) if self.two else first[0]
        hidden = []
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            hidden.append(state[0] if self.two else state)
        return (torch.stack(hidden, 1), *state) if self.two else torch.stack(hidden, 1)


CELLS = {
    "lstm": lambda **k: nn.LSTMCell(I, H, **k),
    "gru": lambda **k: nn.GRUCell(I, H, **k),
    "tanh": lambda **k: nn.RNNCell(I, H, **k),
    "relu": lambda **k: nn.RNNCell(I, H, nonlinearity="relu", **k),
}


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias, learned, n", [(True, False, N), (False, True, N), (True, True, T), (True, True, 1)])
def test_cells_in_a_loop(kind: str, bias: bool, learned: bool, n: int) -> None:
    check(Cells(CELLS[kind](bias=bias), learned), sequences(n=n))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional, packed", [(False, False), (True, False), (True, True)])
def test_dropout_between_layers(kind: str, bidirectional: bool, packed: bool) -> None:
    """Rows belong to the masks of the very forward; the masks are those that PyTorch would draw."""
    model = Recurrent(kind, num_layers=3, dropout=0.4, bidirectional=bidirectional, batch_first=True)
    inputs = (sequences(), torch.tensor([2, 3, 1, 3])) if packed else (sequences(),)
    torch.manual_seed(3)
    plain = losses(model(*inputs))
    torch.manual_seed(3)
    with persample.extend(model) as recorder:
        each = losses(model(*inputs))
        G = recorder.gradients(each)
    torch.testing.assert_close(each, plain, rtol=0, atol=0)
    for n, loss in enumerate(each):
        rows = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for (name, _), row in zip(model.named_parameters(), rows, strict=True):
            torch.testing.assert_close(G[name][n], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_time_axis_taken_for_samples(kind: str) -> None:
    layer, own = KINDS[kind]
    model = layer(I, H, **own)
    with pytest.raises(persample.BatchCoupledError, match="time axis"):
        persample.gradients(model, lambda out, _: losses(out[0]), torch.randn(N, 3, I), verify=False)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_selected_parameters(kind: str) -> None:
    model = Recurrent(kind, num_layers=2, batch_first=True)
    model.rnn.weight_ih_l1.requires_grad_(False)
    check(model, sequences())
    G = persample.gradients(model, losses, sequences(), params=["rnn.bias_hh_l0", "rnn.weight_hh_l1"])
    assert G.names == ("rnn.bias_hh_l0", "rnn.weight_hh_l1")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind: str) -> None:
    """Another kernel of PyTorch serves it."""
    model, x = Recurrent(kind, num_layers=2, bidirectional=True, batch_first=True), sequences()
    reference = persample.gradients(model, losses, x, engine="loop")
    G = persample.gradients(model.float(), losses, x.float(), verify=False)
    for name in G.names:
        torch.testing.assert_close(G[name].double(), reference[name], rtol=1e-3, atol=1e-3)


def test_weights_that_several_layers_share() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.GRU(I, I, batch_first=True), nn.GRU(I, I, batch_first=True)
            self.b.weight_hh_l0 = self.a.weight_hh_l0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(self.b(self.b(x)[0])[0])[0]
            return out

    check(Tied(), sequences())


def test_output_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell = nn.LSTM(I, H, batch_first=True), nn.LSTMCell(H, H)

        def forward(self, x: Tensor) -> Tensor:
            out, (h, c) = self.rnn(x)
            out = out.mul_(1.5).relu_()
            h, c = self.cell(out[:, 0].clone(), (h[0], c[0]))
            return torch.cat([h.mul_(2.0), c.sin_()], 1)

    check(InPlace(), sequences())


class OneByOne(nn.Module):
    """Samples without a batch axis, in a Python loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.rnn = getattr(nn, kind)(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.rnn(each)[0] for each in self.first(x)]).mean(1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_samples_in_a_loop(kind: str, n: int) -> None:
    model, x = OneByOne(kind), torch.randn(n, 3, 3, dtype=torch.float64)
    loss = lambda out, _: out.sin().sum(1)  # noqa: E731
    for options in ({}, {"verify": False}, {"quantities": ["norm"]}):
        G = persample.gradients(model, loss, x, **options)  # type: ignore[arg-type]
        L = persample.gradients(model, loss, x, engine="loop")
        torch.testing.assert_close(G.norm(), L.norm(), rtol=1e-9, atol=1e-12)


class Last(nn.Module):
    """The first ``length`` steps of every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Any, lengths: Any = None) -> Any:
        if lengths is None:
            return self.rnn(x)[1][0]
        return torch.stack([self.rnn(x[n : n + 1, :length])[1][0, 0] for n, length in enumerate(lengths)])


def test_sequences_of_several_lengths_are_padded() -> None:
    """Where they are packed, or in a list, or their lengths are no tensor, the error says what to do."""
    model, lengths = Last().double(), [3, 8, 1, 5]
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    packed, padded = pack_sequence(sequences, enforce_sorted=False), nn.utils.rnn.pad_sequence(sequences, True)

    def square(out: Tensor, _: Any) -> Tensor:
        return out.square().sum(1)

    for inputs in (packed, (packed,), {"x": packed}):
        with pytest.raises(persample.SampleAxisError, match=r"padded tensor and the lengths.*pack inside the model"):
            persample.gradients(model, square, inputs)
    with persample.extend(model), pytest.raises(persample.SampleAxisError, match="pack inside the model"):
        model(packed)
    with pytest.raises(persample.SampleAxisError, match="pad_sequence"):
        persample.gradients(model, square, (sequences,))
    for inputs, key in (((padded, lengths), "1"), ({"x": padded, "lengths": lengths}, "'lengths'")):
        with pytest.raises(persample.VerificationError, match=rf"inputs\[{key}\], a list of 4.*make it a tensor"):
            persample.gradients(model, square, inputs)
    assert len(persample.gradients(model, square, (padded, torch.tensor(lengths)))) == 4


class Longest(nn.Module):
    """A mean over the steps of the batch's longest sequence, the zeros behind shorter ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
        out = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0]
        return pad_packed_sequence(out, batch_first=True, total_length=total)[0].mean(1)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_padding_to_the_longest_of_the_batch_is_named(engine: str) -> None:
    model, x, lengths = Longest(), torch.randn(4, 8, 3), torch.tensor([8, 5, 3, 1])
    with pytest.raises(persample.BatchCoupledError, match=r"pad_packed_sequence \(.*total_length=x\.shape\[1\]"):
        persample.gradients(model, losses, (x, lengths), engine=engine)
    persample.check(model, losses, {"x": x, "lengths": lengths, "total": 8}).raise_if_bad()


def test_packed_sequences_that_all_samples_share() -> None:
    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Linear(3, 2).double()

        def forward(self, x: Tensor, context: Any) -> Tensor:
            out: Tensor = self.l(x + nn.utils.rnn.pad_packed_sequence(context)[0].sum())
            return out

    torch.manual_seed(0)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4).double(), torch.randn(2, 4).double()])
    inputs, loss = (torch.randn(6, 3).double(), packed), lambda out, _: out.sin().sum(1)
    G, L = (
        persample.gradients(Context(), loss, inputs, batch_dim=((0, None), 0), engine=engine)
        for engine in ("hooks", "loop")
    )
    torch.testing.assert_close(G.flat(), L.flat(), rtol=1e-9, atol=1e-12)
    with pytest.raises(persample.SampleAxisError, match="PackedSequence"):
        persample.gradients(Context(), loss, inputs)
