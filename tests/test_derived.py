"""Weights that are derived from parameters: which forms stay, and what is led back only when rows are read."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from zoo import Case, cases, problem
from zoo.case import Fn
from zoo.oracle import matrix, rows

import persample
from persample import collect, cost
from persample.factors import Outer, Pulled, dense, times
from persample.rules.scaling import ENTRYWISE

N, D = 6, 5
derived = [c for c in cases if any(word in c.name for word in ("weight", "spectral", "orthogonal", "prune", "derived"))]
derived = [c for c in derived if not (c.coupled or c.raises or c.missing or c.name.startswith("loss"))]


def losses(outputs: Tensor, _: Any = None) -> Tensor:
    return outputs.flatten(1).sin().sum(1)


def test_there_are_cases() -> None:
    assert len(derived) > 60


@pytest.mark.parametrize("case", derived, ids=str)
def test_rows_that_are_led_back_when_they_are_read(case: Case) -> None:
    """As in the matrix of all cases, whose weights are too small for it."""
    p = problem(case)
    expected = rows(p, case.batch_dim)
    flat = expected.flat
    asked = [
        "norm",
        "gram",
        "second_moment",
        "variance",
        "sum",
        ("clip", {"max_norm": 0.3}),
        ("dot", {"direction": flat[0]}),
    ]
    with cost.using(pulled=1):
        S = persample.gradients(p.model, p.loss_fn, p.inputs, p.targets, batch_dim=case.batch_dim, quantities=asked)
        G = persample.gradients(p.model, p.loss_fn, p.inputs, p.targets, batch_dim=case.batch_dim)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(S.norm(), flat.norm(dim=1))
    close(S.gram(), flat @ flat.mT)
    close(S.dot(), flat @ flat[0])
    clip = torch.where(flat.norm(dim=1) > 0.3, 0.3 / flat.norm(dim=1), 1.0)
    for name, r in expected.rows.items():
        close(G[name], r)
        close(S.second_moment()[name], r.square().mean(0))
        close(S.variance()[name], (r - r.mean(0)).square().mean(0))
        close(S.sum()[name], r.sum(0))
        close(S.clip()[name].flatten(), clip @ matrix(r))


# ---- forms --------------------------------------------------------------------------------------------------------


def mask(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 3 > 0).float()


def wide(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, 8, -1)


def table(p: Any, x: Tensor, w: Tensor) -> Tensor:
    return F.embedding((x * 9).long() % 40, w)


W, A, B, S, C, K = (6, D), (2, D), (6, 2), (6, 1), (D,), (9, 8, 3)
KEPT: list[tuple[str, Callable[..., Tensor], dict[str, tuple[int, ...]], str]] = [
    ("low_rank", lambda p, x: F.linear(x, p.w + p.b @ p.a), {"w": W, "a": A, "b": B}, "Outer Outer Outer"),
    ("rows", lambda p, x: F.linear(x, p.w * p.s), {"w": W, "s": S}, "Outer Dense"),
    ("columns", lambda p, x: F.linear(x, p.w / p.s), {"w": W, "s": C}, "Outer Dense"),
    ("mask", lambda p, x: F.linear(x, p.w * mask(6, D)), {"w": W}, "Pulled"),
    ("entries", lambda p, x: F.linear(x, p.w.tanh().exp()), {"w": W}, "Pulled"),
    ("joined", lambda p, x: F.linear(x, torch.cat([p.a, p.b], 1)), {"a": (6, 2), "b": (6, 3)}, "Outer Outer"),
    ("kernel", lambda p, x: F.conv1d(wide(x), p.w * p.s), {"w": K, "s": (9, 1, 1)}, "Conv Dense"),
    ("kernel_mask", lambda p, x: F.conv1d(wide(x), p.w * mask(*K)), {"w": K}, "Pulled"),
    ("table", lambda p, x: table(p, x, p.w * p.s), {"w": (40, 3), "s": (3,)}, "Rows Dense"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "shapes", "forms"), KEPT, ids=[k[0] for k in KEPT])
def test_forms_stay(name: str, function: Any, shapes: dict[str, tuple[int, ...]], forms: str) -> None:
    model = Fn(function, **{key: torch.randn(shape) for key, shape in shapes.items()})
    G = persample.gradients(model, losses, torch.rand(N, D))
    assert " ".join(type(G.factors[key]).__name__ for key in shapes) == forms


def test_scaling_knows_what_it_broadcasts() -> None:
    left, right = torch.randn(N, 2, 3, 4), torch.randn(N, 2, 3, 5)
    for shape in [(8, 5), (8, 5, 1), (2, 4, 5), (40,)]:
        g = Outer(left, right, torch.Size(shape))
        for factor in [torch.randn(()), torch.randn(shape[0], *[1] * (len(shape) - 1)), torch.randn(shape[1:] or (1,))]:
            torch.testing.assert_close(dense(times(g, factor)), dense(g) * factor)


# ---- functions of each entry --------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Any, ...]] = {"pow": (3,), "__pow__": (2.5,), "hardtanh": (0.1, 0.8)}
OPTIONS |= {"clamp": (0.2, 1.1), "clip": (0.2, 1.1), "clamp_min": (0.7,), "clamp_max": (0.7,)}


@pytest.mark.parametrize("function", ENTRYWISE, ids=lambda f: f"{getattr(f, '__qualname__', '')}")
def test_functions_of_each_entry(function: Callable[..., Tensor]) -> None:
    options = OPTIONS.get(function.__name__, ())
    model = Fn(lambda p, x: F.linear(x, function(p.w, *options)), w=torch.rand(6, D, dtype=torch.float64) + 0.1)
    x = torch.randn(N, D, dtype=torch.float64)
    G = persample.gradients(model, losses, x)
    assert isinstance(G.factors["w"], Pulled)
    torch.testing.assert_close(
        G["w"], persample.gradients(model, losses, x, engine="loop")["w"], rtol=1e-10, atol=1e-10
    )


# ---- how long rows live -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mask", "normalized", "product"])
def test_rows_that_are_kept_do_not_follow_the_parameter(kind: str) -> None:
    layer = nn.Linear(D, 6)
    if kind == "mask":
        prune.random_unstructured(layer, "weight", 0.5)
    model = {
        "mask": layer,
        "normalized": Fn(lambda p, x: F.linear(x, F.normalize(p.w)), w=torch.randn(6, D)),
        "product": Fn(lambda p, x: F.linear(x, p.w * p.s), w=torch.randn(6, D), s=torch.randn(6, D)),
    }[kind]
    x = torch.randn(N, D)
    with cost.using(pulled=1):
        G, before = (persample.gradients(model, losses, x) for _ in range(2))
    expected = before.dense()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        for b in model.buffers():
            b.zero_()
    for name, rows_ in G.dense().items():
        torch.testing.assert_close(rows_, expected[name])
    torch.testing.assert_close(G.norm(), before.norm())


def test_user_backward_frees_the_graph_of_a_derivation() -> None:
    """A parameter that was derived twice has its second rows when the graph of the first is gone."""
    model = Fn(lambda p, x: F.linear(F.linear(x, _unit(p.w)).tanh(), _unit(p.w)), w=torch.randn(D, D))
    x = torch.randn(N, D)
    expected = persample.gradients(model, losses, x, engine="loop")
    asked = ["norm", "variance", ("clip", {"max_norm": 0.5})]
    for quantities in (None, asked):
        results: list[Any] = []
        handle = persample.extend(model, on_backward=results.append, quantities=quantities, reduction="sum")
        with cost.using(pulled=1):
            losses(model(x)).sum().backward()
        handle.remove()
        torch.testing.assert_close(results[0].norm(), expected.norm())
        torch.testing.assert_close(results[0].clip(0.5)["w"], expected.clip(0.5)["w"])


def _aside(p: Any, x: Tensor) -> Tensor:
    w = torch.matrix_exp(p.w)
    p.head = F.linear(x, w)  # of which no loss is made
    return F.linear(x, w)


def _nested(p: Any, x: Tensor) -> Tensor:
    """Rows of the one are led back through the other, of which a use has yet to arrive."""
    w = torch.matrix_exp(p.w)
    p.head = F.linear(x, w)
    return F.linear(F.linear(x, w).tanh(), torch.matrix_exp(w / 3))


def _recurrent(p: Any, x: Tensor) -> Tensor:
    state = [f(p.h.expand(1, len(x), D)) for f in (torch.tanh, torch.exp)]
    return torch.lstm(x[None], state, [p.w, p.w], False, 1, 0.0, False, False, False)[0][0]


@pytest.mark.parametrize("uses", [_aside, _nested, _recurrent])
def test_uses_that_a_backward_does_not_come_to_when_it_frees_the_graph(uses: Any) -> None:
    model = Fn(uses, w=torch.randn(4 * D if uses is _recurrent else D, D) / 3, h=torch.randn(1, 1, D))
    x = torch.randn(N, D)
    expected = persample.gradients(model, losses, x, engine="loop")
    results: list[Any] = []
    handle = persample.extend(model, on_backward=results.append, reduction="sum")
    losses(model(x)).sum().backward()
    torch.autograd.grad(losses(model(x.requires_grad_())).sum(), x)  # comes to no derivation
    handle.remove()
    for result in results:
        torch.testing.assert_close(result.flat(), expected.flat())
    assert len(results) == 2


def _squared(p: Any, x: Tensor) -> Tensor:
    w = p.w @ p.w
    p.head = F.linear(x, w)
    return F.linear(x, w)


def test_what_a_backward_goes_through_is_led_back_in_full_precision() -> None:
    """Also inside an autocast region, and where the backward is itself recorded."""
    model, x, results = Fn(_squared, w=torch.randn(D, D) / 3), torch.randn(N, D), list[Any]()
    expected = persample.gradients(model, losses, x, engine="loop")
    handle = persample.extend(model, on_backward=results.append, reduction="sum")
    total = losses(model(x)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        total.backward(retain_graph=True)
    torch.autograd.grad(total, [*model.parameters()], create_graph=True)
    handle.remove()
    for result in results:
        assert not result.flat().requires_grad
        torch.testing.assert_close(result.flat(), expected.flat())
    assert len(results) == 2


def test_backwards_leave_nothing_on_a_graph_that_is_kept() -> None:
    model, results = Fn(_aside, w=torch.randn(D, D) / 3), list[Any]()
    handle = persample.extend(model, on_backward=results.append, reduction="sum")
    total = losses(model(torch.randn(N, D))).sum()
    for _ in range(5):
        total.backward(retain_graph=True)
    left = [x for x in gc.get_objects() if isinstance(x, partial) and x.func is collect._passes]
    handle.remove()
    assert len(results) == 5 and not left


def _unit(w: Tensor) -> Tensor:
    return w / w.norm(dim=1, keepdim=True)


def test_nothing_is_led_back_for_sums() -> None:
    """By linearity: one row, whatever ``N`` is."""
    model = Fn(lambda p, x: F.linear(x, p.w.softmax(1)), w=torch.randn(6, D))
    seen: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(w: Tensor) -> Tensor:
            return w.softmax(1)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            seen.append(1)
            return y * (g - (g * y).sum(-1, keepdim=True))

    x = torch.randn(N, D)
    expected = persample.gradients(model, losses, x).sum()["w"]
    model.function = lambda p, x: F.linear(x, Watched.apply(p.w))
    with cost.using(pulled=1):
        S = persample.gradients(model, losses, x, quantities=["sum"], verify=False)
    torch.testing.assert_close(S.sum()["w"], expected)
    assert len(seen) == 1


def test_parametrized_layers_are_led_back_in_slices() -> None:
    """``[N, *P]`` never exists: the most that a run of norms takes is far below it."""
    from persample.meter import Meter

    layer = parametrizations.orthogonal(nn.Linear(64, 64), orthogonal_map="cayley")
    x = torch.randn(400, 64)
    with Meter() as meter, cost.using(pulled=1 << 14):
        persample.gradients(layer, losses, x, quantities=["norm"], verify=False)
    assert meter.most < 400 * 64 * 64 * 4 / 4
