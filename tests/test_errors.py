"""Bad input, and models that an engine can't serve: a clear error of its own type, and the model as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import persample

N, D = 4, 5


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def square(out: Tensor, _: Any = None) -> Tensor:
    return out.square().flatten(1).sum(1)


class Model(nn.Module):
    """A model with one weight and a body to be given."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(D, D, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


LINEAR = lambda m, x: x @ m.w  # noqa: E731


@pytest.fixture
def unchanged() -> Any:
    """Hand models in: afterwards they have no hooks, gradients or attributes they didn't have, and no mode is left."""
    seen: list[tuple[nn.Module, set[str], dict[str, Tensor]]] = []

    def keep(model: nn.Module) -> nn.Module:
        seen.append((model, set(vars(model)), copy.deepcopy(model.state_dict())))
        return model

    yield keep
    assert not torch.overrides._get_current_function_mode_stack()
    for model, attributes, state in seen:
        assert set(vars(model)) == attributes
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_every_error_is_a_persample_error() -> None:
    errors = [getattr(persample, name) for name in persample.__all__ if name.endswith("Error")]
    assert len(errors) > 8 and all(issubclass(error, persample.PersampleError) for error in errors)


def test_nothing_else_is_raised_on_purpose() -> None:
    """But where Python's own type is what callers expect, or what a module says to itself."""
    allowed = {"batch.py", "fallback.py", "rules/__init__.py"}
    package = Path(persample.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"raise (ValueError|TypeError|RuntimeError|KeyError)\(", path.read_text())
    }
    assert {name for name in found if not any(name.endswith(end) for end in allowed)} <= {"engines/compiled.py"}


