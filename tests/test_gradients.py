"""`persample.gradients` beyond the matrix: precision, randomness, axes, verification, and that the model stays as it
was."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample import cost, factors, quantities, reductions, statistics_run
from persample.factors import Dense, Outer

N, T, D = 4, 3, 6


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        5, (N,), generator=generator
    )


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 8),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 4, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 5),
    )


class Tokens(nn.Module):
    """Embedding, attention, shared linear: a text model in small."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(11, D), nn.Parameter(torch.randn(T, D))
        self.block = nn.TransformerEncoderLayer(D, 2, 12, dropout=dropout, batch_first=True)
        self.head = nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids) + self.place)).mean(1)


def ids() -> Tensor:
    return torch.randint(11, (N, T), generator=torch.Generator().manual_seed(2))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # torch: attention has no batching rule on this device
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_float32_agrees_with_float64(engine: str) -> None:
    for model, inputs in ((convnet(), batch(3, 8, 8)[0].float()), (Tokens(), ids())):
        y = batch(1)[1]
        wide = copy.deepcopy(model).double()
        exact = persample.gradients(
            wide, nn.CrossEntropyLoss(), inputs.double() if inputs.is_floating_point() else inputs, y, engine="loop"
        )
        G = persample.gradients(model, nn.CrossEntropyLoss(), inputs, y, engine=engine)
        assert G.flat().dtype is torch.float32
        for mine, true in ((G.flat(), exact.flat()), (G.norm(), exact.norm()), (G.gram(), exact.gram())):
            assert relative(mine, true) < 1e-4
        for name in G.names:
            assert relative(G.variance()[name], exact.variance()[name]) < 1e-4
            assert relative(G.second_moment()[name], exact.second_moment()[name]) < 1e-4


def test_half_precision_accumulates_in_float32() -> None:
    model, (x, y) = convnet().to(torch.bfloat16), batch(3, 8, 8, dtype=torch.bfloat16)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    assert G["0.weight"].dtype is torch.bfloat16
    exact = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    rows = exact.flat().double()
    assert G.norm().dtype is G.gram().dtype is G.variance()["0.weight"].dtype is torch.float32
    assert relative(G.norm(), rows.norm(dim=1)) < 2e-2  # the rows themselves are rounded to bf16
    mine = G.flat().double()
    assert relative(persample.Gradients({"p": Dense(G.flat())}, G.losses).norm(), mine.norm(dim=1)) < 1e-6
    assert G.sum()["0.weight"].dtype is torch.bfloat16


def test_autocast_gives_rows_of_the_parameters_type() -> None:
    model, inputs, y = Tokens(), ids(), batch(1)[1]
    with torch.autocast("cpu", torch.bfloat16):
        G = persample.gradients(model, nn.CrossEntropyLoss(), inputs, y)
        with persample.extend(model) as recorder:
            recorded = recorder.gradients(F.cross_entropy(model(inputs), y, reduction="none"))
    exact = persample.gradients(model, nn.CrossEntropyLoss(), inputs, y, engine="loop")
    for rows in (G, recorded):
        assert rows.flat().dtype is torch.float32 and rows.norm().dtype is torch.float32
        assert relative(rows.flat(), exact.flat()) < 3e-2
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs), y, reduction="sum")
    loss.backward()
    for name, g in G.sum().items():
        assert relative(g, model.get_parameter(name).grad) < 3e-2 or model.get_parameter(name).grad.norm() < 1e-3


