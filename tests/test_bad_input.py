"""Nonsense in every argument: the rows are exact, or a `PersampleError` says which argument, why, and what to do.

What the user's own model or loss raises comes through as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.case import call, sample

import persample
from persample import attribution, batchnorm, optim, statistics
from persample.errors import BatchNormError

N, D = 4, 5
ENGINES = ["hooks", "vmap", "loop"]


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def square(out: Tensor, _: Any = None) -> Tensor:
    return out.square().flatten(1).sum(1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, 2).double()


class Body(nn.Module):
    """A weight, and what is done with it."""

    def __init__(self, body: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape or (D, 2), dtype=torch.float64))
        self.body = body

    def forward(self, *args: Any) -> Any:
        return self.body(self.w, *args)


def within_batch(model: nn.Module, loss_fn: Any, inputs: Tensor) -> Tensor:
    """The ordinary gradients of the batch's own losses, ``[N, D]``."""
    losses, parameters = loss_fn(model(inputs)), list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# ---- one argument at a time ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": lambda x: x}, persample.ArgumentError, "model must be a torch.nn.Module"),
    ({"model": nn.Linear(D, 2, device="meta")}, persample.ArgumentError, "'weight'.*meta"),
    ({"loss_fn": nn.CrossEntropyLoss}, persample.LossError, r"give an instance of it: CrossEntropyLoss\(\)"),
    ({"inputs": [[1.0, 2.0]], "targets": None}, persample.SampleAxisError, r"torch\.as_tensor"),
    ({"targets": np.zeros(N)}, persample.SampleAxisError, r"array of NumPy with N = .*torch\.as_tensor"),
    ({"loss_fn": "mse"}, persample.LossError, "loss_fn must be a function"),
    ({"engine": None}, persample.ArgumentError, "engine must be one of"),
    ({"engine": ["hooks"]}, persample.ArgumentError, "engine must be one of"),
    ({"verify": "yes"}, persample.ArgumentError, "verify must be"),
    ({"generator": 3}, persample.RandomnessError, "generator must be"),
    ({"coupled": "none"}, persample.ArgumentError, "coupled must be one of"),
    *(({"max_bytes": b}, persample.ArgumentError, "max_bytes must be") for b in (0, -1, "1e9", float("nan"), [1])),
    *(({"params": p}, persample.UnknownParameterError, "no regular expression") for p in ("(", "*", re.compile(b"w"))),
    ({"params": 5}, persample.UnknownParameterError, "params= must be"),
    ({"params": []}, persample.UnknownParameterError, "params= is empty"),
    ({"params": lambda name: True}, persample.UnknownParameterError, r"\(name, parameter\)"),
    ({"params": ["weight", 3]}, persample.UnknownParameterError, "no parameter 3.*weight"),
    *(
        ({"quantities": q}, persample.QuantityError, r"quantities= must be a list of names or \(name, options\)")
        for q in (5, print, [5], [None], [()], [("norm",)], [("norm", 3)], [("norm", {}, 1)])
    ),
    ({"quantities": [("norm", {"p": 1})]}, persample.QuantityError, "'norm' has no option 'p'"),
    ({"quantities": [("clip", {"max_norm": 1, "p": 1})]}, persample.QuantityError, "its option is 'max_norm'"),
    ({"quantities": ("clip", {"max_norm": 1})}, persample.QuantityError, r"quantities=\[\('clip', "),
    ({"quantities": [("clip", {"max_norm": "1"})]}, persample.QuantityError, "max_norm must be a positive number"),
    ({"quantities": [("variance", {"ddof": None})]}, persample.QuantityError, "ddof must be a number"),
    ({"quantities": [("dot", {"v": torch.ones(12)})]}, persample.QuantityError, "its option is 'direction'"),
    ({"quantities": [("dot", {"direction": 3})]}, persample.QuantityError, "direction must be a tensor or"),
    ({"inputs": None}, persample.SampleAxisError, "sample axis"),
    ({"inputs": x().tolist()}, persample.SampleAxisError, "sample axis"),
    ({"inputs": {}}, persample.SampleAxisError, "sample axis"),
    (
        {"inputs": torch.nested.nested_tensor([x(2, D), x(3, D)], layout=torch.jagged)},
        persample.SampleAxisError,
        "inputs: a nested tensor",
    ),
    (
        {"targets": torch.nested.nested_tensor([x(2), x(3)], layout=torch.jagged)},
        persample.SampleAxisError,
        "targets: a nested tensor",
    ),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("arguments", "error", "match"), WRONG, ids=[f"{next(iter(w[0]))}-{w[2]}" for w in WRONG])
