"""Codes, their statistics and the quantized rows on whole matrices: the meaning of the operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import check_range
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast

# of the norms in the rotation trick, as in vector-quantize-pytorch
EPS = 1e-6


def code_argmax(z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """argmax_k scale_k <z, w_k> + bias_k in float64, whatever the dtype; -1 where the mask is False."""
    z, weight, tie = in_float64(z, weight, scale, bias)
    s = z @ weight.t()
    return masked(first_of_largest(s if bias is None else s + bias, tie), mask)


def in_float64(z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """z and the scaled weight in float64, and what its rounding may change in a score of each row [N, 1]."""
    z, weight = z.double(), weight.double()
    weight = weight if scale is None else weight * scale[:, None]
    size = torch.linalg.vector_norm(z, dim=1, keepdim=True) * torch.linalg.vector_norm(weight, dim=1).amax()
    size = size if bias is None else size + bias.abs().amax()
    # what is infinite is not rounded
    return z, weight, torch.where(size.isfinite(), 2.0**-51 * (z.shape[1] + 8) * size, 0)


def first_of_largest(s: Tensor, tie: Tensor) -> Tensor:
    """The first column of each row that is within `tie` of the largest; a NaN is the largest, as in torch.argmax."""
    largest = s.amax(1, keepdim=True)
    return ((s >= largest - tie) | (s == largest) | s.isnan()).to(torch.uint8).argmax(1)


def masked(codes: Tensor, mask: Tensor | None) -> Tensor:
    return codes if mask is None else torch.where(mask, codes, -1)


def code_statistics(z: Tensor, codes: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The number of rows of each code and their sum."""
    key = torch.where((codes >= 0) & (codes < K), codes, K)
    counts = F.one_hot(key, K + 1)[:, :K].sum(0)
    # no product with that matrix: 0 times what is not a number, in a row of another code, would be none
    rows = z.to(accumulation_dtype(z.dtype))
    sums = rows.new_zeros(K + 1, z.shape[1]).index_put_((key,), rows, accumulate=True)
    return counts.to(rows.dtype), sums[:K]


def assign(
    z: Tensor, codebook: Tensor, codes: Tensor, beta: float, codebook_weight: float, gradient: str, masked: bool
) -> tuple[Tensor, Tensor]:
    """(z_q [N, D], loss) of rows with known codes; see `vector_quantize`."""
    check_range("codes", codes, len(codebook), "the rows of codebook", least=-1 if masked else 0)
    count: Tensor | int = max(1, z.shape[0])
    e = F.embedding(codes.clamp_min(0) if masked else codes, codebook)
    x, y = (cast(t, accumulation_dtype(t.dtype)) for t in (z, e))
    if masked:
        kept = (codes >= 0)[:, None]
        count = kept.sum().clamp_min(1)
        # what has no code is 0 from here on: no gradient comes out of it, be it NaN
        x, y = (torch.where(kept, t, 0) for t in (x, y))
    gap = x - y.detach()
    loss = beta * gap.square().sum()
    if codebook_weight:
        loss = loss + codebook_weight * (x.detach() - y).square().sum()
    elif y.requires_grad:
        # a weight of 0 leaves a gradient of 0, also where it would multiply NaN
        loss = loss + 0 * y.nan_to_num().sum()
    loss = loss / (count * z.shape[1])
    if gradient == "straight_through":
        routed = x - gap.detach()
    elif gradient == "rotation":
        # the code itself: a row of zeros has no direction that could be turned onto it
        turned = _rotated(x, y.detach())
        routed = turned + (y - turned).detach()
    else:
        routed = y
    return cast(routed, z.dtype), loss


def _rotated(x: Tensor, y: Tensor) -> Tensor:
    """x turned and stretched onto y by a constant matrix (Fifty et al. 2024, section 4.2)."""
    a, b, w, ratio = rotation(x.detach(), y)
    # the dot products of a row
    turned = x - 2 * (x * w).sum(1, keepdim=True) * w + 2 * (x * a).sum(1, keepdim=True) * b
    return ratio * turned


def rotation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a = x / |x|, b = y / |y|, w = (a + b) / |a + b| and |y| / |x| of each row."""
    norm_x, norm_y = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (x, y))
    a, b = x / norm_x.clamp_min(EPS), y / norm_y.clamp_min(EPS)
    return a, b, F.normalize(a + b, dim=1, eps=EPS), norm_y / norm_x.clamp_min(EPS)
