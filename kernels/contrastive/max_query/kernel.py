"""The largest similarity over the queries in Triton: the products stay on the chip, forward and backward.

For query vectors q [B, Q, D] and texts t [N, D]:

    maximum      u_ij = max_k <q_ik, t_j> and k*_ij, the first k that reaches it, in the epilogue of the product
    gradient     dq = A t with A_(ik)j = [k*_ij = k] g_ij made in registers,   dt_j = sum_i g_ij q_i,k*_ij gathered

The queries are padded to a power of two with copies of the last, which never win. A sum has one owner, or parts
that are added in a fixed order: no atomics, two runs are equal bitwise.
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
from mmfuse.kernels._triton.tiles import accumulator, aligned_rows, input_precision, whole
from mmfuse.kernels.contrastive.max_query.blocked import index_dtype

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "N", "Q"])
def _query_max_kernel(
    u_ptr,  # out [B, N]
    k_ptr,  # out [B, N]
    q_ptr,  # [B Q, D]
    t_ptr,  # [N, D]
    stride_q,
    stride_t,
    D,
    B,
    N,
    Q,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_N: tl.constexpr,
    QUERIES: tl.constexpr,  # Q padded
    IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    N = whole(N, EVEN_N)
    tiles_n = tl.cdiv(N, BLOCK_N)
    image0, text0 = tl.program_id(0) // tiles_n * IMAGES, tl.program_id(0) % tiles_n * BLOCK_N
    q_ptr += (image0.to(tl.int64) * Q) * stride_q
    t_ptr += text0.to(tl.int64) * stride_t
    column = tl.arange(0, IMAGES * QUERIES)
    image = tl.minimum(column // QUERIES, B - 1 - image0)
    query = tl.minimum(column % QUERIES, Q - 1)
    c = tl.arange(0, BLOCK_D)
    at_q = (image * Q + query)[None, :] * stride_q + c[:, None]
    at_t = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - text0)[:, None] * stride_t + c[None, :]
    s = tl.zeros((BLOCK_N, IMAGES * QUERIES), dtype=ACC)
    for c0 in range(0, D, BLOCK_D):
        if EVEN_D:
            t = tl.load(t_ptr + at_t)
            q = tl.load(q_ptr + at_q)
        else:
            t = tl.load(t_ptr + at_t, mask=c[None, :] < D - c0, other=0.0)
            q = tl.load(q_ptr + at_q, mask=c[:, None] < D - c0, other=0.0)
        s = tl.dot(t, q, s, input_precision=PRECISION, out_dtype=ACC)
        t_ptr += BLOCK_D
        q_ptr += BLOCK_D
    # a NaN is the largest, as in torch, and so is an infinity, of which the loss is NaN anyway
    s = tl.reshape(tl.where(s == s, s, float("inf")), (BLOCK_N, IMAGES, QUERIES))
    u, k = tl.max(s, axis=2, return_indices=True, return_indices_tie_break_left=True)
    u = tl.where(u == float("inf"), float("nan"), u)
    images, texts = tl.arange(0, IMAGES), text0 + tl.arange(0, BLOCK_N)
    at = images[None, :] * N + texts[:, None]
    inside = (images < B - image0)[None, :] & (texts < N)[:, None]
    tl.store(u_ptr + image0.to(tl.int64) * N + at, u, mask=inside)
    tl.store(k_ptr + image0.to(tl.int64) * N + at, k.to(k_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "N", "Q"])
def _queries_grad_kernel(
    dq_ptr,  # out [B Q, D]
    g_ptr,  # [B, N]
    k_ptr,  # [B, N]
    t_ptr,  # [N, D]
    peak_ptr,  # [] if SCALED: dq is this many times A t
    stride_t,
    D,
    B,
    N,
    Q,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    QUERIES: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    N = whole(N, EVEN_N)
    image0 = tl.program_id(0) * IMAGES
    images, texts = image0 + tl.arange(0, IMAGES), tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # int64 up to the tile, int32 within, for half the registers
    g_ptr += image0.to(tl.int64) * N
    k_ptr += image0.to(tl.int64) * N
    at = tl.arange(0, IMAGES)[:, None] * N + texts[None, :]
    at_t = texts[:, None] * stride_t + columns[None, :]
    dq = tl.zeros((IMAGES * QUERIES, BLOCK_D), dtype=ACC)
    for j0 in range(0, N, BLOCK_N):
        inside = (images < B)[:, None] & (texts < N - j0)[None, :]
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0).to(tl.int32)
        a = tl.where(k[:, None, :] == tl.arange(0, QUERIES)[None, :, None], g[:, None, :], 0.0)
        a = tl.reshape(a.to(t_ptr.dtype.element_ty), (IMAGES * QUERIES, BLOCK_N))
        t = tl.load(t_ptr + at_t, mask=(texts < N - j0)[:, None] & (columns < D)[None, :], other=0.0)
        dq = tl.dot(a, t, dq, input_precision=PRECISION, out_dtype=ACC)
        g_ptr += BLOCK_N
        k_ptr += BLOCK_N
        t_ptr += BLOCK_N * stride_t
    if SCALED:
        dq *= tl.load(peak_ptr)
    row = tl.arange(0, IMAGES * QUERIES)
    image, query = row // QUERIES, row % QUERIES
    out = dq_ptr + image0.to(tl.int64) * Q * D + (image * Q + query)[:, None] * D + columns[None, :]
    inside = ((image < B - image0) & (query < Q))[:, None] & (columns < D)[None, :]
    tl.store(out, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "N", "Q", "images"])
def _texts_grad_kernel(
    parts_ptr,  # out [programs on axis 2, N, D]
    g_ptr,  # [B, N]
    k_ptr,  # [B, N]
    q_ptr,  # [B Q, D]
    stride_q,
    D,
    B,
    N,
    Q,
    images,  # per part
    ACC: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    N = whole(N, EVEN_N)
    texts = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (texts < N)[:, None] & (columns < D)[None, :]
    first = tl.program_id(2) * images
    g_ptr += first.to(tl.int64) * N
    k_ptr += first.to(tl.int64) * N
    q_ptr += first.to(tl.int64) * Q * stride_q
    dt = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    for _ in range(first, tl.minimum(first + images, B)):
        g = tl.load(g_ptr + texts, mask=texts < N, other=0.0)
        k = tl.load(k_ptr + texts, mask=texts < N, other=0).to(tl.int32)
        q = tl.load(q_ptr + k[:, None] * stride_q + columns[None, :], mask=inside, other=0.0)
        dt += g[:, None] * q.to(ACC)
        g_ptr += N
        k_ptr += N
        q_ptr += Q * stride_q
    out = parts_ptr + (tl.program_id(2).to(tl.int64) * N + texts)[:, None] * D + columns[None, :]
    tl.store(out, dt, mask=inside)


# --- launches -------------------------------------------------------------------------------------------------------

# rows and columns of a tile: `columns` queries of one or several images; chosen to compile without spills, not measured
_TILES: dict[str, dict[str, dict[str, int]]] = {
    "half": {
        "max": {"columns": 128, "BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
        "queries": {"columns": 64, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3},
    },
    "tf32": {
        "max": {"columns": 128, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
        "queries": {"columns": 64, "BLOCK_N": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
    },
    # no tensor cores
    "ieee": {
        "max": {"columns": 64, "BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},
        "queries": {"columns": 64, "BLOCK_N": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2},
    },
}
# with few queries a tile has many images, each with its own row of g
_FEW = {"max": {}, "queries": {"BLOCK_N": 32, "num_warps": 8}}
# with many, one image has more columns than the tile was made for: fewer rows, more threads
_MANY = {"max": {"BLOCK_N": 64, "num_warps": 8}, "queries": {"BLOCK_D": 64, "num_warps": 8}}
_TEXTS = {"BLOCK_N": 32, "BLOCK_D": 128, "num_warps": 4}
# the gathered sum over images is split until there are this many programs
_PROGRAMS = 1024


def _tile(kernel: str, kind: str, queries: int, odd: bool = False) -> dict[str, int]:
    tile = dict(_TILES[kind][kernel])
    if odd:  # masks take registers
        tile["BLOCK_D"] = min(tile["BLOCK_D"], 32)
    # a constant of the kernels, also where a trace has it as a symbol
    padded = triton.next_power_of_2(int(queries))
    tile |= _MANY[kernel] if padded >= 128 else _FEW[kernel] if padded < 16 and kind == "half" else {}
    return tile | {"QUERIES": padded, "IMAGES": max(1, tile.pop("columns") // padded)}


def _kind(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else input_precision(dtype)


def _rows(image: Tensor) -> Tensor:
    """[B Q, D] for whole-vector loads, with no stride by which 256 rows are beyond int32."""
    return aligned_rows(image.contiguous().flatten(0, 1))


def maximum(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """(u [B, N] in the accumulation dtype, k* [B, N])."""
    (b, queries, _), n = image.shape, text.shape[0]
    u = torch.empty(b, n, dtype=accumulation_dtype(image.dtype), device=image.device)
    k = torch.empty(b, n, dtype=index_dtype(queries), device=image.device)
    if not u.numel():
        return u, k
    q, t = _rows(image), aligned_rows(text)
    tile = _tile("max", _kind(q.dtype), queries, odd=bool(q.shape[1] % 64 or n % 16))
    grid = (triton.cdiv(b, tile["IMAGES"]) * triton.cdiv(n, tile["BLOCK_N"]),)
    launch(
        _query_max_kernel, grid, q,
        u_ptr=u, k_ptr=k, q_ptr=q, t_ptr=t, stride_q=q.stride(0), stride_t=t.stride(0), D=q.shape[1], B=b, N=n,
        Q=queries, ACC=accumulator(q.dtype), PRECISION=input_precision(q.dtype),
        EVEN_D=bool(q.shape[1] % tile["BLOCK_D"] == 0), EVEN_N=bool(n % 16 == 0), **tile,
    )  # fmt: skip
    return u, k


def gradient(
    g: Tensor, k: Tensor, image: Tensor, text: Tensor, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    """(dq [B, Q, D], dt [N, D]) for g [B, N] in the accumulation dtype; what is not needed is empty.

    Extra memory: the parts of dt, 4 N D bytes each, at most 1024 programs in all: 17 MB, or one dt.
    """
    (b, queries, d), n = image.shape, text.shape[0]
    new = torch.empty if g.numel() else torch.zeros
    dq = new(image.shape if need_image else (0,), dtype=image.dtype, device=image.device)
    dt = new(text.shape if need_text else (0,), dtype=text.dtype, device=text.device)
    if not g.numel():
        return dq, dt
    if need_image:
        t = aligned_rows(text)
        # what is small beside the largest would be subnormal in float16
        scaled = t.dtype == torch.float16
        peak = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny) if scaled else g
        tile = _tile("queries", _kind(t.dtype), queries)
        launch(
            _queries_grad_kernel, (triton.cdiv(b, tile["IMAGES"]), triton.cdiv(d, tile["BLOCK_D"])), g,
            dq_ptr=dq, g_ptr=g / peak if scaled else g, k_ptr=k, t_ptr=t, peak_ptr=peak, stride_t=t.stride(0),
            D=d, B=b, N=n, Q=queries, SCALED=scaled, ACC=accumulator(t.dtype), PRECISION=input_precision(t.dtype),
            EVEN_N=bool(n % 16 == 0), **tile,
        )  # fmt: skip
    if need_text:
        q = _rows(image)
        tiles = triton.cdiv(n, _TEXTS["BLOCK_N"]), triton.cdiv(d, _TEXTS["BLOCK_D"])
        images = triton.cdiv(b, max(1, _PROGRAMS // (tiles[0] * tiles[1])))
        parts = torch.empty(triton.cdiv(b, images), n, d, dtype=g.dtype, device=g.device)
        launch(
            _texts_grad_kernel, (*tiles, parts.shape[0]), g,
            parts_ptr=parts, g_ptr=g, k_ptr=k, q_ptr=q, stride_q=q.stride(0), D=d, B=b, N=n, Q=queries, images=images,
            ACC=accumulator(q.dtype), EVEN_N=bool(n % 16 == 0), **_TEXTS,
        )  # fmt: skip
        dt = parts.sum(0).to(text.dtype)
    return dq, dt


# --- ahead-of-time compilation --------------------------------------------------------------------------------------

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_specs() -> Iterator[Spec]:
    """Every kernel at every kind of operand, from 1 to 256 queries, for `mmfuse compile-report`."""
    for dtype, precision in (
        (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    ):  # fmt: skip
        kind = "half" if dtype.itemsize == 2 else precision
        dot = kind if kind != "ieee" else None
        for queries in {torch.bfloat16: (1, 32, 128, 256), torch.float16: (32,)}.get(dtype, (1, 32, 256)):
            more = {"ACC": tl.float32, "PRECISION": precision, "EVEN_N": True}
            variant = f"{queries} queries"
            tile = _tile("max", kind, queries)
            yield _spec("_query_max_kernel", variant, dtype, more | tile | {"EVEN_D": True}, dot)
            if queries == 32 and dtype == torch.bfloat16:
                odd = more | _tile("max", kind, queries, odd=True) | {"EVEN_D": False, "EVEN_N": False}
                yield _spec("_query_max_kernel", variant + " odd D, odd N", dtype, odd, dot)
            tile = _tile("queries", kind, queries)
            more |= tile | {"SCALED": dtype == torch.float16}
            yield _spec("_queries_grad_kernel", variant, dtype, more, dot)
            if queries == 32 and dtype == torch.bfloat16:
                yield _spec("_queries_grad_kernel", variant + " odd D, odd N", dtype, more | {"EVEN_N": False}, dot)
        if precision == "ieee":
            more = {"ACC": tl.float32, "PRECISION": precision, "EVEN_N": True}
            yield _spec("_texts_grad_kernel", "", dtype, more | _TEXTS, None)


def _spec(name: str, variant: str, dtype: torch.dtype, options: dict[str, Any], dot: str | None) -> Spec:
    kernel = globals()[name]
    constants = {n: v for n, v in options.items() if n in kernel.arg_names}
    pointers = {"k_ptr": "*u8"} | dict.fromkeys(("q_ptr", "t_ptr", "dq_ptr"), "*" + _SHORT[dtype])
    signature = {
        n: pointers.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in constants
    }
    precision = f"-{options['PRECISION']}" if dtype == torch.float32 and "PRECISION" in constants else ""
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=" ".join(v for v in (_SHORT[dtype] + precision, variant) if v),
        signature=signature,
        constants=constants,
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 3),
        aligned=tuple(n for n in signature if n.startswith("stride_") or (n == "D" and "odd" not in variant)),
        dot=dot,
        work=_work(options, dtype) if name == "_query_max_kernel" else None,
    )


def _work(options: dict[str, Any], dtype: torch.dtype) -> Work:
    """BLIP-2's batch: 100 images and the texts of 16 ranks; 5 bytes are written for each pair."""
    queries = options["QUERIES"]
    tile = options | {"BLOCK_M": queries * options["IMAGES"]}
    return Work.of_product("score", 100 * queries, 1600, 256, tile, dtype.itemsize, written=5 / queries)
