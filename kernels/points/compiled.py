"""The compiled part's searches, which fill in the indices [..., k], and its gradient of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels.points import reference
from mmfuse.kernels.points.blocked import coordinates


class _Searches:
    def __init__(self, kind: str):
        self.part = getattr(torch.ops, f"mmfuse_{kind}")

    def farthest_points(self, points: Tensor, k: int, start: Tensor) -> Tensor:
        return _filled(self.part.farthest_points, start.shape, k, coordinates(points), start.contiguous())

    def nearest_neighbors(self, query: Tensor, points: Tensor, k: int) -> Tensor:
        return _filled(self.part.nearest_neighbors, query.shape[:2], k, coordinates(query), coordinates(points))

    def ball_query(self, query: Tensor, points: Tensor, k: int, radius: float) -> Tensor:
        return _filled(self.part.ball_query, query.shape[:2], k, coordinates(query), coordinates(points), radius)


def _filled(search: Callable[..., None], rows: Sequence[int], k: int, points: Tensor, *given: Any) -> Tensor:
    index = torch.empty(*rows, k, dtype=torch.int64, device=points.device)
    search(points, *given, index)
    return index


class _Cuda(_Searches):
    group_points = staticmethod(reference.group_points)

    def add_rows(self, d: Tensor, rows: Tensor, at: Tensor) -> None:
        b, n, _ = d.shape
        ordered, order = _of_all_clouds(at, n).sort(stable=True)
        begin = torch.searchsorted(ordered, torch.arange(b * n + 1, device=d.device))
        self.part.group_grad(rows.flatten(0, 1).contiguous(), order, begin, d.flatten(0, 1))


class _Cpu(_Searches):
    def group_points(self, features: Tensor, index: Tensor) -> Tensor:
        b, n, channels = features.shape
        rows = _of_all_clouds(index.flatten(1), n)
        return features.reshape(b * n, channels).index_select(0, rows).view(*index.shape, channels)

    def add_rows(self, d: Tensor, rows: Tensor, at: Tensor) -> None:
        self.part.group_grad(rows.contiguous(), at.contiguous(), d)


CUDA, CPU = _Cuda("cuda"), _Cpu("cpu")


def _of_all_clouds(index: Tensor, n: int) -> Tensor:
    """Indices [B, m] of the n points of each cloud as indices [B m] of all points."""
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()
