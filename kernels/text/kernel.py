"""Text embedding in Triton: a token in one program, forward and backward; gradients of the table from sorted ids.

The sum over the tokens of an id is taken in two steps of fixed order, without atomics. Sorted ids form runs, which
`_CHUNK` boundaries cut into pieces: a piece is summed by one program, which writes the table's row if the piece is the
whole run, and otherwise leaves it to `_merge_kernel`, which adds up a run's pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, sqrt
from mmfuse.kernels.text.blocked import Words

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _summed(
    t, table_ptr, ids_ptr, shift_ptr, stride_v, stride_d, stride_s, L, V, D, scale,
    SHIFT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = scale E[id] + shift [BLOCK] of token t; NaN for an id that the table has not."""
    k = tl.arange(0, BLOCK)
    at = tl.load(ids_ptr + t)
    here = k < tl.where((at >= 0) & (at < V), D, 0)
    x = tl.load(table_ptr + at * stride_v + k * stride_d, mask=here, other=float("nan")).to(ACC) * scale
    if SHIFT:
        x += tl.load(shift_ptr + (t % L) * stride_s + k, mask=k < D, other=0.0)
    return tl.where(k < D, x, 0.0)


@triton.jit
def _embed_kernel(
    out_ptr,  # out [B, L, D], rows of its own stride
    mean_ptr,  # out [B L] if NORM
    rstd_ptr,  # out [B L] if NORM
    ids_ptr,  # [B L]
    table_ptr,  # [V, D]
    shift_ptr,  # [L, D], or [D] with stride_s = 0, if SHIFT
    gamma_ptr,  # [D] if GAMMA
    beta_ptr,  # [D] if BETA
    pad_ptr,  # [B L] if PAD
    stride_b,
    stride_l,
    stride_v,
    stride_d,
    stride_s,
    L,
    V,
    D,
    scale,
    eps,
    SHIFT: tl.constexpr,
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    PAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    y = _summed(
        t, table_ptr, ids_ptr, shift_ptr, stride_v, stride_d, stride_s, L, V, D, scale, SHIFT, ACC, BLOCK,
    )  # fmt: skip
    if NORM:
        mean = tl.sum(y, axis=0) / D
        y = tl.where(k < D, y - mean, 0.0)
        rstd = divide(1.0, sqrt(tl.sum(y * y, axis=0) / D + eps))
        y *= rstd
        tl.store(mean_ptr + t, mean)
        tl.store(rstd_ptr + t, rstd)
    if GAMMA:
        y *= tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(ACC)
    if BETA:
        y += tl.load(beta_ptr + k, mask=k < D, other=0.0).to(ACC)
    if PAD:
        y = tl.where(tl.load(pad_ptr + t), 0.0, y)
    out = out_ptr + t // L * stride_b + t % L * stride_l
    tl.store(out + k, y.to(out_ptr.dtype.element_ty), mask=k < D)


@triton.jit
def _norm_grad_kernel(
    dx_ptr,  # out [B L, D]
    sums_ptr,  # out [programs, 2, D], of g xhat and of g
    g_ptr,  # [B, L, D]
    mean_ptr,  # [B L]
    rstd_ptr,  # [B L]
    ids_ptr,  # [B L]
    table_ptr,  # [V, D]
    shift_ptr,  # [L, D], or [D] with stride_s = 0, if SHIFT
    gamma_ptr,  # [D] if GAMMA
    pad_ptr,  # [B L] if PAD
    stride_gb,
    stride_gl,
    stride_gd,
    stride_v,
    stride_d,
    stride_s,
    L,
    V,
    D,
    tokens,
    rows,  # tokens of a program
    scale,
    SHIFT: tl.constexpr,
    GAMMA: tl.constexpr,
    PAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    k = tl.arange(0, BLOCK)
    of_gamma, of_beta = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for t in range(first, tl.minimum(first + rows, tokens)):
        x = _summed(
            t, table_ptr, ids_ptr, shift_ptr, stride_v, stride_d, stride_s, L, V, D, scale, SHIFT, ACC, BLOCK,
        )  # fmt: skip
        rstd = tl.load(rstd_ptr + t)
        xhat = tl.where(k < D, (x - tl.load(mean_ptr + t)) * rstd, 0.0)
        g = g_ptr + t // L * stride_gb + t % L * stride_gl
        h = tl.load(g + k * stride_gd, mask=k < D, other=0.0).to(ACC)
        if PAD:
            h = tl.where(tl.load(pad_ptr + t), 0.0, h)
        of_gamma += h * xhat
        of_beta += h
        if GAMMA:
            h *= tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(ACC)
        d = (h - tl.sum(h, axis=0) / D - xhat * (tl.sum(h * xhat, axis=0) / D)) * rstd
        tl.store(dx_ptr + t * D + k, d.to(dx_ptr.dtype.element_ty), mask=k < D)
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * D + k
    tl.store(sums, of_gamma, mask=k < D)
    tl.store(sums + D, of_beta, mask=k < D)


@triton.jit
def _pieces_kernel(
    rows_ptr,  # in and out [V, D], zero before
    parts_ptr,  # out [2, chunks, D]: of a run's pieces that begin with the chunk, and within it
    dx_ptr,  # [T, D]
    order_ptr,  # [T], the tokens by id
    ids_ptr,  # [T], sorted
    begin_ptr,  # [T], where the run of a position begins
    end_ptr,  # [T], and ends
    T,
    V,
    D,
    padding_idx,
    chunks,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_ptr + t)
    key = tl.load(ids_ptr + t)
    if ((t == begin) | (t % CHUNK == 0)) & (key != padding_idx) & (key >= 0) & (key < V):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        end = tl.load(end_ptr + t)
        stop = tl.minimum(end, (t // CHUNK + 1) * CHUNK)
        total = tl.zeros((BLOCK,), ACC)
        for j in range(t, stop, BLOCK_T):
            at = j + tl.arange(0, BLOCK_T)
            token = tl.load(order_ptr + at, mask=at < stop, other=0)
            here = (at < stop)[:, None] & (k < D)[None, :]
            total += tl.sum(tl.load(dx_ptr + token[:, None] * D + k[None, :], mask=here, other=0.0).to(ACC), axis=0)
        out = parts_ptr + ((t % CHUNK != 0).to(tl.int64) * chunks + t // CHUNK) * D
        if (t == begin) & (stop == end):
            out = rows_ptr + key * D
        tl.store(out + k, total, mask=k < D)


@triton.jit
def _merge_kernel(
    rows_ptr,  # in and out [V, D]
    parts_ptr,  # [2, chunks, D]
    ids_ptr,  # [T], sorted
    begin_ptr,  # [T]
    end_ptr,  # [T]
    V,
    D,
    padding_idx,
    chunks,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last position of each chunk stands for the run that goes on from there: it is merged where it began."""
    chunk = tl.program_id(0).to(tl.int64)
    last = (chunk + 1) * CHUNK - 1
    begin, end = tl.load(begin_ptr + last), tl.load(end_ptr + last)
    key = tl.load(ids_ptr + last)
    if (begin // CHUNK == chunk) & (end > last + 1) & (key != padding_idx) & (key >= 0) & (key < V):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = (begin % CHUNK != 0).to(tl.int64) * chunks + chunk
        total = tl.load(parts_ptr + first * D + k, mask=k < D, other=0.0)
        stop = (end - 1) // CHUNK + 1
        for j in range(chunk + 1, stop, BLOCK_T):
            at = j + tl.arange(0, BLOCK_T)
            here = (at < stop)[:, None] & (k < D)[None, :]
            total += tl.sum(tl.load(parts_ptr + at[:, None] * D + k[None, :], mask=here, other=0.0), axis=0)
        tl.store(rows_ptr + key * D + k, total, mask=k < D)


# --- launches -------------------------------------------------------------------------------------------------------

_CHUNK = 8 if INTERPRET else 256  # tokens of an id that one program adds up
_TILE = {"BLOCK_T": 4 if INTERPRET else 16, "BLOCK": 128}
_TOKENS = 3 if INTERPRET else 64  # of a program of the LayerNorm's backward


def _settings(d: int, like: Tensor) -> dict[str, Any]:
    """A row in one program."""
    block = triton.next_power_of_2(max(d, 16))
    return {"ACC": accumulator(like.dtype), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def _shift(shift: Tensor | None) -> tuple[Tensor | None, int]:
    """What is added to a sample, and the distance of its rows."""
    if shift is None:
        return None, 0
    return shift.contiguous(), shift.shape[-1] if shift.dim() == 2 else 0


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def embedded(words: Words, out: Tensor) -> tuple[Tensor, Tensor]:
    (b, length, d), table, normed = words.shape, words.table, words.eps is not None
    new = {"dtype": accumulation_dtype(table.dtype), "device": table.device}
    mean, rstd = (torch.empty(words.ids.shape if normed else 0, **new) for _ in range(2))
    shift, stride_s = _shift(words.shift)
    if b * length:
        launch(
            _embed_kernel, (b * length,), table,
            out_ptr=out, mean_ptr=mean, rstd_ptr=rstd, ids_ptr=words.ids, table_ptr=table, shift_ptr=shift,
            gamma_ptr=_contiguous(words.gamma), beta_ptr=_contiguous(words.beta), pad_ptr=_contiguous(words.pad_mask),
            stride_b=out.stride(0), stride_l=out.stride(1), stride_v=table.stride(0), stride_d=table.stride(1),
            stride_s=stride_s, L=length, V=table.shape[0], D=d, scale=words.scale, eps=words.eps or 0.0,
            SHIFT=shift is not None, NORM=normed, GAMMA=words.gamma is not None, BETA=words.beta is not None,
            PAD=words.pad_mask is not None, **_settings(d, mean),
        )  # fmt: skip
    return mean, rstd


def norm_grad(g: Tensor, words: Words, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, length, d), table = words.shape, words.table
    tokens = b * length
    dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    programs = triton.cdiv(tokens, _TOKENS)
    sums = torch.empty(programs, 2, d, dtype=mean.dtype, device=g.device)
    shift, stride_s = _shift(words.shift)
    if tokens:
        stride_gb, stride_gl, stride_gd = g.stride()
        launch(
            _norm_grad_kernel, (programs,), g,
            dx_ptr=dx, sums_ptr=sums, g_ptr=g, mean_ptr=mean, rstd_ptr=rstd, ids_ptr=words.ids, table_ptr=table,
            shift_ptr=shift, gamma_ptr=_contiguous(words.gamma), pad_ptr=_contiguous(words.pad_mask),
            stride_gb=stride_gb, stride_gl=stride_gl, stride_gd=stride_gd, stride_v=table.stride(0),
            stride_d=table.stride(1), stride_s=stride_s, L=length, V=table.shape[0], D=d, tokens=tokens, rows=_TOKENS,
            scale=words.scale, SHIFT=shift is not None, GAMMA=words.gamma is not None, PAD=words.pad_mask is not None,
            **_settings(d, mean),
        )  # fmt: skip
    return dx, sums[:, 0].sum(0), sums[:, 1].sum(0)


def rows_summed(dx: Tensor, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor:
    d, tokens = dx.shape[-1], ids.numel()
    new = {"dtype": accumulation_dtype(dx.dtype), "device": dx.device}
    out = torch.zeros(rows, d, **new)
    if not tokens:
        return out
    keys, order = ids.reshape(-1).sort(stable=True)
    begin, end = torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True)
    chunks = triton.cdiv(tokens, _CHUNK)
    parts = torch.empty(2, chunks, d, **new)
    across = triton.cdiv(d, _TILE["BLOCK"])
    given = {
        "rows_ptr": out, "parts_ptr": parts, "ids_ptr": keys, "begin_ptr": begin, "end_ptr": end, "V": rows, "D": d,
        "padding_idx": -1 if padding_idx is None else padding_idx, "chunks": chunks,
        "CHUNK": _CHUNK, "ACC": accumulator(out.dtype), **_TILE,
    }  # fmt: skip
    launch(_pieces_kernel, (tokens, across), dx, dx_ptr=dx.contiguous(), order_ptr=order, T=tokens, **given)
    if chunks > 1:
        launch(_merge_kernel, (chunks - 1, across), dx, **given)
    return out


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """BERT's embeddings in bfloat16 and CLIP's in float32, for `mmfuse compile-report`."""
    yield _spec(_embed_kernel, "bf16", (80, 90, 100), NORM=True, GAMMA=True, BETA=True, PAD=True)
    yield _spec(_embed_kernel, "fp32", (90,), NORM=False, GAMMA=False, BETA=False, PAD=False)
    yield _spec(_norm_grad_kernel, "bf16", (80, 90, 100), GAMMA=True, PAD=True)
    yield _spec(_pieces_kernel, "bf16", (80, 90, 100))
    yield _spec(_merge_kernel, "bf16", (90,))


def _spec(kernel: Any, dtype: str, archs: tuple[int, ...], **constants: Any) -> Spec:
    row = "BLOCK_T" not in kernel.arg_names
    constants |= {"SHIFT": True} if row else {"CHUNK": 256, "BLOCK_T": 16}
    constants |= {"ACC": tl.float32, "BLOCK": 1024 if row else 128}
    acc = ("mean_ptr", "rstd_ptr", "shift_ptr", "sums_ptr", "rows_ptr", "parts_ptr")
    longs = ("ids_ptr", "order_ptr", "begin_ptr", "end_ptr")
    kinds = dict.fromkeys(acc, "*fp32") | dict.fromkeys(longs, "*i64")
    kinds |= {"pad_ptr": "*i1", "scale": "fp32", "eps": "fp32"}
    names = [n for n in kernel.arg_names if n not in constants]
    return Spec(
        kernel=f"{__name__}:{kernel.__name__}",
        variant=dtype,
        signature={n: kinds.get(n, "*" + dtype if n.endswith("_ptr") else "i32") for n in names},
        constants=constants,
        aligned=tuple(n for n in names if n == "D" or n.startswith("stride_") and not n.endswith("d")),
        archs=archs,
    )
