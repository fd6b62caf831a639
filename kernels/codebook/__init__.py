"""Codebooks: the nearest code, quantized rows with their loss, and codes that are computed."""

from mmfuse.kernels.codebook.lookup_free import fsq as fsq
from mmfuse.kernels.codebook.lookup_free import lfq_entropy as lfq_entropy
from mmfuse.kernels.codebook.op import assign_code as assign_code
from mmfuse.kernels.codebook.op import code_statistics as code_statistics
from mmfuse.kernels.codebook.op import linear_argmax as linear_argmax
from mmfuse.kernels.codebook.op import nearest_code, vector_quantize

__all__ = ["nearest_code", "vector_quantize"]
