"""Recurrences: RNN, GRU and LSTM in every option, packed sequences, cells in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .case import VMAP_NUMBERS, Case, N, Problem, T, normal, on, readout, readout_dim1, tokens

I, H = 5, 6  # widths of input and state
KINDS: dict[str, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class _Recurrent(nn.Module):
    """A recurrence on inputs [N, T, I] and, where given, initial states [N, L, H]; returns outputs and last states."""

    def __init__(self, kind: str, states: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = KINDS[kind](I, H, batch_first=True, **options)
        self.states = states

    def forward(self, x: Tensor, *initial: Tensor) -> Any:
        given = tuple(h.transpose(0, 1).contiguous() for h in initial)
        y, last = self.layer(x, *([given if len(given) == 2 else given[0]] if given else []))
        if not self.states:
            return y
        return y, *(h.transpose(0, 1) for h in (last if isinstance(last, tuple) else (last,)))


class _SequenceFirst(nn.Module):
    """Inputs [T, N, I]."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = KINDS[kind](I, H, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _LastState(_SequenceFirst):
    """Only the last state reaches the loss, by a linear layer."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, batch_first=True)
        self.out = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.layer(x)[1]
        return self.out((last[0] if isinstance(last, tuple) else last)[-1])


class _LearnedState(_SequenceFirst):
    """An initial state that is a parameter, expanded to the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, batch_first=True)
        self.h = nn.Parameter(torch.randn(1, 1, H))

    def forward(self, x: Tensor) -> Tensor:
        h = self.h.expand(-1, x.size(0), -1).contiguous()
        return self.layer(x, (h, h * 0.5) if isinstance(self.layer, nn.LSTM) else h)[0]


class _Packed(nn.Module):
    """Sequences of different lengths, packed inside; outputs padded again, and last states."""

    def __init__(self, kind: str, ordered: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = KINDS[kind](I, H, batch_first=True, **options)
        self.ordered = ordered

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        y, last = self.layer(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.size(1))
        return y, (last[0] if isinstance(last, tuple) else last).transpose(0, 1)


class _Cell(nn.Module):
    """A cell in a loop over tokens."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class _Tagger(nn.Module):
    """Embedding, bidirectional LSTM, linear layer; the LSTM is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(7, I), nn.Linear(I + 1, 3)
        self.lstm = nn.LSTM(I, 3, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.lstm(self.emb(ids))
        y, _ = self.lstm(y[..., :I])
        return self.out(y)


class _Seq2Seq(nn.Module):
    """The last state of an encoder starts a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(I, H, batch_first=True), nn.GRU(I, H, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.decoder(y, self.encoder(x)[1])[0]


def _rnn(
    kind: str, n: int = N, t: int = T, initial: tuple[tuple[int, ...], ...] = (), **options: Any
) -> Callable[[], Problem]:
    return on(lambda: _Recurrent(kind, **options), normal(n, t, I), *(normal(*shape) for shape in initial))


def _first(kind: str, t: int = T, n: int = N, **options: Any) -> Callable[[], Problem]:
    return lambda: Problem(_SequenceFirst(kind, **options), readout_dim1, torch.randn(t, n, I))


def _packed(kind: str, lengths: tuple[int, ...] = (2, 4, 1, 3), **options: Any) -> Callable[[], Problem]:
    return lambda: Problem(_Packed(kind, **options), readout, (torch.randn(len(lengths), 4, I), torch.tensor(lengths)))


NO_VMAP = {"vmap": ("CaptureError", "torch.func can't mix batched inputs with initial states of zeros")}

each = [
    Case(f"{kind}_{name}", build, raises=NO_VMAP if "initial" not in name and name != "one_step" else {})
    for kind in KINDS
    for name, build in [
        ("plain", _rnn(kind)),
        ("outputs_only", _rnn(kind, states=False)),
        ("no_bias", _rnn(kind, bias=False)),
        ("two_layers", _rnn(kind, num_layers=2)),
        ("bidirectional", _rnn(kind, bidirectional=True)),
        ("two_layers_bidirectional", _rnn(kind, num_layers=2, bidirectional=True)),
        ("initial_state", _rnn(kind, initial=((N, 2, H),) * (2 if kind == "lstm" else 1), num_layers=2)),
        ("last_state_only", on(lambda kind=kind: _LastState(kind), normal(N, T, I))),  # type: ignore[misc]
        ("learned_state", on(lambda kind=kind: _LearnedState(kind), normal(N, T, I))),  # type: ignore[misc]
        ("one_step", _rnn(kind, t=1, initial=((N, 1, H),) * (2 if kind == "lstm" else 1))),
        ("one_sample", _rnn(kind, n=1)),
        ("t_equals_n", _rnn(kind, t=4)),
    ]
]

sequence_first = [
    Case(f"{kind}_{name}", build, batch_dim=1, raises=NO_VMAP)
    for kind in KINDS
    for name, build in [
        ("sequence_first", _first(kind)),
        ("sequence_first_t_equals_n", _first(kind, 4, 4, bidirectional=True)),
    ]
]

packed = [
    Case(f"{kind}_{name}", build, raises=VMAP_NUMBERS)
    for kind in KINDS
    for name, build in [
        ("packed", _packed(kind)),
        ("packed_two_layers_bidirectional", _packed(kind, num_layers=2, bidirectional=True)),
        ("packed_sorted", _packed(kind, (4, 3, 3, 1), ordered=True)),
    ]
]

special = [
    Case("rnn_relu", _rnn("rnn", nonlinearity="relu"), raises=NO_VMAP),
    Case("lstm_projection", _rnn("lstm", proj_size=3), raises=NO_VMAP),
    Case(
        "lstm_projection_everything",
        _rnn("lstm", proj_size=3, num_layers=2, bidirectional=True, initial=((N, 4, 3), (N, 4, H))),
    ),
    Case("lstm_packed_projection", _packed("lstm", proj_size=3, num_layers=2), raises=VMAP_NUMBERS),
    Case(
        "gru_dropout_eval",
        on(lambda: _Recurrent("gru", num_layers=2, dropout=0.5).eval(), normal(N, T, I)),
        raises=NO_VMAP,
    ),
    Case("lstm_dropout_zero", _rnn("lstm", num_layers=2, dropout=0.0), raises=NO_VMAP),
    Case("lstm_tagger_applied_twice", on(_Tagger, tokens(N, T)), raises=NO_VMAP),
    Case("gru_encoder_decoder", on(_Seq2Seq, normal(N, T, I), normal(N, 2, I)), raises=NO_VMAP),
    Case("rnn_cell", on(lambda: _Cell(nn.RNNCell(I, H)), normal(N, T, I)), raises=NO_VMAP),
    Case(
        "rnn_cell_relu_no_bias",
        on(lambda: _Cell(nn.RNNCell(I, H, bias=False, nonlinearity="relu")), normal(N, T, I)),
        raises=NO_VMAP,
    ),
    Case("gru_cell", on(lambda: _Cell(nn.GRUCell(I, H)), normal(N, T, I)), raises=NO_VMAP),
    Case("gru_cell_no_bias", on(lambda: _Cell(nn.GRUCell(I, H, bias=False)), normal(N, T, I)), raises=NO_VMAP),
    Case("lstm_cell", on(lambda: _Cell(nn.LSTMCell(I, H)), normal(N, T, I)), raises=NO_VMAP),
    Case("lstm_cell_t_equals_n", on(lambda: _Cell(nn.LSTMCell(I, H)), normal(4, 4, I)), raises=NO_VMAP),
]

cases = each + sequence_first + packed + special
