"""The public contrastive losses: argument checks and declarations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Operator, Size
from mmfuse.kernels._runtime.arguments import one_of, require_integer, scalar
from mmfuse.kernels._runtime.device import total_memory
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels.contrastive import reference
from mmfuse.kernels.contrastive.arguments import features, ids_of_sides, needs_gradient, positives, weights_of
from mmfuse.kernels.contrastive.backends import of_template
from mmfuse.kernels.contrastive.blocked import positive_logits, unit_rows
from mmfuse.kernels.contrastive.normalisers import (
    column_normaliser,
    negative_log_prob,
    normaliser,
    over_their_sum,
    times,
    weighed,
)

Save = Literal["auto", "recompute", "store"]
_SAVES = get_args(Save)

# of tensor cores in 16 bits while a byte is moved: by their data sheets 160 on an A100, 210 on an H200, 300 on an H100
_OPERATIONS_PER_BYTE = 300

_NONE = torch.empty(0)

PAIRS = Size("pairs", lambda image, text: image.shape[0] * text.shape[0], columns=lambda image: image.shape[1])


# --- CLIP: softmax over rows and columns ----------------------------------------------------------------------------


@dataclass
class Pair:
    """The features that are multiplied: normalised, or taken as they are."""

    x: Tensor  # [b, D]
    y: Tensor  # [N, D]
    x_inv: Tensor  # [b] one over the norms, empty where the features are taken as they are
    y_inv: Tensor  # [N]

    @property
    def inverses(self) -> tuple[Tensor | None, Tensor | None]:
        return (self.x_inv, self.y_inv) if self.x_inv.numel() else (None, None)


def normalize_pair(image: Tensor, text: Tensor, normalize: bool) -> Pair:
    if not normalize:
        return Pair(image, text, image.new_empty(0), text.new_empty(0))
    (x, x_inv), (y, y_inv) = unit_rows(image), unit_rows(text)
    return Pair(x, y, x_inv, y_inv)


def normalize_pair_kept(pair: Pair, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pair as outputs of an operator: empty what is an input, which an output may not alias."""
    x, y = (pair.x, pair.y) if normalize else (pair.x.new_empty(0), pair.y.new_empty(0))
    return x, y, pair.x_inv, pair.y_inv


class ClipOutputs(NamedTuple):
    loss: Tensor
    row_max: Tensor = _NONE  # [b] of the negatives, as the others
    col_max: Tensor = _NONE  # [N]
    diag: Tensor = _NONE  # [b]
    total: Tensor = _NONE  # the sum of all logits, where it was asked for
    row_sum: Tensor = _NONE  # [b]
    col_sum: Tensor = _NONE  # [N]
    logits: Tensor = _NONE  # [b, N] as `save` says, or empty
    x: Tensor = _NONE  # the features normalised, or empty where they were given so
    y: Tensor = _NONE
    x_inv: Tensor = _NONE  # one over their norms, or empty
    y_inv: Tensor = _NONE
    keys: Tensor = _NONE  # [b + N] int32, equal for a row and a column that are a positive; empty without ids
    shares: Tensor = _NONE  # [b + N], one over the number of positives


@dataclass
class Targets:
    """What the softmaxes are to be, and how much the directions count."""

    image_ids: Tensor | None  # [b], equal for a row and a column that are a positive
    text_ids: Tensor | None  # [N]
    w_image: float
    w_text: float
    label_smoothing: float
    decoupled: bool
    row_offset: int


