"""Position tables for any grid of patches, and FlexiViT's weights for any size of patch."""

from mmfuse.kernels.patch.positions.op import interpolate_position
from mmfuse.kernels.patch.positions.tables import sinusoid_1d, sinusoid_2d
from mmfuse.kernels.patch.positions.weights import resample_weight

__all__ = ["interpolate_position", "resample_weight", "sinusoid_1d", "sinusoid_2d"]
