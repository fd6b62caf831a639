"""Attention of a few queries in Triton: a program holds the queries of one row and head while tiles of keys pass.

    S^T = K Q^T / sqrt(d),  P^T = exp(S^T - m) / l,  O^T = V^T P^T
    dP^T = V dO^T,  dS^T = P^T (dP^T - <dO, O>) / sqrt(d),  dQ^T = K^T dS^T
    dK = dS^T Q,  dV = P^T dO, of the rows that share an image one after another

Transposed, because tensor cores want 64 rows and there are fewer queries than that. Keys that fit into one tile need no
running maximum. Nothing is added to by two programs: two runs are equal bitwise. A probability is dropped by Philox of
the seed, its row and head, and its place among them, four keys by one draw: any program can draw it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, exp, input_precision
from mmfuse.kernels.qformer.arguments import Keys, Outputs

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _tokens_of(i, lengths_ptr, cu_ptr, images, N):
    """(the first token of an image, how many), of none if there is no such image."""
    real = (i >= 0) & (i < images)
    i = tl.where(real, i, 0)
    first = i * 0
    n = first + N
    if cu_ptr is not None:
        first = tl.load(cu_ptr + i, mask=real, other=0)
        n = tl.minimum(tl.load(cu_ptr + i + 1, mask=real, other=0) - first, n)
    if lengths_ptr is not None:
        n = tl.minimum(tl.load(lengths_ptr + i, mask=real, other=0), n)
    return first, tl.where(real, n, 0).to(tl.int32), real


@triton.jit
def _image_of(b, index_ptr):
    return tl.load(index_ptr + b).to(tl.int64) if index_ptr is not None else b


@triton.jit
def _rows(ptr, rows, stride, here, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]"""
    d = tl.arange(0, BLOCK_D)
    at = ptr + rows[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _columns(ptr, rows, stride, here, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D, rows]"""
    d = tl.arange(0, BLOCK_D)
    at = ptr + rows[None, :].to(tl.int64) * stride + d[:, None]
    return tl.load(at, mask=here[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def _scores(k, q, keys, n, scale, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """S^T [BLOCK_N, BLOCK_Q]; -inf behind the last key."""
    s = tl.dot(k, q, input_precision=PRECISION, out_dtype=ACC) * scale
    return tl.where((keys < n)[:, None], s, float("-inf"))


@triton.jit
def _kept(seed_ptr, row_and_head, n0, queries, N, drop, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Of the probabilities [BLOCK_N, BLOCK_Q], which are kept; 7 rounds of Philox pass every test of randomness.

    Four keys one after another share a draw of four numbers.
    """
    key = (tl.load(seed_ptr) << 32) + row_and_head
    fours = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.rand4x(key, queries[None, :] * tl.cdiv(N, 4) + fours[:, None], n_rounds=7)
    drawn = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK_N / 4, BLOCK_Q, 2, 2], of which the last two are a, b, c, d
    return tl.reshape(tl.permute(drawn, 0, 2, 3, 1), (BLOCK_N, BLOCK_Q)) >= drop


