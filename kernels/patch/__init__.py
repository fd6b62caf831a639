"""Pixels, frames and signals to tokens."""

from mmfuse.kernels.patch.op import patch_embed

__all__ = ["patch_embed"]
