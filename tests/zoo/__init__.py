"""The zoo: small models, each named for the one difficulty it holds. `cases` is the test matrix's one list.

A new layer or difficulty is one line in the list of its family's file; every engine and quantity is then tested on it.
"""

from __future__ import annotations

from . import (
    attention,
    conv,
    coupled,
    embedding,
    huggingface,
    interface,
    linear,
    losses,
    nets,
    norm,
    recurrent,
    rest,
    sharing,
)
from .case import Case, Problem, call, problem, sample, size, take

_families = (
    linear, conv, norm, embedding, sharing, interface, losses, nets, attention, recurrent, rest, huggingface, coupled,
)  # fmt: skip
cases: list[Case] = [case for family in _families for case in family.cases]

__all__ = ["Case", "Problem", "call", "cases", "problem", "sample", "size", "take"]
