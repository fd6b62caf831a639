"""The operators, installed as ``mmfuse.kernels``."""

if __name__ == "kernels":
    # The checkout's root is on sys.path (`python -m`, `python -c`), so this folder shadows Hugging Face's `kernels`
    # distribution, which transformers imports: step aside for the real one where there is one.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        _module = module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
else:
    from mmfuse.kernels.codebook import (
        code_statistics,
        fsq,
        lfq_entropy,
        linear_argmax,
        nearest_code,
        vector_quantize,
    )
    from mmfuse.kernels.contrastive import (
        clip_loss,
        distill_clip_loss,
        distributed_clip_loss,
        distributed_siglip_loss,
        global_contrastive_loss,
        grouped_clip_loss,
        hard_negatives,
        matryoshka_clip_loss,
        max_query_loss,
        max_query_similarity,
        moco_loss,
        queue_itc_loss,
        siglip_loss,
        similarity_topk,
    )
    from mmfuse.kernels.head import select_head
    from mmfuse.kernels.patch import patch_embed
    from mmfuse.kernels.patch.positions import interpolate_position, resample_weight
    from mmfuse.kernels.patch.ragged import patch_embed_packed
    from mmfuse.kernels.patch.reconstruction import masked_patch_loss, random_masking
    from mmfuse.kernels.points import (
        ball_query,
        farthest_points,
        group_points,
        mini_pointnet,
        mini_pointnet_training,
        nearest_neighbors,
    )
    from mmfuse.kernels.text import embed_text, multiway_tokens

    __all__ = [
        "ball_query",
        "clip_loss",
        "code_statistics",
        "distill_clip_loss",
        "distributed_clip_loss",
        "distributed_siglip_loss",
        "embed_text",
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
        "vector_quantize",
    ]
