"""Matrix products of float32 on a CPU of whose vectors torch uses half.

torch gives them to MKL, whose AVX-512 code is for Intel's CPUs alone. On AMD's with AVX-512 they take half the time

- in the compiled part where the features of B lie together, as those of a weight [N, K] do: it reads B as it lies, and
  its sums are more exact;
- in oneDNN, which torch brings along for convolutions, where the columns of B do. It adds up all of K in one go, which
  rounds 2.2 times as much as MKL at K = 2048: so K comes in parts, with 1.2 times.

Where 512 bits are twice 256 the compiled part is ahead for few rows alone, as it packs nothing, and oneDNN nowhere.

With a gradient, a transform, autocast or a graph a product is torch's own. Results are deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmfuse.kernels._runtime.device import cpu, once, twice_256_bits
from mmfuse.kernels._runtime.dtypes import autocast_is_on
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels._runtime.registration import is_plain

LEAST = 1 << 20  # multiplications, from which on choosing costs nothing
_PART = 256  # of K, what oneDNN adds up in one go


@once
def half_vectors() -> bool:
    """Whether MKL multiplies by vectors of half the width that this CPU has."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and cpu("vendor_id") == "AuthenticAMD"


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, of [M, K] and [K, N] or of H of them."""
    if _is_torchs(b.shape[-1], b, -2, a):
        return torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)
    together = _features_lie_together(b, -2)
    if a.dim() == 2 and not together:
        y = _onednn(a, b, None)
        return y if out is None else out.copy_(y)
    y = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
    if together:
        return _compiled(a, b.mT, y)
    for a_h, b_h, y_h in zip(a, b, y, strict=True):
        y_h.copy_(_onednn(a_h, b_h, None))
    return y


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] += a b."""
    if _is_torchs(b.shape[-1], b, -2, a, total):
        return total.addmm_(a, b)
    return _compiled(a, b.t(), total, adds=True) if _features_lie_together(b, -2) else total.add_(_onednn(a, b, None))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias + add, of x [..., K], weight [N, K] and bias [N]; with add or out [M, N], of x [M, K]."""
    if _is_torchs(weight.shape[0], weight, -1, x, bias, add):
        return _by_torch(x, weight, bias, add, out)
    rows, w_t = x.reshape(-1, x.shape[-1]), weight.t()
    y = x.new_empty(*x.shape[:-1], len(weight)) if out is None else out
    if _features_lie_together(weight, -1):
        _compiled(rows, weight, y.view(len(rows), -1), bias)
    else:
        y.copy_(_onednn(rows, w_t, bias).view_as(y))
    return y if add is None else y.add_(add)


class _Linears(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return linear(*args) if func is F.linear and not kwargs else func(*args, **(kwargs or {}))


def linears(x: Tensor) -> AbstractContextManager[Any]:
    """Within it every `F.linear` is `linear`, be it of layers that are called as they are; for inference on rows x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_torchs(x.shape[-1], x, -1, x):
        return nullcontext()
    return _Linears()


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor | None) -> Tensor:
    if add is None and out is None:
        return F.linear(x, weight, bias)
    w_t = weight.t()
    if add is not None and bias is not None:
        y = torch.add(add, bias) if out is None else torch.add(add, bias, out=out)
        return y.addmm_(x, w_t)
    first = bias if add is None else add
    if first is None:
        return torch.mm(x, w_t, out=out)
    return torch.addmm(first, x, w_t) if out is None else torch.addmm(first, x, w_t, out=out)


def _is_torchs(columns: int, b: Tensor, features: int, a: Tensor, *others: Tensor | None) -> bool:
    """Whether a product with `columns` is; `features`: the dimension of b that is summed over."""
    if a.dtype != torch.float32 or not a.is_cpu or a.numel() * columns < LEAST or not half_vectors():
        return True
    if twice_256_bits() and not _features_lie_together(b, features):
        return True
    given = [a, b, *(t for t in others if t is not None)]
    return not (
        is_plain(given)
        and all(t.is_cpu and t.dtype == torch.float32 for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not autocast_is_on("cpu")
        and load("cpu") is None
        and torch._C._get_mkldnn_enabled()
    )


def _features_lie_together(b: Tensor, features: int) -> bool:
    return b.stride(features) == 1 or b.shape[features] == 1


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _compiled(a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, adds: bool = False) -> Tensor:
    into, bias = _unit(out), None if bias is None else _unit(bias)
    a, weight, to = (t if t.dim() == 3 else t[None] for t in (_unit(a), weight, into))
    torch.ops.mmfuse_cpu.products.default(a, weight, bias, to, adds)
    return out if into is out else out.copy_(into)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    multiply, parts = torch.ops.mkldnn._linear_pointwise.default, -(-len(b) // _PART)
    b = b.contiguous()  # other strides have no fast code
    first, *more = zip(a.chunk(parts, 1), b.chunk(parts), strict=True)
    y = multiply(first[0], first[1].t(), bias, "none", [], "")
    for a_i, b_i in more:
        y += multiply(a_i, b_i.t(), None, "none", [], "")
    return y
