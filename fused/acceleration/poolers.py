"""Heads and projectors of a few learned queries, which are the same for every image (`mmfuse.fused.poolers`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfuse.fused.poolers import attention

_ATTENTION = ("torch.nn.modules.activation:MultiheadAttention",)
_PROJECTION = ("torch.nn.modules.linear:NonDynamicallyQuantizableLinear",)
CHILDREN = {"attention": _ATTENTION, "attention.out_proj": _PROJECTION}
OPEN_CLIP_CHILDREN = {"attn": _ATTENTION, "attn.out_proj": _PROJECTION}


def siglip_head(head: Any, hidden_state: Tensor) -> Tensor:
    """SiglipMultiheadAttentionPoolingHead: tokens [B, N, D] to [B, D]."""
    return _head(head, attention(head.attention, head.probe, hidden_state))


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
    return _head(head, attention(head.attention, head.probe, hidden_state, attention_mask))


def _head(head: Any, x: Tensor) -> Tensor:
    return (x + head.mlp(head.layernorm(x)))[:, 0]


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
