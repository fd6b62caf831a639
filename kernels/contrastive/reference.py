"""The contrastive losses in plain PyTorch on the whole matrix of logits: their meaning, and the fallback everywhere.

S = s x yT                          x [b, D] images, y [N, D] texts, the positive of row i at column i + row_offset
CLIP     L = w_r mean_i(rho_i - S_ii) + w_c mean_i(kappa_i - S_ii)      Radford et al. 2021, figure 3
         with several positives, the mean of their logits in place of S_ii
         decoupled, rho and kappa without the positive                  Yeh et al. 2022
distill  L = w_r mean_i(-sum_j Pt_ij log P_ij) + w_c mean_i(-sum_j Qt_ji log Q_ji)      Pt, Qt: the teacher's softmaxes
SigLIP   L = (1/b) sum_ij softplus(-z_ij (S_ij + bias))                 Zhai et al. 2023, equation 1
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.contrastive.cross_entropy import mean_cross_entropy

_FEW = 1 << 16  # pairs


def _sum(terms: Sequence[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """Of weights and losses, 0 where no direction counts."""
    if len(terms) == 2 and terms[0][0] == terms[1][0]:
        return terms[0][0] * (terms[0][1] + terms[1][1])
    return functools.reduce(operator.add, [w * t for w, t in terms]) if terms else like.new_zeros(())


def _logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    # a scalar of 0 dimensions leaves the features their dtype
    return cast((scale * image) @ text.t(), scale.dtype)


def _paired(t: Tensor, dim: int, row_offset: int, b: int) -> Tensor:
    """Of the texts along `dim` those that have an image here; of all of them there is no part to cut out."""
    return t if t.shape[dim] == b else t.narrow(dim, row_offset, b)


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, and those of zeros as they are: in float16 the smallest length, 1e-12, would be 0."""
    wide = cast(x, accumulation_dtype(x.dtype))
    return cast(wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12), x.dtype)


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    w_image: float,
    w_text: float,
    label_smoothing: float,
    decoupled: bool,
    normalize: bool,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """(loss, logits [b, N] in the features' dtype). With ids [b] and [N], positives are the pairs of equal ones."""
    if normalize:
        image, text = unit(image), unit(text)
    scaled = scale * image
    s = (
        scaled @ text.t()
    )  # in the operands' dtype, as eager code computes logits; the loss itself in float32 or float64
    b = s.shape[0]
    if image_ids is not None and text_ids is not None:
        same = (image_ids[:, None] == text_ids).to(scale.dtype)
        row_target = same / same.sum(1, keepdim=True).clamp_min(1)
        # of the same ids it is symmetric
        column_target = row_target
        if image_ids is not text_ids:
            same = _paired(same, 1, row_offset, b)
            column_target = (same / same.sum(0).clamp_min(1)).t()
    else:
        column_target = torch.arange(b, device=s.device)
        row_target = column_target + row_offset if row_offset else column_target
    if decoupled:
        s = cast(s, scale.dtype)
        own = row_target[:, None] == torch.arange(s.shape[1], device=s.device)
        positive, negatives = s.diagonal(row_offset)[:b], s.masked_fill(own, -torch.inf)
        sides = ((negatives, 1, w_image), (_paired(negatives, 1, row_offset, b), 0, w_text))
        terms = [(w, (t.logsumexp(dim) - positive).mean()) for t, dim, w in sides if w]
        return _sum(terms, s), s
    images = (s, row_target, w_image)
    # two products of 16 bits, as open_clip has them, are cheaper than to walk down the columns in 32
    if image.dtype.itemsize == 2:
        columns = _paired(text, 0, row_offset, b) @ scaled.t()
    else:
        columns = _paired(s, 1, row_offset, b).t()
    texts = (columns, column_target, w_text)
    of = functools.partial(mean_cross_entropy, dtype=scale.dtype, label_smoothing=label_smoothing)
    terms = [(w, of(t, y)) for t, y, w in (images, texts) if w]
    return _sum(terms, scale), s


def distill_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    w_image: float,
    w_text: float,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """(contrastive, distill): the student's CLIP loss, and its cross-entropy with the teacher's softmaxes."""
    contrastive, s = clip_loss(image, text, scale, None, None, w_image, w_text, 0.0, False, False, row_offset)
    s, t = cast(s, scale.dtype), _logits(teacher_image, teacher_text, teacher_scale)
    s_columns, t_columns = (_paired(of, 1, row_offset, s.shape[0]).t() for of in (s, t))
    sides = ((s, t, w_image), (s_columns, t_columns, w_text))
    terms = [(w, F.cross_entropy(of_s, of_t.softmax(1))) for of_s, of_t, w in sides if w]
    return contrastive, _sum(terms, s)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalize: bool,
    row_offset: int,
    negative_only: bool,
) -> Tensor:
    """The loss."""
    if normalize:
        image, text = unit(image), unit(text)
    s = _logits(image, text, -scale) + -bias  # -S; to subtract, the gradient would be negated whole
    if not negative_only:
        if torch.compiler.is_compiling() or s.numel() > _FEW:
            s.diagonal(row_offset).neg_()  # z S
        else:
            # in place, and of a view, it takes the graph longer than a product
            z = torch.ones(s.shape, dtype=s.dtype, device=s.device)
            z.diagonal(row_offset).fill_(-1)
            s = z * s
    return -F.logsigmoid(s).sum() / s.shape[0]


def statistics(s: Tensor, row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_max, col_max over the negatives, the positives' logits, sum of all logits)."""
    positive = s.diagonal(row_offset)[: len(s)]
    negatives = s.clone()
    negatives.diagonal(row_offset).fill_(-torch.inf)
    if not s.numel():  # nor is there anything to take the largest of
        return s.new_full((len(s),), -torch.inf), s.new_full((s.shape[1],), -torch.inf), positive, s.sum()
    return negatives.amax(1), negatives.amax(0), positive, s.sum()
