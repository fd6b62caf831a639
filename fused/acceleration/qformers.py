"""transformers' Q-Formers: their queries attend to an image whose keys and values are one product, or none.

In float32 on a CPU a layer's cross-attention takes fewer products over the image's tokens themselves, for a few queries
(`attention.absorbed`); on other devices the keys and values of all layers are one product (`project_kv`). Everything
but the projections to keys and values is called as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.fused.acceleration.attention import absorbed, absorbs, exact
from mmfuse.kernels.qformer.reference import project_kv

_NO = "builtins:NoneType"


def children(module: str, prefix: str) -> dict[str, tuple[str, ...]]:
    """Of an encoder, what is read or passed over: the layers, and of their cross-attention all but queries and output."""
    linear = ("torch.nn.modules.linear:Linear", _NO)
    return {
        "layer": ("torch.nn.modules.container:ModuleList",),
        "layer.*": (f"{module}:{prefix}Layer",),
        "layer.*.crossattention": (f"{module}:{prefix}Attention", _NO),
        "layer.*.crossattention.attention": (f"{module}:{prefix}MultiHeadAttention", _NO),
        "layer.*.crossattention.attention.key": linear,
        "layer.*.crossattention.attention.value": linear,
    }


def encoder(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    query_length: int = 0,
    **kwargs: Any,
) -> Any:
    """The forward of the encoders of BLIP-2's, InstructBLIP's and InstructBLIP Video's Q-Former.

    The class's own runs for texts alone, where image tokens are masked, under gradient checkpointing, with dropout of
    probabilities and where neither form gains.
    """
    call = {name: value for name, value in locals().items() if name not in ("encoder", "kwargs")} | kwargs
    layers = encoder.layer
    form = None if encoder_attention_mask is not None or not _plain(encoder, kwargs) else _form(layers, call)
    if form is None:
        return type(encoder).forward(encoder, **call)
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    h, x = hidden_states, encoder_hidden_states
    kv = iter(_keys_and_values(layers, x) if form == "one product" else ())
    for layer in layers:
        h = layer.attention(h, attention_mask=attention_mask)
        query, text = h[:, :query_length], h[:, query_length:]
        if layer.has_cross_attention:
            block = layer.crossattention
            attention = block.attention
            q = attention.query(query).unflatten(-1, (attention.num_attention_heads, -1))
            if form == "absorbed":
                o = absorbed(q, x, attention.key.weight, attention.value.weight)
            else:
                o = _attend(q, next(kv))
            bias = attention.value.bias + 0 * attention.key.bias  # a key's changes nothing: its gradient is 0
            query = block.output(o.flatten(2) + bias, query)
        query = layer.feed_forward_chunk_query(query)
        h = torch.cat([query, layer.feed_forward_chunk(text)], 1) if text.shape[1] else query
    return Output(last_hidden_state=h)


def unexpanded(
    model: Any,
    query_embeds: Tensor,
    query_length: int | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Blip2QFormerModel.forward on queries of one sample, where they are that, expanded: no layer before the first
    cross-attention differs between images.
    """
    call = {name: value for name, value in locals().items() if name not in ("model", "kwargs")} | kwargs
    records = any(kwargs.get(f"output_{of}", getattr(model.config, f"output_{of}", False)) for of in _RECORDED)
    alone = query_length in (None, query_embeds.shape[1]) and attention_mask is None
    if alone and not model.training and not records and encoder_hidden_states is not None:
        if query_embeds.stride(0) == 0 and len(query_embeds) == len(encoder_hidden_states):
            call["query_embeds"] = query_embeds[:1]
    return type(model).forward(model, **call)


_RECORDED = ("attentions", "cross_attentions", "hidden_states")


def _plain(encoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for but the last states."""
    asked = any(value is not None and value is not (name == "return_dict") for name, value in kwargs.items())
    config = encoder.config
    # of releases before 5.10, for maps of the attention
    kept = any(getattr(layer.crossattention.attention, "save_attention", 0) for layer in _crossing(encoder.layer))
    return not (
        asked
        or kept
        or not config.return_dict
        or (encoder.training and (encoder.gradient_checkpointing or config.attention_probs_dropout_prob > 0))
        or config._attn_implementation not in ("eager", "sdpa")
    )


def _form(layers: Any, call: dict[str, Any]) -> str | None:
    """How cross-attention is computed; None where the class's own code is as fast."""
    h, x, queries = call["hidden_states"], call["encoder_hidden_states"], call["query_length"]
    if x is None or not queries or len(h) not in (1, len(x)) or torch.compiler.is_compiling():
        return None
    if not x.is_cpu:
        return "one product"
    attention = layers[0].crossattention.attention
    weight, head_dim = attention.key.weight, attention.attention_head_size
    return "absorbed" if exact(weight) and absorbs(queries, x.shape[1], head_dim, x.shape[2]) else None


def _crossing(layers: Any) -> list[Any]:
    return [layer for layer in layers if layer.has_cross_attention]


def _keys_and_values(layers: Any, x: Tensor) -> Any:
    """Of each layer with cross-attention [B, N, 2, H, d], without biases, by one product."""
    of = [layer.crossattention.attention for layer in _crossing(layers)]
    weight = torch.stack([torch.stack([attention.key.weight, attention.value.weight]) for attention in of])
    return project_kv(x, weight, None, of[0].num_attention_heads).unbind(2)


def _attend(q: Tensor, kv: Tensor) -> Tensor:
    k, v = kv.transpose(1, 3).unbind(2)  # [B, H, N, d]
    q = q.expand(len(k), -1, -1, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def reason_against(encoder: Any) -> str | None:
    """Why an encoder has to keep its own forward, or None."""
    if any(layer.chunk_size_feed_forward for layer in encoder.layer):
        return "it runs its feed-forward network in chunks"
    return None
