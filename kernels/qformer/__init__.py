"""Q-Former: a few queries that attend to the tokens of an image."""

from mmfuse.kernels.qformer.op import few_query_attention, project_kv, token_attention

__all__ = ["few_query_attention", "project_kv", "token_attention"]
