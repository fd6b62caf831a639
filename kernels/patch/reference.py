"""Pixels to tokens in plain PyTorch: the meaning, and the fallback everywhere.

y_j = W . (x_j / 255 - mean) / std + bias                     x_j patch j, in the order of the weight's flattening
token_j = pre_norm((masked_j ? mask_token : stem_norm(y_j)) + position_j + type)
row_r = pre_norm(prefix_r + prefix_position_r + type)         in front of the tokens
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.patch.geometry import kernel_of, pad, unfold, view
from mmfuse.kernels.patch.stem import Stem


def patch_embed(stem: Stem) -> Tensor:
    """Tokens [B, R + N, D] in the stem's dtype, products in its compute."""
    s = stem
    g = s.geometry
    x = view(s.pixels, s.weight.dim(), s.layout)
    x = x if x.dtype == torch.float64 else x.to(s.acc)
    if s.pixels.dtype == torch.uint8 and (s.mean is not None or s.std is not None):
        x = x / 255
    if s.mean is not None:
        x = x - s.mean.to(x.dtype)[:, None, None, None]
    if s.std is not None:
        x = x / s.std.to(x.dtype)[:, None, None, None]
    x = pad(x.to(s.compute), g)
    w, bias = kernel_of(s.weight.to(s.compute), s.layout, s.still), None if s.bias is None else s.bias.to(s.compute)
    mask = s.mask if s.mask is None or s.ids_keep is None else s.mask.gather(1, s.ids_keep)
    if mask is None and s.ids_keep is None and g.kernel[0] == x.shape[2] == 1 and s.layout != "patches":
        # what a library runs, on the pixels as they lie
        y = F.conv2d(x[:, :, 0], w[:, :, 0], bias, g.stride[1:]).flatten(2).transpose(1, 2)
    else:
        rows = unfold(x, g).flatten(4).flatten(1, 3)
        if s.ids_keep is not None:
            rows = rows.gather(1, s.ids_keep[:, :, None].expand(-1, -1, rows.shape[2]))
        if mask is not None:
            # what is masked has no part in a gradient either, be it NaN
            rows = rows.masked_fill(mask[:, :, None], 0)
        y = F.linear(rows, w.flatten(1), bias)
    y = y.to(torch.promote_types(s.compute, s.dtype))  # wider than the product where its sum with the position is
    y = layer_norm(y, s.stem_weight, s.stem_bias, s.stem_eps)
    if mask is not None and s.mask_token is not None:
        y = torch.where(mask[:, :, None], s.mask_token.to(y.dtype), y)
    if s.position is not None:
        y = y + (s.position if s.ids_keep is None else s.position[s.ids_keep]).to(y.dtype)
    if s.prefix is not None:
        front = s.prefix if s.prefix_position is None else s.prefix + s.prefix_position
        y = torch.cat([front.to(y.dtype).expand(y.shape[0], -1, -1), y], dim=1)
    if s.type_embed is not None:
        y = y + s.type_embed.to(y.dtype)
    return layer_norm(y, s.pre_weight, s.pre_bias, s.pre_eps).to(s.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
