"""Point clouds in plain PyTorch: what the operators mean.

Squared distances are (x - x')^2 + (y - y')^2 + (z - z')^2, summed in this order in the accumulation dtype: every
implementation finds the same indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Of points that broadcast, [..., 3]."""
    dx, dy, dz = ((a - b).square()).unbind(-1)
    return dx + dy + dz


def farthest_points(points: Tensor, k: int, start: Tensor) -> Tensor:
    """[B, k]: each is the point whose distance to those before it is largest, the first of equals."""
    p = points.to(accumulation_dtype(points.dtype))
    b, last = len(p), start
    # a point that is not finite has no distances: it comes last
    least = torch.where(p.isfinite().all(-1), torch.inf, -torch.inf).to(p.dtype)
    index = torch.empty(b, k, dtype=torch.int64, device=p.device)
    for i in range(k):
        index[:, i] = last
        d = squared_distances(p, p.gather(1, last[:, None, None].expand(b, 1, 3)))
        least = torch.where(d < least, d, least)
        last = least.argmax(1)
        if torch.compiler.is_compiling():
            # A sum of one number, which Inductor fuses with nothing: for vectors of clouds its loops over several of
            # these steps have room for the distances of one cloud alone (torch 2.13).
            last = last[:, None].cumsum(1)[:, 0]
    return index


def nearest_neighbors(query: Tensor, points: Tensor, k: int) -> Tensor:
    """[B, G, k] by a stable sort of the whole [B, G, N]; NaN is infinitely far."""
    acc = accumulation_dtype(points.dtype)
    d = squared_distances(query.to(acc)[:, :, None], points.to(acc)[:, None])
    return d.nan_to_num(torch.inf, torch.inf).sort(dim=2, stable=True).indices[..., :k].contiguous()


def ball_query(query: Tensor, points: Tensor, k: int, radius: float) -> Tensor:
    """[B, G, k]: the first k points of each ball, the first one again where there are fewer, 0 where there is none."""
    acc = accumulation_dtype(points.dtype)
    n = points.shape[1]
    d = squared_distances(query.to(acc)[:, :, None], points.to(acc)[:, None])
    inside = d < torch.tensor(radius, dtype=acc).square()
    found = torch.where(inside, torch.arange(n, device=d.device), n).sort(dim=2).values[..., :k]
    first = torch.where(found[..., :1] < n, found[..., :1], 0)
    return torch.where(found < n, found, first)


def group_points(features: Tensor, index: Tensor) -> Tensor:
    """[B, G, k, C]: the rows of features [B, N, C] that index [B, G, k] names."""
    rows = index.flatten(1)[..., None].expand(-1, -1, features.shape[2])
    return features.gather(1, rows).view(*index.shape, features.shape[2])


def add_rows(d: Tensor, rows: Tensor, at: Tensor) -> None:
    """The gradient of copying: add rows [B, m, C] to d [B, N, C] at the points `at` [B, m], in a fixed order."""
    if d.is_cuda:
        # index_put_ sorts the indices of a GPU first; of a CPU, scatter_add_ has no races
        d.index_put_((torch.arange(len(d), device=d.device)[:, None], at), rows, accumulate=True)
    else:
        d.scatter_add_(1, at[..., None].expand_as(rows), rows)
