"""The public function of resampled position tables: argument checks and declaration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import check, one_of, require_integer
from mmfuse.kernels.patch.positions import blocked, reference
from mmfuse.kernels.patch.positions.axes import MODES


def _forward(passes: Any, table: Tensor, h: int, w: int, size: Sequence[int], mode: str) -> Tensor:
    return passes.interpolate_position(table, h, w, size, mode)


def _backward(
    passes: Any, g: Tensor, table: Tensor, h: int, w: int, size: Sequence[int], mode: str
) -> dict[str, Tensor]:
    return {"table": passes.interpolate_position_adjoint(g, table, h, w, size, mode)}


INTERPOLATE = Operator(
    "interpolate_position",
    forward=_forward,
    backward=_backward,
    fake=lambda table, h, w: table.new_empty((h * w, table.shape[2])),
    differentiable=("table",),
    implementations=[
        Implementation("triton", passes=Deferred("mmfuse.kernels.patch.positions.kernel"), traceable=True),
        Implementation("chunked", passes=blocked),
        Implementation("torch", function=reference.interpolate_position),
    ],
    size=Size("numbers", lambda table: table.numel()),
    export=OpSpec("MmfuseInterpolatePosition"),
    example=lambda x, **how: interpolate_position(x.unsqueeze(1), (2 * len(x), 1), "bilinear", **how),
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

    Deterministic in both directions: two runs are equal bitwise. Differentiable; the gradient is the transpose.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    h, w = grid if isinstance(grid, (tuple, list)) and len(grid) == 2 else (-1, -1)
    for n in (h, w):
        require_integer("grid's size", n)
    if h < 0 or w < 0:
        raise ValueError(f"grid is {grid}, expected two numbers >= 0")
    if isinstance(table, (tuple, list)):
        y, x = check_factors(table, mode)
        mode = "bilinear" if mode == "linear_1d" else mode
        size = (max(h, w),) * 2 if keep_aspect else (h, w)
        rows = _along(y, h, size[0], mode, backend)
        return (rows[:, None] + _along(x, w, size[1], mode, backend)).flatten(0, 1)
    gh, gw = check_table(table, mode)
    table, d = table.unflatten(0, (gh, gw)) if table.dim() == 2 else table, table.shape[-1]
    if mode == "bicubic_scale" and not (h == w and gh == gw):
        raise ValueError(f"grid is {grid} and the table's {gh, gw}, expected squares for mode bicubic_scale")
    size = (max(h, w),) * 2 if keep_aspect else (h, w)
    if size == (gh, gw) and mode != "grid_sample":
        return table[:h, :w].reshape(h * w, d)
    check_lookup(mode, size, (gh, gw))
    if h * w == 0:
        return table.new_zeros(0, d) + 0 * table.sum()
    return INTERPOLATE(table, h, w, size, mode, backend=backend)


def _along(table: Tensor, n: int, size: int, mode: str, backend: str | None) -> Tensor:
    """A table [g, D] of one axis, resampled to the first n of `size`."""
    if (size == len(table) and mode != "grid_sample") or n == 0:
        return table[:n]
    check_lookup(mode, (size,), (len(table),))
    return INTERPOLATE(table[:, None], n, 1, (size, 1), mode, backend=backend)


def check_table(table: Tensor, mode: str) -> tuple[int, int]:
    """(gh, gw) of a table."""
    check("table", table, note="or a pair of them")
    one_of("mode of one table", mode, MODES)
    if table.dim() not in (2, 3) or 0 in table.shape:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected [gh, gw, D] or [g * g, D], not empty")
    if table.dim() == 3:
        return table.shape[0], table.shape[1]
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0]:
        raise ValueError(f"table has {table.shape[0]} rows, expected a square number of them or [gh, gw, D]")
    return side, side


def check_factors(table: Any, mode: str) -> tuple[Tensor, Tensor]:
    """A factorised table: ([gh, D], [gw, D])."""
    if len(table) != 2 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in table):
        raise TypeError("table is no pair of floating-point tensors, expected ([gh, D], [gw, D])")
    y, x = table
    if y.dim() != 2 or x.dim() != 2 or 0 in y.shape or 0 in x.shape or y.shape[1] != x.shape[1]:
        raise ValueError(f"table has shapes {tuple(y.shape)} and {tuple(x.shape)}, expected [gh, D] and [gw, D]")
    check("table[1]", x, like=("table[0]", y))
    one_of("mode of a pair of tables", mode, ["linear_1d", *(m for m in MODES if m != "bicubic_scale")])
    return y, x


def check_lookup(mode: str, size: tuple[int, ...], source: tuple[int, ...]) -> None:
    if mode == "lookup" and any(n > g for n, g in zip(size, source, strict=True)):
        raise ValueError(f"grid is {size}, expected at most the table's {source} for mode lookup")
