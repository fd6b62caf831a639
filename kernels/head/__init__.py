"""The head of a tower on one selected token: LayerNorm, projection, unit length, scale, mean over clips."""

from mmfuse.kernels.head.op import select_head

__all__ = ["select_head"]
