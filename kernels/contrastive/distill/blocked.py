"""Distillation as a loop over blocks of rows of S = s x yT, the student's logits, and T = s_t x_t y_tT, the teacher's.

    stats          m, l of S and of T, and the sums of exp(T - m) S, of every row and column over the negatives
    grad           G = a exp(S - rho) + b exp(S - kappa) - a_t exp(T - rho_t) - b_t exp(T - kappa_t)
    teacher_grad   H = a_t exp(T - rho_t) (row_mean - S) + b_t exp(T - kappa_t) (col_mean - S)

with the positives of G and H given from outside, as in the template (`mmfuse.kernels.contrastive.blocked`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels.contrastive.blocked import Blocks, Gradients


class Side(NamedTuple):
    """Features x [b, D] and y [N, D], their scale, and the weights and normalisers of the rows and columns."""

    x: Tensor
    y: Tensor
    scale: Tensor
    a: Tensor
    rho: Tensor
    b: Tensor
    kappa: Tensor


class _Stats:
    """The statistics of a matrix of logits, as its blocks of rows come."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor):
        self.scale, self.blocks = scale, Blocks(x, y)
        like = {"dtype": self.blocks.acc, "device": x.device}
        self.u = self.blocks.block(self.blocks.acc)
        self.row_max, self.col_max = (torch.full((len(t),), -torch.inf, **like) for t in (x, y))
        self.row_sum, self.col_sum = (torch.zeros(len(t), **like) for t in (x, y))
        self.positive = torch.empty(len(x), **like)
        self.none, self.nothing_kept = torch.empty(0, **like), torch.empty(0, dtype=torch.int16, device=x.device)

    def add(self, tile: Any, i: int, j: int, diagonal: int) -> Tensor:
        u = self.blocks.logits(i, j, self.u[: j - i])
        into = (self.row_max[i:j], self.row_sum[i:j], self.col_max, self.col_sum)
        tile.logit_stats(u, self.scale, diagonal, self.none, *into, self.nothing_kept)
        self.positive[i:j] = u.diagonal(diagonal)
        return u

    def found(self) -> tuple[Tensor, ...]:
        return self.row_max, self.row_sum, self.col_max, self.col_sum, self.positive


def stats(
    tile: Any, x: Tensor, y: Tensor, scale: Tensor, x_t: Tensor, y_t: Tensor, t_scale: Tensor, row_offset: int
) -> tuple[Tensor, ...]:
    """(row_max, row_sum, col_max, col_sum, positive) of S and of T, and the sums of exp(T - m) S, [b] and [N]."""
    student, teacher = _Stats(x, y, scale), _Stats(x_t, y_t, t_scale)
    row_cross, col_cross = torch.zeros_like(teacher.row_sum), torch.zeros_like(teacher.col_sum)
    if len(x) and len(y):
        for i, j in student.blocks.spans:
            diagonal, before = i + row_offset, teacher.col_max.clone()
            u, t = student.add(tile, i, j, diagonal), teacher.add(tile, i, j, diagonal)
            into = (row_cross[i:j], col_cross)
            tile.cross_stats(u, t, scale, t_scale, diagonal, teacher.row_max[i:j], before, teacher.col_max, *into)
    return *student.found(), *teacher.found(), row_cross, col_cross


class _Softmaxes:
    """Blocks of U and of a_i exp(S_ij - rho_i) + b_j exp(S_ij - kappa_j)."""

    def __init__(self, tile: Any, side: Side, row_offset: int):
        self.tile, self.side, self.row_offset = tile, side, row_offset
        self.blocks = Blocks(side.x, side.y)
        self.u, self.out = (self.blocks.block(self.blocks.acc) for _ in range(2))
        self.zero, self.none = torch.zeros_like(side.a), side.a[:0]

    def logits(self, i: int, j: int) -> Tensor:
        return self.blocks.logits(i, j, self.u[: j - i])

    def block(self, u: Tensor, i: int, j: int, a: Tensor, b: Tensor) -> Tensor:
        rows = (a[i:j], self.side.rho[i:j], b, self.side.kappa, self.zero[i:j])
        out = self.out[: j - i]
        self.tile.logit_grad(u, self.side.scale, *rows, 0.0, i + self.row_offset, self.none, out, self.none)
        return out


def grad(
    tile: Any,
    student: Side,
    teacher: Side,
    alpha: Tensor,
    d: Tensor,
    row_offset: int,
    need_x: bool,
    need_y: bool,
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) of the student, alpha times G's."""
    of_s, of_t = (_Softmaxes(tile, side, row_offset) for side in (student, teacher))

    def block(i: int, j: int) -> tuple[Tensor, Tensor]:
        u = of_s.logits(i, j)
        g = of_s.block(u, i, j, student.a, student.b)
        g -= of_t.block(of_t.logits(i, j), i, j, teacher.a, teacher.b)
        return u, g

    return _gradients(of_s, block, alpha, d, need_x, need_y, need_s)


def teacher_grad(
    tile: Any,
    student: Side,
    teacher: Side,
    alpha: Tensor,
    row_mean: Tensor,
    col_mean: Tensor,
    d: Tensor,
    row_offset: int,
    need_x: bool,
    need_y: bool,
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) of the teacher, alpha times H's."""
    of_s, of_t = (_Softmaxes(tile, side, row_offset) for side in (student, teacher))

    def block(i: int, j: int) -> tuple[Tensor, Tensor]:
        t = of_t.logits(i, j)
        h = of_s.logits(i, j).mul_(-student.scale)
        h *= of_t.block(t, i, j, teacher.a, teacher.b)
        h += of_t.block(t, i, j, teacher.a * row_mean, teacher.b * col_mean)
        return t, h

    return _gradients(of_t, block, alpha, d, need_x, need_y, need_s)


def _gradients(of, block, alpha, d, need_x, need_y, need_s):  # type: ignore[no-untyped-def]
    side, blocks = of.side, of.blocks
    out = Gradients(blocks, side.x, side.y, side.scale * alpha, None, None, need_x, need_y)
    in_blocks = need_s and not (need_x or need_y)
    dot = torch.zeros_like(d)
    if len(side.y):
        for i, j in blocks.spans:
            u, g = block(i, j)
            g.diagonal(i + of.row_offset).copy_(d[i:j])
            if in_blocks:
                dot[i:j] = (g * u).sum(1)
            out.add(g, i, j)
    dx, dy, xgy = out.finish()
    ds = alpha * (dot.sum() if in_blocks else xgy.to(blocks.acc))
    return dx, dy, ds if need_s else dot[:0].clone()
