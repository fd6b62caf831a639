"""Fused kernels, drop-in modules and reference models for multimodal training and serving."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not Path(__file__).with_name("kernels").exists():
    # a checkout on sys.path: the sub-packages lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

# the others are operators
_ELSEWHERE = {
    "accelerate": "mmfuse.fused",
    "explain": "mmfuse.kernels._runtime",
    "use_backend": "mmfuse.kernels._runtime",
    "UnsupportedError": "mmfuse.kernels._runtime",
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
        fsq,
        global_contrastive_loss,
        group_points,
        grouped_clip_loss,
        hard_negatives,
        interpolate_position,
        lfq_entropy,
        linear_argmax,
        masked_patch_loss,
        matryoshka_clip_loss,
        max_query_loss,
        max_query_similarity,
        mini_pointnet,
        mini_pointnet_training,
        moco_loss,
        multiway_tokens,
        nearest_code,
        nearest_neighbors,
        patch_embed,
        patch_embed_packed,
        queue_itc_loss,
        random_masking,
        resample_weight,
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
    "fsq",
    "global_contrastive_loss",
    "group_points",
    "grouped_clip_loss",
    "hard_negatives",
    "interpolate_position",
    "lfq_entropy",
    "linear_argmax",
    "masked_patch_loss",
    "matryoshka_clip_loss",
    "max_query_loss",
    "max_query_similarity",
    "mini_pointnet",
    "mini_pointnet_training",
    "moco_loss",
    "multiway_tokens",
    "nearest_code",
    "nearest_neighbors",
    "patch_embed",
    "patch_embed_packed",
    "queue_itc_loss",
    "random_masking",
    "resample_weight",
    "select_head",
    "siglip_loss",
    "similarity_topk",
    "use_backend",
    "vector_quantize",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "mmfuse.kernels")), name)
    if name in ("fused", "kernels", "models"):
        return import_module(f"mmfuse.{name}")
    raise AttributeError(f"module 'mmfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
