"""The pictures of the documentation, drawn from what the library computes: ``python docs/figures.py [directory]``.

The site draws them as it is built (`conf.py`), the tests draw them all. Each function is one picture, named by what
it is called.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

import persample
from persample import batchnorm
from persample.factors import Conv, Outer, Rows, dense

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito 2008
STYLE = {"font.size": 11, "axes.titlesize": 11, "svg.hashsalt": "persample", "figure.facecolor": "white"}


def classes(n: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Samples ``[n * per_class, 8]`` of ``n`` classes, one class after the other."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(n, 8, generator=generator)
    x = centres.repeat_interleave(per_class, 0) + 0.6 * torch.randn(n * per_class, 8, generator=generator)
    return x, torch.arange(n).repeat_interleave(per_class)


def matrix() -> Figure:
    """``G`` of a small model, with what is read off its rows and its columns."""
    torch.manual_seed(0)
    x, y = classes(3, 8)
    G = persample.gradients(nn.Linear(8, 3, bias=False), nn.CrossEntropyLoss(), x, y)
    rows = G.flat()
    figure = plt.figure(figsize=(7.2, 4.6), layout="constrained")
    grid = figure.add_gridspec(3, 3, width_ratios=[2.1, 0.7, 1.6], height_ratios=[6, 0.6, 0.6])
    picture(figure.add_subplot(grid[0, 0]), rows, "G: a row per sample", "PuOr", centred=True)
    bars = figure.add_subplot(grid[0, 1])
    bars.barh(range(len(G)), G.norm().tolist(), color=BLUE, height=0.8)
    bars.set(title="norms", ylim=(len(G) - 0.5, -0.5), yticks=[], xticks=[])
    picture(figure.add_subplot(grid[0, 2]), G.gram(), "Gram matrix $G G^T$", "PuOr", centred=True)
    for place, found, name in ((1, G.mean(), "mean"), (2, G.variance(), "variance")):
        row = torch.cat([value.flatten() for value in found.values()])[None]
        ax = figure.add_subplot(grid[place, 0])
        picture(ax, row, "", "PuOr" if name == "mean" else "Greens", centred=name == "mean")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    note = figure.add_subplot(grid[1:, 1:])
    note.axis("off")
    note.text(0.02, 0.62, "above: across the parameters, sample space", va="center", color=GREY, fontsize=10)
    note.text(0.02, 0.22, "left: down the samples, parameter space", va="center", color=GREY, fontsize=10)
    return figure


def forms() -> Figure:
    """What is stored of one row (above), and the row that it stands for (below)."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = Outer(normal(1, 1, 2, 9), normal(1, 1, 2, 12), torch.Size([9, 12]))
    table = Rows(torch.tensor([[1, 6]]), normal(1, 2, 12), torch.Size([9, 12]))
    image, edge = normal(1, 1, 12, 12), normal(1, 1, 10, 10)
    kernel = Conv(image, edge, (1, 1), (0, 0), (1, 1), torch.Size([1, 1, 3, 3]))
    figure, axes = plt.subplots(2, 4, figsize=(7.6, 4.2), layout="constrained", height_ratios=[1.1, 1])
    value = normal(9, 12)
    picture(axes[0, 0], value, "Dense", "PuOr", centred=True)
    picture(axes[1, 0], value, "", "PuOr", centred=True)
    pair(axes[0, 1], tokens.left[0, 0], tokens.right[0, 0], "Outer", "2 tokens x O", "2 tokens x I")
    picture(axes[1, 1], dense(tokens)[0], "", "PuOr", centred=True)
    pair(axes[0, 2], torch.tensor([[1.0], [6.0]]), table.value[0], "Rows", "2 indices", "2 tokens x D", indices=True)
    picture(axes[1, 2], dense(table)[0], "", "PuOr", centred=True)
    pair(axes[0, 3], image[0, 0], edge[0, 0], "Conv", "input", "output gradient")
    picture(axes[1, 3], dense(kernel)[0, 0, 0], "", "PuOr", centred=True)
    shapes = (
        "[O, I]",
        "[O, I] = sum of\nouter products",
        "[V, D]: the\nother rows are 0",
        "their correlation:\n[O, I, kernel]",
    )
    for ax, shape in zip(axes[1], shapes, strict=True):
        ax.set_xlabel(shape, fontsize=10)
    axes[0, 0].set_ylabel("stored")
    axes[1, 0].set_ylabel("row n of G")
    axes[0, 0].set_xlabel("[O, I]", fontsize=10)
    return figure


