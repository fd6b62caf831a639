"""The public functions of point clouds: argument checks and declarations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import check, check_range, require_integer
from mmfuse.kernels._runtime.device import shared_memory
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.points import blocked, compiled, reference

# plain torch is not traced either: fused by a compiler, distances would be rounded differently
_PASSES = {"cuda": compiled.CUDA, "cpu": compiled.CPU, "chunked": blocked, "torch": reference}


def _implementations(*names: str) -> list[Implementation]:
    return [Implementation(name, passes=_PASSES[name]) for name in names]


# --- farthest points ------------------------------------------------------------------------------------------------

# the most points whose distances one block of threads holds in registers, and whose coordinates, too; for more, the
# block needs this many bytes of shared memory
_MOST_POINTS, _MOST_COORDINATES, _SHARED_BYTES = 16384, 8192, 131584


def _farthest(passes: Any, points: Tensor, k: int, start: Tensor) -> Tensor:
    check_range("start", start, points.shape[1], "the points of a cloud")
    return passes.farthest_points(points, k, start)


def _many_points(points: Tensor) -> str | None:
    n = points.shape[1]
    if n > _MOST_POINTS:
        return f"{n} points, more than the {_MOST_POINTS} whose distances fit into registers"
    if n > _MOST_COORDINATES and points.is_cuda and (has := shared_memory(points.device)) < _SHARED_BYTES:
        return f"{n} points need {_SHARED_BYTES} bytes of shared memory, this GPU has {has}"
    return None


FARTHEST = Operator(
    "farthest_points",
    forward=_farthest,
    fake=lambda points, k: points.new_empty(points.shape[0], k, dtype=torch.int64),
    implementations=[
        Implementation("cuda", passes=_PASSES["cuda"], against=[_many_points]),
        *_implementations("cpu", "chunked", "torch"),
    ],
    size=Size("distances", lambda points, k: points.shape[0] * points.shape[1] * k),
    example=lambda x, **how: farthest_points(x[None, :, :3], 1, **how),  # type: ignore[has-type]
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
    check("points", points, ("B", "N", 3))
    b, n, _ = points.shape
    _check_count(k, n)
    if isinstance(start, int):
        if not 0 <= start < n:
            raise ValueError(f"start is {start}, expected an index of the {n} points")
        start = torch.full((b,), int(start), device=points.device)
    else:
        check("start", start, (b,), "", torch.int64, ("points", points))
    return FARTHEST(points, k, start, backend=backend)


# --- neighbours -----------------------------------------------------------------------------------------------------

# the longest list that a program keeps in registers
_MOST_NEIGHBOURS = 64


def _nearest(passes: Any, query: Tensor, points: Tensor, k: int) -> Tensor:
    return passes.nearest_neighbors(query, points, k)


def _neighbours_fake(query: Tensor, k: int) -> Tensor:
    return query.new_empty(*query.shape[:2], k, dtype=torch.int64)


def _many_neighbours(k: int) -> str | None:
    return f"k is {k}: a list of at most {_MOST_NEIGHBOURS} is kept in registers" if k > _MOST_NEIGHBOURS else None


def _in_onnx(query: Tensor, points: Tensor, k: int) -> Tensor:
    """ONNX has no stable sort, but its TopK, too, has equal distances in the order of the points."""
    acc = accumulation_dtype(points.dtype)
    d = reference.squared_distances(query.to(acc)[:, :, None], points.to(acc)[:, None])
    return torch.where(d.isnan(), torch.inf, d).topk(k, dim=2, largest=False).indices


# a grid's blocks in its second dimension
_MOST_CLOUDS = 65535


def _many_clouds(points: Tensor) -> str | None:
    b = points.shape[0]
    return f"{b} clouds, more than the {_MOST_CLOUDS} of a launch" if points.is_cuda and b > _MOST_CLOUDS else None


_DISTANCES = Size("distances", lambda query, points: query.shape[0] * query.shape[1] * points.shape[1])

NEAREST = Operator(
    "nearest_neighbors",
    forward=_nearest,
    fake=_neighbours_fake,
    implementations=[
        Implementation("cuda", passes=_PASSES["cuda"], against=[_many_neighbours, _many_clouds]),
        # not traceable: a graph launches it with its operations fused, which rounds distances differently
        Implementation(
            "triton", passes=Deferred("mmfuse.kernels.points.kernel"), against=[_many_neighbours, _many_clouds]
        ),
        Implementation("cpu", passes=_PASSES["cpu"]),
        Implementation("chunked", passes=blocked),
        Implementation("torch", passes=reference),
    ],
    size=_DISTANCES,
    example=lambda x, **how: nearest_neighbors(x[None, :, :3], x[None, :, :3], 1, **how),  # type: ignore[has-type]
    export=OpSpec("MmfuseNearestNeighbors", _in_onnx),
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
    _check_pair(query, points, k)
    return NEAREST(query, points, k, backend=backend)


def _ball(passes: Any, query: Tensor, points: Tensor, k: int, radius: float) -> Tensor:
    return passes.ball_query(query, points, k, radius)


BALL = Operator(
    "ball_query",
    forward=_ball,
    fake=_neighbours_fake,
    implementations=[
        Implementation("cuda", passes=_PASSES["cuda"], against=[_many_clouds]),
        *_implementations("cpu", "chunked", "torch"),
    ],
    size=_DISTANCES,
    example=lambda x, **how: ball_query(x[None, :, :3], x[None, :, :3], 1, 1.0, **how),  # type: ignore[has-type]
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
    _check_pair(query, points, k)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius is {radius}, expected a finite number > 0")
    return BALL(query, points, k, float(radius), backend=backend)


# --- grouping -------------------------------------------------------------------------------------------------------


def _group(passes: Any, features: Tensor, index: Tensor) -> Tensor:
    check_range("idx", index, features.shape[1], "the points of a cloud")
    return passes.group_points(features, index)


def _group_backward(passes: Any, g: Tensor, index: Tensor, features_shape: Sequence[int]) -> dict[str, Tensor]:
    """The sums of the rows that were copied from each point."""
    d = torch.zeros(features_shape, dtype=accumulation_dtype(g.dtype), device=g.device)
    passes.add_rows(d, g.to(d.dtype).flatten(1, 2), index.flatten(1))
    return {"features": d.to(g.dtype)}


GROUP = Operator(
    "group_points",
    forward=_group,
    backward=_group_backward,
    fake=lambda features, index: features.new_empty(*index.shape, features.shape[2]),
    differentiable=("features",),
    implementations=_implementations("cuda", "cpu", "torch"),
    size=Size("numbers", lambda features, index: index.numel() * features.shape[2]),
    example=lambda x, **how: group_points(
        x.unsqueeze(0), torch.zeros(1, 1, 1, dtype=torch.int64, device=x.device), **how
    ),
)


def group_points(features: Tensor, idx: Tensor, *, backend: str | None = None) -> Tensor:
    """The features of each group's points: out[b, g, j] = features[b, idx[b, g, j]].

    Args:
        features: [B, N, C], a floating-point dtype; any strides.
        idx: [B, G, k] integers in [0, N).
        backend: "cuda", "cpu" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, G, k, C] in the dtype of `features`.

    Differentiable in `features`: a point's gradient is the sum over the groups that it is in, added in float32
    (float64 for float64), in a fixed order: two runs are equal bitwise.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a GPU an index out of range stops
            the device, as with torch.gather.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    check("features", features, ("B", "N", "C"))
    check("idx", idx, (features.shape[0], "G", "k"), " as features", "integers", ("features", features))
    return GROUP(features, idx.to(torch.int64), backend=backend)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_pair(query: Tensor, points: Tensor, k: int) -> None:
    check("points", points, ("B", "N", 3))
    # len() of a traced tensor is a constant
    check("query", query, (points.shape[0], "G", 3), " as points", points.dtype, ("points", points))
    _check_count(k, points.shape[1])


def _check_count(k: int, n: int) -> None:
    require_integer("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {n} points of a cloud")
