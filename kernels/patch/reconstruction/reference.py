"""The loss of masked autoencoders in plain PyTorch on whole tensors: its meaning.

L = sum_bj m_bj mean_k (prediction_bjk - target_bjk)^2 / sum_bj m_bj
MAE        target = (x - mean(x)) / sqrt(var(x) + eps)                 over all of a patch     He et al. 2022, section 3
VideoMAE   target = (x_c - mean(x_c)) / (sqrt(var(x_c)) + eps)         over each of its channels
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels.patch.reconstruction.target import Target, target_of


def masked_patch_loss(prediction: Tensor, target: Target) -> Tensor:
    """Of predictions [B, N, K], or [B, M, K] of the masked patches."""
    acc = torch.promote_types(prediction.dtype, torch.float32)
    with torch.no_grad():
        x = target.video.to(acc, copy=True).div_(target.divisor)
        x = x if target.mean is None else x.sub_(target.mean.to(acc))
        x = x if target.std is None else x.div_(target.std.to(acc))
        x = target_of(target.patches(x), target.norm)
    mask = target.mask
    if prediction.shape[1] != mask.shape[1]:
        at = masked_ids(mask, prediction.shape[1])
        x, mask = x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2])), mask.gather(1, at)
    weight = mask.to(acc)
    # before the square, whose gradient is no number where what is not masked is none
    gap = torch.where(mask[:, :, None], cast(prediction, acc) - x, 0)
    return (gap.square().mean(-1) * weight).sum() / weight.sum()


def masked_ids(mask: Tensor, count: int) -> Tensor:
    """[B, count]: the masked patches of each row, in order. A sort: a selection would wait for their number."""
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count].contiguous()
