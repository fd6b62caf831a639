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


@once
def gpu_name(index: int = 0) -> str:
    """The GPU's name as a file name, e.g. `NVIDIA_H200`."""
    return torch.cuda.get_device_name(index).replace(" ", "_")


@once
def total_memory(device: torch.device) -> int:
    """Bytes of memory on a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


@once
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
