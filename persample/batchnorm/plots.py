"""How a `Coupling` shows itself: one line, a table, pictures (with matplotlib, which is only imported here and only
when drawing).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..display import PALETTE, axes, heat_map
from ..errors import ArgumentError
from ..report import html_table
from ..scratch import kernel
from .notions import NOTIONS

MARKERS = ("o", "s", "^", "x", "+")  # beside colours, for those who don't see them

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
    """One line for every BatchNorm call: its channels, the parameters that its statistics are the first to couple, and
    how much the batch loss depends on the samples' weights in them, ``|sum_n T[n, :]|`` from that layer alone.
    """
    facts = "; ".join(f"{name}: {value}" for name, value in summary(coupling).items())
    if not coupling.layers:
        return html_table(("BatchNorm call",), [], f"Coupling({facts})")
    network, rows, pull, seen = coupling.network, [], [], set[str]()
    layers = zip(coupling.layers.items(), network.by_node(network.deviation * network.structure.total), strict=True)
    for (layer, channels), part in layers:
        new = [name for name, on in coupling.coupled.items() if layer in on and name not in seen]
        seen.update(new)
        pull.append(float(part.sum(1).norm()))
        rows.append([layer, str(channels), ", ".join(new) or "nothing new", f"{pull[-1]:.3g}"])
    rows.append(["-", "-", f"not coupled: {', '.join(coupling.uncoupled) or 'none'}", ""])
    header = ("BatchNorm call", "channels", "first to couple", "pull on the summed loss")
    return html_table(header, rows, f"Coupling({facts})", [*(x / (max(pull) or 1.0) for x in pull), 0.0])


def of_table(norms: Tensor, ax: Axes | None) -> Axes:
    """The norms of the table, ``[N, N]``, without the diagonal."""
    words = {"xlabel": "parameters as used by sample m", "ylabel": "loss n", "title": "coupling by BatchNorm, n ≠ m"}
    return heat_map(norms, ax, False, r"$\|\partial \ell_n / \partial \theta^{(m)}\|$", **words)


def plot_layers(coupling: Coupling, ax: Axes | None = None) -> Axes:
    """Coupling by layer and channel: the Frobenius norm of ``T`` from one channel's statistics alone, sorted."""
    ax = axes(ax)
    start = 0
    for i, (name, adjoint, deviation) in enumerate(_by_layer(coupling)):
        strength = channel_strength(adjoint, deviation).sort(descending=True).values
        place, colour = range(start, start + len(strength)), PALETTE[i % len(PALETTE)]
        ax.bar(place, strength.tolist(), width=1.0, label=name, color=colour)
        start += len(strength) + 1
    ax.set(xlabel="channels, layer by layer", ylabel=r"$\|T\|$ of the channel", title="which statistics couple")
    ax.set_xticks([])
    return _legend(ax)


@kernel
def channel_strength(adjoint: Tensor, deviation: Tensor) -> Tensor:
    """``[C]``: the Frobenius norm of ``T`` as it would be with the mean and variance of one channel only."""
    a = torch.stack(adjoint.chunk(2, -1), -1)  # [N, C, 2]
    d = torch.stack(deviation.chunk(2, -1), -1)
    return torch.einsum("ncs,nct,mcs,mct->c", a, a, d, d).clamp(min=0).sqrt()


def plot_spectrum(coupling: Coupling, ax: Axes | None = None) -> Axes:
    """Singular values of the statistic-influence matrix ``T`` (rank at most ``K``), and of every layer's part of it."""
    ax = axes(ax)
    with torch.autocast(coupling.losses.device.type, enabled=False):
        parts = {name: adjoint @ deviation.mT for name, adjoint, deviation in _by_layer(coupling)}
    for i, (name, matrix) in enumerate({"all layers": coupling.statistic_influence(), **parts}.items()):
        values = torch.linalg.svdvals(matrix.double())
        values = values[values > 1e-12 * values[0]]
        style = {"label": name, "lw": 1 if name in parts else 2, "color": PALETTE[i % len(PALETTE)]}
        ax.semilogy(range(1, len(values) + 1), values.tolist(), marker=".", **style)
    ax.set(xlabel="k", ylabel="k-th singular value of T", title="influence through the statistics")
    return _legend(ax)


def plot_notions(coupling: Coupling, notions: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Norms of the per-sample gradients by each notion (all five by default), side by side; samples by their losses."""
    ax = axes(ax)
    order = coupling.losses.argsort().cpu()
    for i, notion in enumerate(NOTIONS if notions is None else notions):
        norms = coupling.gradients(notion).norm().cpu()[order]
        ax.plot(norms.tolist(), MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], ms=4, label=notion)
    ax.set(xlabel="samples, by their loss", ylabel="norm of the gradient", title="'the gradient of sample n'")
    return _legend(ax)


def plot_decay(couplings: Iterable[Coupling], ax: Axes | None = None) -> Axes:
    """Batches of several sizes ``N``: what falls as ``1/N``, and what does not.

    The mean of ``|dl_n/dx_m|`` over other samples, and the share of ``dl_n/dtheta`` that flows through the statistics.
    """
    if not isinstance(couplings, Iterable):
        raise ArgumentError(f"couplings are those of several batch sizes, plot_decay([c32, c64]), got {couplings!r}.")
    ax = axes(ax)
    sizes, data, theta = [], [], []
    for coupling in couplings:
        n = len(coupling)
        sizes.append(n)
        data.append(float(coupling.input_norms().fill_diagonal_(0).sum() / (n * (n - 1))))
        theta.append(float(coupling.theta_coupling().mean()))
    through = r"share of $\partial \ell_n / \partial \theta$ through the statistics"
    ax.loglog(sizes, theta, marker="s", color=PALETTE[1], label=through)
    ax.loglog(sizes, data, marker="o", color=PALETTE[0], label=r"$\|\partial \ell_n / \partial x_m\|$, n ≠ m")
    ax.set(xlabel="samples in the batch, N", ylabel="mean over samples", title="what vanishes in large batches")
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    return _legend(ax)


def _by_layer(coupling: Coupling) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every layer with its part of ``lambda`` and of ``ds/dw``, ``[N, 2 C]`` each."""
    network = coupling.network
    yield from zip(coupling.layers, network.by_node(network.adjoints), network.by_node(network.deviation), strict=True)


def _legend(ax: Axes) -> Axes:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")
    return ax