def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        persample.gradients(**{"model": linear(), "loss_fn": square, "inputs": x(), **arguments})
    assert isinstance(raised.value, persample.PersampleError)


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda out, _: square(out).to_sparse(), "layout torch.sparse_coo.*to_dense"),
        (lambda out, _: square(out).long(), "torch.int64.*real numbers"),
        (lambda out, _: square(out) > 1, "torch.bool.*real numbers"),
        (lambda out, _: square(out) + 0j, "torch.complex128.*real numbers"),
        (lambda out, _: list(square(out)), "must return a tensor, got list"),
        (lambda out, _: None, "must return a tensor, got NoneType"),
        (lambda out, _: float(out.detach().sum()), "must return a tensor, got float"),
        (lambda out, _: square(out)[:, None], "loss_fn returned shape"),
        (lambda out, _: torch.cat([square(out), square(out)[:1]]), "loss_fn returned shape"),
        (lambda out, _: square(out)[:0], "loss_fn returned shape"),
        (lambda out, _: square(out).sum().reshape(1), "loss_fn returned shape"),
        (lambda out, _: out.sum(1)[:, None] - torch.ones(N), "loss_fn returned shape"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_loss_per_sample(engine: str, loss_fn: Any, match: str) -> None:
    with pytest.raises(persample.LossError, match=match):
        persample.gradients(linear(), loss_fn, x(), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("output", [None, "text", (), torch.ones(()), {"y": [1.0]}])
def test_outputs_without_samples_under_a_scalar_loss(engine: str, output: Any) -> None:
    with pytest.raises(persample.LossError, match="none with N = 4 samples"):
        persample.gradients(
            Body(lambda w, x: output), lambda out, _: torch.zeros((), dtype=torch.float64), x(), engine=engine
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_users_own_errors_come_through(engine: str) -> None:
    with pytest.raises(ZeroDivisionError):
        persample.gradients(linear(), lambda out, _: 1 / 0, x(), engine=engine)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        persample.gradients(linear(), square, x(N, D + 1), engine=engine)
    with pytest.raises(persample.ArgumentError, match="unexpected keyword argument 'nonsense'"):
        persample.gradients(linear(), square, {"nonsense": x()}, engine=engine)


# ---- unusual, and served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", [slice(None), slice(1, 2)])
def test_what_is_not_a_number_stays_with_its_sample(engine: str, where: slice) -> None:
    inputs = x()
    inputs[where] = float("nan")
    G = persample.gradients(linear(), square, inputs, engine=engine)
    truth = torch.cat([within_batch(linear(), square, one) for one in inputs.split(1)])
    torch.testing.assert_close(G.flat(), truth, rtol=0, atol=1e-12, equal_nan=True)
    assert bool(G.flat()[where].isnan().all()) and bool(G.flat().isnan().any(1).sum() == inputs.isnan().any(1).sum())


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_that_depend_on_nothing(engine: str) -> None:
    with pytest.warns(UserWarning, match="no loss depends on any of the parameters"):
        G = persample.gradients(linear(), lambda out, _: square(out).detach(), x(), engine=engine)
    assert set(G.unused) == {"weight", "bias"} and not bool(G.flat().any())


def test_losses_that_depend_on_each_other_and_on_no_parameter() -> None:
    model = Body(lambda w, x: x - x.logsumexp(0))
    with pytest.warns(UserWarning, match="no loss depends on any of the parameters"):
        G = persample.gradients(model, square, x())
    assert not bool(G.flat().any()) and "batch-coupled" in repr(G)


@pytest.mark.parametrize("max_bytes", [None, 1, 600])
@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_sparse_inputs(engine: str, max_bytes: int | None) -> None:
    model, dense = Body(lambda w, x: torch.sparse.mm(x, w)), Body(lambda w, x: x @ w)
    inputs = x() * (x() > 0)
    G = persample.gradients(model, square, inputs.to_sparse(), engine=engine, max_bytes=max_bytes)
    torch.testing.assert_close(G.flat(), within_batch(dense, square, inputs), rtol=0, atol=1e-12)
    S = persample.gradients(model, square, inputs.to_sparse(), engine=engine, max_bytes=max_bytes, quantities="gram")
    torch.testing.assert_close(S.gram(), G.gram(), rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_samples_cannot_be_taken_out_of() -> None:
    model, inputs = Body(lambda w, x: torch.sparse.mm(x, w)), x().to_sparse_csr()
    G = persample.gradients(model, square, inputs, verify=False)  # no sample is run alone
    torch.testing.assert_close(G.flat(), persample.gradients(Body(lambda w, x: x @ w), square, x()).flat())
    for options in ({"verify": True}, {"engine": "vmap"}, {"engine": "loop"}, {"max_bytes": 1}):
        with pytest.raises(persample.SampleAxisError, match=r"out of a Tensor of layout torch.sparse_csr.*dense"):
            persample.gradients(model, square, inputs, **options)


ids = torch.arange(N)
LOOKUPS: list[tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = [
    ((N, D), (N, D), lambda t, x: x * F.embedding(ids, t)),
    ((N, D), (N, 3, D), lambda t, x: x * F.embedding(ids[:, None], t)),
    ((N, D), (N, 3, D), lambda t, x: x * F.embedding(ids, t)[:, None]),
    ((N, D), (N, 3, D), lambda t, x: x * F.embedding(ids[:, None].expand(N, 3), t)),
    ((N, D), (N, D), lambda t, x: x * t[ids]),
    ((N + 2, D), (N, D), lambda t, x: x * t[:N]),
    ((N, D), (N, D), lambda t, x: x + F.embedding(ids.flip(0), t).tanh() + F.embedding(ids, t)),
    ((N, D), (N, D), lambda t, x: x * F.embedding(torch.stack([ids, ids.flip(0)], 1), t).sum(1)),
    ((N, D), (N, D), lambda t, x: x * F.embedding(ids, t, padding_idx=1)),
    ((N, D), (N, D), lambda t, x: torch.cat([x, F.embedding(ids % 2, t)], 1)),
    ((N, D), (N, D), lambda t, x: x * t.gather(0, ids[:, None].expand(N, D))),
]


@pytest.mark.parametrize(("table", "shape", "body"), LOOKUPS)
def test_a_table_looked_up_by_the_samples_numbers(
    table: tuple[int, ...], shape: tuple[int, ...], body: Callable[..., Tensor]
) -> None:
    """Within this batch, the table's entries are single samples' own (alone, every sample would be number 0)."""
    model, inputs = Body(body, *table), x(*shape)
    G = persample.gradients(model, square, inputs, verify=False)
    truth = within_batch(model, square, inputs)
    torch.testing.assert_close(G.flat(), truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(G.gram(), truth @ truth.T, rtol=0, atol=1e-11)
    with pytest.raises((persample.SampleAxisError, persample.VerificationError), match=r"alone.*verify=False"):
        persample.gradients(model, square, inputs)


# ---- results ------------------------------------------------------------------------------------------------------


def test_rows_by_number_and_of_a_run_that_keeps_none() -> None:
    wrong: Any = 0
    with pytest.raises(persample.UnknownParameterError, match=r"got 0; sample n is"):
        persample.gradients(linear(), square, x())[wrong]
    with pytest.raises(persample.QuantityError, match="kept no rows, so there is none of 'weight'"):
        persample.gradients(linear(), square, x(), quantities=["norm"])["weight"]
    for method in ("dense", "flat"):
        with pytest.raises(persample.QuantityError, match="kept no rows: leave quantities= out"):
            getattr(persample.gradients(linear(), square, x(), quantities=["norm"]), method)()


def test_losses_that_are_divided_by_the_number_of_samples() -> None:
    def share(outputs: Tensor, _: Any) -> Tensor:
        return outputs.square().sum(1) / len(outputs)

    n = len(x())
    with pytest.raises(persample.BatchCoupledError, match=f"alone, {n} times as much .is it divided by the number"):
        persample.gradients(linear(), share, x())


def test_wrong_arguments_of_quantities_are_named() -> None:
    G = persample.gradients(linear(), square, x())
    v = {"weight": torch.ones(2, D), "bias": torch.ones(2)}
    asks: list[tuple[Callable[[], Any], str]] = [
        *(
            (lambda w=w, f=f: f(w), r"weight must be a dense real tensor of shape \[4\]")
            for f in (G.sum, G.backward)
            for w in (
                [1, 2, 3, 4],
                3,
                "a",
                torch.ones(3),
                torch.ones(4, 1),
                torch.ones(4) + 0j,
                torch.ones(4).to_sparse(),
            )
        ),
        *((lambda d=d: G.dot(d), "direction must be a tensor or") for d in (3, "a", None, [1])),
        *((lambda p=p: G.project(p), "projection must be a tensor or") for p in (3, "a", None, [1])),
        (lambda: G.dot({"weight": 1, "bias": 2}), r"direction for 'weight'.*\[2, 5\], got int"),
        (lambda: G.project(torch.ones(12, 0)), r"\[12, k\]"),
        (lambda: G.project({**v, "weight": torch.ones(2, D, 3)}), r"'bias'.*\[2, 3\], got \[2\]"),
        (lambda: G.project({k: p.unsqueeze(-1).expand(*p.shape, p.ndim) for k, p in v.items()}), r"'bias'.*\[2, 2\]"),
        *((lambda c=c: G.clip(c), "max_norm must be a positive number") for c in ("a", None, 0, -1.0, torch.ones(2))),
        *((lambda d=d: G.variance(d), "ddof must be a number") for d in ("a", None, -1)),
        (lambda: G.gram(3), "rows of both"),
        (lambda: G.flat(out=torch.empty(4, 12, dtype=torch.long)), "integers"),
        (lambda: G.dense(out={}), r"\[4, 2, 5\] for 'weight'"),
        (lambda: G.dense(out={"weight": torch.empty(4, 2, D), "bias": torch.empty(4)}), r"\[4, 2\] for 'bias'"),
    ]
    for ask, match in asks:
        with pytest.raises(persample.QuantityError, match=match):
            ask()
    for params, match in (("(", "no regular"), (3, "must be"), ([], "empty"), (["v"], "'v'")):
        with pytest.raises(persample.UnknownParameterError, match=match):
            G.select(params)
    assert G.select(re.compile("b")).names == ("bias",)


def test_rows_of_several_types_side_by_side() -> None:
    """In the type that holds them all; asked for in another, they are rounded to it."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(D, 3), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).double())
            return out

    G = persample.gradients(Mixed(), square, x().float())
    assert G["a.weight"].dtype is torch.float32 and G["b.weight"].dtype is torch.float64
    assert G.flat().dtype is torch.float64
    assert torch.equal(G.flat()[:, -8:-2], G["b.weight"].flatten(1))
    assert G.flat(out=torch.empty(N, 26)).dtype is torch.float32
    assert torch.allclose(G.flat() @ G.flat().T, G.gram(), rtol=1e-5)


# ---- the other front doors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"params": "("}, persample.UnknownParameterError, "no regular expression"),
        ({"params": []}, persample.UnknownParameterError, "params= is empty"),
        ({"batch_dim": "1"}, persample.SampleAxisError, "batch_dim must be an int"),
        ({"quantities": 5}, persample.QuantityError, "quantities= must be"),
        ({"quantities": ["gram", "norms"]}, persample.QuantityError, "unknown quantity 'norms'"),
        ({"quantities": ["norm", "clip"], "reduction": 1, "on_backward": print}, persample.QuantityError, "its bound"),
        (
            {"quantities": [("clip", 1.0)], "reduction": 1, "on_backward": print},
            persample.QuantityError,
            "options a dict",
        ),
        ({"reduction": "mean"}, persample.ArgumentError, "on_backward= and reduction="),
        ({"reduction": "mea", "on_backward": print}, persample.ArgumentError, "reduction must be"),
        ({"reduction": [], "on_backward": print}, persample.ArgumentError, "reduction must be"),
        ({"reduction": 0.0, "on_backward": print}, persample.ArgumentError, "other than 0"),
        ({"reduction": float("nan"), "on_backward": print}, persample.ArgumentError, "reduction must be"),
        ({"reduction": "mean", "on_backward": 3}, persample.ArgumentError, "on_backward must be a function"),
    ],
)
def test_extend(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = linear()
    with pytest.raises(error, match=match):
        persample.extend(model, **options)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(persample.ArgumentError, match="model must be"):
        persample.extend(lambda x: x)  # type: ignore[arg-type]


def test_a_reduction_that_returns_nonsense() -> None:
    model = linear()
    handle = persample.extend(model, reduction=lambda: "a", on_backward=print)  # type: ignore[arg-type, return-value]
    with pytest.raises(persample.ArgumentError, match="reduction must be"):
        square(model(x())).mean().backward()
    handle.remove()


def test_losses_given_to_a_recorder() -> None:
    with persample.extend(linear()) as recorder:
        losses = square(recorder.model(x()))
        for wrong in (None, losses.sum(), losses.to_sparse(), losses[:0]):
            with pytest.raises(persample.LossError, match=r"\[N\]"):
                recorder.gradients(wrong)  # type: ignore[arg-type]
        with pytest.raises(persample.SampleAxisError, match="4 samples, but there are 3 losses"):
            recorder.gradients(losses[:3])
        with pytest.raises(persample.CaptureError, match="no recorded forward"):
            recorder.gradients(torch.ones(N, requires_grad=True))
        losses.sum().backward()
        with pytest.raises(persample.CaptureError, match=r"freed the graph.*before backward"):
            recorder.gradients(losses)


def test_criteria_without_targets() -> None:
    for criterion in (nn.CrossEntropyLoss(), F.mse_loss):
        with pytest.raises(persample.LossError, match="there are none"):
            persample.gradients(linear(), criterion, x())
    triplets, criterion = Body(lambda w, *views: [view @ w for view in views]), nn.TripletMarginLoss()
    with pytest.raises(persample.LossError, match=r"triplets.*lambda outputs, _: criterion\(\*outputs\)"):
        persample.gradients(triplets, criterion, (x(), x() + 1, x() - 1))
    assert len(persample.gradients(triplets, lambda outputs, _: criterion(*outputs), (x(), x() ** 2, x() ** 3))) == N
    with pytest.raises(persample.LossError, match=r"got a Tensor.*The order is"):
        persample.gradients(linear(), x(), square)  # type: ignore[arg-type]


def test_rows_of_unused_parameters_are_the_users_too() -> None:
    model = linear()
    model.register_module("aside", linear())
    G = persample.gradients(model, square, x())
    assert set(G.unused) == {"aside.weight", "aside.bias"}
    G["aside.weight"].add_(1)
    assert not G["aside.weight"].any()


def test_explain_tells_coupled_parameters_among_the_others() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    rows = {row.name: row for row in persample.explain(model, square, x()).rows}
    coupled = {name for name, row in rows.items() if "coupled" in row.served}
    assert coupled == {"0.weight", "0.bias"}
    assert "batch_norm" in rows["0.weight"].why and "coupled=" in rows["0.weight"].why
    assert "linear (rule)" in rows["2.weight"].served


def test_explain_says_what_it_does_not_look_at() -> None:
    report = persample.explain(linear(), lambda z, _: (z @ z.mT).logsumexp(1), x())
    for shown in (str(report), report._repr_html_().replace("&#x27;", "'")):
        assert "coupling that calls don't show is for persample.check" in shown


def test_wrong_arguments_of_what_is_built_on_rows_are_named(tmp_path: Path) -> None:
    at, bn, c, rows = attribution, nn.BatchNorm1d(D).double(), nn.MSELoss(), torch.ones(3, 2)
    J, params = persample.batchnorm.jacobian(bn, x()), linear().named_parameters()
    asks: list[tuple[Callable[[], Any], type[Exception], str]] = [
        *((lambda f=f: f(3), persample.ArgumentError, "model must be") for f in (batchnorm.convert, batchnorm.revert)),
        (lambda: at.cross_gram(3, c, [x()], [x()]), persample.ArgumentError, "model must be"),
        (lambda: at.GradientStore(tmp_path, 3), persample.ArgumentError, "model must be"),
        (lambda: at.GradientStore(tmp_path, linear()).append(3), persample.ArgumentError, "gradients of a batch.*int"),
        (lambda: at.tracin(None), persample.ArgumentError, "list or generator.*NoneType"),
        (lambda: at.self_influence(3), persample.ArgumentError, "list or generator.*int"),
        (lambda: at.trak(rows, rows, None), persample.QuantityError, r"residual must be \[n_train\] = \[3\].*NoneType"),
        (lambda: at.trak(None, rows, rows[:, 0]), persample.QuantityError, "train must be features"),
        (lambda: at.influence_from_gram(None, rows, 1.0), persample.QuantityError, "K and cross must be tensors"),
        (lambda: at.linear_datamodelling_score(rows, None, rows), persample.QuantityError, "subsets must be a tensor"),
        (lambda: at.margin({"logits": rows}, rows), persample.LossError, "got dict.*out.logits"),
        (lambda: statistics.accumulate(linear(), c, []), persample.ArgumentError, "nothing to accumulate"),
        (lambda: optim.ClippedSGD(params, max_norm=1.0, generator=3), persample.RandomnessError, "generator must be"),
        (lambda: batchnorm.jacobian(bn, [1.0]), BatchNormError, "a tensor.*got list"),
        (lambda: J @ None, BatchNormError, "a vector for this operator.*NoneType"),
    ]
    for ask, error, match in asks:
        with pytest.raises(error, match=match):
            ask()
    scores, subsets, outputs = torch.randn(4, 2), np.eye(4, dtype=bool), np.random.default_rng(0).normal(size=(4, 2))
    assert at.linear_datamodelling_score(scores, subsets, outputs).isfinite().all()  # arrays are taken, too


@pytest.mark.parametrize("ask", [persample.check, persample.explain, persample.coupling], ids=lambda f: f.__name__)
def test_check_explain_and_coupling(ask: Any) -> None:
    with pytest.raises(persample.ArgumentError, match="model must be"):
        ask(3, square, x())
    with pytest.raises(persample.LossError, match="loss_fn must be"):
        ask(linear(), 3, x())
    with pytest.raises(persample.EmptyBatchError, match="N = 0"):
        ask(linear(), square, x()[:0])
    with pytest.raises(persample.UnknownParameterError, match="regular"):
        ask(linear(), square, x(), params="(")
    if ask is not persample.coupling:
        with pytest.raises(persample.ArgumentError, match="engine"):
            ask(linear(), square, x(), engine="x")
    if ask is persample.check:
        with pytest.raises(persample.ArgumentError, match="samples"):
            ask(linear(), square, x(), samples=-1)
    if ask is persample.explain:
        with pytest.raises(persample.QuantityError, match="quantities="):
            ask(linear(), square, x(), quantities=[5])


# ---- everything at once, at random --------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, None),
    "list": lambda h: [h],
    "dict": lambda h: {"y": h, "text": "s", "none": None},
    "shared": lambda h: {"y": h, "constant": torch.ones(3)},
    "none": lambda h: None,
    "number": lambda h: 3.0,
    "detached": lambda h: h.detach(),
    "numpy": lambda h: h.detach().numpy(),
    "sparse": lambda h: h.to_sparse(),
    "reduced": lambda h: h.mean(),
    "transposed": lambda h: h.mT,
    "integers": lambda h: h.long(),
}


def seen(out: Any) -> Tensor:
    """What the losses see of outputs: numbers, if there are any."""
    out = out["y"] if isinstance(out, dict) else out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(out, Tensor):
        return torch.zeros(N, 1, dtype=torch.float64)
    return out.to_dense().double() if out.layout is not torch.strided or not out.is_floating_point() else out


LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "rows": lambda h: h.square().flatten(1).sum(1),
    "mean": lambda h: h.square().mean(),
    "sum": lambda h: h.square().sum(),
    "one": lambda h: h.square().sum().reshape(1),
    "column": lambda h: h.square().sum(1, keepdim=True),
    "integers": lambda h: h.square().sum(1).long(),
    "none": lambda h: None,
    "list": lambda h: list(h.square().sum(1)),
    "sparse": lambda h: h.square().sum(1).to_sparse(),
    "root": lambda h: h.sqrt().sum(1),  # NaN for some samples
    "half": lambda h: h.square().sum(1)[: len(h) // 2],
}
INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "dict": lambda x: {"x": x},
    "more": lambda x: (x, None, 3),
    "shared": lambda x: (x, x[:1]),
    "sparse": lambda x: x.to_sparse(),
    "nan": lambda x: x * torch.where(torch.arange(len(x)) == 1, float("nan"), 1.0)[:, None],
    "numpy": lambda x: x.numpy(),
    "mismatch": lambda x: (x, x[:-1]),
    "requires_grad": lambda x: x.clone().requires_grad_(),
}


class Odd(nn.Module):
    """Two weights, inputs of several forms, outputs of any."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2))
        self.form = form

    def forward(self, x: Any, more: Any = None, factor: Any = 1) -> Any:
        x = torch.as_tensor(x)
        h = torch.sparse.mm(x, self.a) if x.layout is not torch.strided else (x @ self.a).tanh()
        return FORMS[self.form](h if more is None else h * factor + more)


@dataclass(frozen=True)
class Call:
    """What hypothesis draws: every argument, more often sensible than not."""

    n: int
    engine: str
    inputs: str
    form: str
    loss: str
    options: dict[str, Any]


def mostly(good: list[Any], bad: list[Any]) -> Any:
    return st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(good + bad))


calls = st.builds(
    Call,
    mostly([2, 3, 4], [0, 1]),
    st.sampled_from(ENGINES),
    mostly(["tensor", "tuple", "dict"], list(INPUTS)),
    mostly(["tensor", "tuple"], list(FORMS)),
    mostly(["rows", "mean"], list(LOSSES)),
    st.fixed_dictionaries(
        {},
        optional={
            "batch_dim": mostly([0, (0, 0)], [1, -1, 2, None, "0", (0,), (None, 0), {"x": 0}, (0, 0, 1), [0]]),
            "params": mostly([None, "a", ["a", "b"], "[ab]"], ["(", "nope", [], 3, ["nope"], lambda n, p: n == "b"]),
            "quantities": mostly(
                [None, ["norm"], ["gram", "variance"], [("clip", {"max_norm": 0.5})]],
                ["norm", 3, [3], [], ["nope"], [("dot", {"direction": torch.ones(2)})], [("clip", {})]],
            ),
            "max_bytes": mostly([None, 10**6, 500], [0, "1"]),
            "verify": st.sampled_from([None, True, False]),
        },
    ),
)
NAMED = re.compile(
    r"loss_fn|inputs|targets|batch_dim|params|quantit(y|ies)|max_bytes|engine|N = 0|parameter '|direction|sample"
)


@pytest.mark.filterwarnings("ignore")
@given(calls)
@settings(max_examples=400, suppress_health_check=[*HealthCheck])
def test_any_call_is_exact_or_a_named_error(drawn: Call) -> None:
    model, loss_fn = Odd(drawn.form), lambda out, _: LOSSES[drawn.loss](seen(out))
    inputs = INPUTS[drawn.inputs](torch.randn(drawn.n, 3, dtype=torch.float64))
    axis = 1 if drawn.options.get("batch_dim") in (1, -1) else 0
    error = ""
    try:
        G = persample.gradients(model, loss_fn, inputs, engine=drawn.engine, **drawn.options)
    except persample.PersampleError as refused:
        error = str(refused)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017 (the user's own: it comes without the library, too)
            _ = [lone(model, loss_fn, inputs, n, axis) for n in (None, *range((drawn.n, 3)[axis]))]
        return
    finally:
        assert not torch.overrides._get_current_function_mode_stack()
        assert all(p.grad is None for p in model.parameters())
    if error:
        assert NAMED.search(error), error
        return
    assume(drawn.options.get("batch_dim", 0) in (0, (0, 0), {"x": 0}))
    truth = torch.stack([lone(model, loss_fn, inputs, n) for n in range(drawn.n)])
    columns = [i for i, name in enumerate(("a", "b")) if name in G.names for i in range(9 * i, 9 * i + 9)]
    hold(G, truth[:, columns])


def lone(model: nn.Module, loss_fn: Any, inputs: Any, n: int | None, axis: int = 0) -> Tensor:
    """The gradient of sample ``n`` alone, or of the batch, without the library."""
    loss = loss_fn(call(model, inputs if n is None else sample(inputs, n, axis)), None).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True) if loss.requires_grad else ()
    return torch.cat([g.flatten() for g in found]) if found else torch.zeros(18, dtype=torch.float64)


def hold(G: Any, truth: Tensor) -> None:
    """Whatever was asked for is what these rows say."""
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9, equal_nan=True)
    if isinstance(G, persample.Gradients):
        close(G.flat(), truth)
    if isinstance(G, persample.Gradients) or "norm" in G.requests:
        close(G.norm(), truth.norm(dim=1))
    elif "gram" in G.requests:
        close(G.gram(), truth @ truth.mT)
        close(torch.cat([v.flatten() for v in G.variance().values()]), truth.var(0, unbiased=False))
    else:
        factor = (0.5 / truth.norm(dim=1, keepdim=True)).clamp(max=1)
        close(torch.cat([c.flatten() for c in G.clip().values()]), (factor.nan_to_num(1.0) * truth).sum(0))


def test_cosines_of_rows_that_are_not_finite() -> None:
    data = x()
    data[1] = torch.nan
    C = persample.gradients(linear(), square, data).cosine()
    assert C[1].isnan().all() and abs(C[0, 0] - 1) < 1e-12 and C[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("run", [persample.gradients, persample.curvature.kfac, persample.curvature.hvp])
def test_a_loader_in_the_place_of_a_batch(run: Callable[..., Any]) -> None:
    data = torch.utils.data.TensorDataset(x(), torch.zeros(N, dtype=torch.int64))
    for given_as_inputs in (data, torch.utils.data.DataLoader(data, batch_size=2)):
        with pytest.raises(persample.ArgumentError, match=r"takes one batch: for x, y in loader.*curvature.merge"):
            run(linear(), nn.CrossEntropyLoss(), given_as_inputs)
