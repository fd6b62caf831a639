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
    """What a measurement on this device holds for, e.g. `NVIDIA H200` or `AMD EPYC, 2 threads, avx512_bf16`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu('model name') or platform.machine()}, {torch.get_num_threads()} threads, {vectors()}"


@once
def cpu(fact: str) -> str:
    """What Linux says of this CPU; empty elsewhere."""
    try:
        found = re.search(rf"{fact}\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1].strip() if found else ""


def vectors() -> str:
    """The instructions that torch has for this CPU's vectors: amx_bf16, avx512_bf16, avx512, avx2 or default.

    Those of 512 bits that are twice 256 have "_2x256" behind them.
    """
    used, flags = torch.backends.cpu.get_cpu_capability().lower(), cpu("flags").split()
    if used != "avx512":
        return used
    bf16 = next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), used)  # oneDNN's products
    return bf16 + "_2x256" * twice_256_bits()


@once
def twice_256_bits() -> bool:
    """Whether an instruction of 512 bits takes two cycles, as on AMD's CPUs up to Zen 4."""
    family = cpu("cpu family")
    return cpu("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) < 26


def slug(device: str) -> str:
    """A device's name as a file's, e.g. `NVIDIA_H200`."""
    return re.sub(r"\W+", "_", device).strip("_")


@once
def total_memory(device: torch.device) -> int:
    """Bytes of memory on a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


@once
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
