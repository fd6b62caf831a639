"""Resampled position tables in Triton: taps computed where they are used, a transpose whose programs own their sums.

P'[i, j] = sum_yx w_h(i, y) w_w(j, x) P[y, x]    or, of two tables, sum_y w_h(i, y) P_h[y] + sum_x w_w(j, x) P_w[x]
dP[y, x] = sum_images sum_ij w_h(i, y) w_w(j, x) g[i, j]           over the few i, j that y, x has a part in
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide

# --- device code ----------------------------------------------------------------------------------------------------

# modes: bicubic 0, bicubic_aa 1, bicubic_scale 2, bilinear 3, bilinear_aa 4, bilinear_corners 5, grid_sample 6,
# nearest_bucket 7, lookup 8 (the order of MODES)


@triton.jit
def _place(i, n, SOURCE, bounds_ptr, MODE: tl.constexpr, ACC: tl.constexpr):
    """(x, stretch): target i of n in units of the source, and how far apart targets lie there if over 1."""
    source = tl.zeros((), ACC) + SOURCE
    n = tl.maximum(n, 1).to(ACC)
    step = divide(source, n)
    t = i.to(ACC)
    stretch = tl.zeros_like(step) + 1
    if MODE == 8:
        x = t
    elif MODE == 7:
        f = tl.minimum(i.to(tl.float32) * tl.div_rn(1.0, n.to(tl.float32)), 1.0 - 1e-6)
        g = tl.minimum((f * SOURCE).to(tl.int32), SOURCE - 1)
        below = tl.load(bounds_ptr + tl.maximum(g - 1, 0))
        above = tl.load(bounds_ptr + g)
        x = (tl.maximum(g - 1, 0) + ((g > 0) & (below <= f)).to(tl.int32) + (above <= f).to(tl.int32)).to(ACC)
    elif MODE == 5:
        x = divide(t * (source - 1), tl.maximum(n - 1, 1))
    elif MODE == 6:
        x = ((divide(2 * t + 1, n) - 1 + 1) * source - 1) / 2
    else:
        x = (t + 0.5) * step - 0.5
        if MODE == 3:
            x = tl.maximum(x, 0)
        if (MODE == 1) | (MODE == 4):
            stretch = tl.maximum(step, 1)
    return x, stretch


@triton.jit
def _first(x, stretch, MODE: tl.constexpr):
    """The first source position that may count."""
    if MODE >= 7:
        return x.to(tl.int32)
    elif MODE == 1:
        return tl.floor(x - 2 * stretch).to(tl.int32) + 1
    elif MODE == 4:
        return tl.floor(x - stretch).to(tl.int32) + 1
    elif (MODE == 3) | (MODE == 5):
        return tl.floor(x).to(tl.int32)
    else:
        return tl.floor(x).to(tl.int32) - 1


@triton.jit
def _taps(stretch, MODE: tl.constexpr):
    """How many source positions may count."""
    if MODE >= 7:
        return 1
    elif MODE == 1:
        return tl.ceil(4 * stretch).to(tl.int32)
    elif MODE == 4:
        return tl.ceil(2 * stretch).to(tl.int32)
    elif (MODE == 3) | (MODE == 5):
        return 2
    else:
        return 4


@triton.jit
def _weight(s, x, stretch, SOURCE, MODE: tl.constexpr):
    """Of source position s, before antialiased weights are normalised."""
    d = tl.abs(s - x) / stretch
    if MODE >= 7:
        w = tl.zeros_like(d) + 1
    elif (MODE == 3) | (MODE == 4) | (MODE == 5):
        w = tl.maximum(1 - d, 0)
    else:
        a: tl.constexpr = -0.5 if MODE == 1 else -0.75
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        w = tl.where(d <= 1, near, tl.where(d < 2, far, 0))
    if (MODE == 1) | (MODE == 4):
        w = tl.where((s >= 0) & (s < SOURCE), w, 0)
    return w


@triton.jit
def _total(first, taps, x, stretch, SOURCE, MODE: tl.constexpr):
    """The sum of the weights, where they have to be normalised."""
    total = tl.zeros_like(x) + 1
    if (MODE == 1) | (MODE == 4):
        total = tl.zeros_like(x)
        for k in range(taps):
            total += _weight(first + k, x, stretch, SOURCE, MODE)
        # rows past the end lie nowhere
        total = tl.where(total == 0, 1, total)
    return total


@triton.jit
def add_positions(
    acc, table_ptr, bounds_y, bounds_x, row, column, height, width, d, GH, GW, D,
    MODE: tl.constexpr, FACTORED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc += columns `d` of the table resampled to height x width at (row, column); nothing for height 0."""
    y, sy = _place(row, height, GH, bounds_y, MODE, ACC)
    x, sx = _place(column, width, GW, bounds_x, MODE, ACC)
    y0, x0 = _first(y, sy, MODE), _first(x, sx, MODE)
    if (MODE == 1) | (MODE == 4):
        ny, nx = tl.max(_taps(sy, MODE), 0), tl.max(_taps(sx, MODE), 0)
    else:
        ny, nx = _taps(sy, MODE), _taps(sx, MODE)
    some = height > 0
    y_scale = tl.where(some, 1 / _total(y0, ny, y, sy, GH, MODE), 0)
    x_scale = tl.where(some, 1 / _total(x0, nx, x, sx, GW, MODE), 0)
    inside = (d < D)[None, :]
    for a in range(ny):
        wy = _weight(y0 + a, y, sy, GH, MODE) * y_scale
        at_y = tl.minimum(tl.maximum(y0 + a, 0), GH - 1)
        if FACTORED:
            seen = (wy != 0)[:, None] & inside
            p = tl.load(table_ptr + at_y.to(tl.int64)[:, None] * D + d[None, :], mask=seen, other=0)
            acc += wy[:, None] * p.to(ACC)
        else:
            for b in range(nx):
                w = wy * _weight(x0 + b, x, sx, GW, MODE) * x_scale
                at = at_y * GW + tl.minimum(tl.maximum(x0 + b, 0), GW - 1)
                seen = (w != 0)[:, None] & inside
                p = tl.load(table_ptr + at.to(tl.int64)[:, None] * D + d[None, :], mask=seen, other=0)
                acc += w[:, None] * p.to(ACC)
    if FACTORED:
        for b in range(nx):
            wx = _weight(x0 + b, x, sx, GW, MODE) * x_scale
            at = GH + tl.minimum(tl.maximum(x0 + b, 0), GW - 1)
            seen = (wx != 0)[:, None] & inside
            p = tl.load(table_ptr + at.to(tl.int64)[:, None] * D + d[None, :], mask=seen, other=0)
            acc += wx[:, None] * p.to(ACC)
    return acc