def test_every_warning_finds_the_line_of_the_user() -> None:
    package = Path(persample.__file__).parent
    assert [p.name for p in package.rglob("*.py") if "warnings.warn(" in p.read_text()] == ["errors.py"]


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "error", "match"),
    [
        (x(0, D), None, {}, persample.EmptyBatchError, "N = 0"),
        (torch.tensor(1.0), None, {}, persample.SampleAxisError, "sample axis"),
        (x(), x(3), {}, persample.SampleAxisError, "targets.*size 3.*N = 4"),
        ((x(), x(3, D)), None, {}, persample.SampleAxisError, "inputs.*size 3"),
        (x(), None, {"batch_dim": 2}, persample.SampleAxisError, "no axis 2"),
        (x(), None, {"batch_dim": "0"}, persample.SampleAxisError, "batch_dim must be"),
        ({"x": x()}, None, {"batch_dim": {"y": 0}}, persample.SampleAxisError, "no entry for"),
        (x(), None, {"params": "nope"}, persample.UnknownParameterError, "matches none.*w"),
        (x(), None, {"params": "*"}, persample.UnknownParameterError, r"Is r'\.\*' meant"),
        (x(), None, {"params": "?"}, persample.UnknownParameterError, r"Is r'\.' meant"),
        (x(), x(), {"batch_dim": 1, "params": "w"}, persample.LossError, "returned shape"),
        (
            x(),
            x()[:, 0],
            {"batch_dim": 1},
            persample.SampleAxisError,
            r"targets.*4 at axis 0.*inputs.*N = 5.*batch_dim=1",
        ),
        (x(), x(N, 3), {"batch_dim": 1}, persample.SampleAxisError, r"batch_dim=1.*At axis 0, all have size 4: leave"),
        (x(), None, {"params": ["w", "v"]}, persample.UnknownParameterError, "'v'"),
        (x(), None, {"params": [x()]}, persample.UnknownParameterError, "names of parameters, not the tensors"),
        (x().numpy(), x(), {}, persample.SampleAxisError, "no tensor among the inputs.*torch.as_tensor"),
        (x(), x()[1:], {}, persample.SampleAxisError, "Give as many of each"),
        (
            x(),
            x(),
            {"batch_dim": (None, 0)},
            persample.SampleAxisError,
            "every tensor.*shared.*'Graphs in one node tensor'",
        ),
        ({"x": x()}, None, {"batch_dim": {"x": None}}, persample.SampleAxisError, "'Graphs in one node tensor'"),
        (x(), None, {"params": lambda name, p: False}, persample.UnknownParameterError, "predicate"),
        (x(), None, {"engine": "magic"}, ValueError, "hooks"),
        (x(), None, {"quantities": ["norms"]}, persample.QuantityError, "unknown quantity"),
        (x(), None, {"quantities": []}, persample.QuantityError, "empty"),
        (x(), None, {"quantities": ["clip"]}, persample.QuantityError, "max_norm"),
        (x(), None, {"quantities": ["dot"]}, persample.QuantityError, "argument"),
    ],
)
def test_bad_input(
    unchanged: Any, inputs: Any, targets: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = unchanged(Model(LINEAR))
    with pytest.raises(error, match=match):
        persample.gradients(model, square, inputs, targets, **options)


def test_frozen_parameters_are_said_to_be_frozen(unchanged: Any) -> None:
    model = unchanged(nn.Linear(D, 2).double())
    model.bias.requires_grad_(False)
    with pytest.raises(persample.UnknownParameterError, match="does not require grad"):
        persample.gradients(model, square, x(), params=["bias"])
    model.requires_grad_(False)
    with pytest.raises(persample.UnknownParameterError, match="no parameter that requires grad"):
        persample.gradients(model, square, x())
    with pytest.raises(persample.UnknownParameterError, match="Are model and loss_fn swapped"):
        persample.gradients(nn.MSELoss(), nn.Linear(D, 2).double(), x(), x())


class Opaque(torch.autograd.Function):
    """A function that autograd can follow and nobody else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def differentiates_itself(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = (x @ m.w).tanh().sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def changes_an_input(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    out = F.linear(h, m.w)
    h.mul_(3)
    return out


def writes_a_slice(m: Any, x: Tensor) -> Tensor:
    h = x * 1
    h[:, 1].add_(m.w[0, 0])
    return h


UNSERVED = [
    (
        "custom_function",
        lambda m, x: Opaque.apply(x, m.w),
        persample.CaptureError,
        "'w'.*autograd.Function Opaque, .*Call Opaque.apply by",
    ),
    ("double_backward", differentiates_itself, persample.HigherOrderError, "create_graph=True"),
    ("input_changed_in_place", changes_an_input, persample.InplaceError, "torch.nn.functional.linear.*'w'"),
    (
        "reentrant_checkpoint",
        lambda m, x: checkpoint(lambda h: h @ m.w, x.requires_grad_() * 1, use_reentrant=True),
        persample.CaptureError,
        r"use_reentrant=False\.$",  # engine="loop" is no way out: PyTorch takes such a region by backward() alone
    ),
    ("reduced_over_the_batch", lambda m, x: (x @ m.w).sum(0, keepdim=True) * x, persample.BatchCoupledError, "'w'"),
    ("transposed_to_the_wrong_place", lambda m, x: F.linear(x.T, m.w[:, :N]), persample.LossError, r"\(5,\)"),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("body", "error", "match"), [c[1:] for c in UNSERVED], ids=[c[0] for c in UNSERVED])
def test_what_the_hook_engine_cannot_attribute(unchanged: Any, body: Any, error: type[Exception], match: str) -> None:
    model = unchanged(Model(body))
    with pytest.raises(error, match=match):
        persample.gradients(model, square, x())


@pytest.mark.parametrize("name", ["custom_function", "double_backward"])
def test_the_loop_engine_serves_what_the_error_points_to(name: str) -> None:
    body = next(c[1] for c in UNSERVED if c[0] == name)
    model, inputs = Model(body), x()
    G = persample.gradients(model, square, inputs, engine="loop")
    for n in range(N):
        (g,) = torch.autograd.grad(square(model(inputs[n : n + 1])).sum(), model.w)
        assert torch.allclose(G["w"][n], g, rtol=0, atol=1e-12)


def test_a_partly_written_slice_is_exact(unchanged: Any) -> None:
    model = unchanged(Model(writes_a_slice))
    G, truth = (persample.gradients(model, square, x(), engine=engine) for engine in ("hooks", "loop"))
    assert torch.allclose(G["w"], truth["w"], rtol=0, atol=1e-12)


def test_vmap_says_when_it_cannot_follow(unchanged: Any) -> None:
    model = unchanged(Model(lambda m, x: (x @ m.w) * (2.0 if x.abs().sum().item() > 0 else 1.0)))
    with pytest.raises(persample.CaptureError, match="hooks"):
        persample.gradients(model, square, x(), engine="vmap")


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(D), nn.BatchNorm1d(D, track_running_stats=False).eval(), nn.BatchNorm1d(D, affine=False)]
)
def test_batch_norm_with_batch_statistics(unchanged: Any, norm: nn.Module, engine: str) -> None:
    model = unchanged(nn.Sequential(nn.Linear(D, D), copy.deepcopy(norm), nn.Linear(D, 2)).double())
    model[1].track_running_stats = False if model[1].running_mean is None else model[1].track_running_stats
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(persample.BatchCoupledError) as raised:
        persample.gradients(model, square, x(), engine=engine)
    model.load_state_dict(state)  # the forward pass itself updates running statistics, as it does without us
    assert "batch_norm (with '1." in str(raised.value)
    if engine == "hooks":
        assert raised.value.parameters == ("0.weight", "0.bias") and "'0.weight'" in str(raised.value)


def test_what_lies_behind_the_coupling_is_served(unchanged: Any) -> None:
    model = unchanged(
        nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Linear(D, 2)).double()
    )
    G = persample.gradients(model, square, x(), params="[12]")
    losses = square(model(x()))
    for n in range(N):
        for name in G.names:
            (g,) = torch.autograd.grad(losses[n], model.get_parameter(name), retain_graph=True)
            assert torch.allclose(G[name][n], g, atol=1e-12)


COUPLED = [
    ("softmax_over_batch", lambda m, x: (x @ m.w).softmax(0)),
    ("centred_over_batch", lambda m, x: (h := x @ m.w) - h.mean(0)),
    ("detached_statistics", lambda m, x: (h := x @ m.w) / (1 + h.detach().square().mean(0))),
    ("sorted_over_batch", lambda m, x: (x @ m.w).sort(0).values),
    ("attention_over_batch", lambda m, x: (h := x @ m.w) @ h.T @ h),
    ("functional_batch_norm", lambda m, x: F.batch_norm(x @ m.w, None, None, training=True)),
    ("first_sample_as_reference", lambda m, x: (h := x @ m.w) - h[:1]),
]


@pytest.mark.parametrize("body", [c[1] for c in COUPLED], ids=[c[0] for c in COUPLED])
def test_hidden_coupling_is_found_and_named(unchanged: Any, body: Any) -> None:
    model = unchanged(Model(body))
    with pytest.raises(persample.BatchCoupledError, match="torch"):
        persample.gradients(model, square, x())
    report = persample.check(model, square, x())
    assert not report.ok and {row.verdict for row in report.rows} == {"coupled"}
    with pytest.raises(persample.BatchCoupledError):
        report.raise_if_bad()


def test_a_sample_on_which_only_others_depend() -> None:
    """The one that attains the maximum over the batch has its own loss alone, but not its own row."""
    model, inputs = Model(lambda m, x: (h := x @ m.w) / h.detach().abs().max() + h.abs().max()), x()
    largest = int((inputs @ model.w).abs().max(1).values.argmax())
    picked = int(torch.randint(N, (), generator=torch.Generator().manual_seed(N)))  # the sample that is run alone
    inputs[[largest, picked]] = inputs[[picked, largest]]
    with pytest.raises(persample.BatchCoupledError, match=r"'w'.*torch"):
        persample.gradients(model, square, inputs)


def test_contrastive_loss_is_coupling() -> None:
    def info_nce(out: Tensor, _: Any) -> Tensor:
        return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")

    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(Model(LINEAR), info_nce, x())


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(1, D), nn.LayerNorm(D), nn.RMSNorm(D), nn.BatchNorm1d(D).eval(), nn.Softmax(1), nn.Identity()],
    ids=lambda m: type(m).__name__,
)
def test_no_false_alarm(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(D, D), norm, nn.Linear(D, 2)).double()
    model[1].train(norm.training)
    assert persample.check(model, square, x()).ok


def test_factors_that_alias_a_changed_input_raise_at_every_read() -> None:
    model, inputs = nn.Linear(D, 7).double(), x()
    G = persample.gradients(model, square, inputs)
    assert G.norm().shape == (N,)
    inputs.mul_(2)
    with pytest.raises(persample.InplaceError, match=r"'weight'.*changed in place"):
        G.norm()
    with pytest.raises(persample.InplaceError):
        G.select("weight")["weight"]
    assert G["bias"].shape == (N, 7)


def test_a_wrong_sample_axis_is_caught_by_one_sample_alone() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.RNN(D, 3).double()  # reads [T, N, D]

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    inputs = x(N, N, D)  # T == N: nothing but a sample alone can tell
    with pytest.raises((persample.BatchCoupledError, persample.VerificationError, persample.SampleAxisError)):
        persample.gradients(SequenceFirst(), square, inputs)
    loss = lambda out, _: out.square().sum((0, 2))  # noqa: E731
    G = persample.gradients(SequenceFirst(), loss, inputs, batch_dim=1)
    assert torch.allclose(
        G.flat(), persample.gradients(SequenceFirst(), loss, inputs, batch_dim=1, engine="loop").flat(), atol=1e-10
    )


def test_max_norm_and_scale_grad_by_freq() -> None:
    ids = torch.randint(6, (N, 3), generator=torch.Generator().manual_seed(0))
    with pytest.raises(persample.CaptureError, match="max_norm"):
        persample.gradients(nn.Embedding(6, D, max_norm=0.1).double(), square, ids)
    with pytest.raises(persample.BatchCoupledError, match="scale_grad_by_freq"):
        persample.gradients(nn.Embedding(6, D, scale_grad_by_freq=True).double(), square, ids)
    for engine in ("hooks", "vmap", "loop"):
        with pytest.raises(persample.BatchCoupledError, match="scale_grad_by_freq"):
            persample.gradients(nn.EmbeddingBag(6, D, scale_grad_by_freq=True).double(), square, ids, engine=engine)


def test_distributed_tensors_and_quantities_of_no_rows() -> None:
    S = persample.gradients(Model(LINEAR), square, x(), quantities=["norm"])
    for ask in (S.gram, S.variance, S.mean, lambda: S.sum(torch.ones(N)), lambda: S.clip(1.0)):
        with pytest.raises(persample.QuantityError, match=r"asked for|kept"):
            ask()
    G = persample.gradients(Model(LINEAR), square, x())
    with pytest.raises(persample.QuantityError, match=r"\[4\]"):
        G.sum(torch.ones(3))
    with pytest.raises(persample.QuantityError, match="ddof=4"):
        G.variance(ddof=4)
    with pytest.raises(persample.QuantityError, match=r"\[25\]"):
        G.dot(torch.ones(7))
    with pytest.raises(persample.UnknownParameterError, match="'w'"):
        G.dot({})
    with pytest.raises(persample.QuantityError, match="positive"):
        G.clip(0.0)
    with pytest.raises(persample.UnknownParameterError, match="'v'"):
        G["v"]
    other = persample.gradients(nn.Linear(D, 2).double(), square, x())
    with pytest.raises(persample.QuantityError, match="different parameters"):
        G.gram(other)


@pytest.mark.parametrize(("params", "meant"), [("*.weight", r".*\.weight"), ("weight", ".*weight"), ("[0].weigth", "")])
def test_a_pattern_that_matches_nothing_offers_one_that_does(params: str, meant: str) -> None:
    model = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 2)).double()
    with pytest.raises(persample.UnknownParameterError, match=f"Is r'{re.escape(meant)}' meant" if meant else "0.bias"):
        persample.gradients(model, square, x(), params=params)
    if meant:
        assert persample.gradients(model, square, x(), params=meant).names == ("0.weight", "1.weight")


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 3).double()

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.linear(x) * scale


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_positional_and_keyword_arguments_go_by_name(engine: str) -> None:
    model, scale = Scales(), x(N, 1)
    for inputs in (x(), (x(), {"scale": scale}), (x(), scale), {"x": x(), "sacle": scale}):
        with pytest.raises(persample.ArgumentError, match=r"can't be called.*forward\(x.*scale.*by name"):
            persample.gradients(model, square, inputs, engine=engine)
    assert len(persample.gradients(model, square, {"x": x(), "scale": scale}, engine=engine)) == N


def test_a_type_error_inside_the_model_is_the_models_own() -> None:
    with pytest.raises(TypeError, match="mine"):
        persample.gradients(Model(raises_type_error), square, x())


def raises_type_error(m: Any, x: Tensor) -> Tensor:
    raise TypeError("mine")


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"engine": "loop"}, {"engine": "vmap"}])
def test_what_raises_leaves_running_statistics_and_random_state_as_they_were(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 3), nn.Dropout(), nn.BatchNorm1d(3)).double()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(
        persample.BatchCoupledError, match=r"'loss' \(.*'influence' \(.*'copy' \(.*'frozen' \(.*'eval' \("
    ):
        persample.gradients(model, square, x(), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_coupled_samples_by_broadcasting_are_told_by_their_shapes() -> None:
    def compares(m: Any, x: Tensor) -> Tensor:
        h = x @ m.w
        return h[:, :1] - h.sum(1)

    with pytest.raises(persample.BatchCoupledError, match=r"\(4, 1\) with \(4,\) to \(4, 4\): squeeze\(-1\)"):
        persample.gradients(Model(compares), square, x())


@pytest.mark.parametrize("ask", [persample.check, persample.explain])
def test_reports_have_no_notion_and_say_what_has(ask: Any) -> None:
    with pytest.raises(persample.ArgumentError, match=r"coupled='loss'.*gradients.*persample.coupling"):
        ask(Model(LINEAR), square, x(), coupled="loss")


def test_a_loss_function_that_takes_the_targets_of_the_batch() -> None:
    """It is called for one sample alone, as its error says."""
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(ValueError) as raised:
        persample.gradients(model, lambda outputs, _: F.cross_entropy(outputs, y), x)
    assert any("one sample alone" in note for note in getattr(raised.value, "__notes__", ["one sample alone"]))


class Pair(nn.Module):
    """Two outputs, as those of an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encode(x)
        return self.decode(code), code


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_a_loss_function_that_is_called_otherwise_than_it_expects(engine: str) -> None:
    """What it raises is its own, with a note on how it is called."""
    model, x = Pair(), torch.randn(5, 4)
    with pytest.raises((AttributeError, TypeError)) as raised:
        persample.gradients(model, lambda out, t: F.mse_loss(out[0], t), x, engine=engine)
    assert any(
        "is None: give targets=" in note for note in getattr(raised.value, "__notes__", ["is None: give targets="])
    )
    with pytest.raises(TypeError) as raised:
        persample.gradients(model, lambda rec, code, t: F.mse_loss(rec, t), x, x, engine=engine)  # type: ignore
    assert any(
        "the whole tuple as outputs" in note
        for note in getattr(raised.value, "__notes__", ["the whole tuple as outputs"])
    )


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("n", [2, 5])
def test_a_loss_function_that_has_the_batch_built_in(engine: str, n: int) -> None:
    """Alone, a sample is broadcast with all others."""
    model, x = Pair().double(), torch.randn(n, 4).double()
    for verify in (None, False) if engine == "hooks" else (True,):
        with pytest.raises(persample.LossError, match=r"tensor of N samples from outside.*Pass it as targets="):
            persample.gradients(model, lambda out, _: (out[0] - x).square().mean(), x, engine=engine, verify=verify)
    G = persample.gradients(model, lambda out, t: (out[0] - t).square().mean(), x, x, engine=engine)
    assert torch.allclose(G.losses, (model(x)[0] - x).square().mean(1))


def test_a_criterion_that_is_given_the_output_object_of_a_model() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(logits=super().forward(x))

    x, y = torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(persample.LossError, match=r"returns a Output.*outputs\.logits"):
        persample.gradients(Model(4, 3), nn.CrossEntropyLoss(), x, y)
    G = persample.gradients(Model(4, 3), lambda out, y: F.cross_entropy(out.logits, y), x, y)
    assert len(G) == 5


def test_rows_that_were_asked_for_as_coupled_are_said_to_be_so() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    G = persample.gradients(model, nn.CrossEntropyLoss(), x, y, coupled="loss")
    with pytest.raises(persample.BatchCoupledError, match="leave coupled= out"):
        persample.optim.ClippedSGD(model.named_parameters(), max_norm=1.0).step(G)


def test_norms_of_single_parameters_are_asked_of_the_result() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(persample.QuantityError, match=r"squared_norm\(per_parameter=True\)"):
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=[("squared_norm", {"per_parameter": True})])
    S = persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=["squared_norm"])
    assert set(S.squared_norm(per_parameter=True)) == {"weight", "bias"}
    bounds = [("clip", {"max_norm": 1.0, "per_parameter": True})]
    with pytest.raises(persample.QuantityError, match=r"its option is 'max_norm'.*G.select\(layer\).clip\(max_norm\)"):
        persample.gradients(model, nn.CrossEntropyLoss(), x, y, quantities=bounds)


