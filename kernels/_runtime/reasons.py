"""Why an implementation cannot take a tensor: the device and the dtypes that its name stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd import forward_ad

from mmfuse.kernels._runtime.device import INTERPRET, triton_missing
from mmfuse.kernels._runtime.dtypes import COMPILED
from mmfuse.kernels._runtime.library import error_on, load


def against(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons of every implementation of this name against operands of a device and a dtype."""
    # a compiler traces what is cached otherwise
    why = (_against if torch.compiler.is_compiling() else _known)(name, device, dtype)
    if name != "torch" and transforming():
        why = [*why, "torch.func or forward-mode differentiation is active, which knows plain torch alone"]
    return why


def _against(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    return _AGAINST[name](device, dtype) if name in _AGAINST else []


_known = functools.cache(_against)


def transforming() -> bool:
    """Whether torch.func (vmap, grad, jvp ...) or forward-mode differentiation is active."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


def _compiled(kind: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type != kind:
        return [f"device is {device.type}"]
    why = []
    if missing := load(kind) or (error_on(device) if kind == "cuda" else None):
        why.append(missing)
    if dtype not in COMPILED:
        why.append(f"dtype is {dtype}, the compiled part computes in float32")
    return why


def _triton(device: torch.device, dtype: torch.dtype) -> list[str]:
    why = []
    if missing := triton_missing():
        why.append(missing)
    if device.type not in (("cuda", "cpu") if INTERPRET else ("cuda",)):
        why.append(f"device is {device.type}")
    if dtype not in COMPILED and not (INTERPRET and dtype == torch.float64):
        why.append(f"dtype is {dtype}")
    return why


def _chunked(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [] if device.type in ("cpu", "cuda") else [f"device is {device.type}"]


def _half_on_a_gpu(device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type != "cuda":
        return [f"device is {device.type}"]
    return [] if dtype in (torch.float16, torch.bfloat16) else [f"dtype is {dtype}, it has 16 bits"]


_AGAINST: dict[str, Callable[[torch.device, torch.dtype], list[str]]] = {
    "cuda": partial(_compiled, "cuda"),
    "triton": _triton,
    "cpu": partial(_compiled, "cpu"),
    "chunked": _chunked,
    "flash_attn": _half_on_a_gpu,
    "varlen": _half_on_a_gpu,
}
