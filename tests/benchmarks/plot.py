"""The plots of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .engines import OURS
from .peers import PEERS
from .plan import AXIS_ENGINES
from .quantities import QUANTITIES
from .workloads import AXES, FULL

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "persample",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKERS = dict(zip(PEERS, "ov^sDPXdp*", strict=False))
COLOURS = {"persample": "tab:red", "persample, rows kept": "tab:pink", "persample, max_bytes": "tab:orange"}


def compared(found: dict[tuple[str, str, str], dict[str, Any]], path: Path) -> None:
    """One panel per workload, one line per quantity, one mark per engine."""
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(FULL), figsize=(13, 3.6), sharey=True, layout="constrained")
        names = list(QUANTITIES)
        for ax, w in zip(axes, FULL, strict=True):
            ax.axvline(1, color="0.6", linewidth=0.8)
            for e in [*PEERS, *OURS]:
                at = [(found[w, q, e]["ratio"], i) for i, q in enumerate(names) if "ratio" in found.get((w, q, e), {})]
                if at and e not in ("persample, vmap", "persample, loop"):
                    x, y = zip(*at, strict=True)
                    ours = e in OURS
                    ax.plot(
                        x,
                        y,
                        "o" if ours else MARKERS[e],
                        color=COLOURS.get(e, "0.35"),
                        label=e,
                        linestyle="none",
                        markersize=5,
                        fillstyle="full" if ours else "none",
                    )
            ax.set(xscale="log", title=w)
        axes[0].set(yticks=range(len(names)), yticklabels=[f"{q} {QUANTITIES[q].title}" for q in names])
        axes[0].invert_yaxis()
        figure.supxlabel("time, in ordinary forward and backward passes")
        shown: dict[str, Any] = {}
        for ax in axes:
            shown |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=6, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def scaling(found: dict[tuple[str, str, str], dict[str, Any]], path: Path) -> None:
    """Cost against samples, tokens, width and depth of a transformer."""
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(AXES), figsize=(9, 2.6), sharey=True, layout="constrained")
        for ax, (axis, sizes) in zip(axes, AXES.items(), strict=True):
            ax.axhline(1, color="0.6", linewidth=0.8)
            for e, quantities in AXIS_ENGINES.items():
                for q in quantities:
                    at = [
                        (s, found[f"{axis}={s}", q, e]["ratio"])
                        for s in sizes
                        if "ratio" in found.get((f"{axis}={s}", q, e), {})
                    ]
                    if at:
                        ax.plot(
                            *zip(*at, strict=True),
                            "o-" if e in OURS else "^--",
                            markersize=3,
                            linewidth=1,
                            label=f"{e}, {QUANTITIES[q].title}",
                        )
            ax.set(xscale="log", xlabel=axis, xticks=sizes, xticklabels=[str(s) for s in sizes])
            ax.minorticks_off()
        axes[0].set(ylabel="time, in ordinary passes", ylim=(0, None))
        if axes[0].get_legend_handles_labels()[0]:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