def memory() -> Figure:
    """What factors of a small transformer take, against individual gradients."""
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1000, 128)
            self.layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
            self.head = nn.Linear(128, 1000)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(ids))).mean(1)

    ids, y = torch.randint(1000, (16, 24)), torch.randint(1000, (16,))
    report = persample.explain(Small(), nn.CrossEntropyLoss(), ids, y)
    figure, ax = plt.subplots(figsize=(6.6, 3.8), layout="constrained")
    report.plot(ax, limit=6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("")
    ax.set_title("16 samples of 24 tokens through a small transformer", loc="left")
    assert report.kept < 0.2 * report.dense
    return figure


def table() -> Figure:
    """``|G[n, m]|`` of a small BatchNorm network, its row sums, its column sums, its diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = classes(3, 6)
    coupling = persample.coupling(model, nn.CrossEntropyLoss(), x.double(), y)
    only = ["0.weight"]
    norms = coupling.norms(per_parameter=True)["0.weight"]
    found = {notion: coupling.gradients(notion).select(only).norm() for notion in ("loss", "copy", "frozen")}
    n = len(norms)
    figure = plt.figure(figsize=(6.6, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[4, 1.3, 0.22], height_ratios=[4, 1.3])
    ax = figure.add_subplot(grid[0, 0])
    low = float(norms[norms > 0].quantile(0.05))
    image = ax.imshow(norms.numpy(), norm=LogNorm(low, float(norms.max())), cmap="viridis", aspect="auto")
    ax.set(ylabel="loss n", title="$|G[n, m]|$", xticks=[], yticks=[])
    right = figure.add_subplot(grid[0, 1], sharey=ax)
    right.barh(range(n), found["loss"].tolist(), color=BLUE)
    right.plot(found["frozen"].tolist(), range(n), ".", color=ORANGE)
    right.set(title="row sums:\n$|\\partial \\ell_n / \\partial \\theta|$", ylim=(n - 0.5, -0.5), yticks=[])
    below = figure.add_subplot(grid[1, 0], sharex=ax)
    below.bar(range(n), found["copy"].tolist(), color=GREEN)
    below.plot(range(n), found["frozen"].tolist(), ".", color=ORANGE)
    below.set(xlabel="parameters as used by sample m", ylabel="column\nsums", xlim=(-0.5, n - 0.5), xticks=[])
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 2]), label="norm of dℓ/dθ")
    note = figure.add_subplot(grid[1, 1:])
    note.axis("off")
    for i, (name, colour) in enumerate((("loss", BLUE), ("copy", GREEN), ("frozen", ORANGE))):
        note.text(0.1, 0.8 - 0.3 * i, name, color=colour, transform=note.transAxes)
    return figure


def decay() -> Figure:
    """What falls with the size of the batch, and what does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    pool, labels = torch.randn(256, 6, dtype=torch.float64), torch.randint(3, (256,))
    sizes = (8, 16, 32, 64, 128, 256)
    couplings = [persample.coupling(model, nn.CrossEntropyLoss(), pool[:n], labels[:n]) for n in sizes]
    figure, ax = plt.subplots(figsize=(6.6, 4), layout="constrained")
    batchnorm.plot_decay(couplings, ax)
    return figure


def growth() -> Figure:
    """Growth of squared gradients per layer at initialisation, measured, and what Yang et al. (2019) predict."""
    sizes = (5, 6, 8, 12, 16, 24, 32, 48, 64)
    figure, ax = plt.subplots(figsize=(6.6, 4), layout="constrained")
    line = torch.linspace(4.6, 64, 200)
    ax.plot(line, (line - 2) / (line - 3), color=BLUE, label="(B - 2) / (B - 3)")
    ax.axhline(math.pi / (math.pi - 1), color=ORANGE, label="π / (π - 1)")
    for relu, colour, marker in ((False, BLUE, "o"), (True, ORANGE, "s")):
        name = "ReLU, measured" if relu else "linear, measured"
        ax.plot(sizes, [per_layer(n, relu) for n in sizes], marker, color=colour, label=name)
    ax.set(xlabel="samples in the batch, B", ylabel="factor per layer of the squared norm", ylim=(0.95, 2.6))
    ax.legend(frameon=False)
    return figure


def per_layer(batch: int, relu: bool, width: int = 400, depth: int = 20) -> float:
    """The factor, away from both ends of a net without gain and bias."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(depth, width, width, generator=generator) / math.sqrt(width)
    h, layers = torch.randn(batch, width, generator=generator), []
    for weight in weights:
        J = batchnorm.linearize(h, None, None, 0.0)
        slope = (J.output > 0).float() if relu else torch.ones_like(h)
        layers.append((J, slope))
        h = (J.output * slope) @ weight.T
    gradient, squares = torch.randn(batch, width, generator=generator), []
    for weight, (J, slope) in zip(weights.flip(0), reversed(layers), strict=True):
        gradient = J.T @ (slope * (gradient @ weight))
        squares.append(float(gradient.square().sum()))
    return float((squares[-5] / squares[3]) ** (1 / (depth - 8)))


def picture(ax: Axes, values: Tensor, title: str, colours: str, centred: bool = False) -> None:
    """A matrix as colours, symmetric around white where it is centred."""
    top = float(values.abs().max())
    ax.imshow(values.detach().numpy(), cmap=colours, vmin=-top if centred else 0, vmax=top, aspect="auto")
    ax.set(title=title, xticks=[], yticks=[])


def pair(ax: Axes, above: Tensor, below: Tensor, title: str, first: str, second: str, indices: bool = False) -> None:
    """Two stored matrices, one above the other."""
    ax.set_title(title)
    ax.axis("off")
    for bottom, values, name in ((0.62, above, first), (0.08, below, second)):
        part = ax.inset_axes((0.1, bottom, 0.8, 0.3))
        if indices and values is above:
            part.imshow(torch.ones(1, len(values)).numpy(), cmap="Greys", vmin=0, vmax=8, aspect="auto")
            for i, index in enumerate(values[:, 0].int().tolist()):
                part.text(i, 0, str(index), ha="center", va="center")
            part.set(xticks=[], yticks=[])
        else:
            picture(part, values, "", "PuOr", centred=True)
        part.set_xlabel(name, fontsize=10)


FIGURES: tuple[Callable[[], Figure], ...] = (matrix, forms, memory, table, decay, growth)


def draw(directory: Path) -> list[Path]:
    """All of them, as SVG."""
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    with plt.rc_context(STYLE):
        for make in FIGURES:
            figure = make()
            found.append(directory / f"{make.__name__}.svg")
            figure.savefig(found[-1], metadata={"Date": None})
            plt.close(figure)
    return found


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
