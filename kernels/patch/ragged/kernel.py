"""A ragged batch in Triton: one product, whose tiles add the positions of their tokens before they are stored.

token_r = q V (x_source(r) - n) + c + sum_yx w_h(i_r, y) w_w(j_r, x) P[y, x]    V [D, K]: folded weights, q: their scale
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec, Work
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, input_precision, tile_of
from mmfuse.kernels.patch.positions.kernel import add_positions, adjoint, bounds, mode_number
from mmfuse.kernels.patch.ragged.layout import Places
from mmfuse.kernels.patch.ragged.stem import Folded

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _packed_kernel(
    out_ptr,  # [R, D]
    x_ptr,  # [T, K]
    v_ptr,  # [D, K]
    c_ptr,  # [D]
    q_ptr,  # [D]
    near_ptr,  # [K]
    table_ptr,  # [S, D]
    place_ptr,  # [R, 4]
    source_ptr,  # [R]
    bounds_y,
    bounds_x,
    R,
    D,
    K,
    stride_x,
    GH,
    GW,
    TABLE: tl.constexpr,
    MODE: tl.constexpr,
    FACTORED: tl.constexpr,
    SOURCE: tl.constexpr,
    SCALED: tl.constexpr,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP_M)
    r = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = r < R
    row = r.to(tl.int64)
    if SOURCE:
        row = tl.load(source_ptr + r, mask=inside, other=-1)
    some = inside & (row >= 0)
    at_x = x_ptr + row[:, None] * stride_x + k[None, :]
    at_v = v_ptr + d.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(at_x, mask=some[:, None] & (k[None, :] < K - k0), other=0).to(OPERAND)
        if CENTRED:
            x -= tl.load(near_ptr + k0 + k, mask=k < K - k0, other=0).to(OPERAND)[None, :]
        v = tl.load(at_v, mask=(d[None, :] < D) & (k[:, None] < K - k0), other=0)
        acc = tl.dot(x, v, acc, input_precision=PRECISION, out_dtype=ACC)
        at_x += BLOCK_K
        at_v += BLOCK_K
    if SCALED:
        acc = acc * tl.load(q_ptr + d, mask=d < D, other=0)[None, :]
    acc += tl.load(c_ptr + d, mask=d < D, other=0).to(ACC)[None, :]
    if TABLE:
        i = tl.load(place_ptr + r * 4, mask=inside, other=0)
        j = tl.load(place_ptr + r * 4 + 1, mask=inside, other=0)
        height = tl.load(place_ptr + r * 4 + 2, mask=inside, other=0)
        width = tl.load(place_ptr + r * 4 + 3, mask=inside, other=0)
        acc = add_positions(acc, table_ptr, bounds_y, bounds_x, i, j, height, width, d, GH, GW, D, MODE, FACTORED, ACC)
    if SOURCE:
        acc = tl.where(some[:, None], acc, 0)
    at = out_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, acc, mask=inside[:, None] & (d < D)[None, :])


# --- launches -------------------------------------------------------------------------------------------------------

# chosen to compile without spills, not measured
_TILES: dict[str, dict[str, int]] = {
    "uint8": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    "ieee": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 4, "num_stages": 2},
}
_OPERANDS = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64
}  # fmt: skip


def forward(x: Tensor, f: Folded, table: Tensor | None, places: Places, dtype: torch.dtype) -> Tensor:
    """x [T, K] to [R, D]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, d, k = len(places.place), len(f.bias), x.shape[1]
    v, q = f.weight, None
    if v.dtype.itemsize == 2 and x.dtype == torch.uint8:
        v, q = scaled(f)
    elif x.dtype != v.dtype and x.dtype != torch.uint8:
        x = x.to(v.dtype)
    v = v.contiguous()
    out = torch.empty(rows, d, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    precision = input_precision(v.dtype)
    tile = _TILES["uint8" if q is not None else "half" if v.dtype.itemsize == 2 else precision]
    edges = [bounds(places.mode if table is not None else "", n, x.device) for n in places.shape]
    launch(
        _packed_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(d, tile["BLOCK_N"]),),
        on=x,
        out_ptr=out,
        x_ptr=x,
        v_ptr=v,
        c_ptr=f.bias,
        q_ptr=f.bias if q is None else q,
        near_ptr=f.bias if f.subtract is None else f.subtract,
        table_ptr=f.bias if table is None else table.contiguous(),
        place_ptr=places.place,
        source_ptr=places.place if places.source is None else places.source,
        bounds_y=edges[0],
        bounds_x=edges[1],
        R=rows,
        D=d,
        K=k,
        stride_x=x.stride(0),
        GH=places.height,
        GW=places.width,
        TABLE=table is not None,
        MODE=mode_number(places.mode),
        FACTORED=places.factored,
        SOURCE=places.source is not None,
        SCALED=q is not None,
        CENTRED=f.subtract is not None,
        ACC=accumulator(f.bias.dtype),
        OPERAND=_OPERANDS[v.dtype],
        PRECISION=precision,
        **tile,
    )
    return out


