"""Random models against the definition, and random nonsense against the promise: exact, or an error that says why.

A model is a random list of steps (layers, bare parameters, views, transposes, in-place operations, residuals, branches
over the batch), each of which applies where the running tensor has the right form. Steps share their parameters where
kind, shape and slot agree. Sizes are small and coincide often, with each other and with N, as that is where a sample
axis is lost. Nothing is verified by the library (`verify=False`): what it returns is compared here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.case import Problem, readout
from zoo.oracle import Rows, rows

import persample

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about unusual options
TOLERANCE = 1e-9
EXPLORES = os.environ.get("HYPOTHESIS_PROFILE") == "explore"


def examples(n: int) -> settings:
    """So many in a test run, twenty times as many where new ones are looked for."""
    return settings(max_examples=20 * n if EXPLORES else n, suppress_health_check=[*HealthCheck])


@pytest.fixture(autouse=True, scope="module")
def float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ---- random models ------------------------------------------------------------------------------------------------


@dataclass
class State:
    """The running tensor, and how its axes are to be read."""

    x: Tensor
    form: str  # "nd", "ntd", "tnd", "fd" (samples and tokens in one axis), "ncl", "fcl" (frames), "nhtd" (heads)
    n: int
    t: int
    past: list[tuple[str, Tensor]] = field(default_factory=list)
    own: bool = False  # may be changed in place

    def set(self, x: Tensor, form: str | None = None, own: bool = True) -> None:
        self.x, self.form, self.own = x, form or self.form, own


class Program(nn.Module):
    """Steps ``(name, a, b)`` that run one after the other; parameters are made by the first, building, call."""

    def __init__(self, steps: list[tuple[str, int, int]], form: str) -> None:
        super().__init__()
        self.steps, self.form = steps, form
        self.parts, self.bare = nn.ModuleDict(), nn.ParameterDict()
        self.building = True

    def part(self, key: str, make: Callable[[], nn.Module]) -> Any:
        key = key.replace(".", "_")
        if key not in self.parts and self.building:
            self.parts[key] = make()
            for name, p in self.parts[key].named_parameters():
                if p.ndim == 1:  # gains of one and biases of zero would test little
                    nn.init.normal_(p, mean=0.1 * ("weight" in name), std=0.7)
        return self.parts[key]

    def parameter(self, key: str, *shape: int) -> Tensor:
        key = f"p{key}_{'_'.join(map(str, shape))}"
        if key not in self.bare and self.building:
            self.bare[key] = nn.Parameter(torch.randn(shape) / max(1, shape[-1] if shape else 1) ** 0.5)
        p: Tensor = self.bare[key]
        return p

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        axis = self.form.index("n")
        x = x * 1  # not the caller's own tensor: steps may change it in place
        s = State(x, self.form, x.shape[axis], x.shape[1 - axis] if x.ndim > 2 else 1)
        if self.form == "ids":
            s = State(self.part("emb", lambda: nn.Embedding(7, 4))(ids), "ntd", len(ids), ids.shape[1], own=True)
        for name, a, b in self.steps:
            STEPS[name](self, s, a, b)
            if self.building and not bool(s.x.isfinite().all()):
                raise ValueError("not finite")
        if s.form in ("fd", "fcl"):
            return s.x.reshape(s.n, -1)
        return s.x.transpose(0, 1) if s.form == "tnd" else s.x


Step = Callable[[Program, State, int, int], None]
STEPS: dict[str, Step] = {}


def step(forms: str = "nd ntd tnd fd ncl fcl nhtd") -> Callable[[Step], Step]:
    """Register a step for these forms; elsewhere it does nothing."""

    def register(f: Step) -> Step:
        def run(m: Program, s: State, a: int, b: int) -> None:
            if s.form in forms.split():
                f(m, s, a, b)

        STEPS[f.__name__] = run
        return f

    return register


TOKENS = "nd ntd tnd fd"


@step()
def linear(m: Program, s: State, a: int, b: int) -> None:
    d, o = s.x.shape[-1], 1 + b % 4
    layer = m.part(f"lin{d}_{o}_{a % 2}", lambda: nn.Linear(d, o, bias=a < 4))
    s.set(layer(s.x))


@step()
def square_linear(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    s.set(m.part(f"sq{d}_{a % 2}", lambda: nn.Linear(d, d))(s.x).tanh())


@step()
def product(m: Program, s: State, a: int, b: int) -> None:
    d, o = s.x.shape[-1], 1 + b % 4
    w = m.parameter("w", d, o)
    x = s.x
    s.set(
        [
            lambda: x @ w,
            lambda: torch.matmul(x, w),
            lambda: F.linear(x, w.t()),
            lambda: torch.einsum("...i,io->...o", x, w),
            lambda: (w.t() @ x.mT).mT,
            lambda: x.unsqueeze(-2).matmul(w).squeeze(-2),
            lambda: (x.unsqueeze(-1) * w).sum(-2),
            lambda: torch.tensordot(x, w, 1),
        ][a]()
    )


@step(TOKENS)
def lettered_einsum(m: Program, s: State, a: int, b: int) -> None:
    d, letters = s.x.shape[-1], s.form
    if a % 2:
        s.set(torch.einsum(f"{letters},do->{letters[:-1]}o", s.x, m.parameter("e", d, 1 + b % 4)))
    else:
        s.set(torch.einsum(f"{letters},d->{letters}", s.x, m.parameter("e", d)))


@step("nd fd")
def addmm(m: Program, s: State, a: int, b: int) -> None:
    d, o = s.x.shape[-1], 1 + b % 4
    s.set(torch.addmm(m.parameter("b", o), s.x, m.parameter("w", d, o), beta=1 + a % 2, alpha=1 - 0.5 * (a // 4)))


@step()
def broadcast(m: Program, s: State, a: int, b: int) -> None:
    """A bare parameter of one of the shapes that broadcast: scalar, last axes, with ones."""
    tail = list(s.x.shape[s.form.index("n") + 1 :]) if s.form[0] in "nt" else list(s.x.shape[1:])
    shape = tail[a % (len(tail) + 1) :]
    shape = [1] * (b % 2) + shape
    p = m.parameter("c", *shape)
    s.set([lambda: s.x + p, lambda: s.x * p, lambda: p - s.x, lambda: s.x / (p.square() + 1)][b // 2]())


@step()
def broadcast_in_place(m: Program, s: State, a: int, b: int) -> None:
    if s.own:
        p = m.parameter("c", s.x.shape[-1])
        if a % 4 == 0:
            s.x += p
        elif a % 4 == 1:
            s.x.mul_(1.5).sub_(p, alpha=0.5)
        elif a % 4 == 2:
            s.x[..., 0] += p[0]
        else:
            s.x[..., b % s.x.shape[-1]] = p[-1]


@step()
def activation(m: Program, s: State, a: int, b: int) -> None:
    if a < 3 and s.own:
        s.set([torch.relu_, torch.tanh_, lambda x: F.leaky_relu(x, 0.1, inplace=True)][a](s.x))
    else:
        s.set(
            [torch.relu, torch.tanh, F.gelu, F.silu, torch.sin, lambda x: x * x.sigmoid(), F.softplus, torch.abs][a](
                s.x
            )
        )


@step()
def layer_norm(m: Program, s: State, a: int, b: int) -> None:
    last = list(s.x.shape[s.x.ndim - 1 - (a % 2 if s.form in ("ntd", "ncl", "fcl") else 0) :])
    if math.prod(last) > 1:
        kinds = [
            lambda: nn.LayerNorm(last, 0.1),
            lambda: nn.LayerNorm(last, 0.1, bias=False),
            lambda: nn.RMSNorm(last, 0.1),
            lambda: nn.LayerNorm(last, 0.1, elementwise_affine=False),
        ]
        s.set(m.part(f"ln{last}_{b % 4}", kinds[b % 4])(s.x))


@step("ntd ncl fcl nhtd")
def channel_norm(m: Program, s: State, a: int, b: int) -> None:
    c = s.x.shape[1]
    if math.prod(s.x.shape[2:]) > 1:
        kinds = [
            lambda: nn.GroupNorm(1, c, 0.1),
            lambda: nn.GroupNorm(c, c, 0.1),
            lambda: nn.InstanceNorm1d(c, 0.1, affine=True),
            lambda: nn.BatchNorm1d(c).eval(),
            lambda: nn.PReLU(c),
        ]
        if s.x.ndim == 3 or a % 5 in (0, 1, 4):
            s.set(m.part(f"cn{c}_{a % 5}", kinds[a % 5])(s.x))


@step()
def prelu(m: Program, s: State, a: int, b: int) -> None:
    s.set(m.part(f"prelu{a % 2}", nn.PReLU)(s.x))


@step()
def remember(m: Program, s: State, a: int, b: int) -> None:
    s.past.append((s.form, s.x))
    s.own = False


@step()
def residual(m: Program, s: State, a: int, b: int) -> None:
    found = [x for form, x in s.past if form == s.form and x.shape == s.x.shape]
    if found:
        y = found[a % len(found)]
        if b % 3 == 0 and s.own:
            s.x += y
        elif b % 3 == 1:
            s.set(torch.cat([s.x, y], -1))
        else:
            s.set(y + s.x.tanh() * y)


@step("ntd")
def to_time_first(m: Program, s: State, a: int, b: int) -> None:
    s.set([s.x.transpose(0, 1), s.x.permute(1, 0, 2).contiguous(), torch.stack(list(s.x.unbind(1)))][a % 3], "tnd")


@step("tnd")
def to_samples_first(m: Program, s: State, a: int, b: int) -> None:
    s.set([s.x.transpose(0, 1), s.x.movedim(1, 0).contiguous(), torch.stack(list(s.x), dim=1)][a % 3], "ntd")


@step("ntd")
def flatten(m: Program, s: State, a: int, b: int) -> None:
    s.t = s.x.shape[1]
    s.set([s.x.flatten(0, 1), s.x.reshape(-1, s.x.shape[-1]), torch.cat(list(s.x))][a % 3], "fd")


@step("fd")
def unflatten(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.view(s.n, -1, s.x.shape[-1]) if a % 2 else s.x.unflatten(0, (s.n, s.t)), "ntd")


@step("nd")
def spread(m: Program, s: State, a: int, b: int) -> None:
    """One token becomes several."""
    k = 1 + b % 4
    x = s.x.unsqueeze(1)
    made = [
        x.expand(-1, k, -1),
        x.repeat(1, k, 1),
        s.x.repeat_interleave(k, 0).view(s.n, k, -1),
        torch.stack([s.x] * k, 1),
    ]
    s.set(made[a % 4], "ntd", own=a % 4 > 0)


@step("ntd")
def pool(m: Program, s: State, a: int, b: int) -> None:
    x = s.x
    made = [
        lambda: x.mean(1),
        lambda: x[:, 0],
        lambda: x[:, -1],
        lambda: x.max(1).values,
        lambda: x.sum(dim=1),
        lambda: x.amax(-2),
        lambda: x.select(1, x.shape[1] - 1),
        lambda: x.softmax(1).mul(x).sum(1),
    ]
    s.set(made[a](), "nd", own=a not in (1, 2, 6))


@step("tnd")
def pool_time_first(m: Program, s: State, a: int, b: int) -> None:
    x = s.x
    s.set(
        [lambda: x.mean(0), lambda: x[0], lambda: x[-1], lambda: x.amax(0), lambda: x.unbind(0)[0]][a % 5](),
        "nd",
        own=a % 5 in (0, 3),
    )


@step("ntd")
def mix_tokens(m: Program, s: State, a: int, b: int) -> None:
    x = s.x
    t = x.shape[1]
    w = m.parameter("mix", t, t)
    made = [
        lambda: w @ x,
        lambda: torch.einsum("ts,nsd->ntd", w, x),
        lambda: F.linear(x.transpose(1, 2), w).transpose(1, 2),
        lambda: (x.mT @ w).mT,
        lambda: x.cumsum(1) * w[0, 0],
        lambda: x.flip(1) + w[:, :1],
        lambda: x.roll(1, 1) * w[0].unsqueeze(-1),
        lambda: torch.matmul(w.tril(), x),
    ]
    s.set(made[a]())


@step("ntd")
def attention(m: Program, s: State, a: int, b: int) -> None:
    d, t = s.x.shape[-1], s.x.shape[1]
    if a < 2:
        q, k, v = m.part(f"qkv{d}", lambda: nn.Linear(d, 3 * d))(s.x).chunk(3, -1)
        bias = m.parameter("rel", t, t)
        s.set(torch.softmax(q @ k.mT + bias, -1) @ v if a else F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    elif a < 5:
        heads = 2 if d % 2 == 0 else 1
        layer = m.part(f"mha{d}_{a}", lambda: nn.MultiheadAttention(d, heads, batch_first=a < 4, bias=a != 3))
        x = s.x if a < 4 else s.x.transpose(0, 1)
        y = layer(x, x, x, need_weights=b % 2 == 0)[0]
        s.set(y if a < 4 else y.transpose(0, 1))
    elif d > 1:
        heads = 2 if d % 2 == 0 else 1
        layer = m.part(
            f"enc{d}", lambda: nn.TransformerEncoderLayer(d, heads, 5, dropout=0.0, batch_first=True, norm_first=a == 6)
        )
        s.set(layer(s.x))


@step("ntd")
def split_heads(m: Program, s: State, a: int, b: int) -> None:
    if s.x.shape[-1] % 2 == 0:
        s.set(
            s.x.view(s.n, s.x.shape[1], 2, -1).transpose(1, 2)
            if a % 2
            else s.x.unflatten(-1, (2, -1)).permute(0, 2, 1, 3),
            "nhtd",
        )


@step("nhtd")
def join_heads(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.transpose(1, 2).reshape(s.n, s.x.shape[2], -1), "ntd")


@step("nhtd")
def heads_in_the_batch(m: Program, s: State, a: int, b: int) -> None:
    """bmm over samples and heads in one axis, with weights in between."""
    y = s.x.reshape(-1, *s.x.shape[2:])
    y = m.part(f"head{y.shape[-1]}", lambda: nn.Linear(y.shape[-1], y.shape[-1]))(y)
    y = torch.bmm(torch.softmax(torch.bmm(y, y.transpose(1, 2)), -1), y)
    s.set(y.view(s.n, -1, *y.shape[1:]))


@step("ntd tnd")
def recurrence(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    kind = [nn.RNN, nn.GRU, nn.LSTM][a % 3]
    layer = m.part(
        f"rnn{d}_{a}_{s.form}",
        lambda: kind(d, 2, batch_first=s.form == "ntd", bidirectional=a > 3, num_layers=1 + (a == 7)),
    )
    out, state = layer(s.x)
    state = state[0] if isinstance(state, tuple) else state
    if b % 2:
        s.set(out)
    else:
        s.set(state[-1] if b % 4 == 0 else state.transpose(0, 1), "nd" if b % 4 == 0 else "ntd")


@step("nd")
def cells(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    cell = m.part(f"cell{d}_{a % 3}", lambda: [nn.RNNCell, nn.GRUCell, nn.LSTMCell][a % 3](d, d))
    h = cell(s.x)
    h = h[0] if isinstance(h, tuple) else h
    if a > 3 and a % 3 != 2:
        h = cell(s.x.tanh(), h)
    s.set(h)


@step("ntd")
def to_channels(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.transpose(1, 2) if a % 2 else s.x, "ncl")


@step("ncl")
def from_channels(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.transpose(1, 2) if a % 2 else s.x, "ntd")


@step("ncl")
def flatten_channels(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.flatten(1), "nd")


@step("ntd")
def to_frames(m: Program, s: State, a: int, b: int) -> None:
    s.t = s.x.shape[1]
    s.set(s.x.reshape(s.n * s.t, 1, -1), "fcl")


@step("fcl")
def from_frames(m: Program, s: State, a: int, b: int) -> None:
    s.set(s.x.reshape(s.n, s.t, -1), "ntd")


@step("ncl fcl")
def convolution(m: Program, s: State, a: int, b: int) -> None:
    c, k = s.x.shape[1], 1 + b % 3
    options: dict[str, Any] = [
        {"padding": k // 2},
        {"padding": "same"},
        {"padding": k - 1, "dilation": 1 + b % 2},
        {"groups": c, "padding": 1},
        {"padding": k // 2, "padding_mode": "circular"},
        {"bias": False, "padding": 1, "stride": 2},
    ][a % 6]
    if a < 6:
        out = c if "groups" in options else 1 + b % 4
        layer = m.part(f"conv{c}_{a}_{b}", lambda: nn.Conv1d(c, out, k, **options))
    else:
        layer = m.part(
            f"up{c}_{a}_{b}",
            lambda: nn.ConvTranspose1d(c, 1 + b % 4, k, stride=1 + a % 2, output_padding=a % 2 or 0),
        )
    s.set(layer(s.x))


@step("ncl")
def image(m: Program, s: State, a: int, b: int) -> None:
    """A convolution over both axes, or over patches."""
    layer = m.part(f"conv2_{a % 4}", lambda: nn.Conv2d(1, 1 + a % 4, 1 + a % 2, padding=a % 2))
    y = layer(s.x.unsqueeze(1))
    s.set(y.sum(1) if b % 2 else y.flatten(1, 2))


@step("nd ntd fd")
def lookup(m: Program, s: State, a: int, b: int) -> None:
    """Indices computed from the values of the samples."""
    index = (s.x.detach()[..., 0] * 3).long().abs() % 5
    d = s.x.shape[-1]
    if a % 4 == 0:
        s.set(s.x + m.part(f"emb{d}", lambda: nn.Embedding(5, d, padding_idx=b % 5 if b > 4 else None))(index))
    elif a % 4 == 1:
        s.set(s.x * m.parameter("table", 5, d)[index])
    elif a % 4 == 2:
        s.set(s.x + m.parameter("table", 5, d).index_select(0, index.flatten()).view_as(s.x))
    elif s.form == "ntd":
        s.set(m.part(f"bag{d}_{b % 2}", lambda: nn.EmbeddingBag(5, d, mode=["sum", "mean"][b % 2]))(index), "nd")


@step("ntd tnd")
def positions(m: Program, s: State, a: int, b: int) -> None:
    t, d = s.x.shape[s.form.index("t")], s.x.shape[-1]
    table = m.part(f"wpe{d}", lambda: nn.Embedding(12, d))
    assume(t <= 12)
    p = [lambda: table(torch.arange(t)), lambda: table.weight[:t], lambda: table(torch.arange(t) // 2)][a % 3]()
    if s.form == "tnd":
        s.set(s.x + p.unsqueeze(1))
    else:
        s.set([s.x + p, s.x + p.unsqueeze(0), s.x + p.expand(s.n, -1, -1), s.x * p.repeat(s.n, 1, 1)][b % 4])


@step("ntd tnd")
def class_token(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    p = m.parameter("cls", 1, 1, d)
    if s.form == "ntd":
        p = [p.expand(s.n, -1, -1), p.repeat(s.n, 1, 1), p.expand(s.n, 2, d)][a % 3]
        s.set(torch.cat([p, s.x] if b % 2 else [s.x, p], 1))
    else:
        s.set(torch.cat([p.expand(1, s.n, -1), s.x]))


@step()
def features(m: Program, s: State, a: int, b: int) -> None:
    """Operations within the features."""
    x, d = s.x, s.x.shape[-1]
    made = [
        lambda: x.sort(-1).values,
        lambda: x.flip(-1),
        lambda: x.roll(1, -1),
        lambda: x.softmax(-1),
        lambda: x / (x.norm(dim=-1, keepdim=True) + 1),
        lambda: x - x.mean(-1, keepdim=True),
        lambda: x.gather(-1, x.argsort(-1)),
        lambda: F.pad(x, (1, b % 2)),
    ]
    s.set(made[a]())
    if a == 4 and d % 2 == 0:
        left, right = x.chunk(2, -1)
        s.set(left * right.sigmoid())


@step("nd")
def twice_as_many(m: Program, s: State, a: int, b: int) -> None:
    """The batch and a changed copy of it, through one layer, and apart again (Siamese networks, guidance)."""
    d = s.x.shape[-1]
    layer = m.part(f"siam{d}", lambda: nn.Linear(d, d))
    both = [
        lambda: torch.cat([s.x, s.x * 2]),
        lambda: s.x.repeat(2, 1) * 1.5,
        lambda: torch.stack([s.x, -s.x], 1).flatten(0, 1),
        lambda: torch.stack([s.x, -s.x]).flatten(0, 1),
        lambda: s.x.repeat_interleave(2, 0),
    ][a % 5]()
    y = layer(both).tanh()
    if a % 5 in (2, 4):
        y = y.view(s.n, 2, d)
        s.set(y[:, 0] * y[:, 1] + y[:, 0], own=True)
    else:
        left, right = [y.chunk(2), (y[: s.n], y[s.n :]), y.view(2, s.n, d).unbind(0), y.split(s.n)][b % 4]
        s.set(left * right + left, own=True)


@step("nd ntd")
def pieces_of_the_batch(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    layer = m.part(f"piece{d}", lambda: nn.Linear(d, d))
    k = 1 + b % 3
    pieces = [
        lambda: s.x.split(k),
        lambda: s.x.chunk(k),
        lambda: [s.x[i : i + 1] for i in range(s.n)],
        lambda: s.x.unbind(0),
    ][a % 4]()
    out = [layer(p) for p in pieces]
    s.set(torch.stack(out) if a % 4 == 3 else torch.cat(out))


@step("nd ntd")
def reordered(m: Program, s: State, a: int, b: int) -> None:
    """The samples in another order, and back."""
    d = s.x.shape[-1]
    layer = m.part(f"order{d}", lambda: nn.Linear(d, d))
    order = s.x.detach().reshape(s.n, -1)[:, 0].argsort()
    back = order.argsort()
    s.set(
        [
            lambda: layer(s.x[order])[back],
            lambda: layer(s.x.flip(0)).flip(0),
            lambda: layer(s.x.roll(1, 0)).roll(-1, 0),
            lambda: layer(s.x.index_select(0, order)).index_select(0, back),
        ][a % 4]()
    )


@step("nd fd")
def chosen_by_value(m: Program, s: State, a: int, b: int) -> None:
    """Experts see the rows that a mask chooses."""
    d = s.x.shape[-1]
    layers = [m.part(f"expert{d}_{i}", lambda: nn.Linear(d, d)) for i in range(2)]
    mask = s.x.detach()[:, 0] > 0
    out = torch.zeros_like(s.x)
    if a % 3 == 0:
        for layer, chosen in zip(layers, (mask, ~mask), strict=True):
            place = chosen.nonzero().squeeze(1)
            out = out.index_add(0, place, layer(s.x[place]))
    elif a % 3 == 1:
        out[mask] = layers[0](s.x[mask])
        out[~mask] = layers[1](s.x[~mask])
    else:
        out = torch.where(mask.unsqueeze(1), layers[0](s.x), layers[1](s.x))
    s.set(out)


@step("nd")
def bilinear(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    s.set(m.part(f"bil{d}_{b % 4}", lambda: nn.Bilinear(d, d, 1 + b % 4))(s.x, s.x.tanh()))


@step("ntd ncl")
def windows(m: Program, s: State, a: int, b: int) -> None:
    x = s.x
    if a % 3 == 0:
        x = x.unfold(1, 1 + b % x.shape[1], 1).flatten(2)
    elif a % 3 == 1 and x.shape[1] % 2 == 0:
        y = x.reshape(s.n, x.shape[1] // 2, 2, -1).reshape(-1, 2, x.shape[-1])
        y = m.part(f"win{x.shape[-1]}", lambda: nn.Linear(x.shape[-1], x.shape[-1]))(y)
        x = y.reshape(s.n, -1, x.shape[-1])
    else:
        x = F.avg_pool1d(x, 1 + b % x.shape[-1])
    s.set(x, own=False)


@step()
def derived_weight(m: Program, s: State, a: int, b: int) -> None:
    d = s.x.shape[-1]
    w = m.parameter("dw", d, d)
    made = [
        lambda: w / w.norm(dim=0),
        lambda: w.tril(),
        lambda: w + w.t(),
        lambda: w @ w,
        lambda: w.view(-1).view(d, d).t(),
        lambda: w * w.detach().abs(),
        lambda: torch.cat([w[: d // 2], w[d // 2 :] * 2]),
        lambda: torch.outer(w[0], w[:, 0]),
    ]
    s.set(F.linear(s.x, made[a]()))


@step()
def written_into(m: Program, s: State, a: int, b: int) -> None:
    """A fresh tensor, filled in place."""
    out = [torch.zeros_like(s.x), torch.zeros(s.x.shape), s.x.new_empty(s.x.shape), torch.ones(s.x.shape)][a % 4]
    p = m.parameter("fill", s.x.shape[-1])
    if b % 3 == 0:
        out[:] = s.x * p
    elif b % 3 == 1:
        out.copy_(s.x + p)
    else:
        out[..., :] = p
        out[..., 0] = s.x[..., 0]
    s.set(out)


@dataclass(frozen=True)
class Drawn:
    """What hypothesis draws: sizes, the form of the input, steps, loss."""

    n: int
    t: int
    d: int
    form: str
    steps: tuple[tuple[str, int, int], ...]
    scalar: bool = False

    @property
    def axis(self) -> int:
        return 1 if self.form == "tnd" else 0

    def problem(self) -> Problem:
        """The model, built by a call with one sample."""
        torch.manual_seed(self.n + 10 * self.t + 100 * self.d)
        shape = {"nd": (self.n, self.d), "tnd": (self.t, self.n, self.d)}.get(self.form, (self.n, self.t, self.d))
        x, ids = torch.randn(shape), torch.randint(7, (self.n, self.t) if self.form != "tnd" else (self.t, self.n))
        model = Program(list(self.steps), self.form)
        model(x.narrow(self.axis, 0, 1), ids.narrow(self.axis, 0, 1))
        model.building = False
        return Problem(model, (lambda out, _=None: readout(out).mean()) if self.scalar else readout, (x, ids))


step_of = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7), st.integers(0, 7))
models = st.builds(
    Drawn,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["nd", "ntd", "tnd", "ids"]),
    st.lists(step_of, min_size=1, max_size=7).map(tuple),
    st.booleans(),
)


def truth_of(drawn: Drawn) -> tuple[Problem, Rows]:
    """The model and its rows by plain autograd, one sample at a time."""
    try:
        p = drawn.problem()
        truth = rows(p, drawn.axis)
    except (RuntimeError, ValueError, IndexError, NotImplementedError):  # no model at all
        assume(False)
    assume(truth.rows and bool(truth.flat.isfinite().all()))
    return p, truth


def hold(G: persample.Gradients, truth: Rows) -> None:
    """The rows are those."""
    scale = 1 + float(truth.flat.abs().max())
    for name, want in truth.rows.items():
        off = float((G[name] - want).abs().max()) if want.numel() else 0.0
        assert off < TOLERANCE * scale, f"{name}: off by {off:.2g} where the largest is {scale:.2g}"
    assert set(G.unused) == set(truth.unused)


def run(drawn: Drawn, p: Problem, **options: Any) -> Any:
    return persample.gradients(p.model, p.loss_fn, p.inputs, None, batch_dim=(drawn.axis, 0, 0), **options)


@given(models)
@examples(220)
def test_random_models_are_exact(drawn: Drawn) -> None:
    p, truth = truth_of(drawn)
    G = run(drawn, p, verify=False)
    hold(G, truth)
    assert torch.allclose(G.losses, truth.losses, atol=1e-9)


@given(models)
@examples(60)
def test_random_models_raise_no_false_alarm(drawn: Drawn) -> None:
    p, truth = truth_of(drawn)
    hold(run(drawn, p, verify=True), truth)


@given(models)
@examples(40)
def test_random_models_in_the_vmap_engine(drawn: Drawn) -> None:
    p, truth = truth_of(drawn)
    try:
        G = run(drawn, p, verify=False, engine="vmap")
    except persample.CaptureError:  # what torch.func can't follow
        return
    hold(G, truth)


@given(models)
@examples(60)
def test_random_models_under_a_recorder(drawn: Drawn) -> None:
    """The user's losses and backward, without and with quantities."""
    p, truth = truth_of(drawn)
    got: list[Any] = []
    with persample.extend(p.model, batch_dim=drawn.axis) as recorder:
        losses = readout(p.model(*p.inputs))
        hold(recorder.gradients(losses), truth)
    handle = persample.extend(p.model, on_backward=got.append, reduction="mean", batch_dim=drawn.axis)
    losses = readout(p.model(*p.inputs))
    if losses.requires_grad:
        losses.mean().backward()
        hold(got[0], truth)
    handle.remove()


