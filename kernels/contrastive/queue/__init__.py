"""Contrastive losses against a queue of momentum features: ALBEF's with soft targets, and MoCo's."""

from mmfuse.kernels.contrastive.queue.op import moco_loss, queue_itc_loss, queue_itc_losses

__all__ = ["moco_loss", "queue_itc_loss", "queue_itc_losses"]
