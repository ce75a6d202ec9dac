"""Table and plots, from the files of the cases.

`write` puts the text between the markers of ``docs/benchmark.md``, and the plots into ``docs/_static``; a part or a
toy run goes to ``build/benchmarks`` instead.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .case import Options
from .engines import AROUND, OURS
from .peers import PEERS, versions
from .quantities import QUANTITIES
from .workloads import FULL

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- results: written by `make benchmark` -->", "<!-- end of results -->"
ROWS_LAST = [q for q in QUANTITIES if q[:2] != "Q1"]

Found = dict[tuple[str, str, str], dict[str, Any]]  # (workload, quantity, engine) -> figures


def load(options: Options) -> Found:
    folder = options.folder / ("toy" if options.toy else "full")
    cases = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(c["workload"], c["quantity"], c["engine"]): c for c in cases}


def write(options: Options, *, into_docs: bool) -> None:
    found = load(options)
    text = "\n\n".join(block for block in blocks(found, options) if block) + "\n"
    if into_docs:
        page = DOCS / "benchmark.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")
        plots = DOCS / "_static"
    else:
        page, plots = options.folder / "results.md", options.folder
        page.write_text(text)
    from . import plot

    plots.mkdir(exist_ok=True)
    plot.compared(found, plots / "benchmark.svg")
    plot.scaling(found, plots / "scaling.svg")
    print(f"wrote {os.path.relpath(page)}")


# ---- the text ---------------------------------------------------------------------------------------------------


def blocks(found: Found, options: Options) -> Iterable[str]:
    yield machine(options)
    yield "### This library, the best of its engines"
    yield _table("", QUANTITIES, {w: [_best(found, w, q, OURS) for q in QUANTITIES] for w in FULL})
    yield spread(found)
    yield "### The best of the others"
    yield _table("", QUANTITIES, {w: [_best(found, w, q, PEERS, named=True) for q in QUANTITIES] for w in FULL})
    yield "### Peak memory"
    ours = [(q, "persample") for q in ROWS_LAST] + [("clip", "persample, max_bytes")]
    names = [*ROWS_LAST, "clip, max_bytes"]
    yield _table("", names, {w: [_memory(found, w, q, [e]) for q, e in ours] for w in FULL})
    yield "The least of the others:"
    yield _table("", ROWS_LAST, {w: [_memory(found, w, q, PEERS) for q in ROWS_LAST] for w in FULL})
    yield "### What surrounds the kernels"
    yield _table("", AROUND, {w: around(found, w) for w in FULL})
    yield "### Every engine"
    for w, workload in FULL.items():
        yield f"**{w}**: {workload.title}"
        yield every(found, w)
    yield "### Largest relative error"
    yield errors(found)
    yield "### What refuses"
    yield refusals(found)


def machine(options: Options) -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    python = f"Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {options.threads} threads; float32; {python}, {listed}."


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _ratios(
    found: Found, w: str, q: str, engines: Iterable[str], key: Callable[[dict[str, Any]], float]
) -> dict[str, float]:
    cases = {e: found.get((w, q, e), {}) for e in engines}
    return {e: key(c) for e, c in cases.items() if "ratio" in c and c.get("error", 0) < 0.1}


def _best(found: Found, w: str, q: str, engines: Iterable[str], named: bool = False) -> str:
    ratios = _ratios(found, w, q, engines, lambda c: c["ratio"])
    if not ratios:
        return ""
    engine = min(ratios, key=lambda e: ratios[e])
    return f"{_number(ratios[engine])} {engine}" if named else _number(ratios[engine])


def _memory(found: Found, w: str, q: str, engines: Iterable[str]) -> str:
    ratios = _ratios(found, w, q, engines, lambda c: c["bytes"] / c["plain_bytes"] if "bytes" in c else float("inf"))
    return _number(min(ratios.values())) if ratios and min(ratios.values()) < float("inf") else ""


def around(found: Found, w: str) -> list[str]:
    """Ratios of what surrounds a run of norms; verification and criterion as what they add."""
    ratios = {e: found.get((w, "Q2", e), {}).get("ratio") for e in [*AROUND, "persample"]}
    base = {"verify": ratios["persample"], "criterion": ratios["persample"], "capture": 1.0, "floor": 0.0}
    return ["" if ratios[e] is None or base[e] is None else _number(ratios[e] - base[e]) for e in AROUND]


def spread(found: Found, most: int = 4) -> str:
    """How far the middle half of a figure's pairs is spread, typically and at most."""
    cells = {
        (w, q, e): (c["high"] - c["low"]) / c["ratio"]
        for (w, q, e), c in found.items()
        if w in FULL and q in QUANTITIES and e in OURS and "ratio" in c
    }
    if not cells:
        return ""
    widest = sorted(cells, key=lambda cell: -cells[cell])[:most]
    listed = (f"{w} {q}, {e} ({found[w, q, e]['low']:.2f} to {found[w, q, e]['high']:.2f})" for w, q, e in widest)
    typical = 100 * statistics.median(cells.values())
    figures = f"The middle half of the pairs of a cell spans {typical:.0f} % of its figure"
    return f"{figures} (median over all cells of this library); the most in {'; '.join(listed)}."


def every(found: Found, w: str) -> str:
    rows = {}
    least = {
        q: min(_ratios(found, w, q, [*OURS, *PEERS], lambda c: c["ratio"]).values(), default=0) for q in QUANTITIES
    }
    for e in [*OURS, *PEERS]:
        cells = []
        for q in QUANTITIES:
            case = found.get((w, q, e), {})
            cell = _number(case["ratio"]) if "ratio" in case else "" if not case or case.get("unserved") else "refused"
            cells.append(f"**{cell}**" if case.get("ratio") == least[q] else cell)
        if any(cells):
            rows[e] = cells
    return _table("", QUANTITIES, rows)


def errors(found: Found) -> str:
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for (_, q, e), case in found.items():
        if "error" in case and e in {**OURS, **PEERS}:
            worst[e][q] = max(worst[e].get(q, 0), case["error"])
    return _table("", QUANTITIES, {e: [f"{v[q]:.0e}" if q in v else "" for q in QUANTITIES] for e, v in worst.items()})


def refusals(found: Found) -> str:
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (w, q, e), case in found.items():
        if "failed" in case and not case.get("unserved"):
            message = re.sub(r"/\S*/", "", " ".join(case["message"].split()))
            groups[e, f"{case['failed']}: {message[:160]}{'...' if len(message) > 160 else ''}"][w].append(q)
    lines = []
    for (e, message), cells in sorted(groups.items()):
        where = "; ".join(f"{w} {', '.join(qs)}" for w, qs in sorted(cells.items()))
        lines.append(f"* {e} ({where}): `{message.replace('`', chr(39))}`")
    return "\n".join(lines) or "Nothing."


def _table(corner: str, columns: Iterable[str], rows: dict[str, list[str]]) -> str:
    head = [corner, *columns]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 100 else f"{x:.0f}"
