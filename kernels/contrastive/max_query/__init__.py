"""The largest similarity over an image's query vectors, and BLIP-2's contrastive loss on it."""

from mmfuse.kernels.contrastive.max_query.op import MAX_QUERY, max_query_loss, max_query_similarity

__all__ = ["MAX_QUERY", "max_query_loss", "max_query_similarity"]
