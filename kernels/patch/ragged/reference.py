"""A ragged batch of patches to tokens in plain PyTorch: a product, and positions from dense weights of each axis.

token_r = W . (x_r / 255 - mean) / std + bias + sum_yx w_h(i_r, y) w_w(j_r, x) P[y, x]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.patch.positions.axes import axis_weights
from mmfuse.kernels.patch.ragged.layout import Places
from mmfuse.kernels.patch.ragged.stem import entering

_ROWS = 4096


def patch_embed_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    places: Places,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """x [T, K] to tokens [R, D]."""
    acc, source = accumulation_dtype(compute), places.source
    rows = cast(entering(x, mean, std, acc), compute)
    if source is not None:
        rows = F.pad(rows, (0, 0, 0, 1))[source]
    y = F.linear(rows, cast(weight, compute), None if bias is None else cast(bias, compute))
    if table is not None:
        y = y + cast(positions(table, places), compute)
    if source is not None:
        y = torch.where(source[:, None] < 0, 0, y)
    return cast(y, dtype)


def positions(table: Tensor, places: Places) -> Tensor:
    """[R, D] in the accumulation dtype: table [gh gw, D], or [gh + gw, D], resampled at the places."""
    acc = accumulation_dtype(table.dtype)
    blocks = [w @ cast(table, acc) for w in dense(places, acc)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def dense(places: Places, acc: torch.dtype) -> list[Tensor]:
    """The weights of every row of the table, [rows, S] for each block of tokens; a graph of any size has one block."""
    blocks = []
    place, shape, mode = places.place, places.shape, places.mode
    rows = place.shape[0]
    for some in place.split(_ROWS) if isinstance(rows, int) and rows > _ROWS else [place]:
        at, size = some.to(acc).chunk(2, 1)  # both axes [rows, 2]
        real, size = size[:, :1].clamp(max=1), size.clamp(min=1)  # 1 where there is a position, else 0
        if shape[0] == shape[1]:
            y, x = axis_weights(mode, at, size, shape[0], acc).unbind(1)
        else:
            y, x = (axis_weights(mode, at[:, axis], size[:, axis], n, acc) for axis, n in enumerate(shape))
        if places.factored:
            blocks.append(torch.cat([y, x], 1) * real)
        else:
            blocks.append(((y * real)[:, :, None] * x[:, None]).flatten(1))
    return blocks
