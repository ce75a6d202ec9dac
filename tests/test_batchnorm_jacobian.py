"""One BatchNorm layer: every formula against autograd and dense matrices of an independently written normalisation."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian as autograd_jacobian

from persample.batchnorm import BatchNormJacobian, jacobian, linearize, uses_batch_statistics
from persample.errors import BatchNormError

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(1, -1, *[1] * (x.ndim - 2))


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Tensor) -> Tensor:
    """The definition, group by group; nothing is shared with the library."""
    y, dims = torch.zeros_like(x), (0, *range(2, x.ndim))
    for g in group.unique():
        part = x[group == g]
        mean, var = part.mean(dims, keepdim=True), part.var(dims, correction=0, keepdim=True)
        y = y.index_put((torch.nonzero(group == g)[:, 0],), (part - mean) / (var + eps).sqrt())
    y = y if weight is None else y * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, x)


@dataclass(frozen=True)
class Case:
    x: Tensor
    bn: nn.modules.batchnorm._BatchNorm
    group: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.bn.weight, self.bn.bias, self.bn.eps, self.group)

    @cached_property
    def J(self) -> BatchNormJacobian:
        return jacobian(self.bn, self.x, groups=self.group)

    @cached_property
    def blocks(self) -> Tensor:
        """``[C, N, P, N, P]`` by autograd, having checked that the channels do not mix."""
        (N, C), P = self.x.shape[:2], self.x[0, 0].numel()
        full = autograd_jacobian(self.forward, self.x).detach().reshape(N, C, P, N, C, P)
        for c, d in permutations(range(C), 2):
            assert float(full[:, c, :, :, d].abs().max()) == 0
        return torch.stack([full[:, c, :, :, c] for c in range(C)])

    @property
    def dense(self) -> Tensor:
        """``[C, M, M]``."""
        return self.blocks.flatten(3).flatten(1, 2)


def make(shape: tuple[int, ...], affine: bool = True, eps: float = 1e-3, groups: int = 1, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.7 + 0.6
    bn = KINDS[len(shape)](shape[1], eps=eps, affine=affine, dtype=torch.float64)
    if affine:
        nn.init.normal_(bn.weight, 0.3, 1.3, generator=generator)
        nn.init.normal_(bn.bias, generator=generator)
    return Case(x, bn, torch.arange(shape[0]) % groups)  # interleaved: a group need not be consecutive


def channel(values: list[float], eps: float = 0.0) -> BatchNormJacobian:
    return linearize(torch.tensor(values, dtype=torch.float64)[:, None], None, None, eps)


def like(x: Tensor, *several: int, seed: int = 1) -> Tensor:
    return torch.randn(*several, *x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def by_channel(v: Tensor) -> Tensor:
    """``[..., N, C, *S]`` of a case without leading dimensions as ``[C, M]``."""
    return v.reshape(*v.shape[:2], -1).movedim(1, 0).flatten(1)


SHAPES = [(6, 3), (5, 2, 3), (4, 2, 2, 2), (4, 1, 2, 1, 3)]
OPTIONS = [(True, 1e-3, 1), (False, 0.3, 1), (True, 0.0, 1), (True, 1e-2, 2), (False, 0.0, 2)]


@pytest.fixture(
    params=product(SHAPES, OPTIONS), ids=lambda p: f"{p[0]} affine={p[1][0]} eps={p[1][1]} groups={p[1][2]}"
)
def case(request: pytest.FixtureRequest) -> Case:
    shape, options = request.param
    return make(shape, *options)


# -- a linear operator


def test_dense_and_output_are_those_of_autograd(case: Case) -> None:
    close(case.J.dense(), case.dense, 1e-12)
    close(case.J.output, case.forward(case.x).detach(), 1e-12)


def test_products(case: Case) -> None:
    J, v, several = case.J, like(case.x), like(case.x, 2, 3)
    assert (J @ v).shape == v.shape and (J @ several).shape == several.shape
    close(by_channel(J @ v), (case.dense @ by_channel(v)[..., None])[..., 0], 1e-12)
    close(J.T @ v, torch.autograd.grad(case.forward(x := case.x.clone().requires_grad_()), x, v)[0], 1e-12)
    for index in product(range(2), range(3)):
        close((J @ several)[index], J @ several[index], 1e-13)


def test_agrees_with_torch_forward_and_backward() -> None:
    case = make((5, 2, 3))
    x = case.x.clone().requires_grad_()
    y = case.bn(x)
    close(case.J.output, y.detach(), 1e-12)
    close(case.J @ like(x), torch.autograd.grad(y, x, like(x))[0], 1e-12)


def test_diagonal_and_blocks(case: Case) -> None:
    J, N = case.J, len(case.x)
    close(by_channel(J.diagonal()), case.dense.diagonal(dim1=1, dim2=2), 1e-12)
    for n, m in product(range(N), repeat=2):
        close(J.block(n, m), case.blocks[:, n, :, m], 1e-12)
    close(J.block(-1, N - 1), J.block(N - 1, N - 1), 0)
    with pytest.raises(IndexError):
        J.block(0, N)


def test_block_norms(case: Case) -> None:
    expected = case.blocks.square().sum((2, 4))
    close(case.J.block_norms(per_channel=True), expected.sqrt(), 1e-12)
    close(case.J.block_norms(), expected.sum(0).sqrt(), 1e-12)
    diagonal = expected.diagonal(dim1=1, dim2=2).sum(1)
    close(case.J.coupling_share(), 1 - diagonal / expected.sum((1, 2)), 1e-12)


def test_different_groups_are_not_coupled_at_all(case: Case) -> None:
    apart = case.group[:, None] != case.group
    assert (case.J.block_norms()[apart] == 0).all()
    assert (case.J.block_norms()[~apart] > 0).all()
    for n, m in apart.nonzero().tolist():
        assert (case.J.block(n, m) == 0).all()


def test_off_diagonal_energy_without_positions() -> None:
    case = make((9, 2), affine=False, eps=0.1)
    J, M = case.J, 9
    rho, s, xh = 1 - J.shrinkage[0], J.deviation[0], J.normed
    squares = J.block_norms(per_channel=True).square() * s.square()[:, None, None]
    off = squares - torch.diag_embed(squares.diagonal(dim1=1, dim2=2))
    rows = (1 + rho * xh**2) / M - (1 + xh**2) ** 2 / M**2
    close(off.sum(2), rows.T, 1e-12)
    close(off.sum((1, 2)), 1 + rho**2 - (1 + 2 * rho + (xh**4).mean(0)) / M, 1e-12)
    close(J.coupling_share(), off.sum((1, 2)) / squares.sum((1, 2)), 1e-12)


@pytest.mark.parametrize(("M", "share"), [(32, 0.0605), (128, 0.0155), (1024, 0.00195)])
def test_coupling_share_falls_as_two_over_the_batch(M: int, share: float) -> None:
    x = torch.randn(M, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(linearize(x, None, None, 0.0).coupling_share().mean()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "groups", "share"), [((2, 4), None, 0.5), ((6, 4), 3, 0.5), ((1, 4, 2), None, 0.0), ((3, 4, 2), 3, 0.0)]
)
def test_coupling_share_of_pairs(shape: tuple[int, ...], groups: int | None, share: float, dtype: torch.dtype) -> None:
    """``J`` of two values is ``c [[1, -1], [-1, 1]]``, a small difference of what is nearly equal."""
    x, bn = make(shape).x, KINDS[len(shape)](4).double()
    blocks = jacobian(bn, x, groups=groups).block_norms(per_channel=True).square()
    off = 1 - blocks.diagonal(dim1=1, dim2=2).sum(1) / blocks.sum((1, 2))
    close(off, torch.full((4,), share, dtype=torch.float64), 1e-6)
    J = jacobian(bn.to(dtype), x.to(dtype), groups=groups)
    close(J.coupling_share(), torch.full((4,), share, dtype=dtype), 1e-6)
    assert f"between samples: {share:.0%}".replace("%", " %") in repr(J)


def test_coupling_share_of_pairs_beside_larger_groups_and_without_any_weight() -> None:
    case = make((5, 3), eps=1e-2)
    J = jacobian(case.bn, case.x, groups=torch.tensor([0, 1, 1, 0, 1]))
    squares = J.block_norms(per_channel=True).square()
    close(J.coupling_share(), 1 - squares.diagonal(dim1=1, dim2=2).sum(1) / squares.sum((1, 2)), 1e-10)
    pair = nn.BatchNorm1d(2).double()
    nn.init.zeros_(pair.weight)
    assert jacobian(pair, case.x[:2, :2]).coupling_share().isnan().all()
    assert jacobian(pair.eval(), case.x[:2, :2]).coupling_share().isnan().all()
    nn.init.ones_(pair.weight)
    assert jacobian(pair, case.x[:2, :2]).coupling_share().max() == 0


def test_cross_blocks_have_rank_two() -> None:
    block = make((3, 2, 6), eps=0.1).J.block(0, 2)
    assert (torch.linalg.matrix_rank(block) == 2).all()


def test_norms_that_vanish_are_zero() -> None:
    J = linearize(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64), None, None, 0.0)
    assert float(J.block_norms()[0, 1]) == 0  # 1 + xh_0 xh_1 = 0
    alone = linearize(torch.tensor([[[0.3, 2.0]]], dtype=torch.float64), None, None, 0.0)
    assert float(alone.block_norms()) < 1e-15  # two values and no eps: J = 0


@pytest.mark.parametrize("cached", [1, 13, 40])
def test_block_norms_do_not_depend_on_how_they_are_blocked(monkeypatch: pytest.MonkeyPatch, cached: int) -> None:
    J = make((5, 2, 3), groups=2).J
    expected = J.block_norms(), J.block_norms(per_channel=True)
    monkeypatch.setattr("persample.batchnorm.operator.CACHED", cached)
    close(J.block_norms(), expected[0], 1e-15)
    close(J.block_norms(per_channel=True), expected[1], 1e-15)


def test_scipy(case: Case) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator, size = case.J.to_scipy(), case.x.numel()
    full = autograd_jacobian(case.forward, case.x).detach().reshape(size, size)
    v = like(case.x).flatten().numpy()
    assert operator.shape == full.shape and operator.dtype == np.float64
    np.testing.assert_allclose(operator @ v, full.numpy() @ v, atol=1e-12)
    np.testing.assert_allclose(operator.T @ v, full.T.numpy() @ v, atol=1e-12)
    np.testing.assert_allclose(operator @ np.eye(size), full.numpy(), atol=1e-12)
    assert linalg.svds(operator, 1, return_singular_vectors=False, random_state=0)[0] == pytest.approx(
        float(torch.linalg.matrix_norm(full, 2))
    )


def test_extras_are_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    J = make((6, 3)).J
    for name in ("scipy.sparse.linalg", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs scipy"):
        J.to_scipy()
    with pytest.raises(ImportError, match="need matplotlib"):
        J.plot()


# -- spectrum, pseudo-inverse


def test_spectrum(case: Case) -> None:
    J, dense = case.J, case.dense
    spectrum = J.eigenvalues()
    assert int(spectrum.multiplicity.sum()) == dense.shape[1] and (spectrum.multiplicity > 0).all()
    close(spectrum.expand(), torch.linalg.eigvalsh(dense), 1e-12)
    assert torch.equal(J.rank(), torch.linalg.matrix_rank(dense, hermitian=True))
    close(J.trace(), dense.diagonal(dim1=1, dim2=2).sum(1), 1e-12)
    close(J.frobenius_norm(), torch.linalg.matrix_norm(dense), 1e-12)
    assert (J.determinant() == 0).all()
    close(spectrum.values.abs().amax(1), torch.linalg.matrix_norm(dense, 2), 1e-12)


def test_spectrum_formulas() -> None:
    J = make((7, 3), eps=0.2).J
    scale, shrinkage = J.scale[0], J.shrinkage[0]
    close(1 - shrinkage, J.normed.square().mean(0), 1e-12)
    close(J.trace(), scale * (5 + shrinkage), 1e-12)
    close(J.frobenius_norm(), scale.abs() * (5 + shrinkage**2).sqrt(), 1e-12)
    a, b = torch.randn(2, 3, dtype=torch.float64)
    close(J @ (a + b * J.normed), b * scale * shrinkage * J.normed, 1e-12)


def test_pinv(case: Case) -> None:
    J, v = case.J, like(case.x)
    expected = torch.linalg.pinv(case.dense, hermitian=True)
    close(J.pinv().dense(), expected)
    close(by_channel(J.pinv() @ v), (expected @ by_channel(v)[..., None])[..., 0])
    close(J.pinv().T @ v, J.pinv() @ v, 0)
    close(J @ (J.pinv() @ (J @ v)), J @ v)
    close(J.pinv() @ (J @ (J.pinv() @ v)), J.pinv() @ v)
    blocks = expected.reshape(case.blocks.shape).square().sum((2, 4))
    close(J.pinv().block_norms(per_channel=True), blocks.sqrt())
    close(by_channel(J.pinv().diagonal()), expected.diagonal(dim1=1, dim2=2))
    close(J.pinv().block(1, 3), expected.reshape(case.blocks.shape)[:, 1, :, 3])


def test_solve_is_least_squares_of_least_norm(case: Case) -> None:
    v = like(case.x)
    expected = torch.linalg.lstsq(case.dense, by_channel(v)[..., None], driver="gelsd").solution[..., 0]
    close(by_channel(case.J.solve(v)), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.3])
def test_gradient_norm_with_eps(shape: tuple[int, ...], eps: float) -> None:
    case = make(shape, eps=eps)
    J, g = case.J, like(case.x)
    gc, xh, M = by_channel(g), by_channel(J.normed), case.x.numel() // case.x.shape[1]
    inner = gc.sum(1) ** 2 / M + (1 + J.shrinkage[0]) * (gc * xh).sum(1) ** 2 / M  # 2 - rho = 1 + shrinkage
    close(by_channel(J @ g).square().sum(1), J.scale[0] ** 2 * (gc.square().sum(1) - inner), 1e-11)


def test_leverage(case: Case) -> None:
    J, N, P = case.J, len(case.x), case.x[0, 0].numel()
    own = torch.stack([case.blocks[:, n, :, n].diagonal(dim1=1, dim2=2).sum(1) for n in range(N)])
    close(J.scale[case.group] * (P - J.leverage()), own, 1e-12)
    for g in case.group.unique():
        close(J.leverage()[case.group == g].sum(0), 2 - J.shrinkage[g], 1e-12)


def test_without_eps_it_is_the_residual_of_least_squares() -> None:
    case = make((8, 2), affine=False, eps=0.0)
    for c in range(2):
        design = torch.stack([torch.ones(8, dtype=torch.float64), case.x[:, c]], 1)
        hat = design @ torch.linalg.pinv(design)
        close(case.J.leverage()[:, c], hat.diagonal(), 1e-12)
        close(case.J.deviation[0, c] * case.J.dense()[c], torch.eye(8, dtype=torch.float64) - hat, 1e-12)
    assert (case.J.leverage() >= 1 / 8).all() and (case.J.leverage() <= 1).all()


# -- parameters and curvature


def test_parameter_jacobians(case: Case) -> None:
    J, group = case.J, case.group
    one = torch.ones(case.x.shape[1], dtype=torch.float64)
    own = torch.eye(len(one), dtype=torch.float64)

    def spread(values: Tensor) -> Tensor:  # [N, C, *S] as the full [N, C, *S, C] of autograd
        return values[..., None] * own.view(1, len(one), *[1] * (values.ndim - 2), len(one))

    weight = autograd_jacobian(lambda w: normalise(case.x, w, None, case.bn.eps, group), one)
    bias = autograd_jacobian(lambda b: normalise(case.x, None, b, case.bn.eps, group), one)
    if case.bn.weight is None:
        with pytest.raises(BatchNormError, match="no weight"):
            J.weight_jacobian()
        with pytest.raises(BatchNormError, match="no bias"):
            J.bias_jacobian()
    else:
        close(spread(J.weight_jacobian()), weight, 1e-12)
        close(spread(J.bias_jacobian()), bias, 1e-12)


def test_weight_without_bias() -> None:
    bn = nn.BatchNorm1d(3, bias=False, dtype=torch.float64)
    x = like(torch.empty(6, 3, dtype=torch.float64))
    J = jacobian(bn, x)
    close(J.weight_jacobian(), J.output, 1e-12)
    with pytest.raises(BatchNormError, match="no bias"):
        J.bias_jacobian()


def test_second_derivative(case: Case) -> None:
    u, v = like(case.x, seed=2), like(case.x, seed=3)

    def along(step: Tensor) -> Tensor:
        return torch.func.jvp(case.forward, (case.x + step * v,), (u,))[1]

    expected = torch.func.jvp(along, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))[1]
    close(case.J.second_derivative(u, v), expected.detach(), 1e-11)
    close(case.J.second_derivative(v, u), case.J.second_derivative(u, v), 1e-13)
    several = like(case.x, 3)
    close(case.J.second_derivative(several, v)[1], case.J.second_derivative(several[1], v), 1e-13)


def test_third_derivative_is_symmetric() -> None:
    case = make((4, 1, 2), affine=False, eps=0.2)
    basis = torch.eye(8, dtype=torch.float64).reshape(8, 4, 1, 2)
    J = case.J
    tensor = torch.stack([J.second_derivative(basis, e) for e in basis]).reshape(8, 8, 8)
    assert float(tensor.abs().max()) > 0.01
    for order in permutations(range(3)):
        close(tensor.permute(order), tensor, 1e-13)
    directions = J.dense()[0]  # the formula, index by index
    xh = J.normed.flatten()
    cyclic = torch.einsum("i,jk->ijk", xh, directions)
    cyclic = cyclic + cyclic.permute(1, 0, 2) + cyclic.permute(1, 2, 0)
    close(tensor, -cyclic / (8 * float(J.deviation)), 1e-13)


def test_it_is_the_hessian_of_a_convex_function() -> None:
    case = make((6, 1), affine=False, eps=0.2)

    def phi(x: Tensor) -> Tensor:
        return 6 * (x.var(correction=0) + 0.2).sqrt()

    x = case.x[:, 0]
    close(case.J.normed[:, 0], torch.func.grad(phi)(x), 1e-12)
    close(case.J.dense()[0], torch.func.hessian(phi)(x), 1e-12)
    assert float(case.J.eigenvalues().values.min()) >= 0


# -- other batches, other modes


def test_leave_one_out(case: Case) -> None:
    J, loo, dims = case.J, case.J.leave_one_out(), (0, *range(2, case.x.ndim))
    for n in range(len(case.x)):
        member = case.group == case.group[n]
        others = member.clone()
        others[n] = False
        mean, var = case.x[others].mean(dims), case.x[others].var(dims, correction=0)
        close(loo.mean[n], mean, 1e-12)
        close(loo.variance[n], var, 1e-12)
        normed = (case.x - per_channel(mean, case.x)) / per_channel((var + case.bn.eps).sqrt(), case.x)
        expected = torch.where(member.view(-1, *[1] * (case.x.ndim - 1)), J.affine(normed), case.forward(case.x))
        close(loo.outputs(n), expected.detach())
        close(loo.own_outputs()[n], expected[n].detach())


@pytest.mark.parametrize(("outlier", "dtype", "tolerance"), [(1e7, torch.float64, 1e-6), (1e3, torch.float32, 1e-3)])
def test_leaving_out_an_outlier_does_not_cancel(outlier: float, dtype: torch.dtype, tolerance: float) -> None:
    x = like(torch.empty(8, 2, 3, dtype=torch.float64))
    x[3, 1] += outlier
    rest = torch.cat([x[:3], x[4:]])
    loo = linearize(x.to(dtype), None, None, 1e-5).leave_one_out()
    torch.testing.assert_close(loo.variance[3].double(), rest.var((0, 2), correction=0), rtol=tolerance, atol=0)


def test_leave_one_out_needs_others() -> None:
    J = jacobian(nn.BatchNorm1d(2, dtype=torch.float64), like(torch.empty(2, 2, 4, dtype=torch.float64)), groups=2)
    with pytest.raises(BatchNormError, match="two samples in every group"):
        J.leave_one_out()


def test_sample_weight_derivatives(case: Case) -> None:
    derivatives, group = case.J.sample_weight_derivatives(), case.group
    dims = (0, *range(2, case.x.ndim))

    def weighted(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of every group, ``[G, C]``, and the outputs, when sample ``n`` has the weight ``w_n``."""
        w = weight.view(-1, *[1] * (case.x.ndim - 1)).expand_as(case.x)
        y, means, variances = torch.zeros_like(case.x), [], []
        for g in group.unique():
            x, wg = case.x[group == g], w[group == g]
            mean = (wg * x).sum(dims) / wg.sum(dims)
            var = (wg * (x - per_channel(mean, x)) ** 2).sum(dims) / wg.sum(dims)
            normed = (x - per_channel(mean, x)) / per_channel((var + case.bn.eps).sqrt(), x)
            y = y.index_put((torch.nonzero(group == g)[:, 0],), normed)
            means.append(mean)
            variances.append(var)
        return torch.stack(means), torch.stack(variances), case.J.affine(y)

    mean, variance, output = autograd_jacobian(weighted, torch.ones(len(case.x), dtype=torch.float64))
    for n in range(len(case.x)):
        close(derivatives.mean[n], mean[group[n], :, n], 1e-12)
        close(derivatives.variance[n], variance[group[n], :, n], 1e-12)
        close(derivatives.outputs(n), output[..., n], 1e-12)


