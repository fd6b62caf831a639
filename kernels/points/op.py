"""The public functions of point clouds: argument checks, registration and choice of implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.arguments import check_features
from mmfuse.kernels.contrastive.backends import (
    no_reason,
    reasons_against_chunked,
    reasons_against_cpu,
    reasons_against_cuda,
    reasons_against_triton,
)
from mmfuse.kernels.points import blocked, reference


def _coordinates(points: Tensor) -> Tensor:
    """[B, 3, N] in the accumulation dtype, for vectors of neighbours."""
    return points.to(accumulation_dtype(points.dtype)).transpose(1, 2).contiguous()


def _compiled(backend: str) -> Any:
    return getattr(torch.ops, f"mmfuse_{backend}")


# --- farthest points ------------------------------------------------------------------------------------------------


def _farthest(points: Tensor, k: int, start: Tensor, backend: str) -> Tensor:
    if backend == "torch":
        return reference.farthest_points(points, k, start)
    if backend == "chunked":
        return blocked.farthest_points(points, k, start)
    index = torch.empty(len(points), k, dtype=torch.int64, device=points.device)
    _compiled(backend).farthest_points(_coordinates(points), start.contiguous(), index)
    return index


def _farthest_fake(points: Tensor, k: int, start: Tensor, backend: str) -> Tensor:
    return points.new_empty(points.shape[0], k, dtype=torch.int64)


farthest_op = register("farthest_points", _farthest, _farthest_fake)

# the most points whose distances one block of threads holds in registers
_MOST_POINTS = 16384


def _many_points(points: Tensor, *_: object) -> list[str]:
    why = reasons_against_cuda(points)
    if points.shape[1] > _MOST_POINTS:
        why.append(f"{points.shape[1]} points, more than the {_MOST_POINTS} whose distances fit into registers")
    return why


FARTHEST = Op(
    "farthest_points",
    [
        Impl("cuda", farthest_op, _many_points),
        Impl("cpu", farthest_op, reasons_against_cpu),
        Impl("chunked", farthest_op, reasons_against_chunked),
        Impl("torch", farthest_op, no_reason),
    ],
)


@torch.no_grad()
def farthest_points(points: Tensor, k: int, *, start: int | Tensor = 0, backend: str | None = None) -> Tensor:
    """Farthest-point sampling: k indices, each of the point farthest from those before it.

    A running minimum of squared distances and its first maximum, as the loops of PointNet++ (Qi et al. 2017) and
    openpoints; points near the origin are not skipped.

    Args:
        points: [B, N, 3], float16, bfloat16, float32 or float64; any strides.
        k: 1 <= k <= N.
        start: the first index: one for all clouds, or int64 [B].
        backend: "cuda", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, k] int64. Once every point has been taken or equals one that has, index 0 or the lowest of the equals
        repeats. A point with a coordinate that is not finite comes after all others.

    Distances in float32 (float64 for float64 points). Deterministic, and equal in every implementation. Not
    differentiable. A `start` out of range is an error on a CPU and undefined on a GPU, which would have to wait for it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check_points("points", points)
    b, n, _ = points.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {n} points of a cloud")
    if isinstance(start, int):
        if not 0 <= start < n:
            raise ValueError(f"start is {start}, expected an index of the {n} points")
        start = torch.full((b,), int(start), device=points.device)
    elif not isinstance(start, Tensor):
        raise TypeError(f"start is {type(start).__name__}, expected an index or int64 [{b}]")
    elif start.shape != (b,) or start.dtype != torch.int64 or start.device != points.device:
        raise ValueError(
            f"start is {start.dtype} {tuple(start.shape)} on {start.device}, expected int64 [{b}] on {points.device}"
        )
    else:
        _check_range("start", start, n)
    impl = FARTHEST.select(points, k, start, backend=backend)
    index: Tensor = impl.fn(points, k, start, impl.name)
    return index


# --- neighbours -----------------------------------------------------------------------------------------------------


def _nearest(query: Tensor, points: Tensor, k: int, backend: str) -> Tensor:
    if backend == "torch":
        return reference.nearest_neighbors(query, points, k)
    if backend == "chunked":
        return blocked.nearest_neighbors(query, points, k)
    if backend == "triton":
        from mmfuse.kernels.points import kernel

        return kernel.nearest_neighbors(_coordinates(query), _coordinates(points), k)
    index = torch.empty(*query.shape[:2], k, dtype=torch.int64, device=points.device)
    _compiled(backend).nearest_neighbors(_coordinates(query), _coordinates(points), index)
    return index


def _neighbours_fake(query: Tensor, points: Tensor, k: int, *_: object) -> Tensor:
    return points.new_empty(*query.shape[:2], k, dtype=torch.int64)


