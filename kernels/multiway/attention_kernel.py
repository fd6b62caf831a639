"""Attention among the rows of each sample in Triton: a program holds a tile of one run's rows and walks the runs.

    S = Q K^T / sqrt(d) + bias,  P = exp(S - m) / l,  O = P V
    dP = dO V^T,  dS = P (dP - <dO, O>),  dQ = dS K / sqrt(d)
    dK = dS^T Q / sqrt(d),  dV = P^T dO,  dbias = the sum of dS over samples

A run is a segment of a sample, wherever in the stream it begins; of a run that a tile does not see nothing is read. A
program of the bias' gradient holds a tile of places and walks the samples. Nothing is added to by two programs: two
runs are equal bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, exp, finite, input_precision
from mmfuse.kernels.multiway.arguments import Attended
from mmfuse.kernels.multiway.reference import KINDS
from mmfuse.kernels.multiway.routing import Reading

_CAUSAL, _ALL = tl.constexpr(KINDS.index("causal")), tl.constexpr(KINDS.index("all"))

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _program(tiles, H, lengths_ptr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, head, run, number of the tile's first row in it) of a program; run -1: it has nothing to do."""
    pid = tl.program_id(0)
    tile, of = pid % tiles, pid // tiles
    b, h = (of // H).to(tl.int64), (of % H).to(tl.int64)
    run, at, first = -1, 0, 0
    for r in tl.static_range(RUNS):
        count = (tl.load(lengths_ptr + b * RUNS + r).to(tl.int32) + BLOCK - 1) // BLOCK
        here = (tile >= first) & (tile < first + count)
        run = tl.where(here, r, run)
        at = tl.where(here, (tile - first) * BLOCK, at)
        first += count
    return b, h, run, at


@triton.jit
def _kind(sees, i, j, RUNS: tl.constexpr):
    """What run i sees of run j."""
    return ((tl.full((), sees, tl.int64) >> (2 * (i * RUNS + j))) & 3).to(tl.int32)


@triton.jit
def _place(places, i):
    """Of run i's first row in the bias."""
    return ((tl.full((), places, tl.int64) >> (16 * i)) & 0xFFFF).to(tl.int32)


@triton.jit
def _at(row, stride, h, stride_h, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of BLOCK rows of a head, [BLOCK, BLOCK_D]; strides are multiples of UNIT, so that accesses are as wide."""
    stride, stride_h = stride // UNIT * UNIT, stride_h // UNIT * UNIT
    within = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return row * stride + h * stride_h + within


@triton.jit
def _rows(
    ptr, row, stride, h, stride_h, here, D: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK rows of a head from one on; 0 where there is none."""
    mask = here[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(ptr + _at(row, stride, h, stride_h, UNIT, BLOCK, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def _store_rows(
    ptr, x, row, h, H, here, D: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Into [T, H, D]."""
    mask = here[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(ptr + _at(row, H * D, h, D, UNIT, BLOCK, BLOCK_D), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias(bias_ptr, h, q, k, P, seen):
    """Of a tile of places that begins at (q, k), with queries in rows."""
    m, n = tl.arange(0, seen.shape[0])[:, None], tl.arange(0, seen.shape[1])[None, :]
    return tl.load(bias_ptr + (h * P + q) * P + k + m * P + n, mask=seen, other=0.0)


@triton.jit
def _bias_by_key(bias_ptr, h, q, k, P, seen):
    """The same with keys in rows."""
    n, m = tl.arange(0, seen.shape[0])[:, None], tl.arange(0, seen.shape[1])[None, :]
    return tl.load(bias_ptr + (h * P + q) * P + k + m * P + n, mask=seen, other=0.0)


@triton.jit
def _seen(kind, queries, keys, from_, to):
    """Of numbers of queries and of keys in their runs, which have one row or column; there are `from_` and `to`."""
    ahead = tl.where(kind == _ALL, to, 0)
    return (queries >= 0) & (queries < from_) & (keys >= 0) & (keys < to) & (keys <= queries + ahead)


@triton.jit
def _packed_attend_kernel(
    o_ptr,  # out [T, H, D]
    max_ptr,  # out [H, T]
    sum_ptr,  # out [H, T]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H / G, D]
    v_ptr,  # [T, H / G, D]
    bias_ptr,  # [H, P, P], or None
    places,  # of each run in the bias, in 16 bits
    first_ptr,  # [B, RUNS]
    lengths_ptr,  # [B, RUNS]
    kept_ptr,  # [B, RUNS]
    sees,  # of each run and run, in 2 bits
    scale,
    tiles,
    H,
    G,  # heads of queries for one of keys
    T,
    P,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    RUNS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, h, i, at = _program(tiles, H, lengths_ptr, RUNS, BLOCK_M)
    if i < 0:
        return
    of_i = b * RUNS + i
    queries = at + tl.arange(0, BLOCK_M)
    n_i = tl.load(lengths_ptr + of_i).to(tl.int32)
    here = queries < n_i
    row = tl.load(first_ptr + of_i) + at
    rows = row + tl.arange(0, BLOCK_M)
    q = _rows(q_ptr, row, stride_q, h, stride_qh, here, D, UNIT, BLOCK_M, BLOCK_D)
    m = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    o = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for j in range(RUNS):
        kind = _kind(sees, i, j, RUNS)
        first = tl.load(first_ptr + b * RUNS + j)
        n_j = tl.load(kept_ptr + b * RUNS + j).to(tl.int32)
        stop = tl.where(kind == _ALL, n_j, tl.where(kind == _CAUSAL, tl.minimum(n_j, at + BLOCK_M), 0))
        for n0 in range(0, stop, BLOCK_N):
            keys = n0 + tl.arange(0, BLOCK_N)
            k = _rows(k_ptr, first + n0, stride_k, h // G, stride_kh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
            v = _rows(v_ptr, first + n0, stride_v, h // G, stride_vh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
            seen = _seen(kind, queries[:, None], keys[None, :], n_i, n_j)
            if bias_ptr is not None:
                of_q, of_k = _place(places, i), _place(places, j)
                s += _bias(bias_ptr, h, of_q + at, of_k + n0, P, seen)
            s = tl.where(seen, s, float("-inf"))
            above = tl.maximum(m, tl.max(s, axis=1))
            offset = finite(above)
            p = exp(s - offset[:, None])
            before = exp(m - offset)
            total = total * before + tl.sum(p, axis=1)
            o = tl.dot(p.to(v.dtype), v, o * before[:, None], input_precision=PRECISION, out_dtype=ACC)
            m = above
    o = divide(o, tl.where(total > 0, total, 1.0)[:, None])
    _store_rows(o_ptr, o, row, h, H, here, D, UNIT, BLOCK_M, BLOCK_D)
    tl.store(max_ptr + h * T + rows, m, mask=here)
    tl.store(sum_ptr + h * T + rows, total, mask=here)


@triton.jit
def _statistics(max_ptr, sum_ptr, at, here):
    """(offset of the scores, factor of their exponentials)"""
    total = tl.load(sum_ptr + at, mask=here, other=0.0)
    return finite(tl.load(max_ptr + at, mask=here, other=0.0)), divide(1.0, tl.where(total > 0, total, 1.0))


@triton.jit
def _packed_query_grad_kernel(
    dq_ptr,  # out [T, H, D]
    delta_ptr,  # out [H, T]: <dO, O>
    g_ptr,  # [T, H, D]
    o_ptr,  # [T, H, D]
    max_ptr,  # [H, T]
    sum_ptr,  # [H, T]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H / G, D]
    v_ptr,  # [T, H / G, D]
    bias_ptr,  # [H, P, P], or None
    places,  # of each run in the bias, in 16 bits
    first_ptr,  # [B, RUNS]
    lengths_ptr,  # [B, RUNS]
    kept_ptr,  # [B, RUNS]
    sees,  # of each run and run, in 2 bits
    scale,
    tiles,
    H,
    G,  # heads of queries for one of keys
    T,
    P,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    RUNS: tl.constexpr,
    SHORT: tl.constexpr,  # the rows of a sample are one tile
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, h, i, at = _program(tiles, H, lengths_ptr, RUNS, BLOCK_M)
    if i < 0:
        return
    of_i = b * RUNS + i
    queries = at + tl.arange(0, BLOCK_M)
    n_i = tl.load(lengths_ptr + of_i).to(tl.int32)
    here = queries < n_i
    row = tl.load(first_ptr + of_i) + at
    rows = row + tl.arange(0, BLOCK_M)
    q = _rows(q_ptr, row, stride_q, h, stride_qh, here, D, UNIT, BLOCK_M, BLOCK_D)
    g = _rows(g_ptr, row, H * D, h, D, here, D, UNIT, BLOCK_M, BLOCK_D)
    m, factor = _statistics(max_ptr, sum_ptr, h * T + rows, here)
    delta = tl.zeros((BLOCK_M,), ACC)
    if not SHORT:
        o = _rows(o_ptr, row, H * D, h, D, here, D, UNIT, BLOCK_M, BLOCK_D)
        delta = tl.sum(g.to(ACC) * o.to(ACC), axis=1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    # the same by probabilities first, which is exact where a score has no influence
    for again in tl.static_range(2 if SHORT else 1):
        for j in range(RUNS):
            kind = _kind(sees, i, j, RUNS)
            first = tl.load(first_ptr + b * RUNS + j)
            n_j = tl.load(kept_ptr + b * RUNS + j).to(tl.int32)
            stop = tl.where(kind == _ALL, n_j, tl.where(kind == _CAUSAL, tl.minimum(n_j, at + BLOCK_M), 0))
            for n0 in range(0, stop, BLOCK_N):
                keys = n0 + tl.arange(0, BLOCK_N)
                k = _rows(k_ptr, first + n0, stride_k, h // G, stride_kh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
                v = _rows(v_ptr, first + n0, stride_v, h // G, stride_vh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
                seen = _seen(kind, queries[:, None], keys[None, :], n_i, n_j)
                if bias_ptr is not None:
                    of_q, of_k = _place(places, i), _place(places, j)
                    s += _bias(bias_ptr, h, of_q + at, of_k + n0, P, seen)
                p = tl.where(seen, exp(s - m[:, None]) * factor[:, None], 0.0)
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
                if SHORT and again == 0:
                    delta += tl.sum(p * dp, axis=1)
                else:
                    ds = p * (dp - delta[:, None]) * scale
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    tl.store(delta_ptr + h * T + rows, delta, mask=here)
    _store_rows(dq_ptr, dq, row, h, H, here, D, UNIT, BLOCK_M, BLOCK_D)


@triton.jit
def _packed_key_grad_kernel(
    dk_ptr,  # out [T, H / G, D]
    dv_ptr,  # out [T, H / G, D]
    g_ptr,  # [T, H, D]
    delta_ptr,  # [H, T]
    max_ptr,  # [H, T]
    sum_ptr,  # [H, T]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H / G, D]
    v_ptr,  # [T, H / G, D]
    bias_ptr,  # [H, P, P], or None
    places,  # of each run in the bias, in 16 bits
    first_ptr,  # [B, RUNS]
    lengths_ptr,  # [B, RUNS]
    kept_ptr,  # [B, RUNS]
    sees,  # of each run and run, in 2 bits
    scale,
    tiles,
    H,
    G,  # heads of queries for one of keys
    T,
    P,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    RUNS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, of_keys, j, at = _program(tiles, H // G, lengths_ptr, RUNS, BLOCK_N)
    if j < 0:
        return
    of_j = b * RUNS + j
    keys = at + tl.arange(0, BLOCK_N)
    n_j = tl.load(kept_ptr + of_j).to(tl.int32)
    row = tl.load(first_ptr + of_j) + at
    k = _rows(k_ptr, row, stride_k, of_keys, stride_kh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
    v = _rows(v_ptr, row, stride_v, of_keys, stride_vh, keys < n_j, D, UNIT, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for of in range(G * RUNS):
        h, i = of_keys * G + of // RUNS, of % RUNS
        kind = _kind(sees, i, j, RUNS)
        first = tl.load(first_ptr + b * RUNS + i)
        n_i = tl.load(lengths_ptr + b * RUNS + i).to(tl.int32)
        begin = tl.where(kind == _CAUSAL, at // BLOCK_M * BLOCK_M, 0)
        # what is padding is seen by nobody
        stop = tl.where(((kind == _ALL) | (kind == _CAUSAL)) & (at < n_j), n_i, 0)
        for m0 in range(begin, stop, BLOCK_M):
            queries = m0 + tl.arange(0, BLOCK_M)
            here = queries < n_i
            q = _rows(q_ptr, first + m0, stride_q, h, stride_qh, here, D, UNIT, BLOCK_M, BLOCK_D)
            g = _rows(g_ptr, first + m0, H * D, h, D, here, D, UNIT, BLOCK_M, BLOCK_D)
            m, factor = _statistics(max_ptr, sum_ptr, h * T + first + queries, here)
            delta = tl.load(delta_ptr + h * T + first + queries, mask=here, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale
            seen = _seen(kind, queries[None, :], keys[:, None], n_i, n_j)
            if bias_ptr is not None:
                of_q, of_k = _place(places, i), _place(places, j)
                s += _bias_by_key(bias_ptr, h, of_q + m0, of_k + at, P, seen)
            p = tl.where(seen, exp(s - m[None, :]) * factor[None, :], 0.0)
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=ACC)
            ds = p * (dp - delta[None, :]) * scale
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    own = keys < tl.load(lengths_ptr + of_j)
    _store_rows(dk_ptr, dk, row, of_keys, H // G, own, D, UNIT, BLOCK_N, BLOCK_D)
    _store_rows(dv_ptr, dv, row, of_keys, H // G, own, D, UNIT, BLOCK_N, BLOCK_D)


@triton.jit
def _packed_bias_grad_kernel(
    dbias_ptr,  # out [H, P, P]
    g_ptr,  # [T, H, D]
    delta_ptr,  # [H, T]
    max_ptr,  # [H, T]
    sum_ptr,  # [H, T]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H / G, D]
    v_ptr,  # [T, H / G, D]
    bias_ptr,  # [H, P, P]
    places,  # of each run in the bias, in 16 bits
    first_ptr,  # [B, RUNS]
    lengths_ptr,  # [B, RUNS]
    kept_ptr,  # [B, RUNS]
    sees,  # of each run and run, in 2 bits
    scale,
    B,
    H,
    G,  # heads of queries for one of keys
    T,
    P,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    RUNS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h = tl.program_id(0).to(tl.int64)
    q0, k0 = tl.program_id(1) * BLOCK_M, tl.program_id(2) * BLOCK_N
    of_q, of_k = q0 + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    here = (of_q < P)[:, None] & (of_k < P)[None, :]
    bias = _bias(bias_ptr, h, q0, k0, P, here)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for pair in range(RUNS * RUNS):
        i, j = pair // RUNS, pair % RUNS
        kind = _kind(sees, i, j, RUNS)
        # may be less than 0: the tile begins before the run
        at_q, at_k = q0 - _place(places, i), k0 - _place(places, j)
        queries, keys = at_q + tl.arange(0, BLOCK_M), at_k + tl.arange(0, BLOCK_N)
        reached = ((kind == _ALL) | (kind == _CAUSAL)) & (at_q + BLOCK_M > 0) & (at_k + BLOCK_N > 0)
        for b in range(tl.where(reached, B, 0)):
            n_i = tl.load(lengths_ptr + b * RUNS + i).to(tl.int32)
            n_j = tl.load(kept_ptr + b * RUNS + j).to(tl.int32)
            if (at_q < n_i) & (at_k < n_j):
                row_q = tl.load(first_ptr + b * RUNS + i) + at_q
                row_k = tl.load(first_ptr + b * RUNS + j) + at_k
                here_q, here_k = (queries >= 0) & (queries < n_i), (keys >= 0) & (keys < n_j)
                q = _rows(q_ptr, row_q, stride_q, h, stride_qh, here_q, D, UNIT, BLOCK_M, BLOCK_D)
                g = _rows(g_ptr, row_q, H * D, h, D, here_q, D, UNIT, BLOCK_M, BLOCK_D)
                k = _rows(k_ptr, row_k, stride_k, h // G, stride_kh, here_k, D, UNIT, BLOCK_N, BLOCK_D)
                v = _rows(v_ptr, row_k, stride_v, h // G, stride_vh, here_k, D, UNIT, BLOCK_N, BLOCK_D)
                rows = h * T + row_q + tl.arange(0, BLOCK_M)
                m, factor = _statistics(max_ptr, sum_ptr, rows, here_q)
                delta = tl.load(delta_ptr + rows, mask=here_q, other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale + bias
                seen = _seen(kind, queries[:, None], keys[None, :], n_i, n_j)
                p = tl.where(seen, exp(s - m[:, None]) * factor[:, None], 0.0)
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
                total += p * (dp - delta[:, None])
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    tl.store(dbias_ptr + (h * P + q0) * P + k0 + m * P + n, total, mask=here)


# --- launches -------------------------------------------------------------------------------------------------------


def _tile(longest: int, d: int, itemsize: int) -> dict[str, int]:
    """Chosen to compile without spills, not measured. A short sample is a small program."""
    rows = max(16, triton.next_power_of_2(longest))
    m, n = (64, 32) if itemsize > 2 else (128, 64 if d <= 64 else 32)
    tile = {"BLOCK_D": max(16, triton.next_power_of_2(d)), "BLOCK_M": min(m, rows), "BLOCK_N": min(n, rows)}
    return tile | {"num_warps": 8 if rows > 32 else 2, "num_stages": 2}


def _for_grads(tile: dict[str, int], itemsize: int) -> dict[str, int]:
    """Gradients are of more operands at once: in 32 bits none waits in registers."""
    tile = tile | {"BLOCK_M": min(64, tile["BLOCK_M"]), "BLOCK_N": min(32, tile["BLOCK_N"])}
    return tile | {"num_stages": 1} if itemsize > 2 else tile


def _for_keys(tile: dict[str, int], itemsize: int, biased: bool) -> dict[str, int]:
    """Two sums, over queries."""
    few = 16 if itemsize > 2 else 32
    tile = tile | {"BLOCK_M": min(few, tile["BLOCK_M"]), "BLOCK_N": tile["BLOCK_M"]}
    if itemsize > 2 or tile["BLOCK_D"] > 64:
        return tile
    return tile | {"num_warps": tile["num_warps"] if biased else min(4, tile["num_warps"]), "num_stages": 1}


def _unit(t: Tensor) -> Tensor:
    """Features of unit stride."""
    t = t.resolve_neg()
    return t if t.stride(2) == 1 else t.contiguous()


def _options(
    q: Tensor, k: Tensor, v: Tensor, reading: Reading, places: Sequence[int], sees: Sequence[int], bias: Tensor | None
) -> dict[str, Any]:
    t, heads, d = q.shape
    q, k, v = (_unit(x) for x in (q, k, v))
    # 2-byte accesses else: a row of the table begins anywhere
    table = None if bias is None else bias.to(accumulation_dtype(q.dtype)).contiguous()
    strides = {
        f"stride_{name}{axis}": x.stride(i)
        for name, x in (("q", q), ("k", k), ("v", v))
        for i, axis in enumerate(("", "h"))
    }
    return strides | {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": table,
        "first_ptr": reading.first, "lengths_ptr": reading.lengths, "kept_ptr": reading.kept,
        "scale": d**-0.5, "H": heads, "G": heads // max(1, k.shape[1]), "T": t,
        "P": 0 if bias is None else bias.shape[1], "ACC": accumulator(q.dtype), "PRECISION": input_precision(q.dtype),
        "D": d, "UNIT": gcd(16, d, *strides.values()), **of_runs(places, sees),
    }  # fmt: skip


def of_runs(places: Sequence[int], sees: Sequence[int]) -> dict[str, int]:
    """What the kernels know of runs, as numbers."""
    runs = len(places)
    kinds = sees or [KINDS.index("all")] * (runs * runs)
    packed = sum(place * 2 ** (16 * i) for i, place in enumerate(places))
    packed -= (packed >> 63) << 64  # as a signed number
    return {"places": packed, "sees": sum(kind << (2 * i) for i, kind in enumerate(kinds)), "RUNS": runs}


def _tiles(longest: int, runs: int, block: int) -> int:
    """That a sample has at most."""
    return triton.cdiv(longest, block) + runs - 1


def attend(
    q: Tensor, k: Tensor, v: Tensor, reading: Reading, places: Sequence[int], sees: Sequence[int], bias: Tensor | None
) -> Attended:
    (t, heads, d), (samples, longest) = q.shape, reading.row.shape
    out = q.new_empty(t, heads * d)
    row_max, row_sum = (q.new_empty(heads, t, dtype=accumulation_dtype(q.dtype)) for _ in range(2))
    tile = _tile(longest, d, q.dtype.itemsize)
    tiles = _tiles(longest, len(places), tile["BLOCK_M"])
    if out.numel():
        launch(
            _packed_attend_kernel, (samples * heads * tiles,), q, o_ptr=out, max_ptr=row_max, sum_ptr=row_sum,
            tiles=tiles, **_options(q, k, v, reading, places, sees, bias), **tile,
        )  # fmt: skip
    return Attended(out, row_max, row_sum)


def attend_grads(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    attended: Attended,
    needs: Any,
) -> dict[str, Any]:
    (_, heads, d), (samples, longest), runs = q.shape, reading.row.shape, len(places)
    g, options = g.resolve_neg().contiguous(), _options(q, k, v, reading, places, sees, bias)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dbias = q.new_zeros(0) if bias is None else options["bias_ptr"].new_zeros(bias.shape)
    delta = torch.empty_like(attended.row_max)
    stats = {"g_ptr": g, "delta_ptr": delta, "max_ptr": attended.row_max, "sum_ptr": attended.row_sum}
    if q.numel():
        tile = _for_grads(_tile(longest, d, q.dtype.itemsize), q.dtype.itemsize)
        tiles = _tiles(longest, runs, tile["BLOCK_M"])
        launch(
            _packed_query_grad_kernel, (samples * heads * tiles,), q, dq_ptr=dq, o_ptr=attended.out, tiles=tiles,
            SHORT=longest <= tile["BLOCK_N"], **stats, **options, **tile,
        )  # fmt: skip
        if bias is not None and needs.bias:
            grid = heads, *(triton.cdiv(bias.shape[1], tile[block]) for block in ("BLOCK_M", "BLOCK_N"))
            launch(_packed_bias_grad_kernel, grid, q, dbias_ptr=dbias, B=samples, **stats, **options, **tile)
        tile = _for_keys(tile, q.dtype.itemsize, bias is not None)
        tiles = _tiles(longest, runs, tile["BLOCK_N"])
        if needs.k or needs.v:
            launch(
                _packed_key_grad_kernel, (samples * k.shape[1] * tiles,), q, dk_ptr=dk, dv_ptr=dv, tiles=tiles,
                **stats, **options, **tile,
            )  # fmt: skip
    return {"q": dq, "k": dk, "v": dv, "bias": dbias if bias is None else cast(dbias, bias.dtype)}


# --- ahead of time --------------------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """BEiT-3 base's pairs, VLMo base's with their bias, base_plus' heads of 34, giant's of 88, BAGEL's groups and a
    Q-Former's queries,
    for `mmfuse compile-report`."""
    base = {"B": 64, "H": 12, "S": 261, "D": 64}
    kernels = {_packed_attend_kernel: 37.0, _packed_query_grad_kernel: 40.0, _packed_key_grad_kernel: 54.0}
    for kernel, loop in kernels.items():
        yield replace(_spec(kernel, "bf16", base, "half"), bounds={"loop": loop})
        yield _spec(kernel, "bf16 bias", base, "half", bias_ptr="*fp32")
        yield _spec(kernel, "bf16 D 34", base | {"H": 16, "D": 34}, "half")
        yield _spec(kernel, "bf16 D 88", base | {"H": 16, "D": 88}, "half")
        yield _spec(kernel, "bf16 grouped", base | {"H": 28, "G": 7, "D": 128}, "half")
        yield _spec(kernel, "bf16 short", base | {"S": 32}, None)
        yield _spec(kernel, "tf32", base, "tf32", torch.float32, bias_ptr="*fp32")
    yield _spec(_packed_bias_grad_kernel, "bf16", base, "half", bias_ptr="*fp32")
    yield _spec(_packed_bias_grad_kernel, "tf32", base, "tf32", torch.float32, bias_ptr="*fp32")


def _spec(
    kernel: Any, variant: str, sizes: dict[str, int], dot: str | None, dtype: torch.dtype = torch.bfloat16, **given: str
) -> Spec:
    name, d, itemsize = kernel.__name__, sizes["D"], dtype.itemsize
    tile = _tile(sizes["S"], d, itemsize)
    tile = tile if kernel is _packed_attend_kernel else _for_grads(tile, itemsize)
    tile = _for_keys(tile, itemsize, bool(given)) if kernel is _packed_key_grad_kernel else tile
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants: dict[str, Any] = {"RUNS": 2, "ACC": tl.float32, "PRECISION": "tf32" if dot == "tf32" else "ieee", "D": d}
    constants |= {"G": 1} if sizes.get("G", 1) == 1 else {}
    constants |= {"UNIT": gcd(16, d)} | tile | {"SHORT": sizes["S"] <= tile["BLOCK_N"]}
    constants |= {} if given else {"bias_ptr": None}
    data = "*fp32" if dtype == torch.float32 else "*bf16"
    types = dict.fromkeys(("o_ptr", "q_ptr", "k_ptr", "v_ptr", "g_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), data) | given
    types |= dict.fromkeys(("max_ptr", "sum_ptr", "delta_ptr", "dbias_ptr", "bias_ptr"), "*fp32")
    types |= dict.fromkeys(("first_ptr", "lengths_ptr", "kept_ptr"), "*i64")
    types |= {"places": "i64", "sees": "i64", "scale": "fp32"}
    used = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in used}
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=variant,
        signature=signature,
        constants=used,
        num_warps=warps,
        num_stages=stages,
        aligned=tuple(n for n in signature if n.startswith("stride_") and d % 16 == 0),
        dot=dot,
        work=_work(kernel, sizes, tile, itemsize),
    )


def _work(kernel: Any, sizes: dict[str, int], tile: dict[str, int], itemsize: int) -> Work | None:
    """Of samples that are one run."""
    b, h, s, d = (sizes[n] for n in "BHSD")
    # a program of the bias' gradient goes round once for each sample, and the products are in a branch
    if kernel is _packed_bias_grad_kernel:
        return None
    products, reads, block = {
        _packed_attend_kernel: (2, 4, "BLOCK_M"),
        _packed_query_grad_kernel: (3, 6, "BLOCK_M"),
        _packed_key_grad_kernel: (4, 6, "BLOCK_N"),
    }[kernel]
    rows, columns = (-(-s // tile[n]) * tile[n] for n in ("BLOCK_M", "BLOCK_N"))
    return Work(
        size=f"{b} x {h} heads, {s} x {s} x {d}",
        unit="score",
        units=b * h * s * s,
        programs=b * h * -(-s // tile[block]),
        bytes=b * h * reads * s * d * itemsize,
        flops=2 * b * h * rows * columns * tile["BLOCK_D"] * products,
    )
