"""Statistics of a whole data set, batch by batch: every batch becomes a value, and values add up.

An `Accumulator` holds one value.  ``update(G)`` adds the value of a batch, ``merge_state(other)`` that of another
accumulator, and addition is associative and commutative: any order of the batches and any number of workers gives the
same result up to rounding (but for a ``decay``, and the order of norms).  Where a value belongs to the rows and not to
their batch (moments, norms, histograms), any batching does.  Means and scatters add by Chan's formula, which subtracts
nothing but means, so variances don't cancel.  ``state_dict()`` is made of tensors and numbers; an accumulator that
loads it goes on exactly where it was.  Threads may share one.
"""

from __future__ import annotations

import abc
import copy
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import FunctionType
from typing import Any, Generic, TypeVar

from ..errors import QuantityError
from ..quantities import Quantities

V = TypeVar("V")

adding = threading.Lock()  # of all accumulators, as it is short; one of their own would be in the way of copies
_forking = threading.local()  # whether this thread has taken it to fork: it may be interrupted while it waits


def _before_fork() -> None:
    """A process forks between additions: in the child, nobody would end one."""
    _forking.takes = False
    _forking.takes = adding.acquire()


def _after_fork() -> None:
    if _forking.takes:
        _forking.takes = False
        adding.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def check_alike(mine: Iterable[str], others: Iterable[str]) -> None:
    """Raise for batches of other parameters, or other groups of them."""
    if set(mine) != set(others):
        raise QuantityError(
            f"these are of different parameters or groups ({', '.join(sorted({*mine} ^ {*others})[:3])} in one of them "
            "only); accumulate the same ones (params=, by=) in every batch."
        )


class Accumulator(abc.ABC, Generic[V]):
    """A value that batches add to; final classes say what a batch is worth."""

    needs: tuple[str, ...] | None = None  # the quantities of a statistics run that suffice; None: rows
    kind: type[Any]  # V, a dataclass

    def __init__(self) -> None:
        self.value: V | None = None

    @abc.abstractmethod
    def of(self, G: Quantities) -> V:
        """The value of one batch."""

    def update(self, G: Quantities) -> None:
        """Add one batch."""
        self._add(self.of(G))

    def merge_state(self, other: Accumulator[V]) -> None:
        """Add all batches that another accumulator has seen."""
        same = type(other) is type(self) and other._settings() == self._settings()
        # Two functions may have one name, such as two lambdas of one place.
        functions = {name: f for name, f in vars(self).items() if isinstance(f, FunctionType)}
        if not same or any(vars(other)[name] is not f for name, f in functions.items()):
            raise QuantityError(f"can't merge {other!r} into {self!r}: they don't accumulate the same thing.")
        if other.value is not None:
            self._add(other.value)

    def compute(self) -> Any:
        """What was accumulated so far; the caller's to change."""
        return copy.deepcopy(self._seen())

    def reset(self) -> None:
        """Forget everything."""
        self.value = None

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, as tensors and numbers (safe for ``torch.save`` and ``weights_only=True``)."""
        value = None if self.value is None else {f.name: getattr(self.value, f.name) for f in fields(self.value)}  # type: ignore[arg-type]
        return {"settings": self._described(), "value": copy.deepcopy(value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another accumulator of the same class and settings was (functions go by their names)."""
        if not isinstance(state, Mapping) or not {"settings", "value"} <= state.keys():
            raise QuantityError(f"this is no state of a {type(self).__name__}: give what its state_dict() returned.")
        if state["settings"] != self._described():
            raise QuantityError(
                f"this state is of settings {state['settings']}, the accumulator has {self._described()}."
            )
        self.value = None if state["value"] is None else self.kind(**copy.deepcopy(state["value"]))

    def _described(self) -> dict[str, Any]:
        """What a state has to agree in: the settings, and of what class they are."""
        return {"class": type(self).__qualname__, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {}

    def _add(self, value: V) -> None:
        with adding:
            self.value = value if self.value is None else self.value + value  # type: ignore[operator]

    def _seen(self) -> V:
        if self.value is None:
            raise QuantityError(f"{type(self).__name__} has seen no sample yet: call update(G) first.")
        return self.value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._settings().items())})"
