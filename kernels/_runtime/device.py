"""Facts about devices, without touching one at import."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def once(fn: F) -> F:
    """Call `fn` once for each argument, and never inside a compiled graph: to the compiler its result is a constant."""
    cached = functools.cache(fn)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        return cached(*args)

    return torch.compiler.assume_constant_result(call)


@once
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


@once
def gpu_name(index: int = 0) -> str:
    """The GPU's name as a file name, e.g. `NVIDIA_H200`."""
    return torch.cuda.get_device_name(index).replace(" ", "_")


@once
def total_memory(device: torch.device) -> int:
    """Bytes of memory on a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


def only_named_in_the_interpreter(*args: Any) -> list[str]:
    """Triton's interpreter is for tests."""
    return ["Triton's interpreter runs only where it is named"] if INTERPRET else []
