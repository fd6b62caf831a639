"""Masked autoencoders: which patches are seen, and the loss of those that are not."""

from mmfuse.kernels.patch.reconstruction.masking import random_masking
from mmfuse.kernels.patch.reconstruction.op import masked_patch_loss

__all__ = ["masked_patch_loss", "random_masking"]
