"""The result of a run that reduces on arrival: some quantities, and no rows.

The factors of a parameter are reduced the moment they are complete, and dropped, so that peak memory stays near that of
the plain backward pass; only a clipped sum keeps them until all norms are known.  What is asked for shares parts: norms
are read off a Gram matrix, sums and second moments come with a variance, and rows that several parts would stream are
formed once.  What is not asked for is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import cost, display, doubt
from .errors import InplaceError, QuantityError
from .factors import Factors, compact, dtype, nbytes
from .kept import Kept, Stamp, stamps
from .problem import Pass
from .quantities import CHECKS, NEEDS, PARTS, READ_OFF, READERS, Parts, Quantities
from .streaming import formed, shared_split

Request = str | tuple[str, dict[str, Any]]


class Statistics(Quantities):
    """The quantities that were asked for by ``quantities=``, with the methods of `Gradients`; others raise
    `QuantityError`.  Results are the run's own: once one of them was changed in place, asking again raises
    `InplaceError`.
    """

    def __init__(self, requests: Iterable[Request], parameters: Mapping[str, Tensor], wrapper: str = "") -> None:
        """``wrapper``: what is before names that isn't the model's."""
        self.requests = _once(map(_normal, listed(requests)))
        if not self.requests:
            raise QuantityError(f"quantities= is empty; ask for some of {list(NEEDS)}.")
        self.names, self.shapes = tuple(parameters), {name: p.shape for name, p in parameters.items()}
        self._parameters = parameters
        self._at: dict[str, Stamp] = {}
        self._wrapper = wrapper
        self.unused: tuple[str, ...] = ()
        self.note = ""  # what `Gradients` would carry: a notion under BatchNorm, how rows were verified
        self._n = 0
        self._kinds: dict[str, torch.dtype] = {}  # of the rows; their parts are kept in no less than single precision
        kinds = list({NEEDS[name]: None for name in self.requests})
        self._stored: dict[str, Parts] = {kind: {} for kind in kinds}
        computed = ["moments", *kinds] if "variance" in kinds and {"sum", "mean_square"} & {*kinds} else kinds
        self._computed = [kind for kind in computed if READ_OFF.get(kind, ("", None))[0] not in computed]
        self._readers = [kind for kind in self._computed if kind in READERS]
        self._pieces = {
            kind: self._split(kind, self._argument(kind)) if kind in ("dot", "project") else dict.fromkeys(self.names)
            for kind in self._computed
        }
        self._stamps = {kind: _stamps(self._argument(kind)) for kind in kinds if kind in ("dot", "project")}
        if isinstance(bound := self.requests.get("clip", {}).get("max_norm"), Tensor):
            self.requests["clip"] = {"max_norm": bound.item()}
        self._kept: dict[str, Kept] = {}
        self._clipped: dict[str, Tensor] | None = None
        self._doubtful: dict[str, tuple[Kept, list[Tensor]]] = {}  # whose checks were put off
        self._versions: dict[str, list[int]] = {}  # of the parts of a kind, when they were first read

    def _argument(self, kind: str) -> Any:
        options = self.requests[kind]
        if len(options) != 1:
            raise QuantityError(
                f"ask for {kind} with its argument: quantities=[('{kind}', {{'{OPTIONS[kind]}': ...}})]."
            )
        return next(iter(options.values()))

    def emit(self, name: str, g: Factors) -> None:
        """Reduce the factors of one parameter."""
        self._n, self._kinds[name] = len(g), dtype(g)
        if "clip" in self.requests:  # whose factors are needed once more when all norms are known
            g = compact(g, own=False)  # nobody is handed the rows
            self._kept[name] = Kept.of(name, g)
        with doubt.collected() as flags:
            self._take(name, g)
        self._doubtful.pop(name, None)  # of a run that is tried again
        if flags:
            self._doubtful[name] = Kept.of(name, g), flags
            if sum(nbytes(kept.factors) for kept, _ in self._doubtful.values()) > cost.costs().held:
                self._settle()

    def settled(self, name: str) -> bool:
        """Whether the parts of this parameter are final, and nothing else will be made of them."""
        return name not in self._doubtful and "clip" not in self.requests

    def _settle(self) -> None:
        """Look at the checks that were put off, and compute again what is doubtful."""
        held, self._doubtful = self._doubtful, {}
        for name in doubt.raised({name: flags for name, (_, flags) in held.items()}):
            self._take(name, held[name][0].read())

    def _take(self, name: str, g: Factors) -> None:
        """Compute the parts of one parameter; those that stream their rows from the same blocks."""
        several = len(self._readers) > 1
        split = shared_split(g) if several or (self._readers and "project" in self._stored) else ""
        if split == "whole":
            for whole in formed(g, split):
                self._reduce(name, whole, {})
        elif split and several:
            found = [[PARTS[kind](piece, None) for kind in self._readers] for piece in formed(g, split)]
            parts = zip(self._readers, zip(*found, strict=True), strict=True)
            self._reduce(name, g, {kind: READERS[kind](list(p), split, g.shape) for kind, p in parts})
        else:
            self._reduce(name, g, {})

    def _reduce(self, name: str, g: Factors, found: Parts) -> None:
        """Store the parts of one parameter, of which some were ``found`` already."""
        computed = {k: found[k] if k in found else PARTS[k](g, self._pieces[k][name]) for k in self._computed}
        for kind, parts in self._stored.items():
            if kind in computed:
                parts[name] = computed[kind]
            else:
                source, read_off = READ_OFF[kind]
                parts[name] = read_off(computed[source], len(g))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, name: str) -> NoReturn:
        """There are no rows."""
        raise QuantityError(f"this run has kept no rows, so there is none of {name!r}: leave quantities= out for them.")

    def dense(self, *_: Any, **__: Any) -> NoReturn:
        """There are no rows."""
        raise QuantityError("this run has kept no rows: leave quantities= out for them.")

    flat = dense

    def finish(self, run: Pass, note: str = "") -> Statistics:
        """Look at what was put off, take what the engine reports, and make the clipped sum."""
        self._settle()
        self.report(run, note)
        if "clip" in self.requests:
            self._clipped = super().wide_clip(**self.requests["clip"])
        return self

    def report(self, run: Pass, note: str) -> None:
        """Take what the engine reports, and bring the parts into the order of the parameters."""
        self.losses, self.outputs, self.unused, self.note = run.losses, run.outputs, run.unused, note
        self._at = stamps(self._parameters)
        for parts in self._stored.values():
            ordered = {name: parts[name] for name in self.names if name in parts}
            parts.clear()
            parts.update(ordered)

    def forget(self, name: str) -> None:
        """Drop a quantity that was only needed in between."""
        del self.requests[name], self._stored[NEEDS[name]]

    def _parts(self, kind: str, argument: Any = None) -> Parts:
        if kind not in self._stored:
            raise _not_asked(" or ".join(repr(name) for name, need in NEEDS.items() if need == kind), self.requests)
        if argument is not None and (argument is not self._argument(kind) or _stamps(argument) != self._stamps[kind]):
            raise QuantityError(
                f"this run computed {kind} for another argument (or for what this one was before it was changed); the "
                "rows are gone."
            )
        return self._intact(kind, self._stored[kind])

    def _intact(self, kind: str, parts: Parts) -> Parts:
        """The parts, which are handed out as they are, unless somebody has changed them."""
        versions = [part._version for part in parts.values()]
        if self._versions.setdefault(kind, versions) != versions:
            asked = [name for name in self.requests if kind in (name, NEEDS[name])]
            raise InplaceError(
                f"a result of this run ({', '.join(asked)}) was changed in place since, and there is only one of it. "
                "Change a clone() instead, and run again for what was lost."
            )
        return parts

    def _weighted(self, weight: Tensor | None) -> dict[str, Tensor]:
        if weight is None:
            return self._parts("sum")
        if not self._kept:
            raise QuantityError(
                "a weighted sum needs the rows, which this run has not kept: compute gradients without quantities=, or "
                "let loss_fn return the losses times their weights, [N], and ask for 'sum'."
            )
        return {name: self._kept.pop(name).weighted_sum(weight) for name in self.names}

    def _kind(self, name: str) -> torch.dtype:
        return self._kinds[name]

    def clip(self, max_norm: float | None = None) -> dict[str, Tensor]:
        """The clipped sum of this run; see `Gradients.clip`."""
        return self._rounded(self.wide_clip(max_norm))

    def wide_clip(self, max_norm: float | None = None) -> dict[str, Tensor]:
        """`clip` in no less than single precision: for what is computed from it."""
        if self._clipped is None:
            raise _not_asked("'clip'", self.requests)
        if max_norm is not None and max_norm != self.requests["clip"]["max_norm"]:
            raise QuantityError(
                f"this run clipped at {self.requests['clip']['max_norm']}, and the rows are gone, but "
                f"max_norm={max_norm} is asked for (in a step, by the optimizer): give both the same."
            )
        return dict(self._intact("clip", self._clipped))

    def variance(self, ddof: int | None = None) -> dict[str, Tensor]:
        """The variance; with the ``ddof`` that this run was asked for, unless another is given."""
        return super().variance(self.requests.get("variance", {}).get("ddof", 0) if ddof is None else ddof)

    def std(self, ddof: int | None = None) -> dict[str, Tensor]:
        """The square root of `variance`, with the ``ddof`` that this run was asked for, unless another is given."""
        asked = {**self.requests.get("variance", {}), **self.requests.get("std", {})}
        return super().std(asked.get("ddof", 0) if ddof is None else ddof)

    def dot(self, direction: Any = None) -> Tensor:
        """The directional derivatives of this run; see `Gradients.dot`."""
        return super().dot(direction)

    def project(self, projection: Any = None) -> Tensor:
        """The projected rows of this run; see `Gradients.project`."""
        return super().project(projection)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: results, and not how they came about."""
        return {
            **super().__getstate__(),
            "_pieces": {},
            "_stamps": dict(self._stamps),
            "_versions": {},
            "_doubtful": {},
        }

    def __repr__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"Statistics(N={len(self)}, parameters={len(self.names)}, quantities={list(self.requests)}{note})"

    def _repr_html_(self) -> str:
        return display.statistics_html(self)


