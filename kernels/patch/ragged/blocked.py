"""A ragged batch on a CPU: positions of each grid once, written where the product is then added.

rows <- P' + c for each image, P' = (R_h x R_w) P for each different grid;      rows += x VT
In bfloat16 a CPU multiplies at twice the speed; P' + c is then rounded once, as eager's P' is.
dP = (R_h x R_w)T of what tokens of images with the same grid add up to
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.patch.positions.axes import axis_matrix
from mmfuse.kernels.patch.ragged.layout import Places
from mmfuse.kernels.patch.ragged.stem import Folded

_ROWS = 1024  # of a block, where a product's operands are copies


class Positions:
    """The table at the grids of a batch: [S, D] with S = gh gw, or gh + gw of two tables."""

    def __init__(self, places: Places):
        self.grids: list[tuple[int, int, int]] = [(1, *g)[-3:] for g in places.grids.tolist()]
        self.start: list[int] = places.start.tolist()
        self.shape, self.mode, self.factored = places.shape, places.mode, places.factored
        self.keep_aspect, self.merge = places.keep_aspect, places.merge

    def axes(self, h: int, w: int, like: Tensor) -> list[Tensor]:
        size = (max(h, w),) * 2 if self.keep_aspect else (h, w)
        ends = zip(size, self.shape, (h, w), strict=True)
        return [axis_matrix(self.mode, n, g, like.dtype, like.device)[:m] for n, g, m in ends]

    def plus(self, bias: Tensor, table: Tensor, h: int, w: int) -> Tensor:
        """[h w, D] in the order of the tokens, with the bias."""
        rows, columns = self.axes(h, w, table)
        gh, gw = self.shape
        if self.factored:
            p = (rows @ table[:gh])[:, None] + torch.addmm(bias, columns, table[gh:])
        else:
            y = (rows @ table.reshape(gh, -1)).view(h, gw, -1)
            p = torch.baddbmm(bias, columns.expand(h, -1, -1), y)
        m = self.merge
        if m > 1:
            p = p.unflatten(1, (w // m, m)).unflatten(0, (h // m, m)).transpose(1, 2)
        return p.reshape(h * w, -1)

    def add_adjoint(self, total: Tensor, g: Tensor, h: int, w: int) -> None:
        """total [S, D] += that of a gradient [h w, D]."""
        m = self.merge
        if m > 1:
            g = g.view(h // m, w // m, m, m, -1).transpose(1, 2)
        g = g.reshape(h, w, -1)
        rows, columns = self.axes(h, w, g)
        gh, gw = self.shape
        if self.factored:
            total[:gh].addmm_(rows.t(), g.sum(1))
            total[gh:].addmm_(columns.t(), g.sum(0))
        else:
            y = (rows.t() @ g.view(h, -1)).view(gh, w, -1)
            total.view(gh, gw, -1).baddbmm_(columns.t().expand(gh, -1, -1), y)

    def images(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(frames, first patch) of every image that has patches, by its size."""
        of_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (t, h, w), first in zip(self.grids, self.start, strict=True):
            if t and h and w:
                of_size.setdefault((h, w), []).append((t, first))
        return of_size


def preload(rows: Tensor, table: Tensor, bias: Tensor, places: Places) -> None:
    """rows [T, D] <- the positions of every patch, plus the bias."""
    p = Positions(places)
    done = torch.zeros(len(rows), dtype=torch.bool)
    for (h, w), images in p.images().items():
        one = p.plus(bias, table, h, w)
        for t, first in images:
            last = first + t * h * w
            rows[first:last].view(t, h * w, -1).copy_(one.expand(t, -1, -1))
            if places.pads:
                rows[last : first + places.padded] = one[0]
                last = first + places.padded
            done[first:last] = True
    rows[~done] = bias.to(rows.dtype)


