"""Modality experts (MoME, Multiway): an expert for each row of a stream."""

from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.op import routed_ffn, routed_layer_norm, routed_linear, routed_rms_norm
from mmfuse.kernels.multiway.routing import Routing

__all__ = ["Routing", "packed_attention", "routed_ffn", "routed_layer_norm", "routed_linear", "routed_rms_norm"]
