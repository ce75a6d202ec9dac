"""Checks of results that may have lost their digits, without a wait for the device at each of them.

Where the terms of a sum nearly cancel, kernels compute it in another way.  On the CPU they look at the result at once.
A device would first have to catch up with all that it was given to do, for every parameter.  So there kernels go on as
if nothing were lost, `collected` gathers what they wanted to know, and whoever asked for the results looks at many of
them at a time, and computes the doubtful ones again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_collecting: ContextVar[list[Tensor] | None] = ContextVar("doubts", default=None)


def waits(device: torch.device) -> bool:
    """Whether reading a number makes the host wait."""
    return device.type != "cpu"


class collected:
    """The checks that were put off inside the block: each one boolean, true where a result is doubtful."""

    def __enter__(self) -> list[Tensor]:
        flags: list[Tensor] = []
        self._token = _collecting.set(flags)
        return flags

    def __exit__(self, *_: object) -> None:
        _collecting.reset(self._token)


def doubtful(flag: Tensor) -> bool:
    """What ``flag`` says; or "no" for now, where asking would wait and somebody collects."""
    flags = _collecting.get()
    if flags is None or not waits(flag.device):
        return bool(flag)
    flags.append(flag)
    return False


def raised(flags: Mapping[str, list[Tensor]]) -> list[str]:
    """The names of which some flag is true, in one wait (or one per device)."""
    asked = {name: torch.stack(own).any() for name, own in flags.items() if own}
    if len({flag.device for flag in asked.values()}) > 1:
        return [name for name, flag in asked.items() if flag]
    answers = torch.stack([*asked.values()]).tolist() if asked else []
    return [name for name, answer in zip(asked, answers, strict=True) if answer]


def computed(names: Iterable[str], compute: Callable[[str], T]) -> dict[str, T]:
    """``{name: compute(name)}``, looked at when all of them are there."""
    found: dict[str, T] = {}
    flags: dict[str, list[Tensor]] = {}
    for name in names:
        with collected() as flags[name]:
            found[name] = compute(name)
    return found | {name: compute(name) for name in raised(flags)}
