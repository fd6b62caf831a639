"""The same in plain torch without a matrix of N K elements."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.codebook.reference import first_of_largest, in_float64, masked, rotation

# of the scores of a block of rows
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_FEW = 16  # codes of a row that are scored again one by one
_GROUP = 64  # scores or a few more, of which the largest says whether one of them may be its row's


def code_argmax(
    z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None, exact: bool
) -> Tensor:
    """argmax_k scale_k <z, w_k> + bias_k over blocks of rows, as float64 finds it, or as float32 if not exact."""
    if not exact:
        codes = _largest(*_in_float32(z, weight, scale), None, bias)
    elif _has_known_errors(z):
        codes = _of_candidates(z, weight, scale, bias)
    else:
        codes = _in_float64(z, weight, scale, bias)
    return masked(codes, mask)


def _in_float32(z: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(z.dtype)
    return z.to(acc), weight.to(acc) if scale is None else (weight * scale[:, None]).to(acc)


def _scores(z: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their scores) of one block after another, in the same memory; -inf up to whole groups."""
    (n, _), k = z.shape, len(weight)
    offset = weight.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    height = max(1, min(n, _BLOCK_BYTES[z.device.type] // (k * dtype.itemsize)))
    memory = torch.empty(height, math.prod(_groups(k)), dtype=dtype, device=z.device)
    memory[:, k:] = -torch.inf
    for i in range(0, n, height):
        block, s = z[i : i + height], memory[: min(height, n - i)]
        products.mm(block, weight.t(), s[:, :k]).add_(offset)
        yield slice(i, i + height), s


def _groups(k: int) -> tuple[int, int]:
    """How many, and the scores in each."""
    groups = max(1, k // _GROUP)
    return groups, -(-k // groups)


def _largest(z: Tensor, weight: Tensor, tie: Tensor | None, bias: Tensor | None) -> Tensor:
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for rows, s in _scores(z, weight, bias, z.dtype):
        codes[rows] = s.argmax(1) if tie is None else first_of_largest(s, tie[rows])
    return codes


def _in_float64(z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return _largest(*in_float64(z, weight, scale, bias), bias)


def _has_known_errors(z: Tensor) -> bool:
    """Whether torch multiplies in float32: not on a GPU with TF32, nor where a CPU may round to bfloat16."""
    full = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    return bool(full and z.device.type == "cpu" and z.dtype != torch.float64)


def _of_candidates(z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a fast product cannot tell from its largest score is scored again in float64, on a CPU."""
    (k, d), native = weight.shape, z.dtype == torch.bfloat16 and scale is None
    in_group = _groups(k)
    x, w = (z, weight) if native else _in_float32(z, weight, scale)
    rounded = native and not products.pairs()
    # 1.01, as a norm in 16 bits is rounded
    norm, largest = 1.01 * torch.linalg.vector_norm(x, dim=1).double(), 1.01 * torch.linalg.vector_norm(w, dim=1).amax()
    size = norm * largest.double() + (0 if bias is None else bias.abs().amax())
    gap = 2 * (d + 8) * 2.0**-24 * size
    # neither overflows, nor counts what underflows
    safe = (norm > 2.0**-60) & (norm < 2.0**60) & (largest > 2.0**-60) & (largest < 2.0**60) & (size < 2.0**120)
    codes = torch.full((len(z),), -1)
    for rows, s in _scores(x, w, None if rounded else bias, x.dtype if rounded else torch.float32):
        best = None
        if rounded and bias is not None:
            rounding = 2.0**-7 * s.abs().float()
            rounding[:, k:] = 0
            s = s.float()
            s[:, :k] += bias.float()
            best, s = (s - rounding).amax(1), s.add_(rounding)
        groups = s.unflatten(1, in_group)
        tops = groups.amax(2)
        best = tops.amax(1) if best is None else best
        # scores are rounded, and so is this threshold
        least = best.double() - gap[rows] - (2.0**-6 if s.dtype == torch.bfloat16 else 2.0**-21) * best.abs()
        least = least.to(s.dtype)[:, None]
        row, group = (tops >= least).nonzero(as_tuple=True)
        found, within = (groups[row, group] >= least[row]).nonzero(as_tuple=True)
        row, code = row[found], group[found] * in_group[1] + within
        count = row.bincount(minlength=len(s))
        few = safe[rows] & (count <= _FEW) & best.isfinite()
        row, code = row[few[row]], code[few[row]]
        codes[rows] = torch.where(few, k, -1).scatter_reduce_(0, row, code, "amin")
        several = few & (count > 1)
        row, code = row[several[row]], code[several[row]]
        exact = (z[rows][row].double() * weight[code].double()).sum(1)
        exact = exact if scale is None else exact * scale[code]
        exact = exact if bias is None else exact + bias[code]
        top = exact.new_full((len(s),), -torch.inf).scatter_reduce_(0, row, exact, "amax")
        wins = exact >= (top - 2.0**-51 * (d + 8) * size[rows])[row]
        nearest = codes[rows].masked_fill_(several, k).scatter_reduce_(0, row[wins], code[wins], "amin")
        codes[rows] = nearest
    left = (codes < 0).nonzero().squeeze(1)
    if len(left):
        codes[left] = _in_float64(z[left], weight, scale, bias)
    return codes


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


def rows_of(codebook: Tensor, codes: Tensor, masked: bool) -> Tensor:
    """The code of each row [N, D], zeros for the code -1, of which there are none unless `masked`."""
    if not masked:
        return codebook.index_select(0, codes)
    # an index of -1 is the last row
    return torch.cat([codebook, codebook.new_zeros(1, codebook.shape[1])])[codes]


def assign(
    z: Tensor, codebook: Tensor, codes: Tensor, beta: float, codebook_weight: float, gradient: str, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q [N, D], loss, 1 / (elements that count))."""
    acc, e = accumulation_dtype(z.dtype), rows_of(codebook, codes, masked)
    difference = cast(z, acc) - e
    distance = torch.linalg.vecdot(difference, difference)
    if gradient != "none":
        # z + (e - z), without its rounding: what is not a number in z is none in e, nor in a row that is turned
        e.add_(z if gradient == "straight_through" else (difference * 0).sum(1, keepdim=True), alpha=0)
    if masked:
        kept = codes >= 0
        share = 1 / (kept.sum().clamp_min(1) * z.shape[1]).to(acc)
        distance = torch.where(kept, distance, 0)
        e = e if gradient == "none" else e.masked_fill_(~kept[:, None], 0)
    else:
        share = distance.new_full((), 1 / max(1, z.numel()))
    return e, (beta + codebook_weight) * share * distance.sum(), share


def gradient_of_rows(
    g: Tensor | None, g_loss: Tensor | None, z: Tensor, codebook: Tensor, codes: Tensor, gradient: str, masked: bool
) -> Tensor:
    """dz of (z_q, loss); `g_loss` is already 2 beta share dloss."""
    acc = accumulation_dtype(z.dtype)
    x, y = cast(z, acc), cast(rows_of(codebook, codes, masked), acc)
    routed = None
    if g is not None and gradient == "straight_through":
        routed = cast(g, acc)
    elif g is not None and gradient == "rotation":
        # the transpose of the reference's constant matrix: a and b change places
        a, b, w, ratio = rotation(x, y)
        g = g.to(acc)
        routed = ratio * (g - 2 * (g * w).sum(1, keepdim=True) * w + 2 * (g * b).sum(1, keepdim=True) * a)
    if g_loss is None:
        dz = torch.zeros_like(x) if routed is None else routed
    else:
        dz = g_loss * (x - y) if routed is None else torch.addcmul(routed, x - y, g_loss)
    dz = torch.where((codes >= 0)[:, None], dz, 0) if masked else dz
    return cast(dz, z.dtype).contiguous()