def _nearest_fake(query: Tensor, points: Tensor, k: int, backend: str) -> Tensor:
    return _neighbours_fake(query, points, k)


nearest_op = register("nearest_neighbors", _nearest, _nearest_fake)

# the longest list that a program keeps in registers
_MOST_NEIGHBOURS = 64


def _many_neighbours(k: int) -> list[str]:
    return [f"k is {k}: a list of at most {_MOST_NEIGHBOURS} is kept in registers"] if k > _MOST_NEIGHBOURS else []


def _nearest_against_cuda(query: Tensor, points: Tensor, k: int = 1) -> list[str]:
    return reasons_against_cuda(points) + _many_neighbours(k)


def _nearest_against_triton(query: Tensor, points: Tensor, k: int = 1) -> list[str]:
    return reasons_against_triton(points) + _many_neighbours(k)


def _few_distances(query: Tensor, points: Tensor, k: int = 1) -> list[str]:
    if points.device.type != "cpu" or query.shape[0] * query.shape[1] * points.shape[1] >= 1 << 13:
        return []
    return ["the whole matrix is faster for less than 8192 distances"]


NEAREST = Op(
    "nearest_neighbors",
    [
        Impl("cuda", nearest_op, _nearest_against_cuda),
        Impl("triton", nearest_op, _nearest_against_triton, only_named_in_the_interpreter),
        Impl("cpu", nearest_op, reasons_against_cpu),
        Impl("chunked", nearest_op, reasons_against_chunked, _few_distances),
        Impl("torch", nearest_op, no_reason),
    ],
)


@torch.no_grad()
def nearest_neighbors(query: Tensor, points: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """The k points of a cloud that are nearest to each query, without the matrix of distances.

    Args:
        query: [B, G, 3], float16, bfloat16, float32 or float64; any strides.
        points: [B, N, 3], same dtype and device.
        k: 1 <= k <= N.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, G, k] int64, nearest first, the lower index first on ties. A distance that is NaN counts as infinite.

    Squared distances of coordinate differences in float32 (float64 for float64 points), never expanded into products.
    Deterministic, and equal in every implementation. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check_pair(query, points)
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {points.shape[1]} points of a cloud")
    impl = NEAREST.select(query, points, k, backend=backend)
    index: Tensor = impl.fn(query, points, k, impl.name)
    return index


def _ball(query: Tensor, points: Tensor, k: int, radius: float, backend: str) -> Tensor:
    if backend == "torch":
        return reference.ball_query(query, points, k, radius)
    if backend == "chunked":
        return blocked.ball_query(query, points, k, radius)
    index = torch.empty(*query.shape[:2], k, dtype=torch.int64, device=points.device)
    _compiled(backend).ball_query(_coordinates(query), _coordinates(points), radius, index)
    return index


def _ball_fake(query: Tensor, points: Tensor, k: int, radius: float, backend: str) -> Tensor:
    return _neighbours_fake(query, points, k)


ball_op = register("ball_query", _ball, _ball_fake)

BALL = Op(
    "ball_query",
    [
        Impl("cuda", ball_op, reasons_against_cuda),
        Impl("cpu", ball_op, reasons_against_cpu),
        Impl("chunked", ball_op, reasons_against_chunked),
        Impl("torch", ball_op, no_reason),
    ],
)


@torch.no_grad()
def ball_query(query: Tensor, points: Tensor, k: int, radius: float, *, backend: str | None = None) -> Tensor:
    """The first k points, in order of their index, that are nearer to each query than `radius`.

    The query of PointNet++ (Qi et al. 2017) as its CUDA kernels compute it: what is missing is filled with the first
    point found, and with index 0 where there is none.

    Args:
        query: [B, G, 3], float16, bfloat16, float32 or float64; any strides.
        points: [B, N, 3], same dtype and device.
        k: 1 <= k <= N.
        radius: the squared distance is compared with radius * radius, both in float32 (float64 for float64 points).
        backend: "cuda", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, G, k] int64. Deterministic, and equal in every implementation. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check_pair(query, points)
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {points.shape[1]} points of a cloud")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius is {radius}, expected a finite number > 0")
    impl = BALL.select(query, points, k, radius, backend=backend)
    index: Tensor = impl.fn(query, points, k, float(radius), impl.name)
    return index


# --- grouping -------------------------------------------------------------------------------------------------------


def _group(features: Tensor, index: Tensor, backend: str) -> Tensor:
    b, n, channels = features.shape
    _check_range("idx", index, n)
    if backend != "cpu":
        return reference.group_points(features, index)
    rows = (index + n * torch.arange(b, device=index.device)[:, None, None]).flatten()
    return features.reshape(b * n, channels).index_select(0, rows).view(*index.shape, channels)


