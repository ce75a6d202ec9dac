"""What is said of samples whose targets are all ignored: once for a call of the user's, at its end, by the numbers that
they have in the user's batch; however many passes the call takes, and whichever samples each of them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

from .capture import unrecorded
from .errors import warn

P = ParamSpec("P")
R = TypeVar("R")

_HEARD: ContextVar[set[int] | None] = ContextVar("heard", default=None)  # in the call that runs
_NUMBERS: ContextVar[Sequence[int] | None] = ContextVar("numbers", default=None)  # of the samples that are run


def telling(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function say once which samples are ignored in it, as part of another that does so nothing of its own; and
    run its passes unseen by recordings that the user has begun.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with unrecorded():
            if _HEARD.get() is not None:
                return function(*args, **kwargs)
            heard = set[int]()
            token = _HEARD.set(heard)
            try:
                result = function(*args, **kwargs)
            finally:
                _HEARD.reset(token)
        _say(heard)
        return result

    return run


@contextmanager
def numbered_as(samples: Sequence[int]) -> Iterator[None]:
    """Inside, the batch that is run is made of these samples of the one before."""
    outer = _NUMBERS.get()
    token = _NUMBERS.set(samples if outer is None else [outer[n] for n in samples])
    try:
        yield
    finally:
        _NUMBERS.reset(token)


def tell(samples: Iterable[int]) -> None:
    """These samples of the batch that is run are ignored."""
    numbers, heard = _NUMBERS.get(), _HEARD.get()
    found = {n if numbers is None else numbers[n] for n in samples}
    if heard is None:
        _say(found)
    else:
        heard |= found


def _say(samples: set[int]) -> None:
    if samples:
        warn(f"every target of sample(s) {sorted(samples)} is ignored: losses and gradients are set to zero.")
