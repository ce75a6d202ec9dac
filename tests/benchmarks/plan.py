"""Which cases there are."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

from .case import Case

# Rows from these cost the same whatever is computed of them: some quantities tell it all.
FEW = {
    "persample, vmap": {"Q1", "Q2", "Q5"},
    "persample, compiled": {"Q1", "Q2"},
    "persample, loop": {"Q1", "Q2"},
    "torch.func, compiled": {"Q2"},
    "TorchJD": {"Q1", "Q2", "Q5"},
    "TRAK": {"project"},
}
ALONE = {"persample, max_bytes": {"clip"}, "Opacus, ghost clipping": {"Q2", "clip"}}
AXIS_ENGINES = {"persample": ("Q2", "Q4", "Q5"), "torch.func": ("Q2",)}


def cells(workloads: list[str], quantities: list[str], engines: list[str], *, every: bool = False) -> Iterator[Case]:
    """Cell by cell, all engines next to each other."""
    from .engines import OURS
    from .peers import PEERS
    from .quantities import QUANTITIES
    from .workloads import FULL

    for w in chosen(FULL, workloads):
        yield Case(w, "reference", "reference")
        for q in chosen(QUANTITIES, quantities):
            for e in chosen({**OURS, **PEERS}, engines):
                if q in ALONE.get(e, {q}) and (every or q in FEW.get(e, {q})):
                    yield Case(w, q, e)


def around(workloads: list[str]) -> Iterator[Case]:
    """What surrounds a run of norms."""
    from .engines import AROUND
    from .workloads import FULL

    for w in chosen(FULL, workloads):
        for e in AROUND:
            yield Case(w, "Q2", e)


def scaling() -> Iterator[Case]:
    from .workloads import AXES

    for axis, sizes in AXES.items():
        for size in sizes:
            for e, quantities in AXIS_ENGINES.items():
                for q in quantities:
                    yield Case(f"{axis}={size}", q, e)


def chosen(names: dict[str, object], patterns: list[str]) -> list[str]:
    """The names that a pattern means, or all; raises for a pattern that means none."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"{pattern!r} means none of {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
