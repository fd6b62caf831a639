"""Products of float32 matrices on a CPU whose vectors torch uses in half.

Torch multiplies by MKL, which takes AVX2 where a CPU is not Intel's. The compiled part takes AVX-512 there, for about
half the time with a few hundred rows or fewer, and its sums are more exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.device import half_vectors
from mmfuse.kernels._runtime.dtypes import autocast_is_on
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels._runtime.registration import is_plain

_FEWEST = 1 << 20  # multiplications


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; without a gradient by the compiled part where that is faster. Deterministic as those are."""
    if not _faster(x.numel() * weight.shape[0], x, weight, bias):
        return F.linear(x, weight, bias)
    rows = _unit(x).reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight))
    torch.ops.mmfuse_cpu.products(rows[None], _unit(weight).t()[None], None if bias is None else _unit(bias), out[None])
    return out.view(*x.shape[:-1], -1)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of [M, K] and [K, N], or of some of them, [H, M, K] and [H, K, N]; as `linear`."""
    if not _faster(x.numel() * y.shape[-1], x, y):
        return x @ y
    a, b = (t if t.dim() == 3 else t[None] for t in (x, y))
    out = x.new_empty(len(a), a.shape[1], b.shape[2])
    torch.ops.mmfuse_cpu.products(_unit(a), b if b.stride(1) == 1 else _unit(b), None, out)
    return out.view(*x.shape[:-1], -1)


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _faster(size: int, *tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return (
        size >= _FEWEST
        and is_plain(given)
        and all(t.is_cpu and t.dtype == torch.float32 for t in given)
        and half_vectors()
        and load("cpu") is None
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not autocast_is_on("cpu")
    )
