"""Checks of arguments that every family shares."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


def first_outside(ids: Tensor, n: int, least: int = 0) -> int | None:
    """An id that is not in least <= id < n, if there is one; not sought on a GPU, which would wait, or in a trace."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or type(ids) is not Tensor or not ids.numel():
        return None
    low, high = (int(t.item()) for t in ids.aminmax())
    return low if low < least else high if high >= n else None


def constant(values: float | Iterable[float], device: torch.device) -> Tensor:
    """Numbers as a tensor [n] in float64, copied to the device once.

    A copy waits for the host, and cannot be captured in a CUDA graph.
    """
    given = (float(values),) if isinstance(values, (int, float)) else tuple(float(v) for v in values)
    return _constant(given, device) if _outside_a_trace() else torch.tensor(given, dtype=torch.float64, device=device)


@functools.lru_cache(256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
        return torch.tensor(values, dtype=torch.float64, device=device)


def _outside_a_trace() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
