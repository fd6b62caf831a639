"""The loss of masked autoencoders in plain PyTorch on whole tensors: its meaning.

L = sum_bj m_bj mean_k (prediction_bjk - target_bjk)^2 / sum_bj m_bj
MAE        target = (x - mean(x)) / sqrt(var(x) + eps)                 over all of a patch     He et al. 2022, section 3
VideoMAE   target = (x_c - mean(x_c)) / (sqrt(var(x_c)) + eps)         over each of its channels
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.patch.reconstruction.target import Patches, entering, target_of


def masked_patch_loss(
    prediction: Tensor,
    video: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patches: Patches,
    norm: str,
) -> Tensor:
    """prediction [B, N, K], or [B, M, K] of the masked patches; video [B, T, H, W, C], mask [B, N] bool."""
    acc = torch.promote_types(prediction.dtype, torch.float32)
    with torch.no_grad():
        target = target_of(patches.of(entering(video, mean, std, acc)), norm)
    each = (prediction, target, mask.to(acc))
    if prediction.shape[1] != mask.shape[1]:
        at = masked_ids(mask, prediction.shape[1])
        target = target.gather(1, at[:, :, None].expand(-1, -1, target.shape[2]))
        each = (prediction, target, mask.gather(1, at).to(acc))
    prediction, target, weight = each
    row = (prediction.to(acc) - target).square().mean(-1)
    return torch.where(weight > 0, row * weight, 0).sum() / weight.sum()


def masked_ids(mask: Tensor, count: int) -> Tensor:
    """[B, count]: the masked patches of each row, in order. A sort: a selection would wait for their number."""
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count].contiguous()
