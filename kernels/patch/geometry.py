"""Where the patches of an image, a clip or a signal lie: every layout as one strided view [B, C, T, H, W].

A signal has T = H = 1, an image T = 1, and rows of patches [B, N, K] are K channels under a kernel of size 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import outside_a_trace

LAYOUTS = ("nchw", "nhwc", "ntchw", "patches")
CHANNELS = {"nchw": 1, "nhwc": -1, "ntchw": 2}  # their dimension
Three = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride and grid over (T, H, W); the grid covers `padded`, of which the pixels may be a part."""

    kernel: Three
    stride: Three
    grid: Three
    padded: Three

    @property
    def patches(self) -> int:
        return prod(self.grid)


def view(pixels: Tensor, weight_dims: int, layout: str) -> Tensor:
    """Pixels as [B, C, T, H, W], without a copy."""
    if layout == "patches":
        return pixels.transpose(1, 2)[:, :, None, None]
    if layout == "ntchw":
        return pixels.transpose(1, 2)
    x = pixels.movedim(-1, 1) if layout == "nhwc" else pixels
    missing = (slice(None), slice(None), *[None] * (5 - x.dim()))
    return x[missing]


def view_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """That of `view`, of pixels of this shape."""
    b, *sizes = shape
    if layout == "patches":
        return b, sizes[1], 1, 1, sizes[0]
    if layout == "nchw":
        c, *sizes = sizes
    else:
        c = sizes.pop(1 if layout == "ntchw" else -1)
    return (b, c, *(1,) * (3 - len(sizes)), *sizes)


def unview(x: Tensor, pixels: Tensor, layout: str) -> Tensor:
    """The reverse of `view`, contiguous in the shape of the pixels."""
    if layout == "ntchw":
        x = x.transpose(1, 2)
    elif layout in ("nhwc", "patches"):
        x = x.movedim(1, -1)
    return x.reshape(pixels.shape)


def kernel_of(weight: Tensor, layout: str, still: bool) -> Tensor:
    """The weight as [D, C, kt, kh, kw]; a still image sees the sum of the temporal slices."""
    if layout == "patches":
        return weight.reshape(weight.shape[0], -1, 1, 1, 1)
    ones = (1,) * (5 - weight.dim())
    w = weight.reshape(*weight.shape[:2], *ones, *weight.shape[2:])
    return w.sum(2, keepdim=True) if still else w


def is_still(dims: int, weight_dims: int, layout: str) -> bool:
    return layout in ("nchw", "nhwc") and weight_dims == 5 and dims == 4


def source(
    pixels: Tensor, weight: Tensor, stride: Sequence[int] | None, layout: str, padding: str
) -> tuple[Geometry, bool]:
    """(geometry, whether a still image meets a temporal kernel) of arguments that go together.

    Raises:
        ValueError: as `geometry`.
    """
    shape = pixels.shape
    find = _known_source if outside_a_trace() and type(shape[-1]) is int else _source  # in a trace sizes are symbols
    return find(shape, weight.shape, None if stride is None else tuple(stride), layout, padding)


def _source(
    shape: Sequence[int], kernel_shape: Sequence[int], stride: Sequence[int] | None, layout: str, padding: str
) -> tuple[Geometry, bool]:
    if layout == "patches":
        return geometry((1, 1, shape[1]), (1, 1, 1), (1, 1, 1), padding), False
    ones = (1,) * (5 - len(kernel_shape))
    kernel, steps = ones + tuple(kernel_shape[2:]), ones + tuple(kernel_shape[2:] if stride is None else stride)
    still = is_still(len(shape), len(kernel_shape), layout)
    if still:  # every frame is the image
        kernel, steps = (1, *kernel[1:]), (1, *steps[1:])
    return geometry(view_shape(shape, layout)[2:], kernel, steps, padding), still


_known_source = functools.lru_cache(256)(_source)


def geometry(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: str) -> Geometry:
    """The grid of patches over `size`.

    Raises:
        ValueError: a dimension is shorter than the kernel, or not a multiple of a kernel that tiles it, and padding is
            "error".
    """
    grid, padded = [], []
    for n, k, s, name in zip(size, kernel, stride, ("frames", "rows", "columns"), strict=True):
        if padding == "zero":
            g = max(0, -((k - n) // s)) + 1
        else:
            if n < k or (s == k and n % k):
                expected = f"at least {k}" if n < k else f"a multiple of {k}"
                raise ValueError(f'pixels have {n} {name}, expected {expected} (or padding="zero")')
            g = (n - k) // s + 1
        grid.append(g)
        padded.append(max(n, (g - 1) * s + k))
    return Geometry(tuple(kernel), tuple(stride), tuple(grid), tuple(padded))  # type: ignore[arg-type]


def pad(x: Tensor, g: Geometry) -> Tensor:
    """x [B, C, T, H, W] extended to the grid with zeros."""
    t, h, w = (p - n for p, n in zip(g.padded, x.shape[2:], strict=True))
    return F.pad(x, (0, w, 0, h, 0, t)) if t or h or w else x


def unfold(x: Tensor, g: Geometry) -> Tensor:
    """The patches of x [B, C, T, H, W] as a view [B, gt, gh, gw, C, kt, kh, kw]."""
    for dim, (k, step, n) in enumerate(zip(g.kernel, g.stride, g.grid, strict=True), 2):
        # the same view, which an exported graph has as a reshape
        tiles = k == step and n * k == x.shape[dim]
        x = x.unflatten(dim, (n, k)).movedim(dim + 1, -1) if tiles else x.unfold(dim, k, step)
    return x.movedim(1, 4)


def fold(rows: Tensor, g: Geometry, size: torch.Size) -> Tensor:
    """The transpose of `pad` and `unfold`: patches [B, N, K] summed into [B, C, T, H, W]; overlaps in a fixed order."""
    b, c = size[:2]
    x = rows.reshape(b, *g.grid, c, *g.kernel).movedim(4, 1)
    for dim in (2, 1, 0):
        shape = [b, c, *g.grid[:dim], *g.padded[dim:], *g.kernel[:dim]]
        x = torch.ops.aten.unfold_backward(x, shape, 2 + dim, g.kernel[dim], g.stride[dim])
    t, h, w = size[2:]
    return x[:, :, :t, :h, :w]
