"""A ragged batch of patches to tokens in plain PyTorch: a product, and positions from dense weights of each axis.

token_r = W . (x_r / 255 - mean) / std + bias + sum_yx w_h(i_r, y) w_w(j_r, x) P[y, x]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.patch.positions.axes import axis_weights
from mmfuse.kernels.patch.ragged.stem import entering

_ROWS = 4096


def patch_embed_packed(
    place: Tensor,
    source: Tensor | None,
    shape: tuple[int, int],
    mode: str,
    factored: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """x [T, K] to tokens [R, D]."""
    acc = accumulation_dtype(compute)
    rows = cast(entering(x, mean, std, acc), compute)
    if source is not None:
        rows = F.pad(rows, (0, 0, 0, 1))[source]
    y = F.linear(rows, cast(weight, compute), None if bias is None else cast(bias, compute))
    if table is not None:
        y = y + cast(positions(table, place, shape, mode, factored), compute)
    if source is not None:
        y = torch.where(source[:, None] < 0, 0, y)
    return cast(y, dtype)


def positions(table: Tensor, place: Tensor, shape: tuple[int, int], mode: str, factored: bool) -> Tensor:
    """[R, D] in the accumulation dtype: table [gh gw, D], or [gh + gw, D], resampled at `place` [R, 4]."""
    acc = accumulation_dtype(table.dtype)
    blocks = [w @ cast(table, acc) for w in dense(place, shape, mode, factored, acc)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def dense(place: Tensor, shape: tuple[int, int], mode: str, factored: bool, acc: torch.dtype) -> list[Tensor]:
    """The weights of every row of the table, [rows, S] for each block of tokens; a graph of any size has one block."""
    blocks = []
    rows = place.shape[0]
    for some in place.split(_ROWS) if isinstance(rows, int) and rows > _ROWS else [place]:
        at, size = some.chunk(2, 1)  # both axes [rows, 2]
        real = (size[:, :1] > 0)[..., None]
        if shape[0] == shape[1]:
            y, x = torch.where(real, axis_weights(mode, at, size.clamp(min=1), shape[0], acc), 0).unbind(1)
        else:
            y, x = (
                torch.where(real[:, 0], axis_weights(mode, at[:, axis], size[:, axis].clamp(min=1), n, acc), 0)
                for axis, n in enumerate(shape)
            )
        blocks.append(torch.cat([y, x], 1) if factored else (y[:, :, None] * x[:, None]).flatten(1))
    return blocks
