"""The zoo itself: every case is what the test matrix takes it for.

Rows here come from plain autograd on one sample at a time, with nothing of the library: the cases don't couple their batch (unless
they say so), run the same way twice, and every parameter has a gradient or is listed as unused.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import Case, Problem, call, cases, problem, sample, size

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # PyTorch's, not ours

independent = [case for case in cases if not case.coupled]


def lone(p: Problem, n: int, batch_dim: int) -> tuple[object, Tensor]:
    """Outputs and loss of sample n, alone."""
    outputs = call(p.model, sample(p.inputs, n, batch_dim))
    loss = p.loss_fn(outputs, sample(p.targets, n, batch_dim))
    assert loss.shape in [(), (1,)]
    return outputs, loss.sum()


def floats(tree: object) -> list[Tensor]:
    if hasattr(tree, "__dataclass_fields__") and not isinstance(tree, dict):
        tree = list(vars(tree).values())
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def require(case: Case) -> None:
    if case.missing:
        pytest.skip(f"needs {case.needs}")


def test_names_are_unique() -> None:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", cases, ids=str)
def test_runs_the_same_twice(case: Case) -> None:
    require(case)
    first, second = problem(case), problem(case)
    a, b = call(first.model, first.inputs), call(second.model, second.inputs)
    again = call(first.model, first.inputs)
    for x, y, z in zip(floats(a), floats(b), floats(again), strict=True):
        assert x.dtype == torch.float64 and x.isfinite().all()
        assert torch.equal(x, y) and torch.allclose(x, z, rtol=0, atol=1e-12)
    assert size(first.inputs, case.batch_dim) <= 8
    assert sum(p.numel() for p in first.model.parameters()) < 20_000


@pytest.mark.parametrize("case", independent, ids=str)
def test_a_sample_alone_gives_its_row_of_the_batch(case: Case) -> None:
    require(case)
    p, dim = problem(case), case.batch_dim
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


@pytest.mark.parametrize("case", independent, ids=str)
def test_every_parameter_has_a_gradient_or_is_listed(case: Case) -> None:
    require(case)
    p, dim = problem(case), case.batch_dim
    parameters = {k: v for k, v in p.model.named_parameters() if v.requires_grad}
    assert parameters or not case.unused
    if not parameters:
        return
    seen: set[str] = set()
    for i in range(size(p.inputs, dim)):
        loss = lone(p, i, dim)[1]
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)
            seen |= {k for k, g in zip(parameters, grads, strict=True) if g is not None}
    assert set(parameters) - seen == set(case.unused)
