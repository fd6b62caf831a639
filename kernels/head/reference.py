"""The head on one selected token, in plain PyTorch: its meaning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.head.blocked import Head, selected


def select_head(x: Tensor, head: Head) -> Tensor:
    """x [B, L, D] to [B / clips, O], or [B / clips, D] without a weight."""
    rows = x[:, 0] if head.index is None else selected(x, head.index)
    beta = head.beta if head.beta is None or head.gamma is not None else head.beta.to(rows.dtype)
    y = F.layer_norm(rows, rows.shape[-1:], head.gamma, beta, head.eps)
    if head.weight is not None:
        y = F.linear(y, head.weight)
    if head.normalize:
        # in float16 the smallest length, 1e-12, would be 0
        y = cast(F.normalize(cast(y, accumulation_dtype(y.dtype)), dim=-1), y.dtype)
    if head.scale is not None:
        y = cast(head.scale, y.dtype) * y
    return y.unflatten(0, (-1, head.clips)).mean(1) if head.clips > 1 else y