def test_dropout_rows_belong_to_the_masks_of_that_very_forward() -> None:
    model, inputs, y = Tokens(dropout=0.5).double(), ids(), batch(1)[1]
    with persample.extend(model) as recorder:
        losses = F.cross_entropy(model(inputs), y, reduction="none")
        G = recorder.gradients(losses)
    for n in range(N):
        for name, g in zip(
            G.names, torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True), strict=True
        ):
            assert torch.allclose(G[name][n], g, atol=1e-12)
    G = persample.gradients(model, nn.CrossEntropyLoss(), inputs, y)
    assert torch.allclose(G.losses, F.cross_entropy(G.outputs, y, reduction="none")) and "dropout off" in repr(G)
    report = persample.check(model, nn.CrossEntropyLoss(), inputs, y)
    assert report.ok


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_a_generator_repeats_the_draws_and_leaves_the_global_state(engine: str) -> None:
    model, inputs, y = Tokens(dropout=0.5).double(), ids(), batch(1)[1]
    before = torch.get_rng_state()
    first, second, other = (
        persample.gradients(
            model,
            nn.CrossEntropyLoss(),
            inputs,
            y,
            engine=engine,
            verify=False,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.flat(), second.flat()) and not torch.equal(first.flat(), other.flat())
    assert torch.equal(before, torch.get_rng_state())


def test_nobodys_grad_is_touched() -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    x.requires_grad_()
    for engine in ("hooks", "vmap", "loop"):
        G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine)
        assert x.grad is None and all(p.grad is None for p in model.parameters())
        assert not G.losses.requires_grad and not G.outputs.requires_grad and not G["0.weight"].requires_grad


def test_backward_adds_to_grad_of_its_names_only() -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    nn.CrossEntropyLoss()(model(x), y).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    G.backward()
    assert all(torch.allclose(p.grad, expected[name], atol=1e-12) for name, p in model.named_parameters())
    G.backward()
    assert all(torch.allclose(p.grad, 2 * expected[name], atol=1e-12) for name, p in model.named_parameters())
    model.zero_grad()
    weight = torch.arange(1.0, N + 1, dtype=torch.float64)
    G.select("9").backward(weight)
    assert model[0].weight.grad is None
    assert torch.allclose(model[9].bias.grad, torch.einsum("n,np->p", weight, G["9.bias"]), atol=1e-12)


