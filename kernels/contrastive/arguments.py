"""Checks of the contrastive operators' arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import autocast, check, integers, multiplier


def features(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    row_offset: int | None = 0,
    names: tuple[str, str] = ("image", "text"),
) -> tuple[Tensor, Tensor, Tensor]:
    """As they are multiplied, with the scale as a tensor. Without a row_offset, no rows are pairs."""
    image, text = pairs(image, text, row_offset, names)
    return image, text, multiplier("logit_scale", logit_scale, image)


def pairs(image: Tensor, text: Tensor, row_offset: int | None, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """The same without a scale."""
    first, second = names
    image, text = alike(first, image, second, text)
    if row_offset is not None and not (row_offset >= 0 and row_offset + image.shape[0] <= text.shape[0]):
        raise ValueError(
            f"{first} has {image.shape[0]} rows at row_offset {row_offset}, expected 0 <= row_offset and at most the "
            f"{text.shape[0]} rows of {second}"
        )
    return image, text


def alike(
    first: str, x: Tensor, second: str, y: Tensor, shape: tuple[int | str, ...] = ("N", "D")
) -> tuple[Tensor, Tensor]:
    """Features x of this shape and y [N, D] as a matrix product takes them: in one dtype, on one device."""
    check(first, x, shape)
    if 0 in x.shape[1:]:
        raise ValueError(f"{first} has shape {tuple(x.shape)}, expected at least one feature per row")
    check(second, y, ("N", x.shape[-1]), f", as many features per row as {first}", like=(first, x))
    x, y = autocast(x, y)
    if y.dtype != x.dtype:
        raise TypeError(f"{second} has dtype {y.dtype}, expected {x.dtype} as {first}")
    return x, y


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def weights_of(weights: tuple[float, float]) -> tuple[float, float]:
    try:
        w_image, w_text = (float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"weights is {weights!r}, expected two numbers (image to text, text to image)") from None
    if not (0 <= w_image < math.inf and 0 <= w_text < math.inf):
        raise ValueError(f"weights is {weights!r}, expected finite numbers >= 0")
    return w_image, w_text


def ids_of_sides(
    ids: Tensor | tuple[Tensor, Tensor] | None, image: Tensor, text: Tensor, row_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """(image ids [b], text ids [N]), int64."""
    if ids is None:
        return None, None
    if isinstance(ids, Tensor):
        text_ids = integers("ids", ids, text, "text")
        b = image.shape[0]  # len() of a tensor is Python
        return text_ids if b == text.shape[0] else text_ids[row_offset : row_offset + b], text_ids
    if isinstance(ids, (tuple, list)) and len(ids) == 2:
        return integers("ids[0]", ids[0], image, "image"), integers("ids[1]", ids[1], text, "text")
    raise TypeError(f"ids is {type(ids).__name__}, expected a tensor [N] or a pair (image ids [b], text ids [N])")


def positives(image_ids: Tensor, text_ids: Tensor, row_offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(keys [b + N] int32, shares [b + N]) of ids: positives have equal keys, `shares` is one over their number.

    The key of an id is where it begins among the sorted ids of the texts, -1 where they lack it. A share is 0 for a row
    without a positive, and for the texts that have no image here.
    """
    b, n = len(image_ids), len(text_ids)
    ordered = text_ids.sort().values
    pairs = text_ids[row_offset : row_offset + b]
    row_count, pair_count = _count(ordered, image_ids), _count(image_ids.sort().values, pairs)
    keys = torch.searchsorted(ordered, torch.cat([image_ids, text_ids]), out_int32=True)
    found = torch.cat([row_count > 0, torch.ones_like(text_ids, dtype=torch.bool)])
    share = torch.cat([row_count, F.pad(pair_count, (row_offset, n - b - row_offset))]).to(dtype)
    return torch.where(found, keys, -1), torch.where(share > 0, 1 / share, 0)


def _count(ordered: Tensor, values: Tensor) -> Tensor:
    """How often each value occurs."""
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
