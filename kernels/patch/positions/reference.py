"""Resampled position tables in plain PyTorch: the field's own calls on the whole table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.patch.positions.axes import CLOSED, axis_matrix


def interpolate_position(table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    """table [gh, gw, D] to [h * w, D]: the first h x w positions of a grid of `size`."""
    gh, gw, d = table.shape
    x = table.to(torch.promote_types(table.dtype, torch.float32))
    # torch's antialiased cubic is wrong for a result of one column
    if mode in (*CLOSED, "grid_sample") or (mode == "bicubic_aa" and size[1] == 1):
        rows, columns = (
            axis_matrix(mode, n, g, x.dtype, x.device)[:m] for n, g, m in zip(size, (gh, gw), (h, w), strict=True)
        )
        return torch.einsum("yi,ijd,xj->yxd", rows, x, columns).reshape(h * w, d).to(table.dtype)
    x = x.permute(2, 0, 1)[None]
    if mode == "bicubic_scale":
        y = torch.ops.aten.upsample_bicubic2d.default(x, size, False, size[0] / gh, size[1] / gw)
    else:
        kind, _, option = mode.partition("_")
        y = F.interpolate(x, size, mode=kind, antialias=option == "aa")
    return y[0, :, :h, :w].flatten(1).t().to(table.dtype)


def resample(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """R_h P R_wT: table [gh, gw, D], rows [h, gh], columns [w, gw] to [h, w, D]."""
    gh, gw, d = table.shape
    y = (rows @ table.reshape(gh, gw * d)).view(-1, gw, d)
    return torch.matmul(columns, y)


def resample_adjoint(grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """R_hT g R_w: grad [h, w, D] to [gh, gw, D]."""
    h, _, d = grad.shape
    gw = columns.shape[1]
    y = torch.matmul(columns.t(), grad)
    return (rows.t() @ y.reshape(h, gw * d)).view(-1, gw, d)
