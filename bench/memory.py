"""Peak memory of one call, above what was there before it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc: blocks from this size on go back to the system when freed, so that resident memory is live memory
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """(result, bytes): allocated by torch on a GPU, resident on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    if not os.access(_CLEAR, os.W_OK):
        return run(), None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    result = run()
    return result, max(0, _status("VmHWM") - before)


@contextmanager
def guard() -> Iterator[None]:
    """Asking for more memory than the machine has left raises, instead of ending the process."""
    available = re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))
    if available is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = _status("VmSize") + 1024 * int(available[1]) * 9 // 10
    resource.setrlimit(resource.RLIMIT_AS, (room if hard == resource.RLIM_INFINITY else min(room, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", _read(_STATUS))
    return 1024 * int(found[1]) if found else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
