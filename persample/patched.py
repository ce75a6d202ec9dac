"""Which function of torch was called, where its name means another one by now.

A function of torch that is written in Python tells modes the function that has its name.  Where somebody has put a
wrapper in its place (``F.normalize = counted(F.normalize)``), that is the wrapper, which ran already: a mode that runs
what it is told runs it twice.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any

import torch
from torch.overrides import handle_torch_function


def unpatched(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function that was called, of what the mode that calls this one was told."""
    if type(func) is not FunctionType or func in _OWN:
        return func
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not handle_torch_function.__code__:
        frame = frame.f_back
    called = None if frame is None else frame.f_back
    return func if called is None else _BY_CODE.get(called.f_code, func)


# As they are when this is imported.
_OWN = {
    f
    for place in (torch.functional, torch.nn.functional, torch.nn.init, torch.Tensor)
    for f in vars(place).values()
    if type(f) is FunctionType and f.__globals__.get("__name__", "").startswith("torch")
}
_shared = Counter(f.__code__ for f in _OWN)  # by what a decorator made
_BY_CODE = {f.__code__: f for f in _OWN if _shared[f.__code__] == 1}
