"""Nearest code and code statistics in Triton.

    s_ik = scale_k <z_i, w_k> + bias_k = <x_i, y_k>     x, y: float16 at unit size, the bias as columns; never stored

`sizes`, `operands`: L = max |scale_k w_k|, B = max |bias_k|, and with powers of two that put a score into +-2^27

    x_i = 2^p z_i, 2^u, 2^u, 2^14       y_k = 2^q scale_k w_k, hi, lo of 2^t bias_k, 0: -2^14 past the last code
    2^(p+q) (|z_i| L + B), 2^q L, 2^t B in [2^26, 2^27), [2^13, 2^14), [2^13, 2^14),     u = p + q - t

`search`: a group is the codes of a tile that are equal mod SLOTS, all in one thread. Each slot keeps the largest of its
groups' maxima, with the tile in its low bits, and the largest of its other groups. What may be the largest score are
the groups within the slack, twice what a score may be wrong by; four slots are looked at.
`settle`: their codes in float64. A row with more of them than that is scanned.
`total`: rows in the order of their codes, a program for each code. No atomics: two runs are equal bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime import configs
from mmfuse.kernels._runtime.aot import Candidate, Spec, Work
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import neighbours
from mmfuse.kernels.codebook.blocked import segments

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _exponent(v):
    """floor(log2 v) of a float64 > 0; -1023 of 0."""
    return ((v.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023


@triton.jit
def _power(e):
    """2^e in float64, within its range."""
    e = tl.minimum(tl.maximum(e, -1000), 1000)
    return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _elements(t_ptr, rows, inside, stride, d, D):
    """t[rows, d] in float64, 0 past the ends."""
    at = t_ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _norm(t_ptr, rows, inside, stride, D, BLOCK_E: tl.constexpr):
    square = tl.zeros(rows.shape, tl.float64)
    for d0 in range(0, D, BLOCK_E):
        t = _elements(t_ptr, rows, inside, stride, d0 + tl.arange(0, BLOCK_E), D)
        square += tl.sum(t * t, axis=1)
    return tl.sqrt(square)


@triton.jit
def _of_codes(t_ptr, codes, inside, default):
    """A value of each code, or its default where there are none."""
    value = tl.full(codes.shape, default, tl.float64)
    if t_ptr is not None:
        value = tl.load(t_ptr + codes, mask=inside, other=default)
    return value


@triton.jit(do_not_specialize=["K"])
def _sizes_kernel(
    sizes_ptr,  # out [2, blocks] float64, the largest |scale_k w_k| and |bias_k| of a block of codes
    w_ptr,  # [K, D], as given
    scale_ptr,  # [K] float64, or None
    bias_ptr,  # [K] float64, or None
    stride_w,
    K,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    codes = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = codes < K
    length = _norm(w_ptr, codes, inside, stride_w, D, BLOCK_E) * tl.abs(_of_codes(scale_ptr, codes, inside, 1.0))
    bias = tl.abs(_of_codes(bias_ptr, codes, inside, 0.0))
    # the maximum of a GPU overlooks NaN
    tl.store(sizes_ptr + tl.program_id(0), tl.max(tl.where(length == length, length, float("inf")), axis=0))
    tl.store(
        sizes_ptr + tl.num_programs(0) + tl.program_id(0), tl.max(tl.where(bias == bias, bias, float("inf")), axis=0)
    )


@triton.jit
def _largest(t_ptr, n, BLOCK: tl.constexpr):
    m = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, n, BLOCK):
        i = at + tl.arange(0, BLOCK)
        m = tl.maximum(m, tl.load(t_ptr + i, mask=i < n, other=0.0))
    return tl.max(m, axis=0)


@triton.jit(do_not_specialize=["N", "K", "blocks", "row_programs"])
def _operands_kernel(
    x_ptr,  # out [N, DX]
    y_ptr,  # out [K to whole tiles, DX]
    size_ptr,  # out [N] float64, |z_i| L + B
    sizes_ptr,  # [2, blocks]
    z_ptr,  # [N, D], as given
    w_ptr,  # [K, D]
    scale_ptr,  # [K] float64, or None
    bias_ptr,  # [K] float64, or None
    rows_ptr,  # the rows wanted, or None
    count_ptr,  # [1], how many
    stride_z,
    stride_w,
    N,
    K,
    D,
    DX,
    extra,  # the column of the bias
    blocks,
    row_programs,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    length, bias = _largest(sizes_ptr, blocks, 1024), _largest(sizes_ptr + blocks, blocks, 1024)
    q, t = 13 - _exponent(length), 13 - _exponent(bias)
    if tl.program_id(0) < row_programs:
        i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = i < _count(N, count_ptr)
        rows = _rows(i, inside, rows_ptr)
        size = _norm(z_ptr, rows, inside, stride_z, D, BLOCK_E) * length + bias
        tl.store(size_ptr + i, size, mask=inside)
        both = 26 - _exponent(size)
        up = tl.where(size < float("inf"), _power(both - q), float("nan"))
        for d0 in range(0, DX, BLOCK_E):
            d = d0 + tl.arange(0, BLOCK_E)
            x = _elements(z_ptr, rows, inside, stride_z, d, D) * up[:, None]
            x = tl.where(((d == extra) | (d == extra + 1))[None, :], _power(both - t)[:, None], x)
            x = tl.where((d == extra + 2)[None, :], 16384.0, x)
            to = x_ptr + i.to(tl.int64)[:, None] * DX + d[None, :]
            tl.store(to, x.to(tl.float16), mask=inside[:, None] & (d < DX)[None, :])
    else:
        codes = (tl.program_id(0) - row_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = codes < K
        up = _of_codes(scale_ptr, codes, inside, 1.0) * _power(q)
        b = _of_codes(bias_ptr, codes, inside, 0.0) * _power(t)
        high = b.to(tl.float16).to(tl.float64)
        past = tl.where(inside, 0.0, -16384.0)
        for d0 in range(0, DX, BLOCK_E):
            d = d0 + tl.arange(0, BLOCK_E)
            y = _elements(w_ptr, codes, inside, stride_w, d, D) * up[:, None]
            y = tl.where((d == extra)[None, :], high[:, None], y)
            y = tl.where((d == extra + 1)[None, :], (b - high)[:, None], y)
            y = tl.where((d == extra + 2)[None, :], past[:, None], y)
            to = y_ptr + codes.to(tl.int64)[:, None] * DX + d[None, :]
            tl.store(to, y.to(tl.float16), mask=(d < DX)[None, :])


@triton.jit
def _count(N, count_ptr):
    count = N
    if count_ptr is not None:
        count = tl.load(count_ptr).to(tl.int32)
    return count


@triton.jit
def _rows(i, inside, rows_ptr):
    rows = i.to(tl.int64)
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + i, mask=inside, other=0)
    return rows


@triton.jit(do_not_specialize=["N"])
def _search_kernel(
    groups_ptr,  # out [N, 4]: those that may hold the largest score, then -1; a first -1: scan the row
    x_ptr,  # [N to whole blocks, DX]
    y_ptr,  # [K to whole tiles, DX]
    count_ptr,  # [1], or None
    slack,
    N,
    DX,
    tiles,
    DM: tl.constexpr,  # columns before those of a bias that needs its own
    OWN: tl.constexpr,
    TAGS: tl.constexpr,  # bits that hold the number of a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    count = _count(N, count_ptr)
    if first >= count:
        return
    i, slots = first + tl.arange(0, BLOCK_M), tl.arange(0, SLOTS)
    d, d_own = tl.arange(0, BLOCK_D), DM + tl.arange(0, 16)
    n = tl.arange(0, BLOCK_N)
    x_ptr += first.to(tl.int64) * DX
    at_x = (tl.arange(0, BLOCK_M) * DX)[:, None]
    at_y = (n * DX)[None, :]
    x = tl.load(x_ptr + at_x + d[None, :])
    if OWN:
        x_own = tl.load(x_ptr + at_x + d_own[None, :])

    best = tl.full((BLOCK_M, SLOTS), float("-inf"), tl.float32)
    second = tl.full((BLOCK_M, SLOTS), float("-inf"), tl.float32)
    for tile in range(0, tiles):
        s = tl.dot(x, tl.load(y_ptr + at_y + d[:, None]))
        for d0 in range(BLOCK_D, DM, BLOCK_D):
            s = tl.dot(tl.load(x_ptr + at_x + d0 + d[None, :]), tl.load(y_ptr + at_y + d0 + d[:, None]), s)
        if OWN:
            s = tl.dot(x_own, tl.load(y_ptr + at_y + d_own[:, None]), s)
        y_ptr += BLOCK_N * DX
        s = tl.max(tl.reshape(s, (BLOCK_M, BLOCK_N // SLOTS, SLOTS)), axis=1)
        tagged = (s.to(tl.int32, bitcast=True) & -(1 << TAGS)) | tile
        s = tagged.to(tl.float32, bitcast=True)
        second = tl.maximum(second, tl.minimum(s, best))
        best = tl.maximum(best, s)

    largest = tl.max(best, axis=1)
    winner, at_groups = tl.zeros((BLOCK_M,), tl.int32), groups_ptr + i.to(tl.int64) * 4
    for r in tl.static_range(4):
        m = tl.max(best, axis=1)
        slot = tl.min(tl.where(best == m[:, None], slots[None, :], SLOTS - 1), axis=1)
        group = (m.to(tl.int32, bitcast=True) & ((1 << TAGS) - 1)) * SLOTS + slot
        if r == 0:
            winner = group
        else:
            tl.store(at_groups + r, tl.where(largest - m <= slack, group, -1), mask=i < count)
        best = tl.where(slots[None, :] == slot[:, None], float("-inf"), best)
    left = tl.max(tl.maximum(best, second), axis=1)
    tl.store(at_groups, tl.where(largest - left > slack, winner, -1), mask=i < count)


@triton.jit
def _scores(
    z_ptr, w_ptr, scale_ptr, bias_ptr, rows, codes, inside, stride_z, stride_w, D, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """scale_k <z_i, w_k> + bias_k in float64 of rows [R] and codes [R, C]."""
    s = tl.zeros(codes.shape, tl.float64)
    for d0 in range(0, D, BLOCK_E):
        d = d0 + tl.arange(0, BLOCK_E)
        z = tl.load(z_ptr + rows[:, None] * stride_z + d[None, :], mask=(d < D)[None, :], other=0.0)
        at = w_ptr + codes.to(tl.int64)[:, :, None] * stride_w + d[None, None, :]
        w = tl.load(at, mask=inside[:, :, None] & (d < D)[None, None, :], other=0.0)
        s += tl.sum(z.to(tl.float64)[:, None, :] * w.to(tl.float64), axis=2)
    return _of_codes(scale_ptr, codes, inside, 1.0) * s + _of_codes(bias_ptr, codes, inside, 0.0)


@triton.jit
def _tie(size_ptr, i, inside, D):
    """What rounding in float64 may change in a score."""
    tie = tl.load(size_ptr + i, mask=inside, other=0.0) * (2.0**-51 * (D + 8))
    return tl.where(tie < float("inf"), tie, 0.0)


@triton.jit
def _scan(
    z_ptr, w_ptr, scale_ptr, bias_ptr, row, tie, stride_z, stride_w, K, D,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The code of one row [1] from all its scores in float64."""
    largest, broken = tl.full((1,), float("-inf"), tl.float64), tl.zeros((1,), tl.int32) + K
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        s = _scores(z_ptr, w_ptr, scale_ptr, bias_ptr, row, k, k < K, stride_z, stride_w, D, BLOCK_E)
        # a NaN is the largest, as in torch
        broken = tl.minimum(broken, tl.min(tl.where((s != s) & (k < K), k, K), axis=1))
        largest = tl.maximum(largest, tl.max(tl.where((s == s) & (k < K), s, float("-inf")), axis=1))
    code = tl.zeros((1,), tl.int32) + K
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        s = _scores(z_ptr, w_ptr, scale_ptr, bias_ptr, row, k, k < K, stride_z, stride_w, D, BLOCK_E)
        wins = (k < K) & ((s >= (largest - tie)[:, None]) | (s == largest[:, None]))
        code = tl.minimum(code, tl.min(tl.where(wins, k, K), axis=1))
    return tl.where(broken < K, broken, code)


