"""A LayerNorm, or RMSNorm, and a LayerScale folded into the product between them, forward and backward.

    z = scale (W (gamma xhat + beta) + b) = rho (x W'^T - mu c) + d,      xhat = rho (x - mu)
    W' = diag(scale) W diag(gamma),  c = W' 1,  d = scale (W beta + b)

Nothing normalised is written or kept, and the gradients of gamma, beta and the scale fall out of those of the weight:

    R = rho dz                       t1 = dz c / K,  t2 = dz (z - d) / K
    dx = R W' - rho t1 - rho^2 t2 (x - mu)
    G = R^T x - (sum of R mu) 1^T    dW = scale raw,  raw = G diag(gamma) + (sum of dz) beta^T
    dgamma = colsum(scale W G)       dbeta = (scale W)^T sum of dz
    db = scale sum of dz             dscale = rowsum(W raw) + b sum of dz

mu, c and t1 are 0 for an RMSNorm. For one expert; over its rows all of these are sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Folded(NamedTuple):
    weight: Tensor  # W' [N, K]
    shift: Tensor  # c [N]
    bias: Tensor  # d [N]


def fold(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, centred: bool = True) -> Folded:
    """weight [N, K]; bias, scale [N]; gamma, beta [K]. The shift is that of the weight as it is rounded."""
    folded = scale[:, None] * weight * gamma
    shift = folded.sum(1) if centred else torch.zeros_like(bias)
    return Folded(folded, shift, scale * (weight @ beta + bias))


def statistics(x: Tensor, eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """(mu, rho) [T, 1] of rows [T, K]."""
    mean = x.mean(1, keepdim=True) if centred else x.new_zeros(len(x), 1)
    return mean, ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()


def folded_linear(x: Tensor, f: Folded, mean: Tensor, rstd: Tensor) -> Tensor:
    """z [T, N] of rows [T, K]."""
    return rstd * (x @ f.weight.t() - mean * f.shift) + f.bias


class FoldedGrads(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    scale: Tensor


def folded_linear_grads(
    dz: Tensor,
    z: Tensor,
    x: Tensor,
    f: Folded,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
) -> FoldedGrads:
    """Of all that was folded, from the gradient of z and one product R^T x."""
    k, r = x.shape[1], rstd * dz
    t1 = (dz @ f.shift / k)[:, None]
    t2 = (dz * (z - f.bias)).sum(1, keepdim=True) / k
    dx = r @ f.weight - rstd * t1 - rstd.square() * t2 * (x - mean)
    g = r.t() @ x - (r * mean).sum(0)[:, None]
    total, scaled = dz.sum(0), scale[:, None] * weight
    raw = g * gamma + total[:, None] * beta
    return FoldedGrads(
        x=dx,
        weight=scale[:, None] * raw,
        bias=scale * total,
        gamma=(scaled * g).sum(0),
        beta=scaled.t() @ total,
        scale=(weight * raw).sum(1) + bias * total,
    )
