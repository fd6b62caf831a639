"""A ragged batch of patches to tokens in plain PyTorch: a product, and positions from dense weights of each axis.

token_r = W . (x_r / 255 - mean) / std + bias + sum_yx w_h(i_r, y) w_w(j_r, x) P[y, x]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    acc = torch.promote_types(compute, torch.float32)
    rows = entering(x, mean, std, acc).to(compute)
    if source is not None:
        rows = F.pad(rows, (0, 0, 0, 1))[source]
    y = F.linear(rows, weight.to(compute), None if bias is None else bias.to(compute))
    if table is not None:
        y = y + positions(table, place, shape, mode, factored).to(compute)
    if source is not None:
        y = torch.where(source[:, None] < 0, 0, y)
    return y.to(dtype)


def positions(table: Tensor, place: Tensor, shape: tuple[int, int], mode: str, factored: bool) -> Tensor:
    """[R, D] in the accumulation dtype: table [gh gw, D], or [gh + gw, D], resampled at `place` [R, 4]."""
    acc = torch.promote_types(table.dtype, torch.float32)
    return torch.cat([w @ table.to(acc) for w in dense(place, shape, mode, factored, acc)])


def dense(place: Tensor, shape: tuple[int, int], mode: str, factored: bool, acc: torch.dtype) -> list[Tensor]:
    """The weights of every row of the table, [rows, S] for each block of tokens."""
    blocks = []
    for i in range(0, max(1, place.shape[0]), _ROWS):
        row, column, height, width = place[i : i + _ROWS].unbind(1)
        some = (height > 0)[:, None]
        y, x = (
            torch.where(some, axis_weights(mode, at, size.clamp(min=1), n, acc), 0)
            for at, size, n in ((row, height, shape[0]), (column, width, shape[1]))
        )
        blocks.append(torch.cat([y, x], 1) if factored else (y[:, :, None] * x[:, None]).flatten(1))
    return blocks
