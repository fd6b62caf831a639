"""Fused kernels, drop-in modules and reference models for multimodal training and serving."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not Path(__file__).with_name("kernels").exists():
    # a checkout on sys.path: the sub-packages lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

_LAZY = {
    "accelerate": "mmfuse.fused",
    "explain": "mmfuse.kernels._runtime",
    "use_backend": "mmfuse.kernels._runtime",
    "UnsupportedError": "mmfuse.kernels._runtime",
    "clip_loss": "mmfuse.kernels",
    "code_statistics": "mmfuse.kernels",
    "linear_argmax": "mmfuse.kernels",
    "nearest_code": "mmfuse.kernels",
    "vector_quantize": "mmfuse.kernels",
    "distill_clip_loss": "mmfuse.kernels",
    "grouped_clip_loss": "mmfuse.kernels",
    "distributed_clip_loss": "mmfuse.kernels",
    "distributed_siglip_loss": "mmfuse.kernels",
    "global_contrastive_loss": "mmfuse.kernels",
    "hard_negatives": "mmfuse.kernels",
    "matryoshka_clip_loss": "mmfuse.kernels",
    "moco_loss": "mmfuse.kernels",
    "patch_embed": "mmfuse.kernels",
    "queue_itc_loss": "mmfuse.kernels",
    "siglip_loss": "mmfuse.kernels",
    "similarity_topk": "mmfuse.kernels",
    "ball_query": "mmfuse.kernels",
    "farthest_points": "mmfuse.kernels",
    "group_points": "mmfuse.kernels",
    "mini_pointnet": "mmfuse.kernels",
    "nearest_neighbors": "mmfuse.kernels",
    "pointnet_statistics": "mmfuse.kernels",
    "max_query_loss": "mmfuse.kernels",
    "max_query_similarity": "mmfuse.kernels",
    "select_head": "mmfuse.kernels",
    "embed_text": "mmfuse.kernels",
    "multiway_tokens": "mmfuse.kernels",
}

if TYPE_CHECKING:
    from mmfuse.fused import accelerate
    from mmfuse.kernels import (
        ball_query,
        clip_loss,
        code_statistics,
        distill_clip_loss,
        distributed_clip_loss,
        distributed_siglip_loss,
        embed_text,
        farthest_points,
        global_contrastive_loss,
        group_points,
        grouped_clip_loss,
        hard_negatives,
        linear_argmax,
        matryoshka_clip_loss,
        max_query_loss,
        max_query_similarity,
        mini_pointnet,
        moco_loss,
        multiway_tokens,
        nearest_code,
        nearest_neighbors,
        patch_embed,
        pointnet_statistics,
        queue_itc_loss,
        select_head,
        siglip_loss,
        similarity_topk,
        vector_quantize,
    )
    from mmfuse.kernels._runtime import UnsupportedError, explain, use_backend

__all__ = [
    "UnsupportedError",
    "__version__",
    "accelerate",
    "ball_query",
    "clip_loss",
    "code_statistics",
    "distill_clip_loss",
    "distributed_clip_loss",
    "distributed_siglip_loss",
    "embed_text",
    "explain",
    "farthest_points",
    "global_contrastive_loss",
    "group_points",
    "grouped_clip_loss",
    "hard_negatives",
    "linear_argmax",
    "matryoshka_clip_loss",
    "max_query_loss",
    "max_query_similarity",
    "mini_pointnet",
    "moco_loss",
    "multiway_tokens",
    "nearest_code",
    "nearest_neighbors",
    "patch_embed",
    "pointnet_statistics",
    "queue_itc_loss",
    "select_head",
    "siglip_loss",
    "similarity_topk",
    "use_backend",
    "vector_quantize",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
