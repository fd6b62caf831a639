"""Checks of the contrastive operators' arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import autocast, check_features, scalar
from mmfuse.kernels._runtime.dtypes import accumulation_dtype


def features(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    row_offset: int,
    paired: bool = True,
    names: tuple[str, str] = ("image", "text"),
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = names
    check_features(first, image)
    check_features(second, text)
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"{second} has {text.shape[1]} features per row, expected {image.shape[1]} as in {first}")
    if image.shape[1] == 0:
        raise ValueError(f"{first} has shape {tuple(image.shape)}, expected at least one feature per row")
    if image.device != text.device:
        raise ValueError(f"{second} is on {text.device}, expected {image.device} as {first}")
    image, text = autocast(image, text)
    if image.dtype != text.dtype:
        raise TypeError(f"{second} has dtype {text.dtype}, expected {image.dtype} as {first}")
    if paired and not (row_offset >= 0 and row_offset + image.shape[0] <= text.shape[0]):
        raise ValueError(
            f"{first} has {image.shape[0]} rows at row_offset {row_offset}, expected 0 <= row_offset and at most the "
            f"{text.shape[0]} rows of {second}"
        )
    return image, text, scalar("logit_scale", logit_scale, image)


def weights_of(weights: tuple[float, float]) -> tuple[float, float]:
    try:
        w_image, w_text = (float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"weights is {weights!r}, expected two numbers (image to text, text to image)") from None
    if not (0 <= w_image < math.inf and 0 <= w_text < math.inf):
        raise ValueError(f"weights is {weights!r}, expected finite numbers >= 0")
    return w_image, w_text


def positives(
    ids: Tensor | tuple[Tensor, Tensor] | None, image: Tensor, text: Tensor, row_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """(keys [b + N] int32, shares [b + N]) of ids: positives have equal keys, `shares` is one over their number.

    The key of an id is where it begins among the sorted ids of the texts, -1 where they lack it. A share is 0 for a row
    without a positive, and for the texts that have no image here.
    """
    if ids is None:
        return None, None
    b, n = len(image), len(text)
    if isinstance(ids, Tensor):
        if ids.shape != (n,):
            raise ValueError(f"ids has shape {tuple(ids.shape)}, expected [{n}], one id for each row of text")
        ids = (ids[row_offset : row_offset + b], ids)
    if not (isinstance(ids, (tuple, list)) and len(ids) == 2 and all(isinstance(t, Tensor) for t in ids)):
        raise TypeError(f"ids is {type(ids).__name__}, expected a tensor [N] or a pair (image ids [b], text ids [N])")
    for t, name, rows in zip(ids, ("image", "text"), (b, n), strict=True):
        if t.shape != (rows,):
            raise ValueError(f"the {name} ids have shape {tuple(t.shape)}, expected [{rows}] as {name} has rows")
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"the {name} ids have dtype {t.dtype}, expected integers")
        if t.device != image.device:
            raise ValueError(f"the {name} ids are on {t.device}, expected {image.device} as image")
    image_ids, text_ids = (t.to(torch.int64).contiguous() for t in ids)
    ordered = text_ids.sort().values
    pairs = text_ids[row_offset : row_offset + b].contiguous()
    row_count, pair_count = _count(ordered, image_ids), _count(image_ids.sort().values, pairs)
    keys = torch.searchsorted(ordered, torch.cat([image_ids, text_ids]), out_int32=True)
    found = torch.cat([row_count > 0, torch.ones_like(text_ids, dtype=torch.bool)])
    share = torch.cat([row_count, F.pad(pair_count, (row_offset, n - b - row_offset))]).to(
        accumulation_dtype(image.dtype)
    )
    return torch.where(found, keys, -1), torch.where(share > 0, 1 / share, 0)


def _count(ordered: Tensor, values: Tensor) -> Tensor:
    """How often each value occurs."""
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
