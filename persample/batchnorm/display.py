"""How a BatchNorm Jacobian shows itself: one line, a table, a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..display import heat_map
from ..report import html_table

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


def html(J: BatchNormJacobian, limit: int = 8) -> str:
    """The summary, and one line for each of the channels that the layer amplifies most; ``O(N C S)``."""
    scale, rank, share = J.scale.abs().amax(0), J.rank(), J.coupling_share()
    sample = J.leverage().max(0)
    channels = scale.argsort(descending=True)[:limit].tolist()
    rows = [
        [
            str(c),
            f"{float(scale[c]):.3g}",
            str(int(rank[c])),
            f"{float(sample.values[c]):.3g} (sample {int(sample.indices[c])})" if J.coupled else "0",
            "-" if share[c].isnan() else f"{100 * float(share[c]):.3g} %",
        ]
        for c in channels
    ]
    header = ("channel", "|weight / s|", "rank", "largest leverage", "|J|² between samples")
    more = f"; the {limit} channels with the largest |weight / s|" if len(scale) > limit else ""
    bars = share[channels].nan_to_num().tolist()
    return html_table(header, rows, f"{J!r}{more}", [x / (max(bars) or 1.0) for x in bars])


def plot(J: BatchNormJacobian, ax: Axes | None, diagonal: bool) -> Axes:
    words = {"xlabel": "input of sample m", "ylabel": "output of sample n", "title": "BatchNorm coupling"}
    return heat_map(J.block_norms(), ax, diagonal, r"$\|\partial y_n / \partial x_m\|_F$", **words)
