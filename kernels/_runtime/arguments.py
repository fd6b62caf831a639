"""Checks of arguments that every family shares."""

from __future__ import annotations

import torch
from torch import Tensor


def first_outside(ids: Tensor, n: int) -> int | None:
    """An id that is not in 0 <= id < n, if there is one; not looked for on a GPU, which would wait, or in a trace."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or type(ids) is not Tensor or not ids.numel():
        return None
    low, high = (int(t.item()) for t in ids.aminmax())
    return low if low < 0 else high if high >= n else None
