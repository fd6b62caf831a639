"""Weights between LAVIS's names and those of transformers, of BLIP-2 and InstructBLIP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfuse.fused import qformer

# (transformers, LAVIS) beginnings of names; the first that fits counts
_BEGINNINGS = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "ln_vision."),
    ("vision_projection.", "vision_proj."),
    ("text_projection.", "text_proj."),
    ("qformer.", "Qformer.bert."),
    ("embeddings.", "Qformer.bert.embeddings."),
)
_IN_BLOCKS = ((".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."), (".self_attn.projection.", ".attn.proj."))
_QKV = ".self_attn.qkv.", ".attn.qkv."
_LANGUAGE = ("language_model.", "{}_model."), ("language_projection.", "{}_proj.")


def official_name(name: str, language: str = "opt") -> str:
    """Of a parameter of transformers' `Blip2*` or `InstructBlip*`; language: "opt", "t5" or "llm", LAVIS's prefix."""
    for theirs, official in (*_BEGINNINGS, *((a, b.format(language)) for a, b in _LANGUAGE)):
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            if theirs == "qformer.":
                (rest,) = qformer.from_transformers({rest: torch.empty(0)})
            if theirs == "vision_model.encoder.layers.":
                for a, b in (*_IN_BLOCKS, _QKV):
                    rest = rest.replace(a, b)
            return official + rest
    return name


def from_transformers(state_dict: Mapping[str, Tensor], language: str = "opt") -> dict[str, Tensor]:
    """The weights of transformers' `Blip2*` or `InstructBlip*` under the official names.

    A key's bias in the image encoder, which changes nothing, is dropped: the official encoder has none.
    """
    state = {}
    for name, t in ((official_name(key, language), t) for key, t in state_dict.items()):
        if name.endswith(".attn.qkv.bias"):
            state[name.replace("qkv.bias", "q_bias")], _, state[name.replace("qkv.bias", "v_bias")] = t.chunk(3)
        else:
            state[name] = t
    return state


def to_transformers(state_dict: Mapping[str, Tensor], instruct: bool = False) -> dict[str, Tensor]:
    """The official weights under the names of transformers' `Blip2*`, or (`instruct`) `InstructBlip*`.

    What transformers has no place for, the temperature and the language head, is left out.
    """
    state = {}
    for name, t in state_dict.items():
        if name == "temp" or name.startswith("Qformer.cls.") or name.endswith(("position_ids", ".attn.v_bias")):
            continue
        if name.endswith(".attn.q_bias"):
            of_values = state_dict[name.replace("q_bias", "v_bias")]
            name, t = name.replace("attn.q_bias", "self_attn.qkv.bias"), torch.cat([t, torch.zeros_like(t), of_values])
        state[_transformers_name(name, instruct)] = t
    return state


def _transformers_name(name: str, instruct: bool) -> str:
    own_words = "Qformer.bert.embeddings.word", "Qformer.bert.embeddings.position"
    if name.startswith("Qformer.bert.") and (instruct or not name.startswith(own_words)):
        (renamed,) = qformer.to_transformers({name.removeprefix("Qformer.bert."): torch.empty(0)}, instruct)
        return "qformer." + renamed
    for language in ("opt", "t5", "llm"):
        for theirs, official in _LANGUAGE:
            if name.startswith(official.format(language)):
                return theirs + name.removeprefix(official.format(language))
    for theirs, official in reversed(_BEGINNINGS):
        if name.startswith(official):
            name = theirs + name.removeprefix(official)
            if theirs == "vision_model.encoder.layers.":
                for a, b in (*_IN_BLOCKS, _QKV):
                    name = name.replace(b, a)
            return name
    return name
