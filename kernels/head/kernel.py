"""The passes of the select-token head in Triton, a row each; the products with W are torch's. See `blocked`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import accumulator, divide, sqrt
from mmfuse.kernels.head.blocked import TINY, Head

_TINY = tl.constexpr(TINY)

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _normalized_kernel(
    z_ptr,  # out [B, D]
    rows_ptr,  # out [B, D]
    mean_ptr,  # out [B]
    rstd_ptr,  # out [B]
    x_ptr,  # [B, L, D]
    index_ptr,  # [B] if INDEXED
    gamma_ptr,  # [D] if GAMMA
    beta_ptr,  # [D] if BETA
    stride_b,
    stride_l,
    stride_d,
    L,
    D,
    eps,
    INDEXED: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    token = tl.load(index_ptr + b) if INDEXED else b * 0
    # of a token that is not there nothing is read
    here = k < tl.where((token >= 0) & (token < L), D, 0)
    raw = tl.load(x_ptr + b * stride_b + token * stride_l + k * stride_d, mask=here, other=float("nan"))
    x = tl.where(k < D, raw.to(ACC), 0.0)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(k < D, x - mean, 0.0)
    rstd = divide(1.0, sqrt(tl.sum(centred * centred, axis=0) / D + eps))
    z = centred * rstd
    if GAMMA:
        z *= tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(ACC)
    if BETA:
        z += tl.load(beta_ptr + k, mask=k < D, other=0.0).to(ACC)
    tl.store(z_ptr + b * D + k, z.to(z_ptr.dtype.element_ty), mask=k < D)
    tl.store(rows_ptr + b * D + k, raw, mask=k < D)
    tl.store(mean_ptr + b, mean)
    tl.store(rstd_ptr + b, rstd)


@triton.jit
def _unit_kernel(
    out_ptr,  # out [B / clips, N]
    inverse_ptr,  # out [B], 1 / max(|y|, tiny)
    y_ptr,  # [B, N]
    scale_ptr,  # [] if SCALED
    clips,
    N,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for clip in range(0, clips):
        row = sample * clips + clip
        y = tl.load(y_ptr + row * N + k, mask=k < N, other=0.0).to(ACC)
        inverse = tl.full((), 1.0, ACC)
        if NORMALIZE:
            norm = sqrt(tl.sum(y * y, axis=0))
            inverse = divide(1.0, tl.where(norm < _TINY, _TINY, norm))  # NaN stays
        total += y * inverse
        tl.store(inverse_ptr + row, inverse)
    total = total / clips
    if SCALED:
        total *= tl.load(scale_ptr).to(ACC)
    tl.store(out_ptr + sample * N + k, total.to(out_ptr.dtype.element_ty), mask=k < N)


@triton.jit
def _unit_grad_kernel(
    dy_ptr,  # out [B, N]
    along_ptr,  # out [B], <u, g> / clips
    g_ptr,  # [B / clips, N]
    y_ptr,  # [B, N]
    inverse_ptr,  # [B]
    scale_ptr,  # [] if SCALED
    stride_g,
    stride_n,
    clips,
    N,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    g = tl.load(g_ptr + b // clips * stride_g + k * stride_n, mask=k < N, other=0.0).to(ACC) / clips
    inverse = tl.load(inverse_ptr + b)
    u = tl.load(y_ptr + b * N + k, mask=k < N, other=0.0).to(ACC) * inverse
    along = tl.sum(u * g, axis=0)
    tl.store(along_ptr + b, along)
    du, reach = g, along
    if SCALED:
        scale = tl.load(scale_ptr).to(ACC)
        du, reach = g * scale, along * scale
    if NORMALIZE:
        # at the smallest length the divisor is a constant
        du = (du - tl.where(inverse >= 1 / _TINY, 0.0, reach) * u) * inverse
    tl.store(dy_ptr + b * N + k, du.to(dy_ptr.dtype.element_ty), mask=k < N)


@triton.jit
def _norm_grad_kernel(
    dx_ptr,  # in and out [B, L, D], zero before
    dz_ptr,  # [B, D]
    rows_ptr,  # [B, D]
    index_ptr,  # [B] if INDEXED
    gamma_ptr,  # [D] if GAMMA
    mean_ptr,  # [B]
    rstd_ptr,  # [B]
    L,
    D,
    INDEXED: tl.constexpr,
    GAMMA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    token = tl.load(index_ptr + b) if INDEXED else b * 0
    rstd = tl.load(rstd_ptr + b)
    xhat = (tl.load(rows_ptr + b * D + k, mask=k < D, other=0.0).to(ACC) - tl.load(mean_ptr + b)) * rstd
    xhat = tl.where(k < D, xhat, 0.0)
    h = tl.load(dz_ptr + b * D + k, mask=k < D, other=0.0).to(ACC)
    if GAMMA:
        h *= tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(ACC)
    d = (h - tl.sum(h, axis=0) / D - xhat * (tl.sum(h * xhat, axis=0) / D)) * rstd
    here = k < tl.where((token >= 0) & (token < L), D, 0)
    tl.store(dx_ptr + (b * L + token) * D + k, d.to(dx_ptr.dtype.element_ty), mask=here)


# --- launches -------------------------------------------------------------------------------------------------------


def _settings(width: int, like: Tensor) -> dict[str, Any]:
    """A row in one program."""
    block = triton.next_power_of_2(max(width, 16))
    return {"ACC": accumulator(like.dtype), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def normalized(x: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, length, d = x.shape
    z, rows = (torch.empty(b, d, dtype=t, device=x.device) for t in (dtype, x.dtype))
    mean, rstd = (torch.empty(b, dtype=accumulation_dtype(x.dtype), device=x.device) for _ in range(2))
    if b:
        stride_b, stride_l, stride_d = x.stride()
        launch(
            _normalized_kernel, (b,), x,
            z_ptr=z, rows_ptr=rows, mean_ptr=mean, rstd_ptr=rstd, x_ptr=x, index_ptr=head.index,
            gamma_ptr=_contiguous(head.gamma), beta_ptr=_contiguous(head.beta), stride_b=stride_b, stride_l=stride_l,
            stride_d=stride_d, L=length, D=d, eps=head.eps, INDEXED=head.index is not None,
            GAMMA=head.gamma is not None, BETA=head.beta is not None, **_settings(d, mean),
        )  # fmt: skip
    return z, rows, mean, rstd


def unit(y: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    (b, width), clips = y.shape, head.clips
    out = torch.empty(b // clips, width, dtype=y.dtype, device=y.device)
    inverse = torch.empty(b, dtype=accumulation_dtype(y.dtype), device=y.device)
    if b:
        launch(
            _unit_kernel, (b // clips,), y,
            out_ptr=out, inverse_ptr=inverse, y_ptr=y, scale_ptr=head.scale, clips=clips, N=width,
            SCALED=head.scale is not None, NORMALIZE=head.normalize, **_settings(width, inverse),
        )  # fmt: skip
    return out, inverse


def unit_grad(g: Tensor, y: Tensor, inverse: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    b, width = y.shape
    dy, along = torch.empty_like(y), torch.empty_like(inverse)
    if b:
        launch(
            _unit_grad_kernel, (b,), y,
            dy_ptr=dy, along_ptr=along, g_ptr=g, y_ptr=y, inverse_ptr=inverse, scale_ptr=head.scale,
            stride_g=g.stride(0), stride_n=g.stride(1), clips=head.clips, N=width,
            SCALED=head.scale is not None, NORMALIZE=head.normalize, **_settings(width, inverse),
        )  # fmt: skip
    return dy, along


def norm_grad(dz: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, head: Head, dx: Tensor) -> None:
    b, length, d = dx.shape
    if b:
        launch(
            _norm_grad_kernel, (b,), rows,
            dx_ptr=dx, dz_ptr=dz.contiguous(), rows_ptr=rows, index_ptr=head.index,
            gamma_ptr=_contiguous(head.gamma), mean_ptr=mean, rstd_ptr=rstd, L=length, D=d,
            INDEXED=head.index is not None, GAMMA=head.gamma is not None, **_settings(d, mean),
        )  # fmt: skip


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """ViT-g's width in bfloat16, for `mmfuse compile-report`."""
    given = {"INDEXED": True, "GAMMA": True, "BETA": True, "SCALED": True, "NORMALIZE": True}
    given |= {"ACC": tl.float32, "BLOCK": 2048}
    rows = (
        "z_ptr",
        "rows_ptr",
        "x_ptr",
        "gamma_ptr",
        "beta_ptr",
        "out_ptr",
        "y_ptr",
        "dy_ptr",
        "g_ptr",
        "dx_ptr",
        "dz_ptr",
    )
    kinds = dict.fromkeys(rows, "*bf16") | {"index_ptr": "*i64", "eps": "fp32"}
    kinds |= dict.fromkeys(("mean_ptr", "rstd_ptr", "inverse_ptr", "scale_ptr", "along_ptr"), "*fp32")
    for kernel in (_normalized_kernel, _unit_kernel, _unit_grad_kernel, _norm_grad_kernel):
        constants = {n: v for n, v in given.items() if n in kernel.arg_names}
        yield Spec(
            kernel=f"{__name__}:{kernel.__name__}",
            variant="bf16",
            signature={n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants},
            constants=constants,
            num_warps=8,
            aligned=tuple(n for n in ("D", "N", "stride_b", "stride_l", "stride_g") if n in kernel.arg_names),
        )
