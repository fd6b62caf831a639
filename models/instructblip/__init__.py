"""InstructBLIP (Dai et al. 2023, arXiv:2305.06500) under the official key names, with T5 and with Vicuna.

model = mmfuse.models.create("instructblip", "vicuna-7b")
model(image, qformer_ids, qformer_mask, ids, mask, output_ids, output_mask).loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmfuse.models.blip2 import language, needed, qformer_config, visual_encoder
from mmfuse.models.instructblip.model import T5, Instructed, Vicuna
from mmfuse.models.registry import System, check_keys

__all__ = ["T5", "Instructed", "Vicuna", "build"]

_ARGS = (
    *("vit_model", "img_size", "drop_path_rate", "use_grad_checkpoint", "vit_precision", "freeze_vit"),
    *("num_query_token", "max_txt_len", "max_output_txt_len", "prompt", "qformer_text_input"),
)
_KEYS = ("class", "args", "vit", "bert", "tokens", "t5", "t5_dense_act_fn_override", "llama", "ln_vision_eps")
_CLASSES = "Blip2T5Instruct", "Blip2VicunaInstruct"


def build(config: Mapping[str, Any]) -> nn.Module:
    """A class of LAVIS from {"class", "args", "vit", "bert", "tokens"} and "t5" or "llama".

    "args" are the official constructor's, but its texts' lengths and prompt, which are a tokenizer's, change nothing.
    """
    check_keys(config, _KEYS)
    kind, args, tokens = config.get("class"), config.get("args", {}), config.get("tokens", {})
    if kind not in _CLASSES:
        raise ValueError(f"class is {kind!r}, expected one of {', '.join(_CLASSES)}")
    check_keys(args, _ARGS)
    encoder = visual_encoder(args, config.get("vit", {}))
    text = args.get("qformer_text_input", True)
    bert = qformer_config(config.get("bert", {}), tokens.get("bert", {}), encoder_width=encoder.num_features, text=text)
    queries = args.get("num_query_token", 32)
    more = {"freeze_vit": args.get("freeze_vit", True), "eps": config.get("ln_vision_eps", 1e-5)}
    if kind == "Blip2T5Instruct":
        given = needed(config, "t5")
        llm = language.t5(given, config.get("t5_dense_act_fn_override", "gelu"))
        return T5(encoder, bert, queries, llm, given["d_model"], **more)
    given = needed(config, "llama")
    of = tokens.get("llm", {})
    pad = of.get("pad", given.get("vocab_size", 32000))
    llm = language.llama({**given, "vocab_size": pad + 1})  # [PAD] is added to the vocabulary
    return Vicuna(encoder, bert, queries, llm, given["hidden_size"], pad=pad, eos=of.get("eos", 2), **more)


SYSTEM = System(
    build=build,
    presets={
        "flan-t5-xl": {"class": "Blip2T5Instruct", "t5": language.FLAN_T5_XL},
        "flan-t5-xxl": {"class": "Blip2T5Instruct", "t5": language.FLAN_T5_XXL},
        "vicuna-7b": {"class": "Blip2VicunaInstruct", "llama": language.LLAMA_7B},
        "vicuna-13b": {"class": "Blip2VicunaInstruct", "llama": language.LLAMA_13B},
    },
    paper="arXiv:2305.06500",
)
