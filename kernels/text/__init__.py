"""Text into tokens: embedding, position, type, LayerNorm and padding in one pass."""

from mmfuse.kernels.text.op import embed_text

__all__ = ["embed_text"]
