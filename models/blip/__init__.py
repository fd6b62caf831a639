"""BLIP (Li et al. 2022, arXiv:2201.12086) under the official key names: pre-training, retrieval, captioning and VQA.

model = mmfuse.models.create("blip", "base")
losses = model(image, ids, mask, alpha=0.4)  # a training step: loss_ita, loss_itm, loss_lm
losses.total.backward()
captions = model.generate(image)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from mmfuse.models.blip.capfilt import Bootstrapped, bootstrap
from mmfuse.models.blip.decoding import CaptionDecoder
from mmfuse.models.blip.med import BertConfig, Context
from mmfuse.models.blip.model import BLIP, VQA, Captioner, Losses, Pretraining, RankedAnswers, Retrieval
from mmfuse.models.contrast import Features
from mmfuse.models.registry import System, check_keys, entries

__all__ = [
    "BLIP",
    "VQA",
    "Bootstrapped",
    "CaptionDecoder",
    "Captioner",
    "Context",
    "Features",
    "Losses",
    "Pretraining",
    "RankedAnswers",
    "Retrieval",
    "bootstrap",
    "build",
]

# bert-base-uncased's, with [DEC] and [ENC] after its own
_TOKENS = {
    "pad_token_id": 0,
    "cls_token_id": 101,
    "sep_token_id": 102,
    "bos_token_id": 30522,
    "enc_token_id": 30523,
    "len": 30524,
}
_PROMPT = (101, 1037, 3861, 1997, 102)  # "a picture of"
_VIT = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4, "drop_path_rate": 0.0}
_CONTRAST = {"image_size": 224, "embed_dim": 256, "queue_size": 57600, "momentum": 0.995}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "pretrain": _CONTRAST,
    # with one process, negatives of all ranks are those of this one
    "retrieval": _CONTRAST | {"image_size": 384, "negative_all_rank": False},
    "caption": {"image_size": 384},
    "vqa": {"image_size": 480},
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A variant from {"variant", "config", "med_config", "vit", "tokenizer", "prompt_ids"}.

    "config" and "med_config" are the official constructors', whose defaults they have; the other entries, which the
    official code hard-codes, too. The table of words has tokenizer["len"] rows. Cross-attention to images is as wide as
    the image encoder, whatever "encoder_width" says.
    """
    check_keys(config, ("variant", "config", "med_config", "vit", "tokenizer", "prompt_ids"))
    variant = config.get("variant")
    if variant not in _ARGUMENTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(_ARGUMENTS)}")
    given = _ARGUMENTS[variant] | entries(config, "config", _ARGUMENTS[variant])
    fields = signature(BertConfig).parameters
    needed = [name for name, p in fields.items() if p.default is p.empty]
    vit = _VIT | entries(config, "vit", _VIT)
    tokens = _TOKENS | entries(config, "tokenizer", _TOKENS)
    prompt = tuple(config.get("prompt_ids", _PROMPT))
    decoder = replace(BertConfig(**entries(config, "med_config", fields, needed)), vocab_size=tokens["len"])
    med = replace(decoder, encoder_width=vit["embed_dim"])
    if variant == "pretrain":
        return Pretraining(given, med, vit, tokens, prompt)
    if variant == "retrieval":
        return Retrieval(given, med, vit, tokens)
    if variant == "caption":
        return Captioner(given, med, vit, tokens, prompt)
    if decoder.encoder_width != decoder.hidden_size:
        raise ValueError(
            f"encoder_width is {decoder.encoder_width}, expected hidden_size {decoder.hidden_size}: the decoder's "
            "cross-attention sees the question's states"
        )
    return VQA(given, med, decoder, vit, tokens)


_MED = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30524,
    "encoder_width": 768,
}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.1}


def _published(variant: str, **vit: Any) -> dict[str, Any]:
    return {"variant": variant, "med_config": _MED, "vit": vit}


SYSTEM = System(
    build=build,
    presets={
        "base": _published("pretrain"),
        "large": _published("pretrain", **_LARGE),
        "base-retrieval": _published("retrieval"),
        "large-retrieval": _published("retrieval", **_LARGE),
        "base-caption": _published("caption"),
        "large-caption": _published("caption", **_LARGE),
        "base-vqa": _published("vqa", drop_path_rate=0.1),
    },
    paper="arXiv:2201.12086",
)
