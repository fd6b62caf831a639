"""One streaming pass over keys and queue in Triton: two online softmaxes over each tile of logits, none of it stored.

For a block of queries x and of the teacher's x_m, over a range of keys K (flash-decoding: B is small, so the keys are
split between programs, and a second kernel merges what they found in a fixed order):

    S = x KT / tau,    m = max S,    l = sum exp(S - m),    O = sum exp(S - m) K        likewise S', m', l', O' of x_m
    c = sum exp(S' - m') S            t = sum of S over the positives            n = their number

    row = alpha (m + log l - c / l') + (1 - alpha) (m + log l - t / n)
    g   = alpha (O / l - O' / l') + (1 - alpha) (O / l - y / n)             y = sum of the positives' keys
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
from mmfuse.kernels._triton.tiles import accumulator, divide, exp
from mmfuse.kernels.contrastive.negatives.kernel import hard_negatives
from mmfuse.kernels.contrastive.queue.blocked import Directions

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_step(s, k, m, l, o, GRAD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # noqa: E741
    """(exp(S - m), the factor of what was summed before, m, l, O) with the columns `s` and their keys `k` taken in."""
    new = tl.maximum(m, tl.max(s, axis=1))
    p = exp(s - new[:, None])
    shrink = exp(m - new)
    l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
    if GRAD:
        o = tl.dot(p.to(k.dtype), k, o * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return p, shrink, new, l, o


@triton.jit(do_not_specialize=["B", "K", "M", "tiles"])
def _scan_kernel(
    part_ptr,  # out [W, splits, 7, B]: m, l, m', l', c, t, n
    o_ptr,  # out [W, splits, 3, B, D]: O, O', y; if GRAD
    x_ptr,  # [W, B, D]
    x_m_ptr,  # [W, B, D] if TEACHER
    keys_ptr,  # [W, K, D]
    queue_ptr,  # [M, D]
    other_queue_ptr,  # [M, D] of direction 1
    temp_ptr,  # []
    ids_ptr,  # [B] if IDS
    key_ids_ptr,  # [K] if IDS
    queue_ids_ptr,  # [M] if IDS
    stride_x,
    stride_x_m,
    stride_k,
    stride_kd,
    stride_q,
    stride_qd,
    B,
    K,
    M,
    D,
    tiles,  # of a program
    PAIRED: tl.constexpr,
    IDS: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row0, split, way = tl.program_id(0) * BLOCK_B, tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_ptr += way * B * stride_x
    x_m_ptr += way * B * stride_x_m
    keys_ptr += way * K * stride_k
    queue_ptr = tl.where(way == 0, queue_ptr, other_queue_ptr)
    rows, d = row0 + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    inside = (rows < B)[:, None] & (d < D)[None, :]
    inv_temp = divide(1.0, tl.load(temp_ptr))
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + d[None, :], mask=inside, other=0.0)
    x_m = x
    if TEACHER:
        x_m = tl.load(x_m_ptr + rows[:, None].to(tl.int64) * stride_x_m + d[None, :], mask=inside, other=0.0)
    if IDS:
        row_ids = tl.load(ids_ptr + rows, mask=rows < B, other=0)

    m, m_t = tl.full((BLOCK_B,), float("-inf"), ACC), tl.full((BLOCK_B,), float("-inf"), ACC)
    l, l_t, c, t, n = (tl.zeros((BLOCK_B,), ACC),) * 5  # noqa: E741
    o = tl.zeros((BLOCK_B, BLOCK_D if GRAD else 1), ACC)
    o_t = tl.zeros((BLOCK_B, BLOCK_D if GRAD and TEACHER else 1), ACC)
    y = tl.zeros((BLOCK_B, BLOCK_D if GRAD and IDS else 1), ACC)
    # the keys' tiles, and after them the queue's
    tiles_k = tl.cdiv(K, BLOCK_N)
    for tile in range(split * tiles, tl.minimum(split * tiles + tiles, tiles_k + tl.cdiv(M, BLOCK_N))):
        own = tile < tiles_k
        source_ptr, N = tl.where(own, keys_ptr, queue_ptr), tl.where(own, K, M)
        stride, stride_d = tl.where(own, stride_k, stride_q), tl.where(own, stride_kd, stride_qd)
        cols = tl.where(own, tile, tile - tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = cols[:, None].to(tl.int64) * stride + d[None, :].to(tl.int64) * stride_d
        inside_k = (cols < N)[:, None] if EVEN_D else (cols < N)[:, None] & (d < D)[None, :]
        k = tl.load(source_ptr + at, mask=inside_k, other=0.0).to(x.dtype)
        s = tl.dot(x, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * inv_temp
        if PAIRED:
            if IDS:
                col_ids = tl.load(tl.where(own, key_ids_ptr, queue_ids_ptr) + cols, mask=cols < N, other=0)
                same = (row_ids[:, None] == col_ids[None, :]) & (cols < N)[None, :]
                if GRAD:
                    y = tl.dot(same.to(k.dtype), k, y, input_precision=PRECISION, out_dtype=ACC)
            else:
                same = (rows[:, None] == cols[None, :]) & own
            t += tl.sum(tl.where(same, s, 0.0), axis=1)
            n += tl.sum(same.to(ACC), axis=1)
        s = tl.where((cols < N)[None, :], s, float("-inf"))
        _, _, m, l, o = _softmax_step(s, k, m, l, o, GRAD, PRECISION, ACC)  # noqa: E741
        if TEACHER:
            s_t = tl.dot(x_m, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * inv_temp
            s_t = tl.where((cols < N)[None, :], s_t, float("-inf"))
            p, shrink, m_t, l_t, o_t = _softmax_step(s_t, k, m_t, l_t, o_t, GRAD, PRECISION, ACC)
            c = c * shrink + tl.sum(p * tl.where((cols < N)[None, :], s, 0.0), axis=1)

    part = way * tl.num_programs(1) + split
    at = part_ptr + part * 7 * B + rows
    tl.store(at, m, mask=rows < B)
    tl.store(at + B, l, mask=rows < B)
    tl.store(at + 2 * B, m_t, mask=rows < B)
    tl.store(at + 3 * B, l_t, mask=rows < B)
    tl.store(at + 4 * B, c, mask=rows < B)
    tl.store(at + 5 * B, t, mask=rows < B)
    tl.store(at + 6 * B, n, mask=rows < B)
    if GRAD:
        at_o = o_ptr + (part * 3 * B + rows)[:, None] * D + d[None, :]
        tl.store(at_o, o, mask=inside)
        if TEACHER:
            tl.store(at_o + B.to(tl.int64) * D, o_t, mask=inside)
        if IDS:
            tl.store(at_o + 2 * B.to(tl.int64) * D, y, mask=inside)


@triton.jit
def _weights(part_ptr, stat, split, B, row, splits):
    """(m, exp(m_s - m) [splits]) of the splits' maxima m_s."""
    m_s = tl.load(part_ptr + (split * 7 + stat) * B + row, mask=split < splits, other=float("-inf"))
    m = tl.max(m_s, axis=0)
    return m, exp(m_s - m)


