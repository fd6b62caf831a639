"""The k largest scores of each query, as a loop over blocks of scores that are merged into running lists."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.topk.reference import numbers

_ROWS = 1024
_BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


class TorchTile:
    """The pass over a block of scores in plain torch, any float dtype, any device."""

    @staticmethod
    def top_scores(s: Tensor, first: int, value: Tensor, index: Tensor) -> None:
        """Merge scores [m, n] of the gallery from row `first` on into the lists value, index [m, k], largest first."""
        k = value.shape[1]
        s = torch.cat([value, numbers(s)], 1)
        j = torch.arange(first - k, first - k + s.shape[1], device=s.device).repeat(len(s), 1)
        j[:, :k] = index
        # topk takes any of the equals, and the first are meant: all above the k-th score, then the first that equal it
        least = s.topk(k, 1).values[:, -1:]
        above, equal = s > least, s == least
        kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        at = torch.where(kept, s, -torch.inf).topk(k, 1).indices.sort(1).values
        largest, order = s.gather(1, at).sort(dim=1, descending=True, stable=True)
        value.copy_(largest)
        index.copy_(j.gather(1, at.gather(1, order)))


def compiled_tile(namespace: Any) -> SimpleNamespace:
    """The same pass from the compiled part, in float32."""
    return SimpleNamespace(top_scores=namespace.top_scores.default)


def similarity_topk(tile: Any, queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values [B, k], indices [B, k]) over blocks of queries and of the gallery."""
    acc, device = accumulation_dtype(queries.dtype), queries.device
    b, n = queries.shape[0], gallery.shape[0]
    value = torch.full((b, k), -torch.inf, dtype=acc, device=device)
    index = torch.full((b, k), -1, device=device)
    x, y = (products.operand(t, acc) for t in (queries, gallery))
    rows = max(1, min(b, _ROWS))
    cols = min(n, max(1024, _BLOCK_BYTES[device.type] // (rows * acc.itemsize)))
    memory = torch.empty(rows, cols, dtype=acc, device=device)
    for j in range(0, n, max(1, cols)):
        keys = _some(y, j, cols).t()
        for i in range(0, b, rows):
            left = _some(x, i, rows)
            shape = (left.shape[0], keys.shape[1])
            s = memory if memory.shape == shape else memory.view(-1)[: math.prod(shape)].view(shape)
            tile.top_scores(products.mm(left, keys, s), j, _some(value, i, rows), _some(index, i, rows))
    return value, index


def _some(t: Tensor, first: int, count: int) -> Tensor:
    """Rows of t; all of it as it is: to cut takes longer than a small product."""
    return t if t.shape[0] <= count else t[first : first + count]
