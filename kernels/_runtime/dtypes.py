"""Which dtypes are computed, and in which."""

from __future__ import annotations

import torch

# operands of the Triton kernels and of the compiled parts; float64 is for plain torch and Triton's interpreter
COMPILED = (torch.float16, torch.bfloat16, torch.float32)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of products, sums and statistics: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a kind of device; "meta" has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)
