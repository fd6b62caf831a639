"""Pixels, frames and signals to tokens."""

from mmfuse.kernels.patch.op import backward_from, forward_into, patch_embed, stem_of

__all__ = ["backward_from", "forward_into", "patch_embed", "stem_of"]
