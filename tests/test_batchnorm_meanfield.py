"""Growth of gradients with depth under BatchNorm at initialisation (Yang et al. 2019, arXiv:1902.08129).

In a wide net ``h -> W f(BN(h))`` with independent weights of variance ``1 / width``, the squared norm of the gradient
grows per layer, downwards, by a factor that only depends on the batch size ``B`` and on ``f``. In the linear net ``h``
of a channel is Gaussian with ``B - 1`` degrees of freedom, so ``E[1 / s^2] = (B - 1) / (B - 3)``, and ``J`` keeps
``(B - 2) / (B - 1)`` of a gradient that is already centred: together ``(B - 2) / (B - 3)``. For ReLU and ``B -> inf``
the mask keeps 1/2 of the gradient and the variance of a rectified Gaussian with unit second moment is
``1/2 - 1/(2 pi)``: together ``pi / (pi - 1)``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from persample.batchnorm import BatchNormJacobian, linearize


def run(h: Tensor, weights: Tensor, relu: bool) -> tuple[Tensor, list[tuple[BatchNormJacobian, Tensor]]]:
    """Output of the net, and for every layer its ``J`` and the derivative of the activation."""
    layers = []
    for weight in weights:
        J = linearize(h, None, None, 0.0)
        slope = (J.output > 0).to(h.dtype) if relu else torch.ones_like(h)
        layers.append((J, slope))
        h = (J.output * slope) @ weight.T
    return h, layers


def growth(batch: int, relu: bool, frozen: bool = False, width: int = 600, depth: int = 24) -> float:
    """Factor per layer of the squared norm of the gradient, after a few layers that forget how it began."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(depth, width, width, generator=generator) / math.sqrt(width)
    _, layers = run(torch.randn(batch, width, generator=generator), weights, relu)
    gradient, norms = torch.randn(batch, width, generator=generator), []
    for weight, (J, slope) in zip(weights.flip(0), reversed(layers), strict=True):
        gradient = slope * (gradient @ weight)
        gradient = J.scale * gradient if frozen else J.T @ gradient
        norms.append(float(gradient.square().sum()))
    # the top forgets how the gradient began, the bottom how the input began
    return float((norms[-5] / norms[3]) ** (1 / (len(norms) - 8)))


@pytest.mark.parametrize("batch", [6, 12, 32])
def test_linear_net(batch: int) -> None:
    # 5 % could not tell 1.034 (32 samples) from no growth at all
    assert growth(batch, relu=False) == pytest.approx((batch - 2) / (batch - 3), rel=0.02)


@pytest.mark.parametrize("batch", [6, 12])
def test_linear_net_with_frozen_statistics_grows_faster(batch: int) -> None:
    assert growth(batch, relu=False, frozen=True) == pytest.approx((batch - 1) / (batch - 3), rel=0.02)


def test_relu_net() -> None:
    assert growth(128, relu=True) == pytest.approx(math.pi / (math.pi - 1), rel=0.05)


def test_growth_falls_towards_the_limit_of_large_batches() -> None:
    small, large = growth(8, relu=True), growth(128, relu=True)
    assert small > 1.1 * large


@pytest.mark.parametrize("relu", [True, False])
def test_the_operators_are_the_backward_pass(relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 10, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    h = x
    for weight in weights:
        y = (h - h.mean(0)) / h.var(0, correction=0).sqrt()
        h = (y.relu() if relu else y) @ weight.T
    gradient = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(h, x, gradient)[0]
    output, layers = run(x.detach(), weights, relu)
    torch.testing.assert_close(output, h.detach(), rtol=1e-12, atol=1e-12)
    for weight, (J, slope) in zip(weights.flip(0), reversed(layers), strict=True):
        gradient = J.T @ (slope * (gradient @ weight))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
