"""Where every token of a ragged batch comes from, computed on the device: nothing waits for the grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dispatch import exported_by


class Layout(NamedTuple):
    cu_seqlens: Tensor  # [B + 1] int32
    ids: Tensor  # [R, 2 | 3] int64: ([frame,] row, column)
    place: Tensor  # [R, 4] int32: row, column, height and width that the table is resampled to; height 0: no position
    source: Tensor | None  # [R] int64: the patch of each token, -1 for none; None: in order
    start: Tensor  # [B] int64: the first patch of each image


@dataclass
class Places:
    """Which patch every token is, and where its position lies in a table."""

    grids: Tensor  # [B, 2 | 3] int64 ([frames,] h, w)
    place: Tensor
    source: Tensor | None
    start: Tensor
    padded: int  # rows of each image among the patches, 0: one after the other
    pads: bool  # rows past an image's patches take its first position
    merge: int
    keep_aspect: bool
    height: int  # of the table
    width: int
    factored: bool
    mode: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width


def layout(
    grids: Tensor,
    patches: int,
    *,
    padded_in: int | None = None,
    padded_out: int | None = None,
    merge: int = 1,
    keep_aspect: bool = False,
    pad_first: bool = False,
    ids_keep: Tensor | None = None,
) -> Layout:
    """grids [B, 2 | 3] int64 of images whose `patches` lie one after the other, or every `padded_in` rows."""
    b, device = grids.shape[0], grids.device
    # one more image without patches: rows past the end are its
    sizes = F.pad(grids, (0, 0, 0, 1))
    count = sizes.prod(1)
    begin = F.pad(count.cumsum(0)[:-1], (1, 0))  # [B + 1]
    start = begin[:b] if padded_in is None else torch.arange(b, device=device) * padded_in
    cu_seqlens, source = begin, None
    if ids_keep is not None:
        row = source = ids_keep
        image = _image(begin, row)
        kept = torch.zeros_like(begin).scatter_add_(0, image, torch.ones_like(image))
        cu_seqlens = F.pad(kept[:b].cumsum(0), (1, 0))
    elif padded_out is not None:
        image, at = (t.flatten() for t in _both(b, padded_out, device))
        source = row = torch.where(at < count[image], begin[image] + at, -1)
    else:
        row = torch.arange(patches, device=device)
        image = _image(begin, row) if padded_in is None else row // padded_in
    if padded_in is None:
        within = (torch.where(row < 0, patches, row) if padded_out else row) - begin[image]
    else:
        within = row % padded_in
    size = count[image]
    inside = within < size
    r = torch.where(inside, within, 0)

    *_, h, w = sizes[image].unbind(1)
    frames = []
    if grids.shape[1] == 3:
        area = (h * w).clamp(min=1)
        frames, r = [r // area], r % area
    if merge == 1:
        columns = w.clamp(min=1)
        y, x = r // columns, r % columns
    else:
        blocks = (w // merge).clamp(min=1)
        y = r // (merge * merge * blocks) * merge + r // merge % merge
        x = r // (merge * merge) % blocks * merge + r % merge
    ids = torch.stack([*frames, y, x], 1)
    height, width = (torch.maximum(h, w),) * 2 if keep_aspect else (h, w)
    # an empty image has no first position
    height = torch.where(size > 0 if pad_first else inside, height, 0)
    place = torch.stack([y, x, height, width], 1).to(torch.int32)
    return Layout(cu_seqlens.to(torch.int32), ids, place, source, start)


def layout_of(
    sizes: Sequence[Sequence[int]],
    patches: int,
    *,
    padded_in: int | None = None,
    padded_out: int | None = None,
    **how: Any,
) -> Layout:
    """The same on a CPU, of at least one image, whose sizes the host knows: what one of a size has is made once."""
    begin, length = [0, *accumulate(map(prod, sizes))], padded_out if padded_in is None else padded_in
    each = [_of_one(tuple(size), prod(size) if length is None else length, **how) for size in sizes]
    rest = patches - begin[-1] if length is None else 0
    if rest:
        each.append(_of_one((0,) * len(sizes[0]), rest, **how))
    ids, place = map(torch.cat, zip(*each, strict=True))
    start = torch.tensor(begin[:-1]) if padded_in is None else _every(padded_in, len(sizes))
    source = None
    if padded_out is not None:
        source = start[:, None] + torch.arange(padded_out)
        source = source.where(source < torch.tensor(begin[1:])[:, None], -1).flatten()
    return Layout(torch.tensor(begin, dtype=torch.int32), ids, place, source, start)


@functools.lru_cache(64)
def _every(rows: int, images: int) -> Tensor:
    """The first patch of images of so many rows."""
    with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
        return torch.arange(images) * rows


@functools.lru_cache(64)
def _of_one(size: tuple[int, ...], rows: int, **how: Any) -> tuple[Tensor, Tensor]:
    """(ids, place) of an image of so many rows."""
    with torch.inference_mode(False):  # as above
        at = layout(torch.tensor([size]), rows, padded_in=rows, **how)
    return at.ids, at.place


def _image(begin: Tensor, row: Tensor) -> Tensor:
    """The image that each row is of."""
    if exported_by() is None:
        return torch.searchsorted(begin[1:], row, right=True)
    return (begin[1:, None] <= row).sum(0)  # ONNX has no search


def _both(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ones = torch.ones(rows, columns, dtype=torch.int64, device=device)
    return torch.arange(rows, device=device)[:, None] * ones, torch.arange(columns, device=device) * ones
