"""How results look: tables in notebooks, and plots.  matplotlib is an extra, imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .report import bytes_text, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .check import CheckReport
    from .explain import Explanation
    from .gradients import Gradients
    from .quantities import Quantities
    from .statistics_run import Statistics

# Told apart by everyone (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")


def pyplot() -> Any:
    """``matplotlib.pyplot``, or an ImportError that names the extra."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'persample[plot]'") from error
    return plt


def axes(ax: Axes | None = None, size: tuple[float, float] | None = None) -> Axes:
    """``ax``, or that of a new figure of this size."""
    return ax if ax is not None else pyplot().subplots(figsize=size, layout="constrained")[1]


def heat_map(norms: Tensor, ax: Axes | None, diagonal: bool, label: str, **words: str) -> Axes:
    """``[N, N]`` as colours, with a bar of this label; the diagonal, unless asked for, would hide the rest."""
    ax, norms = axes(ax), norms.detach().double().cpu()
    image = ax.imshow((norms if diagonal else norms.fill_diagonal_(float("nan"))).numpy(), vmin=0)
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.set(**words)
    return ax


def gradients_html(G: Gradients, limit: int = 40) -> str:
    """One line per parameter: shape, form, memory, and the median gradient norm with a bar."""
    from .factors import nbytes

    kept = {name: [type(G.factors[name]).__name__, bytes_text(nbytes(G.factors[name]))] for name in G.names[:limit]}
    return _parameters_html(G, ["form", "memory"], kept, True)


def statistics_html(S: Statistics, limit: int = 40) -> str:
    """One line per parameter: its shape and, where norms were asked for, the median gradient norm with a bar."""
    asked = any(name in S.requests for name in ("norm", "squared_norm", "clip"))
    return _parameters_html(S, [], {name: [] for name in S.names[:limit]}, asked)


def _parameters_html(Q: Gradients | Statistics, header: list[str], cells: dict[str, list[str]], normed: bool) -> str:
    """The shown parameters with these cells of their own, between their shapes and their norms."""
    rows = [[name, str(tuple(Q.shapes[name])), *own] for name, own in cells.items()]
    more = f" (the first {len(rows)} of {len(Q.names)} parameters)" if len(Q.names) > len(rows) else ""
    header, title = ["parameter", "shape", *header], f"{Q!r}{more}"
    if not normed:
        return html_table(header, rows, title)
    medians = {name: float(norm.median()) for name, norm in Q.norm(per_parameter=True).items()}
    top = max(medians.values(), default=0.0) or 1.0
    rows = [[*row, f"{medians[row[0]]:.3g}"] for row in rows]
    return html_table([*header, "median norm"], rows, title, [medians[name] / top for name in cells])


def plot_norms(Q: Quantities, ax: Axes | None = None) -> Axes:
    """Histogram of the gradient norms of the samples; on logarithmic bins where they differ by more than a decade."""
    ax = axes(ax)
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


def plot_sizes(report: Explanation, ax: Axes | None, limit: int) -> Axes:
    """Bytes of factors against bytes of individual gradients, a pair of bars for each of the largest parameters."""
    largest = sorted(report.rows, key=lambda row: row.dense, reverse=True)[:limit]
    ax = axes(ax, _tall([row.name for row in largest], 0.45))
    for shift, colour, what, name in (
        (-0.2, ORANGE, "dense", "individual gradients [N, *P]"),
        (0.2, BLUE, "kept", "factors"),
    ):
        sizes = [getattr(row, what) for row in largest]
        bars = ax.barh([i + shift for i in range(len(sizes))], sizes, 0.38, color=colour, label=name)
        ax.bar_label(bars, [bytes_text(size) for size in sizes], padding=3, fontsize="small")
    ax.set_yticks(range(len(largest)), [f"{row.name}\n{row.form}" for row in largest], fontsize="small")
    ax.set_ylim(len(largest) - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * max((max(row.dense, row.kept) for row in largest), default=1))  # room for the labels
    more = f"the {limit} largest of {len(report.rows)} parameters, " if len(report.rows) > limit else ""
    ax.set(xlabel="memory", xticks=[], title=f"{more}N = {report.n}")
    ax.legend(frameon=False, loc="lower right", fontsize="small")
    return ax


def plot_errors(report: CheckReport, ax: Axes | None) -> Axes:
    """Relative errors of rows and of their sum for every parameter; a verdict in words where it isn't "exact"."""
    rows = report.rows
    ax = axes(ax, _tall([row.name for row in rows], 0.25))
    floor = 1e-17  # an error of exactly 0 has no place on a logarithmic axis
    for colour, marker, what, name in (
        (BLUE, "o", "error", "single rows, against samples run alone"),
        (GREEN, "x", "sum_error", "their sum, against autograd"),
    ):
        measured = [(max(getattr(row, what), floor), i) for i, row in enumerate(rows) if getattr(row, what) >= 0]
        ax.plot(*(zip(*measured, strict=True) if measured else ((), ())), marker, color=colour, label=name)
    for i, row in enumerate(rows):
        if row.verdict != "exact":
            colour = GREY if row.verdict == "unused" else ORANGE
            beside: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "xytext": (4, 0),
                "textcoords": "offset points",
            }
            ax.annotate(row.verdict, (1, i), va="center", color=colour, fontsize="small", **beside)
    ax.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
    ax.set_ylim(1.05 * len(rows) + 1.4, -0.6)  # with room for the legend
    ax.set(xscale="log", xlim=(floor / 3, None), title=f"check: {'ok' if report.ok else 'NOT ok'}")
    ax.set_xlabel("relative error (none at all: at the left edge)")
    ax.legend(frameon=False, loc="lower left", fontsize="small")
    return ax


def _tall(names: list[str], height: float) -> tuple[float, float]:
    """The size of a figure with room for a line for each of these names, beside them."""
    return max(6.4, 4.4 + 0.08 * max(map(len, names), default=0)), 1.6 + height * len(names)
