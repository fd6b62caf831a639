"""The public function of the top k: argument checks, registration and choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive import arguments
from mmfuse.kernels.contrastive.backends import (
    no_reason,
    reasons_against_chunked,
    reasons_against_cpu,
    reasons_against_triton,
)
from mmfuse.kernels.contrastive.topk import blocked, reference

# the longest list that a program of the GPU's kernel keeps
_MOST = 64


def _topk(queries: Tensor, gallery: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return reference.similarity_topk(queries, gallery, k)
    if backend == "triton":
        from mmfuse.kernels.contrastive.topk import kernel

        return kernel.similarity_topk(queries, gallery, k)
    tile = blocked.compiled_tile(torch.ops.mmfuse_cpu) if backend == "cpu" else blocked.TorchTile
    return blocked.similarity_topk(tile, queries, gallery, k)


def _topk_fake(queries: Tensor, gallery: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=accumulation_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


topk_op = register("similarity_topk", _topk, _topk_fake)


def _reasons_against_triton(queries: Tensor, gallery: Tensor, k: int = 1) -> list[str]:
    many = [f"k is {k}: a program keeps lists of at most {_MOST}"] if k > _MOST else []
    return reasons_against_triton(queries) + many


def _few(queries: Tensor, gallery: Tensor, k: int = 1) -> list[str]:
    return [f"k is {k}: a list is kept in order by insertion up to 256"] if k > 256 else []


TOPK = Op(
    "similarity_topk",
    [
        Impl("triton", topk_op, _reasons_against_triton, only_named_in_the_interpreter),
        Impl("cpu", topk_op, reasons_against_cpu, _few),
        Impl("chunked", topk_op, reasons_against_chunked),
        Impl("torch", topk_op, no_reason),
    ],
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
    queries, gallery, _ = arguments.features(queries, gallery, 1.0, 0, False, ("queries", "gallery"))
    arguments.require_integer("k", k)
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {gallery.shape[0]} rows of gallery")
    impl = TOPK.select(queries, gallery, k, backend=backend)
    value, index = impl.fn(queries, gallery, k, impl.name)
    return value, index