def test_tied_parameters_appear_once_and_answer_to_every_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x)).mT

    G = persample.gradients(Tied().double(), nn.CrossEntropyLoss(), ids(), ids())
    assert G.names == ("embed.weight",) and torch.equal(G["head.weight"], G["embed.weight"])
    assert "head.weight" in G and G.select("head").names == ("embed.weight",)
    assert G.select(["head.weight"]).names == ("embed.weight",)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_unused_parameters_have_rows_of_zeros_and_are_listed(engine: str) -> None:
    model, (x, y) = nn.Sequential(nn.Linear(D, 5)).double(), batch(D)
    model[0].extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine)
    assert G.unused == ("0.extra",) and not G["0.extra"].any() and G["0.extra"].shape == (N, 2)
    G.backward(torch.full((N,), 0.5, dtype=torch.float64))  # what optimizers leave alone, as after loss.backward()
    assert model[0].extra.grad is None and model[0].weight.grad is not None
    model[0].extra.grad = torch.ones(2, dtype=torch.float64)
    persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine, quantities=["mean"]).backward()
    assert torch.equal(model[0].extra.grad, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_sample_axes_by_pytree(engine: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Linear(D, 5).double()

        def forward(self, sequence: Tensor, scale: Tensor, options: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            h = self.l(sequence * scale + options["shift"].unsqueeze(0))  # [T, N, 5]
            return h, h.mean(0)

    x, y = batch(T, D)
    inputs = {
        "sequence": x.transpose(0, 1),
        "scale": torch.rand(N - 1, 1, 1, dtype=torch.float64),
        "options": {"shift": x[:, 0]},
    }
    dims = ({"sequence": 1, "scale": None, "options": {"shift": 0}}, 0, (1, 0))
    G = persample.gradients(
        Mixed(),
        lambda out, t: F.cross_entropy(out[1], t) + out[0].square().mean(),
        inputs,
        y,
        batch_dim=dims,
        engine=engine,
    )
    model = Mixed()
    for n in range(N):
        out = model(inputs["sequence"][:, n : n + 1], inputs["scale"], {"shift": x[n : n + 1, 0]})
        loss = F.cross_entropy(out[1], y[n : n + 1]) + out[0].square().mean()
        assert torch.allclose(G["l.weight"][n], torch.autograd.grad(loss, model.l.weight)[0], atol=1e-12)
    assert G.outputs[0].shape == (T, N, 5) and G.outputs[1].shape == (N, 5)


def test_inputs_may_be_any_mapping() -> None:
    from collections import UserDict

    model, inputs = Tokens().double(), UserDict(ids=ids())
    G = persample.gradients(model, nn.CrossEntropyLoss(), inputs, batch(1)[1])
    assert torch.equal(G.flat(), persample.gradients(model, nn.CrossEntropyLoss(), ids(), batch(1)[1]).flat())


def test_verification_runs_once_per_model_shapes_mode_and_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = persample.verify._alone
    monkeypatch.setattr(persample.verify, "_alone", lambda *a: ran.append(1) or real(*a))
    model, (x, y) = convnet().double(), batch(3, 8, 8)

    def run(**options: Any) -> int:
        ran.clear()
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, **options)
        return len(ran)

    assert [
        run(),
        run(),
        run(verify=True),
        run(verify=False),
        run(engine="vmap"),
        run(engine="vmap"),
        run(engine="loop"),
    ] == [1, 0, 1, 0, 1, 0, 0]
    model.eval()
    assert [run(), run()] == [1, 0]
    x, y = x[:2], y[:2]
    assert [run(), run(), run(quantities=["norm"])] == [1, 0, 0]
    assert "verify=False" in repr(persample.gradients(model, nn.CrossEntropyLoss(), x, y, verify=False))


def test_a_wrong_rule_is_caught_by_verification_and_named_by_check() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(D, 5)).double(), batch(D)

    @persample.rule(F.linear)
    def wrong(call: Any, g: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        yield weight, lambda: Outer(call.tokens(g).unsqueeze(1).flip(0), call.tokens(input).unsqueeze(1), weight.shape)
        yield bias, lambda: Dense(call.tokens(g).sum(1))

    try:
        with pytest.raises(persample.VerificationError, match=r"'0\.weight'"):
            persample.gradients(model, nn.CrossEntropyLoss(), x, y)
        report = persample.check(model, nn.CrossEntropyLoss(), x, y, samples=N)
        assert [row.verdict for row in report.rows] == ["wrong", "exact"]
        with pytest.raises(persample.VerificationError, match=r"'0\.weight'"):
            report.raise_if_bad()
    finally:
        wrong.remove()
    assert persample.check(model, nn.CrossEntropyLoss(), x, y).ok


def test_verification_restores_random_state_and_buffers() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * D, 5),
    ).double()
    x, y = batch(3, D)
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    plain(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    assert "dropout off" in repr(G)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_analyses_leave_running_statistics_alone() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 5)).double(), batch(D)
    before = copy.deepcopy(model.state_dict())
    assert not persample.check(model, nn.CrossEntropyLoss(), x, y).ok
    assert any("coupled" in row.served for row in persample.explain(model, nn.CrossEntropyLoss(), x, y).rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_of_several_quantities_in_one_pass() -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    direction, projection = (
        {name: torch.randn_like(p) for name, p in model.named_parameters()},
        torch.randn(G.flat().shape[1], 3, dtype=torch.float64),
    )
    asked = [
        "norm",
        "gram",
        "mean",
        "second_moment",
        ("variance", {"ddof": 1}),
        ("dot", {"direction": direction}),
        ("project", {"projection": projection}),
    ]
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=asked)
    for mine, true in (
        (S.norm(), G.norm()),
        (S.gram(), G.gram()),
        (S.dot(direction), G.dot(direction)),
        (S.project(projection), G.project(projection)),
    ):
        assert torch.allclose(mine, true, atol=1e-10)
    for name in G.names:
        assert torch.allclose(S.mean()[name], G.mean()[name], atol=1e-12)
        assert torch.allclose(S.second_moment()[name], G.second_moment()[name], atol=1e-12)
        assert torch.allclose(S.variance(ddof=1)[name], G.variance(ddof=1)[name], atol=1e-12)
        assert torch.equal(S.variance()[name], S.variance(ddof=1)[name])  # what was asked for
        for ddof in (0, 1, 2):
            true = G[name].var(0, correction=ddof)
            assert torch.allclose(S.variance(ddof)[name], true, atol=1e-12)
            assert torch.allclose(G.variance(ddof)[name], true, atol=1e-12)
            assert torch.allclose(G.std(ddof)[name], true.sqrt(), atol=1e-12)
        assert torch.allclose(G.second_moment()[name], G[name].square().mean(0), atol=1e-12)
        assert torch.allclose(S.norm(per_parameter=True)[name], G.norm(per_parameter=True)[name], atol=1e-12)
    assert len(S) == N and S.unused == () and torch.allclose(S.losses, G.losses)


