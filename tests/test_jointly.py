"""Functions that read some axes of a tensor as one thing, with samples on each of them: refused where samples meet,
exact where they don't.  Nothing is verified by the library; rows are compared here with ``N`` ordinary gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import persample

pytestmark = pytest.mark.filterwarnings("ignore:Using torch.cross without specifying:UserWarning")
N = 4


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SPD = draw(N, N) @ draw(N, N).mT + 5 * torch.eye(N, dtype=torch.float64)
TRIL = torch.linalg.cholesky(SPD)
LU, PIVOTS = torch.linalg.lu_factor(SPD)
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


class Acts(nn.Module):
    """A function of ``x * w``, moved so that the samples of ``x [N, *]`` are on ``axis``, and back from ``back``."""

    def __init__(self, act: Callable[[Tensor], Any], shape: torch.Size, axis: int, back: int | None) -> None:
        super().__init__()
        self.act, self.axis, self.back = act, axis, axis if back is None else back
        self.w = nn.Parameter(1 + 0.1 * draw(*shape))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act((x * self.w).movedim(0, self.axis))
        out = out if isinstance(out, Tensor) else out[0]
        return out.movedim(self.back, 0)


def losses(out: Tensor, _: Any) -> Tensor:
    out = out.flatten(1)
    return (out * (1 + torch.arange(out.shape[1], dtype=out.dtype))).sum(1).sin() + out.square().sum(1)


def square(x: Tensor) -> Tensor:
    """Symmetric and definite matrices in the last two axes, by sizes that are all the same."""
    return x + 5 * torch.eye(N, dtype=x.dtype)


def exported(x: Tensor, weight: Tensor) -> Tensor:
    """A padded convolution, as exported graphs have it."""
    return torch.ops.aten.convolution(x, weight, None, [1], [1], [1], False, [0], 1)


# What is done, the shape of a sample, and the axis on which the samples are (and are again in the output).
Case = tuple[Callable[[Tensor], Any], tuple[int, ...], int]
MEET: dict[str, Case] = {
    "cholesky": (lambda h: torch.linalg.cholesky(square(h)), (N,), 0),
    "cholesky, columns": (lambda h: torch.linalg.cholesky(square(h)), (3, N), 2),
    "inv": (lambda h: torch.linalg.inv(square(h)), (N,), 0),
    "inverse": (lambda h: square(h).inverse(), (N,), 1),
    "pinv": (torch.linalg.pinv, (N,), 0),
    "matrix_exp": (torch.matrix_exp, (N,), 0),
    "matrix_power": (lambda h: torch.linalg.matrix_power(h, 3), (N,), 0),
    "qr": (torch.linalg.qr, (3,), 0),
    "svd": (lambda h: h * torch.linalg.svdvals(h), (N,), 0),
    "eigh": (lambda h: h * torch.linalg.eigvalsh(h), (N,), 0),
    "lu": (lambda h: torch.linalg.lu(h)[1], (N,), 0),
    "householder": (lambda h: torch.linalg.householder_product(h, draw(N)), (N,), 0),
    "cov": (torch.cov, (3,), 0),
    "corrcoef": (torch.corrcoef, (3,), 0),
    "solve, matrix": (lambda h: torch.linalg.solve(square(h), draw(N, 3)), (N,), 0),
    "solve, rows": (lambda h: torch.linalg.solve(SPD, h), (3,), 0),
    "solve, a vector": (lambda h: torch.linalg.solve(SPD, h)[:, None], (), 0),
    "solve, left": (lambda h: torch.linalg.solve(SPD, h, left=False), (3,), 1),
    "solve_triangular": (lambda h: torch.linalg.solve_triangular(TRIL, h, upper=False), (3,), 0),
    "cholesky_solve": (lambda h: torch.cholesky_solve(h, TRIL), (3,), 0),
    "lu_solve": (lambda h: torch.linalg.lu_solve(LU, PIVOTS, h), (3,), 0),
    "lstsq": (lambda h: torch.linalg.lstsq(SPD, h), (3,), 0),
    "multi_dot": (lambda h: torch.linalg.multi_dot([SPD, h, draw(3, 3)]), (3,), 0),
    "multi_dot of two": (lambda h: torch.linalg.multi_dot([h, SPD, h.mT]), (N,), 0),
    "bilinear": (lambda h: F.bilinear(h, draw(N), draw(N, N, N))[:, None], (), 0),
    "diff": (lambda h: torch.diff(h, dim=0, append=draw(1, 3)), (3,), 0),
    "cross": (lambda h: h * torch.linalg.cross(h[:3], draw(3, N), dim=0).sum(), (N,), 0),
    "cross, the first axis of three": (lambda h: h * torch.cross(h[:3], draw(3, N)).sum(), (N,), 0),
    "cosine_similarity": (lambda h: F.cosine_similarity(h, draw(N, N), dim=0) * h, (N,), 0),
    "cumulative_trapezoid": (lambda h: F.pad(torch.cumulative_trapezoid(h, dim=0).mT, (1, 0)).mT, (3,), 0),
    "gradient": (torch.gradient, (3,), 0),
    "renorm_": (lambda h: h.renorm_(2, 1, 0.5), (3,), 0),
    "conv, along": (lambda h: F.conv1d(h, draw(2, 2, 3), padding=1), (5, 2), 2),
    "conv, channels": (lambda h: F.conv1d(h, draw(N, N, 1)), (3,), 0),
    "conv, a weight's channels": (lambda h: F.conv1d(draw(N, N, 5), h.movedim(0, 1)), (2, 1), 0),
    "conv, transposed": (lambda h: F.conv_transpose1d(h, draw(N, N, 1)), (3,), 0),
    "conv, as exported": (lambda h: exported(h, draw(2, 2, 3)), (5, 2), 2),
    "max_pool": (lambda h: F.max_pool1d(h, 3, 1, 1), (2,), 1),
    "max_pool, with places": (lambda h: F.max_pool1d(h, 3, 1, 1, return_indices=True), (2,), 1),
    "avg_pool": (lambda h: F.avg_pool2d(h, 3, 1, 1), (1, 2, 5), 2),
    "grid_sample": (lambda h: F.grid_sample(h, draw(2, 3, N, 2), align_corners=False), (2, 1, 3), 3),
    "pad, moved along": (lambda h: F.pad(h, (1, -1)), (3,), 1),
    "pad, circular": (lambda h: F.pad(h, (-1, 1), mode="circular"), (2, 3), 2),
    "attention, keys": (lambda h: F.scaled_dot_product_attention(draw(2, N, 3), h, draw(2, N, 3)), (2, 3), 1),
    "attention, values": (lambda h: F.scaled_dot_product_attention(draw(2, N, N), draw(2, N, N), h), (2, 3), 1),
    "attention, features": (lambda h: F.scaled_dot_product_attention(h, draw(2, 3, N), draw(2, 3, N)), (2, 3), 2),
    "einsum, with dots": (lambda h: torch.einsum("n...,nm->m...", h, SPD) * h, (3,), 0),
}  # fmt: skip
DONT: dict[str, Case] = {
    "cholesky": (lambda h: torch.linalg.cholesky(h @ h.mT + square(0 * h)), (N, N), 0),
    "inv": (lambda h: torch.linalg.inv(square(h)), (N, N), 0),
    "svd": (torch.linalg.svdvals, (N, N), 0),
    "householder": (lambda h: torch.linalg.householder_product(h, draw(N, N)), (N, N), 0),
    "solve, columns": (lambda h: torch.linalg.solve(SPD, h), (N,), 1),
    "solve, vectors": (lambda h: torch.linalg.solve(SPD.expand(N, N, N), h), (N,), 0),
    "solve, several": (lambda h: torch.linalg.solve(SPD, h), (N, 3), 0),
    "solve, left": (lambda h: torch.linalg.solve(SPD, h, left=False), (N,), 0),
    "solve_triangular": (lambda h: torch.linalg.solve_triangular(TRIL, h, upper=False), (N,), 1),
    "lu_solve": (lambda h: torch.linalg.lu_solve(LU, PIVOTS, h), (N,), 1),
    "multi_dot": (lambda h: torch.linalg.multi_dot([h, SPD, draw(N, N)]), (N,), 0),
    "multi_dot, last": (lambda h: torch.linalg.multi_dot([draw(N, N), SPD, h]), (N,), 1),
    "bilinear": (lambda h: F.bilinear(h, draw(N, N), draw(N, N, N)), (N,), 0),
    "diff": (lambda h: torch.diff(h, dim=1), (N,), 0),
    "cosine_similarity": (lambda h: F.cosine_similarity(h, draw(N, N)).unsqueeze(1), (N,), 0),
    "conv, along, one entry wide": (lambda h: F.conv1d(h, draw(2, 2, 1)), (5, 2), 2),
    "conv, groups of channels": (lambda h: F.conv1d(h, draw(N, 1, 3), padding=1, groups=N), (5,), 0),
    "conv, a weight's outputs": (lambda h: F.conv1d(draw(2, N, 5), h), (N, 1), 0),
    "max_pool": (lambda h: F.max_pool1d(h, 3, 1, 1), (N,), 0),
    "avg_pool, one entry wide": (lambda h: F.avg_pool2d(h, (1, 3), 1, (0, 1)), (1, 2, 5), 2),
    "grid_sample": (lambda h: F.grid_sample(h, draw(N, 3, 2, 2), align_corners=False), (1, 3, 3), 0),
    "pad": (lambda h: F.pad(h, (1, 1)), (N - 2,), 0),
    "pad, samples behind": (lambda h: F.pad(h, (0, 0, 1, 1)), (N - 2,), 1),
    "attention, queries": (lambda h: F.scaled_dot_product_attention(h, draw(2, N, 3), draw(2, N, 3)), (2, 3), 1),
    "attention, columns": (lambda h: F.scaled_dot_product_attention(draw(2, N, N), draw(2, N, N), h), (2, N), 2),
    "einsum, with dots": (lambda h: torch.einsum("n...,...m->nm", h, SPD), (N,), 0),
    "einsum, nothing behind": (lambda h: torch.einsum("ni,ij", h, SPD), (N,), 0),
}  # fmt: skip
BACK = {"conv, a weight's outputs": 1, "einsum, nothing behind": 1}  # where the samples are in the output, if elsewhere


def of(case: Case, name: str) -> tuple[Acts, Tensor]:
    act, shape, axis = case
    return Acts(act, torch.Size(shape), axis, BACK.get(name)), draw(N, *shape)


@pytest.mark.parametrize("name", MEET)
def test_samples_that_meet_are_refused(name: str) -> None:
    model, x = of(MEET[name], name)
    own = [torch.autograd.grad(loss, model.w, retain_graph=True)[0] for loss in losses(model(x), None)]
    assert len(own) == N  # it runs
    with pytest.raises(persample.BatchCoupledError):
        persample.gradients(model, losses, x, verify=False)


@pytest.mark.parametrize("name", DONT)
def test_samples_that_do_not_meet_are_served(name: str) -> None:
    model, x = of(DONT[name], name)
    own = torch.stack([torch.autograd.grad(loss, model.w, retain_graph=True)[0] for loss in losses(model(x), None)])
    G = persample.gradients(model, losses, x, verify=False)
    torch.testing.assert_close(G["w"], own, rtol=1e-9, atol=1e-9)


def test_a_parameter_that_fills_what_samples_leave_free() -> None:
    """Which of its entries a sample gets depends on how many the samples before it took."""

    class Fills(nn.Module):
        def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.source, self.fill = nn.Parameter(draw(N, N)), fill

        def forward(self, x: Tensor) -> Tensor:
            return self.fill(x, self.source)

    for fill in (
        lambda x, s: x.masked_scatter(CAUSAL, s),
        lambda x, s: x.clone().masked_scatter_(CAUSAL, s),
        lambda x, s: torch.diagonal_scatter(x, s[0]),
        lambda x, s: torch.select_scatter(x, s[0], 0, 1),
        lambda x, s: torch.select_scatter(x, s[0], 1, 2),
    ):
        model, x = Fills(fill), draw(N, N)
        each = losses(model(x), None)
        own = torch.stack([torch.autograd.grad(loss, model.source, retain_graph=True)[0] for loss in each])
        rows = persample.gradients(model, losses, x, verify=False)["source"]
        torch.testing.assert_close(rows, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda h: h[:, None].expand(N, N, 3).transpose(0, 1), persample.BatchCoupledError),
        (lambda h: h[1].expand(N, 3), persample.BatchCoupledError),
        (lambda h: torch.stack([h] * N), persample.BatchCoupledError),
        (lambda h: h.mean(0).expand(N, 3), persample.BatchCoupledError),
    ],
    ids=["a new axis in front", "one sample", "stacked", "their mean"],
)  # fmt: skip
def test_losses_that_no_sample_has_for_itself(act: Any, error: type[Exception]) -> None:
    model = Acts(act, torch.Size((3,)), 0, 0)
    with pytest.raises(error, match=r"made of all samples|one sample|samples are"):
        persample.gradients(model, losses, draw(N, 3), verify=False)
    with persample.extend(model, verify=False) as recorder, pytest.raises(error):
        recorder.gradients(losses(model(draw(N, 3)), None))
    with persample.extend(model) as recorder:  # each as it stands
        each = losses(model(draw(N, 3)), None)
        own = torch.stack([torch.autograd.grad(loss, model.w, retain_graph=True)[0] for loss in each])
        torch.testing.assert_close(recorder.gradients(each, coupled="loss")["w"], own, rtol=1e-9, atol=1e-9)


def test_known_criteria_take_samples_from_the_first_axis() -> None:
    model, y = Acts(lambda h: h.mT, torch.Size((N,)), 0, 0), torch.arange(N)
    with pytest.raises(persample.SampleAxisError, match=r"axis 1.*Transpose"):
        persample.gradients(model, nn.CrossEntropyLoss(), draw(N, N), y, verify=False)
