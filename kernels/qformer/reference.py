"""Cross-attention of a few queries in plain PyTorch: what each operation means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._runtime.registration import without_autocast
from mmfuse.kernels.qformer.arguments import Attended, Keys, Mapped, Outputs, Tokens, zero_behind

Norm = tuple[Tensor, Tensor, float]


def project_kv(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, norm: Norm | None = None) -> Tensor:
    """The keys and values of all layers that attend to x, by one product: [..., L, 2, H, d].

    A key's bias adds the same to all scores of a query, so it is left out, and its gradient is 0.

    Args:
        x: [..., E].
        weight, bias: [L, 2, D, E] and [L, 2, D], of the keys and of the values.
        norm: (weight, bias, eps) of the LayerNorm before each layer, [L, E], or of one for all, [E]. It becomes a part
            of the product, so that x is normalised once, and where x needs no gradient no [..., E] is formed for it.
    """
    of_values = torch.tensor([[0.0], [1.0]], dtype=weight.dtype, device=weight.device)
    if norm is not None:
        gamma, beta, eps = norm
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
        gamma, beta = (t.expand(len(weight), -1)[:, None] for t in (gamma, beta))  # [L, 1, E]
        shift = (weight * beta[:, :, None]).sum(-1)  # [L, 2, D]
        weight, bias = weight * gamma[:, :, None], shift if bias is None else shift + bias
    y = F.linear(x, weight.flatten(0, 2), None if bias is None else (bias * of_values).flatten())
    return y.unflatten(-1, (len(weight), 2, heads, -1))


def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Attended:
    """softmax(q k^T / sqrt(d)) v; a row without keys is 0.

    Args:
        q: [B, Q, H, d], or [1, Q, H, d]: the same queries for every row.
        k, v: [I, N, H, d], of images.
        kv_index: int64 [B], the image of each row; by default row b attends to image b.
        lengths: int64 [I], the keys that an image has, which come first; by default N.
        dropout: of the probabilities.
    """
    return Attended(*mapped_attention(q, k, v, kv_index, lengths, dropout)[:2])


def mapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Mapped:
    """The same with the probabilities, of which o is a function: a gradient may be asked of them.

    bias: [B, N], added to the scores.
    """
    if kv_index is not None:
        k, v, lengths = k[kv_index], v[kv_index], None if lengths is None else lengths[kv_index]
    acc = torch.promote_types(q.dtype, torch.float32)
    if lengths is not None:
        k, v = zero_behind(k, lengths), zero_behind(v, lengths)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, Q or N, d]
    with without_autocast(q):  # which would round them
        scores = q.to(acc) @ k.to(acc).mT * q.shape[-1] ** -0.5  # [B, H, Q, N]
    scores = scores if bias is None else scores + bias[:, None, None]
    if lengths is None:
        p = scores.softmax(-1)
    else:
        none = (lengths == 0)[:, None, None]
        seen = torch.where(lengths > 0, lengths, k.shape[2])[:, None, None, None]
        scores = scores.masked_fill(torch.arange(k.shape[2], device=k.device) >= seen, -torch.inf)
        p = scores.softmax(-1).masked_fill(none[..., None], 0)
    with torch.no_grad():
        lse = scores.logsumexp(-1)
        lse = lse if lengths is None else lse.masked_fill(none, -torch.inf)
    o = F.dropout(p, dropout).to(v.dtype) @ v
    return Mapped(o.transpose(1, 2), lse, p)


def of_keys(q: Tensor, keys: Keys, dropout: float = 0.0) -> Outputs:
    o, lse, _ = mapped_attention(q, *padded(keys), dropout)
    return Outputs(o, lse, torch.ones_like(lse))


def sdpa(q: Tensor, keys: Keys, dropout: float = 0.0) -> Outputs:
    """By torch's own attention, which keeps the statistics to itself."""
    k, v, kv_index, lengths = padded(keys)
    if kv_index is not None:
        # an index waits longer to begin, but has its gradient without atomics
        k, v = (t[kv_index] if t.requires_grad else t.index_select(0, kv_index) for t in (k, v))
        lengths = None if lengths is None else lengths[kv_index]
    q, mask = q if q.shape[0] == k.shape[0] else q.expand(k.shape[0], -1, -1, -1), None
    if lengths is not None:
        # where there is no key all are seen, and the result is 0 in the end
        seen = torch.where(lengths > 0, lengths, k.shape[1])
        mask = torch.arange(k.shape[1], device=k.device) < seen[:, None, None, None]
        k, v = zero_behind(k, lengths), zero_behind(v, lengths)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
    o = o if lengths is None else torch.where((lengths > 0)[:, None, None, None], o, 0)
    none = q.new_empty(0)
    return Outputs(o, none, none)


