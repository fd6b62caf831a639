"""The contrastive losses over the processes of a group: each computes its own rows of the global batch."""

from mmfuse.kernels.contrastive.distributed.op import distributed_clip_loss, distributed_siglip_loss

__all__ = ["distributed_clip_loss", "distributed_siglip_loss"]
