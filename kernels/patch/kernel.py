"""Patch embedding in Triton: rows of patches, then one product whose epilogue writes the tokens.

    fold      V = 2^q W s in the operand's dtype, one q for each row; c = bias - sum_k V d / 2^q
    rows      A = x - i, or (x - mean) / std of float pixels; kept patches only
    lines     the same of bytes, every patch: whole lines of an image, whose patches are no multiple of 16 bytes (/14)
              none where 16 aligned bytes lie in a row of a patch: tokens then reads A = x - 128 from the pixels
    tokens    A VT / 2^q + c, then mask token, position, prefix rows, type, in float32; one rounding
    norm      the two LayerNorms need whole rows: a third kernel, over a product in float32
    weight    parts of G = dyT A, split over rows, added up in a fixed order
    sums      of the rows of all images, position by position

A mask sorts its patches to the end on the device: tiles past the number of kept ones do no product. No atomics, no
wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime import configs
from mmfuse.kernels._runtime.aot import Candidate, Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, input_precision, neighbours, sqrt
from mmfuse.kernels.patch import blocked
from mmfuse.kernels.patch.arguments import check_ids
from mmfuse.kernels.patch.geometry import Geometry
from mmfuse.kernels.patch.stem import DIFFERENTIABLE, Folded, Stem, entering

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _fold_kernel(
    v_ptr,  # out [D, KP]
    unscale_ptr,  # out [D], or None
    c_ptr,  # out [D], or None
    w_ptr,  # [D, C, SLICES, VOLUME]
    bias_ptr,  # [D], or None
    scale_ptr,  # [C], or None
    rest_ptr,  # [C], or None
    C,
    K,
    KP,
    SLICES: tl.constexpr,
    VOLUME: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    w_ptr += n.to(tl.int64) * (K * SLICES)
    v_ptr += n.to(tl.int64) * KP
    up = tl.full((), 1.0, ACC)
    if unscale_ptr is not None:
        largest = tl.zeros((BLOCK,), ACC)
        for k0 in range(0, K, BLOCK):
            w, _, _ = _scaled(w_ptr, scale_ptr, k0, C, K, SLICES, VOLUME, CHANNELS_LAST, ACC, BLOCK)
            largest = tl.maximum(largest, tl.abs(w))
        # the largest of a row into [2^13, 2^14): float16 neither overflows nor loses what matters
        exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 255
        q = tl.minimum(tl.maximum(140 - exponent, -126), 126)
        up = ((q + 127) << 23).to(tl.float32, bitcast=True)
        tl.store(unscale_ptr + n, ((127 - q) << 23).to(tl.float32, bitcast=True))
    shift = tl.zeros((BLOCK,), ACC)
    for k0 in range(0, KP, BLOCK):
        w, channel, k = _scaled(w_ptr, scale_ptr, k0, C, K, SLICES, VOLUME, CHANNELS_LAST, ACC, BLOCK)
        v = (w * up).to(v_ptr.dtype.element_ty)
        tl.store(v_ptr + k, v, mask=k < KP)
        if rest_ptr is not None:
            # of the rounded weight: the image's mean does not multiply its rounding error
            shift += v.to(ACC) * tl.load(rest_ptr + channel, mask=k < K, other=0.0).to(ACC)
    if c_ptr is not None:
        c = -tl.sum(shift, axis=0) / up
        if bias_ptr is not None:
            c += tl.load(bias_ptr + n).to(ACC)
        tl.store(c_ptr + n, c)


@triton.jit
def _scaled(
    w_ptr, scale_ptr, k0, C, K, SLICES: tl.constexpr, VOLUME: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(W s summed over slices, channels, k) of BLOCK columns in the order of A, 0 past K."""
    k = k0 + tl.arange(0, BLOCK)
    channel = k % C if CHANNELS_LAST else k // VOLUME
    volume = k // C if CHANNELS_LAST else k % VOLUME
    w = tl.zeros((BLOCK,), ACC)
    for t in tl.static_range(SLICES):
        w += tl.load(w_ptr + (channel * SLICES + t) * VOLUME + volume, mask=k < K, other=0.0).to(ACC)
    if scale_ptr is not None:
        w *= tl.load(scale_ptr + channel, mask=k < K, other=0.0).to(ACC)
    return w, channel, k


@triton.jit
def _token(row, order_ptr):
    """The number of the patch in a row of A, counted over the computed patches of all images."""
    if order_ptr is not None:
        row = tl.load(order_ptr + row).to(tl.int32)
    return row


@triton.jit
def _patch(
    token, N, ids_ptr, STEP_T: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, GRID_Y: tl.constexpr,
    GRID_X: tl.constexpr,
):  # fmt: skip
    """(image, t, y, x) where the patch of a token begins."""
    patch = token % N
    if ids_ptr is not None:
        patch = tl.load(ids_ptr + token).to(tl.int32)
    t = patch // (GRID_Y * GRID_X) * STEP_T
    y = patch // GRID_X % GRID_Y * STEP_Y
    return token // N, t, y, patch % GRID_X * STEP_X


