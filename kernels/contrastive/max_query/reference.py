"""The largest similarity over the queries, and BLIP-2's loss on it, in plain PyTorch: their meaning.

u_ij = max_k <q_ik, t_j>            q [B, Q, D] the query vectors of images, t [N, D] texts
L = -mean_i sum_j T_ij log softmax_j(u_ij / temp),     T = (1 - eps) positives + eps / N        BLIP-2, Li et al. 2023
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """u [B, N], with the [B, Q, N] products in memory. Of equal queries the first gets the gradient."""
    s = (image.flatten(0, 1) @ text.t()).unflatten(0, image.shape[:2])
    return cast(s.max(1).values, accumulation_dtype(image.dtype))


def targets(s: Tensor, row_offset: int, ids: Tensor | None, all_ids: Tensor | None) -> Tensor:
    """Of both directions' logits like s [b, N], for cross_entropy: the pairs, or shares of what has the row's id."""
    if ids is None or all_ids is None:
        return torch.arange(row_offset, row_offset + s.shape[0], device=s.device)
    same = (ids[:, None] == all_ids).to(s.dtype)
    return same / same.sum(1, keepdim=True)
