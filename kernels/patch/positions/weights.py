"""FlexiViT: a patch embedding's weights for another patch size."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.patch.positions.axes import axis_matrix


def resample_weight(weight: Tensor, size: tuple[int, int], *, mode: str = "bicubic_aa") -> Tensor:
    """The weights whose response to a resized patch is that of `weight` to the patch (Beyer et al. 2023, equation 4).

    W' = W pinv(R_h x R_w) = pinv(R_h)T W pinv(R_w) for the resize R of a patch, as timm's `resample_patch_embed`; the
    pseudoinverses are made of one axis each, in float64.

    Args:
        weight: [D, C, P, P'], any floating-point dtype. Weights of flattened patches are viewed as that first.
        size: (Q, Q') of the new patch.
        mode: of the resize, "bicubic_aa", "bicubic", "bilinear_aa" or "bilinear".

    Returns:
        [D, C, Q, Q'] in the weight's dtype, computed in float32 (float64 for float64). Differentiable any number of
        times: dW = dW' pinvT.

    Raises:
        ValueError: an argument does not fit.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D, C, P, P']")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size}, expected two positive numbers")
    if mode not in ("bicubic_aa", "bicubic", "bilinear_aa", "bilinear"):
        raise ValueError(f"mode is {mode!r}, expected bicubic_aa, bicubic, bilinear_aa or bilinear")
    if tuple(weight.shape[2:]) == tuple(size):
        return weight
    acc = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = (
        torch.linalg.pinv(axis_matrix(mode, n, p, torch.float64, torch.device("cpu"))).to(weight.device, acc)
        for n, p in zip(size, weight.shape[2:], strict=True)
    )
    return (rows.t() @ (weight.to(acc) @ columns)).to(weight.dtype)
