"""Pixels to tokens in plain PyTorch: the meaning, and the fallback everywhere.

y_j = W . (x_j / 255 - mean) / std + bias                     x_j patch j, in the order of the weight's flattening
token_j = pre_norm((masked_j ? mask_token : stem_norm(y_j)) + position_j + type)
row_r = pre_norm(prefix_r + prefix_position_r + type)         in front of the tokens
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.patch.geometry import Geometry, kernel_of, pad, unfold, view


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stem_weight: Tensor | None,
    stem_bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    prefix_position: Tensor | None,
    mask: Tensor | None,
    mask_token: Tensor | None,
    ids_keep: Tensor | None,
    type_embed: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    g: Geometry,
    layout: str,
    still: bool,
    stem_eps: float,
    pre_eps: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Arguments as `op.patch_embed` prepares them; tokens [B, R + N, D] in `dtype`, products in `compute`."""
    wide = torch.promote_types(compute, torch.float32)
    x = view(pixels, weight.dim(), layout)
    x = x if x.dtype == torch.float64 else x.to(wide)
    if pixels.dtype == torch.uint8 and (mean is not None or std is not None):
        x = x / 255
    if mean is not None:
        x = x - mean.to(x.dtype)[:, None, None, None]
    if std is not None:
        x = x / std.to(x.dtype)[:, None, None, None]
    rows = unfold(pad(x.to(compute), g), g).reshape(len(x), g.patches, -1)
    if ids_keep is not None:
        rows = rows.gather(1, ids_keep[:, :, None].expand(-1, -1, rows.shape[2]))
        mask = mask if mask is None else mask.gather(1, ids_keep)
    if mask is not None:
        # what is masked has no part in a gradient either, be it NaN
        rows = rows.masked_fill(mask[:, :, None], 0)

    w = kernel_of(weight.to(compute), layout, still)
    y = F.linear(rows, w.flatten(1), None if bias is None else bias.to(compute))
    y = layer_norm(y, stem_weight, stem_bias, stem_eps)
    if mask is not None and mask_token is not None:
        y = torch.where(mask[:, :, None], mask_token.to(y.dtype), y)
    if position is not None:
        y = y + (position if ids_keep is None else position[ids_keep]).to(compute)
    if prefix is not None:
        front = prefix if prefix_position is None else prefix + prefix_position
        y = torch.cat([front.to(y.dtype).expand(len(y), -1, -1), y], dim=1)
    if type_embed is not None:
        y = y + type_embed.to(compute)
    return layer_norm(y, pre_weight, pre_bias, pre_eps).to(dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