@triton.jit(do_not_specialize=["N", "K"])
def _settle_kernel(
    codes_ptr,  # out [N]
    groups_ptr,  # [N, 4]
    size_ptr,  # [N] float64
    z_ptr,  # [N, D]
    w_ptr,  # [K, D]
    scale_ptr,  # [K] float64, or None
    bias_ptr,  # [K] float64, or None
    rows_ptr,  # the rows wanted, or None
    count_ptr,  # [1], how many
    stride_z,
    stride_w,
    N,
    K,
    D,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_R
    count = _count(N, count_ptr)
    if first >= count:
        return
    i = first + tl.arange(0, BLOCK_R)
    inside = i < count
    rows = _rows(i, inside, rows_ptr)
    tie = _tie(size_ptr, i, inside, D)
    c = tl.arange(0, 4 * BLOCK_N // SLOTS)
    at = groups_ptr + i.to(tl.int64)[:, None] * 4 + (c // (BLOCK_N // SLOTS))[None, :]
    group = tl.load(at, mask=inside[:, None], other=-1)
    codes = group // SLOTS * BLOCK_N + group % SLOTS + (c % (BLOCK_N // SLOTS) * SLOTS)[None, :]
    real = (group >= 0) & (codes < K)
    s = _scores(
        z_ptr, w_ptr, scale_ptr, bias_ptr, tl.where(inside, rows, 0), codes, real, stride_z, stride_w, D, BLOCK_E
    )  # fmt: skip
    s = tl.where(real, s, float("-inf"))
    # what float64 cannot tell apart: the first of them
    wins = real & (s >= (tl.max(s, axis=1) - tie)[:, None])
    unsure = inside & (tl.load(groups_ptr + i.to(tl.int64) * 4, mask=inside, other=0) < 0)
    found = tl.min(tl.where(wins, codes, K), axis=1)
    tl.store(codes_ptr + rows, found.to(tl.int64), mask=inside & (unsure == 0))
    for _ in range(0, tl.sum(unsure.to(tl.int32), axis=0)):
        one = tl.min(tl.where(unsure, i, first + BLOCK_R), axis=0) + tl.arange(0, 1)
        unsure = unsure & (i != one)
        row, its_tie = _rows(one, one >= 0, rows_ptr), _tie(size_ptr, one, one >= 0, D)
        code = _scan(z_ptr, w_ptr, scale_ptr, bias_ptr, row, its_tie, stride_z, stride_w, K, D, BLOCK_K, BLOCK_E)
        tl.store(codes_ptr + row, code.to(tl.int64))


@triton.jit(do_not_specialize=["D"])
def _total_kernel(
    sums_ptr,  # out [K, D]
    z_ptr,  # [N, D]
    order_ptr,  # [N], rows in the order of their codes
    bounds_ptr,  # [K + 1], where each code begins
    stride_z,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(bounds_ptr + k), tl.load(bounds_ptr + k + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + r, mask=r < end, other=0)
        at = row[:, None] * stride_z + d[None, :]
        z = tl.load(z_ptr + at, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(z.to(tl.float32), axis=0)
    tl.store(sums_ptr + k * D + d, total, mask=d < D)


# --- launches -------------------------------------------------------------------------------------------------------

# chosen by their machine code, not measured
_SEARCH = {"BLOCK_M": 128, "BLOCK_N": 128, "SLOTS": 16, "num_warps": 8, "num_stages": 3}
_WIDE = 64  # columns of a row that stay with the program
_PREPARE = {"BLOCK_R": 32, "BLOCK_E": 32}
_SETTLE = {"BLOCK_N": 128, "SLOTS": 16, "BLOCK_R": 4, "BLOCK_E": 2, "BLOCK_K": 128}
_TOTAL = {"BLOCK_R": 32, "BLOCK_D": 64}


def code_argmax(
    z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None, exact: bool
) -> Tensor:
    """argmax_k scale_k <z, w_k> + bias_k; -1 where the mask is False. `exact` or not takes the same time."""
    (n, d), k, new = z.shape, len(weight), z.new_empty
    codes = new(n, dtype=torch.int64) if mask is None else torch.full((n,), -1, dtype=torch.int64, device=z.device)
    if n == 0:
        return codes
    z, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (z, weight))
    rows, count = (None, None) if mask is None else _listed(mask)
    search = configs.tuned("codebook", z.device, "search", d) or _SEARCH
    tiles = triton.cdiv(k, search["BLOCK_N"])
    shape = _columns(d, bias is not None or k % search["BLOCK_N"] > 0)
    of_codes = {"w_ptr": weight, "scale_ptr": scale, "bias_ptr": bias, "stride_w": weight.stride(0), "K": k, "D": d}
    of_rows = {"z_ptr": z, "rows_ptr": rows, "count_ptr": count, "stride_z": z.stride(0), "N": n}

    blocks = triton.cdiv(k, _PREPARE["BLOCK_R"])
    sizes = new(2, blocks, dtype=torch.float64)
    launch(_sizes_kernel, (blocks,), z, sizes_ptr=sizes, **of_codes, **_PREPARE)

    n_padded, k_padded = triton.cdiv(n, search["BLOCK_M"]) * search["BLOCK_M"], tiles * search["BLOCK_N"]
    x, y = (new(m, shape["DX"], dtype=torch.float16) for m in (n_padded, k_padded))
    size = new(n, dtype=torch.float64)
    row_programs = triton.cdiv(n, _PREPARE["BLOCK_R"])
    launch(
        _operands_kernel, (row_programs + k_padded // _PREPARE["BLOCK_R"],), z,
        x_ptr=x, y_ptr=y, size_ptr=size, sizes_ptr=sizes, DX=shape["DX"], extra=shape["extra"], blocks=blocks,
        row_programs=row_programs, **of_codes, **of_rows, **_PREPARE,
    )  # fmt: skip

    groups = new(n, 4, dtype=torch.int32)
    tags = (tiles - 1).bit_length()
    # the operands' rounding, the products' and the bias', and the tag, of a score of 2^27
    rounding = 1.1 * 2.0**-10 if z.dtype.itemsize > 2 else 0.0 if scale is None else 1.1 * 2.0**-11
    wrong = rounding + (2 * shape["DX"] + 20) * 2.0**-24 + 2.0 ** (tags - 23)
    launch(
        _search_kernel, (n_padded // search["BLOCK_M"],), z,
        groups_ptr=groups, x_ptr=x, y_ptr=y, count_ptr=count, slack=2 * wrong * 2.0**27, N=n, DX=shape["DX"],
        tiles=tiles, DM=shape["DM"], OWN=shape["OWN"], TAGS=tags, BLOCK_D=shape["BLOCK_D"],
        **search,
    )  # fmt: skip
    launch(
        _settle_kernel, (triton.cdiv(n, _SETTLE["BLOCK_R"]),), z,
        codes_ptr=codes, groups_ptr=groups, size_ptr=size, **of_codes, **of_rows, **_SETTLE,
    )  # fmt: skip
    return codes


def _columns(d: int, extra: bool) -> dict[str, int]:
    """Of the operands: whole blocks of D, where the columns of the bias fit in or have a block of their own."""
    block = min(_WIDE, max(16, triton.next_power_of_2(d)))
    wide = triton.cdiv(d, block) * block
    own = extra and d + 3 > wide
    return {
        "DX": wide + 16 * own, "DM": wide, "OWN": own, "BLOCK_D": block,
        "extra": (wide if own else d) if extra else wide + 16,
    }  # fmt: skip


def _listed(flag: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows where the flag is set, then anything [N], their number) without asking the device."""
    place = flag.cumsum(0)
    n = len(flag)
    rows = torch.empty(n + 1, dtype=torch.int64, device=flag.device)
    rows.scatter_(0, torch.where(flag, place - 1, n), torch.arange(n, device=flag.device))
    return rows, place[-1:].contiguous()


def code_statistics(z: Tensor, codes: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(counts [K], sums [K, D])."""
    order, bounds = segments(codes, K)
    z = z if z.stride(1) == 1 else z.contiguous()
    sums = torch.empty(K, z.shape[1], device=z.device)
    launch(
        _total_kernel,
        (K, triton.cdiv(z.shape[1], _TOTAL["BLOCK_D"])),
        z,
        sums_ptr=sums,
        z_ptr=z,
        order_ptr=order,
        bounds_ptr=bounds,
        stride_z=z.stride(0),
        D=z.shape[1],
        **_TOTAL,
    )
    return bounds.diff()[:K].float(), sums


# --- ahead-of-time compilation --------------------------------------------------------------------------------------

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_specs() -> Iterator[Spec]:
    """The sizes of published tokenizers, for `mmfuse compile-report`."""
    yield _search_spec("8192 x 32", 32, 6)
    yield _search_spec("16384 x 8, masked", 8, 7, masked=True)
    yield _search_spec("16384 x 256", 256, 7)
    for (_, columns), tile, arch in configs.shipped("codebook"):
        yield _search_spec(f"8192 x {columns}", int(columns), 6, tile=tile, archs=(arch,))
    kinds = {"y_ptr": "*fp16", "z_ptr": "*fp32", "w_ptr": "*fp32", "codes_ptr": "*i64"}
    all_codes = {"scale_ptr": None, "rows_ptr": None, "count_ptr": None}
    bf16 = kinds | dict.fromkeys(("z_ptr", "w_ptr"), "*bf16")
    for kernel, block in ((_sizes_kernel, _PREPARE), (_operands_kernel, _PREPARE), (_settle_kernel, _SETTLE)):
        whole = tuple(n for n in ("D", "DX", "stride_z", "stride_w") if n in kernel.arg_names)
        yield _spec(kernel, "euclidean", all_codes | block, kinds, aligned=whole, double=True)
        yield _spec(kernel, "masked cosine", {"bias_ptr": None} | block, bf16, double=True)
    for short in ("fp32", "bf16"):
        yield _spec(
            _total_kernel, short, _TOTAL, {"sums_ptr": "*fp32", "z_ptr": "*" + short, "order_ptr": "*i64",
                                           "bounds_ptr": "*i64"}
        )  # fmt: skip


def candidates(operator: str, dtype: torch.dtype, columns: int, arch: int) -> Iterator[tuple[str, list[Candidate]]]:
    """For the search: its key in a table, and tiles with the compilations to pass."""
    if operator == "nearest_code":
        # settle reads its groups, too
        others = neighbours(_SEARCH, but=("BLOCK_N",))
        specs = [[_search_spec(f"8192 x {columns}", columns, 6, tile=other, archs=(arch,))] for other in others]
        yield configs.key("search", columns), list(zip(others, specs, strict=True))


def _search_spec(
    variant: str, d: int, tags: int, masked: bool = False, tile: dict[str, int] = _SEARCH, **options: Any
) -> Spec:
    shape = _columns(d, not masked)
    constants: dict[str, Any] = {n: shape[n] for n in ("DM", "OWN", "BLOCK_D")} | {"TAGS": tags} | tile
    constants |= {} if masked else {"count_ptr": None}
    work = Work.of_product("score", 200704, int(variant.split()[0]), d, constants, 2, streamed=True)
    return _spec(
        _search_kernel, variant, constants, {}, dot="half", aligned=("DX",), work=work, bounds={"loop": 3.0},
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], **options,
    )  # fmt: skip


def _spec(kernel: Any, variant: str, constants: dict[str, Any], pointers: dict[str, str], **options: Any) -> Spec:
    kinds = dict.fromkeys(("sizes_ptr", "size_ptr", "scale_ptr", "bias_ptr"), "*fp64")
    kinds |= dict.fromkeys(("x_ptr", "y_ptr"), "*fp16") | {"groups_ptr": "*i32", "slack": "fp32"}
    kinds |= dict.fromkeys(("rows_ptr", "count_ptr"), "*i64") | pointers
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    return Spec(
        kernel=f"{__name__}:{kernel.__name__}",
        variant=variant,
        signature={n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants},
        constants=constants,
        **options,
    )