@given(models)
@examples(40)
def test_quantities_of_random_models(drawn: Drawn) -> None:
    p, truth = truth_of(drawn)
    S = run(drawn, p, verify=False, quantities=["norm", "gram", "variance"])
    scale = 1 + float(truth.flat.square().sum(1).max())
    assert torch.allclose(S.norm().square(), truth.flat.square().sum(1), atol=TOLERANCE * scale)
    assert torch.allclose(S.gram(), truth.flat @ truth.flat.T, atol=TOLERANCE * scale)
    variance = torch.cat([v.flatten() for v in S.variance().values()])
    assert torch.allclose(variance, truth.flat.var(0, unbiased=False), atol=TOLERANCE * scale)


# ---- random models that couple the samples ------------------------------------------------------------------------

COUPLINGS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x - x.mean(0),
    lambda x: x / (1 + x.abs().max()),
    lambda x: x.softmax(0),
    lambda x: x.sort(0).values,
    lambda x: x + 0.3 * x.roll(1, 0),
    lambda x: x + 0.3 * x.flip(0),
    lambda x: x.cumsum(0),
    lambda x: x - 0.5 * x[:1],
    lambda x: torch.softmax(x.flatten(1) @ x.flatten(1).T, -1) @ x.flatten(1),
    lambda x: x * (1 + x.detach().std()),
    lambda x: x + x[torch.arange(len(x) - 1, -1, -1)].tanh(),
    lambda x: x * x.sum(),
]