@triton.jit
def _column(k, C, KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(c, t, y, x) of a column of A within its patch."""
    c = k % C if CHANNELS_LAST else k // (KT * KY * KX)
    v = k // C if CHANNELS_LAST else k % (KT * KY * KX)
    return c, v // (KY * KX), v // KX % KY, v % KX


@triton.jit
def _offset(t, y, x, stride_t, stride_y, stride_x):
    return t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_y + x * stride_x


@triton.jit(do_not_specialize=["M", "N"])
def _rows_kernel(
    a_ptr,  # out [M, KP]
    x_ptr,  # [B, C, T, H, W] by its strides
    order_ptr,  # [M], or None
    count_ptr,  # [] with order: rows from there on are masked
    ids_ptr,  # [M] patch numbers, or None
    subtract_ptr,  # [C], or None
    multiply_ptr,  # [C], or None
    stride_b,
    stride_c,
    stride_t,
    stride_y,
    stride_x,
    M,
    N,
    C,
    T,
    H,
    W,
    KP,
    STEP_T: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    GRID_Y: tl.constexpr,
    GRID_X: tl.constexpr,
    KT: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row0 = tl.program_id(0) * BLOCK_M
    end = M
    if count_ptr is not None:
        # blocks of masked patches only are neither read nor written
        end = tl.minimum(M, tl.cdiv(tl.load(count_ptr).to(tl.int32), BLOCK_M) * BLOCK_M)
    row = row0 + tl.arange(0, BLOCK_M)
    token = _token(tl.minimum(row, M - 1), order_ptr)
    image, t, y, x = _patch(token, N, ids_ptr, STEP_T, STEP_Y, STEP_X, GRID_Y, GRID_X)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c, kt, ky, kx = _column(k, C, KT, KY, KX, CHANNELS_LAST)
    at = image.to(tl.int64) * stride_b + _offset(t, y, x, stride_t, stride_y, stride_x)
    within = c.to(tl.int64) * stride_c + _offset(kt, ky, kx, stride_t, stride_y, stride_x)
    valid = k < C * (KT * KY * KX)
    inside = (row < end)[:, None] & valid[None, :]
    if PADDED:
        inside = inside & (t[:, None] + kt[None, :] < T)
        inside = inside & (y[:, None] + ky[None, :] < H) & (x[:, None] + kx[None, :] < W)
    a = tl.load(x_ptr + at[:, None] + within[None, :], mask=inside, other=0).to(ACC)
    if subtract_ptr is not None:
        a -= tl.load(subtract_ptr + c, mask=valid, other=0.0).to(ACC)[None, :]
    if multiply_ptr is not None:
        a *= tl.load(multiply_ptr + c, mask=valid, other=0.0).to(ACC)[None, :]
    a = tl.where(inside, a, 0.0)
    to = a_ptr + row.to(tl.int64)[:, None] * KP + k[None, :]
    tl.store(to, a.to(a_ptr.dtype.element_ty), mask=(row < end)[:, None] & (k < KP)[None, :])


@triton.jit(do_not_specialize=["LINES"])
def _lines_kernel(
    a_ptr,  # out [B GRID_Y GRID_X, KP]
    x_ptr,  # [B, C, H, W] bytes by their strides, those of a line side by side
    subtract_ptr,  # [C], or None
    stride_b,
    stride_c,
    stride_y,
    LINES,  # B C GRID_Y KY
    C,
    KP,
    GRID_Y: tl.constexpr,
    GRID_X: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,  # even
    ACC: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_X: tl.constexpr,  # at least GRID_X KX
):
    line, x = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_X)
    ky, gy = line % KY, line // KY % GRID_Y
    c, b = line // (KY * GRID_Y) % C, line // (KY * GRID_Y * C)
    here = line < LINES
    at = b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c + (gy * KY + ky).to(tl.int64) * stride_y
    inside = here[:, None] & (x < GRID_X * KX)[None, :]
    a = tl.load(x_ptr + at[:, None] + x[None, :], mask=inside, other=0).to(ACC)
    if subtract_ptr is not None:
        a -= tl.load(subtract_ptr + c, mask=here, other=0.0).to(ACC)[:, None]
    # by pairs, which lie in one patch: what is side by side there, too
    pair = tl.arange(0, BLOCK_X // 2)
    patch, kx = pair // (KX // 2), pair % (KX // 2) * 2
    to = (b * GRID_Y + gy).to(tl.int64) * (GRID_X * KP) + (c * KY + ky) * KX
    to = to[:, None, None] + (patch * KP + kx)[None, :, None] + tl.arange(0, 2)[None, None, :]
    pairs = tl.reshape(a, (BLOCK_L, BLOCK_X // 2, 2)).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + to, pairs, mask=here[:, None, None] & (patch < GRID_X)[None, :, None])


@triton.jit(do_not_specialize=["M", "N", "R", "B"])
def _tokens_kernel(
    out_ptr,  # out [B, R + N, D] by its strides
    a_ptr,  # [M, KP], or None: from the pixels
    x_ptr,  # [B, C, T, H, W] bytes by their strides
    v_ptr,  # [D, KP]
    unscale_ptr,  # [D], or None
    c_ptr,  # [D], or None
    position_ptr,  # [patches, D], or None
    type_ptr,  # [D], or None
    mask_token_ptr,  # [D], or None
    prefix_ptr,  # [R, D], or None
    prefix_position_ptr,  # [R, D], or None
    order_ptr,  # as for the rows
    count_ptr,
    ids_ptr,
    stride_image,
    stride_row,
    stride_b,
    stride_c,
    stride_t,
    stride_y,
    stride_x,
    M,
    N,
    R,
    B,
    D,
    KP,
    STEP_T: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    GRID_Y: tl.constexpr,
    GRID_X: tl.constexpr,
    KT: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles, front, across = tl.cdiv(M, BLOCK_M), tl.cdiv(B * R, BLOCK_M), tl.cdiv(D, BLOCK_N)
    # programs in flight share rows of A and of V in L2: down GROUP_M tiles, then the next column
    first = tl.program_id(0) // (GROUP_M * across) * GROUP_M
    height = tl.minimum(tiles + front - first, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * across)
    tile = first + within % height
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < D
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if tile < tiles:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        here = row < M
        token = _token(tl.minimum(row, M - 1), order_ptr)
        image, slot = token // N, token % N
        end = KP
        if count_ptr is not None:
            # a tile of masked patches only
            end = tl.where(tile * BLOCK_M < tl.load(count_ptr), KP, 0)
        k = tl.arange(0, BLOCK_K)
        if a_ptr is not None:
            a_ptr += (tile * BLOCK_M).to(tl.int64) * KP
            at_a = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - tile * BLOCK_M)[:, None] * KP + k[None, :]
        else:
            _, t, y0, x0 = _patch(token, N, ids_ptr, STEP_T, STEP_Y, STEP_X, GRID_Y, GRID_X)
            at_x = image.to(tl.int64) * stride_b + _offset(t, y0, x0, stride_t, stride_y, stride_x)
        at_v = tl.minimum(column, D - 1)[None, :] * KP + k[:, None]
        for k0 in range(0, end, BLOCK_K):
            if a_ptr is None:
                c, kt, ky, kx = _column(k0 + k, 1, KT, KY, KX, False)
                at_k = c.to(tl.int64) * stride_c + _offset(kt, ky, kx, stride_t, stride_y, stride_x)
                a = tl.load(x_ptr + at_x[:, None] + at_k[None, :]).to(v_ptr.dtype.element_ty) - 128.0
                v = tl.load(v_ptr + at_v)
            elif EVEN_K:
                a, v = tl.load(a_ptr + at_a), tl.load(v_ptr + at_v)
            else:
                a = tl.load(a_ptr + at_a, mask=k[None, :] < KP - k0, other=0.0)
                v = tl.load(v_ptr + at_v, mask=k[:, None] < KP - k0, other=0.0)
            y = tl.dot(a, v, y, input_precision=PRECISION, out_dtype=ACC)
            if a_ptr is not None:
                a_ptr += BLOCK_K
            v_ptr += BLOCK_K
        if unscale_ptr is not None:
            y *= tl.load(unscale_ptr + column, mask=real, other=0.0)[None, :]
        if c_ptr is not None:
            y += tl.load(c_ptr + column, mask=real, other=0.0)[None, :]
        if mask_token_ptr is not None:
            mask_token = tl.load(mask_token_ptr + column, mask=real, other=0.0).to(ACC)
            y = tl.where((row < tl.load(count_ptr))[:, None], y, mask_token[None, :])
        if position_ptr is not None:
            patch = slot
            if ids_ptr is not None:
                patch = tl.load(ids_ptr + token).to(tl.int32)
            at = position_ptr + patch.to(tl.int64)[:, None] * D + column[None, :]
            y += tl.load(at, mask=here[:, None] & real[None, :], other=0.0).to(ACC)
        slot += R
    else:
        row = (tile - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        here = row < B * R
        image, slot = row // tl.maximum(R, 1), row % tl.maximum(R, 1)
        inside = here[:, None] & real[None, :]
        if prefix_ptr is not None:
            y += tl.load(prefix_ptr + slot[:, None] * D + column[None, :], mask=inside, other=0.0).to(ACC)
        if prefix_position_ptr is not None:
            y += tl.load(prefix_position_ptr + slot[:, None] * D + column[None, :], mask=inside, other=0.0).to(ACC)
    if type_ptr is not None:
        y += tl.load(type_ptr + column, mask=real, other=0.0).to(ACC)[None, :]
    to = out_ptr + (image.to(tl.int64) * stride_image + slot.to(tl.int64) * stride_row)[:, None] + column[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=here[:, None] & real[None, :])


@triton.jit
def _layer_norm(x, weight_ptr, bias_ptr, eps, D, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    c = tl.arange(0, BLOCK_D)
    x = tl.where(c < D, x, 0.0)
    centred = tl.where(c < D, x - tl.sum(x, axis=0) / D, 0.0)
    x = divide(centred, sqrt(tl.sum(centred * centred, axis=0) / D + eps))
    x *= tl.load(weight_ptr + c, mask=c < D, other=0.0).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=c < D, other=0.0).to(ACC)
    return x


@triton.jit(do_not_specialize=["N", "R"])
def _norm_kernel(
    out_ptr,  # out [B, R + N, D] by its strides
    y_ptr,  # [B, N, D], the product with its bias
    stem_weight_ptr,  # [D], or None
    stem_bias_ptr,
    pre_weight_ptr,  # [D], or None
    pre_bias_ptr,
    position_ptr,  # [patches, D], or None
    type_ptr,  # [D], or None
    mask_ptr,  # [B, N], or None
    mask_token_ptr,  # [D]
    prefix_ptr,  # [R, D]
    prefix_position_ptr,  # [R, D], or None
    ids_ptr,  # [B N], or None
    stride_image,
    stride_row,
    N,
    R,
    D,
    stem_eps,
    pre_eps,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, slot = (tl.program_id(0) // (R + N)).to(tl.int64), tl.program_id(0) % (R + N)
    c = tl.arange(0, BLOCK_D)
    if slot < R:
        y = tl.load(prefix_ptr + slot * D + c, mask=c < D, other=0.0).to(ACC)
        if prefix_position_ptr is not None:
            y += tl.load(prefix_position_ptr + slot * D + c, mask=c < D, other=0.0).to(ACC)
    else:
        token = image * N + slot - R
        y = tl.load(y_ptr + token * D + c, mask=c < D, other=0.0)
        if stem_weight_ptr is not None:
            y = _layer_norm(y, stem_weight_ptr, stem_bias_ptr, stem_eps, D, ACC, BLOCK_D)
        if mask_ptr is not None:
            mask_token = tl.load(mask_token_ptr + c, mask=c < D, other=0.0).to(ACC)
            y = tl.where(tl.load(mask_ptr + token) != 0, mask_token, y)
        if position_ptr is not None:
            patch = (slot - R).to(tl.int64)
            if ids_ptr is not None:
                patch = tl.load(ids_ptr + token)
            y += tl.load(position_ptr + patch * D + c, mask=c < D, other=0.0).to(ACC)
    if type_ptr is not None:
        y += tl.load(type_ptr + c, mask=c < D, other=0.0).to(ACC)
    if pre_weight_ptr is not None:
        y = _layer_norm(y, pre_weight_ptr, pre_bias_ptr, pre_eps, D, ACC, BLOCK_D)
    tl.store(out_ptr + image * stride_image + slot * stride_row + c, y.to(out_ptr.dtype.element_ty), mask=c < D)


@triton.jit(do_not_specialize=["M", "N", "R", "part"])
def _weight_kernel(
    parts_ptr,  # out [parts, D, KP]
    g_ptr,  # [B, R + N, D] by its strides
    a_ptr,  # [M, KP]
    order_ptr,  # as for the rows
    count_ptr,
    stride_image,
    stride_row,
    M,
    N,
    R,
    part,  # rows of one
    D,
    KP,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(KP, BLOCK_K)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, M)
    if count_ptr is not None:
        end = tl.minimum(end, tl.load(count_ptr).to(tl.int32))
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for row0 in range(begin, end, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        token = _token(tl.minimum(row, M - 1), order_ptr)
        at = (token // N).to(tl.int64) * stride_image + (token % N + R).to(tl.int64) * stride_row
        dy = tl.load(g_ptr + at[:, None] + n[None, :], mask=(row < end)[:, None] & (n < D)[None, :], other=0.0)
        at_a = row.to(tl.int64)[:, None] * KP + k[None, :]
        a = tl.load(a_ptr + at_a, mask=(row < end)[:, None] & (k < KP)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), a, total, input_precision=PRECISION, out_dtype=ACC)
    to = parts_ptr + (tl.program_id(1).to(tl.int64) * D + n)[:, None] * KP + k[None, :]
    tl.store(to, total, mask=(n < D)[:, None] & (k < KP)[None, :])


@triton.jit(do_not_specialize=["B", "N", "R"])
def _sums_kernel(
    kept_ptr,  # out [R + N, D], over the images where the patch is not masked
    masked_ptr,  # out [R + N, D], over the others
    g_ptr,  # [B, R + N, D] by its strides
    mask_ptr,  # [B, N], or None
    stride_image,
    stride_row,
    B,
    N,
    R,
    D,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    kept = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    masked = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        at = b.to(tl.int64) * stride_image + slot.to(tl.int64) * stride_row
        g = tl.load(g_ptr + at[:, None] + c[None, :], mask=(b < B)[:, None] & (c < D)[None, :], other=0.0).to(ACC)
        if mask_ptr is not None:  # noqa: SIM102  known when compiled, the other when run
            if slot >= R:
                mask = tl.load(mask_ptr + b.to(tl.int64) * N + slot - R, mask=b < B, other=0)
                masked += tl.where((mask != 0)[:, None], g, 0.0)
                g = tl.where((mask != 0)[:, None], 0.0, g)
        kept += g
    to = slot.to(tl.int64) * D + c
    tl.store(kept_ptr + to, tl.sum(kept, axis=0), mask=c < D)
    if mask_ptr is not None:
        tl.store(masked_ptr + to, tl.sum(masked, axis=0), mask=c < D)


# --- launches -------------------------------------------------------------------------------------------------------

# A, or the float32 product before a norm: this much at a time
_WORKSPACE = 256 << 20
# chosen to compile without spills, not measured
_TILES: dict[str, dict[str, dict[str, int]]] = {
    "half": {
        "tokens": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        "weight": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    },
    "tf32": {
        "tokens": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        "weight": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    # pixels as they are
    "bytes": {"tokens": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}},
    # no tensor cores
    "ieee": {
        "tokens": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
        "weight": {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    },
}
_ROWS = {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4}
_SUMS = {"BLOCK_B": 8, "BLOCK_D": 128, "num_warps": 4}
_FOLD = {"BLOCK": 1024, "num_warps": 4}
_GROUP_M = 8
# the product dyT A is split over rows until there are about this many programs, a few for each multiprocessor
_PROGRAMS = 528
_PART = 512  # and no part has fewer rows


def _kind(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else input_precision(dtype)


def operand_of(stem: Stem) -> torch.dtype:
    """What is multiplied. Bytes are exact in float16, of which the mantissa is longer; other pixels may overflow it."""
    if stem.compute.itemsize == 2:
        return torch.float16 if stem.pixels.dtype == torch.uint8 else stem.compute
    return stem.compute


def folded(stem: Stem, f: Folded, operand: torch.dtype) -> Folded:
    """As `stem.fold`, in one kernel, V padded to a multiple of 16 columns."""
    (d, c), acc = (stem.weight.shape[0], f.x.shape[1]), stem.acc
    volume = prod(f.g.kernel)
    k = c * volume
    new = partial(torch.empty, device=f.x.device)
    v = new(d, -(-k // 16) * 16, dtype=operand)
    unscale = new(d, dtype=acc) if operand == torch.float16 else None
    bias = None if stem.bias is None and f.rest is None else new(d, dtype=acc)
    slices = stem.weight.shape[2] if f.still else 1
    launch(
        _fold_kernel,
        (d,),
        v,
        v_ptr=v,
        unscale_ptr=unscale,
        c_ptr=bias,
        w_ptr=stem.weight.contiguous(),
        bias_ptr=stem.bias,
        scale_ptr=f.scale,
        rest_ptr=f.rest,
        C=c,
        K=k,
        KP=v.shape[1],
        SLICES=slices,
        VOLUME=volume,
        CHANNELS_LAST=f.channels_last,
        ACC=accumulator(acc),
        **_FOLD,
    )
    return replace(f, weight=v, unscale=unscale, bias=bias)


@dataclass
class Rows:
    """Which patches the rows of A are: all of `images`, those of `ids`, or in `order`, masked from `count` on."""

    images: int
    n: int  # of an image
    ids: Tensor | None = None
    order: Tensor | None = None
    count: Tensor | None = None
    mask: Tensor | None = None  # [images, n], of bytes

    @property
    def m(self) -> int:
        return self.images * self.n if self.order is None else len(self.order)


def rows_of(stem: Stem, i: int, j: int) -> Rows:
    """Of images i to j."""
    rows = Rows(j - i, stem.shape[2])
    if stem.ids_keep is not None:
        rows.ids = stem.ids_keep[i:j].contiguous()
    if stem.mask is not None:
        mask = stem.mask[i:j]
        mask = mask if rows.ids is None else mask.gather(1, rows.ids)
        rows.mask = mask.contiguous().view(torch.uint8)
        rows.order = rows.mask.flatten().argsort(stable=True)
        rows.count = rows.mask.numel() - rows.mask.sum()
    return rows


def _source(x: Tensor, g: Geometry) -> dict[str, int]:
    """Where patches lie in the pixels x [m, C, T, H, W]."""
    (kt, ky, kx), (st, sy, sx), (_, gy, gx) = g.kernel, g.stride, g.grid
    sizes = {"STEP_T": st, "STEP_Y": sy, "STEP_X": sx, "GRID_Y": gy, "GRID_X": gx, "KT": kt, "KY": ky, "KX": kx}
    return sizes | dict(zip(("stride_b", "stride_c", "stride_t", "stride_y", "stride_x"), x.stride(), strict=True))


def triton_rows(a: Tensor, x: Tensor, f: Folded, rows: Rows) -> None:
    """A [M, KP] of the images x [m, C, T, H, W]."""
    if _by_lines(x, f, rows):
        _lines(a, x, f)
        return
    grid = triton.cdiv(rows.m, _ROWS["BLOCK_M"]), triton.cdiv(a.shape[1], _ROWS["BLOCK_K"])
    launch(
        _rows_kernel,
        grid,
        a,
        a_ptr=a,
        x_ptr=x,
        order_ptr=rows.order,
        count_ptr=rows.count,
        ids_ptr=rows.ids,
        subtract_ptr=f.subtract,
        multiply_ptr=f.multiply,
        M=rows.m,
        N=rows.n,
        **dict(zip(("C", "T", "H", "W"), x.shape[1:], strict=True)),
        KP=a.shape[1],
        **_source(x, f.g),
        CHANNELS_LAST=f.channels_last,
        PADDED=f.g.padded != tuple(x.shape[2:]),
        ACC=accumulator(a.dtype),
        **_ROWS,
    )


def _by_lines(x: Tensor, f: Folded, rows: Rows) -> bool:
    """Whether whole lines of bytes become rows of patches, two bytes of a patch at a time."""
    (kt, ky, kx), steps = f.g.kernel, f.g.stride
    every = rows.order is None and rows.ids is None and f.g.padded == tuple(x.shape[2:])
    tiled = kt == x.shape[2] == 1 and tuple(steps[1:]) == (ky, kx) and kx % 2 == 0
    plain = x.dtype == torch.uint8 and x.stride(4) == 1 and f.multiply is None and not f.channels_last
    return every and tiled and plain


def _lines(a: Tensor, x: Tensor, f: Folded) -> None:
    (_, ky, kx), (_, gy, gx) = f.g.kernel, f.g.grid
    lines, sizes = len(x) * x.shape[1] * gy * ky, _line_blocks(gx * kx)
    a[:, x.shape[1] * ky * kx :].zero_()
    launch(
        _lines_kernel,
        (triton.cdiv(lines, sizes["BLOCK_L"]),),
        a,
        a_ptr=a,
        x_ptr=x,
        subtract_ptr=f.subtract,
        stride_b=x.stride(0),
        stride_c=x.stride(1),
        stride_y=x.stride(3),
        LINES=lines,
        C=x.shape[1],
        KP=a.shape[1],
        GRID_Y=gy,
        GRID_X=gx,
        KY=ky,
        KX=kx,
        ACC=accumulator(a.dtype),
        **sizes,
    )


def _line_blocks(width: int) -> dict[str, int]:
    """32 bytes for each thread."""
    x = triton.next_power_of_2(width)
    return {"BLOCK_L": max(1, 4096 // x), "BLOCK_X": x, "num_warps": 4}


def cuda_rows(a: Tensor, x: Tensor, f: Folded, rows: Rows) -> None:
    """The same by the compiled part, for bytes."""
    if x.dtype != torch.uint8 or a.shape[1] % 16:
        triton_rows(a, x, f, rows)
        return
    none, index = a.new_empty(0, dtype=torch.float32), a.new_empty(0, dtype=torch.int64)
    torch.ops.mmfuse_cuda.patch_rows(
        x,
        *(index if t is None else t for t in (rows.order, rows.count, rows.ids)),
        none if f.subtract is None else f.subtract,
        f.channels_last,
        *f.g.kernel,
        *f.g.stride,
        *f.g.grid,
        rows.n,
        a,
    )


def direct(stem: Stem, f: Folded) -> bool:
    """Whether the product reads the pixels itself: bytes of which 16 aligned neighbours are in one row of a patch."""
    aligned = (*f.x.stride()[:4], f.x.storage_offset(), f.g.kernel[2], f.g.stride[2])
    return (
        stem.pixels.dtype == torch.uint8
        and stem.compute.itemsize == 2
        and f.x.stride(4) == 1
        and not any(n % 16 for n in aligned)
        and f.x.shape[1] * prod(f.g.kernel) % _TILES["bytes"]["tokens"]["BLOCK_K"] == 0
        and f.g.padded == tuple(f.x.shape[2:])
    )


def centred(f: Folded) -> Folded:
    """A = x - 128 of every channel, the rest of the mean in the bias."""
    mean = 0 if f.subtract is None or f.rest is None else f.subtract + f.rest
    rest = torch.full((f.x.shape[1],), -128.0, dtype=torch.float32, device=f.x.device)
    return replace(f, subtract=None, rest=rest + mean)


Gather = Callable[[Tensor, Tensor, Folded, Rows], None]


def _spans(stem: Stem, row_bytes: int) -> Iterator[tuple[int, int]]:
    b, _, n = stem.shape
    step = max(1, _WORKSPACE // max(1, n * row_bytes))
    for i in range(0, b, step):
        yield i, min(b, i + step)


def forward_into(gather: Gather, out: Tensor, offset: int, stem: Stem) -> None:
    """Write the tokens into out[:, offset : offset + R + N]."""
    b, r, n = stem.shape
    if stem.ids_keep is not None:
        check_ids(stem.ids_keep, stem.geometry.patches)
    if b * (r + n) == 0:
        return
    out = out[:, offset : offset + r + n]
    operand = operand_of(stem)
    f = entering(stem)
    from_pixels = direct(stem, f)
    source = _source(f.x, f.g)
    if from_pixels:
        f = centred(f)
    else:
        # not compiled again for other images
        source = dict.fromkeys(source, 1)
    f = folded(stem, f, operand)
    d, kp = f.weight.shape
    normed = stem.stem_weight is not None or stem.pre_weight is not None
    kind = "bytes" if from_pixels else _kind(operand)
    tile = configs.tuned("patch", out.device, "tokens", kind) or _TILES[kind]["tokens"]
    acc = accumulator(operand)
    token = None if stem.mask is None else stem.mask_token
    kept = [
        None if t is None else t.contiguous()
        for t in (stem.position, stem.type_embed, token, stem.prefix, stem.prefix_position)
    ]
    position, type_embed, mask_token, prefix, prefix_position = kept
    for i, j in _spans(stem, max(kp * operand.itemsize * (not from_pixels), d * stem.acc.itemsize * normed)):
        rows, to, a = rows_of(stem, i, j), out[i:j], None
        if not from_pixels:
            a = torch.empty(rows.m, kp, dtype=operand, device=out.device)
            if rows.m:
                gather(a, f.x[i:j], f, rows)
        y = torch.empty(rows.images, n, d, dtype=stem.acc, device=out.device) if normed else to
        front = 0 if normed else r
        programs = triton.cdiv(rows.m, tile["BLOCK_M"]) + triton.cdiv(rows.images * front, tile["BLOCK_M"])
        added = (None,) * 5 if normed else kept
        if programs:
            launch(
                _tokens_kernel,
                (programs * triton.cdiv(d, tile["BLOCK_N"]),),
                out,
                out_ptr=y,
                a_ptr=a,
                x_ptr=f.x[i:j] if from_pixels else None,
                v_ptr=f.weight,
                unscale_ptr=f.unscale,
                c_ptr=f.bias,
                **dict(
                    zip(
                        ("position_ptr", "type_ptr", "mask_token_ptr", "prefix_ptr", "prefix_position_ptr"),
                        added,
                        strict=True,
                    )
                ),
                order_ptr=rows.order,
                count_ptr=rows.count,
                ids_ptr=rows.ids,
                stride_image=y.stride(0),
                stride_row=y.stride(1),
                M=rows.m,
                N=n,
                R=front,
                B=rows.images,
                D=d,
                KP=kp,
                **source,
                ACC=acc,
                PRECISION=input_precision(operand),
                EVEN_K=kp % tile["BLOCK_K"] == 0,
                GROUP_M=_GROUP_M,
                **tile,
            )
        if normed:
            launch(
                _norm_kernel,
                (rows.images * (r + n),),
                out,
                out_ptr=to,
                y_ptr=y,
                stem_weight_ptr=stem.stem_weight,
                stem_bias_ptr=stem.stem_bias,
                pre_weight_ptr=stem.pre_weight,
                pre_bias_ptr=stem.pre_bias,
                position_ptr=position,
                type_ptr=type_embed,
                mask_ptr=rows.mask,
                mask_token_ptr=mask_token,
                prefix_ptr=prefix,
                prefix_position_ptr=prefix_position,
                ids_ptr=rows.ids,
                stride_image=to.stride(0),
                stride_row=to.stride(1),
                N=n,
                R=r,
                D=d,
                stem_eps=stem.stem_eps,
                pre_eps=stem.pre_eps,
                ACC=acc,
                BLOCK_D=triton.next_power_of_2(d),
                num_warps=4 if d <= 2048 else 8,
            )


def backward_from(gather: Gather, grad: Tensor, stem: Stem, wanted: Collection[str]) -> dict[str, Tensor]:
    """The gradients that are wanted, as `blocked.backward_from`."""
    b, r, n = stem.shape
    half = stem.compute.itemsize == 2 and grad.dtype.itemsize == 2
    operand = grad.dtype if half else stem.acc
    if stem.stem_weight is not None or stem.pre_weight is not None:
        return blocked.backward_from(_tile(gather), grad, stem, wanted, operand)
    acc, d = stem.acc, stem.weight.shape[0]
    need = {name: name in wanted for name in DIFFERENTIABLE}
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    f = entering(stem)
    every = rows_of(stem, 0, b)
    kept = torch.zeros(r + n, d, dtype=acc, device=grad.device)
    masked = torch.zeros_like(kept)
    product = torch.zeros(d, f.x.shape[1] * prod(f.g.kernel), dtype=acc, device=grad.device)
    if b * (r + n):
        launch(
            _sums_kernel,
            (r + n, triton.cdiv(d, _SUMS["BLOCK_D"])),
            grad,
            kept_ptr=kept,
            masked_ptr=masked,
            g_ptr=grad,
            mask_ptr=every.mask,
            stride_image=grad.stride(0),
            stride_row=grad.stride(1),
            B=b,
            N=n,
            R=r,
            D=d,
            ACC=accumulator(acc),
            **_SUMS,
        )
    for i, j in _spans(stem, product.shape[1] * operand.itemsize) if need["weight"] else ():
        rows = rows_of(stem, i, j)
        if rows.m:
            product += _weight_product(gather, grad[i:j].to(operand), f, rows, i, j, r)
    grads = {
        "bias": kept[r:].sum(0),
        "prefix": kept[:r],
        "prefix_position": kept[:r],
        "position": kept[r:] + masked[r:],
        "mask_token": masked.sum(0),
        "type_embed": kept.sum(0) + masked.sum(0),
    }
    if need["position"] and every.ids is not None:
        spread = torch.zeros(f.g.patches, d, dtype=acc, device=grad.device)
        grads["position"] = blocked.sum_at(spread, every.ids.flatten(), grad[:, r:].to(acc).reshape(-1, d))
    if need["weight"]:
        grads["weight"] = f.weight_grad(product, grads["bias"], stem.weight)
    if need["pixels"]:
        grads["pixels"] = blocked.pixel_grad(grad[:, r:], stem)
    return blocked.gradients(grads, stem, wanted)


def _weight_product(gather: Gather, grad: Tensor, f: Folded, rows: Rows, i: int, j: int, r: int) -> Tensor:
    """dyT A of images i to j, [D, K]."""
    operand, d = grad.dtype, grad.shape[2]
    k = f.x.shape[1] * prod(f.g.kernel)
    a = torch.empty(rows.m, -(-k // 16) * 16, dtype=operand, device=grad.device)
    gather(a, f.x[i:j], f, rows)
    tile = _TILES[_kind(operand)]["weight"]
    tiles = triton.cdiv(d, tile["BLOCK_N"]) * triton.cdiv(a.shape[1], tile["BLOCK_K"])
    part = max(_PART, triton.cdiv(rows.m, max(1, _PROGRAMS // tiles)))
    parts = torch.empty(triton.cdiv(rows.m, part), d, a.shape[1], dtype=accumulation_dtype(operand), device=grad.device)
    launch(
        _weight_kernel,
        (tiles, len(parts)),
        grad,
        parts_ptr=parts,
        g_ptr=grad,
        a_ptr=a,
        order_ptr=rows.order,
        count_ptr=rows.count,
        stride_image=grad.stride(0),
        stride_row=grad.stride(1),
        M=rows.m,
        N=rows.n,
        R=r,
        part=part,
        D=d,
        KP=a.shape[1],
        ACC=accumulator(operand),
        PRECISION=input_precision(operand),
        **tile,
    )
    return parts.sum(0)[:, :k]


def _tile(gather: Gather) -> Any:
    """The gather as the blocks of `blocked` ask for it."""

    def patch_rows(x: Tensor, f: Folded, tokens: Tensor | None, a: Tensor) -> None:
        if a.numel():
            gather(a.view(-1, a.shape[-1]), x, f, Rows(len(x), f.g.patches, order=tokens))

    return SimpleNamespace(patch_rows=patch_rows)


def passes(backend: str) -> Any:
    """`forward_into` and `backward_from` with the gather of a backend."""
    gather = triton_rows if backend == "triton" else cuda_rows
    return SimpleNamespace(forward_into=partial(forward_into, gather), backward_from=partial(backward_from, gather))


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """The kernels of published stems (ViT-B/16, ViT-g/14, ImageBind's norms), for `mmfuse compile-report`."""
    for kind in ("bytes", "half", "tf32"):
        yield from _tokens_specs(kind, _TILES[kind]["tokens"])
    for (_, kind), tile, arch in configs.shipped("patch"):
        yield from _tokens_specs(kind, tile, (arch,))
    options = {"ACC": tl.float32, "PRECISION": "ieee"} | _EVERY | _TILES["half"]["weight"]
    yield _spec("_weight_kernel", "bf16", options, "half", g_ptr="*bf16", a_ptr="*bf16")
    options = _SIZES | {"CHANNELS_LAST": False, "PADDED": False, "ACC": tl.float32, "multiply_ptr": None} | _ROWS
    yield _spec("_rows_kernel", "224/16", options | _EVERY, None)
    options = {"GRID_Y": 16, "GRID_X": 16, "KY": 14, "KX": 14, "ACC": tl.float32} | _line_blocks(224)
    yield _spec("_lines_kernel", "224/14", options, None)
    options = {"ACC": tl.float32, "BLOCK_D": 2048, "num_warps": 4, "mask_ptr": None, "ids_ptr": None}
    yield _spec("_norm_kernel", "1280", options, None)
    yield _spec("_sums_kernel", "bf16, masked", {"ACC": tl.float32} | _SUMS, None)
    options = {"ACC": tl.float32, "SLICES": 2, "VOLUME": 196, "CHANNELS_LAST": False} | _FOLD
    yield _spec("_fold_kernel", "still 14", options, None)


def candidates(operator: str, dtype: torch.dtype, columns: int, arch: int) -> Iterator[tuple[str, list[Candidate]]]:
    """For the product, which the time of a stem shows: its key in a table, and tiles with the compilations to pass."""
    if operator == "patch_embed":
        kind = "bytes" if dtype.itemsize == 2 else _kind(dtype)
        # the pixels' own kernel has whole blocks of a patch's row
        others = neighbours(_TILES[kind]["tokens"], but=("BLOCK_K",) * (kind == "bytes"))
        yield configs.key("tokens", kind), [(other, list(_tokens_specs(kind, other, (arch,)))) for other in others]


_SIZES = {"STEP_T": 1, "STEP_Y": 16, "STEP_X": 16, "GRID_Y": 14, "GRID_X": 14, "KT": 1, "KY": 16, "KX": 16}
_EVERY = dict.fromkeys(("order_ptr", "count_ptr", "ids_ptr"))  # patch, and none masked


def _tokens_specs(kind: str, tile: dict[str, int], archs: tuple[int, ...] = (80, 90, 100)) -> Iterator[Spec]:
    """The variants of the product."""
    product = {"ACC": tl.float32, "PRECISION": "ieee", "GROUP_M": _GROUP_M} | tile
    plain = _EVERY | {"mask_token_ptr": None, "type_ptr": None}
    rows = dict.fromkeys(_SIZES, 1) | {"x_ptr": None}
    if kind == "bytes":
        pixels = _SIZES | {"a_ptr": None, "stride_x": 1, "EVEN_K": True}
        yield _spec("_tokens_kernel", "224/16", product | plain | pixels, "half", archs)
    elif kind == "half":
        yield _spec("_tokens_kernel", "224/16, rows", product | plain | rows | {"EVEN_K": True}, "half", archs)
        yield _spec("_tokens_kernel", "224/14, masked", product | rows | {"EVEN_K": False}, "half", archs)
    else:
        bare = dict.fromkeys(("position_ptr", "prefix_ptr", "prefix_position_ptr", "unscale_ptr"))
        exact = dict.fromkeys(("a_ptr", "v_ptr", "out_ptr"), "*fp32")
        options = product | plain | bare | rows | {"PRECISION": kind, "EVEN_K": True}
        dot = "tf32" if kind == "tf32" else None
        yield _spec("_tokens_kernel", f"{kind}, before a norm", options, dot, archs, **exact)


_ALIGNED = ("KP", "D", "stride_image", "stride_row", "stride_b", "stride_c", "stride_t", "stride_y")
_TYPES = {
    **dict.fromkeys(("out_ptr", "g_ptr", "w_ptr", "bias_ptr", "position_ptr", "type_ptr", "mask_token_ptr"), "*bf16"),
    **dict.fromkeys(("prefix_ptr", "prefix_position_ptr", "stem_weight_ptr", "stem_bias_ptr"), "*bf16"),
    **dict.fromkeys(("pre_weight_ptr", "pre_bias_ptr"), "*bf16"),
    **dict.fromkeys(("a_ptr", "v_ptr"), "*fp16"),
    **dict.fromkeys(("order_ptr", "count_ptr", "ids_ptr"), "*i64"),
    **{"x_ptr": "*u8", "mask_ptr": "*u8", "stem_eps": "fp32", "pre_eps": "fp32"},
}


def _spec(
    name: str,
    variant: str,
    options: dict[str, Any],
    dot: str | None,
    archs: tuple[int, ...] = (80, 90, 100),
    **types: str,
) -> Spec:
    kernel = globals()[name]
    constants = {n: v for n, v in options.items() if n in kernel.arg_names}
    types = _TYPES | types
    signature = {
        n: types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in constants
    }
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=variant,
        signature=signature,
        constants=constants,
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 3),
        aligned=tuple(n for n in signature if n in _ALIGNED),
        archs=archs,
        dot=dot,
        work=_work(constants, dot) if name == "_tokens_kernel" else None,
    )


def _work(constants: dict[str, Any], dot: str | None) -> Work:
    """ViT-B/16 on 256 images."""
    itemsize = 2 if dot == "half" else 4
    return Work.of_product("output", 256 * 196, 768, 768, constants, itemsize, itemsize)
