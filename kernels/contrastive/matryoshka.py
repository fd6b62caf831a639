"""CLIP's loss over prefixes of the features, so that the first dimensions alone are an embedding too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mmfuse.kernels._runtime.arguments import check, constant
from mmfuse.kernels.contrastive.arguments import features
from mmfuse.kernels.contrastive.grouped.op import GROUPED


def matryoshka_clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """sum_k c_k CLIP(image[:, :d_k], text[:, :d_k]) (Kusupati et al. 2022, equation 1, with CLIP's loss).

    The prefixes are the groups of `mmfuse.grouped_clip_loss`: on a GPU one launch of each kernel for all of them.

    Args:
        image, text: [N, D], the same dtype (float16, bfloat16, float32 or float64) and device; any strides.
        logit_scale: the multiplier of all prefixes, already exponentiated: a float, or a tensor of one element.
        dims: the lengths d_k of the prefixes, each from 1 to D; D itself counts only if it is named.
        weights: c_k, one for each prefix; 1 by default.
        normalize: divide each row of each prefix by its own L2 norm. Rows of unit length have no unit prefixes.
        backend: as for `mmfuse.grouped_clip_loss`.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in image, text and logit_scale.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    image, text, scale = features(image, text, logit_scale, 0)
    check("text", text, image.shape, " as image")
    dims = tuple(dims)
    if not dims or not all(isinstance(d, int) and 1 <= d <= image.shape[1] for d in dims):
        raise ValueError(f"dims is {dims}, expected lengths of prefixes from 1 to {image.shape[1]}")
    weights = (1.0,) * len(dims) if weights is None else tuple(weights)
    if len(weights) != len(dims) or not all(abs(w) < math.inf for w in weights):
        raise ValueError(f"weights is {weights}, expected {len(dims)} finite numbers, one for each of dims")
    images, texts = ([t[:, :d] for d in dims] for t in (image, text))
    losses = GROUPED(images, texts, [scale] * len(dims), (0.5, 0.5), normalize, backend=backend)
    if set(weights) != {1}:
        losses = losses * constant(weights, losses.device).to(losses.dtype)
    return losses.sum()
