"""Tables: a looked-up row gets the gradient of every place that looked it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ..errors import BatchCoupledError, CaptureError
from . import Yields, rule
from .derived import table_rows

if TYPE_CHECKING:
    from ..capture import Call


@rule(F.embedding)
def embedding(
    call: Call, g: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Yields:  # fmt: skip
    refuse_table_options(call, max_norm, scale_grad_by_freq)
    if call.sampled(input) and not call.sampled(weight):
        yield weight, lambda: table_rows(call.tokens(input, 0), call.tokens(g), weight, padding_idx)


def refuse_table_options(call: Call, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise CaptureError(f"{call.name}: max_norm= changes the table during the forward pass. Renormalise it yourself, outside of the model.")
    if scale_grad_by_freq:
        raise BatchCoupledError(
            f"{call.name}: scale_grad_by_freq=True divides by how often an entry occurs in the whole batch. Switch it off to get per-sample gradients."
        )
