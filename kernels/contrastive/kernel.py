"""The contrastive template in Triton: tiles of logits that never leave the chip, in the forward and in the backward.

For features x [b, D] and y [N, D], logits S = s U with U = x yT and positives at column i + row_offset:

    stats      m = max S and l = sum exp(S - m) of every row and column over the negatives, each tile computed once
    grad       G_ij = a_i exp(S_ij - rho_i) + b_j exp(S_ij - kappa_j) - shift,  d_i on the positives
               dx = s alpha G y,   dy = s alpha GT x,   ds = alpha <x, G y>
    sigmoid    softplus(-z S) and G = sigmoid(S) - [positive] in the same pass

`stats` leaves one partial (m, l) per tile and row, and per tile and column, in a workspace that a second kernel merges
in a fixed order: no atomics, two runs are equal bitwise. `grad` and `sigmoid` write G in squares,
in the dtype of the operands, and leave the two products to cuBLAS, which accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime import configs
from mmfuse.kernels._runtime.aot import Candidate, Spec, Work
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import (
    LOG2E,
    accumulator,
    aligned_rows,
    exp,
    finite,
    input_precision,
    neighbours,
    products,
    tile_of,
    whole,
)
from mmfuse.kernels.contrastive.blocked import FP16_SCALE, fixed_point_step, not_finite

# G is made in squares of about this many rows and columns: 128 MiB in 16 bits, long enough products for cuBLAS, and the
# float32 accumulators of dx and dy are read again only N / 8192 times
_SQUARE = 8192
# `stats` takes this many rows at a time, which bounds its workspace
_ROWS = 16384

# --- device code ----------------------------------------------------------------------------------------------------

# two directions share exp(S - max of the tile) while no maximum lies further than this below it: exp(-60) and what is
# 2^-24 of it are normal numbers
_SPREAD = tl.constexpr(60.0)
# and no sum is less than this, whose logarithm, -42, is not much larger than logits are
_LEAST = tl.constexpr(2.0**-60)
# adding it leaves the nearest integer in the low bits of a float32
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _at(ptr, row0, col0, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to the tile that begins at (row0, col0). Offsets within it are int32, which takes half the registers."""
    ptr += row0.to(tl.int64) * stride + col0
    return ptr + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def _crosses(row0, col0, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a positive lies in the tile."""
    return (col0 < row0 + diagonal + BLOCK_M) & (row0 + diagonal < col0 + BLOCK_N)


@triton.jit
def _halves(t):
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _parts(t, PARTS: tl.constexpr):
    """A tile's columns in 1, 2 or 4 parts, to be worked on in turn where the whole does not fit the registers."""
    if PARTS == 4:
        left, right = _halves(t)
        a, b = _halves(left)
        c, d = _halves(right)
        parts = (a, b, c, d)
    elif PARTS == 2:
        parts = _halves(t)
    else:
        parts = (t,)
    return parts


@triton.jit
def _sums_of(s, row_w, col_w, WEIGHTED: tl.constexpr, MAXIMA: tl.constexpr):
    """(m, l = sum exp(S - m), c = sum exp(S - m) W) of rows, then of columns; c is l unless WEIGHTED.

    m is any number that leaves l its digits, or the maximum if MAXIMA.
    """
    top = tl.max(s)
    t = top * LOG2E
    e = tl.exp2(s * LOG2E - t)
    l_row, l_col = tl.sum(e, axis=1), tl.sum(e, axis=0)
    m_row, m_col = tl.zeros_like(l_row) + top, tl.zeros_like(l_col) + top
    c_row, c_col = l_row, l_col
    # without a negative the sum is 0, or NaN: those take the slow path, too
    if (tl.min(l_row, axis=0) > _LEAST) & (tl.min(l_col, axis=0) > _LEAST) & (top == top):
        if WEIGHTED:
            c_row, c_col = tl.sum(e * row_w, axis=1), tl.sum(e * col_w, axis=0)
        if MAXIMA:
            m_row, m_col = tl.max(s, axis=1), tl.max(s, axis=0)
            # the same `t` in both: its rounding cancels
            back_row, back_col = tl.exp2(t - m_row * LOG2E), tl.exp2(t - m_col * LOG2E)
            l_row, l_col, c_row, c_col = l_row * back_row, l_col * back_col, c_row * back_row, c_col * back_col
    else:
        m_row, m_col = tl.max(s, axis=1), tl.max(s, axis=0)
        e = exp(s - finite(m_row)[:, None])
        l_row = tl.sum(e, axis=1)
        c_row = tl.sum(e * row_w, axis=1) if WEIGHTED else l_row
        e = exp(s - finite(m_col)[None, :])
        l_col = tl.sum(e, axis=0)
        c_col = tl.sum(e * col_w, axis=0) if WEIGHTED else l_col
    return m_row, l_row, c_row, m_col, l_col, c_col


@triton.jit
def _negatives_of(
    u, positive_ptr, scale, M, N, diagonal, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S of the negatives, -inf elsewhere; writes the positives' U."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    s = u * scale
    if _crosses(row0, col0, diagonal, BLOCK_M, BLOCK_N) | (row0 + BLOCK_M > M) | (col0 + BLOCK_N > N):
        at = rows + diagonal
        pair = cols[None, :] == at[:, None]
        here = (rows < M) & (at >= col0) & (at < tl.minimum(col0 + BLOCK_N, N))
        tl.store(positive_ptr + rows, tl.sum(tl.where(pair, u, 0.0), axis=1), mask=here)
        s = tl.where((rows < M)[:, None] & (cols < N)[None, :] & (pair == 0), s, float("-inf"))
    return s


@triton.jit
def _stats_of(
    u, row_max, row_sum, row_same, col_max_ptr, col_sum_ptr, col_same_ptr, positive_ptr, logits_ptr,
    row_key, col_key_ptr, row_centre, col_centre_ptr, scale, step_ptr, stride_u, M, N, diagonal, row0, col0, at_col,
    SAVE: tl.constexpr, KEYED: tl.constexpr, MAXIMA: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the columns of `u` to the rows' running (max, sum, sum of equal keys' U - c), and write the columns' own."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    if SAVE != "":
        u_ptrs = _at(logits_ptr, row0, col0, stride_u, BLOCK_M, BLOCK_N)
        inside = (rows < M)[:, None] & (cols < whole(N, EVEN_N))[None, :]
        if SAVE == "int16":
            # the loss is that of the kept logits, so that the probabilities of the backward sum to one
            step = tl.load(step_ptr + rows, mask=rows < M, other=1.0)
            q = tl.clamp((u * (1.0 / step)[:, None]).to(tl.float32), -32767.0, 32767.0) + _ROUND
            tl.store(u_ptrs, q.to(tl.int32, bitcast=True).to(tl.int16), mask=inside)
            u = (q - _ROUND).to(ACC) * step[:, None]
        else:
            tl.store(u_ptrs, u, mask=inside)
    if KEYED:
        same = row_key[:, None] == tl.load(col_key_ptr + cols, mask=cols < N, other=-3)[None, :]
        same = same & (cols[None, :] != (rows + diagonal)[:, None])
        col_centre = tl.load(col_centre_ptr + cols, mask=cols < N, other=0.0)
        row_same += tl.sum(tl.where(same, u - row_centre[:, None], 0.0), axis=1)
        of_col = tl.sum(tl.where(same, u - col_centre[None, :], 0.0), axis=0)
        tl.store(col_same_ptr + at_col + cols, of_col, mask=cols < N)
    s = _negatives_of(u, positive_ptr, scale, M, N, diagonal, row0, col0, BLOCK_M, BLOCK_N)
    m_row, l_row, _, m_col, l_col, _ = _sums_of(s, s, s, False, MAXIMA)
    tl.store(col_max_ptr + at_col + cols, m_col, mask=cols < N)
    tl.store(col_sum_ptr + at_col + cols, l_col, mask=cols < N)
    new = tl.maximum(row_max, m_row)
    row_sum = row_sum * exp(row_max - finite(new)) + l_row * exp(m_row - finite(new))
    return new, row_sum, row_same


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def _stats_fwd_kernel(
    row_max_ptr,  # out [tiles_n, M], partial
    row_sum_ptr,
    row_same_ptr,  # if KEYED
    col_max_ptr,  # out [tiles_m, N], partial
    col_sum_ptr,
    col_same_ptr,  # if KEYED
    positive_ptr,  # out [M], U at the positives
    logits_ptr,  # out [M, N] if SAVE
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [], or one per group
    step_ptr,  # [M] if SAVE is "int16"
    row_key_ptr,  # [M] if KEYED
    col_key_ptr,  # [N] if KEYED
    row_centre_ptr,  # [M] if KEYED
    col_centre_ptr,  # [N] if KEYED
    table_ptr,  # [programs, 6] if GROUPED
    stride_x,
    stride_y,
    stride_u,
    D,
    M,
    N,
    diagonal,
    SAVE: tl.constexpr,
    KEYED: tl.constexpr,
    GROUPED: tl.constexpr,
    MAXIMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    # rows of x and of y; those of a group are counted from its first
    height, width = M, N
    if GROUPED:
        group, tile_m, tile_n, begin, height, D = _entry(table_ptr)
        width = height
        scale_ptr += group
        x_ptr += begin * stride_x
        y_ptr += begin * stride_y
        row_max_ptr += begin
        row_sum_ptr += begin
        col_max_ptr += begin
        col_sum_ptr += begin
        positive_ptr += begin
    else:
        tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0, scale = tile_m * BLOCK_M, tile_n * BLOCK_N, tl.load(scale_ptr)
    u = products(
        x_ptr, y_ptr, row0, col0, stride_x, stride_y, height, width, D,
        ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    parts = _parts(u, PARTS)
    rows = row0 + tl.arange(0, BLOCK_M)
    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    row_same, row_key, row_centre = row_sum, row_sum, row_sum
    if KEYED:
        row_key = tl.load(row_key_ptr + rows, mask=rows < height, other=-2)
        row_centre = tl.load(row_centre_ptr + rows, mask=rows < height, other=0.0)
    at_col = tile_m.to(tl.int64) * N
    for i in tl.static_range(PARTS):
        row_max, row_sum, row_same = _stats_of(
            parts[i], row_max, row_sum, row_same, col_max_ptr, col_sum_ptr, col_same_ptr,
            positive_ptr, logits_ptr, row_key, col_key_ptr, row_centre, col_centre_ptr, scale, step_ptr, stride_u,
            height, width, diagonal, row0, col0 + i * (BLOCK_N // PARTS), at_col,
            SAVE, KEYED, MAXIMA, EVEN_N, ACC, BLOCK_M, BLOCK_N // PARTS,
        )  # fmt: skip
    at_row = tile_n.to(tl.int64) * M
    tl.store(row_max_ptr + at_row + rows, row_max, mask=rows < height)
    tl.store(row_sum_ptr + at_row + rows, row_sum, mask=rows < height)
    if KEYED:
        tl.store(row_same_ptr + at_row + rows, row_same, mask=rows < height)


@triton.jit
def _entry(table_ptr):
    """(group, tile_m, tile_n, begin, height, D) of this program: a tile of the group's rows and columns from begin."""
    at = table_ptr + tl.program_id(0) * 6
    begin = tl.load(at + 3).to(tl.int64)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), begin, tl.load(at + 4), tl.load(at + 5)


@triton.jit(do_not_specialize=["G", "N"])
def _merge_kernel(
    max_ptr,  # in and out [N]
    sum_ptr,  # in and out [N]
    cross_ptr,  # in and out [N] if CROSS
    part_max_ptr,  # [G, N]
    part_sum_ptr,  # [G, N]
    part_cross_ptr,  # [G, N] if CROSS
    G,
    N,
    CROSS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.load(max_ptr + cols, mask=cols < N, other=float("-inf"))
    l = tl.load(sum_ptr + cols, mask=cols < N, other=0.0)  # noqa: E741
    c = tl.load(cross_ptr + cols, mask=cols < N, other=0.0) if CROSS else l
    for g0 in range(0, G, BLOCK_G):
        parts = g0 + tl.arange(0, BLOCK_G)
        at = parts.to(tl.int64)[:, None] * N + cols[None, :]
        inside = (parts < G)[:, None] & (cols < N)[None, :]
        part_m = tl.load(part_max_ptr + at, mask=inside, other=float("-inf"))
        part_l = tl.load(part_sum_ptr + at, mask=inside, other=0.0)
        new = tl.maximum(m, tl.max(part_m, axis=0))
        back, part_back = exp(m - finite(new)), exp(part_m - finite(new)[None, :])
        l = l * back + tl.sum(part_l * part_back, axis=0)  # noqa: E741
        if CROSS:
            part_c = tl.load(part_cross_ptr + at, mask=inside, other=0.0)
            c = c * back + tl.sum(part_c * part_back, axis=0)
        m = new
    tl.store(max_ptr + cols, tl.where(l == l, m, l), mask=cols < N)
    tl.store(sum_ptr + cols, l, mask=cols < N)
    if CROSS:
        tl.store(cross_ptr + cols, c, mask=cols < N)


@triton.jit
def _softmaxes(u, scale, a, rho, b, kappa, shift):
    """a_i exp(S_ij - rho_i) + b_j exp(S_ij - kappa_j) - shift"""
    # no negative is above its rho or its kappa; an infinite one leaves its row or column out, or a whole direction
    most_row = tl.max(tl.where(rho == float("inf"), -rho, rho), axis=0)
    most_col = tl.max(tl.where(kappa == float("inf"), -kappa, kappa), axis=0)
    of_rows = tl.where(most_row == -float("inf"), most_col, most_row)
    top = tl.minimum(of_rows, tl.where(most_col == -float("inf"), most_row, most_col))
    top = tl.where(top == -float("inf"), 0.0, top)
    low = tl.minimum(tl.min(rho, axis=0), tl.min(kappa, axis=0))
    s = u * scale
    if top - low < _SPREAD:
        # the same `t` in both: its rounding cancels
        t = top * LOG2E
        e = tl.exp2(s * LOG2E - t)
        g = e * ((a * tl.exp2(t - rho * LOG2E))[:, None] + (b * tl.exp2(t - kappa * LOG2E))[None, :]) - shift
    else:
        g = a[:, None] * exp(s - rho[:, None]) + b[None, :] * exp(s - kappa[None, :]) - shift
    return g


@triton.jit
def _grad_of(
    u, g_ptr, scale, a_ptr, rho_ptr, b_ptr, kappa_ptr, d_ptr, row_key_ptr, col_key_ptr, p_ptr, q_ptr,
    stride_g, M, N, diagonal, shift, row0, col0,
    KEYED: tl.constexpr, STORE: tl.constexpr, DOT: tl.constexpr, G_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write G of a tile; return sum G U if DOT."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    a = tl.load(a_ptr + rows, mask=rows < M, other=0.0)
    b = tl.load(b_ptr + cols, mask=cols < N, other=0.0)
    rho = tl.load(rho_ptr + rows, mask=rows < M, other=float("inf"))
    kappa = tl.load(kappa_ptr + cols, mask=cols < N, other=float("inf"))
    g = _softmaxes(u, scale, a, rho, b, kappa, shift)
    if KEYED:
        row_key = tl.load(row_key_ptr + rows, mask=rows < M, other=-2)
        col_key = tl.load(col_key_ptr + cols, mask=cols < N, other=-3)
        p, q = tl.load(p_ptr + rows, mask=rows < M, other=0.0), tl.load(q_ptr + cols, mask=cols < N, other=0.0)
        g = tl.where(row_key[:, None] == col_key[None, :], g - (p[:, None] + q[None, :]), g)
    return _finish_tile(g, u, g_ptr, d_ptr, stride_g, M, N, diagonal, row0, col0, STORE, DOT, G_SCALE, BLOCK_M, BLOCK_N)


@triton.jit
def _finish_tile(
    g, u, g_ptr, d_ptr, stride_g, M, N, diagonal, row0, col0,
    STORE: tl.constexpr, DOT: tl.constexpr, G_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d on the positives; write the tile if STORE; return sum G U if DOT."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    if _crosses(row0, col0, diagonal, BLOCK_M, BLOCK_N):
        d = tl.load(d_ptr + rows, mask=rows < M, other=0.0)
        g = tl.where(cols[None, :] == (rows + diagonal)[:, None], d[:, None], g)
    if STORE:
        _store(g, g_ptr, stride_g, M, N, row0, col0, G_SCALE, BLOCK_M, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    return tl.sum(tl.where(inside, g * u, 0.0)) if DOT else 0.0


@triton.jit
def _store(
    g, g_ptr, stride_g, M, N, row0, col0, G_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile of G in whole vectors: its rows have room for them, and nobody reads what is beyond column N."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < tl.cdiv(N, 16) * 16)[None, :]
    out = _at(g_ptr, row0, col0, stride_g, BLOCK_M, BLOCK_N)
    tl.store(out, (g * G_SCALE).to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "N", "diagonal", "shift"])
def _grad_kernel(
    g_ptr,  # out [M, N] if STORE
    dot_ptr,  # out [programs] if DOT: sum G U of the tile
    logits_ptr,  # [M, N] if SAVED
    x_ptr,  # [M, D], otherwise
    y_ptr,  # [N, D]
    scale_ptr,  # [], or one per group
    a_ptr,  # [M]
    rho_ptr,  # [M]
    b_ptr,  # [N]
    kappa_ptr,  # [N]
    d_ptr,  # [M]
    step_ptr,  # [M] if SAVED is "int16"
    row_key_ptr,  # [M] if KEYED
    col_key_ptr,  # [N] if KEYED
    p_ptr,  # [M] if KEYED
    q_ptr,  # [N] if KEYED
    table_ptr,  # [programs, 6] if GROUPED; g [M, largest group]
    stride_g,
    stride_u,
    stride_x,
    stride_y,
    D,
    M,
    N,
    diagonal,
    shift,
    SAVED: tl.constexpr,
    KEYED: tl.constexpr,
    GROUPED: tl.constexpr,
    STORE: tl.constexpr,
    DOT: tl.constexpr,
    G_SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    height, width = M, N
    if GROUPED:
        group, tile_m, tile_n, begin, height, D = _entry(table_ptr)
        width = height
        scale_ptr += group
        x_ptr += begin * stride_x
        y_ptr += begin * stride_y
        g_ptr += begin * stride_g
        a_ptr += begin
        rho_ptr += begin
        b_ptr += begin
        kappa_ptr += begin
        d_ptr += begin
    else:
        tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0, scale = tile_m * BLOCK_M, tile_n * BLOCK_N, tl.load(scale_ptr)
    shift = tl.full((), shift, ACC)
    if SAVED != "":
        rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        inside = (rows < height)[:, None] & (cols < whole(width, EVEN_N))[None, :]
        u = tl.load(_at(logits_ptr, row0, col0, stride_u, BLOCK_M, BLOCK_N), mask=inside, other=0).to(ACC)
        if SAVED == "int16":
            u *= tl.load(step_ptr + rows, mask=rows < height, other=0.0)[:, None]
    else:
        u = products(
            x_ptr, y_ptr, row0, col0, stride_x, stride_y, height, width, D,
            ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    parts = _parts(u, PARTS)
    total = tl.zeros((), ACC)
    for i in tl.static_range(PARTS):
        total += _grad_of(
            parts[i], g_ptr, scale, a_ptr, rho_ptr, b_ptr, kappa_ptr, d_ptr, row_key_ptr, col_key_ptr, p_ptr, q_ptr,
            stride_g, height, width, diagonal, shift, row0, col0 + i * (BLOCK_N // PARTS),
            KEYED, STORE, DOT, G_SCALE, BLOCK_M, BLOCK_N // PARTS,
        )  # fmt: skip
    if DOT:
        tl.store(dot_ptr + tl.program_id(0), total)


@triton.jit
def _negated(t, diagonal, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile with the positives' sign turned."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    return tl.where(cols[None, :] == (rows + diagonal)[:, None], -t, t)


@triton.jit
def _sigmoid_of(
    u, g_ptr, scale, bias, stride_g, M, N, diagonal, row0, col0,
    PAIRED: tl.constexpr, STORE: tl.constexpr, G_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write G of a tile; return the sums of softplus, of G and, unless STORE, of G U."""
    s = u * scale + bias
    crosses = PAIRED and _crosses(row0, col0, diagonal, BLOCK_M, BLOCK_N)
    # softplus(-S) and sigmoid(S) - 1 = -sigmoid(-S) on the positives, which keeps their digits
    if crosses:
        s = _negated(s, diagonal, row0, col0, BLOCK_M, BLOCK_N)
    if (row0 + BLOCK_M > M) | (col0 + BLOCK_N > N):
        rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        s = tl.where((rows < M)[:, None] & (cols < N)[None, :], s, float("-inf"))
    # log(1 + exp(-|S|)), of which softplus(S) and sigmoid(S) = exp(-softplus(-S)) are made
    p = _log1p(exp(-tl.abs(s)))
    loss = tl.sum(tl.maximum(s, 0.0) + p)
    g = exp(tl.minimum(s, 0.0) - p)
    if crosses:
        g = _negated(g, diagonal, row0, col0, BLOCK_M, BLOCK_N)
    db = tl.sum(g)
    # G of 0 times a product that overflowed is 0
    ds = 0.0 if STORE else tl.sum(tl.where(g == 0.0, 0.0, g * u))
    if STORE:
        _store(g, g_ptr, stride_g, M, N, row0, col0, G_SCALE, BLOCK_M, BLOCK_N)
    return loss, db, ds


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def _sigmoid_fwd_kernel(
    g_ptr,  # out [M, N] if STORE
    sums_ptr,  # out [3, programs]: sum of softplus, of G and, unless STORE, of G U over the tile
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # []
    bias_ptr,  # []
    stride_g,
    stride_x,
    stride_y,
    D,
    M,
    N,
    diagonal,
    PAIRED: tl.constexpr,
    STORE: tl.constexpr,
    G_SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    u = products(
        x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
        ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    parts = _parts(u, PARTS)
    loss, db, ds = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    for i in tl.static_range(PARTS):
        more_loss, more_db, more_ds = _sigmoid_of(
            parts[i], g_ptr, scale, bias, stride_g, M, N, diagonal, row0, col0 + i * (BLOCK_N // PARTS),
            PAIRED, STORE, G_SCALE, BLOCK_M, BLOCK_N // PARTS,
        )  # fmt: skip
        loss += more_loss
        db += more_db
        ds += more_ds
    sums = sums_ptr + tl.program_id(0)
    tl.store(sums, loss)
    tl.store(sums + tl.num_programs(0), db)
    tl.store(sums + 2 * tl.num_programs(0), ds)


@triton.jit
def _finish_kernel(
    out_ptr,  # out [M, D]
    dot_ptr,  # out [M]: <x, g>
    g_ptr,  # [M, D]
    x_ptr,  # [M, D]
    factor_ptr,  # []
    inverse_ptr,  # [M], one over the norms, or None
    stride_out,
    stride_g,
    stride_x,
    stride_xd,
    D,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    g = tl.load(g_ptr + row * stride_g + k, mask=k < D, other=0.0)
    x = tl.load(x_ptr + row * stride_x + k * stride_xd, mask=k < D, other=0.0).to(ACC)
    dot = tl.sum(g * x, axis=0)
    tl.store(dot_ptr + row, dot)
    if inverse_ptr is not None:
        # at |v| <= 1e-12 the clamp holds the norm fixed, so nothing is projected out
        inverse = tl.load(inverse_ptr + row)
        g = (g - x * tl.where(inverse < 0.999e12, dot, 0.0)) * inverse
    out = g * tl.load(factor_ptr)
    tl.store(out_ptr + row * stride_out + k, out.to(out_ptr.dtype.element_ty), mask=k < D)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] without rounding 1 + e: a sum of N^2 small terms needs their relative accuracy."""
    if e.dtype == tl.float64:
        return tl.log(1.0 + e)
    p = 0.0051261019 * e - 0.0290740654
    p = p * e + 0.0775160864
    p = p * e - 0.136022478
    p = p * e + 0.190768808
    p = p * e - 0.248353988
    p = p * e + 0.333181202
    p = p * e - 0.499994457
    return e * (p * e + 0.99999994)


# --- launches -------------------------------------------------------------------------------------------------------

# a multiply and an add are one instruction, whatever this version of Triton does unasked
_FUSED = {} if INTERPRET else {"enable_fp_fusion": True}
_INTERPRETED = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64, "GROUP_M": 2, "PARTS": 2}


def _tile(m: int, n: int, d: int, parts: int, warps: int, stages: int) -> dict[str, int]:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, "GROUP_M": 8, "PARTS": parts}
    return tile | {"num_warps": warps, "num_stages": stages}


_TILED = ("stats", "grad", "sigmoid", "distill")
# by what the tensor cores see, the major compute capability, and the kernel; chosen to compile without spills with two
# blocks on a multiprocessor, so that one's exponentials run under the other's products. Not measured
_TILES: dict[str, dict[int, dict[str, dict[str, int]]]] = {
    "half": {
        8: {
            "stats": _tile(128, 128, 32, 4, 8, 4),
            "grad": _tile(128, 128, 32, 2, 4, 4),
            "sigmoid": _tile(128, 128, 32, 4, 4, 4),
            "distill": _tile(128, 64, 32, 4, 8, 4),
        },
        9: {
            "stats": _tile(128, 128, 64, 4, 4, 3),
            "grad": _tile(128, 128, 64, 2, 4, 3),
            "sigmoid": _tile(128, 128, 64, 4, 4, 3),
            "distill": _tile(128, 128, 64, 4, 8, 3),
        },
        10: dict.fromkeys(_TILED, _tile(128, 128, 64, 4, 4, 3)) | {"distill": _tile(128, 64, 64, 4, 8, 3)},
    },
    "tf32": {
        8: dict.fromkeys(_TILED, _tile(128, 64, 32, 2, 4, 3))
        | {"stats": _tile(128, 64, 32, 4, 4, 3), "distill": _tile(64, 64, 32, 2, 4, 3)},
        9: dict.fromkeys(_TILED, _tile(128, 128, 32, 4, 4, 3)) | {"distill": _tile(128, 64, 32, 4, 8, 3)},
        10: dict.fromkeys(_TILED, _tile(128, 128, 32, 4, 4, 3))
        | {"stats": _tile(128, 64, 32, 2, 4, 3), "distill": _tile(128, 64, 32, 4, 8, 3)},
    },
    # no tensor cores
    "ieee": {
        8: dict.fromkeys(_TILED, _tile(64, 64, 16, 1, 4, 2))
        | {"grad": _tile(64, 64, 16, 2, 4, 2), "distill": _tile(64, 32, 16, 1, 4, 2)},
    },
}

# for what also keeps float32 logits of 128 columns, or sums what it does not store: twice the registers
_WIDE = {"num_warps": 8}
# the pass over kept logits only streams
_STREAM = _tile(32, 128, 16, 1, 4, 1)
_MERGE = {"BLOCK_G": 16, "BLOCK_N": 128}


def _tiles(dtype: torch.dtype, precision: str) -> dict[int, dict[str, dict[str, int]]]:
    return _TILES["half" if dtype.itemsize == 2 else precision]


def _settings(kernel: str, x: Tensor, wide: bool = False) -> dict[str, Any]:
    """The constexpr arguments and launch options that depend on the device and the dtype."""
    precision = input_precision(x.dtype)
    if INTERPRET:
        tile = _INTERPRETED
    else:
        by_arch = _tiles(x.dtype, precision)
        major = torch.cuda.get_device_capability(x.device)[0]
        # sm_12x has the tensor cores and the shared memory of sm_8x
        tile = by_arch[major if major in by_arch else 8][kernel]
        tile = configs.tuned("contrastive", x.device, kernel, _named(x.dtype, precision), x.shape[1]) or tile
        tile = tile | _WIDE if wide else tile
    return dict(tile, ACC=accumulator(x.dtype), PRECISION=precision, EVEN_D=x.shape[1] % tile["BLOCK_D"] == 0, **_FUSED)


def stats(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_offset: int,
    save: str,
    same: tuple[Tensor, Tensor] | None = None,
    maxima: bool = False,
) -> tuple[Tensor, ...]:
    """(row_max, row_sum [b], col_max, col_sum [N], positive [b], logits), with `same` two more; see `blocked.stats`.

    Extra memory: 8 (N R / BLOCK_M + R N / BLOCK_N) bytes for R = 16384 rows at a time, 134 MB at N = 65536 and tiles of
    128 x 128; half as much again with `same`.
    """
    b, n, acc = len(x), len(y), accumulation_dtype(x.dtype)
    new = {"dtype": acc, "device": x.device}
    logits = torch.empty((b, n) if save else (0,), dtype=torch.int16 if save == "int16" else acc, device=x.device)
    (row_max, row_sum), (col_max, col_sum) = (
        (torch.full((k,), -torch.inf, **new), torch.zeros(k, **new)) for k in (b, n)
    )
    positive = torch.empty(b, **new)
    sums = [] if same is None else [torch.zeros(k, **new) for k in (b, n)]
    row_key, col_key, row_centre, col_centre = (t for k in same for t in k.split([b, n])) if same else (scale,) * 4
    step = fixed_point_step(x, y) if save == "int16" and b else scale
    x, y = aligned_rows(x), aligned_rows(y)
    even = bool(save) and n % 16 == 0
    wide = _wide_stats(save, same is not None or bool(save) and not even, x.dtype, input_precision(x.dtype))
    settings = _settings("stats", x, wide)
    tiles_n = triton.cdiv(n, settings["BLOCK_N"])
    for i in range(0, b if n else 0, _ROWS):
        m = min(b - i, _ROWS)
        rows = slice(i, i + m)
        tiles_m = triton.cdiv(m, settings["BLOCK_M"])
        kinds = 2 if same is None else 3
        row, col = torch.empty(kinds, tiles_n, m, **new), torch.empty(kinds, tiles_m, n, **new)
        launch(
            _stats_fwd_kernel,
            (tiles_m * tiles_n,),
            x,
            row_max_ptr=row[0],
            row_sum_ptr=row[1],
            row_same_ptr=row[-1],
            col_max_ptr=col[0],
            col_sum_ptr=col[1],
            col_same_ptr=col[-1],
            positive_ptr=positive[rows],
            logits_ptr=logits[rows] if save else logits,
            x_ptr=x[rows],
            y_ptr=y,
            scale_ptr=scale,
            step_ptr=step[rows] if save == "int16" else step,
            row_key_ptr=row_key[rows] if sums else row_key,
            col_key_ptr=col_key,
            row_centre_ptr=row_centre[rows] if sums else row_centre,
            col_centre_ptr=col_centre,
            table_ptr=scale,
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            stride_u=n,
            D=x.shape[1],
            M=m,
            N=n,
            diagonal=i + row_offset,
            SAVE=save,
            KEYED=same is not None,
            GROUPED=False,
            MAXIMA=maxima or same is not None,  # what is left of a row's positives has few digits
            EVEN_N=even,
            **settings,
        )
        _merge((row_max[rows], row_sum[rows]), row[:2])
        _merge((col_max, col_sum), col[:2])
        if sums:
            sums[0][rows] = row[2].sum(0)
            sums[1] += col[2].sum(0)
    return row_max, row_sum, col_max, col_sum, positive, logits, *sums


def _wide_stats(save: str, more: bool, dtype: torch.dtype, precision: str) -> bool:
    """Whether a tile keeps so much beside its logits that it needs twice the registers: `more` are keys, or odd N."""
    cores = dtype.itemsize == 2 or precision == "tf32"
    return cores and (save == "full" or more)


def _merge(into: tuple[Tensor, ...], parts: Tensor) -> None:
    """Merge partial (m, l) or (m, l, cross) [2 or 3, G, N] into the running ones."""
    _, groups, n = parts.shape
    launch(
        _merge_kernel,
        (triton.cdiv(n, _MERGE["BLOCK_N"]),),
        into[0],
        max_ptr=into[0],
        sum_ptr=into[1],
        cross_ptr=into[-1],
        part_max_ptr=parts[0],
        part_sum_ptr=parts[1],
        part_cross_ptr=parts[-1],
        G=groups,
        N=n,
        CROSS=len(into) == 3,
        **_MERGE,
        **_FUSED,
    )


def grad(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    alpha: Tensor,
    a: Tensor,
    rho: Tensor,
    b: Tensor,
    kappa: Tensor,
    d: Tensor,
    shift: float,
    row_offset: int,
    logits: Tensor,
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_s: bool,
    targets: tuple[Tensor, Tensor, Tensor] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) as `blocked.grad`.

    Extra memory: a square of G, and float32 accumulators of dy and of one square's rows of dx: 63 + 201 + 17 MB at
    b = N = 65536, D = 768 in 16 bits on 132 multiprocessors, beside the results.
    """
    saved = "" if not logits.numel() else "int16" if logits.dtype == torch.int16 else "full"
    step = fixed_point_step(x, y) if saved == "int16" else scale
    left, right = aligned_rows(x), aligned_rows(y)
    in_tiles = need_s and not (need_x or need_y)
    settings = _settings("grad", left, wide=in_tiles)
    if saved and not INTERPRET:
        settings.update(_STREAM)
    dot = torch.zeros((), dtype=torch.float64, device=x.device)
    keyed = targets is not None
    row_key, col_key, p, q = (*targets[0].split([len(x), len(y)]), *targets[1:]) if targets else (scale,) * 4

    def fill(i: int, j: int, m: int, n: int, g: Tensor) -> None:
        rows, cols = slice(i, i + m), slice(j, j + n)
        programs = triton.cdiv(m, settings["BLOCK_M"]) * triton.cdiv(n, settings["BLOCK_N"])
        part = torch.empty(programs if in_tiles else 0, dtype=scale.dtype, device=x.device)
        u = logits[rows, cols] if saved else logits
        equal = (row_key[rows], col_key[cols], p[rows], q[cols]) if keyed else (scale,) * 4
        launch(
            _grad_kernel,
            (programs,),
            x,
            g_ptr=g,
            dot_ptr=part,
            logits_ptr=u,
            x_ptr=left[rows],
            y_ptr=right[cols],
            scale_ptr=scale,
            a_ptr=a[rows],
            rho_ptr=rho[rows],
            b_ptr=b[cols],
            kappa_ptr=kappa[cols],
            d_ptr=d[rows],
            step_ptr=step[rows] if saved == "int16" else step,
            **dict(zip(("row_key_ptr", "col_key_ptr", "p_ptr", "q_ptr"), equal, strict=True)),
            table_ptr=scale,
            stride_g=g.stride(0),
            stride_u=len(y),
            stride_x=left.stride(0),
            stride_y=right.stride(0),
            D=left.shape[1],
            M=m,
            N=n,
            diagonal=i + row_offset - j,
            shift=float(shift),
            SAVED=saved,
            KEYED=keyed,
            GROUPED=False,
            EVEN_N=bool(saved) and len(y) % 16 == 0,
            STORE=not in_tiles,
            DOT=in_tiles,
            G_SCALE=_g_scale(x.dtype),
            **settings,
        )
        if in_tiles:
            dot.add_(part.sum(dtype=torch.float64))

    factor, dx_dtype = scale * alpha, scale.dtype if wide else None
    dx, dy, xgy = _gradients(x, y, left, right, factor, x_inv, y_inv, need_x, need_y, fill, dx_dtype)
    ds = alpha * (dot if in_tiles else xgy).to(scale.dtype)
    return dx, dy, ds if need_s else scale.new_empty(0)


def sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    negative_only: bool,
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx, dy, ds, db) as `blocked.sigmoid`. Memory as `grad`, the results in float32."""
    left, right = aligned_rows(x), aligned_rows(y)
    store = need_x or need_y
    settings = _settings("sigmoid", left, wide=not store)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    alpha = torch.full((), 1 / max(1, len(x)), dtype=scale.dtype, device=x.device)

    def fill(i: int, j: int, m: int, n: int, g: Tensor) -> None:
        rows, cols = slice(i, i + m), slice(j, j + n)
        programs = triton.cdiv(m, settings["BLOCK_M"]) * triton.cdiv(n, settings["BLOCK_N"])
        part = torch.empty(3, programs, dtype=scale.dtype, device=x.device)
        launch(
            _sigmoid_fwd_kernel,
            (programs,),
            x,
            g_ptr=g,
            sums_ptr=part,
            x_ptr=left[rows],
            y_ptr=right[cols],
            scale_ptr=scale,
            bias_ptr=bias,
            stride_g=g.stride(0),
            stride_x=left.stride(0),
            stride_y=right.stride(0),
            D=left.shape[1],
            M=m,
            N=n,
            diagonal=i + row_offset - j,
            PAIRED=not negative_only,
            STORE=store,
            G_SCALE=_g_scale(x.dtype),
            **settings,
        )
        sums.add_(part.sum(1, dtype=torch.float64))

    factor, acc = scale * alpha, scale.dtype
    dx, dy, xgy = _gradients(x, y, left, right, factor, x_inv, y_inv, need_x, need_y, fill, acc, acc)
    loss, db, ds = (sums * alpha).to(scale.dtype)
    # <x, G y> costs nothing beside the products; where there are none, the tiles have summed G U
    if store:
        ds = (alpha * xgy).to(scale.dtype)
    elif len(x) and len(y):
        ds = ds + not_finite(x, y).to(scale.dtype)
    return loss.clone(), dx, dy, ds.clone(), db.clone()


def _g_scale(dtype: torch.dtype) -> float:
    return FP16_SCALE if dtype == torch.float16 else 1.0


def _side(dim: int, device: torch.device) -> int:
    """Near `_SQUARE`, a whole number of waves: the products' tiles of 128 x 256 leave no multiprocessor idle."""
    if INTERPRET:
        return _SQUARE
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wave = 128 * triton.cdiv(processors, triton.cdiv(int(dim), 256))
    return round(_SQUARE / wave) * wave or _SQUARE


def _gradients(
    x: Tensor,
    y: Tensor,
    left: Tensor,
    right: Tensor,
    factor: Tensor,
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: bool,
    need_y: bool,
    fill: Callable[[int, int, int, int, Tensor], None],
    dx_dtype: torch.dtype | None = None,
    dy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, <x, G y>): `fill(i, j, m, n, g)` writes the m x n block of G whose first element is (i, j)."""
    (b, dim), n, acc = x.shape, len(y), accumulation_dtype(x.dtype)
    unscale = 1 / _g_scale(x.dtype)
    factor = factor * unscale
    most = _side(dim, x.device)
    # whole vectors in each row of G, for the kernel and for cuBLAS
    side = -(-min(n, most) // 16) * 16
    square = torch.empty((min(b, most), side) if need_x or need_y else (1, 1), dtype=x.dtype, device=x.device)
    gx = torch.empty((len(square), dim) if need_x else 0, dtype=acc, device=x.device)
    gy = torch.zeros((n, dim) if need_y else 0, dtype=acc, device=x.device)
    dx = torch.zeros(x.shape if need_x else 0, dtype=dx_dtype or x.dtype, device=x.device)
    xgy = torch.zeros((), dtype=torch.float64, device=x.device)
    for i in range(0, b, most):
        m = min(b - i, most)
        rows = slice(i, i + m)
        for j in range(0, n, most):
            k = min(n - j, most)
            g = square[:m, :k]
            fill(i, j, m, k, g)
            if need_x:
                _multiply(gx[:m], g, right[j : j + k, :dim], accumulate=j > 0)
            if need_y:
                _multiply(gy[j : j + k], g.t(), left[rows, :dim], accumulate=i > 0)
        if need_x and n:
            xgy += finish(gx[:m], x[rows], factor, None if x_inv is None else x_inv[rows], dx[rows])
    del square, gx
    dy = torch.empty(y.shape if need_y else 0, dtype=dy_dtype or y.dtype, device=x.device)
    if need_y:
        ygx = finish(gy, y, factor, y_inv, dy)
        xgy = xgy if need_x else ygx
    return dx, dy, xgy * unscale


def finish(g: Tensor, x: Tensor, factor: Tensor, inverse: Tensor | None, out: Tensor) -> Tensor:
    """As `blocked.finish`, in one pass over g and x."""
    dot = torch.empty(len(g), dtype=g.dtype, device=g.device)
    if g.numel():
        block = triton.next_power_of_2(max(int(g.shape[1]), 16))
        launch(
            _finish_kernel, (len(g),), g,
            out_ptr=out, dot_ptr=dot, g_ptr=g, x_ptr=x, factor_ptr=factor, inverse_ptr=inverse,
            stride_out=out.stride(0), stride_g=g.stride(0), stride_x=x.stride(0), stride_xd=x.stride(1), D=g.shape[1],
            ACC=accumulator(g.dtype), BLOCK_D=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    # float64: the rows' terms cancel in the sum, which is the gradient of the scale
    return dot.sum(dtype=torch.float64)


def _multiply(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    """out = left @ right or out += left @ right, accumulated in the dtype of `out`."""
    if not left.is_cuda:
        left, right = left.to(out.dtype), right.to(out.dtype)
    wide = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, left, right, out=out, **wide)
    else:
        torch.mm(left, right, out=out, **wide)


# --- ahead-of-time compilation --------------------------------------------------------------------------------------

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLAGS = ("KEYED", "GROUPED")
_TYPES = dict.fromkeys(("diagonal", "D", "T_D", "M", "N", "G"), "i32")
_STRIDES = ("stride_g", "stride_u", "stride_x", "stride_y", "t_stride_x", "t_stride_y", "stride_out")
_TYPES |= dict.fromkeys(_STRIDES, "i32")
_TYPES |= dict.fromkeys(("row_key_ptr", "col_key_ptr", "table_ptr"), "*i32") | {"shift": "fp32"}


def aot_specs() -> Iterator[Spec]:
    """Every kernel at every configuration that ships, for `mmfuse compile-report`."""
    for kernel in ("stats", "grad", "sigmoid"):
        for dtype, precision, tile, archs in shipped(kernel):
            yield from _specs(kernel, dtype, precision, tile, archs)
    for saved, dtype in (("int16", torch.bfloat16), ("full", torch.float32)):
        options = dict(_STREAM, PRECISION="ieee", EVEN_D=True, SAVED=saved, STORE=True, DOT=False, G_SCALE=1.0)
        for keyed, even in ((False, True), (True, True), (False, False)):
            more = {"KEYED": keyed, "GROUPED": False, "EVEN_N": even}
            name = saved + " keyed" * keyed + " odd N" * (not even)
            yield spec(_grad_kernel, name, dtype, options | more, (80, 90, 100))
    for normalized in (False, True):
        options = {"BLOCK_D": 1024, "num_warps": 4, "num_stages": 3} | ({} if normalized else {"inverse_ptr": None})
        one = spec(_finish_kernel, "normalized" * normalized, torch.bfloat16, options, (80, 90, 100))
        yield replace(one, signature=one.signature | {"g_ptr": "*fp32"})
    for cross in (False, True):
        options = dict(_MERGE, CROSS=cross, num_warps=4, num_stages=3)
        yield spec(_merge_kernel, "cross" * cross, torch.float32, options, (80, 90, 100))


def shipped(kernel: str) -> Iterator[tuple[torch.dtype, str, dict[str, int], tuple[int, ...]]]:
    """(dtype, precision, tile, compute capabilities) of a kernel's defaults and tuned tables."""
    for dtype, precision in _KINDS:
        by_arch = _tiles(dtype, precision)
        for major, tiles in by_arch.items():
            archs = tuple(arch for arch in (80, 90, 100) if (arch // 10 if arch // 10 in by_arch else 8) == major)
            yield dtype, precision, tiles[kernel], archs
    for (tuned, name, _), tile, arch in configs.shipped("contrastive"):
        name, _, precision = name.partition("-")
        if tuned == kernel:
            yield getattr(torch, name), precision or "ieee", tile, (arch,)


_MEASURED_BY = {"clip_loss": ("stats", "grad"), "siglip_loss": ("sigmoid",)}


def candidates(operator: str, dtype: torch.dtype, columns: int, arch: int) -> Iterator[tuple[str, list[Candidate]]]:
    """For each kernel that an operator's time shows: its key in a table, and tiles with the compilations to pass."""
    for kernel in _MEASURED_BY.get(operator, ()):
        precision = input_precision(dtype)
        by_arch = _tiles(dtype, precision)
        tile = by_arch[arch // 10 if arch // 10 in by_arch else 8][kernel]
        specs = [(other, list(_specs(kernel, dtype, precision, other, (arch,)))) for other in neighbours(tile)]
        yield configs.key(kernel, _named(dtype, precision), columns), specs


def _named(dtype: torch.dtype, precision: str) -> str:
    """What a table calls operands: bfloat16, or float32-tf32."""
    return str(dtype).removeprefix("torch.") + (f"-{precision}" if dtype == torch.float32 else "")


_KINDS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


def _specs(
    kernel: str, dtype: torch.dtype, precision: str, tile: dict[str, int], archs: tuple[int, ...]
) -> Iterator[Spec]:
    """The variants of one kernel that a call can reach, at one tile."""
    g = {"G_SCALE": _g_scale(dtype), "STORE": True}
    if kernel == "stats":
        plain = [("", tile, {"SAVE": ""}), ("int16", tile, {"SAVE": "int16", "EVEN_N": True})]
        # masks of D cost no register
        odd = [("odd D", tile, {"SAVE": "", "EVEN_D": False})] if dtype == torch.bfloat16 else []
        wide = tile | (_WIDE if dtype.itemsize == 2 or precision == "tf32" else {})
        odd += [("int16 odd N", wide, {"SAVE": "int16"})] if dtype == torch.bfloat16 else []
        variants = [*plain, *odd]
        full = [] if dtype.itemsize == 2 else [("full", wide, {"SAVE": "full", "EVEN_N": True})]
        variants += full
        # the widest logits only: they come on top of what else a tile keeps
        keyed = [(name, wide, more) for name, _, more in [*plain, *full][-1:]]
    elif kernel == "grad":
        g |= {"SAVED": "", "DOT": False}
        variants = keyed = [("", tile, g), ("dot", tile | _WIDE, g | {"STORE": False, "DOT": True})]
    else:
        g |= {"PAIRED": True}
        variants, keyed = [("", tile, g), ("loss", tile | _WIDE, g | {"STORE": False})], []
    # not every option is combined with every other
    variants = [*variants, *((f"keyed {name}".strip(), size, more | {"KEYED": True}) for name, size, more in keyed)]
    function = {"stats": _stats_fwd_kernel, "grad": _grad_kernel, "sigmoid": _sigmoid_fwd_kernel}[kernel]
    for variant, size, more in distinct(variants, dtype, precision):
        flags = {"PRECISION": precision, "EVEN_D": True, "EVEN_N": False, "KEYED": False, "GROUPED": False}
        flags |= {"MAXIMA": "keyed" in variant}
        yield spec(function, variant, dtype, flags | size | more, archs)


def distinct(variants: list[Any], dtype: torch.dtype, precision: str) -> list[Any]:
    """The variants that are worth a compilation. The first one given is plain, the last one has the most options."""
    # float16 takes bfloat16's registers and shared memory, to the last one
    if dtype == torch.float16:
        return variants[:1]
    # without tensor cores the tiles are small, and no variant comes near a spill
    if dtype == torch.float32 and precision == "ieee":
        return [variants[0], variants[-1]]
    return variants


def spec(kernel: Any, variant: str, dtype: torch.dtype, options: dict[str, Any], archs: tuple[int, ...]) -> Spec:
    """A compilation for operands of `dtype`; `options` are constants and launch options."""
    constants = {"ACC": tl.float32} | {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    constants |= {"stride_xd": 1} if "stride_xd" in kernel.arg_names else {}
    saved = constants.get("SAVE") or constants.get("SAVED")
    operand = "*" + _SHORT[dtype]
    types = _TYPES | dict.fromkeys(("x_ptr", "y_ptr", "t_x_ptr", "t_y_ptr", "g_ptr", "out_ptr"), operand)
    types["logits_ptr"] = "*i16" if saved == "int16" else "*fp32"
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
    product = None if saved and "SAVED" in constants or "PRECISION" not in constants else constants["PRECISION"]
    precision = f"-{constants['PRECISION']}" if dtype == torch.float32 and "PRECISION" in constants else ""
    return Spec(
        kernel=f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        variant=" ".join(v for v in (_SHORT[dtype] + precision, variant) if v),
        signature=signature,
        constants=constants,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        aligned=tuple(
            n for n in signature if n in ("D", "T_D") or "stride_" in n and (n != "stride_u" or constants["EVEN_N"])
        ),
        archs=archs,
        dot="half" if product and dtype.itemsize == 2 else "tf32" if product == "tf32" else None,
        work=_work(signature, constants),
        bounds=_BOUNDS.get((kernel.fn.__name__, variant), {}) if dtype.itemsize == 2 else {},
    )


# instructions of a thread for each logit of CLIP's loss, products aside
_BOUNDS = {("_stats_fwd_kernel", ""): {"outside": 20.0}, ("_grad_kernel", ""): {"outside": 10.0}}


def _work(signature: dict[str, str], constants: dict[str, Any], n: int = 32768, d: int = 768) -> Work | None:
    """A batch of 32768 pairs."""
    if "BLOCK_M" not in constants:
        return None
    size = {"*bf16": 2, "*fp16": 2, "*i16": 2, "*fp32": 4}
    moved = size[signature["logits_ptr"]] if constants.get("SAVE") or constants.get("SAVED") else 0
    moved += size[signature["g_ptr"]] if constants.get("STORE") else 0
    products = 0 if constants.get("SAVED") else 2 if "t_x_ptr" in signature else 1
    return Work.of_product("logit", n, n, d, constants, size[signature["x_ptr"]], moved, products, products)
