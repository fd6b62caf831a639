"""CLIP's loss beside the cross-entropy with a teacher's softmaxes, with one backward for both."""

from mmfuse.kernels.contrastive.distill.op import distill_clip_loss

__all__ = ["distill_clip_loss"]
