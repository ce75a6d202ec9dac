"""Random projections of gradients that are applied to factors: ``G R`` without ``R [D, k]`` and without rows.

One parameter of shape ``P`` is seen as a matrix ``[p, q]``: its first axis, and all others in one (a bias is ``[p,
1]``). Output ``j`` of a projection to ``dim`` numbers is a bilinear form of the gradient, with signs on both sides:

    ``phi_j = sum_{a, b} L_j[a] g[a, b] R_j[b] / sqrt(dim)``,   ``L_j [p]``, ``R_j [q]`` of +-1.

So a gradient ``sum_t delta_t (x) a_t`` costs two products of its factors, ``sum_t (L_j . delta_t)(R_j . a_t)``, and
any other form of the same rows gives the same numbers.  As a matrix ``[p q, dim]`` its entries ``L_j[a] R_j[b] /
sqrt(dim)`` are random signs of variance ``1/dim``, uncorrelated with each other, and the projections of different
parameters are independent: therefore ``E[phi_n . phi_m] = g_n . g_m`` for layers of any shape, and over all layers
together.

With ``tile = f > 1`` outputs share factors: output ``(j, x, y)`` of ``dim/f^2 x f x f`` is the form of ``L_jx`` and
``R_jy``, a Kronecker product of two ``f``-row sign matrices (LoGra, Choe et al. 2024, "What is your data worth to
GPT?", is one tile per layer, ``f = sqrt(dim)``).  Applying it costs ``1/f`` as much, and inner products stay
unbiased, but vary more: the squared norm of a rank-one gradient has a relative variance of about ``((1 + 2/f)^2 - 1)
f^2 / dim``, from ``8/dim`` at ``f = 1`` to ``4/sqrt(dim)`` for one tile; an unstructured projection has ``2/dim``.

The signs are the bits of a counter-based generator (Philox 4x64, whose stream numpy guarantees) keyed by the seed, the
parameter's name and the side: the same on every machine and device, in any order of parameters, and of a model that
``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` was put around.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..einsum import combine, einsum
from ..errors import ArgumentError
from ..factors import Conv, Dense, Factors, Outer, Rows, cast, dense, device, dtype, index
from ..scratch import kernel
from ..streaming import pieces, wide

BLOCK = 1 << 22  # entries of intermediate results at a time


@dataclass(frozen=True)
class Projection:
    """``R [D, dim]`` of independent sign projections per parameter: ``G.project(Projection(512, seed=0))`` is ``[N,
    512]``.

    Args:
        dim: how many numbers are left of a row; inner products ``g . h`` of rows of one layer have an error of up to
            about ``sqrt(8/dim) |g| |h|``.
        seed: another seed is another, independent projection.
        tile: 1 is the most accurate, larger ones (``tile^2`` must divide ``dim``) are cheaper; see the module's
            docstring.

    Raises:
        ArgumentError: a number that is no integer, or a ``dim`` that is no positive multiple of ``tile^2``.
    """

    dim: int
    seed: int = 0
    tile: int = 1
    _signs: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("dim", "seed", "tile"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)):  # 1.0 would be another seed than 1
                raise ArgumentError(f"{name} must be an integer, got {value!r}.")
            object.__setattr__(self, name, int(value))
        if self.dim < 1 or self.tile < 1 or self.dim % self.tile**2:
            raise ArgumentError(f"dim must be a positive multiple of tile^2, got dim={self.dim} and tile={self.tile}.")

    @kernel
    def part(self, name: str, g: Factors) -> Tensor:
        """``G R`` of one parameter, ``[N, dim]``, real: what `Gradients.project` adds up over parameters."""
        g = wide(g) if dtype(g).is_complex else g  # an entry is the two real ones that it is to inner products
        kind = torch.float32 if dtype(g).itemsize < 4 else dtype(g)
        p, q = _matrix(g.shape)
        with torch.no_grad():
            like = torch.empty(0, dtype=kind, device=device(g))
            left, right = self.signs(name, "left", p, like), self.signs(name, "right", q, like)
            parts = [_forms(cast(block, kind), left, right) for block in self._blocks(g)]
            return torch.cat([like.new_zeros(0, self.dim), *parts]) / math.sqrt(self.dim)

    def matrix(self, name: str, shape: torch.Size) -> Tensor:
        """``R [*P, dim]`` of one parameter (``[*P, 2]`` is the shape of a complex one), as a matrix in float64: the
        definition.
        """
        p, q = _matrix(shape)
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        left, right = self.signs(name, "left", p, like), self.signs(name, "right", q, like)
        return torch.einsum("jxa,jyb->abjxy", left, right).reshape(*shape, self.dim) / math.sqrt(self.dim)

    def signs(self, name: str, side: str, size: int, like: Tensor) -> Tensor:
        """``L`` or ``R``: +-1, ``[dim/tile^2, tile, size]``, of the type and on the device of ``like``."""
        key = (name, side, size, like.dtype, like.device)
        if key not in self._signs:
            digest = hashlib.sha256(f"{self.seed}\n{name}\n{side}".encode()).digest()
            count = self.dim // self.tile * size
            stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(-(-count // 64))
            bits = np.unpackbits(stream.astype("<u8").view(np.uint8), count=count, bitorder="little")
            signs = torch.from_numpy(bits).to(like.device, like.dtype).mul_(-2).add_(1)
            self._signs[key] = signs.view(self.dim // self.tile**2, self.tile, size)
        return self._signs[key]

    def spec(self) -> dict[str, int]:
        """What identifies the projection, for JSON."""
        return {"dim": self.dim, "seed": self.seed, "tile": self.tile}

    def _blocks(self, g: Factors) -> Iterator[Factors]:
        """Some samples at a time, in the form that is projected with less work: as factors, or as rows."""
        p, q = _matrix(g.shape)
        tokens = _tokens(g)
        factored = tokens is not None and tokens * (p + q) < p * q
        entries = tokens * (2 * self.dim // self.tile + p + q) if factored and tokens else p * q + min(p, q) * self.dim
        step = max(1, BLOCK // max(1, entries))
        for start in range(0, len(g), step):
            block = index(g, slice(start, start + step))
            yield from pieces(block, "tokens") if factored else (Dense(dense(block)),)


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """The two sides ``p, q`` of a parameter."""
    p = shape[0] if shape else 1
    return p, shape.numel() // max(1, p)


def _tokens(g: Factors) -> int | None:
    """How many outer products a row is the sum of, if their left sides are the first axis of ``P``; else ``None``."""
    match g:
        case Rows(index=i):
            return i.shape[1]
        case Outer(left, _, shape) if shape and left.shape[1] * left.shape[3] == shape[0]:
            return left.shape[2]
        case Conv(_, grad):
            return grad.shape[2:].numel()
        case _:
            return None


def _forms(g: Factors, left: Tensor, right: Tensor) -> Tensor:
    """``sum L_jx[a] g[a, b] R_jy[b]``, ``[N, dim]``."""
    match g:
        case Outer(delta, a, _):
            return einsum(_OF_OUTER, delta, a, left, right)
        case Rows(i, value, _):
            return einsum("ntjx,ntb,jyb->n(jxy)", left.movedim(2, 0)[i], value, right)
        case _:
            return einsum(_OF_ROWS, dense(g).reshape(len(g), left.shape[2], right.shape[2]), left, right)


_OF_ROWS = "nab,jxa,jyb->n(jxy)"
_OF_OUTER = combine(_OF_ROWS, {0: "nkto,nkti->n(ko)i"})