def test_parts_that_another_one_contains_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    counts = Counter[str]()

    def counting(kind: str, part: Any) -> Any:
        def counted(g: Any, argument: Any) -> Any:
            counts[kind] += 1
            return part(g, argument)

        return counted

    monkeypatch.setattr(quantities, "PARTS", {kind: counting(kind, part) for kind, part in quantities.PARTS.items()})
    monkeypatch.setattr(statistics_run, "PARTS", quantities.PARTS)
    monkeypatch.setattr(statistics_run, "shared_split", lambda g: "")  # one call for each parameter
    asked = ["norm", "mean", "second_moment", "variance", "gram", ("clip", {"max_norm": 0.1})]
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=asked)
    size = len(list(model.parameters()))
    assert counts == {"moments": size, "gram": size}
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine="loop")
    assert torch.allclose(S.norm(), G.norm(), rtol=1e-12)
    for name, clipped in G.clip(0.1).items():
        assert torch.allclose(S.clip()[name], clipped, atol=1e-12)
        assert torch.allclose(S.mean()[name], G.mean()[name], atol=1e-12)
        assert torch.allclose(S.second_moment()[name], G.second_moment()[name], atol=1e-12)


@pytest.mark.parametrize("rows", ["offsets", "native", "tokens"])
@pytest.mark.parametrize("wide", [1, 100, 1 << 22])
@pytest.mark.parametrize(
    "second",
    ["variance", "second_moment", ("project", {"projection": torch.linspace(-1, 1, 744).double().view(372, 2)})],
)
def test_rows_that_are_formed_once_for_several_quantities(
    wide: int, second: Any, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3, 2), nn.ReLU(), nn.Conv1d(6, 4, 3, groups=2), nn.Linear(6, 32), nn.Linear(32, 2)
    )
    model = model.double()
    x, y = torch.randn(N, 2, 17).double(), torch.randn(N, 4, 2).double()
    splits, split = list[str](), statistics_run.shared_split

    def seen(g: Any) -> str:
        splits.append(split(g))
        return splits[-1]

    monkeypatch.setattr(statistics_run, "shared_split", seen)
    name = second if isinstance(second, str) else second[0]
    G = persample.gradients(model, nn.MSELoss(), x, y, engine="loop")
    with cost.using(wide=wide, conv_rows=rows):
        S = persample.gradients(model, nn.MSELoss(), x, y, quantities=["gram", "norm", second])
    expected = {1: {"", "blocks"}, 100: {"", "blocks", "offsets"}, 1 << 22: {"", "whole", "offsets"}}
    assert set(splits) <= expected[wide] and (rows != "offsets" or set(splits) == expected[wide])
    assert torch.allclose(S.gram(), G.gram(), atol=1e-12) and torch.allclose(S.norm(), G.norm(), atol=1e-12)
    if name == "project":
        assert torch.allclose(S.project(), G.project(second[1]["projection"]), atol=1e-12)
        return
    for key, value in getattr(G, name)().items():
        assert torch.allclose(getattr(S, name)()[key], value, atol=1e-12)


class ComplexAffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight).abs().square()


