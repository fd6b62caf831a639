"""The public loss of masked autoencoders: argument checks and declaration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, Size
from mmfuse.kernels._runtime.arguments import PIXELS, check, constant, one_of
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.patch.reconstruction import blocked, reference
from mmfuse.kernels.patch.reconstruction.target import Target

_KERNEL = Deferred("mmfuse.kernels.patch.reconstruction.kernel")


def _weights(prediction: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """(ids of the patches that are predicted, None for all; 1 for each of them that is masked, else 0)."""
    acc = accumulation_dtype(prediction.dtype)
    ids = None if prediction.shape[1] == mask.shape[1] else reference.masked_ids(mask, prediction.shape[1])
    weight = (mask if ids is None else mask.gather(1, ids)).to(acc)
    return ids, weight.contiguous()


def _forward(passes: Any, prediction: Tensor, target: Target) -> Tensor:
    ids, weight = _weights(prediction, target.mask)
    rows: Tensor = passes.rows(prediction, target, ids, weight, None)
    return rows.sum() / weight.sum()


def _backward(passes: Any, g: Tensor, prediction: Tensor, target: Target) -> dict[str, Tensor]:
    ids, weight = _weights(prediction, target.mask)
    grad = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    # without a masked patch the loss is NaN, and depends on no prediction
    weight = weight * (g.to(weight.dtype) / weight.sum().clamp_min(1))
    passes.rows(prediction, target, ids, weight, grad)
    return {"prediction": grad}


def _large(prediction: Tensor) -> str | None:
    k = prediction.shape[2]
    return f"a patch has {k} elements, more than 8192: a program holds one" if k > 8192 else None


LOSS = Operator(
    "masked_patch_loss",
    forward=_forward,
    backward=_backward,
    fake=lambda prediction: prediction.new_empty((), dtype=accumulation_dtype(prediction.dtype)),
    differentiable=("prediction",),
    implementations=[
        Implementation("triton", passes=_KERNEL, against=[_large], traceable=True),
        Implementation("chunked", passes=blocked),
        Implementation("torch", function=reference.masked_patch_loss),
    ],
    size=Size("elements", lambda prediction: prediction.numel()),
    example=lambda x, **how: masked_patch_loss(
        x.unsqueeze(0), x.t()[None, :, :, None], x.new_ones(1, len(x)), patch=1, norm_pix=False, **how
    ),
)


def masked_patch_loss(
    prediction: Tensor,
    pixels: Tensor,
    mask: Tensor,
    *,
    patch: int | tuple[int, ...],
    norm_pix: bool | Literal["patch", "channel"] = True,
    layout: Literal["nchw", "nhwc", "ntchw"] = "nchw",
    mean: Any = None,
    std: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of predicted patches where they are masked, against targets made of the pixels as they come.

    L = sum_bj m_bj mean_k (prediction_bjk - target_bjk)^2 / sum_bj m_bj, with the targets of MAE (He et al. 2022,
    `norm_pix_loss`) or VideoMAE (Tong et al. 2022). Neither the targets nor a float copy of the pixels is held, nothing
    is saved for the backward but the arguments.

    Args:
        prediction: [B, N, K], or [B, M, K] with M < N: the masked patches only, in order, of which every row of the
            mask has M. float16, bfloat16, float32 or float64, any strides. K is (py, px, c), or (t, py, px, c).
        pixels: uint8, float16, bfloat16, float32 or float64; "nchw" is [B, C, H, W] or [B, C, T, H, W], "nhwc"
            [B, H, W, C] or [B, T, H, W, C], "ntchw" [B, T, C, H, W]. Any strides. No gradient goes there.
        mask: [B, N], bool, or numbers 0 and 1 as MAE has it: 1 is masked.
        patch: P, (P, P') or (t, P, P'). The pixels are a multiple of it.
        norm_pix: "patch" (MAE): (x - mean) / sqrt(var + 1e-6) over all of a patch; "channel" (VideoMAE):
            (x - mean) / (sqrt(var) + 1e-6) over each channel of it; both with the unbiased variance. False: x. True is
            "channel" for a (t, P, P') patch, else "patch".
        mean, std: [C] numbers or tensors. uint8 pixels enter as (x / 255 - mean) / std, others as (x - mean) / std;
            uint8 with neither as x. VideoMAE's targets are of pixels in [0, 1]: mean=0 with uint8; with frames
            normalised by (m, s), mean=-m/s and std=1/s.
        backend: "triton", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        the loss, a scalar in float32 (float64 for float64); NaN where nothing is masked, as a mean of nothing.

    Deterministic: two runs are equal bitwise. Differentiable in `prediction`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    size = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"patch is {patch!r}, expected P, (P, P') or (t, P, P')")
    t, p, q = (1,) * (3 - len(size)) + size
    check("pixels", pixels, dtype=PIXELS)
    check("mask", mask, dtype=mask.dtype if isinstance(mask, Tensor) else torch.bool)
    video = _video(pixels, layout)
    norm = ("channel" if len(size) == 3 else "patch") if norm_pix is True else norm_pix or "none"
    if norm not in ("patch", "channel", "none"):
        raise ValueError(f'norm_pix is {norm_pix!r}, expected True, False, "patch" or "channel"')
    for name, n, one in zip(("frames", "rows", "columns"), video.shape[1:4], (t, p, q), strict=True):
        if n % one:
            raise ValueError(f"pixels has {n} {name}, expected a multiple of {one}")
    b, frames, height, width, c = video.shape
    n, k = (frames // t) * (height // p) * (width // q), t * p * q * c
    check("prediction", prediction, (b, "M", k))
    if prediction.shape[1] > n:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected [{b}, {n} or fewer, {k}]")
    check("prediction", prediction, like=("pixels", pixels))
    mask = mask if mask.dtype == torch.bool else mask != 0
    check("mask", mask, (b, n), ", one for each patch", torch.bool, ("prediction", prediction))
    mean, std = (_per_channel(name, v, c, pixels) for name, v in (("mean", mean), ("std", std)))
    target = Target(video.detach(), mask, mean, std, t, p, q, norm)
    return LOSS(prediction, target, backend=backend)


def _video(pixels: Tensor, layout: str) -> Tensor:
    """Pixels as a view [B, T, H, W, C]."""
    one_of("layout", layout, ("nchw", "nhwc", "ntchw"))
    if pixels.dim() not in ((5,) if layout == "ntchw" else (4, 5)):
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}, expected an image or a clip as layout {layout}")
    if layout == "ntchw":
        return pixels.movedim(2, 4)
    x = pixels.movedim(1, -1) if layout == "nchw" else pixels
    return x if x.dim() == 5 else x.unsqueeze(1)


def _per_channel(name: str, given: Any, channels: int, like: Tensor) -> Tensor | None:
    if given is None:
        return None
    v = given if isinstance(given, Tensor) else constant(given, like.device)
    check(name, v, dtype=v.dtype, like=("pixels", like))
    if v.numel() not in (1, channels):
        raise ValueError(f"{name} has {v.numel()} values, expected {channels}, one for each channel")
    return v.contiguous() if v.shape == (channels,) else v.reshape(-1).expand(channels).contiguous()
