"""The public function of the top k: argument checks and declaration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import require_integer
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.arguments import alike
from mmfuse.kernels.contrastive.backends import over_tiles
from mmfuse.kernels.contrastive.topk import blocked, reference

# the longest list that a program of the GPU's kernel keeps
_MOST = 64


class Top(NamedTuple):
    values: Tensor  # [B, k]
    indices: Tensor  # [B, k]


def _forward(passes: Any, queries: Tensor, gallery: Tensor, k: int) -> Top:
    return Top(*passes.similarity_topk(queries, gallery, k))


def _fake(queries: Tensor, k: int) -> Top:
    new, shape = queries.new_empty, (queries.shape[0], k)
    return Top(new(shape, dtype=accumulation_dtype(queries.dtype)), new(shape, dtype=torch.int64))


def _long(k: int) -> str | None:
    return f"k is {k}: a program keeps lists of at most {_MOST}" if k > _MOST else None


def _in_onnx(queries: Tensor, gallery: Tensor, k: int) -> Top:
    """ONNX has no stable sort, but its TopK, too, has equal scores in the order of the gallery."""
    acc = accumulation_dtype(queries.dtype)
    return Top(*reference.numbers(queries.to(acc) @ gallery.to(acc).t()).topk(k, dim=1))


_TILED = over_tiles(blocked, "similarity_topk", tiles=blocked)

TOPK = Operator(
    "similarity_topk",
    forward=_forward,
    fake=_fake,
    implementations=[
        Implementation(
            "triton", passes=Deferred("mmfuse.kernels.contrastive.topk.kernel"), against=[_long], traceable=True
        ),
        Implementation("cpu", passes=_TILED["cpu"]),
        Implementation("chunked", passes=_TILED["chunked"]),
        Implementation("torch", passes=reference),
    ],
    size=Size("scores", lambda queries, gallery: queries.shape[0] * gallery.shape[0]),
    example=lambda x, **how: similarity_topk(x, x, 1, **how),  # type: ignore[has-type]
    export=OpSpec("MmfuseSimilarityTopK", _in_onnx),
)


@torch.no_grad()
def similarity_topk(queries: Tensor, gallery: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k rows of a gallery with the largest inner product with each query, exactly, without the matrix of scores.

    Args:
        queries: [B, D], float16, bfloat16, float32 or float64; any strides.
        gallery: [N, D], same dtype and device.
        k: 1 <= k <= N.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        values [B, k], largest first, in float32 (float64 for float64), and indices [B, k] int64 into the gallery. Equal
        scores come in the order of the gallery; NaN and -inf count as the lowest finite number.

    Deterministic: two runs are equal bitwise. Not differentiable. Under autocast, float32 features are rounded to the
    autocast dtype first, as a matrix product would.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    queries, gallery = alike("queries", queries, "gallery", gallery)
    require_integer("k", k)
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {gallery.shape[0]} rows of gallery")
    values, indices = TOPK(queries, gallery, k, backend=backend)
    return values, indices
