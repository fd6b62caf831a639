"""The loss of masked autoencoders a few images at a time: targets come and go, the gradient makes them anew."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.patch.reconstruction.target import Patches, entering, target_of

_BLOCK_BYTES = 2 << 20  # of targets


def rows(
    prediction: Tensor,
    video: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patches: Patches,
    norm: str,
    grad: Tensor | None,
) -> Tensor:
    """weight_bj mean_k (prediction - target)^2 [B, M] for ids [B, M] int64 (None: every patch); 0 where weight is.

    With `grad` [B, M, K] given: into it 2 weight_bj (prediction - target) / K instead.
    """
    b, m, k = prediction.shape
    acc = weight.dtype
    out = weight.new_zeros(b, m)
    step = max(1, _BLOCK_BYTES // max(1, video[:1].numel() * acc.itemsize))
    for i in range(0, b, step):
        block = slice(i, i + step)
        x = patches.of(entering(video[block], mean, std, acc))
        if ids is not None:
            x = x.gather(1, ids[block, :, None, None].expand(-1, -1, *x.shape[2:]))
        gap = target_of(x, norm).neg_().add_(prediction[block])
        w = weight[block]
        if grad is None:
            row = torch.linalg.vector_norm(gap, dim=-1).square_().mul_(w).div_(k)
            out[block] = torch.where(w != 0, row, 0)
        else:
            grad[block] = torch.where((w != 0)[:, :, None], gap.mul_((2 / k) * w[:, :, None]), 0)
    return out
