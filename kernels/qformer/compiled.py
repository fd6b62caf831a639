"""The compiled part's attention on a GPU: a forward alone, for the backward of others rounds scores otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.qformer.arguments import Keys, Outputs, outputs_of

_VECTOR = 16  # bytes


def attend(q: Tensor, keys: Keys, wants_lse: bool, seed: Tensor | None, dropout: float) -> Outputs:
    found = outputs_of(q, keys.rows)
    torch.ops.mmfuse_cuda.few_query_attention(
        *map(_aligned, (q, keys.k, keys.v)), keys.kv_index, keys.lengths, keys.cu_seqlens, keys.longest, *found
    )
    return found


def _aligned(t: Tensor) -> Tensor:
    """Features of unit stride, in rows that are read by vectors."""
    t = t.resolve_neg()
    strides = [s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    whole = all(s * t.itemsize % _VECTOR == 0 for s in strides) and t.data_ptr() % _VECTOR == 0
    return t if whole and t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)