def test_leaving_out_is_a_change_of_weight_to_first_order() -> None:
    errors = []
    for N in (50, 500):
        J = make((N, 2)).J
        change = J.leave_one_out().outputs(0) - J.output
        errors.append(float((change + J.sample_weight_derivatives().outputs(0)).norm() / change.norm()))
    assert errors[0] < 0.1 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_gap_to_evaluation_mode(shape: tuple[int, ...], affine: bool) -> None:
    case = make(shape, affine)
    J, M = case.J, case.x.numel() // case.x.shape[1]
    for momentum, arguments in [(1.0, False), (0.3, True)]:
        case.bn.train().momentum = momentum
        case.bn.reset_running_stats()
        train = case.bn(case.x).detach()
        evaluated = case.bn.eval()(case.x).detach()
        gap = J.train_eval_gap(case.bn.running_mean, case.bn.running_var) if arguments else J.train_eval_gap()
        close(gap.output, evaluated - train)
        close(gap.scale[0], ((J.variance[0] + J.eps) / (case.bn.running_var + J.eps)).sqrt())
        normed = per_channel(gap.scale[0], case.x) * J.normed + per_channel(gap.shift[0], case.x)
        close(J.affine(normed), evaluated)
    close(J.train_eval_gap().scale, ((J.variance + J.eps) / (J.variance * M / (M - 1) + J.eps)).sqrt(), 1e-13)
    assert float(J.train_eval_gap().shift.abs().max()) == 0


