"""Where eager is the better choice on a CPU, by tables of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Sides = Mapping[torch.dtype, int]


def few_pairs(sides: Sides) -> Callable[[Tensor, Tensor], str | None]:
    """Prefer eager for fewer than side x side pairs of rows; the side is by dtype, and one that is missing has none."""
    return lambda image, text: fewer_pairs(sides, image, image.shape[0] * text.shape[0])


def fewer_pairs(sides: Sides, x: Tensor, pairs: int) -> str | None:
    """The same of so many pairs of rows like x's."""
    side = sides.get(x.dtype, 0)
    if x.dtype == torch.bfloat16 and x.shape[-1] >= 256:
        side = max(side, min(4 * side, 16384))  # it is multiplied natively there: the wider, the more that counts
    if x.device.type != "cpu" or pairs >= side**2:
        return None
    return f"eager is faster for fewer than {side} x {side} pairs in {str(x.dtype)[6:]}"
