"""Where eager is the better choice on a CPU, by tables of what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def few_pairs(x: Tensor, y: Tensor, sides: Mapping[torch.dtype, int]) -> str | None:
    """Fewer than side x side pairs of rows, a side for each dtype; a dtype that is missing has none."""
    side = sides.get(x.dtype, 0)
    if x.device.type != "cpu" or x.shape[0] * y.shape[0] >= side**2:
        return None
    return f"eager is faster for fewer than {side} x {side} pairs in {str(x.dtype)[6:]}"
