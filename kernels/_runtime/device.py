"""Facts about devices, without touching one at import."""

from __future__ import annotations

import functools
import os

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing() -> str | None:
    """None when triton can be imported, otherwise the reason."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def triton_reasons(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Reasons shared by every Triton kernel. Empty when `x` may be given to one."""
    why = []
    if missing := triton_missing():
        why.append(missing)
    if not (x.is_cuda or (INTERPRET and x.device.type == "cpu")):
        why.append(f"device is {x.device.type}")
    if x.dtype not in dtypes and not (INTERPRET and x.dtype == torch.float64):
        why.append(f"dtype is {x.dtype}")
    return why


@functools.cache
def gpu_name(index: int = 0) -> str:
    """The GPU's name as a file name, e.g. `NVIDIA_H200`."""
    return torch.cuda.get_device_name(index).replace(" ", "_")


@functools.cache
def total_memory(device: torch.device) -> int:
    """Bytes of memory on a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory
