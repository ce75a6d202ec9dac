"""Every example runs to its end, its own assertions included, without a warning, and leaves a picture to be read."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from readable import readable

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# What takes minutes runs on less here, and in full with its own command.
SMALLER = {
    "attribution": {"PERSAMPLE_ATTRIBUTION_TRAIN": "500", "PERSAMPLE_ATTRIBUTION_MODELS": "100"},
    "optimizers": {"PERSAMPLE_OPTIMIZERS_SEEDS": "1"},
}


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SMALLER.get(path.stem, {}).items():
        monkeypatch.setenv(name, value)
    plt.close("all")
    try:
        runpy.run_path(str(path), run_name="__main__")
        assert plt.get_fignums()
        for number in plt.get_fignums():
            readable(plt.figure(number))
    finally:
        plt.close("all")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_pictures_are_described(path: Path) -> None:
    """A cell that draws has a text for those who don't see it."""
    cells = re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)
    drawing = [cell for cell in cells if re.search(r"plt\.show\(\)|savefig|\.plot\(\)", cell)]
    assert drawing
    for cell in drawing:
        assert re.match(r' mystnb=\{"image": \{"alt": "[^"]{20,}"\}\}\n', cell), f"no text for {cell[:200]}"
