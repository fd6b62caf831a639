"""The k most similar in Triton: a program keeps the lists of its queries while tiles of scores pass, never stored.

A list is unordered: a score above its least one takes that one's place. After the first tiles this is rare, so that a
tile costs little more than its product. The gallery is split where there are few queries, and what the parts leave is
merged in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, aligned_rows, input_precision, products

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "N", "tiles", "k"])
def _topk_kernel(
    value_ptr,  # out [splits, M, k]
    index_ptr,  # out [splits, M, k]
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    stride_x,
    stride_y,
    D,
    M,
    N,
    tiles,  # of the gallery, for each program
    k,
    LOWEST: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row0, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows, slots = row0 + tl.arange(0, BLOCK_M), tl.arange(0, SLOTS)
    # slots beyond k are never the least
    value = tl.zeros((BLOCK_M, SLOTS), ACC) + tl.where(slots < k, float("-inf"), float("inf"))[None, :]
    index = tl.zeros((BLOCK_M, SLOTS), tl.int32) - 1 - slots[None, :]
    least = tl.full((BLOCK_M,), float("-inf"), ACC)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, BLOCK_N))):
        col0 = tile * BLOCK_N
        cols = col0 + tl.arange(0, BLOCK_N)
        s = products(
            x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
            ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        # NaN and -inf are the lowest number
        s = tl.where((cols < N)[None, :], tl.where(s >= LOWEST, s, LOWEST), float("-inf"))
        largest = tl.max(s, axis=1)
        while tl.max((largest > least).to(tl.int32), axis=0) > 0:
            j = tl.min(tl.where(s == largest[:, None], cols[None, :], 2147483647), axis=1)
            # of equally small scores the last leaves
            last = tl.max(tl.where(value == least[:, None], index, -2147483648), axis=1)
            out = (value == least[:, None]) & (index == last[:, None]) & (largest > least)[:, None]
            value = tl.where(out, largest[:, None], value)
            index = tl.where(out, j[:, None], index)
            least = tl.min(value, axis=1)
            s = tl.where(cols[None, :] == j[:, None], float("-inf"), s)
            largest = tl.max(s, axis=1)
    at = (split.to(tl.int64) * M + rows)[:, None] * k + slots[None, :]
    inside = (rows < M)[:, None] & (slots < k)[None, :]
    tl.store(value_ptr + at, value, mask=inside)
    tl.store(index_ptr + at, index, mask=inside)


# --- launches -------------------------------------------------------------------------------------------------------

# chosen to compile without spills, not measured
_TILES: dict[str, dict[str, int]] = {
    "half": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
    # no tensor cores
    "ieee": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},
}


def similarity_topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values [B, k], indices [B, k])."""
    acc, device, b, n = accumulation_dtype(queries.dtype), queries.device, queries.shape[0], gallery.shape[0]
    x, y = aligned_rows(queries), aligned_rows(gallery)
    tile = _TILES["half" if x.dtype.itemsize == 2 else input_precision(x.dtype)]
    across, down = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(b, tile["BLOCK_M"])
    processors = 2 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count
    tiles = triton.cdiv(across, max(1, min(across, triton.cdiv(2 * processors, max(1, down)))))
    splits = triton.cdiv(across, tiles)
    value = torch.empty(splits, b, k, dtype=acc, device=device)
    index = torch.empty(splits, b, k, dtype=torch.int32, device=device)
    if b:
        launch(
            _topk_kernel, (down, splits), x,
            value_ptr=value, index_ptr=index, x_ptr=x, y_ptr=y, stride_x=x.stride(0), stride_y=y.stride(0),
            D=x.shape[1], M=b, N=n, tiles=tiles, k=k, LOWEST=torch.finfo(acc).min,
            SLOTS=max(16, triton.next_power_of_2(int(k))), ACC=accumulator(acc), PRECISION=input_precision(x.dtype),
            EVEN_D=bool(x.shape[1] % tile["BLOCK_D"] == 0), **tile,
        )  # fmt: skip
    index, order = index.transpose(0, 1).flatten(1).long().sort(1)
    value, best = value.transpose(0, 1).flatten(1).gather(1, order).sort(dim=1, descending=True, stable=True)
    return value[:, :k].contiguous(), index.gather(1, best[:, :k])


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """Every kind of operand, for `mmfuse compile-report`."""
    for dtype, precision in (
        (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    ):  # fmt: skip
        for slots in (16,) if dtype == torch.float16 else (16, 64):
            yield _spec(dtype, precision, slots, even=True)
        if dtype == torch.bfloat16:
            yield _spec(dtype, precision, 16, even=False)


def _spec(dtype: torch.dtype, precision: str, slots: int, even: bool) -> Spec:
    kind = "half" if dtype.itemsize == 2 else precision
    tile = _TILES[kind]
    constants: dict[str, Any] = {n: v for n, v in tile.items() if n in _topk_kernel.arg_names}
    constants |= {"LOWEST": torch.finfo(torch.float32).min, "SLOTS": slots, "EVEN_D": even}
    constants |= {"ACC": tl.float32, "PRECISION": precision}
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    pointers = {"value_ptr": "*fp32", "index_ptr": "*i32", "x_ptr": "*" + short, "y_ptr": "*" + short}
    return Spec(
        kernel=f"{__name__}:_topk_kernel",
        variant=f"{short}{f'-{precision}' if short == 'fp32' else ''} k <= {slots}{'' if even else ' odd D'}",
        signature={n: pointers.get(n, "i32") for n in _topk_kernel.arg_names if n not in constants},
        constants=constants,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        aligned=("D", "stride_x", "stride_y"),
        dot=kind if kind != "ieee" else None,
        work=Work.of_product("score", 8192, 65536, 512, tile, 2 if kind == "half" else 4, streamed=True),
    )
