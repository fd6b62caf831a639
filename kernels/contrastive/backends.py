"""The implementations that contrastive operators choose from, and why one of them would not take `x`."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.device import triton_reasons
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels.contrastive import blocked

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def template(backend: str) -> Any:
    """The module of `stats`, `grad` and `sigmoid` that a backend computes with."""
    if backend == "triton":
        from mmfuse.kernels.contrastive import kernel

        return kernel
    return SimpleNamespace(**{f: partial(getattr(blocked, f), tile(backend)) for f in ("stats", "grad", "sigmoid")})


def tile(backend: str) -> Any:
    """The passes over a block of logits that a backend other than triton makes."""
    return blocked.TorchTile if backend == "chunked" else blocked.compiled_tile(getattr(torch.ops, f"mmfuse_{backend}"))


def compiled_reasons(kind: str, x: Tensor) -> list[str]:
    why = []
    if x.device.type != kind:
        return [f"device is {x.device.type}"]
    if missing := load(kind):
        why.append(missing)
    if x.dtype not in DTYPES:
        why.append(f"dtype is {x.dtype}, the compiled part computes in float32")
    return why


def reasons_against_cuda(x: Tensor, *_: object) -> list[str]:
    return compiled_reasons("cuda", x)


def reasons_against_cpu(x: Tensor, *_: object) -> list[str]:
    return compiled_reasons("cpu", x)


def reasons_against_triton(x: Tensor, *_: object) -> list[str]:
    return triton_reasons(x, DTYPES)


def reasons_against_chunked(x: Tensor, *_: object) -> list[str]:
    return [] if x.device.type in ("cpu", "cuda") else [f"device is {x.device.type}"]


def no_reason(*_: object) -> list[str]:
    return []