# -- exact values


def test_four_values_exactly() -> None:
    J = channel([1, 2, 3, 4])
    expected = [[0.3, -0.4, -0.1, 0.2], [-0.4, 0.7, -0.2, -0.1], [-0.1, -0.2, 0.7, -0.4], [0.2, -0.1, -0.4, 0.3]]
    close(1.25**0.5 * J.dense()[0], torch.tensor(expected, dtype=torch.float64), 1e-15)
    close(J.leverage()[:, 0], torch.tensor([0.7, 0.3, 0.3, 0.7], dtype=torch.float64), 1e-15)
    assert J.rank().tolist() == [2]


def test_two_values() -> None:
    J = channel([0.3, 1.7], eps=0.1)
    variance = 0.49
    dead = 0.1 / (2 * (variance + 0.1) ** 1.5) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    close(J.dense()[0], dead, 1e-14)
    close(J.output[:, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64) * (variance / (variance + 0.1)) ** 0.5, 1e-14)
    assert J.eigenvalues().values.shape == (1, 2)  # "scale" does not occur
    close(J.eigenvalues().expand(), torch.linalg.eigvalsh(dead)[None], 1e-14)
    assert channel([0.3, 1.7]).rank().tolist() == [0]
    close(channel([0.3, 1.7]).pinv().dense(), torch.zeros(1, 2, 2, dtype=torch.float64), 1e-14)


