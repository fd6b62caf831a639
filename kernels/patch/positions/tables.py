"""Position tables that are computed: sinusoids in one and two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoid_1d(
    length: int,
    dim: int,
    *,
    temperature: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """[length, dim]: sin in the even columns, cos in the odd ones (Vaswani et al. 2017, section 3.5), as in VideoMAE.

    Angles are computed in float64, then rounded.
    """
    if length < 0 or dim < 1:
        raise ValueError(f"length is {length} and dim is {dim}, expected length >= 0 and dim >= 1")
    pair = 2 * (torch.arange(dim, dtype=torch.float64) // 2)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / torch.pow(temperature, pair / dim)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.to(device=device, dtype=dtype)


def sinusoid_2d(
    height: int,
    width: int,
    dim: int,
    *,
    temperature: float = 10000.0,
    columns_first: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """[height * width, dim], row by row: dim / 4 each of sin, cos of the column, then sin, cos of the row, as in MAE.

    Args:
        columns_first: False puts the row's half first.

    Angles are computed in float64, then rounded. `dim` is divisible by 4.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim is {dim}, expected a multiple of 4")
    omega = 1.0 / temperature ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in (height, width))
    y = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(height, width, -1)
    x = torch.cat([columns.sin(), columns.cos()], 1).expand(height, width, -1)
    table = torch.cat([x, y] if columns_first else [y, x], 2).reshape(height * width, dim)
    return table.to(device=device, dtype=dtype)
