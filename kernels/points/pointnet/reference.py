"""The mini-PointNet on whole tensors: its meaning, the global feature repeated for every neighbour as published."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.points.pointnet.blocked import Layers


def mini_pointnet(x: Tensor, layers: Layers) -> Tensor:
    """[M, D] of groups x [M, k, C]."""
    return _tokens(_third(x, layers, layers.b3), x, layers)


def training(x: Tensor, layers: Layers, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same with batch normalisation of the third product, and its mean [C3] and biased variance [C3]."""
    v = _third(x, layers, None)
    (n, channels), acc = v.shape, accumulation_dtype(v.dtype)
    # running statistics that are replaced by these ones, of which the variance is not biased
    mean, var = (v.new_zeros(channels, dtype=acc) for _ in range(2))
    h = F.batch_norm(v, mean, var, cast(scale, acc).contiguous(), cast(layers.b3, acc), True, 1.0, eps)
    return _tokens(h, x, layers), mean, var * ((n - 1) / n)


def _third(x: Tensor, layers: Layers, bias: Tensor | None) -> Tensor:
    """[M k, C3]. A product of groups would make rows of them, and groups of rows again: they are rows here."""
    f = F.linear(F.linear(x.flatten(0, 1), layers.w1, layers.b1).relu(), layers.w2, layers.b2)
    f = f.view(*x.shape[:2], f.shape[1])
    g = f.max(1, keepdim=True).values
    return F.linear(torch.cat([g.expand_as(f), f], 2).flatten(0, 1), layers.w3, bias)


def _tokens(h: Tensor, x: Tensor, layers: Layers) -> Tensor:
    y = F.linear(h.relu(), layers.w4, layers.b4)
    return y.view(*x.shape[:2], y.shape[1]).max(1).values
