"""Heads and projectors of a few learned queries, which are the same for every image (`mmfuse.fused.poolers`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.poolers import attention
from mmfuse.kernels.qformer import few_query_attention, token_attention

_ATTENTION = ("torch.nn.modules.activation:MultiheadAttention",)
_PROJECTION = ("torch.nn.modules.linear:NonDynamicallyQuantizableLinear",)
CHILDREN = {"attention": _ATTENTION, "attention.out_proj": _PROJECTION}
OPEN_CLIP_CHILDREN = {"attn": _ATTENTION, "attn.out_proj": _PROJECTION}
_LINEAR = ("torch.nn.modules.linear:Linear",)
ARIA_CHILDREN = {
    "cross_attn": ("transformers.models.aria.modeling_aria:AriaCrossAttention",),
    "cross_attn.layer_norm": ("torch.nn.modules.normalization:LayerNorm",),
    "cross_attn.q_proj": _LINEAR,
    "cross_attn.k_proj": _LINEAR,
    "cross_attn.v_proj": _LINEAR,
    "cross_attn.multihead_attn": _ATTENTION,
    "cross_attn.multihead_attn.out_proj": _PROJECTION,
}
KOSMOS2_CHILDREN = {
    "x_attn": ("transformers.models.kosmos2.modeling_kosmos2:KosmosTextAttention",),
    # each is given the queries once
    **{f"x_attn.{name}_proj": _LINEAR for name in "qkv"},
}


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
    if attention_mask is not None:  # [B, 1, Q, N], the same for every query
        attention_mask = attention_mask[:, 0, 0]
        if attention_mask.dtype == torch.bool:
            least = torch.finfo(head.probe.dtype).min
            attention_mask = head.probe.new_zeros(attention_mask.shape).masked_fill(~attention_mask, least)
    return _head(head, attention(head.attention, head.probe, hidden_state, attention_mask))


def _head(head: Any, x: Tensor) -> Tensor:
    return (x + head.mlp(head.layernorm(x)))[:, 0]


def aria_projector(projector: Any, key_value_states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """AriaProjector: tokens [B, N, D] of images to [B, Q, output_dim]; of the mask [B, N] True is not seen.

    The class projects the same queries for every image, runs two products after one another for the keys and two for
    the values, whose weights are multiplied here, and forms the probabilities.
    """
    x, cross = key_value_states, projector.cross_attn
    queries = _aria_queries(projector.patch_to_query_dict, x.shape[1])
    module = cross.multihead_attn
    of_query, of_keys, of_values = module.in_proj_weight.chunk(3)
    bias_q, _, bias_v = module.in_proj_bias.chunk(3)
    q = F.linear(cross.q_proj(cross.layer_norm(projector.query[None, :queries])), of_query, bias_q)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = x.new_zeros(attn_mask.shape).masked_fill(attn_mask, -torch.inf)
    o = token_attention(
        q.unflatten(-1, (module.num_heads, -1)),
        cross.layer_norm_kv(x),
        of_keys @ cross.k_proj.weight,
        of_values @ cross.v_proj.weight,
        bias_v,
        bias=attn_mask,
    ).o
    o = cross.dropout(cross.linear(module.out_proj(o.flatten(2))))
    return projector.feed_forward(projector.layer_norm(o))


def _aria_queries(table: dict[int, int], tokens: int) -> int:
    # compared, not hashed: the number may be symbolic
    for n, queries in table.items():
        if n == tokens:
            return queries
    raise KeyError(
        f"Number of patches {tokens} not found in patch_to_query_dict amongst possible values {table.keys()}."
    )


def kosmos2_connector(projection: Any, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Kosmos2ImageToTextProjection: tokens [B, N, E] to ([B, Q, D], None).

    Queries attend to an image's tokens and to themselves: their projections are the same for every image. The class's
    own forward runs where it returns the probabilities, with dropout of them, and in releases before 5.10, where it is
    causal.
    """
    attn, latents = projection.x_attn, projection.latent_query
    if attn.config._attn_implementation != "sdpa" or attn.is_causal or (attn.training and attn.dropout > 0):
        return type(projection).forward(projection, features)
    tokens = projection.dense(features)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.num_heads, -1))

    q = heads(attn.q_proj(latents))[None]
    k, v = (
        torch.cat([heads(project(tokens)), heads(project(latents)).expand(len(tokens), -1, -1, -1)], dim=1)
        for project in (attn.k_proj, attn.v_proj)
    )
    return attn.out_proj(few_query_attention(q, k, v).o.flatten(2)), None


def one_image(projection: Any, features: Tensor) -> bool:
    """Whether there is no second image with which projections are shared."""
    return len(features) == 1


def against_kosmos2(projection: Any) -> str | None:
    """Why Kosmos-2's connector stays, or None."""
    attention = projection.x_attn
    if attention.scaling != (attention.embed_dim // attention.num_heads) ** -0.5:
        return "its attention has a scaling of its own"
    return "its attention has a LayerNorm inside" if attention.inner_attn_ln is not None else None


def against_attention(path: str) -> Any:
    """Why a pooler with nn.MultiheadAttention at `path` stays, or None."""

    def reason(pooler: Any) -> str | None:
        attention: nn.MultiheadAttention = pooler.get_submodule(path)
        if attention.bias_k is not None or attention.add_zero_attn:
            return f"its {path} adds a key"
        if not attention.batch_first or attention.dropout:
            return f"its {path} has dropout, or its batch is not the first dimension"
        return None

    return reason
