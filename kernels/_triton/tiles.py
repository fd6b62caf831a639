"""What kernels of several families are made of: the order of tiles, matrix products, operands and accumulators."""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- device code ----------------------------------------------------------------------------------------------------

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """In two instructions: `tl.exp` takes three more for results below 2^-126, which are 0 here."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Programs in flight share rows of x and of y in L2: down GROUP_M row tiles, then the next column."""
    first = (pid // (GROUP_M * tiles_n)) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def products(
    x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """U [BLOCK_M, BLOCK_N]; rows and columns past the end repeat the last one."""
    x_ptr += row0.to(tl.int64) * stride_x
    y_ptr += col0.to(tl.int64) * stride_y
    k = tl.arange(0, BLOCK_D)
    at_x = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row0)[:, None] * stride_x + k[None, :]
    at_y = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - col0)[None, :] * stride_y + k[:, None]
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k0 in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptr + at_x)
            y = tl.load(y_ptr + at_y)
        else:
            x = tl.load(x_ptr + at_x, mask=k[None, :] < D - k0, other=0.0)
            y = tl.load(y_ptr + at_y, mask=k[:, None] < D - k0, other=0.0)
        u = tl.dot(x, y, u, input_precision=PRECISION, out_dtype=ACC)
        x_ptr += BLOCK_D
        y_ptr += BLOCK_D
    return u


@triton.jit
def divide(x, y):
    """x / y rounded to nearest: the operator is off by up to two ulps in float32."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def sqrt(x):
    """The root rounded to nearest, as `divide`."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def whole(n, EVEN: tl.constexpr):
    """A number of columns, known to be whole vectors if EVEN: masked accesses are then as wide as others."""
    return n // 16 * 16 if EVEN else n


@triton.jit
def finite(m):
    """A maximum as an offset: 0 where there was nothing to take the maximum of."""
    return tl.where(m == float("-inf"), 0.0, m)


# --- of launches ----------------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype) -> str:
    """float32 operands are rounded to TF32 where torch's own products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def aligned_rows(t: Tensor) -> Tensor:
    """Rows for whole-vector loads: unit stride, padded with zeros to a multiple of 16 columns; a copy if not so."""
    n, d = t.shape
    if t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.stride(0) < 2**24 and d % 16 == 0:
        return t
    padded = torch.zeros(n, -(-d // 16) * 16, dtype=t.dtype, device=t.device)
    padded[:, :d] = t
    return padded


# what a tile may differ in from the one there is, one at a time
_OTHERS = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_D": (32, 64, 128),
    "BLOCK_K": (32, 64, 128),
    "GROUP_M": (4, 8, 16),
    "PARTS": (1, 2, 4),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}


def neighbours(tile: dict[str, int], but: Collection[str] = ()) -> list[dict[str, int]]:
    """Launch settings that `mmfuse tune` tries in place of these, which differ in one; `but`: not in such."""
    names = [name for name in _OTHERS if name in tile and name not in but]
    return [tile | {name: n} for name in names for n in _OTHERS[name] if tile[name] != n]