def table_grad(g: Tensor, patches: int, places: Places, acc: torch.dtype) -> Tensor:
    """[S, D] of g [R, D]."""
    t, h, w = F.pad(places.grids, (3 - places.grids.shape[1], 0), value=1).unbind(1)
    height, width = (torch.maximum(h, w),) * 2 if places.keep_aspect else (h, w)
    grids = torch.stack([t, h, w, height, width], 1).to(torch.int32)
    rows = extra = None
    if places.source is not None:
        rows = torch.full((patches + 1,), -1, dtype=torch.int64, device=g.device)
        rows[places.source] = torch.arange(len(places.source), device=g.device)
        rows = rows[:-1]
    if places.pads:
        past = torch.arange(places.padded, device=g.device) >= (t * h * w)[:, None]
        wide = accumulation_dtype(g.dtype)
        extra = (past.to(wide)[:, None] @ g.view(len(grids), places.padded, -1).to(wide))[:, 0]
    options = (places.shape, places.mode, places.factored, places.merge)
    return adjoint(g, grids, places.start, *options, rows, extra)


def scaled(f: Folded) -> tuple[Tensor, Tensor]:
    """(V in float16 over a power of two for each row, which is q): pixels are integers, weights not subnormal."""
    v = f.weight.float()
    top = v.abs().amax(1).clamp(min=1e-30)
    q = torch.exp2(torch.floor(torch.log2(top)) - 12)
    return (v / q[:, None]).to(torch.float16), q


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """Pixels of 8 and of 16 bits, and float32, for `mmfuse compile-report`."""
    yield _spec("u8", torch.float16, torch.bfloat16, 4, "half")
    yield _spec("bf16", torch.bfloat16, torch.bfloat16, 5, "half")
    yield _spec("fp32", torch.float32, torch.float32, 1, "tf32")


def _spec(pixels: str, operand: torch.dtype, out: torch.dtype, mode: int, kind: str) -> Spec:
    tile = _TILES["uint8" if pixels == "u8" else kind]
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    constants: dict[str, Any] = {n: v for n, v in tile.items() if n in _packed_kernel.arg_names}
    constants |= {"TABLE": True, "MODE": mode, "FACTORED": False, "SOURCE": pixels == "u8", "SCALED": pixels == "u8"}
    constants["CENTRED"] = pixels == "u8"
    constants |= {"ACC": tl.float32, "OPERAND": _OPERANDS[operand], "PRECISION": "tf32" if kind == "tf32" else "ieee"}
    pointers = {"out_ptr": "*" + short[out], "x_ptr": "*" + pixels, "v_ptr": "*" + short[operand], "c_ptr": "*fp32"}
    pointers |= {
        "q_ptr": "*fp32",
        "near_ptr": "*fp32",
        "table_ptr": "*" + short[out],
        "place_ptr": "*i32",
        "source_ptr": "*i64",
    }
    pointers |= {"bounds_y": "*fp32", "bounds_x": "*fp32"}
    return Spec(
        kernel=f"{__name__}:_packed_kernel",
        variant=f"{pixels} pixels, mode {mode}",
        signature={n: pointers.get(n, "i32") for n in _packed_kernel.arg_names if n not in constants},
        constants=constants,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        aligned=("D", "K", "stride_x"),
        dot=kind,
        work=Work.of_product("output", 65536, 1152, 768, tile, operand.itemsize, out.itemsize),
    )
