"""The same in plain torch without a matrix of N K elements."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.codebook.reference import first_of_largest, in_float64, masked, rotation

# of the scores of a block of rows
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def code_argmax(
    z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None, exact: bool
) -> Tensor:
    """argmax_k scale_k <z, w_k> + bias_k over blocks of rows, in float64, or in float32 if not exact."""
    if exact:
        z, weight, tie = in_float64(z, weight, scale, bias)
    else:
        acc = accumulation_dtype(z.dtype)
        z, weight, tie = z.to(acc), weight.to(acc), z.new_zeros((), dtype=acc)
        weight = weight if scale is None else weight * scale.to(acc)[:, None]
    bias = weight.new_zeros(()) if bias is None else bias.to(weight.dtype)
    (n, _), k = z.shape, len(weight)
    rows = max(1, min(n, _BLOCK_BYTES[z.device.type] // (k * z.dtype.itemsize)))
    memory = torch.empty(rows, k, dtype=z.dtype, device=z.device)
    codes = torch.empty(n, dtype=torch.int64, device=z.device)
    for i in range(0, n, rows):
        block = z[i : i + rows]
        s = torch.addmm(bias, block, weight.t(), out=memory[: len(block)])
        codes[i : i + rows] = first_of_largest(s, tie[i : i + rows]) if exact else s.argmax(1)
    return masked(codes, mask)


def code_statistics(z: Tensor, codes: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(counts [K], sums [K, D]): rows in the order of their codes, and a sum of each stretch."""
    order, bounds = segments(codes, K)
    rows = z[order].to(accumulation_dtype(z.dtype))
    sums = torch.segment_reduce(rows, "sum", lengths=bounds.diff(), unsafe=True)[:K]
    return bounds.diff()[:K].to(rows.dtype), sums


def segments(codes: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(rows in the order of their codes [N], where each code begins [K + 2]); codes outside 0 .. K - 1 come last."""
    ordered, order = torch.where((codes >= 0) & (codes < K), codes, K).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(K + 2, device=codes.device))


def rows_of(codebook: Tensor, codes: Tensor) -> Tensor:
    """The code of each row [N, D], zeros for the code -1."""
    # an index of -1 is the last row
    return torch.cat([codebook, codebook.new_zeros(1, codebook.shape[1])])[codes]


def assign(
    z: Tensor, codebook: Tensor, codes: Tensor, beta: float, codebook_weight: float, gradient: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q [N, D], loss, 1 / (elements that count))."""
    acc, kept = accumulation_dtype(z.dtype), codes >= 0
    e = rows_of(codebook, codes)
    share = 1 / (kept.sum().clamp_min(1) * z.shape[1]).to(acc)
    difference = z.to(acc) - e
    distance = torch.where(kept, torch.linalg.vecdot(difference, difference), 0).sum()
    if gradient != "none":
        # z + (e - z), without its rounding: what is not a number in z is none in e, nor in a row that is turned
        row = z if gradient == "straight_through" else (difference * 0).sum(1, keepdim=True)
        e.add_(row, alpha=0).masked_fill_(~kept[:, None], 0)
    return e, (beta + codebook_weight) * share * distance, share


def gradient_of_rows(
    g: Tensor | None, g_loss: Tensor | None, z: Tensor, codebook: Tensor, codes: Tensor, gradient: str
) -> Tensor:
    """dz of (z_q, loss); `g_loss` is already 2 beta share dloss."""
    acc = accumulation_dtype(z.dtype)
    x, y = z.to(acc), rows_of(codebook, codes).to(acc)
    routed = None
    if g is not None and gradient == "straight_through":
        routed = g.to(acc)
    elif g is not None and gradient == "rotation":
        # the transpose of the reference's constant matrix: a and b change places
        a, b, w, ratio = rotation(x, y)
        g = g.to(acc)
        routed = ratio * (g - 2 * (g * w).sum(1, keepdim=True) * w + 2 * (g * b).sum(1, keepdim=True) * a)
    if g_loss is None:
        dz = torch.zeros_like(x) if routed is None else routed
    else:
        dz = g_loss * (x - y) if routed is None else torch.addcmul(routed, x - y, g_loss)
    return torch.where((codes >= 0)[:, None], dz, 0).to(z.dtype).contiguous()
