"""Attention over tokens themselves: the weights of keys and values are on the side of the queries.

    q~ = q W_k           [Q H, E]: for one image, all heads have x as their key
    P  = softmax(q~ x^T / sqrt(d) + bias),  c = P x,  o = c W_v^T + b_v
    dc = g W_v,  dS = P (dc x^T - <dc x^T, P>),  dq~ = dS x / sqrt(d),  dx = P^T dc + dS^T q~ / sqrt(d)
    dq = dq~ W_k^T,  dW_k = q^T dq~,  dW_v = g^T c

Image by image: x, q~, P and c stay in the cache, where products of the whole batch would write and read 2 Q H E numbers
of each image in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.qformer.arguments import Outputs, Tokens

# of the queries in the tokens' space, for a group of images
_GROUP_BYTES = 2 << 20


def multiplications(q: Tensor, tokens: Tokens) -> tuple[int, int]:
    """Of an image: where keys and values are formed, and where weights are absorbed."""
    (_, queries, heads, d), (_, n, e) = q.shape, tokens.x.shape
    shared = 1 if q.shape[0] > 1 else 0  # the same queries of all images meet W_k once
    return 2 * n * heads * d * (e + queries), queries * heads * e * (2 * n + d * (1 + shared))


def attend(q: Tensor, tokens: Tokens, wants_lse: bool) -> Outputs:
    (_, queries, heads, d), images = q.shape, tokens.x.shape[0]
    of_keys, of_values = _by_head(tokens, q.dtype, heads)
    o = q.new_empty(images, queries, heads, d)
    lse = q.new_empty(images, heads * queries, dtype=accumulation_dtype(q.dtype))
    lengths = _lengths(tokens)
    for group, moved in _groups(q, of_keys, images):
        context = []
        for i, a in zip(group, moved, strict=True):
            x_i = tokens.x[i, : lengths[i]]
            s = _scores(a, x_i, d, tokens.bias, i)
            lse[i] = s.logsumexp(1) if wants_lse else 0
            context.append(products.mm(cast(s.softmax(1), q.dtype), x_i))
        y = products.mm(_together(context, heads), of_values.mT)  # [H, m Q, d]
        o[group.start : group.stop] = y.unflatten(1, (-1, queries)).permute(1, 2, 0, 3)
    if tokens.value_bias is not None:
        o += tokens.value_bias.view(heads, d)
    if not all(lengths):
        o[[i for i, length in enumerate(lengths) if not length]] = 0
    return Outputs(o, lse.view(images, heads, queries), lse.new_ones(images, heads, queries))


def attend_grads(g: Tensor, q: Tensor, tokens: Tokens, needs: Any) -> dict[str, Tensor]:
    """Of those that are needed; products in float32, for sums of what was rounded are differences of large numbers."""
    (one, _, heads, d), x, acc = q.shape, tokens.x, accumulation_dtype(q.dtype)
    images, lengths = len(x), _lengths(tokens)
    of_keys, of_values = _by_head(tokens, acc, heads)
    q_acc, g_acc = cast(q, acc), cast(g, acc)
    dx = torch.zeros(x.shape, dtype=acc) if needs.x else x
    dbias = torch.zeros(x.shape[:2], dtype=acc) if needs.bias else x
    dq = torch.zeros(q.shape, dtype=acc)
    d_keys, d_values = torch.zeros_like(of_keys), torch.zeros_like(of_values)
    for (group, moved), (_, back) in zip(
        _groups(q_acc, of_keys, images), _groups(g_acc, of_values, images), strict=True
    ):
        context, into = [], []
        for i, a, dc in zip(group, moved, back, strict=True):
            n = lengths[i]
            x_i = cast(x[i, :n], acc)
            p = _scores(a, x_i, d, tokens.bias, i).softmax(1)
            if needs.value_weight:
                context.append(products.mm(p, x_i))
            ds = torch.ops.aten._softmax_backward_data(products.mm(dc, x_i.t()), p, 1, acc)
            if needs.bias:
                dbias[i, :n] = ds.sum(0)
            ds.mul_(d**-0.5)
            if needs.q or needs.key_weight:
                into.append(products.mm(ds, x_i))
            if needs.x:
                products.add_mm_(products.mm(p.t(), dc, out=dx[i, :n]), ds.t(), a)
        rows = slice(group.start, group.stop)
        if context:
            d_values += products.mm(_rows(g_acc[rows]).mT, _together(context, heads))
        if not into:
            continue
        if one == 1:  # the same queries of all images
            into = [torch.stack(into).sum(0)]
        rows = slice(None) if one == 1 else rows
        dq_rows = _together(into, heads)
        if needs.q:
            dq[rows] += products.mm(dq_rows, of_keys.mT).unflatten(1, (-1, q.shape[1])).permute(1, 2, 0, 3)
        if needs.key_weight:
            d_keys += products.mm(_rows(q_acc[rows]).mT, dq_rows)
    some = [i for i, length in enumerate(lengths) if length]
    return {
        "q": cast(dq, q.dtype),
        "x": cast(dx, x.dtype),
        "key_weight": cast(d_keys, x.dtype).flatten(0, 1),
        "value_weight": cast(d_values, x.dtype).flatten(0, 1),
        "value_bias": cast(g_acc[some].sum((0, 1)), x.dtype).flatten() if needs.value_bias else x,
        "bias": cast(dbias, x.dtype),
    }


def _lengths(tokens: Tokens) -> list[int]:
    images, n, _ = tokens.x.shape
    return [n] * images if tokens.lengths is None else tokens.lengths.tolist()


def _by_head(tokens: Tokens, dtype: torch.dtype, heads: int) -> tuple[Tensor, Tensor]:
    """The weights, [H, d, E] each."""
    of_keys, of_values = (cast(w, dtype).unflatten(0, (heads, -1)) for w in (tokens.key_weight, tokens.value_weight))
    return of_keys, of_values


def _groups(q: Tensor, weight: Tensor, images: int) -> Iterator[tuple[range, Tensor]]:
    """A group of images, and their rows q W [m, H Q, E]: a weight is read once for a group."""
    one, queries, heads, _ = q.shape
    step = max(1, _GROUP_BYTES // max(1, heads * queries * weight.shape[2] * q.itemsize))
    same = _moved(q, weight) if one == 1 and queries else None
    for first in range(0, images if queries else 0, step):
        group = range(first, min(first + step, images))
        moved = _moved(q[first : group.stop], weight) if same is None else same.expand(len(group), -1, -1)
        yield group, moved


def _moved(q: Tensor, weight: Tensor) -> Tensor:
    rows = products.mm(_rows(q), weight)  # [H, m Q, E]
    return rows.unflatten(1, (len(q), -1)).transpose(0, 1).flatten(1, 2)


def _rows(q: Tensor) -> Tensor:
    """[m, Q, H, d] by head, [H, m Q, d]."""
    return q.permute(2, 0, 1, 3).flatten(1, 2)


def _together(each: list[Tensor], heads: int) -> Tensor:
    """[H Q, E] of m images, [H, m Q, E]."""
    rows = [t.unflatten(0, (heads, -1)) for t in each]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0]


def _scores(a: Tensor, x: Tensor, d: int, bias: Tensor | None, i: int) -> Tensor:
    """Of an image, [H Q, n]."""
    s = cast(products.mm(a, x.t()), accumulation_dtype(x.dtype)).mul_(d**-0.5)
    return s if bias is None else s.add_(bias[i, : len(x)])
