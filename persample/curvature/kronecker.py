"""Block-diagonal matrices over the parameters whose blocks are Kronecker products.

For a layer with ``W [O, I]`` (row-major; ``I`` counts a last column for a joined bias) the block is

    ``G (x) A``, ``G [O, O]`` of output gradients, ``A [I, I]`` of inputs:  ``(G (x) A) vec(V) = vec(G V A)``,

or, with ``U_G`` and ``U_A`` the eigenvectors of ``G`` and ``A``, any matrix that is diagonal in the basis
``U_G (x) U_A``.  ``K`` groups have ``K`` blocks.  Nothing of size ``O I x O I`` is ever formed but by ``dense``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from ..arguments import number
from ..errors import ArgumentError, KroneckerError
from ..scratch import kernel
from .layers import Layer
from .operator import Operator, Vector, unflatten

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True, eq=False)
class Block:
    """The block of one layer: ``gradients (x) inputs``, or diagonal ``moments`` in the eigenbasis of that."""

    layer: Layer
    inputs: Tensor  # A [K, I, I]
    gradients: Tensor  # G [K, O, O]
    moments: Tensor | None = field(default=None, repr=False)  # [K, O, I], replaces the products of eigenvalues
    tokens: int = 1  # as many as ``A`` is the mean over

    @cached_property
    def _spectra(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``G`` and of ``A``."""
        if not bool(self.gradients.isfinite().all() & self.inputs.isfinite().all()):
            raise KroneckerError(
                f"the Kronecker factors of '{self.layer.weight}' have entries that are NaN or infinite, and no "
                "eigenvectors: look for such values in inputs, targets, parameters and outputs."
            )
        (g, ug), (a, ua) = eigenvectors(self.gradients), eigenvectors(self.inputs)
        return g.clamp(min=0), ug, a.clamp(min=0), ua

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """``U_G [K, O, O]`` and ``U_A [K, I, I]``."""
        return self._spectra[1], self._spectra[3]

    @property
    def eigenvalues(self) -> Tensor:
        """``[K, O, I]``, in the order of `bases`; never negative."""
        if self.moments is not None:
            return self.moments
        return self._spectra[0].unsqueeze(-1) * self._spectra[2].unsqueeze(-2)

    def is_singular(self) -> bool:
        """Whether the smallest eigenvalue is zero up to rounding."""
        values = self.eigenvalues
        return bool(values.min() <= values.numel() * torch.finfo(values.dtype).eps * values.max())

    @kernel
    def product(self, matrix: Tensor) -> Tensor:
        """``[k, K, O, I]``: the block times each of ``k`` matrices."""
        if self.moments is None:
            return self.gradients @ matrix @ self.inputs
        return self.spectral(matrix, self.moments)

    @kernel
    def spectral(self, matrix: Tensor, values: Tensor) -> Tensor:
        """The same with other eigenvalues ``[K, O, I]``."""
        g, a = self.bases
        return g @ (values * (g.mT @ matrix @ a)) @ a.mT

    def dense(self) -> Tensor:
        """The block itself ``[d, d]``, over the layer's parameters, flat, weight before bias."""
        shapes = self.layer.shapes
        size = sum(shape.numel() for shape in shapes.values())
        unit = torch.eye(size, dtype=self.inputs.dtype, device=self.inputs.device)
        rows = self.layer.parameters(self.product(self.layer.matrix(unflatten(unit, shapes))))
        return torch.cat([rows[name].flatten(1) for name in shapes], 1)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """As torch's of finite matrices, which in float32 may raise, or return NaN, where entries are denormal (classifiers
    that are sure).
    """
    with suppress(RuntimeError):  # torch.linalg.LinAlgError
        values, vectors = torch.linalg.eigh(matrices)
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values, vectors
    values, vectors = torch.linalg.eigh(matrices.double())
    return values.to(matrices.dtype), vectors.to(matrices.dtype)


