"""A symmetric matrix over the parameters, known by its products.

The flat order of the ``D`` entries is that of ``names``, each parameter row-major: that of `Gradients.flat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Size, Tensor

from ..errors import DirectionError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])


@dataclass(frozen=True, eq=False, repr=False)
class Operator:
    """``[D, D]``, symmetric: ``op @ v`` for ``v [D]``, ``[D, k]``, or ``{name: [*P]}``.

    A product with ``k`` columns shares one forward pass.  Products are the same every time: random masks, sampled
    targets and buffers are those of when the operator was made, and once parameters, the batch, training modes or
    settings of modules have changed, they raise `InplaceError`.  Results have the operator's dtype and device; they can
    be differentiated with respect to ``v`` (a quadratic penalty ``v @ (op @ v) / 2``), while the matrix itself is a
    constant.
    """

    title: str
    shapes: dict[str, Size]
    dtype: torch.dtype
    device: torch.device
    apply: Callable[[Tensor], Tensor] = field(repr=False)  # [D, k] -> [D, k]
    uncovered: tuple[str, ...] = ()  # parameters of the model that it is not about
    samples: int = 1  # of the batch (or batches) whose mean or sum it is
    reduction: str = "mean"

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in flat order."""
        return tuple(self.shapes)

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, D)``."""
        size = sum(prod(shape) for shape in self.shapes.values())
        return size, size

    @property
    def T(self) -> Operator:
        """The transpose: the operator is symmetric."""
        return self

    def __matmul__(self, v: Vector) -> Vector:
        if isinstance(v, Mapping):
            return unflatten(self @ flatten(v, self.shapes), self.shapes)
        if not isinstance(v, Tensor):
            raise DirectionError(f"{self.title} multiplies tensors and {{name: [*P]}}, got {type(v).__name__}.")
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[0]:
            left_out = f", without {_few(self.uncovered)}" if self.uncovered else ""
            raise DirectionError(
                f"{self.title} has shape {self.shape}, and can't multiply a tensor of shape {tuple(v.shape)}: give [D] "
                f"or [D, k], of its parameters {_few(self.names)}{left_out}. Rows of these alone are "
                "G.select(names), with its .names."
            )
        check_real(v, self.dtype)
        matrix = v.to(self.device, self.dtype)
        product: Tensor = _Product.apply(matrix if v.ndim == 2 else matrix[:, None], self.apply)  # type: ignore[no-untyped-call]
        return product if v.ndim == 2 else product[:, 0]

    def dense(self) -> Tensor:
        """The matrix itself, ``[D, D]``, by ``D`` products.  Of complex parameters there is none: products are
        linear over the real numbers only.
        """
        self._check_real("dense()")
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` (eigenvalue and linear solvers); needs scipy."""
        self._check_real("to_scipy()")
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs scipy: pip install persample[scipy]") from error

        def product(v: Any) -> Any:
            return (self @ torch.as_tensor(v, device="cpu")).to("cpu", own).numpy()

        own = torch.float32 if self.dtype is torch.bfloat16 else self.dtype  # which numpy doesn't know
        kind = torch.empty(0, dtype=own, device="cpu").numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=kind)

    def _check_real(self, what: str) -> None:
        if self.dtype.is_complex:
            raise DirectionError(
                f"{self.title} is of complex parameters, of which it mixes real and imaginary parts, so that no "
                f"complex matrix [D, D] does what K @ v does, and there is no {what}. Use products; or hold the "
                "parameters as real ones (torch.view_as_complex inside the model)."
            )

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.title}: {self.shape[0]} x {self.shape[1]}, {kind}, {len(self.shapes)} parameters"


def check_real(v: Tensor, dtype: torch.dtype) -> None:
    """Raise for a complex direction of real parameters: its imaginary part would be dropped."""
    if v.is_complex() and not dtype.is_complex:
        raise DirectionError(
            "the direction is complex, and the parameters are real: take the products with v.real and v.imag."
        )


def _few(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Product(torch.autograd.Function):
    """A product with a symmetric matrix, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.product = apply
        return apply(matrix.detach())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(g, ctx.product), None  # type: ignore[no-untyped-call]


def flatten(v: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> Tensor:
    """``[D]`` from ``{name: [*P]}``."""
    if v.keys() != shapes.keys():
        odd = sorted(v.keys() ^ shapes.keys())
        raise DirectionError(
            f"the direction must have one tensor for each of the {len(shapes)} parameters and no other; see {odd[:4]}. "
            f"Take those of {list(shapes)[:8]} alone (of rows, G.select(names))."
        )
    for name, shape in shapes.items():
        if v[name].shape != shape:
            raise DirectionError(
                f"the direction for parameter '{name}' must have shape {tuple(shape)}, got {tuple(v[name].shape)}"
            )
    return torch.cat([v[name].reshape(-1) for name in shapes])


def unflatten(v: Tensor, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """``{name: [*P]}`` from ``[D]``; ``{name: [k, *P]}`` from ``[k, D]``."""
    pieces = v.split_with_sizes([prod(shape) for shape in shapes.values()], dim=-1)
    return {name: x.reshape((*v.shape[:-1], *shape)) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}
