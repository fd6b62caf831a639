"""Text embedding in plain PyTorch: its meaning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embed_text(
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    type_embed: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    pad_mask: Tensor | None,
    scale: float,
    eps: float | None,
    padding_idx: int | None,
) -> Tensor:
    """ids [B, L], table [V, D], position [L, D]; no LayerNorm where `eps` is None. [B, L, D]."""
    x = F.embedding(ids, table, padding_idx) * scale
    if position is not None:
        x = x + position
    if type_embed is not None:
        x = x + type_embed
    if eps is not None:
        x = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    return x if pad_mask is None else x.masked_fill(pad_mask[..., None], 0)
