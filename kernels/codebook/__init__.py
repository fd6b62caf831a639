"""Codebooks: the nearest code without the matrix of distances, its statistics, and vector quantization."""

from mmfuse.kernels.codebook.lookup_free import fsq, lfq_entropy
from mmfuse.kernels.codebook.op import assign_code, code_statistics, linear_argmax, nearest_code, vector_quantize

__all__ = [
    "assign_code",
    "code_statistics",
    "fsq",
    "lfq_entropy",
    "linear_argmax",
    "nearest_code",
    "vector_quantize",
]