@triton.jit
def _attend_kernel(
    o_ptr,  # out [B, Q, H, D]
    max_ptr,  # out [B, H, Q]
    sum_ptr,  # out [B, H, Q]
    q_ptr,  # [B or 1, Q, H, D]
    k_ptr,  # [I, N, H, D] or [T, H, D]
    v_ptr,  # as k
    index_ptr,  # [B], or None
    lengths_ptr,  # [I], or None
    cu_ptr,  # [I + 1], or None
    seed_ptr,  # [1], or None
    drop,
    scale,
    H,
    Q,
    images,
    N,
    stride_qb,
    stride_qq,
    stride_qh,
    stride_ki,
    stride_kn,
    stride_kh,
    stride_vi,
    stride_vn,
    stride_vh,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_and_head = tl.program_id(0).to(tl.int64)
    b, h = row_and_head // H, row_and_head % H
    i = _image_of(b, index_ptr)
    first, n, real = _tokens_of(i, lengths_ptr, cu_ptr, images, N)
    i = tl.where(real, i, 0)
    queries = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here = queries < Q
    q = _columns(q_ptr + b * stride_qb + h * stride_qh, queries, stride_qq, here, D, BLOCK_D)
    k_ptr += i * stride_ki + first * stride_kn + h * stride_kh
    v_ptr += i * stride_vi + first * stride_vn + h * stride_vh
    m = tl.full((BLOCK_Q,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    o = tl.zeros((BLOCK_D, BLOCK_Q), ACC)
    if ONE:
        keys = tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, keys, stride_kn, keys < n, D, BLOCK_D)
        v = _columns(v_ptr, keys, stride_vn, keys < n, D, BLOCK_D)
        s = _scores(k, q, keys, n, scale, ACC, PRECISION)
        m = tl.max(s, axis=0)
        # where there is no key all scores are -inf
        p = tl.where((keys < n)[:, None], exp(s - m[None, :]), 0.0)
        total = tl.sum(p, axis=0)
        p = divide(p, tl.where(n > 0, total, 1.0)[None, :])
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, row_and_head, 0, queries, N, drop, BLOCK_N, BLOCK_Q), p / (1.0 - drop), 0.0)
        o = tl.dot(v, p.to(v.dtype), input_precision=PRECISION, out_dtype=ACC)
    else:
        for n0 in range(0, n, BLOCK_N):
            keys = n0 + tl.arange(0, BLOCK_N)
            k = _rows(k_ptr, keys, stride_kn, keys < n, D, BLOCK_D)
            v = _columns(v_ptr, keys, stride_vn, keys < n, D, BLOCK_D)
            s = _scores(k, q, keys, n, scale, ACC, PRECISION)
            above = tl.maximum(m, tl.max(s, axis=0))
            p = exp(s - above[None, :])
            before = exp(m - above)
            total = total * before + tl.sum(p, axis=0)
            if seed_ptr is not None:
                p = tl.where(
                    _kept(seed_ptr, row_and_head, n0, queries, N, drop, BLOCK_N, BLOCK_Q), p / (1.0 - drop), 0.0
                )
            o = tl.dot(v, p.to(v.dtype), o * before[None, :], input_precision=PRECISION, out_dtype=ACC)
            m = above
        o = divide(o, tl.where(n > 0, total, 1.0)[None, :])
    o = tl.where(real, o, float("nan"))
    d = tl.arange(0, BLOCK_D)
    at = ((b * Q + queries)[None, :] * H + h) * D + d[:, None]
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=here[None, :] & (d < D)[:, None])
    tl.store(max_ptr + row_and_head * Q + queries, m, mask=here)
    tl.store(sum_ptr + row_and_head * Q + queries, total, mask=here)


