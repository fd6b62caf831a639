"""The head in closed form. z = LN(x[b, i_b]), y = W z, u = y / max(|y|, 1e-12), out = s mean_clips u.

    dy = (du - u <u, du>) / |y|,  du = s d out / clips,      ds = sum <u, d out> / clips
    dW = dyT z,                   dz = dy W
    dx[b, i_b] = rstd (h - mean(h) - xhat mean(h xhat)),  h = gamma dz,      0 for every other token

Everything but the two products with W is a pass over one row per sample; `TorchPasses` makes them in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype

# the smallest length that a vector is divided by (torch.nn.functional.normalize)
TINY = 1e-12


@dataclass
class Head:
    """What `select_head` takes beside x, checked."""

    index: Tensor | None  # [B] int64, None: the first token
    gamma: Tensor | None  # [D]
    beta: Tensor | None  # [D]
    weight: Tensor | None  # [O, D]
    scale: Tensor | None  # []
    eps: float
    normalize: bool
    clips: int


def selected(x: Tensor, index: Tensor) -> Tensor:
    """[B, D]: token index_b of each row. A gather asserts its bounds on every device, and takes no -1 for the last."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


class TorchPasses:
    """The passes over selected rows, in plain torch."""

    @staticmethod
    def normalized(x: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(LayerNorm of the selected rows [B, D] in `dtype`, the rows, their mean [B], 1 / standard deviation [B])."""
        rows = x[:, 0].clone() if head.index is None else selected(x, head.index)
        acc = accumulation_dtype(x.dtype)
        gamma, beta = (t if t is None else t.to(acc) for t in (head.gamma, head.beta))
        z, mean, rstd = torch.native_layer_norm(rows.to(acc), [x.shape[-1]], gamma, beta, head.eps)
        return z.to(dtype), rows, mean[:, 0], rstd[:, 0]

    @staticmethod
    def unit(y: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """(s mean_clips y / |y| [B / clips, O], 1 / |y| [B]); without `normalize` 1 takes the place of |y|."""
        acc = y.to(accumulation_dtype(y.dtype))
        inverse = acc.new_ones(len(acc))
        if head.normalize:
            inverse = torch.linalg.vector_norm(acc, dim=-1).clamp_min(TINY).reciprocal()
            acc = acc * inverse[:, None]
        out = acc.unflatten(0, (-1, head.clips)).mean(1) if head.clips > 1 else acc
        if head.scale is not None:
            out = out * head.scale
        out = out.to(y.dtype)
        return out.clone() if out is y else out, inverse

    @staticmethod
    def unit_grad(g: Tensor, y: Tensor, inverse: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """(dy [B, O] in y's dtype, <u, d out> / clips [B])."""
        u = y.to(inverse.dtype) * inverse[:, None]
        g = g.to(inverse.dtype).repeat_interleave(head.clips, 0) / head.clips
        along = (u * g).sum(-1)
        du = g if head.scale is None else g * head.scale
        if head.normalize:
            # at the smallest length the divisor is a constant
            reach = torch.where(inverse < 1 / TINY, (du * u).sum(-1), 0)
            du = (du - reach[:, None] * u) * inverse[:, None]
        return du.to(y.dtype), along

    @staticmethod
    def norm_grad(dz: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, head: Head, dx: Tensor) -> None:
        """Into dx [B, L, D], zero before: the gradient of the selected rows."""
        xhat = standardized(rows, mean, rstd)
        h = dz.to(xhat.dtype) * head.gamma if head.gamma is not None else dz.to(xhat.dtype)
        d = (h - h.mean(-1, keepdim=True) - xhat * (h * xhat).mean(-1, keepdim=True)) * rstd[:, None]
        if head.index is None:
            dx[:, 0] = d.to(dx.dtype)
        else:
            dx[torch.arange(len(dx), device=dx.device), head.index] = d.to(dx.dtype)


class CompiledPasses:
    """The same on a GPU, in csrc; what one writes is empty before, dx is zero."""

    @staticmethod
    def normalized(x: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, rows = (torch.empty(len(x), x.shape[2], dtype=dtype, device=x.device) for _ in range(2))
        mean, rstd = (torch.empty(len(x), device=x.device) for _ in range(2))
        gamma, beta = (t if t is None else t.contiguous() for t in (head.gamma, head.beta))
        torch.ops.mmfuse_cuda.head_normalized(z, rows, mean, rstd, x, head.index, gamma, beta, head.eps)
        return z, rows, mean, rstd

    @staticmethod
    def unit(y: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        out, inverse = y.new_empty(len(y) // head.clips, y.shape[1]), torch.empty(len(y), device=y.device)
        torch.ops.mmfuse_cuda.head_unit(out, inverse, y, head.scale, head.normalize, head.clips)
        return out, inverse

    @staticmethod
    def unit_grad(g: Tensor, y: Tensor, inverse: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        dy, along = torch.empty_like(y), torch.empty_like(inverse)
        torch.ops.mmfuse_cuda.head_unit_grad(dy, along, g, y, inverse, head.scale, head.normalize, head.clips)
        return dy, along

    @staticmethod
    def norm_grad(dz: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, head: Head, dx: Tensor) -> None:
        gamma = head.gamma if head.gamma is None else head.gamma.contiguous()
        torch.ops.mmfuse_cuda.head_norm_grad(dx, dz.contiguous(), rows, head.index, gamma, mean, rstd)


def standardized(rows: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (rows.to(mean.dtype) - mean[:, None]) * rstd[:, None]


def affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    y = xhat if gamma is None else xhat * gamma
    return y if beta is None else y + beta


def backward(
    passes: Any,
    g: Tensor,
    x_shape: Sequence[int],
    head: Head,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor,
    inverse: Tensor,
    needs: Any,
) -> dict[str, Tensor]:
    """The gradients of x, gamma, beta, weight and scale, those that are needed."""
    found = {}
    dy, along = passes.unit_grad(g, y, inverse, head)
    if head.scale is not None and needs.scale:
        found["scale"] = along.sum().to(head.scale.dtype)
    xhat = standardized(rows, mean, rstd) if needs.gamma or needs.weight else None
    if xhat is not None and needs.weight:
        found["weight"] = product(dy.t(), affine(xhat, head.gamma, head.beta).to(dy.dtype))
    if needs.x or needs.gamma or needs.beta:
        dz = dy if head.weight is None else product(dy, head.weight)
        if needs.x:
            found["x"] = torch.zeros(x_shape, dtype=rows.dtype, device=rows.device)
            passes.norm_grad(dz, rows, mean, rstd, head, found["x"])
        dz = dz.to(mean.dtype)
        if head.gamma is not None and xhat is not None and needs.gamma:
            found["gamma"] = (dz * xhat).sum(0).to(head.gamma.dtype)
        if head.beta is not None and needs.beta:
            found["beta"] = dz.sum(0).to(head.beta.dtype)
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b; of 16-bit operands on a CPU in float32."""
    if a.device.type == "cpu" and a.dtype.itemsize == 2:
        return products.mm(a.float(), b.float()).to(a.dtype)
    return products.mm(a, b)