@pytest.mark.parametrize("asked", [["second_moment", "variance", "mean"], ["second_moment"], ["variance"]])
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_moments_of_complex_rows_are_of_absolute_values(asked: list[str], max_bytes: int | None) -> None:
    model, x = ComplexAffine(), torch.randn(N, 3, dtype=torch.float64)
    rows = persample.gradients(model, lambda out, _: out.sum(1), x, engine="loop")["weight"]
    S = persample.gradients(model, lambda out, _: out.sum(1), x, quantities=asked, max_bytes=max_bytes)
    want = {
        "second_moment": rows.abs().square().mean(0),
        "variance": (rows - rows.mean(0)).abs().square().mean(0),
        "mean": rows.mean(0),
    }
    for name in asked:
        found = getattr(S, name)()["weight"]
        torch.testing.assert_close(found, want[name], rtol=1e-12, atol=1e-12)  # the type too: squares are real


def test_rows_written_into_given_memory() -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    out = torch.full((N, sum(p.numel() for p in model.parameters())), float("nan"), dtype=torch.float64)
    assert G.flat(out).data_ptr() == out.data_ptr() and torch.allclose(out, G.flat(), rtol=1e-14)
    rows = {name: torch.full((N, *p.shape), float("nan"), dtype=torch.float64) for name, p in model.named_parameters()}
    filled = G.dense(out=rows)
    for name in G.names:
        assert filled[name].data_ptr() == rows[name].data_ptr()
        assert torch.allclose(rows[name], G[name], rtol=1e-13, atol=1e-15)


def test_memory_that_rows_can_not_be_written_into_is_refused() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    G = persample.gradients(model, nn.MSELoss(), x, y)
    with pytest.raises(persample.QuantityError, match=r"out must be a dictionary.*flat\(out=\)"):
        G.dense(out=torch.empty(4, 8))  # type: ignore[arg-type]
    with pytest.raises(persample.QuantityError, match="give the first rows"):
        G.dense(out={"weight": torch.empty(5, 2, 3), "bias": torch.empty(5, 2)})
    with pytest.raises(persample.QuantityError, match=r"integers.*'bias'.*int32"):
        G.dense(out={"weight": torch.empty(4, 2, 3), "bias": torch.empty(4, 2, dtype=torch.int32)})


def test_compiled_and_wrapped_models() -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    parallel = persample.gradients(nn.DataParallel(model), nn.CrossEntropyLoss(), x, y)
    assert parallel.names == tuple(f"module.{name}" for name in G.names) and torch.allclose(parallel.flat(), G.flat())
    compiled = persample.gradients(torch.compile(model, backend="eager"), nn.CrossEntropyLoss(), x, y)
    assert compiled.names == G.names and torch.allclose(compiled.flat(), G.flat())
    model[0].compile(backend="eager")
    assert torch.allclose(persample.gradients(model, nn.CrossEntropyLoss(), x, y).flat(), G.flat())


def test_one_line_repr() -> None:
    model, (x, y) = convnet(), batch(3, 8, 8, dtype=torch.float32)
    text = repr(persample.gradients(model, nn.CrossEntropyLoss(), x, y))
    assert "\n" not in text and "N=4" in text and "parameters=12" in text and "memory=" in text


def test_looks_in_notebooks_and_plots() -> None:
    from matplotlib import pyplot as plt

    model, (x, y) = convnet(), batch(3, 8, 8, dtype=torch.float32)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    page = G._repr_html_()
    assert page.count("<tr>") == 1 + len(G.names) and "0.weight" in page and "Dense" in page
    _, ax = plt.subplots()
    assert G.plot(ax=ax) is ax and "norm" in ax.get_xlabel() and ax.get_ylabel() == "samples"
    assert sum(patch.get_height() for patch in ax.patches) == N
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["norm"])
    assert S.plot().get_title() == "4 samples"
    plt.close("all")


