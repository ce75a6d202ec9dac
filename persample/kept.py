"""What a result keeps of a run, to be read later, when it may have changed: factors, which alias tensors of the forward
pass, and the parameters that it writes to, which belong to a model and go on changing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from . import reductions
from .errors import InplaceError, UnknownParameterError
from .factors import Dense, Factors, dense, tensors


@dataclass(eq=False)
class Kept:
    """The factors of one parameter, to be read later: they may alias tensors of the forward pass."""

    name: str
    factors: Factors
    versions: tuple[int, ...]
    handed: bool = False  # whether somebody has the matrix that is kept

    @staticmethod
    def of(name: str, g: Factors) -> Kept:
        return Kept(name, g, tuple(t._version for t in tensors(g)))

    def __reduce__(self) -> Any:
        return Kept.of, (self.name, self.factors)  # a copy's tensors begin to count changes anew

    def read(self) -> Factors:
        """The factors, unless what they alias has changed."""
        if tuple(t._version for t in tensors(self.factors)) != self.versions:
            raise InplaceError(
                f"the factors of parameter '{self.name}' share memory with a tensor that was changed in place since: "
                "an input or activation of the model, or rows that were handed out as they are kept, without a copy. "
                "Read what you need first, and change a clone() of rows, or rows in dense(out=)."
            )
        return self.factors

    def rows(self) -> Tensor:
        """``[N, *P]``: what is kept as a matrix is handed out once, and copied after that, as whoever has it may write
        into it.
        """
        value = dense(self.read())
        if not isinstance(self.factors, Dense):
            return value
        handed, self.handed = self.handed, True
        return value.clone() if handed or 0 in value.stride() else value  # zeros of what is unused are one number

    def weighted_sum(self, weight: Tensor | None) -> Tensor:
        """``weight^T G``, in no less than single precision."""
        return reductions.weighted_sum(self.read(), weight)


class Checked(Mapping[str, Factors]):
    """``{name: factors}``, looked at for changes whenever they are read."""

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        self._kept = kept

    def __getitem__(self, name: str) -> Factors:
        return self._kept[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


Stamp = tuple[int, int]  # a version, and where the memory is
PAST: Stamp = (-1, -1)  # that of no tensor


def stamps(parameters: Mapping[str, Tensor]) -> dict[str, Stamp]:
    """What tells whether parameters were written to, or given other memory; but not by way of their ``.data``."""
    with torch._C.DisableTorchFunction():  # under a mode, every attribute of a tensor is a call
        return {name: (p._version, _place(p)) for name, p in parameters.items()}


def _place(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # of a subclass, or a layout, that has no memory of its own
        return 0


class Elsewhere(Mapping[str, Tensor]):
    """The parameters that a copy of a result writes to, which only the model holds that was copied with it: of a result
    that was copied alone there are none, where nobody would look for what is written.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._held = {name: TensorWeakRef(p) for name, p in parameters.items()}

    def __getitem__(self, name: str) -> Tensor:
        p: Tensor | None = self._held[name]()
        if p is None:
            raise UnknownParameterError(f"no model holds parameter '{name}' any more.")
        return p

    def __iter__(self) -> Iterator[str]:
        return (name for name, held in self._held.items() if held() is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)
