"""Attention in plain torch, a few images at a time: what belongs to them stays in the cache.

    P = softmax(q K^T / sqrt(d)),  o = P V
    dV = P^T g,   dS = P (dP - <dP, P>) / sqrt(d),  dP = g V^T,   dq = dS K,   dK = dS^T q

Rows that share an image are products with its keys and values, which are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.qformer.arguments import Keys, Outputs

# of the scores, keys and values of a block
_BLOCK_BYTES = 2 << 20

Rows = slice | Tensor
Tokens = tuple[slice, ...]


def attend(q: Tensor, keys: Keys, wants_lse: bool = False, seed: Tensor | None = None, dropout: float = 0.0) -> Outputs:
    _, queries, heads, d = q.shape
    o = q.new_zeros(keys.rows, queries, heads, d)
    lse = q.new_full((keys.rows, heads, queries), -torch.inf, dtype=accumulation_dtype(q.dtype))
    q = q.expand(keys.rows, -1, -1, -1)
    for rows, tokens in _blocks(q, keys):
        k, v = _of(keys.k, tokens), _of(keys.v, tokens)
        scores = _scores(_fold(q[rows], len(k)), k)
        if wants_lse:
            lse[rows] = scores.logsumexp(-1).unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)
        o[rows] = _unfold(cast(scores.softmax(-1) @ cast(v, scores.dtype), o.dtype), queries)
    return Outputs(o, lse, torch.ones_like(lse))


def attend_grads(
    g: Tensor,
    q: Tensor,
    keys: Keys,
    outputs: Outputs,
    needs: Sequence[bool],
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> dict[str, Tensor]:
    """Of q, k and v, those that are needed; the others have any number in them."""
    one, queries, acc = len(q) == 1 != keys.rows, q.shape[1], accumulation_dtype(q.dtype)
    dq = torch.zeros_like(g, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device) for t in (keys.k, keys.v))
    q = q.expand(keys.rows, -1, -1, -1)
    for rows, tokens in _blocks(q, keys):
        k, v = _of(keys.k, tokens), _of(keys.v, tokens)
        q_rows, g_rows = _fold(q[rows], len(k)), _fold(g[rows], len(k))
        p = _scores(q_rows, k).softmax(-1)
        if needs[2]:
            _of(dv, tokens).add_(cast(p, v.dtype).mT @ g_rows)
        if needs[0] or needs[1]:
            dp = cast(g_rows, acc) @ cast(v, acc).mT
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, acc)
            # not rounded: where keys are alike, sums of them are differences of large numbers
            ds = ds.mul_(q.shape[-1] ** -0.5)
            dq[rows] = _unfold(cast(ds @ cast(k, acc), q.dtype), queries)
            _of(dk, tokens).add_(ds.mT @ cast(q_rows, acc))
    dq = dq.sum(0, keepdim=True, dtype=acc).to(q.dtype) if one else dq
    return {"q": dq, "k": cast(dk, keys.k.dtype), "v": cast(dv, keys.v.dtype)}


def _blocks(q: Tensor, keys: Keys) -> Iterator[tuple[Rows, Tokens]]:
    """Rows, and the tokens that they attend to."""
    k = keys.k
    if not q.shape[1]:
        return
    if keys.kv_index is None and keys.lengths is None and keys.cu_seqlens is None:
        n, heads, d = k.shape[1:]
        step = max(1, _BLOCK_BYTES // max(1, n * heads * (2 * d * k.itemsize + 4 * q.shape[1])))
        for first in range(0, len(k) if n else 0, step):
            yield slice(first, first + step), (slice(first, first + step), slice(None))
        return
    step = max(1, _BLOCK_BYTES // max(1, 4 * keys.longest * q.shape[1] * q.shape[2]))
    index = torch.arange(keys.images) if keys.kv_index is None else keys.kv_index
    of, order = index.sort(stable=True)
    ends = torch.searchsorted(of, torch.arange(keys.images + 1)).tolist()
    begin, end = (t.tolist() for t in keys.bounds())
    for i in range(keys.images):
        n = end[i] - begin[i]
        tokens = (slice(i, i + 1), slice(n)) if keys.cu_seqlens is None else (slice(begin[i], end[i]),)
        for first in range(ends[i], ends[i + 1] if n else 0, step):
            yield order[first : min(first + step, ends[i + 1])], tokens


def _of(t: Tensor, tokens: Tokens) -> Tensor:
    """Keys or values of a block, [m, H, n, d]."""
    t = t[tokens]
    return (t if t.dim() == 4 else t[None]).transpose(1, 2)


def _fold(q: Tensor, images: int) -> Tensor:
    """[m R, Q, H, d], the queries of R rows of each image, as [m, H, R Q, d]."""
    return q.unflatten(0, (images, -1)).flatten(1, 2).transpose(1, 2)


def _unfold(o: Tensor, queries: int) -> Tensor:
    return o.transpose(1, 2).unflatten(1, (-1, queries)).flatten(0, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    acc = accumulation_dtype(q.dtype)
    return (cast(q, acc) @ cast(k, acc).mT).mul_(q.shape[-1] ** -0.5)
