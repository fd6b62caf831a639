"""Contrastive losses that never hold the N x N matrix of logits: CLIP's softmax and SigLIP's sigmoid."""

from mmfuse.kernels.contrastive.distill import distill_clip_loss
from mmfuse.kernels.contrastive.distributed import distributed_clip_loss, distributed_siglip_loss
from mmfuse.kernels.contrastive.global_loss import global_contrastive_loss as global_contrastive_loss
from mmfuse.kernels.contrastive.grouped import grouped_clip_loss
from mmfuse.kernels.contrastive.matryoshka import matryoshka_clip_loss as matryoshka_clip_loss
from mmfuse.kernels.contrastive.max_query import max_query_loss, max_query_similarity
from mmfuse.kernels.contrastive.max_query.op import MAX_QUERY as MAX_QUERY
from mmfuse.kernels.contrastive.negatives import hard_negatives
from mmfuse.kernels.contrastive.op import clip_loss, siglip_loss
from mmfuse.kernels.contrastive.queue import moco_loss, queue_itc_loss
from mmfuse.kernels.contrastive.topk import similarity_topk

__all__ = [
    "clip_loss",
    "distill_clip_loss",
    "distributed_clip_loss",
    "distributed_siglip_loss",
    "grouped_clip_loss",
    "hard_negatives",
    "max_query_loss",
    "max_query_similarity",
    "moco_loss",
    "queue_itc_loss",
    "siglip_loss",
    "similarity_topk",
]
