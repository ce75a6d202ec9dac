"""Tables for people: the same rows in a terminal (``str``) and in a notebook (``_repr_html_``), with small bars."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Columns aligned by spaces."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    width = [max(len(row[i]) for row in lines) for i in range(len(header))]
    out = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in lines]
    out.insert(1, "  ".join("-" * w for w in width))
    return "\n".join([title, *out] if title else out)


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    bars: Sequence[float] | None = None,
    marks: Sequence[str] | None = None,
    bar_name: str = "",
) -> str:
    """The same as HTML; ``bars`` (0 to 1) adds a small bar to the end of every row, ``marks`` a dot of that colour to
    its beginning.
    """
    body = []
    for i, row in enumerate(rows):
        mark = "" if marks is None else _td(_dot(marks[i]), "td")
        bar = "" if bars is None else _td(_bar(bars[i]), "td")
        body.append(f"<tr>{mark}{''.join(_td(escape(str(c)), 'td') for c in row)}{bar}</tr>")
    names = [*([] if marks is None else [""]), *header, *([] if bars is None else [bar_name])]
    head = "".join(_td(escape(name), "th") for name in names)
    style = "text-align:left;caption-side:top;padding:2px 8px"
    caption = f"<caption style='{style}'>{escape(title)}</caption>" if title else ""
    table = "<div style='overflow-x:auto'><table style='border-collapse:collapse'>"
    return f"{table}{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _td(content: str, tag: str) -> str:
    drawn = content.startswith("<")  # a dot, a bar; and a shape or a size is not to be broken
    wrap = "white-space:nowrap" if drawn or len(content) <= 24 else "min-width:12em"
    return f"<{tag} style='text-align:left;padding:2px 8px;border:none;{wrap}'>{content}</{tag}>"


def _bar(share: float) -> str:
    width = max(0.0, min(1.0, share)) * 80
    return f"<div style='background:#0072B2;height:10px;width:{width:.0f}px'></div>"


def _dot(colour: str) -> str:
    return f"<div style='background:{colour};height:10px;width:10px;border-radius:5px'></div>"


def bytes_text(size: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