@pytest.mark.parametrize("asked", [["norm"], ["mean", ("clip", {"max_norm": 1.0})], ["mean"]])
def test_statistics_look_like_gradients_in_notebooks(asked: list[Any]) -> None:
    model, (x, y), normed = convnet(), batch(3, 8, 8, dtype=torch.float32), asked != ["mean"]
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=asked)
    page = S._repr_html_()
    assert page.count("<tr>") == 1 + len(S.names) and "0.weight" in page and "Statistics(N=4" in page
    assert ("median norm" in page) == normed
    if normed:
        assert f"{float(S.norm(per_parameter=True)['0.weight'].median()):.3g}" in page
    for report in (
        persample.check(model, nn.CrossEntropyLoss(), x, y),
        persample.explain(model, nn.CrossEntropyLoss(), x, y),
    ):
        assert "<table" in report._repr_html_() and "0.weight" in str(report)


@pytest.mark.parametrize(
    ("requests", "name"),
    [
        (["second_moment"], "second_moment"),
        (["variance"], "variance"),
        (["mean", "variance"], "sum"),
        (["sum"], "sum"),
        ([("clip", {"max_norm": 0.1})], "clip"),
    ],
)
def test_results_of_a_run_are_handed_out_as_they_are_unless_changed(requests: list[Any], name: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    run = persample.gradients(model, nn.MSELoss(), x, y, quantities=requests)
    first, again = getattr(run, name)(), getattr(run, name)()
    assert all(torch.equal(first[key], again[key]) for key in ("weight", "bias"))
    again.clear()  # the dictionary is the caller's
    getattr(run, name)()["bias"].mul_(2)
    with pytest.raises(
        persample.InplaceError, match=rf"\({'clip' if name == 'clip' else requests[0]}\) was changed in place"
    ):
        getattr(run, name)()


def test_factors_can_be_read_until_what_they_alias_changes() -> None:
    model, x, y = nn.Linear(40, 30).double(), torch.randn(N, 40).double(), torch.randint(30, (N,))
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    assert list(G.factors) == list(G.names) and len(G.factors) == 2 and "alias" not in G.factors
    assert torch.equal(factors.dense(G.factors["weight"]), G["weight"])
    assert torch.allclose(reductions.gram(G.factors["bias"], G.factors["bias"]), G["bias"] @ G["bias"].T, atol=1e-12)
    x.add_(1)
    assert "weight" in G.factors and "weight" in G and "Outer" in repr(G)  # says nothing of the numbers
    for read in (lambda: G.factors["weight"], lambda: dict(G.factors), G.select("weight").norm):
        with pytest.raises(persample.InplaceError, match=r"'weight'.*changed in place"):
            read()
    assert G.select("bias").norm().shape == (N,)


class Sums(nn.Module):
    """Layers whose outputs are added up: all of them get one and the same output gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.other = nn.Linear(D, 5), nn.Linear(D, 5)
        self.norm, self.shift = nn.LayerNorm(5), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.other(x) + self.norm(x[:, :5]) + self.shift


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_whoever_is_handed_rows_may_write_into_them(max_bytes: int | None) -> None:
    model, (x, y) = Sums().double(), batch(D)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, max_bytes=max_bytes)
    expected = persample.gradients(model, nn.CrossEntropyLoss(), x, y, max_bytes=max_bytes).dense()
    G["linear.bias"].mul_(2)  # the matrix that is kept
    assert torch.equal(G["linear.weight"], expected["linear.weight"])
    with pytest.raises(persample.InplaceError, match=r"'linear.bias'.*rows that were handed out"):
        G.norm()
    rows = persample.gradients(model, nn.CrossEntropyLoss(), x, y, max_bytes=max_bytes).dense()
    for own in rows.values():
        own.mul_(2)
    assert all(torch.equal(rows[name], 2 * expected[name]) for name in rows)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_rows_that_were_handed_out_share_no_memory_with_later_ones(engine: str) -> None:
    model, (x, y) = Sums().double(), batch(D)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, engine=engine)
    first, second, third = G.dense(), G.select("linear").dense(), G["linear.bias"]
    expected = {name: rows.clone() for name, rows in first.items()}
    for rows in (*second.values(), third):
        rows.zero_()
    assert all(torch.equal(first[name], expected[name]) for name in first)
    assert torch.equal(G["other.bias"], expected["other.bias"])
    assert torch.allclose(G.norm() ** 2, sum(r.flatten(1).square().sum(1) for r in expected.values()), rtol=1e-12)


def test_a_bias_shares_no_memory_with_the_factors_of_its_weight() -> None:
    model, (x, y) = nn.Linear(40, 5).double(), batch(40)
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    assert isinstance(G.factors["weight"], Outer)
    expected = G.select("weight").norm()
    G["bias"].zero_()
    assert torch.equal(G.select("weight").norm(), expected)


class Halves(nn.Module):
    """A bias that is the sum of two parameters: they have the same rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.one, self.two = (nn.Parameter(torch.randn(*shape)) for shape in ((5, D), (5,), (5,)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.one + self.two).mean(1)


def test_parameters_with_the_same_rows_share_no_memory() -> None:
    model, (x, y) = Halves().double(), batch(T, D)
    rows = persample.gradients(model, nn.CrossEntropyLoss(), x, y).dense()
    assert torch.equal(rows["one"], rows["two"])
    expected = rows["two"].clone()
    rows["one"].mul_(2)
    assert torch.equal(rows["two"], expected)


@pytest.mark.parametrize("asked", [["sum"], ["mean"], ["variance", "mean"], ["std", "second_moment", "sum"]])
def test_statistics_write_the_mean_gradient_where_they_have_it(asked: list[str]) -> None:
    model, (x, y) = convnet().double(), batch(3, 8, 8)
    nn.CrossEntropyLoss()(model(x), y).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for options in ({}, {"max_bytes": 1}):
        model.zero_grad()
        S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["norm", *asked], **options)
        S.backward()
        S.backward()  # adds
        assert all(torch.allclose(p.grad, 2 * expected[n], atol=1e-12) for n, p in model.named_parameters())
    with pytest.raises(persample.QuantityError, match="weighted sum needs the rows"):
        S.backward(torch.ones(N, dtype=torch.float64))
    for options in ({}, {"max_bytes": 1}):
        S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["norm", "variance"], **options)
        with pytest.raises(persample.QuantityError, match=r"\['norm', 'variance'\] only.*for 'sum'.*Add it"):
            S.backward()


