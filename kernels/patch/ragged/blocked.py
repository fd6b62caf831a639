"""A ragged batch on a CPU: positions of each grid once, written where the product is then added.

rows <- P' + c for each image, P' = (R_h x R_w) P for each different grid;      rows += x VT, a block at a time
In bfloat16 a CPU multiplies at twice the speed; a block's product is then rounded once, as eager's is.
dP = (R_h x R_w)T of what tokens of images with the same grid add up to
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.patch.positions.axes import axis_matrix
from mmfuse.kernels.patch.positions.reference import resample, resample_adjoint
from mmfuse.kernels.patch.ragged.layout import Places
from mmfuse.kernels.patch.ragged.stem import Folded

_ROWS = 1024  # of a block


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

    def of(self, table: Tensor, h: int, w: int) -> Tensor:
        """[h w, D] in the order of the tokens."""
        rows, columns = self.axes(h, w, table)
        if self.factored:
            gh = self.shape[0]
            p = (rows @ table[:gh])[:, None] + columns @ table[gh:]
        else:
            p = resample(table.unflatten(0, self.shape), rows, columns)
        m = self.merge
        if m > 1:
            p = p.unflatten(1, (w // m, m)).unflatten(0, (h // m, m)).transpose(1, 2)
        return p.reshape(h * w, -1)

    def adjoint(self, g: Tensor, h: int, w: int) -> Tensor:
        """[S, D] of a gradient [h w, D]."""
        m = self.merge
        if m > 1:
            g = g.view(h // m, w // m, m, m, -1).transpose(1, 2)
        g = g.reshape(h, w, -1)
        rows, columns = self.axes(h, w, g)
        if self.factored:
            return torch.cat([rows.t() @ g.sum(1), columns.t() @ g.sum(0)])
        return resample_adjoint(g, rows, columns).flatten(0, 1)

    def images(self) -> Iterator[tuple[tuple[int, int, int], int]]:
        """(grid, first patch) of every image that has patches, images of the same size one after the other."""
        for grid, first in sorted(zip(self.grids, self.start, strict=True), key=lambda image: image[0][1:]):
            if all(grid):
                yield grid, first


def preload(rows: Tensor, table: Tensor, bias: Tensor, places: Places) -> None:
    """rows [T, D] <- the positions of every patch, plus the bias."""
    p = Positions(places)
    known, one = (0, 0), bias[None]
    done = torch.zeros(len(rows), dtype=torch.bool)
    for (t, h, w), first in p.images():
        if known != (h, w):
            known, one = (h, w), p.of(table, h, w) + bias
        last = first + t * h * w
        rows[first:last].view(t, h * w, -1).copy_(one.expand(t, -1, -1))
        if places.pads:
            rows[last : first + places.padded] = one[0]
            last = first + places.padded
        done[first:last] = True
    rows[~done] = bias


def forward(x: Tensor, f: Folded, table: Tensor | None, places: Places, dtype: torch.dtype) -> Tensor:
    """x [T, K] to [R, D]."""
    acc, source = f.bias.dtype, places.source
    v = f.weight.t() if f.weight.dtype == torch.bfloat16 else f.weight.to(acc).t()
    rows = f.bias.new_empty(len(x), len(f.bias))
    if table is None:
        rows.copy_(f.bias.expand_as(rows))
    else:
        preload(rows, table.to(acc), f.bias, places)
    out = rows if source is None else at_source(rows, source)
    for i in range(0, len(out), _ROWS):
        block = slice(i, i + _ROWS)
        a = x[block] if source is None else at_source(x, source[block])
        a = a if f.subtract is None else a.to(acc) - f.subtract
        if v.dtype == acc:
            products.add_mm_(out[block], a.to(acc), v)
        else:
            out[block] += a.to(v.dtype) @ v
    if source is not None:
        out.masked_fill_((source < 0)[:, None], 0)
    return out.to(dtype)


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
    step = _ROWS if g.device.type == "cpu" else max(1, len(g))
    for i in range(0, len(g), step):
        block = slice(i, i + step)
        dy = g[block]
        if source is not None:
            dy = dy.masked_fill((source[block] < 0)[:, None], 0)
        total += dy.sum(0, dtype=acc)
        if need_weight:
            a = x[block] if source is None else at_source(x, source[block])
            if subtract is not None:
                a = a.to(acc) - subtract
            if g.is_cuda and compute != acc:
                product = torch.mm(dy.t().to(compute), a.to(compute), out_dtype=acc)
            elif compute == torch.bfloat16:
                product += dy.t().to(compute) @ a.to(compute)
            else:
                products.add_mm_(product, dy.t().to(acc), a.to(acc))
    return product, total


def table_grad(g: Tensor, patches: int, places: Places, acc: torch.dtype) -> Tensor:
    """[S, D] of g [R, D]."""
    if places.source is not None:
        g = of_patches(g, places.source, patches)
    d, p = g.shape[1], Positions(places)
    out = torch.zeros(sum(p.shape) if p.factored else p.shape[0] * p.shape[1], d, dtype=acc)
    known, one = (0, 0), torch.zeros(0, d, dtype=acc)
    for (t, h, w), first in p.images():
        if known != (h, w):
            if one.numel():
                out += p.adjoint(one, *known)
            known, one = (h, w), torch.zeros(h * w, d, dtype=acc)
        last = first + t * h * w
        one += g[first:last].view(t, h * w, d).sum(0, dtype=acc)
        if places.pads:
            one[0] += g[last : first + places.padded].sum(0, dtype=acc)
    return out + p.adjoint(one, *known) if one.numel() else out


def of_patches(g: Tensor, source: Tensor, patches: int) -> Tensor:
    """[T, D] of g [R, D], zeros for a patch that is no token."""
    every = g.new_zeros(patches + 1, g.shape[1])
    every[source] = g  # each patch once; what has none goes to the row that is cut off
    return every[:-1]
