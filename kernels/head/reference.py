"""The head on one selected token, in plain PyTorch: its meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select_head(
    x: Tensor,
    index: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    normalize: bool,
    clips: int,
) -> Tensor:
    """x [B, L, D]; `index` [B], None for the first token; out [B / clips, O], or [B / clips, D] without a weight."""
    rows = x[:, 0] if index is None else x[torch.arange(x.shape[0], device=x.device), index]
    y = F.layer_norm(rows, rows.shape[-1:], gamma, beta, eps)
    if weight is not None:
        y = F.linear(y, weight)
    if normalize:
        y = F.normalize(y, dim=-1)
    if scale is not None:
        y = scale.to(y.dtype) * y
    return y.unflatten(0, (-1, clips)).mean(1) if clips > 1 else y
