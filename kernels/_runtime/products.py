"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch brings along.

torch gives them to MKL, whose AVX-512 code is for Intel's CPUs alone. oneDNN, which torch convolves and multiplies 16
bits with, has it for every CPU: on AMD's it takes half of MKL's time. Both sum in float32. Nothing here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.device import cpu, once, vectors

LEAST = 1 << 21  # multiplications, from which on choosing costs nothing


@once
def onednn_is_faster() -> bool:
    """Whether MKL leaves this CPU's widest vectors alone."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and vectors().startswith("avx512") and cpu("vendor_id") not in ("", "GenuineIntel")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, of [M, K] and [K, N]."""
    if not _by_onednn(a, b):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    return _into(out, _onednn(a, b.t(), None))


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] += a b."""
    return total.add_(_onednn(a, b.t(), None)) if _by_onednn(a, b) else total.addmm_(a, b)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias + add, of x [M, K], weight [N, K], bias [N] and add [M, N]."""
    w_t = weight.t()
    if _by_onednn(x, w_t):
        y = _onednn(x, weight, bias)
        return _into(out, y) if add is None else torch.add(y, add, out=y if out is None else out)
    if add is not None and bias is not None:
        y = torch.add(add, bias) if out is None else torch.add(add, bias, out=out)
        return y.addmm_(x, w_t)
    first = bias if add is None else add
    if out is None:
        return F.linear(x, weight, bias) if add is None else torch.addmm(add, x, w_t)
    return torch.mm(x, w_t, out=out) if first is None else torch.addmm(first, x, w_t, out=out)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and len(a) * b.numel() >= LEAST
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()  # type: ignore[attr-defined]
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    return y if out is None else out.copy_(y)
