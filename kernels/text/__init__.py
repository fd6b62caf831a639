"""Text into tokens: embedding, position, type, LayerNorm and padding in one pass; BEiT-3's images and text."""

from mmfuse.kernels.text.op import embed_text
from mmfuse.kernels.text.pair import embed_pair

__all__ = ["embed_pair", "embed_text"]
