"""The k most similar rows of a gallery, without the matrix of scores."""

from mmfuse.kernels.contrastive.topk.op import similarity_topk

__all__ = ["similarity_topk"]
