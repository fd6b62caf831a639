"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch brings along.

torch gives them to MKL, whose AVX-512 code is for Intel's CPUs alone. oneDNN, which torch convolves and multiplies 16
bits with, has it for every CPU: on AMD's it takes half of MKL's time. It adds up all of K in one go, which rounds more
(2.2 times MKL's error at K = 2048), so K comes in parts (1.2 times). Nothing here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.device import cpu, once, vectors

LEAST = 1 << 21  # multiplications, from which on choosing costs nothing
_PART = 256  # of K, which is added up in one go
_ROWS = 128  # of A, from which on it pays to lay out B for them


@once
def onednn_is_faster() -> bool:
    """Whether MKL leaves this CPU's widest vectors alone."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and vectors().startswith("avx512") and cpu("vendor_id") not in ("", "GenuineIntel")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, of [M, K] and [K, N]."""
    if parts := _parts(a, b):
        return _into(out, _onednn(a, b, None, parts))
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] += a b."""
    parts = _parts(a, b)
    return total.add_(_onednn(a, b, None, parts)) if parts else total.addmm_(a, b)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias + add, of x [M, K], weight [N, K], bias [N] and add [M, N]."""
    w_t = weight.t()
    if parts := _parts(x, w_t):
        y = _onednn(x, w_t, bias, parts)
        return _into(out, y) if add is None else torch.add(y, add, out=y if out is None else out)
    if add is not None and bias is not None:
        y = torch.add(add, bias) if out is None else torch.add(add, bias, out=out)
        return y.addmm_(x, w_t)
    first = bias if add is None else add
    if out is None:
        return F.linear(x, weight, bias) if add is None else torch.addmm(add, x, w_t)
    return torch.mm(x, w_t, out=out) if first is None else torch.addmm(first, x, w_t, out=out)


def repeated(b: Tensor, rows: int) -> Tensor:
    """b [K, N] as it suits products with that many rows, together."""
    return b.contiguous() if len(b) > _PART and rows * b.numel() >= LEAST and _may_be(b) else b


def _may_be(b: Tensor) -> bool:
    enabled = torch._C._get_mkldnn_enabled  # type: ignore[attr-defined]
    return b.dtype == torch.float32 and b.device.type == "cpu" and onednn_is_faster() and enabled()


def _parts(a: Tensor, b: Tensor) -> int:
    """In how many parts of K oneDNN is to multiply; 0: MKL is."""
    if len(a) * b.numel() < LEAST or not _may_be(b):
        return 0
    parts = -(-len(b) // _PART)
    return parts if parts == 1 or len(a) >= _ROWS or b.is_contiguous() else 0


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    if parts > 1 or not b.t().is_contiguous():  # other strides have no fast code
        b = b.contiguous()
    multiply = torch.ops.mkldnn._linear_pointwise.default
    first, *more = zip(a.chunk(parts, 1), b.chunk(parts), strict=True)
    y = multiply(first[0], first[1].t(), bias, "none", [], "")
    for a_i, b_i in more:
        y += multiply(a_i, b_i.t(), None, "none", [], "")
    return y


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    return y if out is None else out.copy_(y)
