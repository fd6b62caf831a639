"""Several independent CLIP losses, of different sizes, in one launch of each kernel."""

from mmfuse.kernels.contrastive.grouped.op import grouped_clip_loss

__all__ = ["grouped_clip_loss"]
