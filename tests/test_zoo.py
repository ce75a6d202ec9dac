"""The zoo itself: every case is what the test matrix takes it for.

Rows here come from plain autograd on one sample at a time, with nothing of the library: the cases don't couple their
batch (unless they say so), run the same way twice, and every parameter has a gradient or is listed as unused.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import cache

import pytest
import torch
from torch import nn
from zoo import Case, Problem, call, cases, problem, size
from zoo.oracle import floats, lone, rows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # PyTorch's, not ours

independent = [case for case in cases if not case.coupled]
coupled = [case for case in cases if case.coupled]


@cache
def built(case: Case) -> Problem:
    if case.missing:
        pytest.skip(f"needs {case.needs}")
    return problem(case)


def test_names_are_unique() -> None:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", cases, ids=str)
def test_runs_the_same_twice(case: Case) -> None:
    first, second = built(case), problem(case)
    a, b = call(first.model, first.inputs), call(second.model, second.inputs)
    again = call(first.model, first.inputs)
    for x, y, z in zip(floats(a), floats(b), floats(again), strict=True):
        assert x.dtype == torch.float64 and x.isfinite().all()
        assert torch.equal(x, y) and torch.allclose(x, z, rtol=0, atol=1e-12)
    assert size(first.inputs, case.batch_dim) <= 8
    assert sum(p.numel() for p in first.model.parameters()) < 20_000


@pytest.mark.parametrize("case", independent, ids=str)
def test_a_sample_alone_gives_its_row_of_the_batch(case: Case) -> None:
    p, dim = built(case), case.batch_dim
    n = size(p.inputs, dim)
    outputs = call(p.model, p.inputs)
    losses = p.loss_fn(outputs, p.targets)
    assert losses.shape in [(), (n,)]
    for i in range(n):
        out, loss = lone(p, i, dim)
        if losses.dim():
            torch.testing.assert_close(loss, losses[i], rtol=1e-11, atol=1e-11)
        for whole, one in zip(floats(outputs), floats(out), strict=True):
            if case.samples_in_outputs:
                torch.testing.assert_close(one, whole.narrow(min(dim, whole.dim() - 1), i, 1), rtol=1e-11, atol=1e-11)
            else:
                k = whole.shape[0] // n
                torch.testing.assert_close(one, whole[i * k : (i + 1) * k], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", coupled, ids=str)
def test_a_coupled_case_depends_on_the_other_samples(case: Case) -> None:
    """The sum of the lone losses' gradients is not the gradient of the batch's summed losses."""
    p = built(case)
    losses = p.loss_fn(call(p.model, p.inputs), p.targets)
    parameters = {k: v for k, v in p.model.named_parameters() if v.requires_grad}
    whole = torch.autograd.grad(losses.sum(), list(parameters.values()))
    with contextlib.suppress(ValueError):  # BatchNorm refuses a single value per channel
        lone_sum = [r.sum(0) for r in rows(p).rows.values()]
        assert any(not torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(whole, lone_sum, strict=True))


@pytest.mark.parametrize("case", independent, ids=str)
def test_every_parameter_has_a_gradient_or_is_listed(case: Case) -> None:
    p = built(case)
    truth = rows(p, case.batch_dim)
    assert truth.rows and truth.losses.isfinite().all() and truth.flat.isfinite().all()
    assert truth.unused == case.unused
    zero = [k for k, r in truth.rows.items() if k not in case.unused and r.numel() and not r.any()]
    assert not zero, "a gradient that is zero tests little"


def test_every_layer_of_torch_with_parameters_is_in_the_zoo() -> None:
    """The layers of `torch.nn` whose source makes a parameter; lazy ones become ordinary ones."""
    kinds = {n: c for n, c in vars(nn).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    layers = {n for n, c in kinds.items() if _makes_parameters(c)}
    assert {"Linear", "LSTMCell", "Transformer", "BatchNorm3d"} <= layers
    modules = [m for case in cases if not case.missing for m in built(case).model.modules()]
    seen = {kind.__name__ for m in modules for kind in type(m).mro()}
    assert {n for n in layers - seen if not n.startswith("Lazy")} == set()
    names = {case.name for case in cases}
    assert {n for n in layers if n.startswith("Lazy") and n.replace("Lazy", "lazy_").lower() not in names} == set()


def _makes_parameters(kind: type[nn.Module]) -> bool:
    parents = [k for k in kind.mro() if k.__module__.startswith("torch.nn.modules") and k is not nn.Module]
    source = "".join(inspect.getsource(k) for k in parents).split("def __init__", 1)[-1]
    return any(word in source for word in ("Parameter(", "parameter(", "Linear(", "Attention(", "Layer("))
