"""The public function of grouped losses: argument checks and declaration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, Size
from mmfuse.kernels._runtime.arguments import check
from mmfuse.kernels.contrastive import reference
from mmfuse.kernels.contrastive.arguments import features, needs_gradient, weights_of
from mmfuse.kernels.contrastive.normalisers import negative_log_prob, normaliser, over_their_sum, times, weighed
from mmfuse.kernels.contrastive.op import (
    CLIP,
    Pair,
    Targets,
    kept_logits,
    normalize_pair,
    normalize_pair_kept,
)

# the gradient matrix of a group is one square of the template
_LARGEST = 8192


class Outputs(NamedTuple):
    losses: Tensor  # [G]
    found: Tensor  # [5, R]: row_max, row_sum, col_max, col_sum and diag
    x: Tensor  # the features normalised, or empty where they were given so
    y: Tensor
    x_inv: Tensor  # one over their norms, or empty
    y_inv: Tensor


@dataclass
class Groups:
    """Whose rows follow each other, each with its first features; the rest are zeros."""

    sizes: Sequence[int]
    dims: Sequence[int]
    image_wanted: Sequence[bool]  # which need a gradient
    text_wanted: Sequence[bool]
    w_image: float
    w_text: float


def _forward(passes: Any, image: Tensor, text: Tensor, scale: Tensor, groups: Groups, normalize: bool) -> Outputs:
    pair, sizes = normalize_pair(image, text, normalize), groups.sizes
    row_max, row_sum, col_max, col_sum, positive = passes.stats(pair.x, pair.y, scale, sizes, groups.dims)
    diag = torch.cat([s * u for s, u in zip(scale, positive.split(sizes), strict=True)])
    row, column = negative_log_prob(row_max, row_sum, diag), negative_log_prob(col_max, col_sum, diag)
    loss = times(groups.w_image, row) + times(groups.w_text, column)
    losses = torch.stack([part.mean() for part in loss.split(sizes)])
    found = torch.stack([row_max, row_sum, col_max, col_sum, diag])
    return Outputs(losses, found, *normalize_pair_kept(pair, normalize))


def _fake(image: Tensor, text: Tensor, scale: Tensor, groups: Groups, normalize: bool) -> Outputs:
    new, kept = scale.new_empty, normalize_pair_kept(normalize_pair(image, text, normalize), normalize)
    return Outputs(new(len(groups.sizes)), new((5, image.shape[0])), *kept)


def _backward(
    passes: Any, g: Tensor, pair: Pair, scale: Tensor, found: Tensor, groups: Groups, needs: Any
) -> dict[str, Tensor]:
    sizes = groups.sizes
    w_image, w_text, total = over_their_sum(groups.w_image, groups.w_text)
    row_max, row_sum, col_max, col_sum, diag = found
    rho, a, miss = normaliser(row_max, row_sum, diag)
    kappa, b, col_miss = normaliser(col_max, col_sum, diag)
    alpha = torch.stack([part * (total / max(size, 1)) for part, size in zip(g.to(scale.dtype), sizes, strict=True)])
    (rho, a), (kappa, b) = weighed(w_image, rho, a), weighed(w_text, kappa, b)
    d = times(-w_image, miss) + times(-w_text, col_miss)
    weighted = (scale, alpha, a, rho, b, kappa, d)
    wanted = ([n and needs.image for n in groups.image_wanted], [n and needs.text for n in groups.text_wanted])
    given = (pair.x, pair.y, *weighted, sizes, groups.dims, *pair.inverses)
    dx, dy, ds = passes.grad(*given, *wanted, needs.scale)
    return {"image": dx, "text": dy, "scale": ds}


def _of_groups(image: Tensor, text: Tensor, scale: Tensor, groups: Groups, normalize: bool) -> tuple[Tensor]:
    """The losses alone, in plain torch."""
    images, texts = (
        [t[:, :d] for t, d in zip(side.split(groups.sizes), groups.dims, strict=True)] for side in (image, text)
    )
    return (_in_torch(images, texts, list(scale), (groups.w_image, groups.w_text), normalize),)


def _in_torch(
    images: list[Tensor], texts: list[Tensor], scales: list[Tensor], weights: tuple[float, float], normalize: bool
) -> Tensor:
    options: tuple[Any, ...] = (None, None, *weights, 0.0, False, normalize, 0)
    every = zip(images, texts, scales, strict=True)
    return torch.stack([reference.clip_loss(*group, *options)[0] for group in every])


_LAUNCH = Operator(
    "_grouped_clip",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=("image", "text", "scale"),
    instead={"x": "image", "y": "text"},
    implementations=[
        Implementation("triton", passes=Deferred("mmfuse.kernels.contrastive.grouped.kernel")),
        Implementation("torch", function=_of_groups),
    ],
)


def _one_launch(
    images: list[Tensor], texts: list[Tensor], scales: list[Tensor], weights: tuple[float, float], normalize: bool
) -> Tensor:
    sizes, dims = [len(t) for t in images], [t.shape[1] for t in images]
    image_wanted, text_wanted = ([needs_gradient(t) for t in side] for side in (images, texts))
    x, y = (torch.cat([F.pad(t, (0, max(dims) - t.shape[1])) for t in side]) for side in (images, texts))
    groups = Groups(sizes, dims, image_wanted, text_wanted, *weights)
    return _LAUNCH(x, y, torch.stack(scales), groups, normalize, backend="triton").losses


def _one_by_one(
    backend: str,
    images: list[Tensor],
    texts: list[Tensor],
    scales: list[Tensor],
    weights: tuple[float, float],
    normalize: bool,
) -> Tensor:
    want = Targets(None, None, *weights, 0.0, False, 0)

    def one(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        kept = kept_logits("auto", None, image, text.shape[0]) if needs_gradient(image, text, scale) else ""
        return CLIP(image, text, scale, want, normalize, kept, False, backend=backend).loss

    return torch.stack([one(*group) for group in zip(images, texts, scales, strict=True)])


def _largest(images: list[Tensor]) -> Tensor:
    sizes = [image.shape[0] for image in images]
    return images[sizes.index(max(sizes))]


def _many_rows(images: list[Tensor]) -> str | None:
    rows = _largest(images).shape[0]
    return f"a group has {rows} rows, more than {_LARGEST}" if rows > _LARGEST else None


def _pairs(images: list[Tensor]) -> int:
    return _largest(images).shape[0] ** 2


GROUPED = Operator(
    "grouped_clip_loss",
    forward=_one_launch,
    on=lambda images: images[0],
    implementations=[
        Implementation(
            "triton",
            function=_one_launch,
            against=[_many_rows],
            kernels=_LAUNCH.implementations["triton"].kernels,
        ),
        Implementation("cuda", function=partial(_one_by_one, "cuda")),
        Implementation("cpu", function=partial(_one_by_one, "cpu")),
        Implementation("chunked", function=partial(_one_by_one, "chunked")),
        Implementation("torch", function=_in_torch),
    ],
    size=Size("pairs", _pairs, columns=lambda images: _largest(images).shape[1]),
    example=lambda x, **how: grouped_clip_loss([x], [x], [1.0], **how),
)


def grouped_clip_loss(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scales: Sequence[Tensor | float] | Tensor,
    *,
    normalize: bool = False,
    weights: tuple[float, float] = (0.5, 0.5),
    backend: str | None = None,
) -> Tensor:
    """`clip_loss` of several independent batches; on a GPU each kernel is launched once for all of them.

    For models with more than one contrastive problem per step: VLMo's two pairs of towers (Bao et al. 2022, section
    3.2), ImageBind's pairs of modalities, each with a scale of its own (Girdhar et al. 2023, equation 1).

    Args:
        images, texts: for each group [b_g, D_g] and [b_g, D_g], float16, bfloat16, float32 or float64, any strides; the
            same dtype and device in all groups, sizes as they come. Row i of an image pairs with row i of its text.
        logit_scales: for each group the multiplier, already exponentiated: floats or tensors of one element, or [G].
        normalize: divide each row by its L2 norm first, inside the operator.
        weights: (w_r, w_c) of the image-to-text and the text-to-image direction, of all groups.
        backend: "triton" (one launch; groups of at most 8192 rows), or one that takes the groups one by one: "cuda",
            "cpu", "chunked", "torch". By default the first that accepts the largest group.

    Returns:
        The losses [G], in float32 (float64 for float64 features).
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in all features and scales.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    given = [list(images), list(texts), list(logit_scales)]
    if not given[0] or len({len(t) for t in given}) != 1:
        raise ValueError(
            f"images, texts and logit_scales have {', '.join(str(len(t)) for t in given)} groups, expected as many of "
            "each, and at least one"
        )
    found = []
    for i, (image, text, scale) in enumerate(zip(*given, strict=True)):
        first, second = f"images[{i}]", f"texts[{i}]"
        found.append(features(image, text, scale, None, (first, second)))
        x, y, _ = found[i]
        check(second, y, x.shape, f" as {first}")
        check(first, x, dtype=found[0][0].dtype, like=("images[0]", found[0][0]))
    sides = [list(side) for side in zip(*found, strict=True)]
    return GROUPED(*sides, weights_of(weights), normalize, backend=backend)
