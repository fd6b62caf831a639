"""Hard negatives in Triton: Gumbel keys on tiles of logits that never leave the chip.

    key_ij = s <x_i, y_j> + G_ij,  -inf where the ids are equal

Each tile leaves the K largest keys of its rows and, if BOTH, of its columns with noise of their own; `Draw` merges
them.
The noise is that of `noise.py`: a tile is one group of 128 columns wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, aligned_rows, input_precision, products, tile_of
from mmfuse.kernels.contrastive.kernel import stats
from mmfuse.kernels.contrastive.negatives.draw import LOWEST, Candidates, Draw

# rows at a time, which bounds what the tiles leave: 12 K (rows N / 128 + N rows / 64) bytes
_ROWS = 8192
_LOWEST = tl.constexpr(LOWEST)
_BELOW_ONE = tl.constexpr(1 - 2**-24)

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _gumbel(seed, rows, col0, STREAM: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr):
    """-log(E), E ~ Exp(1), of the pairs of `rows` with the 128 columns from `col0` on."""
    counter = tl.zeros((BLOCK_M, 32), tl.int32)
    c0 = counter + (col0 // 4 + tl.arange(0, 32))[None, :]
    b0, b1, b2, b3 = tl.philox(seed, c0, counter + rows[:, None], counter + STREAM, counter)
    bits = tl.join(tl.join(b0, b1), tl.join(b2, b3))
    bits = tl.reshape(tl.permute(bits, (0, 3, 2, 1)), (BLOCK_M, 128))
    u = tl.minimum(((bits >> 1).to(tl.int32).to(ACC) + 0.5) * 4.656612873077393e-10, _BELOW_ONE)
    # -log(1 - u): by its series where u is small and E wins, which a difference from 1 would round away
    p = u * (1 / 6) + 0.2
    p = p * u + 0.25
    p = p * u + (1 / 3)
    p = p * u + 0.5
    p = p * u + 1.0
    e = tl.where(u < 0.0625, u * p, -tl.log(1.0 - u))
    return -tl.log(e)


@triton.jit
def _keys(s, dead, seed, rows, col0, STREAM: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr):
    key = tl.where(s >= _LOWEST, s, _LOWEST) + _gumbel(seed, rows, col0, STREAM, ACC, BLOCK_M)
    return tl.where(dead, float("-inf"), key)


@triton.jit(do_not_specialize=["M", "N", "first", "row_offset"])
def _race_kernel(
    row_key_ptr,  # out [tiles_n, M, K]
    row_index_ptr,  # out [tiles_n, M, K], columns
    col_key_ptr,  # out [tiles_m, N, K] if BOTH
    col_index_ptr,  # out [tiles_m, N, K] if BOTH, rows
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # []
    ids_ptr,  # [M]
    key_ids_ptr,  # [N]
    seed_ptr,  # []
    stride_x,
    stride_y,
    D,
    M,
    N,
    first,  # index of the first row
    row_offset,
    UNIFORM: tl.constexpr,  # no logits: the race of the mixture
    BOTH: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    if UNIFORM:
        s = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    else:
        s = tl.load(scale_ptr) * products(
            x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
            ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    id, key_id = tl.load(ids_ptr + rows, mask=rows < M, other=0), tl.load(key_ids_ptr + cols, mask=cols < N, other=0)
    dead = (id[:, None] == key_id[None, :]) | (rows >= M)[:, None] | (cols >= N)[None, :]
    seed, noise_rows = tl.load(seed_ptr), first + row_offset + rows

    key = _keys(s, dead, seed, noise_rows, col0, 2 * UNIFORM + 1, ACC, BLOCK_M)
    at = (tile_n.to(tl.int64) * M + rows) * K
    for i in tl.static_range(K):
        largest = tl.max(key, axis=1)
        j = tl.min(tl.where(key == largest[:, None], cols[None, :], 2147483647), axis=1)
        tl.store(row_key_ptr + at + i, largest, mask=rows < M)
        tl.store(row_index_ptr + at + i, tl.where(largest > float("-inf"), j, -1), mask=rows < M)
        key = tl.where(cols[None, :] == j[:, None], float("-inf"), key)
    if BOTH:
        key = _keys(s, dead, seed, noise_rows, col0, 2 * UNIFORM, ACC, BLOCK_M)
        at = (tile_m.to(tl.int64) * N + cols) * K
        for i in tl.static_range(K):
            largest = tl.max(key, axis=0)
            j = tl.min(tl.where(key == largest[None, :], rows[:, None], 2147483647), axis=0)
            tl.store(col_key_ptr + at + i, largest, mask=cols < N)
            tl.store(col_index_ptr + at + i, tl.where(largest > float("-inf"), first + j, -1), mask=cols < N)
            key = tl.where(rows[:, None] == j[None, :], float("-inf"), key)


# --- launches -------------------------------------------------------------------------------------------------------

# a tile is a group of noise wide. Chosen to compile without spills, not measured
_TILES: dict[str, dict[str, int]] = {
    "half": {"BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
    # no tensor cores
    "ieee": {"BLOCK_M": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2},
}
_TILE = {"BLOCK_N": 128, "GROUP_M": 8}


def _kind(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else input_precision(dtype)


def hard_negatives(given: Candidates) -> tuple[Tensor, Tensor]:
    """The draws [B, k] of the rows and, if both, [N, k] of the columns."""
    query, keys, k, mixture, both = given.query, given.keys, given.k, given.mixture, given.both
    acc, device, (b, n) = accumulation_dtype(query.dtype), query.device, (len(query), len(keys))
    rows = Draw(b, k, given.seed, acc, dim=1, mixture=mixture)
    columns = Draw(n if both else 0, k, given.seed, acc, dim=0, mixture=mixture)
    if not b or not n:
        return rows.result(), columns.result()
    x, y = aligned_rows(query), aligned_rows(keys)
    tile = _TILE | _TILES[_kind(x.dtype)]
    across = triton.cdiv(n, tile["BLOCK_N"])
    for i in range(0, b, _ROWS):
        block = slice(i, i + _ROWS)
        left = x[block]
        down, m = triton.cdiv(len(left), tile["BLOCK_M"]), len(left)
        row_key = torch.empty(across, m, k, dtype=acc, device=device)
        col_key = torch.empty(down if both else 0, n, k, dtype=acc, device=device)
        row_index, col_index = (torch.empty(t.shape, dtype=torch.int32, device=device) for t in (row_key, col_key))
        for race in range(2 if mixture else 1):
            launch(
                _race_kernel, (down * across,), x,
                row_key_ptr=row_key, row_index_ptr=row_index, col_key_ptr=col_key, col_index_ptr=col_index,
                x_ptr=left, y_ptr=y, scale_ptr=given.scale, ids_ptr=given.ids[block], key_ids_ptr=given.key_ids,
                seed_ptr=given.seed, stride_x=x.stride(0), stride_y=y.stride(0), D=x.shape[1], M=m, N=n, first=i,
                row_offset=given.row_offset,
                UNIFORM=race == 1, BOTH=both, K=k, ACC=accumulator(acc), PRECISION=input_precision(x.dtype),
                EVEN_D=x.shape[1] % tile["BLOCK_D"] == 0, **tile,
            )  # fmt: skip
            rows.take(race, block, row_key, row_index)
            if both:
                columns.take(race, slice(None), col_key, col_index)
    if mixture:
        # positives past the last column: over all pairs
        row_max, row_sum, col_max, col_sum, *_ = stats(query, keys, given.scale, n, "")
        rows.lse.copy_(row_max + row_sum.log())
        if both:
            columns.lse.copy_(col_max + col_sum.log())
    return rows.result(), columns.result()


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """Every kind of operand, for `mmfuse compile-report`."""
    for dtype, precision in (
        (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    ):  # fmt: skip
        kind = "half" if dtype.itemsize == 2 else precision
        yield _spec("both", dtype, kind, precision)
        if dtype == torch.bfloat16:
            yield _spec("one direction", dtype, kind, precision, BOTH=False)
            yield _spec("16 draws", dtype, kind, precision, K=16)
            yield _spec("odd D", dtype, kind, precision, EVEN_D=False)
            yield _spec("uniform", dtype, kind, precision, UNIFORM=True)


def _spec(variant: str, dtype: torch.dtype, kind: str, precision: str, **options: Any) -> Spec:
    tile = _TILE | _TILES[kind]
    constants = {"ACC": tl.float32, "PRECISION": precision, "UNIFORM": False, "BOTH": True, "K": 1, "EVEN_D": True}
    constants |= {n: v for n, v in tile.items() if n in _race_kernel.arg_names} | options
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    pointers = dict.fromkeys(("x_ptr", "y_ptr"), "*" + short) | dict.fromkeys(
        ("ids_ptr", "key_ids_ptr", "seed_ptr"), "*i64"
    )
    pointers |= dict.fromkeys(("row_index_ptr", "col_index_ptr"), "*i32")
    signature = {
        n: pointers.get(n, "*fp32" if n.endswith("_ptr") else "i32")
        for n in _race_kernel.arg_names
        if n not in constants
    }
    return Spec(
        kernel=f"{__name__}:_race_kernel",
        variant=" ".join((short + (f"-{precision}" if dtype == torch.float32 else ""), variant)),
        signature=signature,
        constants=constants,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        aligned=("D", "stride_x", "stride_y"),
        dot=kind if kind != "ieee" and not constants["UNIFORM"] else None,
        work=None if constants["UNIFORM"] else Work.of_product("logit", 4096, 4096, 256, tile, dtype.itemsize),
    )
