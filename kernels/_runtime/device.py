"""Facts about devices, without touching one at import."""

from __future__ import annotations

import functools
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
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
def device_name(device: torch.device) -> str:
    """What a measurement on this device holds for, e.g. `NVIDIA H200` or `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_of_cpu('model name') or platform.machine()}, {torch.get_num_threads()} threads"


def _of_cpu(field: str) -> str | None:
    """What Linux says of this CPU."""
    try:
        found = re.search(rf"{field}\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return found[1].strip() if found else None


def slug(device: str) -> str:
    """A device's name as a file's, e.g. `NVIDIA_H200`."""
    return re.sub(r"\W+", "_", device).strip("_")


def vector_bits() -> int:
    """Of this CPU's vectors, as torch uses them."""
    return {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)


@once
def half_vectors() -> bool:
    """Whether torch multiplies float32 by vectors of half the width that this CPU has, as MKL does on AMD's."""
    return vector_bits() == 512 and torch.backends.mkl.is_available() and _of_cpu("vendor_id") == "AuthenticAMD"


@once
def total_memory(device: torch.device) -> int:
    """Bytes of memory on a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


@once
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
