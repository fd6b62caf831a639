"""Independent contrastive problems in one launch of each kernel of the template, over a table of their tiles.

The features of all groups lie one below the other, x and y [R, D], padded with zeros to the widest group. A program
reads from the table (`_entry` in `mmfuse.kernels.contrastive.kernel`) which tile of which group is its own; the table
follows from the shapes alone. The products with G are the group's own, by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels.contrastive import kernel as template


def groups(sizes: list[int]) -> list[slice]:
    """The rows of each group."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _table(
    sizes: tuple[int, ...], dims: tuple[int, ...], tile: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, list[int]]:
    """(group, tile_m, tile_n, begin, height, D) of every program [programs, 6], and each group's number of programs."""
    block_m, block_n, block_d = tile
    tables, counts = [], []
    for i, (rows, dim) in enumerate(zip(groups(list(sizes)), dims, strict=True)):
        down, across = triton.cdiv(sizes[i], block_m), triton.cdiv(sizes[i], block_n)
        wide = triton.cdiv(dim, block_d) * block_d
        program = torch.arange(down * across, dtype=torch.int32, device=device)
        at = (program // max(across, 1), program % max(across, 1))
        group, *given = (torch.full_like(program, number) for number in (i, rows.start, sizes[i], wide))
        tables.append(torch.stack([group, *at, *given], dim=1))
        counts.append(down * across)
    return torch.cat(tables), counts


_kept_table = lru_cache(256)(_table)


def _launch(kernel: str, x: Tensor, y: Tensor, sizes: list[int], dims: list[int], wide: bool):  # type: ignore[no-untyped-def]
    """(x, y with whole blocks of columns, table, programs per group, settings)"""
    settings = template._settings(kernel, x, wide)
    block_d = settings["BLOCK_D"]
    x, y = (torch.nn.functional.pad(t, (0, -t.shape[1] % block_d)).contiguous() for t in (x, y))
    tile = (settings["BLOCK_M"], settings["BLOCK_N"], block_d)
    # a graph makes its own: what is kept may be dropped while the graph lives, and a graph's memory is not to be kept
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    table, counts = (_table if capturing else _kept_table)(tuple(sizes), tuple(dims), tile, x.device)
    return x, y, table, counts, settings | {"EVEN_D": True, "EVEN_N": False}


def stats(x: Tensor, y: Tensor, scale: Tensor, sizes: list[int], dims: list[int]) -> tuple[Tensor, ...]:
    """(row_max, row_sum, col_max, col_sum, positive), [R] each, for the groups' scales [G]; see `blocked.stats`."""
    r, new = len(x), {"dtype": accumulation_dtype(x.dtype), "device": x.device}
    x, y, table, _, settings = _launch("stats", x, y, sizes, dims, wide=False)
    # maxima and sums of the rows, then of the columns; a small group leaves some parts as they are
    parts = torch.zeros(2, triton.cdiv(max(sizes), min(settings["BLOCK_M"], settings["BLOCK_N"])), 2 * r, **new)
    parts[0] = -torch.inf
    found = torch.zeros(2, 2 * r, **new)
    found[0] = -torch.inf
    positive = torch.empty(r, **new)
    if r:
        row, col = parts, parts[:, :, r:]
        launch(
            template._stats_fwd_kernel,
            (len(table),),
            x,
            row_max_ptr=row[0],
            row_sum_ptr=row[1],
            row_same_ptr=scale,
            col_max_ptr=col[0],
            col_sum_ptr=col[1],
            col_same_ptr=scale,
            positive_ptr=positive,
            logits_ptr=scale,
            x_ptr=x,
            y_ptr=y,
            scale_ptr=scale,
            step_ptr=scale,
            row_key_ptr=scale,
            col_key_ptr=scale,
            row_centre_ptr=scale,
            col_centre_ptr=scale,
            table_ptr=table,
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            stride_u=r,
            D=x.shape[1],
            M=2 * r,
            N=2 * r,
            diagonal=0,
            SAVE="",
            KEYED=False,
            GROUPED=True,
            MAXIMA=False,
            **settings,
        )
        template._merge((found[0], found[1]), parts)
    return found[0, :r], found[1, :r], found[0, r:], found[1, r:], positive


def grad(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    alpha: Tensor,
    a: Tensor,
    rho: Tensor,
    b: Tensor,
    kappa: Tensor,
    d: Tensor,
    sizes: list[int],
    dims: list[int],
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: list[bool],
    need_y: list[bool],
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy [R, D], ds [G]); zeros where a group's features need no gradient. Extra memory: G, [R, largest group]."""
    in_tiles = need_s and not any(need_x) and not any(need_y)
    left, right, table, counts, settings = _launch("grad", x, y, sizes, dims, wide=True)
    side = -(-max(sizes) // 16) * 16
    g = torch.empty((len(x), side) if not in_tiles else (1, 1), dtype=x.dtype, device=x.device)
    dot = torch.empty(len(table) if in_tiles else 0, dtype=scale.dtype, device=x.device)
    if len(x):
        launch(
            template._grad_kernel,
            (len(table),),
            x,
            g_ptr=g,
            dot_ptr=dot,
            logits_ptr=scale,
            x_ptr=left,
            y_ptr=right,
            scale_ptr=scale,
            a_ptr=a,
            rho_ptr=rho,
            b_ptr=b,
            kappa_ptr=kappa,
            d_ptr=d,
            step_ptr=scale,
            row_key_ptr=scale,
            col_key_ptr=scale,
            p_ptr=scale,
            q_ptr=scale,
            table_ptr=table,
            stride_g=g.stride(0),
            stride_u=0,
            stride_x=left.stride(0),
            stride_y=right.stride(0),
            D=left.shape[1],
            M=len(x),
            N=len(x),
            diagonal=0,
            shift=0.0,
            SAVED="",
            KEYED=False,
            GROUPED=True,
            STORE=not in_tiles,
            DOT=in_tiles,
            G_SCALE=template._g_scale(x.dtype),
            **settings,
        )
    dx = torch.zeros(x.shape if any(need_x) else 0, dtype=x.dtype, device=x.device)
    dy = torch.zeros(y.shape if any(need_y) else 0, dtype=y.dtype, device=y.device)
    if in_tiles:
        sums = [part.sum(dtype=torch.float64) for part in dot.split(counts)]
    else:
        unscale = 1 / template._g_scale(x.dtype)
        factor, sums = scale * alpha * unscale, []
        for i, (rows, dim) in enumerate(zip(groups(sizes), dims, strict=True)):
            block = g[rows, : sizes[i]]
            sums.append(torch.zeros((), dtype=torch.float64, device=x.device))
            sides = [(block.t(), x, y, y_inv, dy)] if need_y[i] else []
            if need_x[i] or (need_s and not need_y[i]):
                sides.append((block, y, x, x_inv, dx))
            for matrix, other, own, inverse, out in sides:
                product = torch.empty(sizes[i], dim, dtype=scale.dtype, device=x.device)
                template._multiply(product, matrix, other[rows, :dim], accumulate=False)
                into = out[rows, :dim] if out.numel() else torch.empty_like(own[rows, :dim])
                inv = None if inverse is None else inverse[rows]
                sums[i] = unscale * template.finish(product, own[rows, :dim], factor[i], inv, into)
    ds = alpha * torch.stack(sums).to(scale.dtype)
    return dx, dy, ds if need_s else scale.new_empty(0)


def aot_specs() -> Iterator[Spec]:
    """The grouped variants of the template's kernels, for `mmfuse compile-report`."""
    flags = {"EVEN_D": True, "EVEN_N": False, "KEYED": False, "GROUPED": True, "MAXIMA": False, "SAVE": "", "SAVED": ""}
    for dtype, precision, tile, archs in template.shipped("stats"):
        yield template.spec(
            template._stats_fwd_kernel, "grouped", dtype, tile | flags | {"PRECISION": precision}, archs
        )
    for dtype, precision, tile, archs in template.shipped("grad"):
        for dot in template.distinct([False, True], dtype, precision):
            more = {"PRECISION": precision, "STORE": not dot, "DOT": dot, "G_SCALE": template._g_scale(dtype)}
            name = "grouped dot" if dot else "grouped"
            yield template.spec(template._grad_kernel, name, dtype, tile | template._WIDE | flags | more, archs)