@triton.jit
def _query_grad_kernel(
    dq_ptr,  # out [B, Q, H, D]
    delta_ptr,  # out [B, H, Q], <dO, O>
    g_ptr,  # [B, Q, H, D]
    o_ptr,  # [B, Q, H, D]
    max_ptr,  # [B, H, Q]
    sum_ptr,  # [B, H, Q]
    q_ptr,  # [B or 1, Q, H, D]
    k_ptr,  # [I, N, H, D] or [T, H, D]
    v_ptr,  # as k
    index_ptr,  # [B], or None
    lengths_ptr,  # [I], or None
    cu_ptr,  # [I + 1], or None
    seed_ptr,  # [1], or None
    drop,
    scale,
    H,
    Q,
    images,
    N,
    stride_qb,
    stride_qq,
    stride_qh,
    stride_ki,
    stride_kn,
    stride_kh,
    stride_vi,
    stride_vn,
    stride_vh,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_and_head = tl.program_id(0).to(tl.int64)
    b, h = row_and_head // H, row_and_head % H
    i = _image_of(b, index_ptr)
    first, n, real = _tokens_of(i, lengths_ptr, cu_ptr, images, N)
    i = tl.where(real, i, 0)
    queries = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here = queries < Q
    q = _columns(q_ptr + b * stride_qb + h * stride_qh, queries, stride_qq, here, D, BLOCK_D)
    at = (b * Q * H + h) * D
    g = _columns(g_ptr + at, queries, H * D, here, D, BLOCK_D)
    o = _columns(o_ptr + at, queries, H * D, here, D, BLOCK_D)
    delta = tl.sum(g.to(ACC) * o.to(ACC), axis=0)
    rows = row_and_head * Q + queries
    m = tl.load(max_ptr + rows, mask=here, other=0.0)
    total = tl.load(sum_ptr + rows, mask=here, other=1.0)
    k_ptr += i * stride_ki + first * stride_kn + h * stride_kh
    v_ptr += i * stride_vi + first * stride_vn + h * stride_vh
    dq = tl.zeros((BLOCK_D, BLOCK_Q), ACC)
    for n0 in range(0, n, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, keys, stride_kn, keys < n, D, BLOCK_D)
        v = _rows(v_ptr, keys, stride_vn, keys < n, D, BLOCK_D)
        p = divide(exp(_scores(k, q, keys, n, scale, ACC, PRECISION) - m[None, :]), total[None, :])
        dp = tl.dot(v, g, input_precision=PRECISION, out_dtype=ACC)
        if seed_ptr is not None:
            dp = tl.where(_kept(seed_ptr, row_and_head, n0, queries, N, drop, BLOCK_N, BLOCK_Q), dp / (1.0 - drop), 0.0)
        if ONE:
            # the same by probabilities, which is exact where a score has no influence
            delta = tl.sum(p * dp, axis=0)
        ds = p * (dp - delta[None, :]) * scale
        dq = tl.dot(tl.trans(k), ds.to(k.dtype), dq, input_precision=PRECISION, out_dtype=ACC)
    tl.store(delta_ptr + rows, delta, mask=here)
    dq = tl.where(real, dq, float("nan"))
    d = tl.arange(0, BLOCK_D)
    to = dq_ptr + at + queries[None, :] * (H * D) + d[:, None]
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=here[None, :] & (d < D)[:, None])


@triton.jit
def _key_grad_kernel(
    dk_ptr,  # out, contiguous as k
    dv_ptr,  # out, as dk
    g_ptr,  # [B, Q, H, D]
    delta_ptr,  # [B, H, Q]
    max_ptr,  # [B, H, Q]
    sum_ptr,  # [B, H, Q]
    q_ptr,  # [B or 1, Q, H, D]
    k_ptr,  # [I, N, H, D] or [T, H, D]
    v_ptr,  # as k
    order_ptr,  # [B], the rows of image 0, then those of image 1 ...; or None: one row each
    ends_ptr,  # [I + 1], where they begin and end
    lengths_ptr,  # [I], or None
    cu_ptr,  # [I + 1], or None
    seed_ptr,  # [1], or None
    drop,
    scale,
    H,
    Q,
    images,
    N,
    stride_qb,
    stride_qq,
    stride_qh,
    stride_ki,
    stride_kn,
    stride_kh,
    stride_vi,
    stride_vn,
    stride_vh,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    first, n, real = _tokens_of(i, lengths_ptr, cu_ptr, images, N)
    n0 = tl.program_id(1) * BLOCK_N
    keys = n0 + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr + i * stride_ki + first * stride_kn + h * stride_kh, keys, stride_kn, keys < n, D, BLOCK_D)
    v = _rows(v_ptr + i * stride_vi + first * stride_vn + h * stride_vh, keys, stride_vn, keys < n, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    begin, end = i, i + 1
    if order_ptr is not None:
        begin, end = tl.load(ends_ptr + i), tl.load(ends_ptr + i + 1)
    for r in range(begin, end):
        b = tl.load(order_ptr + r) if order_ptr is not None else i
        row_and_head = b * H + h
        for q0 in range(0, Q, BLOCK_Q):
            queries = q0 + tl.arange(0, BLOCK_Q)
            here = queries < Q
            q = _columns(q_ptr + b * stride_qb + h * stride_qh, queries, stride_qq, here, D, BLOCK_D)
            g = _columns(g_ptr + (b * Q * H + h) * D, queries, H * D, here, D, BLOCK_D)
            rows = row_and_head * Q + queries
            m = tl.load(max_ptr + rows, mask=here, other=0.0)
            total = tl.load(sum_ptr + rows, mask=here, other=1.0)
            delta = tl.load(delta_ptr + rows, mask=here, other=0.0)
            s = _scores(k, q, keys, n, scale, ACC, PRECISION)
            p = tl.where((keys < n)[:, None], divide(exp(s - m[None, :]), total[None, :]), 0.0)
            dp = tl.dot(v, g, input_precision=PRECISION, out_dtype=ACC)
            seen = p
            if seed_ptr is not None:
                kept = _kept(seed_ptr, row_and_head, n0, queries, N, drop, BLOCK_N, BLOCK_Q)
                seen = tl.where(kept, p / (1.0 - drop), 0.0)
                dp = tl.where(kept, dp / (1.0 - drop), 0.0)
            dv = tl.dot(seen.to(g.dtype), tl.trans(g), dv, input_precision=PRECISION, out_dtype=ACC)
            ds = tl.where((keys < n)[:, None], p * (dp - delta[None, :]) * scale, 0.0)
            dk = tl.dot(ds.to(q.dtype), tl.trans(q), dk, input_precision=PRECISION, out_dtype=ACC)
    d = tl.arange(0, BLOCK_D)
    token = first + keys if cu_ptr is not None else i * N + keys
    at = (token[:, None] * H + h) * D + d[None, :]
    # a padded image has zeros behind its last token
    own = keys < n if cu_ptr is not None else keys < N
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=own[:, None] & (d < D)[None, :])
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=own[:, None] & (d < D)[None, :])


