"""Nearest code and code statistics in Triton.

    s_ik = a_k <x_i, y_k> + v_i b_k        x, y: operands in 16 bits, s in float32, never stored

`search`: each of BLOCK_N slots (codes k mod BLOCK_N) keeps its largest score, with the tile that it came from in the
score's low bits, and the largest of its other tiles: four operations per score. The best of four slots is found again
in float64. A row is sure when all else is below its best score by more than rounding can be; `scan` takes the others,
from a list made on the device, in float64.
`total`: rows in the order of their codes, a program for each code. No atomics: two runs are equal bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import aligned_rows
from mmfuse.kernels.codebook.blocked import segments

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _exact_scores(
    z_ptr, w_ptr, scale_ptr, bias_ptr, rows, codes, inside, stride_z, stride_w, D, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """scale_k <z_i, w_k> + bias_k of pairs (row, code) in float64."""
    s = tl.zeros(codes.shape, tl.float64)
    for d0 in range(0, D, BLOCK_E):
        d = d0 + tl.arange(0, BLOCK_E)
        within = inside[:, None] & (d < D)[None, :]
        z = tl.load(z_ptr + rows[:, None] * stride_z + d[None, :], mask=within, other=0.0)
        w = tl.load(w_ptr + codes[:, None] * stride_w + d[None, :], mask=within, other=0.0)
        s += tl.sum(z.to(tl.float64) * w.to(tl.float64), axis=1)
    scale, bias = tl.load(scale_ptr + codes, mask=inside, other=0.0), tl.load(bias_ptr + codes, mask=inside, other=0.0)
    return scale * s + bias


@triton.jit(do_not_specialize=["N", "K", "D"])
def _search_kernel(
    codes_ptr,  # out [N]
    unsure_ptr,  # out [N], 1 where the scores do not decide
    x_ptr,  # [N, DX] in 16 bits
    y_ptr,  # [K, DX]
    a_ptr,  # [K]
    b_ptr,  # [K]
    v_ptr,  # [N]
    slack_ptr,  # [N], twice what a score may be wrong by
    z_ptr,  # [N, D], as given
    w_ptr,  # [K, D]
    scale_ptr,  # [K] float64
    bias_ptr,  # [K] float64
    rows_ptr,  # [N], the rows wanted first, if LISTED
    count_ptr,  # how many
    stride_x,
    stride_y,
    stride_z,
    stride_w,
    DX,
    N,
    K,
    D,
    LISTED: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE: tl.constexpr,  # a row fits into BLOCK_D
    TAGS: tl.constexpr,  # bits that hold the number of a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i, slots, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    count = N
    if LISTED:
        count = tl.load(count_ptr).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    inside = i < count
    rows = i.to(tl.int64)
    if LISTED:
        rows = tl.load(rows_ptr + i, mask=inside, other=0)
    x_ptrs = x_ptr + rows[:, None] * stride_x + d[None, :]
    within_x = inside[:, None] & (d < DX)[None, :]
    x = tl.load(x_ptrs, mask=within_x, other=0.0)
    v = tl.load(v_ptr + rows, mask=inside, other=1.0)

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    second = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for tile in range(0, tl.cdiv(K, BLOCK_N)):
        cols = tile * BLOCK_N + slots
        y_ptrs = y_ptr + tl.minimum(cols, K - 1).to(tl.int64)[None, :] * stride_y + d[:, None]
        if ONE:
            s = tl.dot(x, tl.load(y_ptrs, mask=(d < DX)[:, None], other=0.0))
        else:
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for d0 in range(0, DX, BLOCK_D):
                left = tl.load(x_ptrs + d0, mask=inside[:, None] & (d < DX - d0)[None, :], other=0.0)
                s = tl.dot(left, tl.load(y_ptrs + d0, mask=(d < DX - d0)[:, None], other=0.0), s)
        a = tl.load(a_ptr + cols, mask=cols < K, other=0.0)
        b = tl.load(b_ptr + cols, mask=cols < K, other=0.0)
        s = s * a[None, :] + v[:, None] * b[None, :]
        if not EVEN_K:
            # a number: -inf with a tag is none
            s = tl.where((cols < K)[None, :], s, -3e38)
        tagged = (s.to(tl.int32, bitcast=True) & -(1 << TAGS)) | tile
        s = tagged.to(tl.float32, bitcast=True)
        second = tl.maximum(second, tl.minimum(s, best))
        best = tl.maximum(best, s)

    largest = tl.max(best, axis=1)
    code = tl.zeros((BLOCK_M,), tl.int64)
    exact = tl.full((BLOCK_M,), float("-inf"), tl.float64)
    for _ in tl.static_range(4 if EXACT else 1):
        m = tl.max(best, axis=1)
        slot = tl.min(tl.where(best == m[:, None], slots[None, :], BLOCK_N - 1), axis=1)
        found = ((m.to(tl.int32, bitcast=True) & ((1 << TAGS) - 1)) * BLOCK_N + slot).to(tl.int64)
        # a row without that many slots in use repeats one
        real = inside & (found < K) & (m > float("-inf"))
        if EXACT:
            s = _exact_scores(
                z_ptr, w_ptr, scale_ptr, bias_ptr, rows, found, real, stride_z, stride_w, D, BLOCK_E
            )  # fmt: skip
            better = real & ((s > exact) | ((s == exact) & (found < code)))
            exact, code = tl.where(better, s, exact), tl.where(better, found, code)
        else:
            code = tl.where(real, found, code)
        best = tl.where(slots[None, :] == slot[:, None], float("-inf"), best)
    tl.store(codes_ptr + rows, code, mask=inside)
    if EXACT:
        left = tl.max(tl.maximum(best, second), axis=1)
        sure = (largest - left) > tl.load(slack_ptr + rows, mask=inside, other=0.0)
        tl.store(unsure_ptr + rows, (sure == 0).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["K", "D"])
def _scan_kernel(
    codes_ptr,  # in, out [N]
    z_ptr,  # [N, D]
    w_ptr,  # [K, D]
    scale_ptr,  # [K] float64
    bias_ptr,  # [K] float64
    rows_ptr,  # [N], those to scan first
    count_ptr,  # how many
    stride_z,
    stride_w,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    count = tl.load(count_ptr).to(tl.int32)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(rows_ptr + i)
        best, code, broken = tl.full((), float("-inf"), tl.float64), K, K
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            rows = tl.zeros((BLOCK_K,), tl.int64) + row
            s = _exact_scores(
                z_ptr, w_ptr, scale_ptr, bias_ptr, rows, k.to(tl.int64), k < K, stride_z, stride_w, D, BLOCK_E
            )  # fmt: skip
            # a NaN is the largest, as in torch
            broken = tl.minimum(broken, tl.min(tl.where((s != s) & (k < K), k, K), axis=0))
            s = tl.where((s == s) & (k < K), s, float("-inf"))
            m = tl.max(s, axis=0)
            at = tl.min(tl.where((s == m) & (k < K), k, K), axis=0)
            code = tl.where((m > best) | (code == K), at, code)
            best = tl.maximum(best, m)
        tl.store(codes_ptr + row, tl.where(broken < K, broken, code).to(tl.int64))


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

# chosen to compile without spills, not measured
_SEARCH = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_E": 16}
_SEARCH_OPTIONS = {"num_warps": 8, "num_stages": 3}
_SCAN = {"BLOCK_K": 128, "BLOCK_E": 16}
_TOTAL = {"BLOCK_R": 32, "BLOCK_D": 64}
_SCANNERS = 2048  # programs that share the rows to scan


def code_argmax(
    z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None, exact: bool
) -> Tensor:
    """argmax_k scale_k <z, w_k> + bias_k; -1 where the mask is False."""
    (n, d), k, device = z.shape, len(weight), z.device
    codes = torch.full((n,), -1, dtype=torch.int64, device=device)
    if n == 0:
        return codes
    scale = torch.ones(k, dtype=torch.float64, device=device) if scale is None else scale
    bias = torch.zeros(k, dtype=torch.float64, device=device) if bias is None else bias
    z, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (z, weight))
    x, y, a, v, rounding = _operands(z, weight, scale)
    tags = (triton.cdiv(k, _SEARCH["BLOCK_N"]) - 1).bit_length()
    # |a_k <x, y_k> + v b_k| is at most the size; what rounding its terms, adding them and the tag can do to it
    length = torch.linalg.vector_norm(weight.double(), dim=1).mul_(scale).amax()
    size = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64) * length + bias.abs().amax()
    wrong = rounding + (2 * d + 16) * 2.0**-24 + 2.0 ** (tags - 23)
    # none is sure where a score might overflow; a bias may underflow
    slack = torch.where(size * v < 1e37, 2 * v * (wrong * size + 2.0**-126), torch.inf).float() + 1e-30
    unsure = torch.zeros(n, dtype=torch.int8, device=device)
    rows, count = (codes, codes) if mask is None else _listed(mask)
    dx = x.shape[1]
    one, even = dx <= _SEARCH["BLOCK_D"], k % _SEARCH["BLOCK_N"] == 0
    block_d = {"BLOCK_D": triton.next_power_of_2(dx)} if one else {}
    launch(
        _search_kernel,
        (triton.cdiv(n, _SEARCH["BLOCK_M"]),),
        z,
        codes_ptr=codes,
        unsure_ptr=unsure,
        x_ptr=x,
        y_ptr=y,
        a_ptr=a,
        b_ptr=bias.float(),
        v_ptr=v,
        slack_ptr=slack,
        z_ptr=z,
        w_ptr=weight,
        scale_ptr=scale,
        bias_ptr=bias,
        rows_ptr=rows,
        count_ptr=count,
        stride_x=x.stride(0),
        stride_y=y.stride(0),
        stride_z=z.stride(0),
        stride_w=weight.stride(0),
        DX=dx,
        N=n,
        K=k,
        D=d,
        LISTED=mask is not None,
        EXACT=exact,
        EVEN_K=even,
        ONE=one,
        TAGS=tags,
        **_SEARCH | block_d,
        **_SEARCH_OPTIONS,
    )
    if exact:
        rows, count = _listed(unsure.bool())
        launch(
            _scan_kernel,
            (min(n, _SCANNERS),),
            z,
            codes_ptr=codes,
            z_ptr=z,
            w_ptr=weight,
            scale_ptr=scale,
            bias_ptr=bias,
            rows_ptr=rows,
            count_ptr=count,
            stride_z=z.stride(0),
            stride_w=weight.stride(0),
            K=k,
            D=d,
            **_SCAN,
        )
    return codes


def _operands(z: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """(x, y in 16 bits, a [K], v [N], relative rounding of x and y): float32 becomes float16 at unit size."""
    if z.dtype.itemsize == 2:
        return aligned_rows(z), aligned_rows(weight), scale.float(), torch.ones(len(z), device=z.device), 0.0
    scaled = weight * scale[:, None]
    length = torch.linalg.vector_norm(scaled, dim=1).amax()
    length = torch.where(length > 0, length, 1)
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64)
    v = torch.where(norm > 0, 1 / norm, 1)
    x, y = (z * v[:, None]).half(), (scaled / length).half()
    a = length.float().expand(len(weight)).contiguous()
    # 2^-11 each, and float16's smallest numbers
    return aligned_rows(x), aligned_rows(y), a, v.float(), 1.1 * 2.0**-10


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
    yield _search_spec("8192 x 32", torch.float32, torch.float16, 32, 6)
    yield _search_spec("16384 x 8, masked", torch.float32, torch.float16, 16, 7, listed=True)
    yield _search_spec("16384 x 256", torch.bfloat16, torch.bfloat16, 256, 7)
    yield _spec(_scan_kernel, "fp32", _SCAN, {"codes_ptr": "*i64", "z_ptr": "*fp32", "w_ptr": "*fp32"}, double=True)
    for short in ("fp32", "bf16"):
        yield _spec(
            _total_kernel, short, _TOTAL, {"sums_ptr": "*fp32", "z_ptr": "*" + short, "order_ptr": "*i64",
                                           "bounds_ptr": "*i64"}
        )  # fmt: skip


def _search_spec(
    variant: str, given: torch.dtype, operand: torch.dtype, dx: int, tags: int, listed: bool = False
) -> Spec:
    one = dx <= _SEARCH["BLOCK_D"]
    constants = _SEARCH | {"LISTED": listed, "EXACT": True, "EVEN_K": not listed, "ONE": one, "TAGS": tags}
    constants |= {"BLOCK_D": dx} if one else {}
    pointers = dict.fromkeys(("x_ptr", "y_ptr"), "*" + _SHORT[operand]) | {"codes_ptr": "*i64", "unsure_ptr": "*i8"}
    pointers |= dict.fromkeys(("z_ptr", "w_ptr"), "*" + _SHORT[given])
    return _spec(
        _search_kernel, variant, constants, pointers, double=True, dot="half", aligned=("stride_x", "stride_y", "DX"),
        work=Work.of_product("score", 200704, int(variant.split()[0]), dx, constants, 2, streamed=True),
        bounds={"loop": 3.0}, **_SEARCH_OPTIONS,
    )  # fmt: skip


def _spec(kernel: Any, variant: str, constants: dict[str, Any], pointers: dict[str, str], **options: Any) -> Spec:
    kinds = dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp64") | dict.fromkeys(("rows_ptr", "count_ptr"), "*i64")
    kinds |= dict.fromkeys(("a_ptr", "b_ptr", "v_ptr", "slack_ptr"), "*fp32") | pointers
    return Spec(
        kernel=f"{__name__}:{kernel.__name__}",
        variant=variant,
        signature={n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants},
        constants=constants,
        **options,
    )