def test_a_lone_outlier() -> None:
    J = channel([5.0, *[1.0] * 6])
    assert float(J.normed[0]) == pytest.approx(2.449489742783178, abs=1e-14)
    assert float(J.diagonal()[0]) == pytest.approx(0, abs=1e-15)
    assert float(J.block_norms()[0, 0]) == pytest.approx(0, abs=1e-15)
    assert float(J.leverage()[0]) == pytest.approx(1, abs=1e-15)


# -- modes


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_mode_is_diagonal(shape: tuple[int, ...]) -> None:
    case = make(shape, eps=0.1)
    case.bn.running_mean.normal_()
    case.bn.running_var.uniform_(0.5, 2)
    bn, x = case.bn.eval(), case.x
    J, N, C, M = jacobian(bn, x, groups=case.group), shape[0], shape[1], x.numel() // shape[1]
    assert not J.coupled
    close(J.output, bn(x).detach(), 1e-12)
    blocks = autograd_jacobian(bn, x).detach().reshape(N, C, -1, N, C, M // N)
    for c in range(C):
        close(J.dense()[c], blocks[:, c, :, :, c].reshape(M, M), 1e-12)
    v = like(x)
    close(J @ v, torch.func.jvp(bn, (x,), (v,))[1].detach(), 1e-12)
    norms = J.block_norms()
    assert (norms[~torch.eye(N, dtype=torch.bool)] == 0).all()
    close(norms.diagonal(), (J.scale.square().sum() * (M // N)).sqrt().expand(N), 1e-12)
    assert (J.block(0, 1) == 0).all()
    assert (J.coupling_share() == 0).all() and (J.leverage() == 0).all()
    close(J.eigenvalues().expand(), J.scale[0][:, None].expand(C, M), 0)
    assert J.rank().tolist() == [M] * C
    close(J.determinant(), torch.linalg.det(J.dense()))
    close(J.trace(), M * J.scale[0])
    close(J.frobenius_norm(), M**0.5 * J.scale[0].abs())
    close(J.solve(J @ v), v, 1e-12)
    assert (J.second_derivative(v, v) == 0).all()
    loo, derivatives = J.leave_one_out(), J.sample_weight_derivatives()
    close(loo.outputs(1), J.output, 1e-14)
    close(loo.mean, bn.running_mean.expand(N, C), 0)
    assert (derivatives.mean == 0).all() and (derivatives.variance == 0).all() and (derivatives.outputs(0) == 0).all()
    with pytest.raises(BatchNormError, match="evaluation mode"):
        J.train_eval_gap()


def test_running_statistics_of_another_layer_are_refused() -> None:
    J = jacobian(nn.BatchNorm1d(3), torch.randn(5, 3))
    for mean in (torch.zeros(1), torch.zeros(2), 0.0):  # one number would do for all channels unseen
        with pytest.raises(BatchNormError, match=r"running_mean must be a tensor \[3\]"):
            J.train_eval_gap(mean, torch.ones(3))


def test_evaluation_without_running_statistics_couples() -> None:
    bn = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64).eval()
    x = like(torch.empty(5, 3, dtype=torch.float64))
    assert uses_batch_statistics(bn) and jacobian(bn, x).coupled
    full = autograd_jacobian(bn, x).detach()
    close(jacobian(bn, x).dense(), torch.stack([full[:, c, :, c] for c in range(3)]), 1e-12)


def test_training_without_tracking_keeps_to_the_batch() -> None:
    bn = nn.BatchNorm1d(3, dtype=torch.float64)
    bn.track_running_stats = False  # the buffers stay
    assert jacobian(bn.train(), like(torch.empty(5, 3, dtype=torch.float64))).coupled
    assert not jacobian(bn.eval(), like(torch.empty(5, 3, dtype=torch.float64))).coupled
    bn.running_var = None
    with pytest.raises(BatchNormError, match="only one of running_mean and running_var"):
        jacobian(bn, like(torch.empty(5, 3, dtype=torch.float64)))


def test_the_layer_is_only_read() -> None:
    case = make((6, 3))
    before = {k: v.clone() for k, v in case.bn.state_dict().items()}
    x = case.x.clone().requires_grad_()
    J = jacobian(case.bn, x)
    assert all(torch.equal(v, before[k]) for k, v in case.bn.state_dict().items())
    assert not (J @ like(x)).requires_grad and not J.output.requires_grad
    with torch.no_grad():
        case.bn.weight.zero_()
    assert (J.scale != 0).all()  # a later change of the layer does not reach it
    assert x.grad is None and case.bn.weight.grad is None


def test_groups_by_number_and_by_label() -> None:
    case = make((6, 3))
    consecutive = jacobian(case.bn, case.x, groups=2)
    close(consecutive.dense(), Case(case.x, case.bn, torch.tensor([0, 0, 0, 1, 1, 1])).dense, 1e-12)
    any_labels = jacobian(case.bn, case.x, groups=torch.tensor([7, 7, 7, -2, -2, -2]))
    close(any_labels.dense(), consecutive.dense(), 0)
    assert consecutive.mean.shape == (2, 3)
    for groups in (4, 0):
        with pytest.raises(BatchNormError, match=f"groups={groups} does not divide the batch of 6"):
            jacobian(case.bn, case.x, groups=groups)
    with pytest.raises(BatchNormError, match="one label per sample"):
        jacobian(case.bn, case.x, groups=torch.zeros(5, dtype=torch.int64))


def test_groups_of_different_sizes() -> None:
    case = Case(make((7, 2, 2)).x, make((7, 2, 2)).bn, torch.tensor([0, 1, 1, 2, 1, 2, 2]))
    J, dense, v = case.J, case.dense, like(case.x)
    close(J.dense(), dense, 1e-12)
    close(J.eigenvalues().expand(), torch.linalg.eigvalsh(dense), 1e-12)
    close(J.block_norms(per_channel=True), case.blocks.square().sum((2, 4)).sqrt(), 1e-12)
    close(J.pinv().dense(), torch.linalg.pinv(dense, hermitian=True))
    close(by_channel(J @ v), (dense @ by_channel(v)[..., None])[..., 0], 1e-12)


# -- edges


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_zero_weight(eps: float) -> None:
    case = make((5, 2), eps=eps)
    with torch.no_grad():
        case.bn.weight[1] = 0
    J = case.J
    assert J.rank()[1] == 0 and J.trace()[1] == 0 and J.coupling_share()[1].isnan()
    assert (J.dense()[1] == 0).all() and (J.pinv().dense()[1] == 0).all()
    close(J.pinv().dense(), torch.linalg.pinv(case.dense, hermitian=True))
    close(J.weight_jacobian(), J.normed, 0)
    assert J.second_derivative(case.x, case.x)[:, 1].abs().max() == 0
    assert "samples: 5" in repr(J)


def test_constant_channel() -> None:
    x = make((5, 2)).x
    x[:, 1] = 3.0
    case = Case(x, make((5, 2), eps=0.1).bn, torch.zeros(5, dtype=torch.int64))
    close(case.J.dense(), case.dense, 1e-12)
    close(case.J.eigenvalues().expand(), torch.linalg.eigvalsh(case.dense), 1e-12)
    close(case.J.pinv().dense(), torch.linalg.pinv(case.dense, hermitian=True))
    assert case.J.rank().tolist() == [4, 4]
    with pytest.raises(BatchNormError, match="channel 1 has variance 0 and eps is 0"):
        linearize(x, None, None, 0.0)


def test_one_value_per_channel() -> None:
    bn = nn.BatchNorm1d(3)
    with pytest.raises(ValueError) as torchs:
        bn(torch.randn(1, 3))
    with pytest.raises(BatchNormError, match=r"without values has no Jacobian; got \(0, 3\)"):
        jacobian(bn, torch.randn(0, 3))
    with pytest.raises(BatchNormError) as ours:
        jacobian(bn, torch.randn(1, 3))
    assert str(ours.value).startswith(str(torchs.value))
    with pytest.raises(BatchNormError, match=r"in every group \(groups have \[1, 1\] samples\)"):
        jacobian(bn, torch.randn(2, 3), groups=2)
    assert jacobian(bn, torch.randn(1, 3, 2)).rank().tolist() == [1] * 3
    assert jacobian(bn.eval(), torch.randn(1, 3)).rank().tolist() == [1] * 3


def test_other_inputs_are_refused() -> None:
    bn = nn.BatchNorm2d(3)
    with pytest.raises(BatchNormError, match="expected 4D input"):
        jacobian(bn, torch.randn(4, 3))
    with pytest.raises(BatchNormError, match="has 3 channels"):
        jacobian(bn, torch.randn(4, 2, 5, 5))
    with pytest.raises(BatchNormError, match="takes a BatchNorm layer, got GroupNorm"):
        jacobian(nn.GroupNorm(1, 3), torch.randn(4, 3))
    for v in (torch.randn(6, 2), torch.randn(3), torch.randn(6, 3, 1)):
        with pytest.raises(BatchNormError, match=r"the shape of the layer's input, \(6, 3\)"):
            make((6, 3)).J @ v


class Scaled(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.BatchNorm1d):
    pass


def test_subclasses_with_their_own_forward_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(BatchNormError, match="Scaled is a BatchNorm with a forward of its own"):
        jacobian(Scaled(3), x)
    close(jacobian(Renamed(3), x).dense(), jacobian(nn.BatchNorm1d(3), x).dense(), 0)


def test_sync_batchnorm_in_one_process_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bn = torch.randn(4, 3), nn.SyncBatchNorm(3)
    close(jacobian(bn, x).dense(), jacobian(nn.BatchNorm1d(3), x).dense(), 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(BatchNormError, match="statistics of all processes"):
        jacobian(bn, x)
    assert not jacobian(bn.eval(), x).coupled


def test_parametrised_weight() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    x, bn = torch.randn(4, 3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    plain = jacobian(bn, x).dense()
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", Double())
    close(jacobian(bn, x).dense(), 2 * plain, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3, 4).to(dtype)
    J = jacobian(nn.BatchNorm1d(3), x)
    assert J.normed.dtype == torch.float32
    torch.testing.assert_close(J.dense(), jacobian(nn.BatchNorm1d(3), x.float()).dense())
    assert (J @ x).dtype == torch.float32


def test_channels_last_and_strided_inputs() -> None:
    case = make((4, 2, 2, 2))
    expected = case.J.block_norms()
    for x in (
        case.x.contiguous(memory_format=torch.channels_last),
        case.x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not x.is_contiguous()
        close(jacobian(case.bn, x).block_norms(), expected, 1e-14)
        close(jacobian(case.bn, x) @ x, case.J @ case.x, 1e-13)


def test_large_mean_in_float32() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = (x + 1000).float()
    J, exact = (linearize(t, None, None, 1e-3) for t in (shifted, shifted.double()))
    torch.testing.assert_close(J.scale.double(), exact.scale, rtol=1e-5, atol=0)


def test_a_large_batch_never_becomes_dense() -> None:
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # dense: 640 GB
    J = linearize(x, None, None, 1e-5, group=torch.arange(200_000) % 3)
    v = like(x)
    close(J @ J.solve(J @ v), J @ v, 1e-8)
    assert J.rank().tolist() == [200_000 - 3] * 2
    assert float(J.leverage().sum(0).max()) == pytest.approx(6, rel=1e-4)
    assert J.leave_one_out().mean.shape == J.sample_weight_derivatives().variance.shape == (200_000, 2)
    assert "% of |J|^2" in J._repr_html_()


def test_pickle() -> None:
    J = make((6, 3)).J
    close(pickle.loads(pickle.dumps(J)).dense(), J.dense(), 0)


# -- to be looked at


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    J = make((6, 3)).J
    for axes in (J.plot(diagonal=True), J.plot(plt.subplots()[1], diagonal=True)):
        shown = torch.as_tensor(np.asarray(axes.images[0].get_array()))
        close(shown, J.block_norms(), 0)
        assert axes.get_xlabel() == "input of sample m"
    hidden = np.ma.filled(J.plot().images[0].get_array(), np.nan)
    assert np.isnan(hidden.diagonal()).all() and np.isfinite(hidden).sum() == 30
    plt.close("all")


def test_text() -> None:
    J = make((4, 2, 2, 2), groups=2).J
    for text in (repr(J), J._repr_html_()):
        for part in ("samples", "2 x 2", "groups", "of the batch", "% of |J|^2"):
            assert part in text
    html = J._repr_html_()
    assert html.count("<table") == 1 and html.count("<tr>") == html.count("</tr>") == 1 + 2
    assert f"(sample {int(J.leverage()[:, 0].argmax())})" in html
    many = make((4, 20)).J._repr_html_()
    assert many.count("<tr>") == 1 + 8 and "8 channels with the largest" in many
    assert "samples are independent" in repr(jacobian(nn.BatchNorm1d(2).eval(), torch.randn(3, 2)))


# -- any shape


@st.composite
def cases(draw: st.DrawFn) -> Case:
    samples, space = draw(st.integers(2, 6)), draw(st.lists(st.integers(1, 3), max_size=3))
    if samples == 2 and all(size == 1 for size in space):
        samples = 3
    case = make(
        (samples, draw(st.integers(1, 3)), *space),
        affine=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-2, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )
    fewest = 2 if all(size == 1 for size in space) else 1
    group = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=samples, max_size=samples)))
    sizes = torch.bincount(group)
    return case if int(sizes[sizes > 0].min()) < fewest else Case(case.x, case.bn, group)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_shape_mode_and_grouping(case: Case) -> None:
    J, dense, v = case.J, case.dense, like(case.x)
    close(J.dense(), dense)
    close(by_channel(J @ v), (dense @ by_channel(v)[..., None])[..., 0])
    close(J.block_norms(per_channel=True).square(), case.blocks.square().sum((2, 4)))
    close(J.block_norms().square().sum(), J.frobenius_norm().square().sum())
    spectrum = J.eigenvalues()
    close(spectrum.expand(), torch.linalg.eigvalsh(dense))
    close(J @ J.solve(J @ v), J @ v, 1e-8)  # the condition number is up to 1e6
    close(J.leverage().sum(), (2 - J.shrinkage).sum())
