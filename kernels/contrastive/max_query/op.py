"""The public functions of the largest similarity over queries: argument checks and declaration."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import check, integers, scalar
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.arguments import alike
from mmfuse.kernels.contrastive.backends import over_tiles
from mmfuse.kernels.contrastive.max_query import blocked, reference

_features = partial(alike, shape=("B", "Q", "D"))

# --- the similarity -------------------------------------------------------------------------------------------------


class Largest(NamedTuple):
    u: Tensor  # [B, N]
    reached_by: Tensor = torch.empty(0)  # [B, N], the first query that reaches it


def _forward(passes: Any, image: Tensor, text: Tensor) -> Largest:
    return Largest(*passes.maximum(image, text))


def _fake(image: Tensor, text: Tensor) -> Largest:
    new, shape = image.new_empty, (image.shape[0], text.shape[0])
    return Largest(
        new(shape, dtype=accumulation_dtype(image.dtype)), new(shape, dtype=blocked.index_dtype(image.shape[1]))
    )


def _backward(passes: Any, g: Tensor, reached_by: Tensor, image: Tensor, text: Tensor, needs: Any) -> dict[str, Tensor]:
    d_image, d_text = passes.gradient(g.contiguous(), reached_by, image, text, *needs)
    return {"image": d_image, "text": d_text}


def _many_queries(image: Tensor) -> str | None:
    return f"image has {image.shape[1]} queries, more than 256" if image.shape[1] > 256 else None


_TILED = over_tiles(blocked, "maximum", "gradient", tiles=blocked)

MAX_QUERY = Operator(
    "max_query_similarity",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=("image", "text"),
    implementations=[
        Implementation(
            "triton",
            passes=Deferred("mmfuse.kernels.contrastive.max_query.kernel"),
            against=[_many_queries],
            traceable=True,
        ),
        Implementation("cpu", passes=_TILED["cpu"], against=[_many_queries]),
        Implementation("chunked", passes=_TILED["chunked"]),
        Implementation("torch", function=lambda image, text: Largest(reference.similarity(image, text))),
    ],
    # with few queries the sparse gradient saves nothing
    size=Size(
        "products",
        lambda image, text: image.shape[0] * image.shape[1] * text.shape[0],
        columns=lambda image: image.shape[1],
    ),
    example=lambda x, **how: max_query_similarity(x[:, None], x, **how),
    export=OpSpec("MmfuseMaxQuerySimilarity"),
    also={"max_query_loss": lambda x, **how: max_query_loss(x.unsqueeze(1), x, 1.0, **how)},
)


def max_query_similarity(image: Tensor, text: Tensor, *, backend: str | None = None) -> Tensor:
    """The similarity of an image, given by its query vectors, and a text: the largest over the queries.

    u_ij = max_k <image_ik, text_j>, with neither the [B, N, Q] products nor expanded operands in memory
    (BLIP-2, Li et al. 2023, section 3.1; the late interaction of one text vector).

    Args:
        image: [B, Q, D], float16, bfloat16, float32 or float64; any strides.
        text: [N, D], same dtype and device.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, N] in float32 (float64 for float64 features).
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    The gradient of a pair goes to the first query that reaches the maximum. Deterministic: two runs are equal bitwise.
    Differentiable in image and text.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    image, text = _features("image", image, "text", text)
    return MAX_QUERY(image, text, backend=backend).u


def max_query_loss(
    image: Tensor,
    text: Tensor,
    temp: Tensor | float,
    *,
    image_all: Tensor | None = None,
    text_all: Tensor | None = None,
    row_offset: int = 0,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    all_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """BLIP-2's image-text contrastive loss: the similarity is the largest over an image's query vectors.

    L = (L_i2t + L_t2i) / 2, the cross-entropies over j of max_k <image_ik, text_all_j> / temp and of
    max_k <image_all_jk, text_i> / temp (Li et al. 2023, section 3.1). With eps = label_smoothing the targets are
    (1 - eps) positives + eps / N: the positive of row i is j = i + row_offset or, with ids, every j of equal id, with
    1 / count. BLIP-2 takes eps = 0.1, and ids where images have several captions.

    Args:
        image: [B, Q, D] query vectors of the images, float16, bfloat16, float32 or float64; any strides.
        text: [B, D], same dtype and device.
        temp: the divisor: a float, or a tensor of one element.
        image_all, text_all: [N, Q, D] and [N, D], what the texts and the images are compared with: the features of all
            processes. By default the own ones; both directions then share one product. Gradients reach them if they
            require one; LAVIS detaches them.
        row_offset: where the own rows begin in `image_all` and `text_all`.
        label_smoothing: eps, in both directions, from 0 to 1.
        ids, all_ids: [B] and [N] integers: positives are equal ids. `all_ids` is `ids` by default. A row of which
            `all_ids` has no equal gives NaN.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features); NaN for an empty batch, a mean over nothing.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable in the features and temp.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    image, text = _features("image", image, "text", text)
    check("text", text, (image.shape[0], "D"), ", one row for each of image")
    temp = scalar("temp", temp, image)
    own = image_all is None and text_all is None
    image_all, text_all = _features(
        "image_all", image if image_all is None else image_all, "text_all", text if text_all is None else text_all
    )
    check("image_all", image_all, ("N", "Q", image.shape[2]), " as image", image.dtype, ("image", image))
    check("text_all", text_all, (image_all.shape[0], "D"), ", one row for each of image_all")
    b, n = image.shape[0], image_all.shape[0]
    if not (row_offset >= 0 and row_offset + b <= n):
        raise ValueError(
            f"row_offset is {row_offset} for {b} rows of image, expected them within the {n} rows of image_all"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1]")
    if ids is not None:
        all_ids = ids if all_ids is None else all_ids
        ids, all_ids = integers("ids", ids, image, "image"), integers("all_ids", all_ids, image_all, "image_all")
    elif all_ids is not None:
        raise ValueError("all_ids is given without ids, expected both")

    i2t = MAX_QUERY(image, text_all, backend=backend).u / temp
    t2i = i2t.t() if own else MAX_QUERY(image_all, text, backend=backend).u.t() / temp
    target = reference.targets(i2t, row_offset, ids, all_ids)
    of_image, of_text = (F.cross_entropy(s, target, label_smoothing=label_smoothing) for s in (i2t, t2i))
    return (of_image + of_text) / 2