# What may be said about a quantity, beside its name.
OPTIONS = {"clip": "max_norm", "variance": "ddof", "std": "ddof", "dot": "direction", "project": "projection"}


def _stamps(argument: Any) -> list[int]:
    """The versions of its tensors: whether an argument is what it was."""
    return [x._version for x in tree_leaves(argument) if isinstance(x, Tensor)]


def listed(requests: Any) -> list[Request]:
    """What ``quantities=`` asks for; a name alone is a list of one."""
    if isinstance(requests, str):
        return [requests]
    if not isinstance(requests, Iterable):
        raise QuantityError(
            f"quantities= must be a list of names or (name, options) pairs, got {requests!r}; there are {list(NEEDS)}."
        )
    return list(requests)


def _once(requests: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Every quantity with its options, which can be given only once."""
    found: dict[str, dict[str, Any]] = {}
    for name, options in requests:
        before = found.setdefault(name, options)
        if before is not options and [*map(id, before.values())] != [*map(id, options.values())]:
            raise QuantityError(
                f"quantities= asks for {name!r} twice, with different options: one run gives one of them. Make two "
                "runs, or keep the rows."
            )
    return found


def _normal(request: Any) -> tuple[str, dict[str, Any]]:
    pair = (request, {}) if isinstance(request, str) else request
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Mapping)):
        raise QuantityError(
            f"quantities= must be a list of names or (name, options) pairs, with options a dict; got {request!r} in it."
        )
    name, options = pair
    if name not in list(NEEDS):
        raise QuantityError(f"unknown quantity {name!r}; a statistics run offers {list(NEEDS)}.{_of_statistics(name)}")
    if unknown := [option for option in options if option != OPTIONS.get(name)]:
        way = f"its option is {OPTIONS[name]!r}" if name in OPTIONS else "it has none"
        if unknown[0] == "per_parameter" and name == "clip":
            way += ". For a bound of every layer, keep the rows: G.select(layer).clip(max_norm)"
        elif unknown[0] == "per_parameter" and name in ("norm", "squared_norm", "gram"):
            way += f". Ask for {name!r}, and the result for its {name}(per_parameter=True)"
        raise QuantityError(f"quantity {name!r} has no option {unknown[0]!r}: {way}.")
    if name == "clip" and "max_norm" not in options:
        raise QuantityError("ask for clip with its bound: quantities=[('clip', {'max_norm': 1.0})].")
    CHECKS.get(name, lambda _: None)(next(iter(options.values()), 0))
    return name, dict(options)


def _of_statistics(name: Any) -> str:
    """The way to what is no quantity, but computed from some; begins with a space."""
    from . import statistics  # which is made of runs

    if name not in statistics.__all__:
        return ""
    how = f"statistics.{name}(S)" if name.islower() else f"statistics.{name}(...).update(S)"
    return (
        f" {name} is in persample.statistics: ask for what its docstring says that it needs (for noise_scale, "
        f"quantities=['norm', 'mean']), and call {how}."
    )


def _not_asked(kind: str, requests: dict[str, Any]) -> QuantityError:
    return QuantityError(
        f"this run was asked for {list(requests)} only, and has not kept the rows for {kind}. Add it to "
        "quantities=, or leave quantities= out."
    )
