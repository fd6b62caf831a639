"""The head in closed form. z = LN(x[b, i_b]), y = W z, u = y / max(|y|, 1e-12), out = s mean_clips u.

    dy = (du - u <u, du>) / |y|,  du = s d out / clips,      ds = sum <u, d out> / clips
    dW = dyT z,                   dz = dy W
    dx[b, i_b] = rstd (h - mean(h) - xhat mean(h xhat)),  h = gamma dz,      0 for every other token

Everything but the two products with W is a pass over one row per sample; `TorchPasses` makes them in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype

# the smallest length that a vector is divided by (torch.nn.functional.normalize)
TINY = 1e-12


class TorchPasses:
    """The passes over selected rows, in plain torch."""

    @staticmethod
    def normalized(
        x: Tensor, index: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(LayerNorm of the selected rows [B, D] in `dtype`, the rows, their mean [B], 1 / standard deviation [B])."""
        rows = x[:, 0].clone() if index is None else x[torch.arange(x.shape[0], device=x.device), index]
        acc = accumulation_dtype(x.dtype)
        gamma, beta = (t if t is None else t.to(acc) for t in (gamma, beta))
        z, mean, rstd = torch.native_layer_norm(rows.to(acc), [x.shape[-1]], gamma, beta, eps)
        return z.to(dtype), rows, mean[:, 0], rstd[:, 0]

    @staticmethod
    def unit(y: Tensor, scale: Tensor | None, normalize: bool, clips: int) -> tuple[Tensor, Tensor]:
        """(s mean_clips y / |y| [B / clips, O], 1 / |y| [B]); without `normalize` 1 takes the place of |y|."""
        acc = y.to(accumulation_dtype(y.dtype))
        inverse = acc.new_ones(len(acc))
        if normalize:
            inverse = torch.linalg.vector_norm(acc, dim=-1).clamp_min(TINY).reciprocal()
            acc = acc * inverse[:, None]
        out = acc.unflatten(0, (-1, clips)).mean(1) if clips > 1 else acc
        if scale is not None:
            out = out * scale
        out = out.to(y.dtype)
        return out.clone() if out is y else out, inverse

    @staticmethod
    def unit_grad(
        g: Tensor, y: Tensor, inverse: Tensor, scale: Tensor | None, normalize: bool, clips: int
    ) -> tuple[Tensor, Tensor]:
        """(dy [B, O] in y's dtype, <u, d out> / clips [B])."""
        u = y.to(inverse.dtype) * inverse[:, None]
        g = g.to(inverse.dtype).repeat_interleave(clips, 0) / clips
        along = (u * g).sum(-1)
        du = g if scale is None else g * scale
        if normalize:
            # at the smallest length the divisor is a constant
            reach = torch.where(inverse < 1 / TINY, (du * u).sum(-1), 0)
            du = (du - reach[:, None] * u) * inverse[:, None]
        return du.to(y.dtype), along

    @staticmethod
    def norm_grad(
        dz: Tensor, rows: Tensor, index: Tensor | None, gamma: Tensor | None, mean: Tensor, rstd: Tensor, length: int
    ) -> Tensor:
        """dx [B, length, D]."""
        xhat = standardized(rows, mean, rstd)
        h = dz.to(xhat.dtype) * gamma if gamma is not None else dz.to(xhat.dtype)
        d = (h - h.mean(-1, keepdim=True) - xhat * (h * xhat).mean(-1, keepdim=True)) * rstd[:, None]
        dx = torch.zeros(len(rows), length, rows.shape[1], dtype=rows.dtype, device=rows.device)
        if index is None:
            dx[:, 0] = d.to(rows.dtype)
        else:
            dx[torch.arange(len(rows), device=rows.device), index] = d.to(rows.dtype)
        return dx


class CompiledPasses:
    """The same on a GPU, in csrc; what one writes is empty before, dx is zero."""

    @staticmethod
    def normalized(
        x: Tensor, index: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, rows = (torch.empty(len(x), x.shape[2], dtype=dtype, device=x.device) for _ in range(2))
        mean, rstd = (torch.empty(len(x), device=x.device) for _ in range(2))
        gamma, beta = (t if t is None else t.contiguous() for t in (gamma, beta))
        torch.ops.mmfuse_cuda.head_normalized(z, rows, mean, rstd, x, index, gamma, beta, eps)
        return z, rows, mean, rstd

    @staticmethod
    def unit(y: Tensor, scale: Tensor | None, normalize: bool, clips: int) -> tuple[Tensor, Tensor]:
        out, inverse = y.new_empty(len(y) // clips, y.shape[1]), torch.empty(len(y), device=y.device)
        torch.ops.mmfuse_cuda.head_unit(out, inverse, y, scale, normalize, clips)
        return out, inverse

    @staticmethod
    def unit_grad(
        g: Tensor, y: Tensor, inverse: Tensor, scale: Tensor | None, normalize: bool, clips: int
    ) -> tuple[Tensor, Tensor]:
        dy, along = torch.empty_like(y), torch.empty_like(inverse)
        torch.ops.mmfuse_cuda.head_unit_grad(dy, along, g, y, inverse, scale, normalize, clips)
        return dy, along

    @staticmethod
    def norm_grad(
        dz: Tensor, rows: Tensor, index: Tensor | None, gamma: Tensor | None, mean: Tensor, rstd: Tensor, length: int
    ) -> Tensor:
        dx = torch.zeros(len(rows), length, rows.shape[1], dtype=rows.dtype, device=rows.device)
        gamma = gamma if gamma is None else gamma.contiguous()
        torch.ops.mmfuse_cuda.head_norm_grad(dx, dz.contiguous(), rows, index, gamma, mean, rstd)
        return dx


def standardized(rows: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (rows.to(mean.dtype) - mean[:, None]) * rstd[:, None]


def affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    y = xhat if gamma is None else xhat * gamma
    return y if beta is None else y + beta


def backward(
    passes: Any,
    g: Tensor,
    x_shape: Sequence[int],
    index: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor,
    inverse: Tensor,
    normalize: bool,
    clips: int,
    needs: Any,
) -> dict[str, Tensor]:
    """The gradients of x, gamma, beta, weight and scale, those that are needed."""
    found = {}
    dy, along = passes.unit_grad(g, y, inverse, scale, normalize, clips)
    if scale is not None and needs.scale:
        found["scale"] = along.sum().to(scale.dtype)
    xhat = standardized(rows, mean, rstd) if needs.gamma or needs.weight else None
    if xhat is not None and needs.weight:
        found["weight"] = product(dy.t(), affine(xhat, gamma, beta).to(dy.dtype))
    if needs.x or needs.gamma or needs.beta:
        dz = dy if weight is None else product(dy, weight)
        if needs.x:
            found["x"] = passes.norm_grad(dz, rows, index, gamma, mean, rstd, x_shape[1])
        dz = dz.to(mean.dtype)
        if gamma is not None and xhat is not None and needs.gamma:
            found["gamma"] = (dz * xhat).sum(0).to(gamma.dtype)
        if beta is not None and needs.beta:
            found["beta"] = dz.sum(0).to(beta.dtype)
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b; of 16-bit operands on a CPU in float32."""
    if a.device.type == "cpu" and a.dtype.itemsize == 2:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b
