"""Modules and losses that replace the field's own, and `accelerate()`, which swaps them into a live model."""

from mmfuse.fused.acceleration import Report, accelerate, decelerate
from mmfuse.fused.global_contrastive import GlobalContrastiveLoss
from mmfuse.fused.grad_cache import GradCache
from mmfuse.fused.graphs import captured
from mmfuse.fused.imagebind import ImageBindLoss
from mmfuse.fused.language import linear_cross_entropy
from mmfuse.fused.losses import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from mmfuse.fused.momentum import MomentumQueueITC, momentum_update
from mmfuse.fused.patch import PatchEmbed, vit_tokens
from mmfuse.fused.points import OneLLMPointEmbed, P3Embed, PointBertEncoder, PointBertGroup, PointPatchEmbed
from mmfuse.fused.poolers import AttentionalPooler, PerceiverResampler
from mmfuse.fused.pretraining import QFormerPretraining
from mmfuse.fused.qformer import QFormer, QFormerConfig, QFormerEncoder, QFormerKV
from mmfuse.fused.quantizer import NormEMAVectorQuantizer, VectorQuantizer
from mmfuse.fused.queries import MaxQueryITC
from mmfuse.fused.retrieval import HardNegativeSampler, Ranking, rerank

__all__ = [
    "AttentionalPooler",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GlobalContrastiveLoss",
    "GradCache",
    "HardNegativeSampler",
    "ImageBindLoss",
    "MaxQueryITC",
    "MomentumQueueITC",
    "NormEMAVectorQuantizer",
    "OneLLMPointEmbed",
    "P3Embed",
    "PatchEmbed",
    "PerceiverResampler",
    "PointBertEncoder",
    "PointBertGroup",
    "PointPatchEmbed",
    "QFormer",
    "QFormerConfig",
    "QFormerEncoder",
    "QFormerKV",
    "QFormerPretraining",
    "Ranking",
    "Report",
    "SigLipLoss",
    "VectorQuantizer",
    "accelerate",
    "captured",
    "decelerate",
    "linear_cross_entropy",
    "momentum_update",
    "rerank",
    "vit_tokens",
]