@triton.jit
def _weighted(part_ptr, stat, w, split, B, row, splits):
    return tl.sum(w * tl.load(part_ptr + (split * 7 + stat) * B + row, mask=split < splits, other=0.0), axis=0)


@triton.jit(do_not_specialize=["B", "K", "splits"])
def _merge_kernel(
    row_ptr,  # out [W, B]
    g_ptr,  # out [W, B, D] if GRAD
    part_ptr,  # [W, splits, 7, B]
    o_ptr,  # [W, splits, 3, B, D] if GRAD
    keys_ptr,  # [W, K, D], key i of row i; if GRAD and PAIRED and not IDS
    alpha_ptr,  # []
    stride_k,
    stride_kd,
    B,
    K,
    D,
    splits,
    PAIRED: tl.constexpr,
    IDS: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, way = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row_ptr += way * B
    part_ptr += way * splits * 7 * B
    if GRAD:
        g_ptr += way * B * D
        o_ptr += way * splits * 3 * B * D
        keys_ptr += way * K * stride_k
    split = tl.arange(0, SPLITS)
    alpha = tl.load(alpha_ptr)
    m, w = _weights(part_ptr, 0, split, B, row, splits)
    l = _weighted(part_ptr, 1, w, split, B, row, splits)  # noqa: E741
    loss, m_t, l_t, hard, n = m + tl.log(l), m, l, alpha, l
    if PAIRED:
        w = tl.full((SPLITS,), 1.0, ACC)
        n = _weighted(part_ptr, 6, w, split, B, row, splits)
        # a row without a match has no hard targets
        hard = tl.where(n > 0, 1.0 - alpha, 0.0)
        n = tl.maximum(n, 1.0)
        loss = hard * (tl.log(l) + (m - _weighted(part_ptr, 5, w, split, B, row, splits) / n))
        if TEACHER:
            m_t, w_t = _weights(part_ptr, 2, split, B, row, splits)
            l_t = _weighted(part_ptr, 3, w_t, split, B, row, splits)
            loss += alpha * (tl.log(l) + (m - _weighted(part_ptr, 4, w_t, split, B, row, splits) / l_t))
    tl.store(row_ptr + row, loss)
    if GRAD:
        d = tl.arange(0, BLOCK_D)
        o, o_t, y = tl.zeros((BLOCK_D,), ACC), tl.zeros((BLOCK_D,), ACC), tl.zeros((BLOCK_D,), ACC)
        at, at_o, size = part_ptr + row, o_ptr + row * D + d, B.to(tl.int64) * D
        for _ in range(0, splits):
            o += exp(tl.load(at) - m) * tl.load(at_o, mask=d < D, other=0.0)
            if TEACHER:
                o_t += exp(tl.load(at + 2 * B) - m_t) * tl.load(at_o + size, mask=d < D, other=0.0)
            if IDS:
                y += tl.load(at_o + 2 * size, mask=d < D, other=0.0)
            at += 7 * B
            at_o += 3 * size
        p, inverse = o * divide(1.0, l), divide(1.0, n)
        g = p
        if PAIRED:
            if not IDS:
                y = tl.load(keys_ptr + row * stride_k + d.to(tl.int64) * stride_kd, mask=d < D, other=0.0).to(ACC)
            g = hard * (p - y * inverse)
            if TEACHER:
                g += alpha * (p - o_t * divide(1.0, l_t))
        tl.store(g_ptr + row * D + d, g, mask=d < D)


# --- launches -------------------------------------------------------------------------------------------------------


def _tile(block_b: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_B": block_b, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


_INTERPRETED = _tile(16, 16, 1, 1)
# what fits the registers without a spill, by the bits of queries and keys and BLOCK_D; ids are a third accumulator
_TILES = {
    (16, 16, False): {128: _tile(32, 64, 8, 2), 256: _tile(32, 64, 8, 2), 512: _tile(16, 32, 8, 2)},
    (16, 16, True): {128: _tile(32, 64, 8, 2), 256: _tile(16, 64, 8, 2), 512: _tile(16, 16, 8, 2)},
    (16, 32, False): {128: _tile(32, 64, 8, 2), 256: _tile(32, 32, 8, 2)},
    (16, 32, True): {128: _tile(32, 32, 8, 2), 256: _tile(16, 32, 8, 2)},
    (32, 32, False): {128: _tile(32, 32, 8, 2), 256: _tile(16, 32, 8, 2)},
    (32, 32, True): {128: _tile(16, 32, 8, 2), 256: _tile(16, 16, 8, 1)},
}


def scan(given: Directions, paired: bool, need: bool) -> tuple[Tensor, Tensor]:
    """(row [W, B], g [W, B, D]) as `blocked.scan`, in one launch.

    Extra memory: 12 W B D bytes for each split of the keys; with one program per multiprocessor 26 MB at B = 64,
    D = 256 on 132 of them.
    """
    x, keys, queues = given.query, given.keys, given.queues
    (ways, b, dim), k, m, acc = x.shape, keys.shape[1], queues[0].shape[0], accumulation_dtype(x.dtype)
    new = {"dtype": acc, "device": x.device}
    row, g = torch.zeros(ways, b, **new), torch.zeros(x.shape if need else 0, **new)
    if not b or not k + m:
        return (row if paired else row.fill_(-torch.inf)), g
    x, keys = _rows(x), keys.to(x.dtype).to(queues[0].dtype)
    block_d = max(16 if INTERPRET else 128, triton.next_power_of_2(int(dim)))
    bits = (8 * x.dtype.itemsize, 8 * queues[0].dtype.itemsize)
    tile = _INTERPRETED if INTERPRET else _TILES[(*bits, given.ids is not None)][block_d]
    blocks = triton.cdiv(b, tile["BLOCK_B"])
    total = triton.cdiv(k, tile["BLOCK_N"]) + triton.cdiv(m, tile["BLOCK_N"])
    wanted = 3
    if not INTERPRET:
        wanted = max(1, torch.cuda.get_device_properties(x.device).multi_processor_count // (blocks * ways))
    tiles = triton.cdiv(total, wanted)
    splits = int(triton.cdiv(total, tiles))
    part = torch.empty(ways, splits, 7, b, **new)
    o = torch.empty((ways, splits, 3, b, dim) if need else 1, **new)
    flags = {
        "PAIRED": paired,
        "IDS": given.ids is not None,
        "TEACHER": given.query_m is not None,
        "GRAD": need,
        "ACC": accumulator(acc),
        "BLOCK_D": block_d,
    }
    x_m = x if given.query_m is None else _rows(given.query_m)
    of_keys = {"keys_ptr": keys, "stride_k": keys.stride(1), "stride_kd": keys.stride(2), "B": b, "K": k, "D": dim}
    launch(
        _scan_kernel, (blocks, splits, ways), x,
        part_ptr=part, o_ptr=o, x_ptr=x, x_m_ptr=x_m, queue_ptr=queues[0], other_queue_ptr=queues[-1],
        temp_ptr=given.temp, ids_ptr=given.ids, key_ids_ptr=given.key_ids, queue_ids_ptr=given.queue_ids,
        stride_x=x.stride(1), stride_x_m=x_m.stride(1), stride_q=queues[0].stride(0), stride_qd=queues[0].stride(1),
        M=m, tiles=tiles, EVEN_D=bool(dim == block_d),
        PRECISION="tf32" if x.dtype == torch.float32 and not INTERPRET else "ieee", **of_keys, **flags, **tile,
    )  # fmt: skip
    launch(
        _merge_kernel, (b, ways), x,
        row_ptr=row, g_ptr=g, part_ptr=part, o_ptr=o, alpha_ptr=given.alpha, splits=splits,
        SPLITS=triton.next_power_of_2(splits), **of_keys, **flags,
    )  # fmt: skip
    return row, g


def scan_and_draw(
    given: Directions, need: bool, k: int, mixture: float, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `blocked.scan_and_draw`; the draws come from a pass of their own."""
    return *scan(given, True, need), given.drawn(hard_negatives, k, mixture, seeds)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


# --- ahead-of-time compilation --------------------------------------------------------------------------------------

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_IDS = ("ids_ptr", "key_ids_ptr", "queue_ids_ptr")
_INTEGERS = ("B", "K", "M", "D", "tiles", "splits")


def aot_specs() -> Iterator[Spec]:
    """The heaviest variants of both kernels at every width that ships, for `mmfuse compile-report`."""
    on = {"PAIRED": True, "TEACHER": True, "GRAD": True}
    for (bits, key_bits, ids), tiles in _TILES.items():
        dtype, keys = ({16: torch.bfloat16, 32: torch.float32}[k] for k in (bits, key_bits))
        for block_d, tile in tiles.items():
            options = on | {"IDS": ids, "EVEN_D": True, "BLOCK_D": block_d} | tile
            yield _spec("_scan_kernel", dtype, keys, options)
    options |= {"IDS": False, "BLOCK_D": 256} | _TILES[16, 16, False][256]
    yield _spec("_scan_kernel", torch.float16, torch.float16, options)
    yield _spec("_scan_kernel", torch.bfloat16, torch.bfloat16, options | {"GRAD": False, "TEACHER": False})
    yield _spec("_scan_kernel", torch.bfloat16, torch.bfloat16, options | {"EVEN_D": False})
    merge = on | {"IDS": True, "SPLITS": 256, "BLOCK_D": 256, "num_warps": 4, "num_stages": 3}
    yield _spec("_merge_kernel", torch.bfloat16, torch.bfloat16, merge)


def _spec(name: str, dtype: torch.dtype, keys: torch.dtype, options: dict[str, Any]) -> Spec:
    kernel = globals()[name]
    options = {"PRECISION": "tf32" if dtype == torch.float32 else "ieee"} | options
    constants = {k: v for k, v in ({"ACC": tl.float32} | options).items() if k in kernel.arg_names}
    constants |= {n: 1 for n in ("stride_kd", "stride_qd") if n in kernel.arg_names}
    if not options["IDS"]:
        constants |= {n: None for n in _IDS if n in kernel.arg_names}
    pointers = dict.fromkeys(("x_ptr", "x_m_ptr"), "*" + _SHORT[dtype]) | dict.fromkeys(_IDS, "*i64")
    pointers |= dict.fromkeys(("keys_ptr", "queue_ptr", "other_queue_ptr"), "*" + _SHORT[keys])
    signature = {
        n: "i32" if n in _INTEGERS or n.startswith("stride_") else pointers.get(n, "*fp32")
        for n in kernel.arg_names
        if n not in constants
    }
    precision = "-tf32" if dtype == torch.float32 else ""
    variant = [_SHORT[dtype] + precision, f"D={options['BLOCK_D']}"]
    variant += ["ids"] * options["IDS"] + ["loss"] * (not options["GRAD"]) + ["fp32 keys"] * (keys != dtype)
    variant += ["odd D"] * (not options.get("EVEN_D", True))
    return Spec(
        kernel=f"{__name__}:{name}",
        variant=" ".join(variant),
        signature=signature,
        constants=constants,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        aligned=tuple(n for n in signature if n == "D" or n.startswith("stride_")),
        work=_work(options, keys) if name == "_scan_kernel" else None,
    )


def _work(options: dict[str, Any], keys: torch.dtype) -> Work:
    """A direction: the logits of x and x_m, and the sums of keys that their probabilities weight."""
    products = (1 + options["TEACHER"]) * (1 + options["GRAD"])
    tile = options | {"BLOCK_M": options["BLOCK_B"]}
    return Work.of_product(
        "logit", 64, 65536, options["BLOCK_D"], tile, keys.itemsize, products=products, streamed=True
    )
