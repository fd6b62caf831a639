"""Matrix products of the compiled part, on a CPU of whose vectors torch does not make the most.

Of float32, on AMD CPUs with AVX-512: torch gives them to MKL, whose AVX-512 code is for Intel alone. Of bfloat16 with a
result of float32, where a CPU multiplies bfloat16: torch has only results that are rounded, at the same speed.

With a gradient, a transform, autocast or a graph a product is torch's. Results are deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmfuse.kernels._runtime.device import cpu, once, vectors
from mmfuse.kernels._runtime.dtypes import autocast_is_on
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels._runtime.registration import AS_IT_IS, is_plain

LEAST = 1 << 20  # multiplications, from which on choosing costs nothing


@once
def half_vectors() -> bool:
    """Whether MKL multiplies by vectors of half the width that this CPU has."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and cpu("vendor_id") == "AuthenticAMD"


@once
def pairs() -> bool:
    """Whether the compiled part multiplies bfloat16; where there are tiles (AMX) oneDNN is ahead of it."""
    return vectors().startswith("avx512_bf16") and load("cpu") is None


def operand(x: Tensor, acc: torch.dtype) -> Tensor:
    """x as `mm` takes it for a result of dtype acc."""
    return x if x.is_cuda or (x.dtype == torch.bfloat16 and pairs()) else x.to(acc)


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, of [M, K] and [K, N] or of H of them; in out's dtype, which of 16-bit operands may be float32."""
    if out is not None and out.dtype != a.dtype:
        return _summed(a, b, out)
    if _is_torchs(b.shape[-1], a, b):
        return torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)
    return _compiled(a, b.mT, a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out)


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] += a b; of 16-bit operands it may be float32."""
    if total.dtype != a.dtype:
        return _summed(a, b, total, adds=True)
    return total.addmm_(a, b) if _is_torchs(b.shape[-1], a, b, total) else _compiled(a, b.t(), total, adds=True)


def _summed(a: Tensor, b: Tensor, out: Tensor, adds: bool = False) -> Tensor:
    if a.is_cuda:
        wide: dict[str, Any] = {"out_dtype": out.dtype, "out": out}
        return torch.addmm(out, a, b, **wide) if adds else torch.mm(a, b, **wide)
    if a.dtype == torch.bfloat16 and pairs() and is_plain([a, b, out]):
        return _compiled(a, b.mT, out, adds=adds)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return out.addmm_(a, b) if adds else torch.matmul(a, b, out=out)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias + add, of x [..., K], weight [N, K] and bias [N]; with add or out [M, N], of x [M, K]."""
    if _is_torchs(weight.shape[0], x, weight, bias, add):
        return F.linear(x, weight, bias) if add is None and out is None else _ended(x, weight, bias, add, out)
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], len(weight)) if out is None else out
    _compiled(rows, weight, y.view(len(rows), -1), bias)
    return y if add is None else y.add_(add)


class _Linears(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return linear(*args) if func is F.linear and not kwargs else func(*args, **(kwargs or {}))


def linears(x: Tensor) -> AbstractContextManager[Any]:
    """Within it every `F.linear` is `linear`, be it of layers that are called as they are; for inference on rows x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_torchs(x.shape[-1], x):
        return AS_IT_IS
    return _Linears()


def _ended(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor | None) -> Tensor:
    """By torch, with something to add or a place to go."""
    w_t = weight.t()
    if add is not None and bias is not None:
        y = torch.add(add, bias) if out is None else torch.add(add, bias, out=out)
        return y.addmm_(x, w_t)
    first = bias if add is None else add
    if first is None:
        return torch.mm(x, w_t, out=out)
    return torch.addmm(first, x, w_t) if out is None else torch.addmm(first, x, w_t, out=out)


def _is_torchs(columns: int, a: Tensor, *others: Tensor | None) -> bool:
    """Whether a product with `columns` is."""
    if a.dtype != torch.float32 or not a.is_cpu or a.numel() * columns < LEAST or not half_vectors():
        return True
    given = [a, *(t for t in others if t is not None)]
    return not (
        is_plain(given)
        and all(t.is_cpu and t.dtype == torch.float32 for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not autocast_is_on("cpu")
        and load("cpu") is None
    )


def _compiled(a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, adds: bool = False) -> Tensor:
    if out.dim() == 2 and out.stride(1) != 1 and out.stride(0) == 1 and bias is None:
        # of a transposed one the product is transposed
        _compiled(weight, a, out.t(), adds=adds)
        return out
    a = a if a.dtype == torch.float32 else a.contiguous()
    into = out if out.stride(-1) == 1 else out.contiguous()
    bias = bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
    a, weight, to = (t if t.dim() == 3 else t[None] for t in (a, weight, into))
    torch.ops.mmfuse_cpu.products.default(a, weight, bias, to, adds)
    return out if into is out else out.copy_(into)
