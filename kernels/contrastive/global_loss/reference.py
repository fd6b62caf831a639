"""The global contrastive loss in plain PyTorch on the whole matrix of logits.

    S = s x yT,   g_i = mean_{j != i} exp(S_ij - S_ii),   u_i <- (1 - gamma) u_i + gamma g_i      rows; columns: h, w
    L = (1/s) mean_i(g_i / (u_i + eps) + h_i / (w_i + eps))       u, w and the s of 1/s are constants

Its gradient is that of (1/s) mean_i(log(u_i + eps) + log(w_i + eps)) if u and w were exact (SogCLR, Yuan et al.
2022; FastCLIP-v1, Wei et al. 2024). Normalisers are kept as logarithms: at s = 100, g spans e^-200 to e^200.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels.contrastive.blocked import finite
from mmfuse.kernels.contrastive.reference import unit


def moving_average(log_u: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma) u + gamma g); g itself where there is no u yet."""
    old = log_u + (math.log1p(-gamma) if gamma < 1 else -math.inf)
    # isfinite is four operations
    return torch.where(log_u.abs() < math.inf, torch.logaddexp(old, log_g + math.log(gamma)), log_g)


def log_divisor(log_u: Tensor, eps: float) -> Tensor:
    """log(u + eps); 0 where both are 0, for then g is 0 too."""
    return torch.logaddexp(log_u, log_u.new_full((), math.log(eps))) if eps else finite(log_u)


def global_contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    log_u: Tensor,
    log_w: Tensor,
    gamma: float,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, new log u [N], new log w [N])."""
    if normalize:
        image, text = unit(image), unit(text)
    s = cast((cast(scale, image.dtype) * image) @ text.t(), scale.dtype)
    n = s.shape[0]
    positive, negatives = s.diagonal(), s.masked_fill(torch.eye(n, dtype=torch.bool, device=s.device), -torch.inf)
    # both directions [2, N] at a time
    log_g = torch.stack([negatives.logsumexp(dim) for dim in (1, 0)]) - positive - math.log(max(n - 1, 1))
    new = moving_average(torch.stack([log_u, log_w]), log_g.detach(), gamma)
    terms = torch.exp(log_g - log_divisor(new, eps))
    log_u, log_w = new.unbind()
    return terms.sum(0).mean() / scale.detach(), log_u, log_w
