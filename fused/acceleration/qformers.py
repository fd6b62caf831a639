"""transformers' Q-Formers and BLIP's text encoder attend to an image whose keys and values are one product, or none.

On a CPU a layer's cross-attention is `token_attention`, which forms neither where that takes fewer products; on other
devices the keys and values of all layers are one product, `project_kv`. Everything but the projections to keys and
values is called as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import autocast_dtype
from mmfuse.kernels._runtime.products import linears
from mmfuse.kernels.qformer.arguments import Tokens
from mmfuse.kernels.qformer.op import TOKEN_ATTENTION, project_kv, token_attention

_NO = "builtins:NoneType"


def children(module: str, prefix: str) -> dict[str, tuple[str, ...]]:
    """Of an encoder, what is read or passed over: the layers, and all of cross-attention but queries and output."""
    linear = ("torch.nn.modules.linear:Linear", _NO)
    return {
        "layer": ("torch.nn.modules.container:ModuleList",),
        "layer.*": (f"{module}:{prefix}Layer",),
        "layer.*.crossattention": (f"{module}:{prefix}Attention", _NO),
        "layer.*.crossattention.attention": (f"{module}:{prefix}MultiHeadAttention", _NO),
        "layer.*.crossattention.attention.key": linear,
        "layer.*.crossattention.attention.value": linear,
    }


def blip_text_children() -> dict[str, tuple[str, ...]]:
    """The same of BLIP's text encoder."""
    module = "transformers.models.blip.modeling_blip_text"
    found = children(module, "BlipText")
    return {path.replace(".attention", ".self"): classes for path, classes in found.items()} | {
        "layer.*.crossattention.self": (f"{module}:BlipTextSelfAttention", _NO)
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

    The class's own runs for texts alone, where image tokens are masked, where attentions or hidden states are recorded,
    under gradient checkpointing and with dropout of probabilities.
    """
    h, x = hidden_states, encoder_hidden_states
    fits = x is not None and query_length and len(h) in (1, len(x)) and encoder_attention_mask is None
    if not fits or not _plain(encoder, kwargs):
        given = (h, attention_mask, x, encoder_attention_mask, query_length)
        return type(encoder).forward(encoder, *given, **kwargs)
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    kv = None if x.is_cpu else iter(_keys_and_values(encoder.layer, x))
    with linears(h):
        for layer in encoder.layer:
            h = layer.attention(h, attention_mask=attention_mask)
            query, text = h[:, :query_length], h[:, query_length:]
            if layer.has_cross_attention:
                query = _cross(layer.crossattention, query, x, kv and next(kv))
            query = layer.feed_forward_chunk_query(query)
            h = torch.cat([query, layer.feed_forward_chunk(text)], 1) if text.shape[1] else query
    return Output(last_hidden_state=h)


def blip_text_encoder(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """BlipTextEncoder.forward, all rows of a text attending to its image; the class's own runs with a cache, too."""
    h, x = hidden_states, encoder_hidden_states
    cache = kwargs.pop("past_key_values", cache)  # its first name
    fits = x is not None and len(h) == len(x) and encoder_attention_mask is None and cache is None and not use_cache
    if not fits or not _plain(encoder, kwargs):
        given = (h, attention_mask, x, encoder_attention_mask, cache, use_cache)
        return type(encoder).forward(encoder, *given, **kwargs)
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    kv = None if x.is_cpu else iter(_keys_and_values(encoder.layer, x))
    with linears(h):
        for layer in encoder.layer:
            h, _ = layer.attention(h, attention_mask=attention_mask)
            h = layer.feed_forward_chunk(_cross(layer.crossattention, h, x, kv and next(kv)))
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
    """Blip2QFormerModel.forward on queries of one sample, where they are that, expanded: up to the first
    cross-attention they are the same for every image.
    """
    call = {name: value for name, value in locals().items() if name not in ("model", "kwargs")} | kwargs
    records = any(kwargs.get(f"output_{of}", getattr(model.config, f"output_{of}", False)) for of in _RECORDED)
    if not (_draws(model) or records or encoder_hidden_states is None or attention_mask is not None):
        rows, length, _ = query_embeds.shape
        same = query_embeds.stride(0) == 0 and rows == len(encoder_hidden_states)
        if same and query_length in (None, length):
            call["query_embeds"] = query_embeds[:1]
    return type(model).forward(model, **call)


def _draws(model: Any) -> bool:
    """Whether something is dropped up to the first cross-attention."""
    first = model.encoder.layer[0].attention
    return model.training or _drops(first.attention) or _active(model.dropout) or _active(first.output.dropout)


_RECORDED = ("attentions", "cross_attentions", "hidden_states")
# they are given the queries once
UNEXPANDED = dict.fromkeys(("layernorm", "dropout", "encoder", "encoder.layer.0", "encoder.layer.0.**"), ())


def steps_aside(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    query_length: int = 0,
    **kwargs: Any,
) -> bool:
    """Whether an encoder on a CPU would form keys and values all the same, as its class does.

    So it is with a gradient but of the fewest queries, and in 16 bits, where products round scores on their way to the
    softmax.
    """
    return _forms(encoder, len(hidden_states), query_length, encoder_hidden_states)


def blip_text_steps_aside(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """The same of BLIP's text encoder."""
    rows, queries, _ = hidden_states.shape
    return _forms(encoder, rows, queries, encoder_hidden_states)


def _forms(encoder: Any, rows: int, queries: int, x: Tensor | None) -> bool:
    if x is None or not x.is_cpu:
        return False
    attention = _projections(encoder.layer[0].crossattention)
    of_keys, of_values = attention.key.weight, attention.value.weight
    if (autocast_dtype(of_keys) or of_keys.dtype) not in (torch.float32, torch.float64):
        return True
    q = x.new_empty(1).expand(rows, queries, attention.num_attention_heads, attention.attention_head_size)
    return TOKEN_ATTENTION.choose((q, Tokens(x, of_keys, of_values, None, None, None), False)) != "chunked"


def reason_against(encoder: Any) -> str | None:
    """Why an encoder has to keep its own forward, or None."""
    if any(layer.chunk_size_feed_forward for layer in encoder.layer):
        return "it runs its feed-forward network in chunks"
    for of in _crossing(encoder.layer):
        usual = of.attention_head_size**-0.5
        # in releases before 5.10, and in BLIP's, it is no attribute
        if vars(of).get("scaling", usual) != usual:
            return "its attention has a scaling of its own"
    return None


def against_blip_text(encoder: Any) -> str | None:
    """The same of BLIP's text encoder."""
    return reason_against(encoder) if encoder.config.is_decoder else "it has no cross-attention"


def _plain(encoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for but the last states, of attention as it is defined."""
    asked = any(value is not None and value is not (name == "return_dict") for name, value in kwargs.items())
    config = encoder.config
    return not (
        asked
        or not config.return_dict
        or config._attn_implementation not in ("eager", "sdpa")
        or (encoder.training and encoder.gradient_checkpointing)
        # a map of the attention is kept, in releases before 5.10
        or any(_drops(of) or getattr(of, "save_attention", False) for of in _crossing(encoder.layer))
    )


def _drops(attention: Any) -> bool:
    """Whether probabilities are dropped: by a child, which may be in another mode, or in newer releases by a number."""
    dropout = attention._modules.get("dropout")
    return _active(dropout) if dropout is not None else attention.training and attention.attention_dropout > 0


def _active(dropout: Any) -> bool:
    return dropout.training and getattr(dropout, "p", 1) > 0


def _cross(block: Any, query: Tensor, x: Tensor, kv: Tensor | None) -> Tensor:
    """Queries [B or 1, Q, D] that have seen the image x [B, N, E], whose keys and values may be there: [B, Q, D]."""
    attention = _projections(block)
    q = attention.query(query).unflatten(-1, (attention.num_attention_heads, -1))
    of_keys, of_values = attention.key, attention.value
    if kv is None:
        o = token_attention(q, x, of_keys.weight, of_values.weight, of_values.bias).o
    else:
        k, v = kv.transpose(1, 3).unbind(2)  # [B, H, N, d]
        q = q.expand(len(k), -1, -1, -1).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    # a key's bias changes nothing: its gradient is 0
    return block.output(o.flatten(2) + 0 * of_keys.bias, query)


def _keys_and_values(layers: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Of each layer with cross-attention [B, N, 2, H, d], by one product."""
    of = _crossing(layers)
    weight = torch.stack([torch.stack([attention.key.weight, attention.value.weight]) for attention in of])
    bias = torch.stack([torch.stack([attention.key.bias, attention.value.bias]) for attention in of])
    return project_kv(x, weight, bias, of[0].num_attention_heads).unbind(2)


def _crossing(layers: Any) -> list[Any]:
    return [_projections(layer.crossattention) for layer in layers if "crossattention" in layer._modules]


def _projections(block: Any) -> Any:
    """Queries, keys and values of a block's attention."""
    return block.attention if "attention" in block._modules else block.self
