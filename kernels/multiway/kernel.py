"""Products and norms by expert in Triton, one launch each; a tile or a row finds its expert on the device.

    y = residual + row_scale scale act(x W_e^T + b_e)      dx = dz W_e      dW_e = sum of dz^T x,  db_e = sum of dz
    y = gamma_e (h - mean) rstd + beta_e,  h = act(z)
    dz = act'(z) rstd (a - mean(a) - xhat mean(a xhat)),  a = gamma_e g

The runs' bounds are read by every program: the host knows the number of rows alone, so that a launch has as many tiles
as these rows may need whatever their runs, and the rest ends at once. Rows behind the last bound are 0. Sums over rows
are of a fixed number of parts, each in order: two runs are equal bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, exp, input_precision, sqrt, tile_of, whole
from mmfuse.kernels.multiway.arguments import GATED, Ending, Norm, Runs
from mmfuse.kernels.multiway.rows import Grads, Normed, like

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _run_of(tile, offsets_ptr, experts, T, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """(expert, first row, end of the run) of a tile of rows; -1 is behind the last bound, and the end then T."""
    e, row, stop, first = -1, T.to(tl.int64), T.to(tl.int64), 0
    for r in tl.static_range(RUNS):
        begin = tl.load(offsets_ptr + r)
        end = tl.load(offsets_ptr + r + 1)
        tiles = ((end - begin + BLOCK - 1) // BLOCK).to(tl.int32)
        here = (tile >= first) & (tile < first + tiles)
        e = tl.where(here, ((experts >> (4 * r)) & 15).to(tl.int32), e)
        row = tl.where(here, begin + (tile - first) * BLOCK, row)
        stop = tl.where(here, end, stop)
        first += tiles
    last = tl.load(offsets_ptr + RUNS) + (tile - first) * BLOCK
    row = tl.where((e < 0) & (last < T), last, row)
    return e, row, stop


@triton.jit
def _normal(z):
    """(Phi(z), e^(-z^2 / 2)): in float32 one exponential, within 1e-7; csrc/cpu/multiway.cpp has the formula."""
    size = tl.minimum(tl.abs(z), 15.0)
    e = exp(-0.5 * size * size)
    if z.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)), e
    v = 1.0 - 9.89949494 / (size + 4.94974747)
    p = 2.11696909e-4
    p = p * v + 1.33517240e-4
    p = p * v - 2.15665785e-3
    p = p * v + 8.48007906e-3
    p = p * v - 2.27115724e-2
    p = p * v + 4.72155592e-2
    p = p * v - 8.06698246e-2
    p = p * v + 1.16565157e-1
    p = p * v - 1.44632508e-1
    p = p * v + 7.76468283e-2
    tail = e * p
    return tl.where(z < 0, tail, 1.0 - tail), e


@triton.jit
def _activated(z, up, ACTIVATION: tl.constexpr):
    """act(z), times up where it is gated."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        p, _ = _normal(z)
        y = z * p
    elif ACTIVATION == "gelu_tanh":
        y = z / (1.0 + exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "quick_gelu":
        y = z / (1.0 + exp(-1.702 * z))
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        y = z / (1.0 + exp(-z))
    else:
        y = z
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        y *= up
    return y


@triton.jit
def _multiplied(
    x_ptr, w_ptr, stride_x, stride_w, rows, cols, N, K,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x W^T [BLOCK_M, BLOCK_N] of rows of x and of W [N, K]; if TRANSPOSED x W, of columns of W [K, N]."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * stride_x + k[None, :]
    if TRANSPOSED:
        w_at = w_ptr + k[:, None].to(tl.int64) * stride_w + cols[None, :]
    else:
        w_at = w_ptr + cols[None, :].to(tl.int64) * stride_w + k[:, None]
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=k[None, :] < K - k0, other=0.0)
        if TRANSPOSED:
            w = tl.load(w_at, mask=(k[:, None] < K - k0) & (cols[None, :] < N), other=0.0)
            w_at += BLOCK_K * stride_w
        elif EVEN_K:
            w = tl.load(w_at)
            w_at += BLOCK_K
        else:
            w = tl.load(w_at, mask=k[:, None] < K - k0, other=0.0)
            w_at += BLOCK_K
        u = tl.dot(x, w, u, input_precision=PRECISION, out_dtype=ACC)
        x_at += BLOCK_K
    return u


@triton.jit
def _product_kernel(
    y_ptr,  # out [T, N]
    z_ptr,  # out [T, N], or [T, 2 N] where ACTIVATION is gated: the product itself; or None
    x_ptr,  # [T, K]
    w_ptr,  # [E, N, K] ([E, 2 N, K]), or [E, K, N] if TRANSPOSED
    b_ptr,  # [E, N] ([E, 2 N]), or None
    residual_ptr,  # [T, N], or None
    scale_ptr,  # [N], or None
    row_scale_ptr,  # [T], or None
    offsets_ptr,  # [RUNS + 1]
    experts,  # of each run, in 4 bits
    T,
    N,
    K,
    stride_x,
    tiles_m,
    tiles_n,
    RUNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    e, row, stop = _run_of(tile, offsets_ptr, experts, T, RUNS, BLOCK_M)
    if row >= T:
        return
    within = row + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (within < stop)[:, None] & (n < whole(N, EVEN_N))[None, :]
    at = within[:, None] * N + n[None, :]
    if e < 0:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        tl.store(y_ptr + at, zeros.to(y_ptr.dtype.element_ty), mask=here)
        if z_ptr is not None:
            at_z = within[:, None] * (2 * N if GATED else N) + n[None, :]
            tl.store(z_ptr + at_z, zeros.to(z_ptr.dtype.element_ty), mask=here)
            if GATED:
                tl.store(z_ptr + at_z + N, zeros.to(z_ptr.dtype.element_ty), mask=here)
        return
    # rows and columns past the end repeat the last one
    rows = tl.minimum(within, stop - 1)
    cols = tl.minimum(n, N - 1) if not TRANSPOSED else n
    wide = 2 * N if GATED else N
    stride_w = N if TRANSPOSED else K
    w_ptr += e.to(tl.int64) * wide * K
    u = _multiplied(
        x_ptr, w_ptr, stride_x, stride_w, rows, cols, N, K,
        ACC, PRECISION, EVEN_K, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = u
    if GATED:
        up = _multiplied(
            x_ptr, w_ptr + N.to(tl.int64) * K, stride_x, stride_w, rows, cols, N, K,
            ACC, PRECISION, EVEN_K, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if b_ptr is not None:
        b_ptr += e * wide
        u += tl.load(b_ptr + n, mask=n < N, other=0.0)[None, :]
        if GATED:
            up += tl.load(b_ptr + N + n, mask=n < N, other=0.0)[None, :]
    if z_ptr is not None:
        at_z = within[:, None] * wide + n[None, :]
        tl.store(z_ptr + at_z, u.to(z_ptr.dtype.element_ty), mask=here)
        if GATED:
            tl.store(z_ptr + at_z + N, up.to(z_ptr.dtype.element_ty), mask=here)
    y = _activated(u, up, ACTIVATION)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + rows)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=here, other=0.0).to(ACC)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _weight_grad_kernel(
    dw_ptr,  # out [SPLIT, E, N, K]
    db_ptr,  # out [SPLIT, E, N]
    dz_ptr,  # [T, N]
    x_ptr,  # [T, K]
    offsets_ptr,  # [RUNS + 1]
    experts,  # of each run, in 4 bits
    N,
    K,
    stride_dz,
    stride_x,
    tiles_n,
    tiles_k,
    RUNS: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Part p of SPLIT takes every SPLIT-th block of a run's rows."""
    pid = tl.program_id(0)
    part, e = tl.program_id(2), tl.program_id(1)
    n = pid // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    of_n, of_k = n < whole(N, EVEN), k < whole(K, EVEN)
    within = tl.arange(0, BLOCK_T)
    dw = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    db = tl.zeros((BLOCK_T, BLOCK_N), dtype=ACC)
    for r in tl.static_range(RUNS):
        begin = tl.load(offsets_ptr + r)
        end = tl.load(offsets_ptr + r + 1)
        if ((experts >> (4 * r)) & 15) != e:
            end = begin
        begin += part * BLOCK_T
        dz_at = dz_ptr + (begin + within)[:, None] * stride_dz + n[None, :]
        x_at = x_ptr + (begin + within)[:, None] * stride_x + k[None, :]
        for t0 in range(begin, end, SPLIT * BLOCK_T):
            of_t = (within < end - t0)[:, None]
            dz = tl.load(dz_at, mask=of_t & of_n[None, :], other=0.0)
            x = tl.load(x_at, mask=of_t & of_k[None, :], other=0.0)
            dw = tl.dot(tl.trans(dz), x, dw, input_precision=PRECISION, out_dtype=ACC)
            if pid % tiles_k == 0:
                db += dz.to(ACC)
            dz_at += SPLIT * BLOCK_T * stride_dz
            x_at += SPLIT * BLOCK_T * stride_x
    first = (part * tl.num_programs(1) + e).to(tl.int64) * N
    at = (first + n)[:, None] * K + k[None, :]
    tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=of_n[:, None] & of_k[None, :])
    if pid % tiles_k == 0:
        tl.store(db_ptr + first + n, tl.sum(db, axis=0), mask=n < N)


@triton.jit
def _expert_of(row, offsets_ptr, experts, RUNS: tl.constexpr):
    """-1 behind the last bound."""
    e = -1
    for r in tl.static_range(RUNS):
        here = (row >= tl.load(offsets_ptr + r)) & (row < tl.load(offsets_ptr + r + 1))
        e = tl.where(here, ((experts >> (4 * r)) & 15).to(tl.int32), e)
    return e


@triton.jit
def _rows_kernel(
    y_ptr,  # out [T, D]
    mean_ptr,  # out [T] if NORM
    rstd_ptr,  # out [T] if NORM
    z_ptr,  # [T, D]
    gamma_ptr,  # [E, D] if NORM
    beta_ptr,  # [E, D], or None
    offsets_ptr,  # [RUNS + 1]
    experts,  # of each run, in 4 bits
    D,
    stride_z,
    eps,
    RUNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = _expert_of(row, offsets_ptr, experts, RUNS)
    k = tl.arange(0, BLOCK)
    here = k < whole(D, EVEN)
    y = _activated(tl.load(z_ptr + row * stride_z + k, mask=here, other=0.0).to(ACC), 0.0, ACTIVATION)
    if NORM:
        mean = tl.full((), 0.0, ACC)
        if CENTRED:
            mean = tl.sum(y, axis=0) / D
        y = tl.where(here, y - mean, 0.0)
        rstd = divide(1.0, sqrt(tl.sum(y * y, axis=0) / D + tl.full((), eps, ACC)))
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        at = tl.maximum(e, 0) * D + k
        y *= rstd * tl.load(gamma_ptr + at, mask=here, other=0.0)
        if beta_ptr is not None:
            y += tl.load(beta_ptr + at, mask=here, other=0.0)
    y = tl.where(e >= 0, y, 0.0)
    tl.store(y_ptr + row * D + k, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z))"""
    if ACTIVATION == "gelu":
        p, e = _normal(z)
        return z * p, p + z * (0.3989422804014327 * e)
    if ACTIVATION == "gelu_tanh":
        s = 1.0 / (1.0 + exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    if ACTIVATION == "quick_gelu":
        s = 1.0 / (1.0 + exp(-1.702 * z))
        return z * s, s + 1.702 * z * s * (1.0 - s)
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + exp(-z))
        return z * s, s + z * s * (1.0 - s)
    return z, z * 0.0 + 1.0


@triton.jit
def _rows_grad_kernel(
    dz_ptr,  # out [T, D]
    y_ptr,  # out [T, D], or None
    parts_ptr,  # out [tiles, 2, D] if NORM: sums of g xhat and of g
    tile_expert_ptr,  # out [tiles] if NORM; -1: none
    g_ptr,  # [T, D]
    z_ptr,  # [T, D]
    mean_ptr,  # [T] if NORM
    rstd_ptr,  # [T] if NORM
    gamma_ptr,  # [E, D] if NORM
    beta_ptr,  # [E, D], or None
    offsets_ptr,  # [RUNS + 1]
    experts,  # of each run, in 4 bits
    T,
    D,
    stride_g,
    stride_z,
    RUNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of one run."""
    tile = tl.program_id(0)
    e, row, stop = _run_of(tile, offsets_ptr, experts, T, RUNS, ROWS)
    k = tl.arange(0, BLOCK)
    here = k < whole(D, EVEN)
    at = tl.maximum(e, 0) * D + k
    of_gamma, of_beta = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for t in range(row, tl.minimum(row + ROWS, stop)):
        g = tl.load(g_ptr + t * stride_g + k, mask=here, other=0.0).to(ACC)
        y, slope = _slope(tl.load(z_ptr + t * stride_z + k, mask=here, other=0.0).to(ACC), ACTIVATION)
        if NORM:
            rstd = tl.load(rstd_ptr + t)
            xhat = tl.where(here, (y - tl.load(mean_ptr + t)) * rstd, 0.0)
            of_gamma += g * xhat
            of_beta += g
            gamma = tl.load(gamma_ptr + at, mask=here, other=0.0)
            if y_ptr is not None:
                y = xhat * gamma
                if beta_ptr is not None:
                    y += tl.load(beta_ptr + at, mask=here, other=0.0)
            g *= gamma
            by_xhat = tl.sum(g * xhat, axis=0) / D
            if CENTRED:
                g -= tl.sum(g, axis=0) / D
            g = (g - xhat * by_xhat) * rstd
        g = tl.where(e >= 0, g * slope, 0.0)
        tl.store(dz_ptr + t * D + k, g.to(dz_ptr.dtype.element_ty), mask=here)
        if y_ptr is not None:
            tl.store(y_ptr + t * D + k, tl.where(e >= 0, y, 0.0).to(y_ptr.dtype.element_ty), mask=here)
    if NORM:
        tl.store(tile_expert_ptr + tile, e)
        parts = parts_ptr + tile.to(tl.int64) * 2 * D + k
        tl.store(parts, of_gamma, mask=here)
        tl.store(parts + D, of_beta, mask=here)


@triton.jit
def _sums_kernel(
    sums_ptr,  # out [E, 2 D]
    parts_ptr,  # [tiles, 2 D]
    tile_expert_ptr,  # [tiles]
    tiles,
    W,  # 2 D
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of an expert, in order."""
    e = tl.program_id(1)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    parts = parts_ptr + k
    for tile in range(tiles):
        part = tl.load(parts, mask=k < W, other=0.0)
        # what a tile without rows holds may be no number
        total += tl.where(tl.load(tile_expert_ptr + tile) == e, part, 0.0)
        parts += W
    tl.store(sums_ptr + e.to(tl.int64) * W + k, total, mask=k < W)


# --- launches -------------------------------------------------------------------------------------------------------

_GROUP_M = 8
_TILES: dict[str, dict[str, Any]] = {
    "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "single": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
# two products
_GATED_TILE: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_GRAD_TILES: dict[str, dict[str, Any]] = {
    "half": {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    "single": {"BLOCK_T": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
}
# enough programs for a GPU's processors
_PROGRAMS = 264
_ROWS = 16  # of a program of the norms' gradients


def _kind(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else "single"


def _runs(runs: Runs) -> dict[str, Any]:
    packed = sum(e << (4 * r) for r, e in enumerate(runs.experts))
    packed -= (packed >> 63) << 64  # as a signed number
    return {"offsets_ptr": runs.offsets, "experts": packed, "RUNS": len(runs.experts)}


def _unit(t: Tensor) -> Tensor:
    """Rows of unit stride."""
    t = t.resolve_neg()
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _acc(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(accumulation_dtype(dtype)).contiguous().resolve_neg()


def _tiles_m(rows: int, runs: Runs, block: int) -> int:
    """At most so many tiles, those behind the last bound included."""
    return triton.cdiv(rows, block) + len(runs.experts)


def _product(
    x: Tensor, weight: Tensor, runs: Runs, y: Tensor, z: Tensor | None, biases: Tensor | None, activation: str,
    ending: Ending, transposed: bool,
) -> None:  # fmt: skip
    x, t, n, k = _unit(x), x.shape[0], y.shape[1], x.shape[1]
    dtype, kind = x.dtype, _kind(x.dtype)
    tile = _GATED_TILE if activation in GATED and kind == "half" else _TILES[kind]
    tiles_m, tiles_n = _tiles_m(t, runs, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"])
    if not t:
        return
    residual = None if ending.residual is None else ending.residual.contiguous().resolve_neg()
    launch(
        _product_kernel, (tiles_m * tiles_n,), x,
        y_ptr=y, z_ptr=z, x_ptr=x, w_ptr=weight.contiguous().resolve_neg(), b_ptr=_acc(biases, dtype),
        residual_ptr=residual, scale_ptr=_acc(ending.scale, dtype), row_scale_ptr=_acc(ending.row_scale, dtype),
        T=t, N=n, K=k, stride_x=x.stride(0), tiles_m=tiles_m, tiles_n=tiles_n,
        ACTIVATION=activation, GATED=activation in GATED, TRANSPOSED=transposed, ACC=accumulator(dtype),
        PRECISION=input_precision(dtype), EVEN_K=k % tile["BLOCK_K"] == 0, EVEN_N=n % 16 == 0, GROUP_M=_GROUP_M,
        **_runs(runs), **tile,
    )  # fmt: skip


_NOTHING = Ending(None, None, None)


def finished(
    x: Tensor, weights: Any, biases: Any, runs: Runs, activation: str, ending: Ending, keep: bool
) -> tuple[Tensor, Tensor]:
    """(the product with its activation and its ending, the product if it is kept)"""
    wide = weights[0].shape[1]
    n = wide // 2 if activation in GATED else wide
    y = x.new_empty(x.shape[0], n, dtype=x.dtype if ending.residual is None else ending.residual.dtype)
    z = x.new_empty(x.shape[0], wide) if keep else None
    _product(x, weights[0], runs, y, z, biases[0] if biases else None, activation, ending, False)
    return y, x.new_empty(0) if z is None else z


def product_grad(dz: Tensor, weights: Any, runs: Runs, out: Tensor) -> Tensor:
    """The gradient of x, into `out`."""
    _product(dz, weights[0], runs, out, None, None, "none", _NOTHING, True)
    return out


def parameter_grads(
    dz: Tensor, x: Tensor, weights: Any, biases: Any, of_weights: Any, of_biases: Any, runs: Runs
) -> tuple[list[Tensor], list[Tensor]]:
    """(dW, db)"""
    weight, acc = weights[0], accumulation_dtype(x.dtype)
    e, n, k = weight.shape
    tile, dz, x = _GRAD_TILES[_kind(x.dtype)], _unit(dz), _unit(x)
    tiles_n, tiles_k = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(k, tile["BLOCK_K"])
    split = max(1, min(8, _PROGRAMS // (e * tiles_n * tiles_k)))
    dw = torch.empty((split, e, n, k), dtype=weight.dtype if split == 1 else acc, device=x.device)
    db = torch.empty((split, e, n), dtype=acc, device=x.device)
    launch(
        _weight_grad_kernel, (tiles_n * tiles_k, e, split), x,
        dw_ptr=dw, db_ptr=db, dz_ptr=dz, x_ptr=x, N=n, K=k, stride_dz=dz.stride(0), stride_x=x.stride(0),
        tiles_n=tiles_n, tiles_k=tiles_k, SPLIT=split, ACC=accumulator(x.dtype), PRECISION=input_precision(x.dtype),
        EVEN=n % 16 == 0 and k % 16 == 0, **_runs(runs), **tile,
    )  # fmt: skip
    return [cast(dw.sum(0) if split > 1 else dw[0], weight.dtype)], like([db.sum(0)], biases)


def _row_options(z: Tensor, activation: str, norm: Norm, runs: Runs) -> dict[str, Any]:
    d = z.shape[1]
    given = (norm.gammas[0] if norm.gammas else None), (norm.betas[0] if norm.betas else None)
    gamma, beta = (_acc(t, z.dtype) for t in given)
    block = triton.next_power_of_2(d)
    return {
        "gamma_ptr": gamma, "beta_ptr": beta, "D": d, "ACTIVATION": activation, "NORM": bool(norm.gammas),
        "CENTRED": norm.centred, "EVEN": d % 16 == 0, "ACC": accumulator(z.dtype), "BLOCK": block,
        "num_warps": min(16, max(1, block // 512)), **_runs(runs),
    }  # fmt: skip


def forward(z: Tensor, activation: str, norm: Norm, runs: Runs) -> Normed:
    z, t, d = _unit(z), *z.shape
    out = z.new_empty(t, d)
    mean, rstd = (z.new_empty(t if norm.gammas else 0, dtype=accumulation_dtype(z.dtype)) for _ in range(2))
    if t:
        launch(
            _rows_kernel, (t,), z, y_ptr=out, mean_ptr=mean, rstd_ptr=rstd, z_ptr=z, stride_z=z.stride(0),
            eps=norm.eps, **_row_options(z, activation, norm, runs),
        )  # fmt: skip
    return Normed(out, mean, rstd)


def backward(
    g: Tensor, z: Tensor, activation: str, norm: Norm, mean: Tensor, rstd: Tensor, runs: Runs, again: bool
) -> Grads:
    g, z, t, d = _unit(g), _unit(z), *z.shape
    acc, tiles = accumulation_dtype(z.dtype), _tiles_m(t, runs, _ROWS)
    dz, y = z.new_empty(t, d), z.new_empty(t, d) if again else None
    options = _row_options(z, activation, norm, runs)
    parts = z.new_empty((tiles, 2 * d) if norm.gammas else 0, dtype=acc)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=z.device)
    launch(
        _rows_grad_kernel, (tiles,), z,
        dz_ptr=dz, y_ptr=y, parts_ptr=parts, tile_expert_ptr=tile_expert, g_ptr=g, z_ptr=z,
        mean_ptr=mean, rstd_ptr=rstd, T=t, stride_g=g.stride(0), stride_z=z.stride(0), ROWS=_ROWS, **options,
    )  # fmt: skip
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    if norm.gammas:
        e, block = norm.gammas[0].shape[0], 256
        sums = z.new_empty(e, 2 * d, dtype=acc)
        launch(
            _sums_kernel, (triton.cdiv(2 * d, block), e), z, sums_ptr=sums, parts_ptr=parts,
            tile_expert_ptr=tile_expert, tiles=tiles, W=2 * d, ACC=accumulator(z.dtype), BLOCK=block,
        )  # fmt: skip
        dgamma, dbeta = (part.contiguous() for part in sums.split(d, 1))
        dgammas, dbetas = like([dgamma], norm.gammas), like([dbeta], norm.betas)
    return Grads(dz, z.new_empty(0) if y is None else y, dgammas, dbetas)


rows = SimpleNamespace(forward=forward, backward=backward, AT_ONCE=None)


# --- ahead of time --------------------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """The products and norms of BEiT-3 base and of a gated layer, for `mmfuse compile-report`."""
    half, single = _TILES["half"], _TILES["single"]
    product = {"ACC": tl.float32, "PRECISION": "ieee", "GROUP_M": _GROUP_M, "EVEN_K": True, "EVEN_N": True, "RUNS": 2}
    product |= {"GATED": False, "TRANSPOSED": False, "ACTIVATION": "none", "b_ptr": "*fp32"}
    absent: dict[str, Any] = dict.fromkeys(("z_ptr", "residual_ptr", "scale_ptr", "row_scale_ptr"))
    yield _spec("_product_kernel", "bf16", product | absent | half, "half")
    ending = absent | {"residual_ptr": "*bf16", "row_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
    yield _spec("_product_kernel", "bf16, ended", product | ending | half, "half")
    kept = absent | {"z_ptr": "*bf16", "ACTIVATION": "gelu"}
    yield _spec("_product_kernel", "bf16 gelu", product | kept | half, "half")
    gated = absent | {"ACTIVATION": "swiglu", "GATED": True, "b_ptr": None}
    yield _spec("_product_kernel", "bf16 swiglu", product | gated | _GATED_TILE, "half")
    transposed = absent | {"TRANSPOSED": True, "b_ptr": None}
    yield _spec("_product_kernel", "bf16 gradient", product | transposed | half, "half")
    odd = {"EVEN_K": False}  # VLMo base_plus: 544 is no multiple of the tile
    yield _spec("_product_kernel", "bf16 D 544", product | absent | odd | half, "half")
    tf32 = {"PRECISION": "tf32"} | dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*fp32")
    yield _spec("_product_kernel", "tf32", product | absent | single | tf32, "tf32")
    grads = {"ACC": tl.float32, "PRECISION": "ieee", "EVEN": True, "RUNS": 2, "SPLIT": 2, "dw_ptr": "*fp32"}
    yield _spec("_weight_grad_kernel", "bf16", grads | _GRAD_TILES["half"], "half")
    norm = {"ACC": tl.float32, "NORM": True, "CENTRED": True, "EVEN": True, "RUNS": 2}
    wide = {"BLOCK": 4096, "num_warps": 8, "ACTIVATION": "gelu"}
    narrow = {"BLOCK": 1024, "num_warps": 2, "ACTIVATION": "none"}
    yield _spec("_rows_kernel", "bf16 768", norm | narrow, None)
    yield _spec("_rows_kernel", "bf16 gelu 3072", norm | wide, None)
    yield _spec("_rows_grad_kernel", "bf16 768", norm | narrow | {"ROWS": _ROWS, "y_ptr": None}, None)
    yield _spec("_rows_grad_kernel", "bf16 gelu 3072", norm | wide | {"ROWS": _ROWS, "y_ptr": "*bf16"}, None)
    yield _spec("_sums_kernel", "", {"ACC": tl.float32, "BLOCK": 256, "num_warps": 4}, None)


_ALIGNED = ("N", "K", "D", "W", "stride_x", "stride_dz", "stride_g", "stride_z")
_TYPES = {
    **dict.fromkeys(("y_ptr", "z_ptr", "x_ptr", "w_ptr", "dz_ptr", "g_ptr"), "*bf16"),
    **{"offsets_ptr": "*i64", "experts": "i64", "tile_expert_ptr": "*i32", "eps": "fp32"},
}


def _spec(name: str, variant: str, options: dict[str, Any], dot: str | None) -> Spec:
    kernel = globals()[name]
    types = _TYPES | {n: v for n, v in options.items() if isinstance(v, str) and v.startswith("*")}
    typed = {n for n, v in options.items() if isinstance(v, str) and v.startswith("*")}
    given = {n: v for n, v in options.items() if n in kernel.arg_names and n not in typed}
    signature = {n: types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in given}
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=variant,
        signature=signature,
        constants=given,
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 2),
        aligned=tuple(n for n in signature if n in _ALIGNED),
        dot=dot,
        work=_work(options) if name == "_product_kernel" and not options["GATED"] else None,
    )


def _work(options: dict[str, Any]) -> Work:
    """Queries, keys and values of 64 pairs."""
    itemsize = 4 if options["PRECISION"] == "tf32" else 2
    return Work.of_product("number", 64 * 261, 2304, 768, options, itemsize, written=itemsize)