def eigenvectors(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of ``[K, I, I]``, the latter also where eigenvalues are equal.

    Any vectors of their space would do there, and corrected eigenvalues depend on which they are: those are taken that
    leave entries apart as far as they can, as they also diagonalise the numbering of entries.  A transposed convolution
    whose stride is its kernel's size has a factor ``I (x) A'``, the same for every offset of the kernel; the factor of
    fewer samples than inputs has many zeros.
    """
    values, vectors = eigh(factor)
    size = values.shape[1]
    number = torch.arange(size, dtype=values.dtype, device=values.device).unsqueeze(1)
    # From the first of a group on: neighbours in a dense spectrum would form a chain.  Zeros count too: tokens that
    # average out over a sample have moments there.
    ends = values + 8 * torch.finfo(values.dtype).eps * values[:, -1:].abs()
    for block in (ends[:, :-1] >= values[:, 1:]).any(1).nonzero().flatten().tolist():
        last = torch.searchsorted(values[block], ends[block], right=True).tolist()
        start = 0
        while start < size:
            if (end := last[start]) > start + 1:
                own = vectors[block, :, start:end]
                vectors[block, :, start:end] = own @ torch.linalg.eigh(own.mT @ (number * own))[1]
            start = max(end, start + 1)
    return values, vectors


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker:
    """A symmetric positive semi-definite matrix ``[D, D]``, block-diagonal over layers, blocks in Kronecker form.

    ``K @ v`` and ``K.solve(v, damping)`` for ``v [D]``, ``[D, k]`` or ``{name: [*P]}``.  ``blocks`` go by the name of
    their weight (a bias apart by its own); ``uncovered`` says which of the model's parameters are not in it, and why.
    """

    title: str
    blocks: dict[str, Block]
    shapes: dict[str, Size]
    uncovered: dict[str, str]
    samples: int  # of the batch (or batches) that it is about
    reduction: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in flat order."""
        return tuple(self.shapes)

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, D)``."""
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of all blocks together."""
        return reduce(torch.promote_types, (block.inputs.dtype for block in self.blocks.values()))

    @property
    def T(self) -> Kronecker:
        """The transpose: the matrix is symmetric."""
        return self

    def __matmul__(self, v: Vector) -> Vector:
        return self._operator @ v

    def solve(self, v: Vector, damping: float | None = None) -> Vector:
        """``(K + damping I)^{-1} v``, exact: the damping is added to every eigenvalue of every block."""
        if damping is None:
            raise ArgumentError(
                "solve needs a damping: K.solve(v, damping=1e-3); as a function of columns alone, "
                "lambda columns: K.solve(columns, damping=1e-3)."
            )
        if not number(damping) >= 0:
            raise ArgumentError(f"damping must be a number of 0 or more, and finite, got {damping!r}")
        for name, block in self.blocks.items():
            if damping == 0 and block.is_singular():
                raise KroneckerError(f"the block of '{name}' is singular: give a damping > 0")
        return self._over(lambda block, matrix: block.spectral(matrix, 1 / (block.eigenvalues + damping))) @ v

    def dense(self) -> Tensor:
        """The matrix itself, ``[D, D]``."""
        return self._operator.dense()

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator``; needs scipy."""
        return self._operator.to_scipy()

    @property
    def _operator(self) -> Operator:
        return self._over(lambda block, matrix: block.product(matrix))

    def _over(self, product: Callable[[Block, Tensor], Tensor]) -> Operator:
        def apply(matrix: Tensor) -> Tensor:
            values, found = unflatten(matrix.T, self.shapes), dict[str, Tensor]()
            for block in self.blocks.values():
                found |= block.layer.parameters(product(block, block.layer.matrix(values).to(block.inputs)))
            return torch.cat([found[name].flatten(1) for name in self.shapes], 1).T

        device = next(iter(self.blocks.values())).inputs.device
        return Operator(self.title, self.shapes, self.dtype, device, apply, tuple(self.uncovered))

    def __repr__(self) -> str:
        left_out = f", without {len(self.uncovered)} parameters: {', '.join(self.uncovered)}" if self.uncovered else ""
        return f"{self.title}: {self.shape[0]} x {self.shape[1]}, {len(self.blocks)} blocks{left_out}"
