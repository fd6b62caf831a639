"""The mini-PointNet on whole tensors: its meaning, the global feature repeated for every neighbour as published."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast


def mini_pointnet(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor
) -> Tensor:
    """[M, D] of groups x [M, k, C]."""
    h = _third(x, w1, b1, w2, b2, w3, b3)
    return F.linear(h.relu(), w4, b4).max(1).values


def training(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor,
    scale: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with batch normalisation of the third product, and its mean [C3] and biased variance [C3]."""
    v = _third(x, w1, b1, w2, b2, w3, None)
    rows, acc = v.flatten(0, 1), accumulation_dtype(v.dtype)
    n = rows.shape[0]
    # running statistics that are replaced by these ones, of which the variance is not biased
    mean, var = (rows.new_zeros(rows.shape[1], dtype=acc) for _ in range(2))
    h = F.batch_norm(rows, mean, var, cast(scale, acc).contiguous(), cast(b3, acc), True, 1.0, eps).view_as(v)
    return F.linear(h.relu(), w4, b4).max(1).values, mean, var * ((n - 1) / n)


def _third(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor | None) -> Tensor:
    f = F.linear(F.linear(x, w1, b1).relu(), w2, b2)
    g = f.max(1, keepdim=True).values
    return F.linear(torch.cat([g.expand_as(f), f], 2), w3, b3)
