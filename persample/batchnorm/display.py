"""How a BatchNorm Jacobian shows itself: one line, a table, a heat map."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from persample.batchnorm.jacobian import BatchNormJacobian


def summary(J: BatchNormJacobian) -> dict[str, str]:
    """What one wants to know first, name by name; ``O(N C S)``."""
    samples, channels, *space = J.normed.shape
    facts = {"samples": str(samples), "channels": str(channels), "positions": " x ".join(map(str, space)) or "1"}
    if len(J.mean) > 1:
        facts["groups"] = str(len(J.mean))
    facts["statistics"] = "of the batch" if J.coupled else "running (diagonal, samples are independent)"
    if J.coupled:
        share = J.coupling_share()
        facts["between samples"] = f"{100 * float(share[~share.isnan()].mean()):.3g} % of |J|^2 per channel"
    return facts


def html(J: BatchNormJacobian) -> str:
    """A table of the summary and of the channel that is strongest in each respect."""
    facts = summary(J)
    scale = J.scale.abs().amax(0)
    channel = int(scale.argmax())
    facts["largest |weight / s|"] = f"{float(scale[channel]):.4g} (channel {channel})"
    if J.coupled:
        leverage = J.leverage()
        n, c = divmod(int(leverage.argmax()), leverage.shape[1])
        facts["largest leverage"] = f"{float(leverage[n, c]):.4g} (sample {n}, channel {c})"
    facts["rank per channel"] = _range(J.rank())
    row = "<tr><th style='text-align:left'>{}</th><td>{}</td></tr>"
    rows = "".join(row.format(escape(name), escape(value)) for name, value in facts.items())
    return f"<table><caption>BatchNormJacobian</caption>{rows}</table>"


def plot(J: BatchNormJacobian, ax: Axes | None, diagonal: bool) -> Axes:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install persample[plot]") from error
    norms = J.block_norms()
    if not diagonal:
        norms.fill_diagonal_(torch.nan)
    if ax is None:
        ax = plt.subplots()[1]
    image = ax.imshow(norms.cpu().numpy(), vmin=0)
    ax.figure.colorbar(image, ax=ax, label=r"$\|\partial y_n / \partial x_m\|_F$")
    ax.set(xlabel="input of sample m", ylabel="output of sample n", title="BatchNorm coupling")
    return ax


def _range(values: torch.Tensor) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
