"""One axis of a resampled position table: how much each source position counts for each target position.

Every semantics but a factorised sum is separable: P' = (R_h x R_w) P, with one matrix [size, source] for each axis.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import outside_a_trace
from mmfuse.kernels._runtime.dtypes import cast

MODES = (
    "bicubic",
    "bicubic_aa",
    "bicubic_scale",
    "bilinear",
    "bilinear_aa",
    "bilinear_corners",
    "grid_sample",
    "nearest_bucket",
    "lookup",
)


# transformers' SigLIP2, Qwen3-VL and Idefics2 compute their weights themselves, as `axis_weights` does
CLOSED = ("bilinear_aa", "bilinear_corners", "nearest_bucket", "lookup")


def axis_matrix(mode: str, size: int, source: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R [size, source], bit for bit the weights of the official code.

    Where that calls `F.interpolate` or `F.grid_sample`, they are what these make of the unit vectors. On a CPU a matrix
    is made once: it takes more operations than its products.
    """
    given = mode, size, source, dtype, device
    return _made_once(*given) if device.type == "cpu" and outside_a_trace() else _axis_matrix(*given)


def _axis_matrix(mode: str, size: int, source: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if mode in CLOSED:
        index = torch.arange(size, device=device)
        return axis_weights(mode, index, torch.full_like(index, size), source, dtype)
    eye = torch.eye(source, dtype=dtype, device=device)
    if mode == "bicubic_scale":
        # ImageBind gives a scale factor, whose reciprocal becomes the step between samples
        r = torch.ops.aten.upsample_bicubic2d.default(eye[None, None], (source, size), False, 1.0, size / source)
        return r[0, 0].t()
    if mode == "grid_sample":
        x = (2 * torch.arange(size, dtype=dtype, device=device) + 1) / size - 1
        at = torch.stack([x, torch.zeros_like(x)], -1)[None, None]
        return F.grid_sample(eye[None, :, None], at, "bicubic", "border", align_corners=False)[0, :, 0].t()
    kind, _, option = mode.partition("_")
    return F.interpolate(eye[None, None], (source, size), mode=kind, antialias=option == "aa")[0, 0].t()


@functools.lru_cache(256)
def _made_once(*given: Any) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
        return _axis_matrix(*given)


def axis_weights(mode: str, index: Tensor, size: Tensor, source: int, dtype: torch.dtype) -> Tensor:
    """[..., source] in closed form for targets `index` on axes of `size` [...]: both tensors, nothing is read back.

    As `axis_matrix`, but for the rounding of a weight where torch's own functions contract products and sums.
    """
    at = torch.arange(source, dtype=dtype, device=index.device)
    if mode == "lookup":
        return (index.clamp(max=source - 1)[..., None] == at).to(dtype)
    if mode == "nearest_bucket":
        # float32 whatever the table: the boundaries decide which row is taken
        fraction = (index.float() * (1.0 / size.float())).clamp(max=1.0 - 1e-6)
        bounds = torch.arange(1 / source, 1.0, 1 / source, device=index.device)
        return (torch.bucketize(fraction, bounds, right=True)[..., None] == at).to(dtype)

    i, n = cast(index, dtype), cast(size, dtype)
    step = n.reciprocal() * source  # as source / n, which asks Python first
    if mode == "bilinear_aa":
        centre = (i + 0.5) * step - 0.5
        w = (1 - (at - centre[..., None]).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
        return w / w.sum(-1, keepdim=True)
    if mode == "bicubic_aa":
        stretch = step.clamp(min=1)
        centre = step * (i + 0.5)
        x = ((at - centre[..., None] + 0.5) / stretch[..., None]).abs()
        # the filter's window begins and ends at a rounded position
        first = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
        last = (centre + 2 * stretch + 0.5).floor().clamp(max=source)
        w = _cubic(x, -0.5) * ((at >= first[..., None]) & (at < last[..., None]))
        return w / w.sum(-1, keepdim=True)

    if mode == "bilinear_corners":
        x = i * (source - 1) / (n - 1).clamp(min=1)
    elif mode == "grid_sample":
        x = (((2 * i + 1) / n - 1 + 1) * source - 1) / 2
    elif mode == "bicubic_scale":
        x = (i + 0.5) * (1 / (n / source)) - 0.5
    else:
        x = (i + 0.5) * step - 0.5
    if mode == "bilinear":
        x = x.clamp(min=0)
    whole = x.floor()
    t = (x - whole)[..., None]
    if mode.startswith("bilinear"):
        weights = [1 - t, t]
    else:
        weights, whole = [_cubic(d, -0.75) for d in (t + 1, t, 1 - t, 2 - t)], whole - 1
    out = torch.zeros((*index.shape, source), dtype=dtype, device=index.device)
    for k, w in enumerate(weights):
        # what reaches beyond the border falls on it
        tap = (whole[..., None].long() + k).clamp(0, source - 1)
        out = out + torch.where(tap == at, w, 0)
    return out


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel at the distance x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))
