"""Attention over tokens themselves: the weights of keys and values are on the side of the queries.

    q~ = q W_k           [Q H, E]: for one image, all heads have x as their key
    P  = softmax(q~ x^T / sqrt(d)),  c = P x,  o = c W_v^T + b_v

Image by image: x, q~, P and c stay in the cache, where products of the whole batch would write and read 2 Q H E numbers
of each image in memory. The gradient is that of the keys and values, which are formed for it (blocked.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.qformer import blocked
from mmfuse.kernels.qformer.arguments import Keys, Outputs

# of the queries in the tokens' space, for a group of images
_GROUP_BYTES = 2 << 20


@dataclass(frozen=True)
class Tokens:
    """Tokens, and what makes keys and values of them."""

    x: Tensor  # [I, N, E]
    key_weight: Tensor  # [H d, E]
    value_weight: Tensor  # [H d, E]
    value_bias: Tensor | None  # [H d]
    lengths: Tensor | None  # int64 [I]; None: N

    def keys(self, heads: int) -> Keys:
        """As they are formed."""
        k = F.linear(self.x, self.key_weight).unflatten(-1, (heads, -1))
        v = F.linear(self.x, self.value_weight, self.value_bias).unflatten(-1, (heads, -1))
        return Keys(k, v, None, self.lengths, None, self.x.shape[1])


def products_saved(q: Tensor, tokens: Tokens) -> int:
    """Multiplications that absorbing saves for an image; its own, of smaller products, count as a quarter more."""
    (_, queries, heads, d), (_, n, e) = q.shape, tokens.x.shape
    formed = 2 * n * heads * d * (e + queries)
    shared = 1 if q.shape[0] > 1 else 0  # the same queries of all images meet W_k once
    return formed - queries * heads * e * (2 * n + d * (1 + shared)) * 5 // 4


def attend(q: Tensor, tokens: Tokens, wants_lse: bool) -> Outputs:
    (_, queries, heads, d), (images, n, e) = q.shape, tokens.x.shape
    acc, x = accumulation_dtype(q.dtype), tokens.x
    of_keys, of_values = (w.unflatten(0, (heads, d)) for w in (tokens.key_weight, tokens.value_weight))  # [H, d, E]
    o = q.new_empty(images, queries, heads, d)
    lse = q.new_empty(images, heads * queries, dtype=acc)
    lengths = [n] * images if tokens.lengths is None else tokens.lengths.tolist()
    # weights are read once for a group
    group = max(1, _GROUP_BYTES // max(1, heads * queries * e * q.itemsize))
    same = _moved(q, of_keys) if len(q) == 1 and queries else None
    for first in range(0, images if queries else 0, group):
        several = range(first, min(first + group, images))
        moved = _moved(q[first : first + group], of_keys) if same is None else same.expand(len(several), -1, -1)
        context = []
        for i, a in zip(several, moved, strict=True):
            x_i = x[i, : lengths[i]]
            s = cast(products.mm(a, x_i.t()), acc).mul_(d**-0.5)
            lse[i] = s.logsumexp(1) if wants_lse else 0
            context.append(products.mm(cast(s.softmax(1), q.dtype), x_i).unflatten(0, (heads, queries)))
        y = products.mm(torch.cat(context, 1) if len(context) > 1 else context[0], of_values.mT)  # [H, m Q, d]
        o[first : first + group] = y.unflatten(1, (-1, queries)).permute(1, 2, 0, 3)
    if tokens.value_bias is not None:
        o += tokens.value_bias.view(heads, d)
    if not all(lengths):
        o[[i for i, length in enumerate(lengths) if not length]] = 0
    return Outputs(o, lse.view(images, heads, queries), lse.new_ones(images, heads, queries))


def _moved(q: Tensor, of_keys: Tensor) -> Tensor:
    """q W_k, [m, H Q, E]."""
    rows = products.mm(q.permute(2, 0, 1, 3).flatten(1, 2), of_keys)  # [H, m Q, E]
    return rows.unflatten(1, (len(q), -1)).transpose(0, 1).flatten(1, 2)


def attend_grads(g: Tensor, q: Tensor, tokens: Tokens, outputs: Outputs, needs: Any) -> dict[str, Tensor]:
    x, acc = tokens.x, accumulation_dtype(q.dtype)
    of_keys = needs.x or needs.key_weight
    of_values = needs.x or needs.value_weight or needs.value_bias
    found = blocked.attend_grads(g, q, tokens.keys(q.shape[2]), outputs, (needs.q, of_keys, of_values))
    dk, dv, rows = (t.flatten(2).flatten(0, 1) for t in (found["k"], found["v"], x[:, :, None]))
    return {
        "q": found["q"],
        "x": products.add_mm_(products.mm(dk, tokens.key_weight), dv, tokens.value_weight).view_as(x) if needs.x else x,
        "key_weight": products.mm(dk.t(), rows) if needs.key_weight else x,
        "value_weight": products.mm(dv.t(), rows) if needs.value_weight else x,
        "value_bias": dv.sum(0, dtype=acc).to(x.dtype) if needs.value_bias else x,
    }