def _clip_forward(
    passes: Any, image: Tensor, text: Tensor, scale: Tensor, want: Targets, normalize: bool, save: str, sum_all: bool
) -> ClipOutputs:
    pair = normalize_pair(image, text, normalize)
    x, y, b, n = pair.x, pair.y, len(image), len(text)
    label_smoothing, row_offset = want.label_smoothing, want.row_offset
    keys, shares, same = scale.new_empty(0), scale.new_empty(0), None
    if want.image_ids is not None and want.text_ids is not None:
        keys, shares = positives(want.image_ids, want.text_ids, row_offset, scale.dtype)
        same = (keys, positive_logits(x, y, row_offset))
    found = passes.stats(x, y, scale, row_offset, save, same, sum_all)
    row_max, row_sum, col_max, col_sum, positive, logits, *sums = found
    pairs = slice(row_offset, row_offset + b)
    diag = scale * positive
    if want.decoupled:
        row, column = row_max + row_sum.log() - diag, col_max[pairs] + col_sum[pairs].log() - diag
    else:
        row = negative_log_prob(row_max, row_sum, diag)
        column = negative_log_prob(col_max[pairs], col_sum[pairs], diag)
    if same is not None:
        own = keys[:b] == keys[b:][pairs]
        nearly = scale * (same[1][:b] - positive)
        row = _over_positives(row, scale * sums[0], nearly, own, shares[:b], label_smoothing)
        column = _over_positives(column, scale * sums[1][pairs], nearly, own, shares[b:][pairs], label_smoothing)
    loss = (times(want.w_image, row) + times(want.w_text, column)).mean()
    total_logits = diag.new_zeros(())
    if label_smoothing or sum_all:
        total_logits = scale * torch.dot(x.sum(0, dtype=scale.dtype), y.sum(0, dtype=scale.dtype))
    if label_smoothing:
        to_all = (want.w_image / n + want.w_text / b) * total_logits / b
        # out of the same products as the total: what is kept in 16 bits has been rounded
        own = scale * positive_logits(x, y, row_offset)[:b] if save == "int16" else diag
        loss = loss + label_smoothing * ((want.w_image + want.w_text) * own.mean() - to_all)
    kept = normalize_pair_kept(pair, normalize)
    return ClipOutputs(loss, row_max, col_max, diag, total_logits, row_sum, col_sum, logits, *kept, keys, shares)


def _over_positives(
    of_pair: Tensor, others: Tensor, centre: Tensor, own: Tensor, share: Tensor, label_smoothing: float
) -> Tensor:
    """(1 - eps) (rho - mean S of the positives) + eps (rho - S_ii); the first term is 0 for a row without positives.

    `of_pair` is rho - S_ii, `centre` is c - S_ii, and `others` the sum of S - c over the positives but the pair itself.
    """
    number = torch.where(share > 0, 1 / share, 0).round() - own.to(share.dtype)
    hard = torch.where(share > 0, of_pair - share * (others + number * centre), 0 * of_pair)
    return (1 - label_smoothing) * hard + label_smoothing * of_pair if label_smoothing else hard


def _clip_fake(image: Tensor, text: Tensor, scale: Tensor, want: Targets, normalize: bool, save: str) -> ClipOutputs:
    b, n, new = image.shape[0], text.shape[0], scale.new_empty
    logits = new((b, n), dtype=torch.int16 if save == "int16" else scale.dtype) if save else new(0)
    kept = normalize_pair_kept(normalize_pair(image, text, normalize), normalize)
    of_ids = (new(0), new(0)) if want.text_ids is None else (new(b + n, dtype=torch.int32), new(b + n))
    return ClipOutputs(new(()), new(b), new(n), new(b), new(()), new(b), new(n), logits, *kept, *of_ids)


