"""Nearest neighbours in Triton: a program keeps the lists of its queries while tiles of points pass.

d = (x - x')^2 + (y - y')^2 + (z - z')^2, each operation rounded, so that every implementation finds the same indices. A
list is unordered: a point nearer than its farthest takes that one's place, which is rare after the first tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator
from mmfuse.kernels.points.blocked import coordinates


@triton.jit(do_not_specialize=["G", "N", "k"])
def _nearest_kernel(
    d_ptr,  # out [B, G, k]
    index_ptr,  # out [B, G, k]
    query_ptr,  # [B, 3, G]
    points_ptr,  # [B, 3, N]
    G,
    N,
    k,
    LARGEST: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cloud = tl.program_id(1).to(tl.int64)
    rows, slots = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, SLOTS)
    q = query_ptr + cloud * 3 * G + rows
    points = points_ptr + cloud * 3 * N
    # loads of [BLOCK_G, 1]
    x = tl.load(q, mask=rows < G, other=0.0)[:, None]
    y = tl.load(q + G, mask=rows < G, other=0.0)[:, None]
    z = tl.load(q + 2 * G, mask=rows < G, other=0.0)[:, None]
    # slots beyond k are never the farthest
    d = tl.zeros((BLOCK_G, SLOTS), ACC) + tl.where(slots < k, float("inf"), float("-inf"))[None, :]
    index = tl.zeros((BLOCK_G, SLOTS), tl.int32) - 1 - slots[None, :]
    farthest = tl.full((BLOCK_G,), float("inf"), ACC)
    for col0 in range(0, N, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        dx = tl.load(points + cols, mask=cols < N, other=0.0)[None, :] - x
        dy = tl.load(points + N + cols, mask=cols < N, other=0.0)[None, :] - y
        dz = tl.load(points + 2 * N + cols, mask=cols < N, other=0.0)[None, :] - z
        s = dx * dx + dy * dy + dz * dz
        # NaN and inf are the largest number
        s = tl.where((cols < N)[None, :], tl.where(s <= LARGEST, s, LARGEST), float("inf"))
        least = tl.min(s, axis=1)
        while tl.max((least < farthest).to(tl.int32), axis=0) > 0:
            j = tl.min(tl.where(s == least[:, None], cols[None, :], 2147483647), axis=1)
            # of equally far points the last leaves
            last = tl.max(tl.where(d == farthest[:, None], index, -2147483648), axis=1)
            out = (d == farthest[:, None]) & (index == last[:, None]) & (least < farthest)[:, None]
            d = tl.where(out, least[:, None], d)
            index = tl.where(out, j[:, None], index)
            farthest = tl.max(d, axis=1)
            s = tl.where(cols[None, :] == j[:, None], float("inf"), s)
            least = tl.min(s, axis=1)
    at = (cloud * G + rows)[:, None] * k + slots[None, :]
    inside = (rows < G)[:, None] & (slots < k)[None, :]
    tl.store(d_ptr + at, d, mask=inside)
    tl.store(index_ptr + at, index, mask=inside)


# chosen to compile without spills, not measured
_TILE = {"BLOCK_G": 16, "BLOCK_N": 128}
_WARPS = 4


def nearest_neighbors(query: Tensor, points: Tensor, k: int) -> Tensor:
    """[B, G, k] of query [B, G, 3] and points [B, N, 3]."""
    (b, g, _), n = query.shape, points.shape[1]
    query, points = coordinates(query), coordinates(points)
    d = torch.empty(b, g, k, dtype=points.dtype, device=points.device)
    index = torch.empty(b, g, k, dtype=torch.int32, device=points.device)
    if index.numel():
        launch(
            _nearest_kernel, (triton.cdiv(g, _TILE["BLOCK_G"]), b), points,
            d_ptr=d, index_ptr=index, query_ptr=query, points_ptr=points, G=g, N=n, k=k,
            LARGEST=torch.finfo(points.dtype).max, SLOTS=_slots(k), ACC=accumulator(points.dtype),
            **_TILE, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    index, order = index.long().sort(2)
    return index.gather(2, d.gather(2, order).sort(dim=2, stable=True).indices)


def _slots(k: int) -> int:
    return max(16, triton.next_power_of_2(k))


def aot_specs() -> Iterator[Spec]:
    """Lists of 32 and 64, for `mmfuse compile-report`."""
    for k in (32, 64):
        constants: dict[str, Any] = {"LARGEST": torch.finfo(torch.float32).max, "SLOTS": _slots(k), "ACC": tl.float32}
        constants |= _TILE
        pointers = {"d_ptr": "*fp32", "index_ptr": "*i32", "query_ptr": "*fp32", "points_ptr": "*fp32"}
        yield Spec(
            kernel=f"{__name__}:_nearest_kernel",
            variant=f"k <= {k}",
            signature={n: pointers.get(n, "i32") for n in _nearest_kernel.arg_names if n not in constants},
            constants=constants,
            num_warps=_WARPS,
        )
