"""Everything that can be drawn is drawn: into given axes and into fresh ones, labelled, all of its text readable."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from readable import readable
from torch import nn

import persample
from persample import batchnorm

matplotlib.use("Agg")
DOCS = Path(__file__).parent.parent / "docs"
CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


def data(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def coupled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def unused() -> nn.Module:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = plain(), nn.Linear(2, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    return Some()


def several() -> list[persample.Coupling]:
    return [persample.coupling(coupled(), CE, *data(n)) for n in (8, 16, 32)]


# What draws, and what is drawn: a name, and a function of nothing that gives a function of `ax=`.
DRAWN: dict[str, Callable[[], Callable[..., Axes]]] = {
    "gradients": lambda: persample.gradients(plain(), CE, *data()).plot,
    "statistics": lambda: persample.gradients(plain(), CE, *data(), quantities=["norm"]).plot,
    "check": lambda: persample.check(plain(), CE, *data()).plot,
    "check, unused": lambda: persample.check(unused(), CE, *data()).plot,
    "check, coupled": lambda: persample.check(coupled(), CE, *data()).plot,
    "explain": lambda: persample.explain(plain(), CE, *data()).plot,
    "jacobian": lambda: batchnorm.jacobian(nn.BatchNorm1d(5).double(), data()[0]).plot,
    "coupling": lambda: persample.coupling(coupled(), CE, *data()).plot,
    "layers": lambda: with_first(batchnorm.plot_layers, persample.coupling(coupled(), CE, *data())),
    "spectrum": lambda: with_first(batchnorm.plot_spectrum, persample.coupling(coupled(), CE, *data())),
    "notions": lambda: with_first(batchnorm.plot_notions, persample.coupling(coupled(), CE, *data())),
    "decay": lambda: with_first(batchnorm.plot_decay, several()),
}


def with_first(draw: Callable[..., Axes], first: Any) -> Callable[..., Axes]:
    return lambda ax=None: draw(first, ax=ax)


def test_every_plot_of_the_library_is_here() -> None:
    """One that is added is noticed."""
    sources = (Path(persample.__file__).parent).rglob("*.py")
    found = sorted(x for path in sources for x in re.findall(r"^ *def (plot\w*)\(", path.read_text(), re.MULTILINE))
    methods = ["plot"] * 6  # Quantities, CheckReport, Explanation, BatchNormJacobian, its drawing, Coupling
    assert found == sorted(
        [*methods, *("plot_" + x for x in ("decay", "errors", "layers", "norms", "notions", "sizes", "spectrum"))]
    )


@pytest.mark.parametrize("name", DRAWN)
def test_drawn(name: str) -> None:
    draw = DRAWN[name]()
    before = plt.get_fignums()
    figure, given = plt.subplots(layout="constrained")
    assert draw(ax=given) is given
    assert plt.get_fignums() == [*before, figure.number]  # nothing opened beside
    fresh = draw()
    assert fresh is not given and fresh.figure is not figure
    for ax in (given, fresh):
        assert ax.has_data() and ax.get_title() and ax.get_xlabel()
        assert ax.get_ylabel() or all(label.get_text() for label in ax.get_yticklabels())
        readable(ax.figure)


@pytest.mark.parametrize("make", runpy.run_path(str(DOCS / "figures.py"))["FIGURES"], ids=lambda make: make.__name__)
def test_figure_of_the_documentation(make: Callable[[], Figure], tmp_path: Path) -> None:
    figure = make()
    readable(figure)
    figure.savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert any(f"figures/{make.__name__}.svg" in page.read_text() for page in DOCS.glob("*.md")), "no page shows it"


def test_pages_show_figures_that_exist() -> None:
    drawn = {make.__name__ for make in runpy.run_path(str(DOCS / "figures.py"))["FIGURES"]}
    for page in DOCS.rglob("*.md"):
        for alternative, name in re.findall(r"!\[([^\]]*)\]\(figures/(\w+)\.svg\)", page.read_text()):
            assert name in drawn
            assert len(alternative) > 20, f"{page.name}: {name} needs a text for those who don't see it"


@pytest.mark.parametrize("fault", ["on top of", "cut off"])
def test_a_bad_figure_is_noticed(fault: str) -> None:
    figure = plt.figure()
    for place in (0.5, 0.52 if fault == "on top of" else 0.99):
        figure.text(place, 0.5, "a label")
    with pytest.raises(AssertionError, match=fault):
        readable(figure)
