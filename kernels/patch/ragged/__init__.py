"""Batches of images of any sizes: packed patches to tokens."""

from mmfuse.kernels.patch.ragged.op import (
    PackedTokens,
    drop_patches,
    pack_first_fit,
    pack_images,
    patch_embed_packed,
)

__all__ = ["PackedTokens", "drop_patches", "pack_first_fit", "pack_images", "patch_embed_packed"]
