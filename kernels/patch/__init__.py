"""Pixels, frames and signals to tokens."""

from mmfuse.kernels.patch.op import PATCH_EMBED as PATCH_EMBED
from mmfuse.kernels.patch.op import patch_embed
from mmfuse.kernels.patch.op import stem_of as stem_of
from mmfuse.kernels.patch.op import steps_aside as steps_aside
from mmfuse.kernels.patch.positions import interpolate_position, resample_weight
from mmfuse.kernels.patch.ragged import pack_images, patch_embed_packed
from mmfuse.kernels.patch.reconstruction import masked_patch_loss, random_masking
from mmfuse.kernels.patch.stem import Stem as Stem

__all__ = [
    "interpolate_position",
    "masked_patch_loss",
    "pack_images",
    "patch_embed",
    "patch_embed_packed",
    "random_masking",
    "resample_weight",
]
