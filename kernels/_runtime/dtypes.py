"""Which dtypes are computed, and in which."""

from __future__ import annotations

import torch
from torch import Tensor

# operands of the Triton kernels and of the compiled parts; float64 is for plain torch and Triton's interpreter
COMPILED = (torch.float16, torch.bfloat16, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype)[6:]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of products, sums and statistics: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As `t.to(dtype)`, which takes its time where there is nothing to do, too."""
    # by name: torch takes longer to see that a number is no device
    return t if t.dtype == dtype else t.to(dtype=dtype)


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a kind of device; "meta" has none."""
    return torch._C._is_any_autocast_enabled() and kind != "meta" and torch.is_autocast_enabled(kind)
