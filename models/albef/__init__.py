"""ALBEF (Li et al. 2021, arXiv:2107.07651) under the official key names: pre-training, retrieval and VQA.

model = mmfuse.models.create("albef", "14m")
losses = model(image, ids, mask, alpha=0.4)  # a training step: loss_mlm, loss_ita, loss_itm
losses.total.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from mmfuse.models.albef.bert import BertConfig
from mmfuse.models.albef.model import (
    ALBEF,
    VQA,
    Losses,
    MaskDraws,
    Pretraining,
    RankedAnswers,
    Retrieval,
)
from mmfuse.models.contrast import Features
from mmfuse.models.registry import System, check_keys, entries

__all__ = ["ALBEF", "VQA", "Features", "Losses", "MaskDraws", "Pretraining", "RankedAnswers", "Retrieval", "build"]

_TOKENS = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "mask_token_id": 103}
_VIT = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4}
_DECODER = {"fusion_layer": 0, "num_hidden_layers": 6}
_CONTRAST = ("image_res", "vision_width", "embed_dim", "temp", "queue_size", "momentum")
_NEEDS = {
    "pretrain": (*_CONTRAST, "mlm_probability"),
    "retrieval": (*_CONTRAST, "distill"),
    "vqa": ("image_res", "vision_width", "distill"),
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A variant from {"variant", "config", "bert_config", "vit", "tokenizer"}; vqa also takes "decoder", "momentum".

    "config" and "bert_config" are the official constructors'; what else they hard-code has their values as default.
    """
    check_keys(config, ("variant", "config", "bert_config", "vit", "tokenizer", "decoder", "momentum"))
    variant = config.get("variant")
    if variant not in _NEEDS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(_NEEDS)}")
    given = entries(config, "config", _NEEDS[variant], _NEEDS[variant])
    fields = signature(BertConfig).parameters
    bert = BertConfig(**entries(config, "bert_config", fields, [n for n, p in fields.items() if p.default is p.empty]))
    sizes = _VIT | entries(config, "vit", _VIT)
    tokens = _TOKENS | entries(config, "tokenizer", _TOKENS)
    for name, width in (("vision_width", given["vision_width"]), ("encoder_width", bert.encoder_width)):
        if width != sizes["embed_dim"]:
            raise ValueError(f"{name} is {width}, expected the image encoder's embed_dim {sizes['embed_dim']}")
    if variant == "pretrain":
        return Pretraining(given, bert, sizes, tokens)
    if variant == "retrieval":
        return Retrieval(given, bert, sizes)
    decoder = _DECODER | entries(config, "decoder", (*_DECODER, "note"))
    decoder.pop("note", None)
    if bert.encoder_width != bert.hidden_size:
        raise ValueError(
            f"encoder_width is {bert.encoder_width}, expected hidden_size {bert.hidden_size}: the decoder's "
            "cross-attention sees the question's states"
        )
    model = VQA(given, bert, sizes, tokens, replace(bert, **decoder))
    model.momentum = config.get("momentum", model.momentum)
    return model


_BERT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "fusion_layer": 6,
    "encoder_width": 768,
}


def _published(variant: str, **config: Any) -> dict[str, Any]:
    return {"variant": variant, "config": {"vision_width": 768, **config}, "bert_config": _BERT}


_ITC = {"embed_dim": 256, "temp": 0.07, "queue_size": 65536, "momentum": 0.995}

SYSTEM = System(
    build=build,
    presets={
        "14m": _published("pretrain", image_res=256, mlm_probability=0.15, **_ITC),
        "14m-retrieval": _published("retrieval", image_res=384, distill=True, **_ITC),
        "14m-vqa": _published("vqa", image_res=384, distill=True),
    },
    paper="arXiv:2107.07651",
)
