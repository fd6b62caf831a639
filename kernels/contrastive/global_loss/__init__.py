"""The global contrastive loss: normalisers over the whole data set, estimated by a moving average for each sample."""

from mmfuse.kernels.contrastive.global_loss.op import global_contrastive_loss

__all__ = ["global_contrastive_loss"]
