"""What arguments may be: numbers in a range, counts, one of some words; anything else is refused by name."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from .errors import ArgumentError


def number(x: Any) -> float:
    """A finite number as such; NaN for anything else, which compares with nothing."""
    x = x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
    return float(x) if isinstance(x, Real) and math.isfinite(x) else math.nan


def check_module(model: Any) -> None:
    """Raise for what is no module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")


def check_positive(**options: Any) -> None:
    """Raise for an argument that is no positive number."""
    for name, value in options.items():
        if not number(value) > 0:
            raise ArgumentError(f"{name} must be a positive and finite number, got {value!r}.")


def check_at_least(minimum: float, **options: Any) -> None:
    """Raise for an argument that is no finite number, or below its minimum."""
    for name, value in options.items():
        if not number(value) >= minimum:
            raise ArgumentError(f"{name} must be a finite number, {minimum:g} or more, got {value!r}.")


def check_samples(samples: int, name: str = "samples", of: str = "targets") -> None:
    """Raise for a number of draws that is none."""
    if not isinstance(samples, Integral) or isinstance(samples, bool) or samples < 1:
        raise ArgumentError(f"{name} must be a positive integer (how many {of} are drawn), got {samples!r}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise for an option that is none of the known ones."""
    if value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