def _group_fake(features: Tensor, index: Tensor, backend: str) -> Tensor:
    return features.new_empty(*index.shape, features.shape[2])


def _group_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, index, ctx.backend = inputs
    ctx.points = features.shape[1]
    ctx.save_for_backward(index)


def _group_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return group_bwd(g, *ctx.saved_tensors, ctx.points, ctx.backend), None, None


def _group_bwd(g: Tensor, index: Tensor, points: int, backend: str) -> Tensor:
    """[B, N, C]: the sums of the rows that were copied from each point, in a fixed order."""
    b, channels, acc = len(g), g.shape[-1], accumulation_dtype(g.dtype)
    rows, at = g.to(acc).flatten(1, 2), index.flatten(1)
    d = torch.zeros(b, points, channels, dtype=acc, device=g.device)
    if backend == "cpu":
        torch.ops.mmfuse_cpu.group_grad(rows.contiguous(), at.contiguous(), d)
    elif backend == "cuda":
        ordered, order = (at + points * torch.arange(b, device=g.device)[:, None]).flatten().sort(stable=True)
        begin = torch.searchsorted(ordered, torch.arange(b * points + 1, device=g.device))
        torch.ops.mmfuse_cuda.group_grad(rows.flatten(0, 1).contiguous(), order, begin, d.flatten(0, 1))
    elif g.is_cuda:
        # index_put_ sorts the indices of a GPU first; of a CPU, scatter_add_ has no races
        d.index_put_((torch.arange(b, device=g.device)[:, None], at), rows, accumulate=True)
    else:
        d.scatter_add_(1, at[..., None].expand_as(rows), rows)
    return d.to(g.dtype)


def _group_bwd_fake(g: Tensor, index: Tensor, points: int, backend: str) -> Tensor:
    return g.new_empty(g.shape[0], points, g.shape[-1])


group_bwd = register("group_points_bwd", _group_bwd, _group_bwd_fake)
group_op = register("group_points", _group, _group_fake, setup_context=_group_setup, backward=_group_backward)

GROUP = Op(
    "group_points",
    [
        Impl("cuda", group_op, reasons_against_cuda),
        Impl("cpu", group_op, reasons_against_cpu),
        Impl("torch", group_op, no_reason),
    ],
)


def group_points(features: Tensor, idx: Tensor, *, backend: str | None = None) -> Tensor:
    """The features of each group's points: out[b, g, j] = features[b, idx[b, g, j]].

    Args:
        features: [B, N, C], a floating-point dtype; any strides.
        idx: [B, G, k] integers in [0, N).
        backend: "cuda", "cpu" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, G, k, C] in the dtype of `features`.

    Differentiable once in `features`: a point's gradient is the sum over the groups that it is in, added in float32
    (float64 for float64), in a fixed order: two runs are equal bitwise.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a GPU an index out of range stops
            the device, as with torch.gather.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    check_features("features", features, "[B, N, C]")
    if not isinstance(idx, Tensor) or idx.is_floating_point() or idx.dtype == torch.bool:
        got = idx.dtype if isinstance(idx, Tensor) else type(idx).__name__
        raise TypeError(f"idx is {got}, expected integers [B, G, k]")
    if idx.dim() != 3 or idx.shape[0] != features.shape[0]:
        raise ValueError(f"idx has shape {tuple(idx.shape)}, expected [{features.shape[0]}, G, k] as features")
    if idx.device != features.device:
        raise ValueError(f"idx is on {idx.device}, expected {features.device} as features")
    idx = idx.to(torch.int64)
    impl = GROUP.select(features, idx, backend=backend)
    grouped: Tensor = impl.fn(features, idx, impl.name)
    return grouped


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_points(name: str, points: Tensor) -> None:
    check_features(name, points, "[B, N, 3]")
    if points.shape[2] != 3:
        raise ValueError(f"{name} has shape {tuple(points.shape)}, expected coordinates [B, N, 3]")


def _check_pair(query: Tensor, points: Tensor) -> None:
    _check_points("query", query)
    _check_points("points", points)
    if query.shape[0] != points.shape[0]:  # len() of a traced tensor is a constant
        raise ValueError(f"query has {query.shape[0]} clouds, expected {points.shape[0]} as points")
    if query.device != points.device:
        raise ValueError(f"query is on {query.device}, expected {points.device} as points")
    if query.dtype != points.dtype:
        raise TypeError(f"query has dtype {query.dtype}, expected {points.dtype} as points")


def _check_range(name: str, index: Tensor, n: int) -> None:
    # reading a GPU's numbers would wait for them
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = index.min().item(), index.max().item()
    if low < 0 or high >= n:
        raise ValueError(f"{name} has values from {low} to {high}, expected indices of the {n} points")
