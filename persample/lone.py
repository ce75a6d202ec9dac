"""One sample alone, where PyTorch's own backward pass is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .followed import is_wrapped

NORMALISE = {
    F.batch_norm,
    F.instance_norm,
    torch.batch_norm,
    torch.instance_norm,
    torch.native_batch_norm,
    torch._batch_norm_impl_index,
}


def put_right(out: Any) -> None:
    """The backward pass of ``batch_norm`` (and ``instance_norm``, which calls it) on a CPU, in PyTorch 2.13, takes the
    gradient of a single image that lies channels last, as that of tokens ``flatten(2).mT`` does, for one that lies
    like the input, and returns numbers of other places.  Have it come in order.
    """
    x = out[0] if isinstance(out, tuple) else out
    if isinstance(x, Tensor) and x.requires_grad and x.ndim > 3 and len(x) == 1 and not is_wrapped([x]):
        x.register_hook(Tensor.contiguous)