# --- launches -------------------------------------------------------------------------------------------------------


def _tile(queries: int, n: int, d: int, itemsize: int) -> dict[str, int]:
    """Chosen to compile without spills, not measured. A small window is a small program."""
    block_d = max(16, triton.next_power_of_2(d))
    block_q = 16 if queries <= 16 else 32 if queries <= 32 or block_d > 64 or itemsize > 2 else 64
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    warps = {16: 1, 32: 2, 64: 4}[block_n]
    return {"BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}


def _for_queries(tile: dict[str, Any], drops: bool) -> dict[str, Any]:
    """The same for the gradient of queries: with draws beside it on more warps, so that nothing spills on sm_100."""
    return tile | {"num_warps": 8} if drops and tile["BLOCK_N"] == 64 else tile


def _for_keys(tile: dict[str, Any], itemsize: int, drops: bool) -> dict[str, Any]:
    """The same for the gradients of keys and values: two sums, which take twice the registers."""
    if tile["BLOCK_N"] < 64:
        return tile
    if itemsize > 2:
        return tile | {"BLOCK_Q": 16}
    if tile["BLOCK_D"] > 64:
        return tile | {"num_warps": 8}
    return tile if drops else tile | {"num_stages": 1}


def _options(q: Tensor, keys: Keys, seed: Tensor | None, dropout: float) -> dict[str, Any]:
    q, k, v = (_unit(t) for t in (q, keys.k, keys.v))
    strides: dict[str, Any] = {}
    for name, t in (("k", k), ("v", v)):
        image, token, head = (0, *t.stride()[:2]) if t.dim() == 3 else t.stride()[:3]
        strides |= {f"stride_{name}i": image, f"stride_{name}n": token, f"stride_{name}h": head}
    _, queries, heads, d = q.shape
    return strides | {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "lengths_ptr": keys.lengths, "cu_ptr": keys.cu_seqlens, "seed_ptr": seed,
        "drop": dropout, "scale": d**-0.5, "H": heads, "Q": queries, "images": keys.images, "N": keys.longest,
        "stride_qb": 0 if q.shape[0] == 1 else q.stride(0), "stride_qq": q.stride(1), "stride_qh": q.stride(2),
        "ACC": accumulator(q.dtype), "PRECISION": input_precision(q.dtype), "D": d,
        **_tile(queries, keys.longest, d, q.dtype.itemsize),
    }  # fmt: skip


def _unit(t: Tensor) -> Tensor:
    """Features of unit stride."""
    t = t.resolve_neg()
    return t if t.stride(-1) == 1 else t.contiguous()


def attend(q: Tensor, keys: Keys, wants_lse: bool, seed: Tensor | None, dropout: float) -> Outputs:
    _, queries, heads, d = q.shape
    b = keys.rows
    o = torch.empty(b, queries, heads, d, dtype=q.dtype, device=q.device)
    row_max, row_sum = (
        torch.empty(b, heads, queries, dtype=accumulation_dtype(q.dtype), device=q.device) for _ in range(2)
    )
    options = _options(q, keys, seed, dropout)
    if o.numel():
        launch(
            _attend_kernel, (b * heads, triton.cdiv(queries, options["BLOCK_Q"])), q, o_ptr=o, max_ptr=row_max,
            sum_ptr=row_sum, index_ptr=keys.kv_index, ONE=keys.longest <= options["BLOCK_N"], **options,
        )  # fmt: skip
    return Outputs(o, row_max, row_sum)


def attend_grads(
    g: Tensor, q: Tensor, keys: Keys, outputs: Outputs, needs: Sequence[bool], seed: Tensor | None, dropout: float
) -> dict[str, Tensor]:
    (_, queries, heads, _), b, one = q.shape, keys.rows, q.shape[0] == 1 != keys.rows
    g, options = g.resolve_neg().contiguous(), _options(q, keys, seed, dropout)
    dq, delta = torch.empty_like(g), torch.empty_like(outputs.row_max)
    stats = {"g_ptr": g, "max_ptr": outputs.row_max, "sum_ptr": outputs.row_sum}
    if dq.numel():
        launch(
            _query_grad_kernel, (b * heads, triton.cdiv(queries, options["BLOCK_Q"])), q, dq_ptr=dq, delta_ptr=delta,
            o_ptr=outputs.o, index_ptr=keys.kv_index, ONE=keys.longest <= options["BLOCK_N"], **stats,
            **_for_queries(options, seed is not None),
        )  # fmt: skip
    # tokens of no image have no program
    make = torch.empty if keys.cu_seqlens is None else torch.zeros
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (keys.k, keys.v))
    if (needs[1] or needs[2]) and dk.numel():
        order, ends = _rows_of_images(keys)
        tiles = triton.cdiv(keys.longest, options["BLOCK_N"])
        launch(
            _key_grad_kernel, (keys.images * heads, max(1, tiles)), q, dk_ptr=dk, dv_ptr=dv, delta_ptr=delta,
            order_ptr=order, ends_ptr=ends, **stats, **_for_keys(options, q.dtype.itemsize, seed is not None),
        )  # fmt: skip
    if one:
        dq = dq.sum(0, keepdim=True, dtype=accumulation_dtype(q.dtype)).to(q.dtype)
    return {"q": dq, "k": dk, "v": dv}


