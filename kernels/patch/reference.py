"""Pixels to tokens in plain PyTorch: the meaning, and the fallback everywhere.

y_j = W . (x_j / 255 - mean) / std + bias                     x_j patch j, in the order of the weight's flattening
token_j = pre_norm((masked_j ? mask_token : stem_norm(y_j)) + position_j + type)
row_r = pre_norm(prefix_r + prefix_position_r + type)         in front of the tokens
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels._runtime.reasons import transforming
from mmfuse.kernels.patch.geometry import kernel_of, pad, unfold, view
from mmfuse.kernels.patch.stem import Stem


def patch_embed(stem: Stem) -> Tensor:
    """Tokens [B, R + N, D] in the stem's dtype, products in its compute."""
    s = stem
    w, bias = cast(s.weight, s.compute), None if s.bias is None else cast(s.bias, s.compute)
    mask = s.mask if s.mask is None or s.ids_keep is None else s.mask.gather(1, s.ids_keep)
    if w.dim() == s.pixels.dim() == 4 and mask is None and s.ids_keep is None:
        # what a library runs, on the pixels as they lie
        x = s.pixels.movedim(-1, 1) if s.layout == "nhwc" else s.pixels
        (_, height, width), x = s.geometry.padded, _normalised(x, s)
        if (height, width) != x.shape[2:]:
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        y = F.conv2d(x, w, bias, s.geometry.stride[1:]).flatten(2).transpose(1, 2)
    elif s.layout == "patches" and mask is s.ids_keep is s.mean is s.std is None:
        y = F.linear(cast(s.pixels, s.compute), w.flatten(1), bias)
    else:
        x = pad(_normalised(view(s.pixels, w.dim(), s.layout), s), s.geometry)
        rows = unfold(x, s.geometry).flatten(4).flatten(1, 3)
        if s.ids_keep is not None:
            rows = rows.gather(1, s.ids_keep[:, :, None].expand(-1, -1, rows.shape[2]))
        if mask is not None:
            # what is masked has no part in a gradient either, be it NaN
            rows = rows.masked_fill(mask[:, :, None], 0)
        y = F.linear(rows, kernel_of(w, s.layout, s.still).flatten(1), bias)
    y = cast(y, torch.promote_types(s.compute, s.dtype))  # wider than the product where its sum with the position is
    if mask is not None and s.stem_weight is not None:
        y = y.masked_fill(mask[:, :, None], 0)
    y = layer_norm(y, s.stem_weight, s.stem_bias, s.stem_eps)
    if mask is not None and s.mask_token is not None:
        y = torch.where(mask[:, :, None], s.mask_token.to(y.dtype), y)
    position = None if s.position is None else s.position if s.ids_keep is None else s.position[s.ids_keep]
    front, of_front = s.prefix, s.prefix_position
    table = [t for t in (of_front, position) if t is not None and t.dtype == y.dtype]
    if front is not None and front.dtype == y.dtype and len(table) == 2:
        # the prefix first: a convolution's tokens are transposed, and are put in a row here
        y = torch.cat([front.expand(y.shape[0], -1, -1), y], dim=1)
        whole = s.table if s.ids_keep is None else None
        if whole is not None or y.requires_grad or transforming():
            if s.ids_keep is not None:
                table = [t.expand(y.shape[0], -1, -1) for t in table]
            whole = torch.cat(table, dim=-2) if whole is None else whole
            y = y + whole if transforming() else y.add_(whole)
        else:
            y[:, : front.shape[-2]].add_(table[0])
            y[:, front.shape[-2] :].add_(table[1])
    else:
        y = y if position is None else y + cast(position, y.dtype)
        if front is not None:
            front = front if of_front is None else front + of_front
            y = torch.cat([cast(front, y.dtype).expand(y.shape[0], -1, -1), y], dim=1)
    if s.type_embed is not None:
        y = y + cast(s.type_embed, y.dtype)
    return cast(layer_norm(y, s.pre_weight, s.pre_bias, s.pre_eps), s.dtype)


def _normalised(x: Tensor, s: Stem) -> Tensor:
    """x [B, C, ...], (x / 255 - mean) / std, as the product takes it."""
    if s.mean is not None or s.std is not None:
        of_channels = (-1, *(1,) * (x.dim() - 2))
        x, bytes_ = cast(x, torch.promote_types(x.dtype, s.acc)), x.dtype == torch.uint8
        mean = None if s.mean is None else cast(s.mean, x.dtype).view(of_channels)
        std = None if s.std is None else cast(s.std, x.dtype).view(of_channels)
        if bytes_:  # what they were converted to is nobody else's, and gone over as seldom as can be
            x = x if mean is None else x.sub_(mean, alpha=255)
            x = x.div_(255 if std is None else 255 * std)
        else:
            x = x if mean is None else x - mean
            x = x if std is None else x / std
    return cast(x, s.compute)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    # not torch.nn.functional's, which looks for cuDNN at every call
    return torch.layer_norm(x, weight.shape, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype), eps)
