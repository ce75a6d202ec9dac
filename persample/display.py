"""How results look: tables in notebooks, and plots.  matplotlib is an extra, imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .report import bytes_text, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .gradients import Gradients
    from .quantities import Quantities

# Told apart by everyone (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def pyplot() -> Any:
    """``matplotlib.pyplot``, or an ImportError that names the extra."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'persample[plot]'") from error
    return plt


def gradients_html(G: Gradients, limit: int = 40) -> str:
    """One line per parameter: shape, form, memory, and the median gradient norm with a bar."""
    from .factors import nbytes

    medians = {name: float(norm.median()) for name, norm in G.norm(per_parameter=True).items()}
    top = max(medians.values(), default=0.0) or 1.0
    names = list(G.names)[:limit]
    rows = [
        [
            name,
            str(tuple(G.shapes[name])),
            type(G.factors[name]).__name__,
            bytes_text(nbytes(G.factors[name])),
            f"{medians[name]:.3g}",
        ]
        for name in names
    ]
    more = f" (the first {limit} of {len(G.names)} parameters)" if len(G.names) > limit else ""
    header = ("parameter", "shape", "form", "memory", "median norm")
    return html_table(header, rows, f"{G!r}{more}", [medians[name] / top for name in names])


def plot_norms(Q: Quantities, ax: Axes | None = None) -> Axes:
    """Histogram of the gradient norms of the samples; on logarithmic bins where they differ by more than a decade."""
    ax = ax if ax is not None else pyplot().subplots(layout="constrained")[1]
    norm: Tensor = Q.norm().double().cpu()
    positive = norm[norm > 0]
    logarithmic = False
    if len(positive):
        low, high = float(positive.min()), float(positive.max())
        logarithmic = high > 10 * low
        if logarithmic:
            bins = [low * (high / low) ** (i / 30) for i in range(30)] + [high]
        else:
            bins = [low + (high - low) * i / 30 for i in range(30)] + [high] if high > low else [low * 0.5, low * 2]
        ax.hist(positive.numpy(), bins=bins, color=BLUE)
        ax.axvline(float(norm.median()), color=ORANGE, linestyle="--", label=f"median {float(norm.median()):.3g}")
        ax.legend(frameon=False)
    zeros = len(norm) - len(positive)
    ax.set(
        xscale="log" if logarithmic else "linear",
        xlabel="gradient norm of a sample (unscaled loss)",
        ylabel="samples",
        title=f"{len(norm)} samples" + (f", {zeros} with gradient 0" if zeros else ""),
    )
    ax.locator_params(axis="y", integer=True)
    return ax
