"""BLIP-2 (Li et al. 2023, arXiv:2301.12597) under the official key names: both stages.

model = mmfuse.models.create("blip2", "vit-g")  # the first stage
model(image, ids, mask).total.backward()
model = mmfuse.models.create("blip2", "opt-2.7b")  # the second
model(image, ids, mask).loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from mmfuse.fused.pretraining import Features, Losses
from mmfuse.fused.qformer import QFormerConfig
from mmfuse.models.blip2 import language
from mmfuse.models.blip2.model import OPT, T5, Answer, Pretraining, Prompt, Vision
from mmfuse.models.blip2.vit import ClipViT, EvaViT
from mmfuse.models.registry import System, check_keys

__all__ = ["OPT", "T5", "Answer", "Features", "Losses", "Pretraining", "Prompt", "Vision", "build"]

_ARGS = ("vit_model", "img_size", "drop_path_rate", "use_grad_checkpoint", "vit_precision", "freeze_vit")
_QUERIES = ("num_query_token", "max_txt_len")
_CLASSES = {
    "Blip2Qformer": (*_QUERIES, "cross_attention_freq", "embed_dim"),
    "Blip2OPT": (*_QUERIES, "prompt"),
    "Blip2T5": (*_QUERIES, "prompt"),
}
_KEYS = ("class", "args", "vit", "bert", "tokens", "vocab_note", "prompt_length", "opt", "t5")
_TOKENS = {"size": 30523, "pad": 0, "cls": 101, "sep": 102, "bos_DEC": 30522}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A class of LAVIS from {"class", "args", "vit", "bert", "tokens"}, and "opt" or "t5" for the second stage.

    "args" are the official constructor's; the image encoder's and BERT's sizes, which it fixes, are defaults here. Of
    its prompt, which is a text, "prompt_length" counts the tokens. "ln_vision_eps" is transformers' if not 1e-5.
    """
    check_keys(config, (*_KEYS, "t5_dense_act_fn_override", "ln_vision_eps"))
    kind = config.get("class")
    if kind not in _CLASSES:
        raise ValueError(f"class is {kind!r}, expected one of {', '.join(_CLASSES)}")
    args = config.get("args", {})
    check_keys(args, (*_ARGS, *_CLASSES[kind]))
    encoder = visual_encoder(args, config.get("vit", {}))
    tokens = config.get("tokens", {})
    bert = qformer_config(
        config.get("bert", {}),
        tokens.get("bert", {}),
        encoder_width=encoder.num_features,
        cross_attention_freq=args.get("cross_attention_freq", 2),
        text=kind == "Blip2Qformer",
    )
    freeze, eps = args.get("freeze_vit", True), config.get("ln_vision_eps", 1e-5)
    queries = args.get("num_query_token", 32)
    if kind == "Blip2Qformer":
        heads = {"embed_dim": args.get("embed_dim", 256), "tokens": _TOKENS | dict(tokens.get("bert", {}))}
        return Pretraining(encoder, bert, queries, freeze, eps, **heads)
    if kind == "Blip2OPT":
        given = needed(config, "opt")
        pad = tokens.get("opt", {}).get("pad", given.get("pad_token_id", 1))
        return OPT(encoder, bert, queries, language.opt(given), pad, config.get("prompt_length", 0), freeze, eps)
    llm = language.t5(needed(config, "t5"), config.get("t5_dense_act_fn_override", "gelu"))
    return T5(encoder, bert, queries, llm, freeze, eps)


def visual_encoder(args: Mapping[str, Any], sizes: Mapping[str, Any]) -> EvaViT | ClipViT:
    """The image encoder of the official constructor's arguments."""
    name, resolution = args.get("vit_model", "eva_clip_g"), args.get("img_size", 224)
    if args.get("drop_path_rate", 0):
        raise ValueError(f"drop_path_rate is {args['drop_path_rate']}, expected 0")
    if args.get("vit_precision", "fp32") != "fp32":
        raise ValueError(f"vit_precision is {args['vit_precision']!r}, expected 'fp32': cast the model instead")
    encoders: dict[str, Any] = {"eva_clip_g": EvaViT, "clip_L": ClipViT}
    if name not in encoders:
        raise ValueError(f"vit_model is {name!r}, expected one of {', '.join(encoders)}")
    accepted = [key for key in signature(encoders[name]).parameters if key not in ("img_size", "use_grad_checkpoint")]
    check_keys(sizes, accepted)
    checkpointing = args.get("use_grad_checkpoint", False)
    if name == "clip_L":
        if checkpointing:
            raise ValueError("use_grad_checkpoint is True, expected False for clip_L")
        return ClipViT(resolution, **sizes)
    return EvaViT(resolution, **sizes, use_grad_checkpoint=checkpointing)


def qformer_config(bert: Mapping[str, Any], tokens: Mapping[str, Any], **own: Any) -> QFormerConfig:
    """Of the official BERT config, whose vocabulary has grown to that of the tokenizer."""
    accepted = [key for key in signature(QFormerConfig).parameters if key not in own]
    check_keys(bert, accepted)
    grown = {"vocab_size": tokens["size"]} if "size" in tokens else {}
    return QFormerConfig(**{**bert, **grown, **own})


def needed(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The config of a language model."""
    if key not in config:
        raise ValueError(f"config has no {key}, expected the language model's config of transformers")
    return config[key]


def _published(kind: str, vit_model: str = "eva_clip_g", img_size: int = 224, **llm: Any) -> dict[str, Any]:
    args = {"vit_model": vit_model, "img_size": img_size, "freeze_vit": img_size == 224}
    return {"class": kind, "args": args, **llm}


_OPT_2_7B, _OPT_6_7B = {"opt": language.OPT_2_7B}, {"opt": language.OPT_6_7B}
_T5_XL, _T5_XXL = {"t5": language.FLAN_T5_XL}, {"t5": language.FLAN_T5_XXL}

SYSTEM = System(
    build=build,
    presets={
        "vit-g": _published("Blip2Qformer"),
        "vit-l": _published("Blip2Qformer", "clip_L"),
        "vit-g-coco": _published("Blip2Qformer", img_size=364),
        "opt-2.7b": _published("Blip2OPT", **_OPT_2_7B),
        "opt-6.7b": _published("Blip2OPT", **_OPT_6_7B),
        "opt-2.7b-coco": _published("Blip2OPT", img_size=364, **_OPT_2_7B),
        "opt-6.7b-coco": _published("Blip2OPT", img_size=364, **_OPT_6_7B),
        "flan-t5-xl": _published("Blip2T5", **_T5_XL),
        "flan-t5-xl-vit-l": _published("Blip2T5", "clip_L", **_T5_XL),
        "flan-t5-xl-coco": _published("Blip2T5", img_size=364, **_T5_XL),
        "flan-t5-xxl": _published("Blip2T5", **_T5_XXL),
    },
    paper="arXiv:2301.12597",
)