def test_out_of_two_parameters_must_not_share_memory() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y)
    memory = torch.empty(4 * 8)
    with pytest.raises(persample.QuantityError, match="'weight' and 'bias' overlap"):
        G.dense(out={"weight": memory[:24].view(4, 2, 3), "bias": memory[16:24].view(4, 2)})
    side_by_side = memory.view(4, 8)
    found = G.dense(out={"weight": side_by_side[:, :6].view(4, 2, 3), "bias": side_by_side[:, 6:]})
    assert torch.equal(found["weight"], G["weight"])
    assert torch.equal(found["bias"], G["bias"])


def test_gradients_of_embeddings_may_be_sparse() -> None:
    """As directions, projections, and in the `.grad` that `backward` adds to."""
    model, x = nn.Sequential(nn.Embedding(7, D, sparse=True), nn.Flatten(), nn.Linear(T * D, 5)), ids() % 7
    loss = nn.CrossEntropyLoss(reduction="sum")
    y = torch.arange(N)
    loss(model(x), y).backward()
    direction = {name: p.grad for name, p in model.named_parameters()}
    G = persample.gradients(model, loss, x, y)
    torch.testing.assert_close(G.dot(direction), G.gram().sum(1))
    S = persample.gradients(model, loss, x, y, quantities=[("dot", {"direction": direction})])
    torch.testing.assert_close(S.dot(direction), G.gram().sum(1))
    matrix = torch.eye(G.flat().shape[1])[:, ::3]
    torch.testing.assert_close(G.project(matrix.to_sparse()), G.flat()[:, ::3])
    G.backward(torch.ones(N))
    torch.testing.assert_close(model[0].weight.grad, 2 * G.sum()["0.weight"])
