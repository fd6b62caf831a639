"""Time of calls, and the two speeds that no call can exceed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(run: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Milliseconds of each of a few calls.

    On a GPU by events, queued without waiting so that the host runs ahead, the L2 cache cleared before each call.
    """
    if device.type == "cuda":
        return _cuda_times(run, calls, device)
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def _cuda_times(run: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read and written), measured here."""
    n, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 256 << 20)
    # a CPU may multiply 16-bit numbers slower than float32 ones, which they can be converted to
    dtypes = {dtype} if device.type == "cuda" else {dtype, torch.float32}
    product = min(_fastest(_product(n, t, device), device) for t in dtypes)
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * n**3 / product, 2 * length / _fastest(lambda: target.copy_(source), device)


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    times(run, 1, device)
    return min(times(run, 10, device)) / 1e3