def _rows_of_images(keys: Keys) -> tuple[Tensor | None, Tensor | None]:
    if keys.kv_index is None:
        return None, None
    of, order = keys.kv_index.sort(stable=True)
    return order, torch.searchsorted(of, torch.arange(keys.images + 1, device=of.device))


# --- ahead of time --------------------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """BLIP-2's 32 queries over 257 tokens, SigLIP's one, Granite's windows of 3 and 15, and CoCa's 256, for
    `mmfuse compile-report`."""
    blip2 = {"B": 256, "H": 12, "Q": 32, "N": 257, "D": 64}
    for name in ("_attend_kernel", "_query_grad_kernel", "_key_grad_kernel"):
        yield _spec(name, "bf16 32 x 257 x 64", blip2, "half")
        yield _spec(name, "bf16 dropout", blip2, "half", seed_ptr="*i64")
        yield _spec(name, "bf16 3 x 15 x 64", {"B": 4096, "H": 16, "Q": 3, "N": 15, "D": 64}, None)
        yield _spec(name, "bf16 256 x 257 x 96", {"B": 64, "H": 8, "Q": 256, "N": 257, "D": 96}, "half")
        yield _spec(name, "tf32 32 x 257 x 64", blip2, "tf32", torch.float32)
    ragged = {"index_ptr": "*i64", "order_ptr": "*i64", "ends_ptr": "*i64", "cu_ptr": "*i64"}
    for name in ("_attend_kernel", "_query_grad_kernel", "_key_grad_kernel"):
        yield _spec(name, "bf16 packed, shared", blip2, "half", **ragged)


def _spec(
    name: str,
    variant: str,
    sizes: dict[str, int],
    dot: str | None,
    dtype: torch.dtype = torch.bfloat16,
    **given: str,
) -> Spec:
    kernel, d = globals()[name], sizes["D"]
    tile = _tile(sizes["Q"], sizes["N"], d, dtype.itemsize)
    drops = "seed_ptr" in given
    tile = _for_keys(tile, dtype.itemsize, drops) if name == "_key_grad_kernel" else tile
    tile = _for_queries(tile, drops) if name == "_query_grad_kernel" else tile
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants: dict[str, Any] = {"ACC": tl.float32, "PRECISION": "tf32" if dot == "tf32" else "ieee", "D": d, **tile}
    constants["ONE"] = sizes["N"] <= tile["BLOCK_N"]
    constants |= dict.fromkeys(("index_ptr", "order_ptr", "ends_ptr", "lengths_ptr", "cu_ptr", "seed_ptr"))
    of_data = "*fp32" if dtype == torch.float32 else "*bf16"
    types = dict.fromkeys(("o_ptr", "q_ptr", "k_ptr", "v_ptr", "g_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), of_data)
    types |= dict.fromkeys(("max_ptr", "sum_ptr", "delta_ptr"), "*fp32") | {"drop": "fp32", "scale": "fp32"} | given
    used = {n: v for n, v in constants.items() if n in kernel.arg_names and n not in given}
    signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in used}
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=variant,
        signature=signature,
        constants=used,
        num_warps=warps,
        num_stages=stages,
        aligned=tuple(n for n in signature if n.startswith("stride_")),
        dot=dot,
        work=_work(name, sizes, tile, dtype.itemsize),
        bounds=_BOUNDS.get((name, variant), {}),
    )


# instructions of a thread for each score, and of the main loop for each one of the tensor cores: a draw takes three
# quarters of the rest of a score
_BOUNDS = {
    ("_attend_kernel", "bf16 32 x 257 x 64"): {"loop": 42.0, "product": 66.0},
    ("_query_grad_kernel", "bf16 32 x 257 x 64"): {"loop": 40.0, "product": 42.0},
    ("_key_grad_kernel", "bf16 32 x 257 x 64"): {"loop": 42.0, "product": 45.0},
    ("_attend_kernel", "bf16 dropout"): {"loop": 72.0, "product": 116.0},
    ("_query_grad_kernel", "bf16 dropout"): {"loop": 73.0, "product": 39.0},
    ("_key_grad_kernel", "bf16 dropout"): {"loop": 83.0, "product": 89.0},
    ("_attend_kernel", "bf16 3 x 15 x 64"): {"outside": 530.0},
    ("_attend_kernel", "bf16 256 x 257 x 96"): {"loop": 52.0, "product": 42.0},
    ("_query_grad_kernel", "bf16 256 x 257 x 96"): {"loop": 51.0, "product": 28.0},
    ("_key_grad_kernel", "bf16 256 x 257 x 96"): {"loop": 76.0, "product": 21.0},
}


def _work(name: str, sizes: dict[str, int], tile: dict[str, int], itemsize: int) -> Work:
    b, h, q, n, d = (sizes[s] for s in "BHQND")
    products, blocks = {
        "_attend_kernel": (2, -(-q // tile["BLOCK_Q"])),
        "_query_grad_kernel": (3, -(-q // tile["BLOCK_Q"])),
        "_key_grad_kernel": (4, -(-n // tile["BLOCK_N"])),
    }[name]
    read = 2 * n + 2 * q + (0 if name == "_attend_kernel" else q + (2 * n if name == "_key_grad_kernel" else 0))
    padded = -(-n // tile["BLOCK_N"]) * tile["BLOCK_N"] * -(-q // tile["BLOCK_Q"]) * tile["BLOCK_Q"] * tile["BLOCK_D"]
    return Work(
        size=f"{b} x {h} heads, {q} x {n} x {d}",
        unit="score",
        units=b * h * q * n,
        programs=b * h * blocks,
        bytes=b * h * read * d * itemsize,
        flops=2 * b * h * padded * products,
    )
