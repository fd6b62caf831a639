"""Attention by libraries that know sequences: the tokens of each image, and the queries of all rows that attend to it.

Rows that share an image are one sequence of queries, so that its keys and values are not repeated for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfuse.kernels._runtime.sequences import Rows
from mmfuse.kernels.qformer.arguments import Keys, Outputs


def attend(by: Callable[..., Tensor], q: Tensor, keys: Keys, dropout: float) -> Outputs:
    """`by`: an adapter of `mmfuse.kernels._runtime.sequences`."""
    rows, queries, images = keys.rows, q.shape[1], torch.arange(keys.images + 1, device=q.device)
    q = q.expand(rows, -1, -1, -1)
    if keys.kv_index is None:
        ends, back, most = images, None, queries
    else:
        of, order = keys.kv_index.sort(stable=True)
        # how many rows an image has is on the device: no more than there are
        ends, back, most = torch.searchsorted(of, images), order.argsort(), rows * queries
        q = q[order]
    k, v, bounds = _tokens(keys, images)
    o = by(q.flatten(0, 1), k, v, (ends * queries).int(), bounds, most, keys.longest, False, dropout)
    o = o.unflatten(0, (rows, queries))
    some = bounds.diff() > 0
    if keys.kv_index is not None:
        o, some = o[back], some.index_select(0, keys.kv_index)  # which asserts that there is such an image
    o = torch.where(some[:, None, None, None], o, 0)
    return Outputs(o, q.new_empty(0), q.new_empty(0))


def _tokens(keys: Keys, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, bounds): of each image its tokens alone, from row 0 on."""
    k, v, n = keys.k, keys.v, keys.longest
    if keys.cu_seqlens is not None:
        first, last, row = keys.cu_seqlens[0], keys.cu_seqlens[-1], torch.arange(len(k), device=k.device)
        among = ((row >= first) & (row < last))[:, None, None]
        at, order = (row - first).clamp(min=0), (row + first).clamp(max=len(k) - 1)
        rows = Rows(order, at, among, (keys.cu_seqlens - first).int())
    else:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if keys.lengths is None:
            return k, v, (images * n).int()
        rows = Rows.of(torch.arange(n, device=k.device) < keys.lengths[:, None])
    return rows.take(k), rows.take(v), rows.bounds