def _clip_backward(
    passes: Any,
    g: Tensor,
    pair: Pair,
    scale: Tensor,
    want: Targets,
    row_max: Tensor,
    row_sum: Tensor,
    col_max: Tensor,
    col_sum: Tensor,
    diag: Tensor,
    logits: Tensor,
    keys: Tensor,
    shares: Tensor,
    needs: Any,
) -> dict[str, Tensor]:
    b, n = len(pair.x), len(pair.y)
    w_image, w_text, total = over_their_sum(want.w_image, want.w_text)
    label_smoothing, pairs = want.label_smoothing, slice(want.row_offset, want.row_offset + b)
    shift = label_smoothing * (w_image / n + w_text / b) if b else 0.0
    counted = torch.full_like(diag, -torch.inf) if want.decoupled else diag
    rho, a, miss = normaliser(row_max, row_sum, counted)
    kappa, beta, column_miss = column_normaliser(col_max, col_sum, counted, pairs)
    (rho, a), (kappa, beta) = weighed(w_image, rho, a), weighed(w_text, kappa, beta)
    # P_ii - 1 without cancellation, likewise the columns
    miss, column_miss = times(w_image, miss), times(w_text, column_miss)
    d = label_smoothing * (w_image + w_text) - shift - miss - column_miss
    targets = None
    if want.text_ids is not None:
        p, q = ((1 - label_smoothing) * w * share for w, share in ((w_image, shares[:b]), (w_text, shares[b:])))
        # what a row's targets add up to: its probabilities count as often
        mass = (1 - label_smoothing) * (shares > 0).to(shares.dtype) + label_smoothing
        row_mass, mass = mass[:b], mass[b:]
        a, beta = row_mass * a, mass * beta
        own = torch.where(keys[:b] == keys[b:][pairs], p + q[pairs], 0)
        kept = w_image * row_mass + w_text * mass[pairs]
        d = kept - own - shift - row_mass * miss - mass[pairs] * column_miss
        targets = (keys, p, q)
    weighted = (g.to(scale.dtype) * (total / max(b, 1)), a, rho, beta, kappa, d, shift)
    given = (pair.x, pair.y, scale, *weighted, want.row_offset, logits, *pair.inverses)
    dx, dy, ds = passes.grad(*given, *needs, targets)
    return {"image": dx, "text": dy, "scale": ds}


def _clip_reference(
    image: Tensor, text: Tensor, scale: Tensor, want: Targets, normalize: bool, sum_all: bool
) -> ClipOutputs:
    loss, s = reference.clip_loss(image, text, scale, normalize=normalize, **vars(want))
    return ClipOutputs(loss, *(reference.statistics(s.detach().to(scale.dtype), want.row_offset) if sum_all else ()))


