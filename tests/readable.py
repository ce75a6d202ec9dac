"""Whether people can read what a figure says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def readable(figure: Figure) -> None:
    """No text is too small, cut off, or on top of another one."""
    width, height = figure.canvas.get_width_height()
    texts = drawn_texts(figure)
    assert texts
    for text, box in texts:
        assert text.get_fontsize() >= 7, text
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2, f"cut off: {text}"
    for (a, first), (b, second) in itertools.combinations(texts, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        along = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across < 2 or along < 2, f"{a} is on top of {b}"


def drawn_texts(figure: Figure) -> list[tuple[Text, Any]]:
    """Those that really come onto the canvas (ticks beyond the limits of an axis don't), and where."""
    found: list[Text] = []
    draw = Text.draw

    def noted(text: Text, renderer: Any, *args: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            found.append(text)
        draw(text, renderer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figure.canvas.draw()  # a glyph that the font doesn't have is a warning, and so an error
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return [(text, text.get_window_extent(renderer)) for text in found]
