"""Poolers of a few learned queries, which are the same for every image: they are projected once.

One query, or a few, attend to the tokens themselves, so that neither keys nor values are formed; many, as those of
CoCa, to keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels.qformer.reference import absorbed_attention

_ATTENTION = ("torch.nn.modules.activation:MultiheadAttention",)
_PROJECTION = ("torch.nn.modules.linear:NonDynamicallyQuantizableLinear",)
CHILDREN = {"attention": _ATTENTION, "attention.out_proj": _PROJECTION}
OPEN_CLIP_CHILDREN = {"attn": _ATTENTION, "attn.out_proj": _PROJECTION}


def siglip_head(head: Any, hidden_state: Tensor) -> Tensor:
    """SiglipMultiheadAttentionPoolingHead: tokens [B, N, D] to [B, D]."""
    return _head(head, _pooled(head.attention, head.probe, hidden_state))


def siglip2_head(head: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Siglip2MultiheadAttentionPoolingHead: tokens [B, N, D], of which a mask [B, N] keeps some, to [B, D]."""
    if attention_mask is not None:
        from transformers.masking_utils import create_bidirectional_mask

        attention_mask = create_bidirectional_mask(
            config=head.config,
            inputs_embeds=head.probe.expand(len(hidden_state), -1, -1),
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_state,
        )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        least = torch.finfo(head.probe.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=head.probe.dtype).masked_fill(~attention_mask, least)
    return _head(head, _pooled(head.attention, head.probe, hidden_state, attention_mask))


def _head(head: Any, x: Tensor) -> Tensor:
    return (x + head.mlp(head.layernorm(x)))[:, 0]


def open_clip_pooler(pooler: Any, x: Tensor) -> Tensor:
    """open_clip's AttentionalPooler: [B, N, E] to [B, n_queries, D]."""
    return _pooled(pooler.attn, pooler.ln_q(pooler.query)[None], pooler.ln_k(x))


def _pooled(attention: nn.MultiheadAttention, query: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """nn.MultiheadAttention of queries [1, Q, D] over x [B, N, E], with a mask that is added to [B, H, Q, N]."""
    of_query, of_keys, of_values = _weights(attention)
    bias_q, bias_k, bias_v = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    heads = attention.num_heads
    q = F.linear(query, of_query, bias_q).unflatten(-1, (heads, -1))
    if _few(q, x):
        o = absorbed_attention(q, x, of_keys, of_values, mask).flatten(2)
        o = o if bias_v is None else o + bias_v
    else:
        k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)) for w, b in ((of_keys, bias_k), (of_values, bias_v)))
        q, k, v = (t.transpose(1, 2) for t in (q.expand(len(x), -1, -1, -1), k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        o = o.transpose(1, 2).flatten(2)
    return F.linear(o, attention.out_proj.weight, attention.out_proj.bias)


def _few(q: Tensor, x: Tensor) -> bool:
    """Whether attention over tokens takes fewer products: for Q < N d / (N + d / 2 - N d / E)."""
    (_, queries, _, d), (n, e) = q.shape, x.shape[1:]
    return queries * (2 * n * e + d * e - 2 * n * d) < 2 * n * d * e


def _weights(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.chunk(3)
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight


def against_attention(path: str) -> Any:
    """Why a pooler with nn.MultiheadAttention at `path` stays, or None."""

    def reason(pooler: Any) -> str | None:
        attention = getattr(pooler, path)
        if attention.bias_k is not None or attention.add_zero_attn:
            return f"its {path} adds a key"
        if not attention.batch_first or attention.dropout:
            return f"its {path} has dropout, or its batch is not the first dimension"
        return None

    return reason
