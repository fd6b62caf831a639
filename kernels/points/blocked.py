"""Neighbours in plain torch over blocks of queries, so that no [B, G, N] tensor is held; sampling in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.points import reference

_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def coordinates(points: Tensor) -> Tensor:
    """[B, 3, N] of points [B, N, 3], in the accumulation dtype: vectors of neighbours."""
    return points.to(accumulation_dtype(points.dtype)).transpose(1, 2).contiguous()


def farthest_points(points: Tensor, k: int, start: Tensor) -> Tensor:
    """The loop of reference.py in five passes over memory that it keeps."""
    b, n, _ = points.shape
    p = coordinates(points)
    least = torch.where(p.isfinite().all(1), torch.inf, -torch.inf).to(p.dtype)
    square, d = torch.empty_like(p), torch.empty_like(least)
    index = torch.empty(b, k, dtype=torch.int64, device=p.device)
    index[:, 0] = start
    for i in range(1, k):
        torch.sub(p, p.gather(2, index[:, None, i - 1 : i].expand(b, 3, 1)), out=square)
        square.mul_(square)
        torch.add(square[:, 0], square[:, 1], out=d).add_(square[:, 2])
        # of a number and NaN, the number
        torch.argmax(torch.fmin(least, d, out=least), 1, out=index[:, i])
    return index


def _over_blocks(find: Callable[[Tensor, Tensor], Tensor], query: Tensor, points: Tensor, k: int) -> Tensor:
    """find(query [1, g, 3], points [1, N, 3]) of every block, as one [B, G, k]."""
    (b, g, _), n = query.shape, points.shape[1]
    acc = accumulation_dtype(points.dtype)
    rows = max(1, _BLOCK_BYTES[points.device.type] // (max(1, n) * 4 * acc.itemsize))
    index = torch.empty(b, g, k, dtype=torch.int64, device=points.device)
    for cloud in range(b):
        p = points[cloud : cloud + 1].to(acc)
        for i in range(0, g, rows):
            index[cloud, i : i + rows] = find(query[cloud : cloud + 1, i : i + rows].to(acc), p)[0]
    return index


def nearest_neighbors(query: Tensor, points: Tensor, k: int) -> Tensor:
    def nearest(q: Tensor, p: Tensor) -> Tensor:
        d = reference.squared_distances(q[:, :, None], p[:, None]).nan_to_num_(torch.inf, torch.inf)
        if d.dtype == torch.float64:
            return d.sort(dim=2, stable=True).indices[..., :k]
        # the bits of numbers >= 0 keep their order; before the index, all keys differ
        key = (d.view(torch.int32).long() << 32) | torch.arange(d.shape[2], device=d.device)
        return key.topk(k, 2, largest=False).values & 0xFFFFFFFF

    return _over_blocks(nearest, query, points, k)


def ball_query(query: Tensor, points: Tensor, k: int, radius: float) -> Tensor:
    return _over_blocks(lambda q, p: reference.ball_query(q, p, k, radius), query, points, k)
