"""Random masking as MAE does it."""

from __future__ import annotations

import torch
from torch import Tensor


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches an encoder sees: the `keep` with the least noise (He et al. 2022, the official `random_masking`).

    Args:
        noise: [B, N], floating-point; with the same noise and torch, the official code keeps the same patches in the
            same order. The caller draws it, so that the state of the generator is that of the official code.
        keep: int(N * (1 - mask_ratio)).

    Returns:
        ids_keep [B, keep] int64 in the order of the noise; ids_restore [B, N] int64, where each patch went; mask [B, N]
        bool, True for what is removed.

    Raises:
        ValueError: an argument does not fit.
    """
    if noise.dim() != 2 or not noise.is_floating_point():
        raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}, expected a floating-point [B, N]")
    n = noise.shape[1]
    if not 0 <= keep <= n:
        raise ValueError(f"keep is {keep}, expected 0 to {n}")
    ids_shuffle = noise.argsort(dim=1)
    order = torch.arange(n, device=noise.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, order)  # its inverse
    return ids_shuffle[:, :keep], ids_restore, ids_restore >= keep
