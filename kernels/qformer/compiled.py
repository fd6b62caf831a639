"""The compiled part's attention: a forward alone, for the backward of others rounds scores otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.qformer.arguments import Keys, Outputs, outputs_of

_VECTOR = 16  # bytes


class _Attention:
    def __init__(self, kind: str):
        self._part = getattr(torch.ops, f"mmfuse_{kind}")

    def attend(self, q: Tensor, keys: Keys, wants_lse: bool, seed: Tensor | None, dropout: float) -> Outputs:
        found = outputs_of(q, keys.rows)
        q, k, v = map(_aligned, (q, keys.k, keys.v))
        of = (keys.kv_index, keys.lengths, keys.cu_seqlens, keys.longest)
        self._part.few_query_attention(q, k, v, *of, *found)
        return found


CUDA, CPU = _Attention("cuda"), _Attention("cpu")


def _aligned(t: Tensor) -> Tensor:
    """Features of unit stride, in rows that are read by vectors."""
    t = t.resolve_neg() if t.is_neg() else t
    if t.is_contiguous() and t.shape[-1] * t.itemsize % _VECTOR == 0 and t.data_ptr() % _VECTOR == 0:
        return t
    strides = [s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    whole = all(s * t.itemsize % _VECTOR == 0 for s in strides) and t.data_ptr() % _VECTOR == 0
    return t if whole and t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)
