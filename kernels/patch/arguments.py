"""Checks of the arguments of patch embedding: an error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.arguments import PIXELS, check, constant, one_of
from mmfuse.kernels.patch.geometry import CHANNELS, LAYOUTS, is_still

Norm = tuple[Tensor, Tensor | None, float]

_SHAPES = {
    ("nchw", 3): "[B, C, L]",
    ("nchw", 4): "[B, C, H, W]",
    ("nchw", 5): "[B, C, T, H, W] or [B, C, H, W]",
    ("nhwc", 3): "[B, L, C]",
    ("nhwc", 4): "[B, H, W, C]",
    ("nhwc", 5): "[B, T, H, W, C] or [B, H, W, C]",
    ("ntchw", 5): "[B, T, C, H, W]",
}


def check_source(pixels: Tensor, weight: Tensor, stride: int | Sequence[int] | None, layout: str, padding: str) -> int:
    """The number of channels."""
    check("pixels", pixels, dtype=PIXELS)
    check("weight", weight, like=("pixels", pixels))
    one_of("layout", layout, LAYOUTS)
    one_of("padding", padding, ("error", "zero"))
    if weight.dim() not in (2, 3, 4, 5) or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D, K] or a convolution's, not empty")
    if layout == "patches":
        k = weight[0].numel()
        if pixels.dim() != 3 or pixels.shape[2] != k:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}, expected patches [B, N, {k}] as weight")
        if stride is not None:
            raise ValueError(f'stride is {stride}, expected none with layout "patches"')
        return k
    expected = _SHAPES.get((layout, weight.dim()))
    if expected is None:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, which layout {layout!r} does not go with")
    still = is_still(pixels.dim(), weight.dim(), layout)
    if pixels.dim() != weight.dim() - still:
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}, expected {expected} for layout {layout!r}")
    found, channels = pixels.shape[CHANNELS[layout]], weight.shape[1]
    if found != channels:
        raise ValueError(f"pixels has {found} channels, expected {channels} as weight")
    if stride is None:
        return channels
    dims = weight.dim() - 2
    steps = stride if isinstance(stride, Sequence) else (stride,) * dims
    if len(steps) != dims or not all(type(s) in (int, torch.SymInt) and s > 0 for s in steps):
        raise ValueError(f"stride is {stride}, expected a positive integer or {dims} of them")
    if still and steps[0] != weight.shape[2]:
        raise ValueError(
            f"pixels has shape {tuple(pixels.shape)} and stride is {stride}, expected a temporal stride of "
            f"{weight.shape[2]} as the kernel's for a still image"
        )
    return channels


def check_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point dtype")


def vector(name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor, meaning: str) -> Tensor | None:
    """A floating-point tensor of this shape on the device of `like`, or None."""
    if t is not None:
        check(name, t, shape, f": {meaning}", like=("pixels", like))
    return t


def norm(name: str, given: Norm | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    if given is None:
        return None, None, 0.0
    if not (isinstance(given, (tuple, list)) and len(given) == 3):
        raise TypeError(f"{name} is {type(given).__name__}, expected (weight [D], bias [D] or None, eps)")
    d = (weight.shape[0],)
    check(f"{name}'s weight", given[0], d, like=("pixels", weight))
    return given[0], vector(f"{name}'s bias", given[1], d, weight, "[D]"), float(given[2])


def channel_values(name: str, given: Any, channels: int, layout: str, pixels: Tensor) -> Tensor | None:
    """mean or std as a tensor [C]; patches take one for each of K, or for each of C leading blocks of K / C."""
    if given is None:
        return None
    numbers = not isinstance(given, Tensor)
    if numbers:
        given = constant((given,) * channels if isinstance(given, (int, float)) else given, pixels.device)
    n = given.numel()
    blocks = layout == "patches" and n > 0 and channels % n == 0
    if given.dim() != 1 or not (n == channels or blocks):
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected [{channels}], one for each channel")
    if not numbers:
        check(name, given, dtype=given.dtype, like=("pixels", pixels))
    return given if n == channels else given.reshape(-1).repeat_interleave(channels // n)


def check_ids(ids: Tensor, patches: int) -> None:
    """Raise for an index out of range; on a GPU, assert on the device, as torch's own indexing does."""
    inside = ((ids >= 0) & (ids < patches)).all()
    if ids.device.type == "cpu":
        if not inside:
            raise ValueError(f"ids_keep has values from {ids.min()} to {ids.max()}, expected 0 to {patches - 1}")
    else:
        torch._assert_async(inside, f"ids_keep is out of range, expected 0 to {patches - 1}")
