"""The contrastive losses in plain PyTorch on the whole matrix of logits: their meaning, and the fallback everywhere.

S = s x yT                          x [b, D] images, y [N, D] texts, the positive of row i at column i + row_offset
CLIP     L = w_r mean_i(rho_i - S_ii) + w_c mean_i(kappa_i - S_ii)      Radford et al. 2021, figure 3
SigLIP   L = (1/b) sum_ij softplus(-z_ij (S_ij + bias))                 Zhai et al. 2023, equation 1
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _logits(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    # logits in the operands' dtype, as eager code computes them; the loss itself in float32 or float64
    return ((scale.to(image.dtype) * image) @ text.t()).to(scale.dtype)


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    w_image: float,
    w_text: float,
    label_smoothing: float,
    normalize: bool,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """(loss, logits [b, N])."""
    s = _logits(image, text, scale, normalize)
    label = torch.arange(len(s), device=s.device) + row_offset
    loss = s.new_zeros(())
    if w_image:
        loss = loss + w_image * F.cross_entropy(s, label, label_smoothing=label_smoothing)
    if w_text:
        column = s[:, row_offset : row_offset + len(s)].t()
        loss = loss + w_text * F.cross_entropy(column, label - row_offset, label_smoothing=label_smoothing)
    return loss, s


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalize: bool,
    row_offset: int,
    negative_only: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, logits [b, N])."""
    s = _logits(image, text, scale, normalize) + bias
    z = s.new_full(s.shape, -1.0)
    if not negative_only:
        z.diagonal(row_offset).fill_(1.0)
    return -F.logsigmoid(z * s).sum() / len(s), s


def statistics(s: Tensor, row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_max, col_max over the negatives, the positives' logits, sum of all logits)."""
    positive = s.diagonal(row_offset)[: len(s)]
    negatives = s.clone()
    negatives.diagonal(row_offset).fill_(-torch.inf)
    return negatives.amax(1), negatives.amax(0), positive, s.sum()
