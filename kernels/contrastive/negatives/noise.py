"""Gumbel noise of pairs (i, j), a function of (seed, stream, i, j) alone: whatever computes it, in whatever blocks.

Philox4x32-10 (Salmon et al. 2011) with the key `seed` and the counter (c, i, stream, 0) gives the bits of four columns:
output l belongs to column j = 128 g + 32 l + r where c = 32 g + r, so that 32 neighbours are one output of 32 counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)
# the largest float32 below 1
_BELOW_ONE = 1 - 2**-24


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: int) -> tuple[Tensor, ...]:
    """The four outputs for the counter (c0, c1, c2, 0), as int64 below 2^32."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    x0, x1, x2, x3 = c0 & _LOW, c1 & _LOW, torch.full_like(c0, c2), torch.zeros_like(c0)
    for _ in range(10):
        # int64 wraps, and the mask undoes the sign of the shift
        a, b = x0 * _MULTIPLY[0], x2 * _MULTIPLY[1]
        x0 = (b >> 32).bitwise_and_(_LOW).bitwise_xor_(x1).bitwise_xor_(k0)
        x2 = (a >> 32).bitwise_and_(_LOW).bitwise_xor_(x3).bitwise_xor_(k1)
        x1, x3 = b.bitwise_and_(_LOW), a.bitwise_and_(_LOW)
        k0, k1 = (k0 + _RAISE[0]) & _LOW, (k1 + _RAISE[1]) & _LOW
    return x0, x1, x2, x3


def gumbel(seed: Tensor, stream: int, row: int, col: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """-log(E), E ~ Exp(1), of the pairs whose first is (row, col): [rows, columns] = `shape`."""
    (rows, cols), group = shape, col // 128
    groups = -(-(col + cols) // 128) - group
    i = torch.arange(row, row + rows, device=seed.device)[:, None]
    c = torch.arange(32 * group, 32 * (group + groups), device=seed.device)[None, :]
    c, i = torch.broadcast_tensors(c, i)
    outputs = [x.view(rows, groups, 32) for x in philox(seed, c, i, stream)]
    bits = torch.stack(outputs, 2).flatten(1)[:, col - 128 * group :][:, :cols]
    # E = -log(1 - u) resolves the small E, which win
    u = (((bits >> 1).to(dtype) + 0.5) * 2**-31).clamp_max_(_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()
