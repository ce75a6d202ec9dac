"""What is read off the table and the five gradients: shares, numbers, noise, and what happens without a sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BatchNormError
from ..factors import dense
from ..gradients import Gradients
from .network import Network
from .statistics import weighted


class Noise(NamedTuple):
    """Gradient noise as some notion of per-sample gradients sees it."""

    trace: float  # of the covariance of the rows (ddof=1)
    squared_mean: float  # |mean row|^2, of which trace / N is noise
    scale: float  # trace / squared_mean; without that noise, see `statistics.noise_scale` of the rows


def noise(G: Gradients) -> Noise:
    """Trace of the covariance of the rows, next to the square of their mean."""
    trace = float(sum(v.sum() for v in G.variance(ddof=1).values()))
    squared = float(sum(g.abs().square().sum() for g in G.mean().values()))
    return Noise(trace, squared, trace / squared if squared > 0 else float("inf"))


def data_coupling(squares: Tensor) -> Tensor:
    """``[N]``: the share of others in the rows of ``squares [N, N]``, as norms."""
    others = squares.clone().fill_diagonal_(0)
    return _ratio(others.sum(1).sqrt(), squares.sum(1).sqrt())


def participation(squares: Tensor) -> Tensor:
    """``[N]``: the participation number of the rows of ``squares [N, N]``, 1 to ``N``; 1 for rows of zeros."""
    total = squares.sum(1)
    return torch.where(total > 0, _ratio(total.square(), squares.square().sum(1)), 1.0)


def theta_coupling(network: Network, G: Gradients) -> Tensor:
    """``[N]``: the share of ``dl_n/dtheta = G[n]`` that flows through the statistics; exactly 0 without any."""
    through = torch.zeros_like(network.structure.losses)
    for name in network.coupled:
        difference = G[name] - dense(network.direct.factors[name])
        through += difference.reshape(network.n, -1).abs().square().sum(1)
    norm: Tensor = G.norm()
    return _ratio(through.sqrt(), norm)


def leave_one_out(network: Network) -> Tensor:
    """``[N, N]``: loss ``n`` with statistics that leave out sample ``m``, minus loss ``n``; ``N`` forward passes."""
    if network.n < 2:
        raise BatchNormError("leave_one_out needs two samples: without the only one there are no statistics.")
    losses, found = network.structure.losses, []
    for m in range(network.n):
        w = torch.ones_like(losses)
        w[m] = 0
        with network.point.forward(weighted(w)) as run:
            found.append(run.losses.detach() - losses)
    return torch.stack(found, 1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, 0 where both are."""
    return torch.where(b > 0, a / b, 0.0)
