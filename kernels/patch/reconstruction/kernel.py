"""The loss of masked autoencoders in Triton: a program takes one patch, from raw pixels to its loss or its gradient.

x_k = pixel(t, py, px, c) s_c + h_c,   target = normalised x,   row = w mean_k (prediction_k - target_k)^2
d prediction_k = 2 w (prediction_k - target_k) / K          the target is computed again
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import divide, sqrt
from mmfuse.kernels.patch.reconstruction.target import EPS, Target

# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _rows_kernel(
    row_ptr,  # out [B, M]
    grad_ptr,  # out [B, M, K]
    prediction_ptr,  # [B, M, K]
    video_ptr,  # [B, T, H, W, C]
    ids_ptr,  # [B, M]
    weight_ptr,  # [B, M]
    scale_ptr,  # [C]
    shift_ptr,  # [C]
    M,
    stride_pb,
    stride_pm,
    stride_b,
    stride_t,
    stride_y,
    stride_x,
    stride_c,
    GH,
    GW,
    EPS: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    IDS: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    K: tl.constexpr = T * P * Q * C
    b, m = tl.program_id(1).to(tl.int64), tl.program_id(0)
    weight = tl.load(weight_ptr + b * M + m)
    j = m
    if IDS:
        j = tl.load(ids_ptr + b * M + m).to(tl.int32)
    k = tl.arange(0, BLOCK)
    inside = k < tl.where(weight != 0, K, 0)
    c, q, p, t = k % C, k // C % Q, k // (C * Q) % P, k // (C * Q * P)
    at = (j // (GH * GW) * T + t).to(tl.int64) * stride_t + (j // GW % GH * P + p).to(tl.int64) * stride_y
    at += (j % GW * Q + q).to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    x = tl.load(video_ptr + b * stride_b + at, mask=inside, other=0).to(ACC)
    x = x * tl.load(scale_ptr + c) + tl.load(shift_ptr + c)
    x = tl.where(inside, x, 0)
    if NORM == "patch":
        x = tl.where(inside, x - tl.sum(x, 0) / K, 0)
        var = tl.sum(x * x, 0) / (K - 1)
        x = divide(x, sqrt(var + EPS))
    elif NORM == "channel":
        n: tl.constexpr = T * P * Q
        y = tl.zeros_like(x)
        for one in tl.static_range(C):
            own = inside & (c == one)
            z = tl.where(own, x - tl.sum(tl.where(own, x, 0), 0) / n, 0)
            var = tl.sum(z * z, 0) / (n - 1)
            y += divide(z, sqrt(var) + EPS)
        x = y
    z = tl.load(prediction_ptr + b * stride_pb + m.to(tl.int64) * stride_pm + k, mask=inside, other=0).to(ACC) - x
    if GRAD:
        out = grad_ptr + (b * M + m) * K + k
        tl.store(out, tl.where(inside, z * (2 * weight / K), 0), mask=k < K)
    else:
        tl.store(row_ptr + b * M + m, tl.sum(tl.where(inside, z * z, 0), 0) * weight / K)


# --- launches -------------------------------------------------------------------------------------------------------


def rows(prediction: Tensor, target: Target, ids: Tensor | None, weight: Tensor, grad: Tensor | None) -> Tensor:
    """As `blocked.rows`."""
    prediction = prediction if prediction.stride(2) == 1 else prediction.contiguous()
    (b, m, k), video, acc = prediction.shape, target.video, weight.dtype
    out = torch.empty(b, m, dtype=acc, device=prediction.device)
    if not prediction.numel():
        return out.zero_()
    scale, shift = target.affine(acc)
    _, gh, gw = target.grid
    launch(
        _rows_kernel,
        (m, b),
        video,
        row_ptr=out,
        grad_ptr=out if grad is None else grad,
        prediction_ptr=prediction,
        video_ptr=video,
        ids_ptr=out if ids is None else ids,
        weight_ptr=weight,
        scale_ptr=scale,
        shift_ptr=torch.zeros_like(scale) if shift is None else shift,
        M=m,
        stride_pb=prediction.stride(0),
        stride_pm=prediction.stride(1),
        **dict(zip(("stride_b", "stride_t", "stride_y", "stride_x", "stride_c"), video.stride(), strict=True)),
        GH=gh,
        GW=gw,
        EPS=EPS,
        T=target.t,
        P=target.p,
        Q=target.q,
        C=video.shape[4],
        NORM=target.norm,
        IDS=ids is not None,
        GRAD=grad is not None,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        BLOCK=triton.next_power_of_2(k),
        num_warps=4,
    )
    return out


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """MAE's loss and VideoMAE's gradient, for `mmfuse compile-report`."""
    yield _spec(T=1, norm="patch", grad=False, ids=False)
    yield _spec(T=2, norm="channel", grad=True, ids=True)


def _spec(T: int, norm: str, grad: bool, ids: bool) -> Spec:
    constants: dict[str, Any] = {"EPS": EPS, "T": T, "P": 16, "Q": 16, "C": 3, "NORM": norm, "IDS": ids, "GRAD": grad}
    constants |= {"ACC": tl.float32, "BLOCK": 1024 * T}
    pointers = {"row_ptr": "*fp32", "grad_ptr": "*bf16" if grad else "*fp32", "prediction_ptr": "*bf16"}
    pointers |= {"video_ptr": "*u8", "ids_ptr": "*i64", "weight_ptr": "*fp32", "scale_ptr": "*fp32"}
    pointers |= {"shift_ptr": "*fp32"}
    return Spec(
        kernel=f"{__name__}:_rows_kernel",
        variant=f"{norm} {'gradient' if grad else 'loss'}, {T} frames",
        signature={n: pointers.get(n, "i32") for n in _rows_kernel.arg_names if n not in constants},
        constants=constants,
        aligned=("stride_pb", "stride_pm", "stride_b", "stride_t"),
    )
