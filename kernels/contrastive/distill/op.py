"""The public function of distillation: argument checks and declaration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, Size
from mmfuse.kernels._runtime.arguments import check, multiplier, require_integer
from mmfuse.kernels.contrastive import reference
from mmfuse.kernels.contrastive.arguments import features, pairs, weights_of
from mmfuse.kernels.contrastive.backends import over_tiles
from mmfuse.kernels.contrastive.blocked import positive_logits
from mmfuse.kernels.contrastive.distill import blocked
from mmfuse.kernels.contrastive.distill.blocked import Models, Side
from mmfuse.kernels.contrastive.normalisers import (
    column_normaliser,
    negative_log_prob,
    normaliser,
    over_their_sum,
    times,
    weighed,
)


class Outputs(NamedTuple):
    contrastive: Tensor
    distill: Tensor
    rows: Tensor  # [8, b]: m and l of student and teacher, the positives' U of both, the rows' and the columns' mean
    columns: Tensor  # [4, N]: m and l of student and teacher


def _forward(passes: Any, given: Models) -> Outputs:
    image, scale, w_image, w_text, row_offset = given.image, given.scale, given.w_image, given.w_text, given.row_offset
    centre = positive_logits(image, given.text, row_offset)
    *found, row_cross, col_cross = passes.stats(given, centre)
    row_max, row_sum, col_max, col_sum, positive = found[:5]
    t_row_max, t_row_sum, t_col_max, t_col_sum, t_positive = found[5:]
    pairs = slice(row_offset, row_offset + len(image))
    diag, t_diag = scale * positive, given.teacher_scale * t_positive
    row = negative_log_prob(row_max, row_sum, diag)
    column = negative_log_prob(col_max[pairs], col_sum[pairs], diag)
    contrastive = (times(w_image, row) + times(w_text, column)).mean()
    # -sum_j Pt_ij log P_ij = (rho_i - S_ii) - sum_j Pt_ij (S_ij - S_ii)
    nearly = scale * (centre[: len(image)] - positive)
    row_mean = _mean_above(t_row_max, t_row_sum, row_cross, t_diag, nearly)
    col_mean = _mean_above(t_col_max[pairs], t_col_sum[pairs], col_cross[pairs], t_diag, nearly)
    distill = (times(w_image, row - row_mean) + times(w_text, column - col_mean)).mean()
    rows = torch.stack([row_max, row_sum, t_row_max, t_row_sum, positive, t_positive, row_mean, col_mean])
    return Outputs(contrastive, distill, rows, torch.stack([col_max, col_sum, t_col_max, t_col_sum]))


def _mean_above(m: Tensor, l: Tensor, cross: Tensor, t_diag: Tensor, centre: Tensor) -> Tensor:  # noqa: E741
    """sum_j Pt_ij (S_ij - S_ii), from sums over the negatives, of S_ij - c; `centre` is c - S_ii."""
    r, inverse, _ = normaliser(m, l, t_diag)
    return (cross + centre * l) * torch.exp(m - r) * inverse


def _fake(given: Models) -> Outputs:
    new = given.scale.new_empty
    return Outputs(new(()), new(()), new((8, given.image.shape[0])), new((4, given.text.shape[0])))


def _backward(
    passes: Any, g: Tensor | None, g_distill: Tensor | None, given: Models, rows: Tensor, columns: Tensor, needs: Any
) -> dict[str, Tensor]:
    image, text, scale, teacher_image, teacher_text, teacher_scale, *weights, row_offset = vars(given).values()
    w_image, w_text, total = over_their_sum(*weights)
    grads: dict[str, Tensor] = {}
    of_student, of_teacher = needs[:3], needs[3:]
    zero = torch.zeros_like(scale)
    g = zero if g is None else g
    if g_distill is None:  # the contrastive loss does not see the teacher
        teacher_tensors = (teacher_image, teacher_text, teacher_scale)
        grads |= zip(needs._fields[3:], (t.new_zeros(t.shape) for t in teacher_tensors), strict=True)
        g_distill, of_teacher = zero, ()
    b = len(image)
    pairs = slice(row_offset, row_offset + b)
    row_max, row_sum, t_row_max, t_row_sum, positive, t_positive, row_mean, col_mean = rows
    col_max, col_sum, t_col_max, t_col_sum = columns
    diag, t_diag = scale * positive, teacher_scale * t_positive
    rho, a, miss = normaliser(row_max, row_sum, diag)
    kappa, beta, col_miss = column_normaliser(col_max, col_sum, diag, pairs)
    t_rho, t_a, t_miss = normaliser(t_row_max, t_row_sum, t_diag)
    t_kappa, t_beta, t_col_miss = column_normaliser(t_col_max, t_col_sum, t_diag, pairs)

    # G = [(c1 + c2) (w_r P + w_c Q) - c1 (w_r + w_c) I - c2 (w_r Pt + w_c Qt)] g / b, the larger of c1 and c2 being 1
    size = torch.maximum(g.abs(), g_distill.abs())
    size = torch.where(size == 0, 1, size).to(scale.dtype)
    c1, c2, alpha = g / size, g_distill / size, size * (total / max(b, 1))
    # the largest term of the softmaxes' means of U_t: all of it where one probability is near 1
    t_centre = torch.cat([t_a * t_rho, t_beta * t_kappa]) * torch.where(teacher_scale == 0, 0, 1 / teacher_scale)

    def counted(t: Tensor) -> Tensor:
        """[b + N]: 0 for the rows and for the columns if their direction has no weight."""
        return torch.cat([times(float(w != 0), part) for w, part in ((w_image, t[:b]), (w_text, t[b:]))])

    (rho, a), (kappa, beta) = weighed(w_image, rho, a), weighed(w_text, kappa, beta)
    (t_rho, t_a), (t_kappa, t_beta) = weighed(w_image, t_rho, t_a), weighed(w_text, t_kappa, t_beta)
    student = Side(image, text, scale, (c1 + c2) * a, rho, (c1 + c2) * beta, kappa)
    teacher = Side(teacher_image, teacher_text, teacher_scale, c2 * t_a, t_rho, c2 * t_beta, t_kappa)
    if any(of_student):
        # P_ii - 1 and P_ii - Pt_ii without cancellation
        d = times(w_image, c2 * t_miss - (c1 + c2) * miss) + times(w_text, c2 * t_col_miss - (c1 + c2) * col_miss)
        found = passes.grad(student, teacher, alpha, d, row_offset, *of_student)
        grads |= zip(("image", "text", "scale"), found, strict=True)
    if any(of_teacher):
        # dT_ij = c2 [w_r Pt_ij (sum_k Pt_ik S_ik - S_ij) + w_c Qt_ij (sum_k Qt_kj S_kj - S_ij)] g / b
        d_row, d_col = times(w_image, c2 * (1 - t_miss) * row_mean), times(w_text, c2 * (1 - t_col_miss) * col_mean)
        centre = positive_logits(image, text, row_offset)
        nearly = scale * (positive - centre[:b])
        mean = torch.cat([nearly + row_mean, torch.zeros_like(col_max)])
        mean[b:][pairs] = nearly + col_mean
        about = [counted(t) for t in (mean, centre, t_centre)]
        dx, dy, dot = passes.teacher_grad(student, teacher, alpha, *about, d_row + d_col, row_offset, *of_teacher)
        if needs.teacher_scale:
            own = d_row * (t_positive - t_centre[:b]) + d_col * (t_positive - t_centre[b:][pairs])
            dot = (alpha * (dot + own.sum(dtype=torch.float64))).to(teacher_scale.dtype)
        grads |= {"teacher_image": dx, "teacher_text": dy, "teacher_scale": dot}
    return grads


_TILED = over_tiles(blocked, "stats", "grad", "teacher_grad")

DISTILL = Operator(
    "distill_clip_loss",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    on=lambda given: given.image,
    differentiable=("image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale"),
    implementations=[
        Implementation("triton", passes=Deferred("mmfuse.kernels.contrastive.distill.kernel")),
        Implementation("cpu", passes=_TILED["cpu"]),
        Implementation("chunked", passes=_TILED["chunked"]),
        Implementation("torch", function=lambda given: reference.distill_loss(**vars(given))),
    ],
    size=Size(
        "pairs",
        lambda given: given.image.shape[0] * given.text.shape[0],
        columns=lambda given: given.image.shape[1],
    ),
    example=lambda x, **how: distill_clip_loss(x, x, 1.0, x, x, 1.0, **how),
)


def distill_clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor | float,
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    row_offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """CLIP's loss, and the cross-entropy of its softmaxes with a teacher's, without an N x N matrix of either.

    L_d = w_r mean_i(-sum_j Pt_ij log P_ij) + w_c mean_j(-sum_i Qt_ij log Q_ij)
    with P, Q the softmaxes of the rows and columns of S = logit_scale * image @ text.T and Pt, Qt those of the teacher
    (open_clip's DistillClipLoss; Wu et al. 2023, TinyCLIP, section 3.1). One backward serves both losses.

    Args:
        image: [b, D], float16, bfloat16, float32 or float64; any strides.
        text: [N, D] with N >= b + row_offset, same dtype and device. Row i of `image` pairs with row i + row_offset.
        logit_scale: the multiplier, already exponentiated: a float, or a tensor of one element. One that is not finite
            gives NaN, as open_clip's losses do.
        teacher_image, teacher_text, teacher_scale: the same of the teacher, [b, Dt] and [N, Dt]; the dtype of `image`.
        weights: (w_r, w_c) of the image-to-text and the text-to-image direction.
        row_offset: where the pairs begin, for a block of rows of a larger batch. With b < N, the text-to-image
            direction is taken over the b texts that have an image here, each against the b images.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        (contrastive, distill), scalars in float32 (float64 for float64 features): `clip_loss` and L_d.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in all features and scales; the teacher's gradients
    are computed only where they are required.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    require_integer("row_offset", row_offset)
    image, text, scale = features(image, text, logit_scale, row_offset)
    names = ("teacher_image", "teacher_text")
    teacher = pairs(teacher_image, teacher_text, row_offset, names)
    for name, t, rows in zip(names, teacher, (image, text), strict=True):
        check(name, t, (rows.shape[0], "Dt"), f" with the rows of {name[8:]}", image.dtype, ("image", image))
    t_scale = multiplier("teacher_scale", teacher_scale, image)
    w_image, w_text = weights_of(weights)
    b = image.shape[0]
    if not w_image and text.shape[0] > b:
        # the texts that have an image here are all that counts
        seen = slice(row_offset, row_offset + b)
        text, teacher, row_offset = text[seen], (teacher[0], teacher[1][seen]), 0
    given = Models(image, text, scale, *teacher, t_scale, w_image, w_text, row_offset)
    contrastive, distill, *_ = DISTILL(given, backend=backend)
    return contrastive, distill
