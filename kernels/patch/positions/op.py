"""The public function of resampled position tables: argument checks, autograd, choice of implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels.contrastive.backends import no_reason, reasons_against_chunked, reasons_against_triton
from mmfuse.kernels.patch.positions import reference
from mmfuse.kernels.patch.positions.axes import MODES, axis_matrix


def _axes(table: Tensor, h: int, w: int, size: tuple[int, int], mode: str) -> list[Tensor]:
    acc = torch.promote_types(table.dtype, torch.float32)
    return [
        axis_matrix(mode, n, g, acc, table.device)[:m] for n, g, m in zip(size, table.shape[:2], (h, w), strict=True)
    ]


def _fwd(table: Tensor, h: int, w: int, height: int, width: int, mode: str, backend: str) -> Tensor:
    if backend == "triton":
        from mmfuse.kernels.patch.positions import kernel

        return kernel.interpolate_position(table, h, w, (height, width), mode)
    rows, columns = _axes(table, h, w, (height, width), mode)
    return reference.resample(table.to(rows.dtype), rows, columns).view(h * w, -1).to(table.dtype)


def _fwd_fake(table, h, w, *_):  # type: ignore[no-untyped-def]
    return table.new_empty((h * w, table.shape[2]))


def _bwd(g: Tensor, table: Tensor, h: int, w: int, height: int, width: int, mode: str, backend: str) -> Tensor:
    if backend == "triton":
        from mmfuse.kernels.patch.positions import kernel

        return kernel.interpolate_position_adjoint(g, table, h, w, (height, width), mode)
    rows, columns = _axes(table, h, w, (height, width), mode)
    return reference.resample_adjoint(g.to(rows.dtype).reshape(h, w, -1), rows, columns).to(table.dtype)


def _bwd_fake(g, table, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, *ctx.options = inputs
    ctx.save_for_backward(table)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return interpolate_bwd(g, table, *ctx.options), *[None] * len(ctx.options)


interpolate_bwd = register("interpolate_position_bwd", _bwd, _bwd_fake)
interpolate_fwd = register("interpolate_position", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _reference(table: Tensor, h: int, w: int, height: int, width: int, mode: str, _: str) -> Tensor:
    return reference.interpolate_position(table, h, w, (height, width), mode)


def _small(table: Tensor) -> list[str]:
    few = table.device.type == "cpu" and table.numel() < 4096
    return ["eager is faster for less than 4096 numbers"] if few else []


INTERPOLATE = Op(
    "interpolate_position",
    [
        Impl("triton", interpolate_fwd, reasons_against_triton, only_named_in_the_interpreter),
        Impl("chunked", interpolate_fwd, reasons_against_chunked, _small),
        Impl("torch", _reference, no_reason),
    ],
    example=lambda features: (features,),
)


def interpolate_position(
    table: Tensor | tuple[Tensor, Tensor],
    grid: tuple[int, int],
    mode: str = "bicubic",
    *,
    keep_aspect: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A learned position table resampled to another grid of patches, with the field's own weights.

    | mode | of | weights |
    |---|---|---|
    | `bicubic` | transformers' ViT, CLIP, BLIP-2, BEiT, DINOv2 | Keys' cubic, a = -0.75, half-pixel centres |
    | `bicubic_aa` | timm's `resample_abs_pos_embed`, NaFlex | antialiased cubic, a = -0.5 |
    | `bicubic_scale` | ImageBind | as bicubic, the step taken from scale_factor = sqrt(h w / (gh gw)) |
    | `bilinear` | | linear, half-pixel centres |
    | `bilinear_aa` | SigLIP2 | antialiased linear |
    | `bilinear_corners` | Qwen3-VL | linear, corners aligned |
    | `grid_sample` | NaFlex's option | cubic at grid_sample's coordinates, border |
    | `nearest_bucket` | Idefics2, MiniCPM-V | the row of the bucket that i / h falls in |
    | `lookup` | NaViT | row i itself |
    | `linear_1d` | NaFlex factorised | two tables, each linear along its axis, summed |

    Args:
        table: [gh, gw, D], or [g * g, D] of a square grid; float16, bfloat16, float32 or float64, any strides. A pair
            ([gh, D], [gw, D]) is a factorised table: each is resampled along its axis, and their sum is taken.
        grid: (h, w) of the result.
        mode: as above. `linear_1d` is `bilinear` of a pair.
        keep_aspect: resample to a square of max(h, w) and take its first h x w (NaFlex's `pos_embed_ar_preserving`).
        backend: "triton", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [h * w, D] row by row, in the table's dtype; computed in float32 (float64 for float64) and rounded once. A grid
        that the table has already gives the table itself.

    Deterministic in both directions: two runs are equal bitwise. Differentiable once; the gradient is the transpose.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    h, w = grid if isinstance(grid, (tuple, list)) and len(grid) == 2 else (-1, -1)
    if h < 0 or w < 0:
        raise ValueError(f"grid is {grid}, expected two numbers >= 0")
    if isinstance(table, (tuple, list)):
        y, x = check_factors(table, mode)
        mode = "bilinear" if mode == "linear_1d" else mode
        size = (max(h, w),) * 2 if keep_aspect else (h, w)
        rows = _along(y, h, size[0], mode, backend)
        return (rows[:, None] + _along(x, w, size[1], mode, backend)).flatten(0, 1)
    table = check_table(table, mode)
    gh, gw, d = table.shape
    if mode == "bicubic_scale" and not (h == w and gh == gw):
        raise ValueError(f"grid is {grid} and the table's {gh, gw}, expected squares for mode bicubic_scale")
    size = (max(h, w),) * 2 if keep_aspect else (h, w)
    if size == (gh, gw) and mode != "grid_sample":
        return table[:h, :w].reshape(h * w, d)
    check_lookup(mode, size, (gh, gw))
    if h * w == 0:
        return table.new_zeros(0, d) + 0 * table.sum()
    impl = INTERPOLATE.select(table, backend=backend)
    return impl.fn(table, h, w, *size, mode, impl.name)


def _along(table: Tensor, n: int, size: int, mode: str, backend: str | None) -> Tensor:
    """A table [g, D] of one axis, resampled to the first n of `size`."""
    if (size == len(table) and mode != "grid_sample") or n == 0:
        return table[:n]
    check_lookup(mode, (size,), (len(table),))
    impl = INTERPOLATE.select(table, backend=backend)
    return impl.fn(table[:, None], n, 1, size, 1, mode, impl.name)


def check_table(table: Tensor, mode: str) -> Tensor:
    """The table as [gh, gw, D]."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table is {type(table).__name__}, expected a tensor or a pair of them")
    if mode not in MODES:
        pair = " (which takes a pair of tables)" if mode == "linear_1d" else ""
        raise ValueError(f"mode is {mode!r}{pair}, expected one of {', '.join(MODES)}")
    if not table.is_floating_point():
        raise TypeError(f"table has dtype {table.dtype}, expected a floating-point dtype")
    if table.dim() == 2:
        side = round(table.shape[0] ** 0.5)
        if side * side != table.shape[0]:
            raise ValueError(f"table has {table.shape[0]} rows, expected a square number of them or [gh, gw, D]")
        table = table.unflatten(0, (side, side))
    if table.dim() != 3 or 0 in table.shape:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected [gh, gw, D] or [g * g, D], not empty")
    return table


def check_factors(table: Any, mode: str) -> tuple[Tensor, Tensor]:
    """A factorised table: ([gh, D], [gw, D])."""
    if len(table) != 2 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in table):
        raise TypeError("table is no pair of floating-point tensors, expected ([gh, D], [gw, D])")
    y, x = table
    if y.dim() != 2 or x.dim() != 2 or 0 in y.shape or 0 in x.shape or y.shape[1] != x.shape[1]:
        raise ValueError(f"table has shapes {tuple(y.shape)} and {tuple(x.shape)}, expected [gh, D] and [gw, D]")
    if mode not in ("linear_1d", *MODES) or mode == "bicubic_scale":
        allowed = ", ".join(["linear_1d", *(m for m in MODES if m != "bicubic_scale")])
        raise ValueError(f"mode is {mode!r}, expected one of {allowed} for a pair of tables")
    return y, x


def check_lookup(mode: str, size: tuple[int, ...], source: tuple[int, ...]) -> None:
    if mode == "lookup" and any(n > g for n, g in zip(size, source, strict=True)):
        raise ValueError(f"grid is {size}, expected at most the table's {source} for mode lookup")
