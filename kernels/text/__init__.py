"""Text into tokens: embedding, position, type, LayerNorm and padding in one pass; BEiT-3's pictures and text."""

from mmfuse.kernels.text.multiway import multiway_tokens
from mmfuse.kernels.text.op import embed_text

__all__ = ["embed_text", "multiway_tokens"]
