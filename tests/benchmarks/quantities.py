"""What is asked for, and how it is computed from plain rows.

A result is a dictionary of tensors, so that all engines can be compared with the reference: the loop over single
samples in float64.  `Reducer` is also what a user of a library that returns individual gradients would write, all at
once or chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import persample
from persample.attribution import Projection
from persample.factors import Dense

Result = dict[str, Tensor]
Rows = dict[str, Tensor]  # {name: [n, *P]}

MAX_NORM = 1.0
PROJECTION = Projection(512)
SHOWN = 4  # rows that are compared where the rows are the result


@dataclass(frozen=True)
class Quantity:
    name: str
    title: str
    requests: list[Any]  # of a statistics run; empty where rows have to be kept
    ask: Callable[[Any], Result]  # of `Gradients` or `Statistics`


def rows(g: Any) -> Result:
    return dict(g.dense())


def norm(g: Any) -> Result:
    return {"norm": g.norm()}


def gram(g: Any) -> Result:
    return {"gram": g.gram()}


def clip(g: Any) -> Result:
    return dict(g.clip(MAX_NORM))


def project(g: Any) -> Result:
    return {"project": g.project(PROJECTION)}


def together(g: Any) -> Result:
    return {"norm": g.norm(), **g.variance(), "gram": g.gram()}


QUANTITIES = {
    q.name: q
    for q in (
        Quantity("Q1", "individual gradients", [], rows),
        Quantity("Q1r", "individual gradients, reused memory", [], rows),
        Quantity("Q2", "norms", ["norm"], norm),
        Quantity("Q3", "second moment", ["second_moment"], lambda g: dict(g.second_moment())),
        Quantity("Q4", "variance", ["variance"], lambda g: dict(g.variance())),
        Quantity("Q5", "Gram", ["gram"], gram),
        Quantity("clip", "clipped sum", [("clip", {"max_norm": MAX_NORM})], clip),
        Quantity("project", "projection to 512", [("project", {"projection": PROJECTION})], project),
        Quantity("all", "norms, variance and Gram", ["norm", "variance", "gram"], together),
    )
}


# ---- from plain rows --------------------------------------------------------------------------------------------


@dataclass
class Reducer:
    """A quantity, from rows that come in chunks."""

    quantity: str
    sums: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    n: int = 0

    def update(self, rows: Rows) -> None:
        self.n += len(next(iter(rows.values())))
        if self.quantity in ("Q2", "all", "clip"):
            norms = torch.stack([r.flatten(1).norm(dim=1) for r in rows.values()]).norm(dim=0)
            self.columns.setdefault("norm", []).append(norms)
        if self.quantity in ("Q1", "Q5", "all"):
            for name, r in rows.items():
                self.columns.setdefault(f"rows of {name}", []).append(r)
        if self.quantity in ("Q4", "all"):
            self._add(self.sums, {name: r.sum(0) for name, r in rows.items()})
        if self.quantity in ("Q3", "Q4", "all"):
            self._add(self.squares, {name: r.square().sum(0) for name, r in rows.items()})
        if self.quantity == "clip":
            weight = (MAX_NORM / norms).clamp(max=1)
            self._add(self.sums, {name: torch.einsum("n...,n->...", r, weight) for name, r in rows.items()})
        if self.quantity == "project":
            self.columns.setdefault("project", []).append(projected(rows))

    def result(self) -> Result:
        whole = {name: torch.cat(c) if len(c) > 1 else c[0] for name, c in self.columns.items()}
        kept = {name.removeprefix("rows of "): whole.pop(name) for name in list(whole) if name.startswith("rows of ")}
        match self.quantity:
            case "Q1":
                return kept
            case "Q2" | "project":
                return whole
            case "Q3":
                return {name: s / self.n for name, s in self.squares.items()}
            case "Q4":
                return self._variance()
            case "Q5":
                return {"gram": products(kept)}
            case "clip":
                return self.sums
            case "all":
                return {"norm": whole["norm"], **self._variance(), "gram": products(kept)}
        raise ValueError(self.quantity)

    def _add(self, into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            into[name] = into[name].add_(value) if name in into else value

    def _variance(self) -> Result:
        return {name: s / self.n - (self.sums[name] / self.n).square() for name, s in self.squares.items()}


def products(rows: Rows) -> Tensor:
    return sum((r.flatten(1) @ r.flatten(1).mT for r in rows.values()), start=torch.zeros(()))


def projected(rows: Rows) -> Tensor:
    return sum((PROJECTION.part(name, Dense(r)) for name, r in rows.items()), start=torch.zeros(()))


def reduced(quantity: str, chunks: Iterable[Rows]) -> Result:
    reducer = Reducer("Q1" if quantity == "Q1r" else quantity)
    for rows in chunks:
        reducer.update(rows)
    return reducer.result()


# ---- the reference ----------------------------------------------------------------------------------------------


def reference(model: Any, loss: Any, x: Tensor, y: Tensor) -> dict[str, Result]:
    """All quantities from the rows of the loop in float64."""
    rows = persample.gradients(model, loss, x, y, engine="loop", verify=False).dense()
    found = {name: reduced(name, [rows]) for name in QUANTITIES if name[:2] != "Q1"}
    found["Q4"] = {name: r.var(0, correction=0) for name, r in rows.items()}
    found["all"].update(found["Q4"])
    found["Q1"] = found["Q1r"] = {name: r[:SHOWN].clone() for name, r in rows.items()}
    return found


def error(found: Result, expected: Result) -> float:
    """The largest relative distance over the tensors of a result; 0 to 1e-5 is what float32 can do."""
    worst = 0.0
    for name, b in expected.items():
        a = found[name].detach().double().reshape(len(found[name]), -1)[: len(b)] if b.ndim else found[name].double()
        b = b.double().reshape(a.shape)
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-12)))
    return worst