class Shakes(nn.Module):
    """Noise from a generator of its own, which nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(D, 2), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        return h * torch.rand(h.shape, generator=self.generator, dtype=h.dtype)


WITH_BLOCK = r"recorder\.gradients\(losses, coupled='loss'\) in a with-block, `with persample\.extend\(model\)"


def test_a_way_out_leads_out() -> None:
    """Messages that name what gives the rows: it does."""
    shakes = Shakes().double()
    with pytest.raises(persample.BatchCoupledError, match=r"generator of its own, verify=False gives the rows"):
        persample.gradients(shakes, square, x())
    state = shakes.generator.get_state()
    G = persample.gradients(shakes, square, x(), verify=False)
    shakes.generator.set_state(state)
    losses = square(shakes(x()))
    for n in range(N):
        g = torch.autograd.grad(losses[n], list(shakes.parameters()), retain_graph=True)
        assert torch.allclose(G.flat()[n], torch.cat([p.flatten() for p in g]), atol=1e-12)

    model = nn.Linear(D, 3).double()
    contrast = lambda z: F.cross_entropy(z @ z.mT, torch.arange(len(z)), reduction="none")  # noqa: E731
    for loss in (lambda z, _: contrast(z), lambda z, _: (z - z.roll(1, 0)).square().sum(1)):
        with pytest.raises(persample.BatchCoupledError, match=WITH_BLOCK):
            persample.gradients(model, loss, x())
        with persample.extend(model) as recorder:
            losses = loss(model(x()), None)
            G = recorder.gradients(losses, coupled="loss")
            for n in range(N):
                g = torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True)
                assert torch.allclose(G.flat()[n], torch.cat([p.flatten() for p in g]), atol=1e-12)


def test_a_loss_that_compares_samples_is_told_where_its_gradients_are() -> None:
    """By whoever finds it, and without a word of layers that aren't there."""

    def info_nce(z: Tensor, _: Any = None) -> Tensor:
        return F.cross_entropy(z @ z.mT, torch.arange(len(z)), reduction="none")

    model = nn.Linear(D, 3).double()
    for ask in (
        lambda: persample.gradients(model, info_nce, x(), coupled="loss"),
        lambda: persample.gradients(model, info_nce, x(), coupled="copy"),
        lambda: persample.coupling(model, info_nce, x()).norms(),
    ):
        with pytest.raises(persample.BatchCoupledError, match=f"else than BatchNorm.*{WITH_BLOCK}") as raised:
            ask()
        assert "statistics" not in str(raised.value)
    norm = nn.Sequential(model, nn.BatchNorm1d(3)).double()
    with pytest.raises(persample.BatchCoupledError, match=f"same BatchNorm statistics.*{WITH_BLOCK}"):
        persample.gradients(norm, info_nce, x(), coupled="loss")
    with persample.extend(model) as recorder:
        losses = info_nce(model(x()))
        with pytest.raises(persample.VerificationError, match=r"losses that compare samples .* coupled='loss'\)"):
            recorder.gradients(losses)
        coupled = recorder.gradients(losses, coupled="loss")
    with pytest.raises(persample.BatchCoupledError, match="a loss of every sample alone"):
        persample.optim.ClippedSGD(model.named_parameters(), max_norm=1.0).step(coupled)


