"""Attention needs no rule of its own: its parameters are in linear layers.

``multi_head_attention_forward`` hides these layers in one call, so it is opened.  Learned keys and values (``bias_k``),
masks, heads folded into the batch, dropout and learned queries are then calls like others, and rows belong to the
dropout masks of the forward at hand.  PyTorch's fused inference path doesn't run while calls are recorded.
"""

from __future__ import annotations

from torch.nn import functional as F

from . import OPEN, opened

OPEN[F.multi_head_attention_forward] = opened(F.multi_head_attention_forward)