@triton.jit(do_not_specialize=["w"])
def _interpolate_kernel(
    out_ptr,  # [N, D]
    table_ptr,  # [gh * gw, D]
    bounds_y,
    bounds_x,
    N,
    w,
    height,
    width,
    GH,
    GW,
    D,
    MODE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sizes = tl.zeros((BLOCK_M,), tl.int32)
    acc = add_positions(
        tl.zeros((BLOCK_M, BLOCK_D), ACC), table_ptr, bounds_y, bounds_x, r // w, r % w, sizes + height, sizes + width,
        d, GH, GW, D, MODE, False, ACC,
    )  # fmt: skip
    tl.store(out_ptr + r.to(tl.int64)[:, None] * D + d[None, :], acc, mask=(r < N)[:, None] & (d < D)[None, :])


@triton.jit
def _share(s, i, n, SOURCE, bounds_ptr, MODE: tl.constexpr, ACC: tl.constexpr):
    """The weight of source s for target i."""
    x, stretch = _place(i, n, SOURCE, bounds_ptr, MODE, ACC)
    first = _first(x, stretch, MODE)
    if (MODE == 1) | (MODE == 4):
        # every target of an image has as many
        w = _weight(s, x, stretch, SOURCE, MODE)
        taps = _taps(tl.maximum(SOURCE / tl.maximum(n, 1).to(ACC), 1), MODE)
        w = w / _total(first, taps, x, stretch, SOURCE, MODE)
    else:
        w = tl.zeros_like(x)
        for k in tl.static_range(_taps(stretch, MODE)):
            at = tl.minimum(tl.maximum(first + k, 0), SOURCE - 1)
            w += tl.where(at == s, _weight(first + k, x, stretch, SOURCE, MODE), 0)
    return w


@triton.jit
def _touched(s, n, SOURCE):
    """[first, last) of the targets that source s may count for: a few too many."""
    step = SOURCE / tl.maximum(n, 1).to(tl.float32)
    reach = 2 * tl.maximum(step, 1.0)
    first = tl.floor((s - reach - 0.5) / step).to(tl.int32) - 1
    last = tl.ceil((s + reach + 1.5) / step).to(tl.int32) + 1
    first = tl.where(s == 0, 0, tl.maximum(first, 0))
    last = tl.where(s == SOURCE - 1, n, tl.minimum(last, n))
    return first, last


@triton.jit(do_not_specialize=["B"])
def _adjoint_kernel(
    out_ptr,  # [S, D], S = gh gw, or gh + gw of two tables
    g_ptr,  # [rows, D]
    grids_ptr,  # [B, 5]: frames, height, width, height and width that the table is resampled to
    start_ptr,  # [B] the first row of each image
    row_ptr,  # [patches] the row of each patch, -1 for none
    extra_ptr,  # [B, D] more gradient of each image's first position
    bounds_y,
    bounds_x,
    B,
    GH,
    GW,
    D,
    MERGE: tl.constexpr,
    MODE: tl.constexpr,
    FACTORED: tl.constexpr,
    KEPT: tl.constexpr,
    EXTRA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    along_y = True
    y, x = s // GW, s % GW
    if FACTORED:
        along_y = s < GH
        y, x = s, s - GH
    acc = tl.zeros((BLOCK_D,), ACC)
    for b in range(B):
        frames = tl.load(grids_ptr + 5 * b)
        h = tl.load(grids_ptr + 5 * b + 1)
        w = tl.load(grids_ptr + 5 * b + 2)
        height = tl.load(grids_ptr + 5 * b + 3)
        width = tl.load(grids_ptr + 5 * b + 4)
        start = tl.load(start_ptr + b)
        i0, i1 = _touched(y, height, GH)
        j0, j1 = _touched(x, width, GW)
        if FACTORED:
            i0, i1 = tl.where(along_y, i0, 0), tl.where(along_y, i1, h)
            j0, j1 = tl.where(along_y, 0, j0), tl.where(along_y, w, j1)
        i1, j1 = tl.minimum(i1, h), tl.minimum(j1, w)
        for i in range(i0, i1):
            wy = tl.sum(_share(y, tl.zeros((1,), tl.int32) + i, height, GH, bounds_y, MODE, ACC), 0)
            if FACTORED:
                wy = tl.where(along_y, wy, 1)
            if wy != 0:
                for j_first in range(j0, j1, BLOCK_J):
                    j = j_first + tl.arange(0, BLOCK_J)
                    wx = _share(x, j, width, GW, bounds_x, MODE, ACC)
                    if FACTORED:
                        wx = tl.where(along_y, 1, wx)
                    share = tl.where(j < j1, wy * wx, 0)
                    at = i * w + j
                    if MERGE > 1:
                        block = (i // MERGE) * (w // MERGE) + j // MERGE
                        at = block * MERGE * MERGE + (i % MERGE) * MERGE + j % MERGE
                    for t in range(frames):
                        row = start + t * h * w + at
                        seen = share != 0
                        if KEPT:
                            row = tl.load(row_ptr + row, mask=seen, other=-1)
                            seen = seen & (row >= 0)
                        g = tl.load(
                            g_ptr + row[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0
                        )
                        acc += tl.sum(share[:, None] * g.to(ACC), 0)
        if EXTRA:
            zero = tl.zeros((1,), tl.int32)
            share = _share(y, zero, height, GH, bounds_y, MODE, ACC)
            wx = _share(x, zero, width, GW, bounds_x, MODE, ACC)
            share = tl.where(along_y, share, wx) if FACTORED else share * wx
            share = tl.sum(tl.where((h > 0) & (w > 0), share, 0), 0)
            acc += share * tl.load(extra_ptr + d, mask=d < D, other=0).to(ACC)
            extra_ptr += D
    tl.store(out_ptr + s.to(tl.int64) * D + d, acc, mask=d < D)


# --- launches -------------------------------------------------------------------------------------------------------

# chosen to compile without spills, not measured
_ROWS = {"BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 4}
_ADJOINT = {"BLOCK_J": 16, "BLOCK_D": 128, "num_warps": 4}


def mode_number(mode: str) -> int:
    from mmfuse.kernels.patch.positions.axes import MODES

    return MODES.index(mode)


def bounds(mode: str, source: int, device: torch.device) -> Tensor:
    """The boundaries of the buckets, infinite past the last: torch's own numbers, by which rows are chosen."""
    if mode != "nearest_bucket":
        return torch.empty(1, device=device)
    b = torch.arange(1 / source, 1.0, 1 / source, device=device)
    return torch.cat([b, b.new_full((2,), torch.inf)])


def interpolate_position(table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    """table [gh, gw, D] to [h * w, D]."""
    gh, gw, d = table.shape
    table = table.contiguous()
    out = torch.empty(h * w, d, dtype=table.dtype, device=table.device)
    grid = (triton.cdiv(h * w, _ROWS["BLOCK_M"]), triton.cdiv(d, _ROWS["BLOCK_D"]))
    launch(
        _interpolate_kernel, grid, table,
        out_ptr=out, table_ptr=table, bounds_y=bounds(mode, gh, table.device), bounds_x=bounds(mode, gw, table.device),
        N=h * w, w=w, height=size[0], width=size[1], GH=gh, GW=gw, D=d,
        MODE=mode_number(mode), ACC=accumulator(table.dtype), **_ROWS,
    )  # fmt: skip
    return out


def interpolate_position_adjoint(g: Tensor, table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    """g [h * w, D] to [gh, gw, D]."""
    gh, gw, d = table.shape
    numbers = [torch.full((1,), n, dtype=torch.int32, device=g.device) for n in (1, h, w, *size)]
    start = torch.zeros(1, dtype=torch.int64, device=g.device)
    out = adjoint(g, torch.stack(numbers, 1), start, (gh, gw), mode, False)
    return out.view(gh, gw, d).to(table.dtype)


def adjoint(
    g: Tensor,
    grids: Tensor,
    start: Tensor,
    source: tuple[int, int],
    mode: str,
    factored: bool,
    merge: int = 1,
    rows: Tensor | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """[S, D] in float32 (float64) of g [rows, D]: images with grids [B, 5] int32 that start at the rows `start`."""
    g = g.contiguous()
    (gh, gw), d, acc = source, g.shape[1], torch.promote_types(g.dtype, torch.float32)
    s = gh + gw if factored else gh * gw
    out = torch.empty(s, d, dtype=acc, device=g.device)
    launch(
        _adjoint_kernel, (s, triton.cdiv(d, _ADJOINT["BLOCK_D"])), g,
        out_ptr=out, g_ptr=g, grids_ptr=grids, start_ptr=start, row_ptr=start if rows is None else rows,
        extra_ptr=out if extra is None else extra, bounds_y=bounds(mode, gh, g.device),
        bounds_x=bounds(mode, gw, g.device), B=len(grids), GH=gh, GW=gw, D=d,
        MERGE=merge, MODE=mode_number(mode), FACTORED=factored, KEPT=rows is not None, EXTRA=extra is not None,
        ACC=accumulator(g.dtype), **_ADJOINT,
    )  # fmt: skip
    return out


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """The widest kernels, antialiased and cubic, and the buckets, for `mmfuse compile-report`."""
    pointers = {"out_ptr": "*bf16", "table_ptr": "*bf16", "bounds_y": "*fp32", "bounds_x": "*fp32"}
    for mode, name in ((1, "bicubic_aa"), (7, "nearest_bucket")):
        constants = {"MODE": mode, "ACC": tl.float32} | {k: v for k, v in _ROWS.items() if k != "num_warps"}
        yield Spec(
            kernel=f"{__name__}:_interpolate_kernel",
            variant=f"bf16 {name}",
            signature={n: pointers.get(n, "i32") for n in _interpolate_kernel.arg_names if n not in constants},
            constants=constants,
            num_warps=_ROWS["num_warps"],
            aligned=("D",),
        )
    pointers = {"out_ptr": "*fp32", "g_ptr": "*bf16", "grids_ptr": "*i32", "start_ptr": "*i64", "row_ptr": "*i64"}
    pointers |= {"extra_ptr": "*fp32", "bounds_y": "*fp32", "bounds_x": "*fp32"}
    flags = {"MERGE": 2, "MODE": 1, "FACTORED": False, "KEPT": True, "EXTRA": True, "ACC": tl.float32}
    constants = flags | {k: v for k, v in _ADJOINT.items() if k != "num_warps"}
    yield Spec(
        kernel=f"{__name__}:_adjoint_kernel",
        variant="bf16 bicubic_aa merge kept extra",
        signature={n: pointers.get(n, "i32") for n in _adjoint_kernel.arg_names if n not in constants},
        constants=constants,
        num_warps=_ADJOINT["num_warps"],
        aligned=("D",),
    )