def test_a_report_tells_of_a_criterion_of_several_samples() -> None:
    model = nn.Linear(D, 3).double()
    with pytest.warns(UserWarning, match="the criterion of the whole batch is") as said:
        report = persample.check(model, lambda z, _: (z @ z.mT).logsumexp(1).mean(), x())
    assert len(said) == 1 and "rows are of the samples' own losses: the criterion of the whole batch is" in str(report)
    assert "criterion" not in str(persample.check(model, lambda z, _: z.square().sum(1).mean(), x()))


@pytest.mark.parametrize("engine", ["hooks", "loop", "vmap"])
def test_a_criterion_of_several_samples_is_told_by_every_engine(engine: str) -> None:
    model = nn.Linear(D, 3).double()
    with pytest.warns(UserWarning, match="the criterion of the whole batch is"):
        persample.gradients(model, lambda z, _: (z @ z.mT).logsumexp(1).mean(), x(), engine=engine)


def test_outputs_in_a_dictionary_are_named() -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    with pytest.raises(persample.LossError, match=r"criterion\(outputs\['scores'\], targets\)"):
        persample.gradients(Named(D, 3), nn.CrossEntropyLoss(), x().float(), torch.arange(N) % 3)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"engine": "loop"}, "engine='loop' runs every sample alone"),
        ({"engine": "vmap"}, "engine='vmap' runs every sample alone"),
        ({"max_bytes": 1}, "max_bytes=1 runs the batch in slices"),
        ({"max_bytes": 1, "quantities": ["norm"]}, "max_bytes=1 runs the batch in slices"),
    ],
)
@pytest.mark.parametrize("verify", [None, False])
def test_errors_of_a_model_tell_what_was_done_to_it(options: Any, note: str, verify: bool | None) -> None:
    class BuiltIn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.layer(x)[:, None], torch.ones(4, 2, 2))[:, 0]

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises((RuntimeError, persample.VerificationError)) as caught:
        persample.gradients(BuiltIn(), nn.CrossEntropyLoss(), x, y, verify=verify, **options)
    told = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert any(note in line or "sample 1 alone does not" in line for line in told)
    assert persample.gradients(BuiltIn(), nn.CrossEntropyLoss(), x, y, verify=False).norm().shape == (4,)
