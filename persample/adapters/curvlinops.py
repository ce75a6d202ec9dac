"""curvlinops: our curvature operators as its ``PyTorchLinearOperator``, so that its inverses, spectra and sums take
them.

Scales differ: curvlinops' operators carry the reduction of the loss function they are given, and its empirical Fisher
of a mean loss is ``c J^T J`` with ``c = 1/N`` (``C`` times that where the mean is over ``C`` squared errors of each
sample, too); `persample.curvature.empirical_fisher` states its own (mean over samples by default).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..curvature.operator import Operator
from . import needed


def linear_operator(operator: Operator) -> Any:
    """An operator of `persample.curvature` as a symmetric curvlinops operator on its parameters, in the same order."""
    return _operator_class()(operator)


@cache
def _operator_class() -> type:
    base = needed("curvlinops._torch_base", "curvlinops-for-pytorch").PyTorchLinearOperator

    class PersampleOperator(base):  # type: ignore[misc, valid-type]
        SELF_ADJOINT = True

        def __init__(self, operator: Operator) -> None:
            super().__init__(list(operator.shapes.values()), list(operator.shapes.values()))
            self.operator = operator

        @property
        def dtype(self) -> torch.dtype:
            return self.operator.dtype

        @property
        def device(self) -> torch.device:
            return self.operator.device

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:  # each [*P, K]
            columns = X[0].shape[-1]
            product = self.operator @ torch.cat([x.reshape(-1, columns) for x in X])
            pieces = product.split_with_sizes([s.numel() for s in self._in_shape])
            return [piece.reshape(*s, columns) for s, piece in zip(self._in_shape, pieces, strict=True)]

    return PersampleOperator
