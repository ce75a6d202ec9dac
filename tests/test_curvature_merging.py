"""Matrices of several batches, merged: those of one batch of all samples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from persample import PersampleError
from persample.curvature import ekfac, empirical_fisher, fisher, ggn, hvp, kfac, kflr, kfra, merge
from persample.errors import KroneckerError

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
SIZES = (3, 5, 1)
DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(sum(SIZES), 2, 6, dtype=torch.float64, generator=DRAWN)
Y = torch.randint(3, (len(X),), generator=DRAWN)
BATCHES = [*zip(X.split(SIZES), Y.split(SIZES), strict=True)]


def net() -> nn.Module:
    torch.manual_seed(1)
    body = (nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2), nn.Sigmoid())
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(10, 3)).double()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [hvp, ggn, fisher, empirical_fisher, partial(empirical_fisher, method="rows")])
def test_merged_operators_are_that_of_all_samples(make, reduction: str) -> None:
    model = net()
    whole = make(model, CE, X, Y, reduction=reduction)
    merged = merge(make(model, CE, x, y, reduction=reduction) for x, y in BATCHES)
    assert merged.samples == len(X) and repr(merged) == repr(whole)
    v = torch.randn(merged.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert same(merged @ v, whole @ v)
    two, last = merge(make(model, CE, x, y, reduction=reduction) for x, y in BATCHES[:2]), BATCHES[2]
    assert same(merge([two, make(model, CE, *last, reduction=reduction)]) @ v, whole @ v)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", ["joined", "apart"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("make", [partial(kfac, type="empirical"), kflr])
def test_merged_kronecker_factors_are_those_of_all_samples(make, approximation: str, bias: str, reduction: str) -> None:
    model = net()
    options = {"approximation": approximation, "bias": bias, "reduction": reduction}
    whole = make(model, CE, X, Y, **options)
    merged = merge(make(model, CE, x, y, **options) for x, y in BATCHES)
    assert repr(merged) == repr(whole) and merged.samples == len(X)
    for name, block in whole.blocks.items():
        assert same(merged.blocks[name].inputs, block.inputs)
        assert same(merged.blocks[name].gradients, block.gradients)
    v = torch.ones(whole.shape[0], dtype=torch.float64)
    assert same(merged.solve(v, damping=0.1), whole.solve(v, damping=0.1))


def test_factors_of_an_averaged_recursion_are_averaged() -> None:
    model = net()
    parts = [kfra(model, CE, x, y) for x, y in BATCHES]
    block, mean = merge(parts).blocks["0.weight"], kfra(model, CE, X, Y).blocks["0.weight"]
    assert same(block.inputs, mean.inputs) and not same(block.gradients, mean.gradients)
    assert same(block.gradients, sum(n * p.blocks["0.weight"].gradients for n, p in zip(SIZES, parts)) / len(X))  # noqa: B905


def test_many_batches_are_added_up_in_single_precision_at_least() -> None:
    model = nn.Linear(12, 3).bfloat16()
    part = ggn(model, CE, X.flatten(1).bfloat16(), Y)
    v = torch.ones(part.shape[0], dtype=torch.bfloat16)
    merged = merge([part] * 600) @ v
    assert merged.dtype is torch.bfloat16
    torch.testing.assert_close(merged, part @ v)


def test_parameters_in_another_order_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(3, 3, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    x = X[:, 0, :3].float()
    with pytest.raises(PersampleError, match="of the same parameters"):
        merge(hvp(Two(names), CE, x, Y) for names in ("ab", "ba"))


def test_tokens_weigh_the_same_in_sequences_of_any_length() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    torch.manual_seed(0)
    sequences = [torch.randn(n, t, 2, dtype=torch.float64) for n, t in ((2, 3), (4, 5), (1, 1))]
    merged = merge(kfac(model, MSE, x, x.new_zeros(*x.shape[:2], 3), type="empirical") for x in sequences)
    tokens = torch.cat([x.flatten(0, 1) for x in sequences])
    assert same(merged.blocks["0.weight"].inputs[0], tokens.T @ tokens / len(tokens))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", ["joined", "apart"])
def test_corrected_eigenvalues_are_merged_in_one_basis(bias: str, reduction: str) -> None:
    model = net()
    options = {"bias": bias, "reduction": reduction, "type": "exact"}
    basis = merge(kfac(model, CE, x, y, **options) for x, y in BATCHES)
    merged = merge(ekfac(model, CE, x, y, basis=basis, **options) for x, y in BATCHES)
    assert same(merged.dense(), ekfac(model, CE, X, Y, basis=basis, **options).dense())
    whole = kfac(model, CE, X, Y, **options)
    assert torch.equal(
        ekfac(model, CE, X, Y, **options).dense(), ekfac(model, CE, X, Y, basis=whole, **options).dense()
    )
    assert merged.samples == len(X) and basis.blocks["5.weight"].moments is None  # which is left as it was


def test_what_was_drawn_stays_that_of_its_batch() -> None:
    model = net()
    seeds = [torch.Generator().manual_seed(n) for n in range(len(BATCHES))]
    parts = [kfac(model, CE, x, y, generator=seed) for (x, y), seed in zip(BATCHES, seeds, strict=True)]
    gradients = sum(len(x) * part.blocks["5.weight"].gradients for (x, _), part in zip(BATCHES, parts, strict=True))
    assert same(merge(parts).blocks["5.weight"].gradients, gradients / len(X))


def test_a_change_of_parameters_is_noticed() -> None:
    model = net()
    merged = merge(ggn(model, CE, x, y) for x, y in BATCHES)
    v = torch.ones(merged.shape[0], dtype=torch.float64)
    assert bool(torch.isfinite(merged @ v).all())
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(PersampleError, match="changed since"):
        merged @ v


def test_what_cannot_be_merged_is_refused() -> None:
    model = net()
    part = partial(kfac, model, CE, type="empirical")
    x, y = BATCHES[0]
    with pytest.raises(PersampleError, match=r"for x, y in loader\); got list"):
        merge([])
    with pytest.raises(PersampleError, match="got a Tensor first"):
        merge([x])
    with pytest.raises(PersampleError, match=r"for x, y in loader\); got Kronecker"):
        merge(part(x, y))  # type: ignore[arg-type]
    for other in (ggn(model, CE, x, y), part(x, y, reduction="sum"), part(x, y, params="5"), kfac(model, CE, x, y), 1):
        with pytest.raises(PersampleError, match="of one kind, with one reduction and of the same parameters"):
            merge([part(x, y), other])
    with pytest.raises(PersampleError, match="of one kind"):
        merge([ggn(model, CE, x, y), hvp(model, CE, x, y)])
    with pytest.raises(KroneckerError, match=r"basis= to ekfac"):
        merge(ekfac(model, CE, x, y) for x, y in BATCHES)
    with pytest.raises(KroneckerError, match=r"'0.weight' is in another block .* joined .* apart"):
        merge(part(x, y, bias=bias) for bias in ("joined", "apart"))
    with pytest.raises(PersampleError, match=r"basis= takes Kronecker factors .* got Operator"):
        ekfac(model, CE, x, y, basis=ggn(model, CE, x, y))
    with pytest.raises(KroneckerError, match=r"no block for '5.weight' as it is here, with bias='apart'"):
        ekfac(model, CE, x, y, basis=part(x, y), bias="apart")
    with pytest.raises(KroneckerError, match=r"basis= is about parameter '0.weight', .* isn't among its parameters"):
        ekfac(model, CE, x, y, basis=part(x, y), params="5")


def test_a_layer_of_some_batches_only_is_refused() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.both else self.a(x)

    model = Sometimes().double()
    first = kfac(model, CE, X[:, :, 0], Y, type="empirical")
    model.both = False
    second = kfac(model, CE, X[:, :, 0], Y, type="empirical")
    with pytest.raises(PersampleError, match=r"of the same parameters"):
        merge([first, second])
    with pytest.raises(KroneckerError, match=r"basis= is about parameter 'b.weight', .* no loss depends on it"):
        ekfac(model, CE, X[:, :, 0], Y, basis=first)


def test_a_layer_without_tokens_in_a_batch_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 2), nn.Linear(3, 3)
            self.twice = False

        def forward(self, x: Tensor) -> Tensor:
            again = nn.functional.conv1d(x, self.a.weight, self.a.bias, stride=2).mean(2) if self.twice else 0
            return self.b(self.a(x).mean(2) + again)

    model = Twice().double()
    basis = kfac(model, CE, X, Y, type="empirical")
    model.twice = True
    with pytest.raises(KroneckerError, match=r"basis= is about parameter 'a.weight', .* no factored form in common"):
        ekfac(model, CE, X, Y, basis=basis)
