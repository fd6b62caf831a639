"""Text embedding in plain PyTorch: its meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.text.blocked import Words


def embed_text(words: Words) -> Tensor:
    """[B, L, D]."""
    # not torch.nn.functional's, nor an index: what they ask costs as much as the operation
    x = torch.embedding(words.table, words.ids, -1 if words.padding_idx is None else words.padding_idx)
    x = x if words.scale == 1 else x * words.scale
    if words.text_position is not None:
        x = x + words.text_position
    if words.text_type is not None:
        x = x + words.text_type
    if words.eps is not None:
        # not torch.nn.functional's, which looks for cuDNN at every call
        x = torch.layer_norm(x, x.shape[-1:], words.gamma, words.beta, words.eps)
    return x if words.pad_mask is None else x.masked_fill(words.pad_mask.unsqueeze(-1), 0)
