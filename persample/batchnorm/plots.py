"""How a `Coupling` shows itself: one line, a table, pictures (with matplotlib, which is only imported here and only
when drawing).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .coupling import Coupling


def summary(coupling: Coupling) -> dict[str, str]:
    """What one wants to know first, name by name; what it costs is one pass."""
    layers = coupling.layers
    if not layers:
        return {"samples": str(len(coupling)), "coupled": "no BatchNorm uses the statistics of this batch"}
    return {
        "samples": str(len(coupling)),
        "statistics": f"{2 * sum(layers.values())} of {len(layers)} BatchNorm calls",
        "coupled parameters": f"{len(coupling.coupled)} of {len(coupling.names)}",
        "passes for 'loss'": " or ".join(f"{count} ({route})" for route, count in coupling.costs().items()),
    }


def html(coupling: Coupling) -> str:
    """The summary, and the parameters that each layer's statistics depend on first."""
    row = "<tr><th style='text-align:left'>{}</th><td>{}</td></tr>"
    facts = dict(summary(coupling))
    seen: set[str] = set()
    for layer, channels in coupling.layers.items():
        new = [name for name, on in coupling.coupled.items() if layer in on and name not in seen]
        seen.update(new)
        facts[layer] = f"{channels} channels; first to couple {', '.join(new) or 'nothing new'}"
    if coupling.layers:
        facts["not coupled"] = ", ".join(coupling.uncoupled) or "none"
    body = "".join(row.format(escape(name), escape(value)) for name, value in facts.items())
    return f"<table><caption>Coupling</caption>{body}</table>"


def heat_map(values: Tensor, ax: Axes | None, x: str, y: str, title: str) -> Axes:
    """``[N, N]`` as colours, without the diagonal, which would hide the rest."""
    ax = ax or _axes()
    shown = values.detach().clone().cpu().double().fill_diagonal_(float("nan"))
    image = ax.imshow(shown.numpy(), cmap="viridis")
    ax.figure.colorbar(image, ax=ax)
    ax.set(xlabel=x, ylabel=y, title=f"{title}, n != m")
    return ax


def plot_layers(coupling: Coupling, ax: Axes | None = None) -> Axes:
    """Coupling by layer and channel: ``|T|`` of every channel's statistics alone, ``sqrt(sum_nm T[n, m]^2)``, sorted
    within each layer.
    """
    ax = ax or _axes()
    network = coupling.network
    start = 0
    for name, adjoint, deviation in zip(
        coupling.layers, network.by_node(network.adjoints), network.by_node(network.deviation), strict=True
    ):
        strength = channel_strength(adjoint, deviation).sort(descending=True).values
        places = torch.arange(start, start + len(strength))
        ax.bar(places.tolist(), strength.tolist(), width=1.0, label=name)
        start += len(strength) + 1
    ax.set(xlabel="channels, layer by layer", ylabel="|T| of the channel", title="which statistics couple the losses")
    if coupling.layers:
        ax.legend(fontsize="small")
    return ax


def channel_strength(adjoint: Tensor, deviation: Tensor) -> Tensor:
    """``[C]``: the Frobenius norm of ``T`` as it would be with the mean and variance of one channel only."""
    a = torch.stack(adjoint.chunk(2, -1), -1)  # [N, C, 2]
    d = torch.stack(deviation.chunk(2, -1), -1)
    return torch.einsum("ncs,nct,mcs,mct->c", a, a, d, d).clamp(min=0).sqrt()


def plot_spectrum(coupling: Coupling, ax: Axes | None = None) -> Axes:
    """Singular values of the statistic-influence matrix ``T`` (rank at most ``K``), and of every layer's part of it."""
    ax = ax or _axes()
    network = coupling.network
    parts = {"all layers": coupling.statistic_influence()}
    for name, adjoint, deviation in zip(
        coupling.layers, network.by_node(network.adjoints), network.by_node(network.deviation), strict=True
    ):
        parts[name] = adjoint @ deviation.mT
    for name, matrix in parts.items():
        values = torch.linalg.svdvals(matrix.double())
        values = values[values > 1e-12 * values.max()] if bool((values > 0).any()) else values[:0]
        ax.plot(range(1, len(values) + 1), values.tolist(), marker=".", label=name, lw=2 if name == "all layers" else 1)
    ax.set(xlabel="k", ylabel="singular value of T", title="statistic influence")
    if coupling.layers:
        ax.set_yscale("log")
    ax.legend(fontsize="small")
    return ax


def plot_notions(coupling: Coupling, notions: Sequence[str] = ("eval", "frozen", "copy", "loss", "influence"), ax: Axes | None = None) -> Axes:
    """The norms of the per-sample gradients by each notion, side by side; samples in the order of their losses."""
    ax = ax or _axes()
    order = coupling.losses.argsort().cpu()
    for notion in notions:
        ax.plot(coupling.gradients(notion).norm().cpu()[order].tolist(), marker=".", lw=0.5, label=notion)
    ax.set(xlabel="samples, by their loss", ylabel="norm of the gradient", title="'the gradient of sample n'")
    ax.legend(fontsize="small")
    return ax


def plot_decay(couplings: Iterable[Coupling], ax: Axes | None = None) -> Axes:
    """Batches of several sizes ``N``: the mean of ``|dl_n/dx_m|`` over other samples, which falls as ``1/N``, next to
    the share of ``dl_n/dtheta`` that flows through the statistics, which does not.
    """
    ax = ax or _axes()
    sizes, data, theta = [], [], []
    for coupling in couplings:
        n = len(coupling)
        sizes.append(n)
        norms = coupling.input_norms()
        data.append(float(norms.clone().fill_diagonal_(0).sum() / (n * (n - 1))))
        theta.append(float(coupling.theta_coupling().mean()))
    ax.loglog(sizes, data, marker="o", label="|dl_n / dx_m|, n != m")
    ax.loglog(sizes, theta, marker="o", label="share of dl_n / dtheta through the statistics")
    ax.set(xlabel="N", title="what vanishes with N")
    ax.legend(fontsize="small")
    return ax


def _axes() -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install persample[plot]") from error
    return plt.subplots()[1]
