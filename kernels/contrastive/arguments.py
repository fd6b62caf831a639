"""Checks of the contrastive operators' arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfuse.kernels.contrastive.blocked import accumulation_dtype


def features(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    row_offset: int,
    paired: bool = True,
    names: tuple[str, str] = ("image", "text"),
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = names
    for name, t in ((first, image), (second, text)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is {type(t).__name__}, expected a tensor of features [N, D]")
        if t.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected features [N, D]")
        if not t.is_floating_point():
            raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point dtype")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"{second} has {text.shape[1]} features per row, expected {image.shape[1]} as in {first}")
    if image.shape[1] == 0:
        raise ValueError(f"{first} has shape {tuple(image.shape)}, expected at least one feature per row")
    if image.device != text.device:
        raise ValueError(f"{second} is on {text.device}, expected {image.device} as {first}")
    kind = image.device.type
    if torch.is_autocast_enabled(kind) and image.dtype != torch.float64:
        low = torch.get_autocast_dtype(kind)
        image, text = image.to(low), text.to(low)
    if image.dtype != text.dtype:
        raise TypeError(f"{second} has dtype {text.dtype}, expected {image.dtype} as {first}")
    if paired and not (row_offset >= 0 and row_offset + image.shape[0] <= text.shape[0]):
        raise ValueError(
            f"{first} has {image.shape[0]} rows at row_offset {row_offset}, expected 0 <= row_offset and at most the "
            f"{text.shape[0]} rows of {second}"
        )
    return image, text, scalar("logit_scale", logit_scale, image)


def scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a 0-d tensor in the accumulation dtype of `like`, keeping its graph."""
    acc = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        if not abs(value) < math.inf:
            raise ValueError(f"{name} is {value}, expected a finite number")
        return torch.full((), value, dtype=acc, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one element")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point dtype")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} as image")
    # reading a GPU's number would wait for it: there, a non-finite scale shows in the loss
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(value.detach().item()):
        raise ValueError(f"{name} is {value.item()}, expected a finite number")
    return value.reshape(()).to(acc)


def weights_of(weights: tuple[float, float]) -> tuple[float, float]:
    try:
        w_image, w_text = (float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"weights is {weights!r}, expected two numbers (image to text, text to image)") from None
    if not (0 <= w_image < math.inf and 0 <= w_text < math.inf):
        raise ValueError(f"weights is {weights!r}, expected finite numbers >= 0")
    return w_image, w_text