CLIP = Operator(
    "clip_loss",
    forward=_clip_forward,
    backward=_clip_backward,
    fake=_clip_fake,
    differentiable=("image", "text", "scale"),
    instead={"x": "image", "y": "text"},
    implementations=of_template(
        _clip_reference,
        against={"cuda": [lambda want: None if want.text_ids is None else "ids are given"]},
    ),
    size=replace(PAIRS, kind=lambda image, want: dtype_name(image.dtype) + "-ids" * (want.text_ids is not None)),
    example=lambda x, **how: clip_loss(x, x, 1.0, **how),
)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    weights: tuple[float, float] = (0.5, 0.5),
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    row_offset: int = 0,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    save: Save = "auto",
    store_budget: int | None = None,
    metrics: bool = False,
    backend: str | None = None,
) -> Any:
    """CLIP's symmetric cross-entropy over the similarities of paired features, without the N x N matrix of logits.

    L = w_r mean_i(logsumexp_j S_ij - S_ii) + w_c mean_i(logsumexp_j S_ji - S_ii),  S = logit_scale * image @ text.T
    (Radford et al. 2021, figure 3, with w_r = w_c = 1/2). Features are taken as they are unless `normalize` is set.

    Args:
        image: [b, D], float16, bfloat16, float32 or float64; any strides.
        text: [N, D] with N >= b + row_offset, same dtype and device. Row i of `image` pairs with row i + row_offset.
        logit_scale: the multiplier, already exponentiated: a float, or a tensor of one element. One that is not finite
            gives NaN, as open_clip's losses do.
        logit_bias: accepted for a common signature; softmax does not see it, its gradient is zero.
        normalize: divide each row by its L2 norm first, inside the operator.
        weights: (w_r, w_c) of the image-to-text and the text-to-image direction; a zero makes the loss one-sided.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in both directions; needs b = N if w_c is not 0.
        decoupled: leave the positive out of the log-sum-exp, which is then over the negatives alone (Yeh et al. 2022,
            DCL). Such a loss has no lower bound. Needs two pairs, and neither label_smoothing nor ids.
        row_offset: where the positives begin, for a block of rows of a larger batch. With b < N, the text-to-image
            direction is taken over the b texts that have an image here, each against the b images.
        ids: integers on the features' device, [N] for the texts (their images have the same), or a pair: [b] for the
            images, [N] for the texts. The positives of a row are all columns of its id, likewise of a column: each has
            the target 1 / their number before smoothing, over the directions and texts described above. Where there
            is none the targets are 0 (before smoothing), and so is that term of the mean; ALBEF would divide by 0.
            Ids that are all different give the plain loss. Metrics go by the pairs i, i + row_offset all the same.
        save: what the forward keeps for the backward. "recompute": no logits, they are computed again (four
            matrix products in all). "store": the logits, three products; at full precision for float32 and float64
            features if `store_budget` allows, otherwise in 16-bit fixed point: loss and gradients are then those of
            logits off by at most logit_scale / 65534 (for unit rows). "auto": as "store" while the logits at the
            features' own precision fit the budget, otherwise recompute; on a GPU, 16-bit features of fewer than 600
            columns are multiplied again, too: by estimate, that is faster than to read the logits.
        store_budget: bytes; by default 256 MiB on a CPU and 1/32 of the memory of a GPU.
        metrics: also return a dict of detached scalars: `image_to_text_r1` and `text_to_image_r1` (the share of
            rows whose positive has the largest logit), `mean_positive`, `mean_negative` and `max_logit`.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features), or `(loss, metrics)`.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in image, text and logit_scale.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    require_integer("row_offset", row_offset)
    image, text, scale = features(image, text, logit_scale, row_offset)
    w_image, w_text = weights_of(weights)
    b, n = image.shape[0], text.shape[0]
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1]")
    if label_smoothing and w_text and b != n:
        raise ValueError(
            f"label_smoothing is {label_smoothing} with a text-to-image weight of {w_text}: expected as many images "
            f"as texts, got {b} and {n}"
        )
    if decoupled and (label_smoothing or ids is not None):
        raise ValueError("decoupled is set, expected neither label_smoothing nor ids beside it")
    if decoupled and b == 1:
        raise ValueError("decoupled is set and image has 1 row, expected at least 2: a pair alone has no negatives")
    one_of("save", save, _SAVES)
    sides = ids_of_sides(ids, image, text, row_offset)
    if not w_image and n > b and not metrics:
        # the texts that have an image here are all that counts
        pairs = slice(row_offset, row_offset + b)
        text, row_offset = text[pairs], 0
        sides = sides[0], None if sides[1] is None else sides[1][pairs]
    kept = kept_logits(save, store_budget, image, text.shape[0]) if needs_gradient(image, text, scale) else ""
    want = Targets(*sides, w_image, w_text, float(label_smoothing), decoupled, row_offset)
    found = CLIP(image, text, scale, want, normalize, kept, metrics, backend=backend)
    loss = found.loss
    if isinstance(logit_bias, Tensor):
        loss = loss + 0 * logit_bias.sum().to(loss.dtype)
    return (loss, _metrics(b, n, row_offset, *found[1:5])) if metrics else loss


def kept_logits(save: Save, budget: int | None, image: Tensor, n: int) -> str:
    """What the forward keeps: "" (nothing), "int16" or "full"."""
    if save == "recompute":
        return ""
    if budget is None:
        budget = total_memory(image.device) // 32 if image.is_cuda else 256 << 20
    size, pairs = image.dtype.itemsize, image.shape[0] * n
    # a product of 16 bits takes less time than to write its logits and to read them: by this model, not measured
    if save == "auto" and image.is_cuda and size == 2 and 2 * image.shape[1] < 2 * size * _OPERATIONS_PER_BYTE:
        return ""
    if size >= 4 and pairs * size <= budget:
        return "full"
    return "int16" if save == "store" or (size == 2 and 2 * pairs <= budget) else ""


def _metrics(
    b: int, n: int, row_offset: int, row_max: Tensor, col_max: Tensor, diag: Tensor, total: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            "image_to_text_r1": (diag > row_max).to(diag.dtype).mean(),
            "text_to_image_r1": (diag > col_max[row_offset : row_offset + b]).to(diag.dtype).mean(),
            "mean_positive": diag.mean(),
            "mean_negative": (total - diag.sum()) / (b * n - b) if b * n > b else torch.full_like(total, math.nan),
            "max_logit": torch.maximum(diag, row_max).amax() if b else torch.full_like(total, math.nan),
        }


# --- SigLIP: one sigmoid per pair -----------------------------------------------------------------------------------


class SiglipOutputs(NamedTuple):
    loss: Tensor
    d_image: Tensor = _NONE  # the gradients for g = 1 in the accumulation dtype, empty where they are not needed
    d_text: Tensor = _NONE
    d_scale: Tensor = _NONE
    d_bias: Tensor = _NONE


def _siglip_forward(
    passes: Any,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalize: bool,
    row_offset: int,
    negative_only: bool,
    needs: Any,
) -> SiglipOutputs:
    pair = normalize_pair(image, text, normalize)
    options = (row_offset, negative_only, *pair.inverses, needs.image, needs.text)
    loss, *grads = passes.sigmoid(pair.x, pair.y, scale, bias, *options)
    return SiglipOutputs(loss if len(image) else loss / 0.0, *grads)


def _siglip_fake(image: Tensor, text: Tensor, scale: Tensor, needs: Any) -> SiglipOutputs:
    d_image, d_text = (scale.new_empty(t.shape if n else 0) for t, n in zip((image, text), needs, strict=False))
    return SiglipOutputs(scale.new_empty(()), d_image, d_text, scale.new_empty(()), scale.new_empty(()))


def _siglip_backward(
    g: Tensor,
    d_image: Tensor,
    d_text: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    image_dtype: torch.dtype,
    text_dtype: torch.dtype,
) -> dict[str, Tensor]:
    d_image, d_text = ((g * d).to(dtype) for d, dtype in ((d_image, image_dtype), (d_text, text_dtype)))
    return {"image": d_image, "text": d_text, "scale": g * d_scale, "bias": g * d_bias}


SIGLIP = Operator(
    "siglip_loss",
    forward=_siglip_forward,
    backward=_siglip_backward,
    fake=_siglip_fake,
    differentiable=("image", "text", "scale", "bias"),
    implementations=of_template(lambda **given: SiglipOutputs(reference.siglip_loss(**given))),
    size=PAIRS,
    example=lambda x, **how: siglip_loss(x, x, 1.0, **how),
)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    negative_only: bool = False,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss, without the N x N matrix of logits.

    L = (1/b) sum_ij softplus(-z_ij S_ij),  S = logit_scale * image @ text.T + logit_bias,  z = 1 for a pair, else -1
    (Zhai et al. 2023, equation 1). The gradients are computed in the forward pass: three matrix products in all.

    Args:
        image: [b, D], float16, bfloat16, float32 or float64; any strides.
        text: [N, D] with N >= b + row_offset, same dtype and device. Row i of `image` pairs with row i + row_offset.
        logit_scale: the multiplier, already exponentiated: a float, or a tensor of one element. One that is not finite
            gives NaN, as open_clip's losses do.
        logit_bias: a float, a tensor of one element, or None for 0.
        normalize: divide each row by its L2 norm first, inside the operator.
        negative_only: no pair is positive, as for a block of another process's texts.
        row_offset: where the positives begin, for a block of rows of a larger batch.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features); NaN without pairs, a mean over nothing.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in image, text, logit_scale and logit_bias.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    require_integer("row_offset", row_offset)
    negative_only = bool(negative_only)
    image, text, scale = features(image, text, logit_scale, None if negative_only else row_offset)
    bias = scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image)
    found = SIGLIP(image, text, scale, bias, normalize, row_offset, negative_only, backend=backend)
    return found.loss
