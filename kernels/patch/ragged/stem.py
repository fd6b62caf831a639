"""The product of a ragged batch: weights into which the normalisation of the pixels is folded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Folded(NamedTuple):
    """y = V (x - n) + c for raw pixels x."""

    weight: Tensor  # [D, K] V = W s, rounded to `compute`
    bias: Tensor  # [D] c = b - V (m - n)
    scale: Tensor | None  # [K] s
    rest: Tensor | None  # [K] m - n, m the mean
    subtract: Tensor | None  # [K] n, for bytes the whole number next to m: x - n is exact in 16 bits, nothing cancels


def fold(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None, compute: torch.dtype
) -> Folded:
    """The mean goes through the rounded weight, so that it subtracts what the product adds."""
    acc = torch.promote_types(weight.dtype, torch.float32)
    c = weight.new_zeros(len(weight), dtype=acc) if bias is None else bias.to(acc)
    if mean is None and std is None:
        return Folded(weight.to(compute), c, None, None, None)
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    scale = torch.ones(x.shape[-1], dtype=acc, device=x.device) if std is None else 1 / std.to(acc)
    scale = scale / unit
    v = (weight.to(acc) * scale).to(compute)
    if mean is None:
        return Folded(v, c, scale, None, None)
    rest, subtract = mean.to(acc) * unit, None
    if x.dtype == torch.uint8:
        subtract = rest.round()
        rest = rest - subtract
    return Folded(v, c - v.to(acc) @ rest, scale, rest, subtract)


def weight_grad(f: Folded, product: Tensor, total: Tensor) -> Tensor:
    """dW = s (dyT (x - n) - (m - n) sum dy), of the product dyT (x - n) [D, K] and the sum of dy [D]."""
    if f.rest is not None:
        product = product - total[:, None] * f.rest
    return product if f.scale is None else product * f.scale


def entering(x: Tensor, mean: Tensor | None, std: Tensor | None, acc: torch.dtype) -> Tensor:
    """Pixels [..., K] as the model sees them."""
    if mean is None and std is None:
        return x
    y = x.to(acc)
    if x.dtype == torch.uint8:
        y = y / 255
    y = y if mean is None else y - mean.to(acc)
    return y if std is None else y / std.to(acc)
