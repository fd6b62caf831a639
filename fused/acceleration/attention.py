"""Attention of a few queries over x itself: neither keys nor values are formed (`kernels/qformer/README.md`)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.arguments import autocast_dtype

# elements that the queries of a block of images may have in the width of x: the block stays in a core's cache
_BLOCK = 1 << 20


def absorbs(queries: int, keys: int, head_dim: int, width: int) -> bool:
    """Whether it takes fewer products than keys and values do: Q < N d / (N + d - N d / E)."""
    return queries * (keys * width + head_dim * width - keys * head_dim) < keys * head_dim * width


def exact(weight: Tensor) -> bool:
    """Whether scores reach the softmax as they are summed; in 16 bits and under autocast products round them."""
    return (autocast_dtype(weight) or weight.dtype) in (torch.float32, torch.float64)


def absorbed(q: Tensor, x: Tensor, of_keys: Tensor, of_values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q (x W_k^T)^T / sqrt(d) + mask) x W_v^T: [B, Q, H, d].

    Args:
        q: [B, Q, H, d], or [1, Q, H, d]: the same queries for every image.
        x: [B, N, E].
        of_keys, of_values: [H d, E]. A key's bias changes nothing; a value's is added to the result.
        mask: [B, 1, 1 or Q, N], added to the scores.

    A block of images at a time: as products of the whole batch it is slower than with keys and values.
    """
    queries, heads, d = q.shape[1:]
    of_keys, of_values = (w.unflatten(0, (heads, d)) for w in (of_keys, of_values))
    q = q * d**-0.5
    if len(q) == 1:
        q = _in_width(q, of_keys)

    def attend(rows: slice) -> Tensor:
        a = q if q.dim() == 3 else _in_width(q[rows], of_keys)
        scores = a @ x[rows].mT  # [b, H Q, N]
        if mask is not None:
            scores = (scores.unflatten(1, (heads, queries)) + mask[rows]).flatten(1, 2)
        c = (scores.softmax(-1) @ x[rows]).unflatten(1, (heads, queries))  # [b, H, Q, E]
        o = c.transpose(0, 1).flatten(1, 2) @ of_values.mT  # [H, b Q, d]
        return o.unflatten(1, (-1, queries)).permute(1, 2, 0, 3)

    size = max(1, _BLOCK // (heads * queries * x.shape[-1]))
    if torch.compiler.is_compiling() or len(x) <= size:
        return attend(slice(None))
    return torch.cat([attend(slice(start, start + size)) for start in range(0, len(x), size)])


def _in_width(q: Tensor, of_keys: Tensor) -> Tensor:
    """Queries [b, Q, H, d] in the width of x: [b, H Q, E]."""
    a = q.permute(2, 0, 1, 3).flatten(1, 2) @ of_keys  # [H, b Q, E]
    return a.unflatten(1, q.shape[:2]).transpose(0, 1).flatten(1, 2)
