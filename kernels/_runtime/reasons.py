"""Why an implementation cannot take a tensor: the device and the dtypes that its name stands for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfuse.kernels._runtime.device import INTERPRET, triton_missing
from mmfuse.kernels._runtime.dtypes import COMPILED
from mmfuse.kernels._runtime.library import load


def against(name: str, x: Tensor) -> list[str]:
    """Reasons of every implementation of this name against operands like `x`."""
    why = _AGAINST[name](x) if name in _AGAINST else []
    if name != "torch" and transforming():
        why.append("torch.func or forward-mode differentiation is active, which knows plain torch alone")
    return why


def transforming() -> bool:
    """Whether torch.func (vmap, grad, jvp ...) or forward-mode differentiation is active."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


def _compiled(kind: str, x: Tensor) -> list[str]:
    if x.device.type != kind:
        return [f"device is {x.device.type}"]
    why = []
    if missing := load(kind):
        why.append(missing)
    if x.dtype not in COMPILED:
        why.append(f"dtype is {x.dtype}, the compiled part computes in float32")
    return why


def _triton(x: Tensor) -> list[str]:
    why = []
    if missing := triton_missing():
        why.append(missing)
    if not (x.is_cuda or (INTERPRET and x.device.type == "cpu")):
        why.append(f"device is {x.device.type}")
    if x.dtype not in COMPILED and not (INTERPRET and x.dtype == torch.float64):
        why.append(f"dtype is {x.dtype}")
    return why


def _chunked(x: Tensor) -> list[str]:
    return [] if x.device.type in ("cpu", "cuda") else [f"device is {x.device.type}"]


_AGAINST = {
    "cuda": lambda x: _compiled("cuda", x),
    "triton": _triton,
    "cpu": lambda x: _compiled("cpu", x),
    "chunked": _chunked,
}
