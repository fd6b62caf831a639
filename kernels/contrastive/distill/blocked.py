"""Distillation as a loop over blocks of rows of S = s x yT, the student's logits, and T = s_t x_t y_tT, the teacher's.

    stats          m, l of S and of T, and the sums of exp(T - m) (S - s c), over the negatives of every row and column
    grad           G = a exp(S - rho) + b exp(S - kappa) - a_t exp(T - rho_t) - b_t exp(T - kappa_t)
    teacher_grad   H = a_t exp(T - rho_t) (mean_i - S + s c_i) + b_t exp(T - kappa_t) (mean_j - S + s c_j)

with the positives of G and H given from outside, as in the template (`mmfuse.kernels.contrastive.blocked`). The centres
c are U near the positives: with them the sums keep their digits where S hardly varies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels.contrastive.blocked import Blocks, Gradients, Statistics


@dataclass
class Models:
    """A student, its teacher, and how much the directions count."""

    image: Tensor  # [b, D]
    text: Tensor  # [N, D]
    scale: Tensor
    teacher_image: Tensor  # [b, Dt]
    teacher_text: Tensor  # [N, Dt]
    teacher_scale: Tensor
    w_image: float
    w_text: float
    row_offset: int


class Side(NamedTuple):
    """Features x [b, D] and y [N, D], their scale, and the weights and normalisers of the rows and columns."""

    x: Tensor
    y: Tensor
    scale: Tensor
    a: Tensor
    rho: Tensor
    b: Tensor
    kappa: Tensor


def stats(tile: Any, given: Models, centre: Tensor) -> tuple[Tensor, ...]:
    """(row_max, row_sum, col_max, col_sum, positive) of S and of T, and the sums of exp(T - m) S, [b] and [N]."""
    of_s, of_t = Blocks(given.image, given.text), Blocks(given.teacher_image, given.teacher_text)
    student, teacher = Statistics(of_s, given.scale), Statistics(of_t, given.teacher_scale)
    # the teacher's sums again, of the same exponentials as the products with S
    row_sum, row_cross = torch.zeros_like(teacher.row_sum), torch.zeros_like(teacher.row_sum)
    col_sum, col_cross = torch.zeros_like(teacher.col_sum), torch.zeros_like(teacher.col_sum)
    if len(given.image) and len(given.text):
        u_block, t_block, none = of_s.block(of_s.acc), of_t.block(of_t.acc), centre[:0]
        for i, j in of_s.spans:
            u, t = of_s.logits(i, j, u_block[: j - i]), of_t.logits(i, j, t_block[: j - i])
            diagonal, before = i + given.row_offset, teacher.col_max.clone()
            student.add(tile, u, i, diagonal, none, none)
            teacher.add(tile, t, i, diagonal, none, none)
            largest = (teacher.row_max[i:j], before, teacher.col_max)
            into = (centre[i:j], centre[len(given.image) :], row_sum[i:j], col_sum, row_cross[i:j], col_cross)
            tile.cross_stats(u, t, given.scale, given.teacher_scale, diagonal, *largest, *into)
    return *student.all(), teacher.row_max, row_sum, teacher.col_max, col_sum, teacher.positive, row_cross, col_cross


def grad(
    tile: Any, student: Side, teacher: Side, alpha: Tensor, d: Tensor, row_offset: int, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) of the student, alpha times G's; empty what of x, y and the scale `needs` none."""

    def fill(u: Tensor, t: Tensor, i: int, j: int, g: Tensor) -> None:
        weights = [w for side in (student, teacher) for w in (side.a[i:j], side.rho[i:j], side.b, side.kappa)]
        tile.distill_grad(u, t, student.scale, teacher.scale, *weights, g)

    return _gradients(student, teacher, False, fill, alpha, d, row_offset, *needs)


def teacher_grad(
    tile: Any,
    student: Side,
    teacher: Side,
    alpha: Tensor,
    mean: Tensor,
    centre: Tensor,
    t_centre: Tensor,
    d: Tensor,
    row_offset: int,
    need_x: bool,
    need_y: bool,
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dot) of the teacher, alpha times H's; the mean and centres [b + N] of the rows and the columns.

    `dot` (float64) is sum H (U_t - t_centre) over the negatives. H is the sum of a matrix whose rows and of one whose
    columns add up to 0: any centres give the same, but for the rounding of large terms.
    """
    b = len(teacher.x)
    dot = torch.zeros(b, dtype=torch.float64, device=d.device)

    def fill(u: Tensor, t: Tensor, i: int, j: int, h: Tensor) -> None:
        weights = (teacher.a[i:j], teacher.rho[i:j], teacher.b, teacher.kappa)
        about = (t[k] for k in (slice(i, j), slice(b, None)) for t in (mean, centre, t_centre))
        tile.teacher_grad(u, t, student.scale, teacher.scale, *weights, *about, i + row_offset, h, dot[i:j])

    dx, dy, _ = _gradients(student, teacher, True, fill, alpha, d, row_offset, need_x, need_y, False)
    return dx, dy, dot.sum() if need_s else dot[:0].clone()


def _gradients(student, teacher, of_teacher, fill, alpha, d, row_offset, need_x, need_y, need_s):  # type: ignore[no-untyped-def]
    """dx, dy and, of the student, ds; `fill(u, t, i, j, g)` writes rows i to j of G or H, but for the positives."""
    of_s, of_t = (Blocks(side.x, side.y) for side in (student, teacher))
    side, blocks = (teacher, of_t) if of_teacher else (student, of_s)
    out = Gradients(blocks, side.x, side.y, side.scale * alpha, None, None, need_x, need_y)
    in_blocks = need_s and not (need_x or need_y)
    dot = torch.zeros_like(d)
    if len(side.x) and len(side.y):
        u_block, t_block, g_block = (blocks.block(blocks.acc) for _ in range(3))
        for i, j in blocks.spans:
            u, t = of_s.logits(i, j, u_block[: j - i]), of_t.logits(i, j, t_block[: j - i])
            g = g_block[: j - i]
            fill(u, t, i, j, g)
            g.diagonal(i + row_offset).copy_(d[i:j])
            if in_blocks:
                dot[i:j] = (g * u).sum(1)
            out.add(g, i, j)
    dx, dy, xgy = out.finish()
    ds = alpha * (dot.sum() if in_blocks else xgy.to(blocks.acc))
    return dx, dy, ds if need_s else dot[:0].clone()