class Coupled(nn.Module):
    """A random model, with samples coupled at one place of it: before, or behind."""

    def __init__(self, program: Program, how: Callable[[Tensor], Tensor], first: bool) -> None:
        super().__init__()
        self.program, self.how, self.first = program, how, first

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = self.program(self.how(x) if self.first else x, ids)
        return out if self.first else self.how(out)


@given(models, st.integers(0, len(COUPLINGS) - 1), st.booleans())
@examples(120)
def test_coupling_never_goes_unnoticed(drawn: Drawn, how: int, first: bool) -> None:
    """An error, or what the gradients of the batch's own losses say is true for every parameter."""
    assume(drawn.axis == 0 and drawn.n > 1 and drawn.form != "ids")
    p, truth = truth_of(drawn)
    x, ids = p.inputs
    model = Coupled(p.model, COUPLINGS[how], first)
    try:
        G = persample.gradients(model, readout, (x, ids), verify=True)
    except persample.PersampleError:
        return
    parameters = list(model.parameters())
    losses = readout(model(x, ids))
    for n in range(drawn.n):
        wanted = torch.autograd.grad(losses[n], parameters, retain_graph=True, materialize_grads=True)
        for name, want in zip(G.names, wanted, strict=True):
            assert torch.allclose(G[name][n], want, atol=1e-6 * (1 + float(truth.flat.abs().max())))