def of_tokens(q: Tensor, tokens: Tokens) -> Outputs:
    o, lse, _ = mapped_attention(q, *padded(tokens.keys(q.shape[2])), bias=tokens.bias)
    return Outputs(o, lse, torch.ones_like(lse))


def sdpa_of_tokens(q: Tensor, tokens: Tokens) -> Outputs:
    return sdpa(q, tokens.keys(q.shape[2]))


def padded(keys: Keys) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(k, v, kv_index, lengths) of images with the same number of tokens."""
    if keys.cu_seqlens is None:
        return keys.k, keys.v, keys.kv_index, keys.lengths
    k, lengths = unpacked(keys.k, keys.cu_seqlens, keys.longest)
    v, _ = unpacked(keys.v, keys.cu_seqlens, keys.longest)
    return k, v, keys.kv_index, lengths


def unpacked(x: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows [T, ...] of images one after another, image i from cu_seqlens[i]: ([I, longest, ...], lengths int64 [I])."""
    lengths = cu_seqlens.diff().long()
    if x.shape[0] == 0:
        return x.sum(0).expand(lengths.shape[0], longest, *x.shape[1:]), lengths
    row = cu_seqlens[:-1, None] + torch.arange(longest, device=x.device)
    real = row < cu_seqlens[1:, None]
    x = x[row.where(real, 0)]
    return x.where(real.view(*real.shape, *[1] * (x.dim() - 2)), 0), lengths


def absorbed(q: Tensor, tokens: Tokens) -> Outputs:
    """Attention over tokens: the weights of keys and values go to the side of the queries.

    softmax((q W_k) x^T / sqrt(d) + bias) x W_v^T + b_v, fewer products than keys and values take where
    Q < N d / (N + d - N d / E), or N d / (N + d / 2 - N d / E) for the same queries of all images.
    """
    x, lengths, heads, acc = tokens.x, tokens.lengths, q.shape[2:], accumulation_dtype(q.dtype)
    of_keys, of_values = (w.unflatten(0, heads) for w in (tokens.key_weight, tokens.value_weight))  # [H, d, E]
    x = x if lengths is None else zero_behind(x, lengths)
    a = (q.transpose(1, 2) @ of_keys).flatten(1, 2)  # [B or 1, H Q, E]
    scores = ((a[0] if len(a) == 1 else a) @ x.mT).to(acc) * heads[1] ** -0.5  # [B, H Q, N]
    scores = scores if tokens.bias is None else scores + tokens.bias[:, None]
    if lengths is not None:
        seen = torch.where(lengths > 0, lengths, x.shape[1])[:, None, None]
        scores = scores.masked_fill(torch.arange(x.shape[1], device=x.device) >= seen, -torch.inf)
    c = (scores.softmax(-1).to(x.dtype) @ x).unflatten(1, (heads[0], -1))  # [B, H, Q, E]
    o = (c @ of_values.mT).transpose(1, 2)
    o = o if tokens.value_bias is None or not x.shape[1] else o + tokens.value_bias.view(heads)
    lse = scores.detach().logsumexp(-1).unflatten(1, (heads[0], -1))
    if lengths is not None:
        some = (lengths > 0)[:, None, None]
        o, lse = torch.where(some[..., None], o, 0), torch.where(some, lse, -torch.inf)
    return Outputs(o, lse, torch.ones_like(lse))


def fold_value_bias(weight: Tensor, bias: Tensor, value_bias: Tensor) -> Tensor:
    """The bias of the output projection that makes the values' own unnecessary: probabilities sum to 1.

    bias + weight value_bias, exact without dropout of the probabilities and where each query has a key.
    """
    return bias + weight @ value_bias
