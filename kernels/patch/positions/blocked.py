"""A position table resampled by the matrices of its two axes, and the transpose of that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.patch.positions.axes import axis_matrix
from mmfuse.kernels.patch.positions.reference import resample, resample_adjoint


def _axes(table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> list[Tensor]:
    ends, acc = zip(size, table.shape[:2], (h, w), strict=True), accumulation_dtype(table.dtype)
    return [axis_matrix(mode, n, g, acc, table.device)[:m] for n, g, m in ends]


def interpolate_position(table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    """table [gh, gw, D] to [h * w, D]."""
    rows, columns = _axes(table, h, w, size, mode)
    return resample(table.to(rows.dtype), rows, columns).view(h * w, -1).to(table.dtype)


def interpolate_position_adjoint(g: Tensor, table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    """g [h * w, D] to [gh, gw, D]."""
    rows, columns = _axes(table, h, w, size, mode)
    return resample_adjoint(g.to(rows.dtype).reshape(h, w, -1), rows, columns).to(table.dtype)