def forward(x: Tensor, f: Folded, table: Tensor | None, places: Places, dtype: torch.dtype) -> Tensor:
    """x [T, K] to [R, D]."""
    acc, source = f.bias.dtype, places.source
    v = f.weight.t() if f.weight.dtype == torch.bfloat16 else f.weight.to(acc).t()
    rows = v.new_empty(len(x), len(f.bias))
    if table is None:
        rows.copy_(f.bias.expand_as(rows))
    else:
        preload(rows, table.to(acc), f.bias, places)
    out = rows if source is None else at_source(rows, source)
    for block in blocks(len(out), source is f.subtract is None and x.dtype == v.dtype):
        a = x[block] if source is None else at_source(x, source[block])
        a = a if f.subtract is None else a.to(acc) - f.subtract
        products.add_mm_(out[block], a.to(v.dtype), v)
    if source is not None:
        out.masked_fill_((source < 0)[:, None], 0)
    return out.to(dtype)


def blocks(rows: int, whole: bool) -> Iterator[slice]:
    step = max(1, rows) if whole else _ROWS
    return (slice(i, i + step) for i in range(0, rows, step))


def at_source(rows: Tensor, source: Tensor) -> Tensor:
    """[R, ...] rows of the patches `source`; zeros where there is none."""
    if not len(rows):
        return rows.new_zeros(len(source), rows.shape[1])
    return rows[source.clamp(min=0)].masked_fill_((source < 0)[:, None], 0)


def backward(
    g: Tensor, x: Tensor, subtract: Tensor | None, source: Tensor | None, compute: torch.dtype, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dyT (x - subtract) [D, K], sum dy [D]) of g [R, D], in float32 (float64 for float64)."""
    acc = accumulation_dtype(compute)
    product = torch.zeros(g.shape[1], x.shape[1] if need_weight else 0, dtype=acc, device=g.device)
    total = torch.zeros(g.shape[1], dtype=acc, device=g.device)
    operand = compute if g.is_cuda or compute == torch.bfloat16 else acc
    as_they_are = source is subtract is None and g.dtype == x.dtype == operand
    for block in blocks(len(g), g.is_cuda or as_they_are):
        dy = g[block]
        if source is not None:
            dy = dy.masked_fill((source[block] < 0)[:, None], 0)
        total += dy.sum(0, dtype=acc)
        if need_weight:
            a = x[block] if source is None else at_source(x, source[block])
            if subtract is not None:
                a = a.to(acc) - subtract
            if operand == acc:
                products.add_mm_(product, dy.t().to(acc), a.to(acc))
            elif g.is_cuda:
                product = torch.mm(dy.t().to(operand), a.to(operand), out_dtype=acc)
            else:
                product += dy.t().to(operand) @ a.to(operand)
    return product, total


def table_grad(g: Tensor, patches: int, places: Places, acc: torch.dtype) -> Tensor:
    """[S, D] of g [R, D]."""
    if places.source is not None:
        g = of_patches(g, places.source, patches)
    d, p = g.shape[1], Positions(places)
    out = torch.zeros(sum(p.shape) if p.factored else p.shape[0] * p.shape[1], d, dtype=acc)

    def of_image(t: int, first: int, n: int) -> Tensor:
        last = first + t * n
        # a sum of one takes longer than a copy
        one = g[first:last].to(acc, copy=True) if t == 1 else g[first:last].view(t, n, d).sum(0, dtype=acc)
        if places.pads:
            one[0] += g[last : first + places.padded].sum(0, dtype=acc)
        return one

    for (h, w), images in p.images().items():
        p.add_adjoint(out, functools.reduce(Tensor.add_, (of_image(*image, h * w) for image in images)), h, w)
    return out


def of_patches(g: Tensor, source: Tensor, patches: int) -> Tensor:
    """[T, D] of g [R, D], zeros for a patch that is no token."""
    every = g.new_zeros(patches + 1, g.shape[1])
    every[source] = g  # each patch once; what has none goes to the row that is cut off
    return every[:-1]
