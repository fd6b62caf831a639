"""MiniGPT-4 (Zhu et al. 2023, arXiv:2304.10592) and MiniGPT-v2 (Chen et al. 2023, arXiv:2310.09478).

model = mmfuse.models.create("minigpt4", "vicuna-7b")
model(image, prompt_ids, answer_ids).loss.backward()  # only the projection learns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmfuse.models.blip2 import language, needed, qformer_config, visual_encoder
from mmfuse.models.minigpt4.model import IMAGE, PADDING, MiniGPT4, Turns
from mmfuse.models.registry import System, check_keys

__all__ = ["IMAGE", "PADDING", "MiniGPT4", "Turns", "build", "lora"]

_VISION = ("vit_model", "img_size", "drop_path_rate", "vit_precision", "freeze_vit", "use_grad_checkpoint")
_TEXT = ("max_context_len", "max_txt_len", "end_sym", "prompt_template", "chat_template")
_LORA = {"lora_r": 0, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": ("q_proj", "v_proj")}
_CLASSES = {"MiniGPT4": ("has_qformer", "num_query_token", "freeze_qformer"), "MiniGPTv2": ()}
_TOKENS = {"pad": 0, "bos": 1}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A class of Vision-CAIR/MiniGPT-4 from {"class", "args", "vit", "bert", "llama", "tokens", "prompt_template"}.

    "args" are the official constructor's, but texts are token ids: "end_sym" and both sides of the "{}" of
    "prompt_template" are integers, separated by spaces.
    """
    check_keys(config, ("class", "args", "vit", "bert", "llama", "tokens", "prompt_template"))
    kind, args = config.get("class"), config.get("args", {})
    if kind not in _CLASSES:
        raise ValueError(f"class is {kind!r}, expected one of {', '.join(_CLASSES)}")
    check_keys(args, (*_VISION, *_TEXT, *_LORA, *_CLASSES[kind]))
    version_2 = kind == "MiniGPTv2"
    encoder = visual_encoder(args, config.get("vit", {}))
    bert = None
    if args.get("has_qformer", not version_2):
        bert = qformer_config(config.get("bert", {}), {}, encoder_width=encoder.num_features, text=False)
    template = args.get("prompt_template", config.get("prompt_template", "{}"))
    before, found, after = template.partition("{}")
    if not found:
        raise ValueError(f"prompt_template is {template!r}, expected token ids with {{}} among them")
    return MiniGPT4(
        encoder,
        bert,
        args.get("num_query_token", 32),
        _llama(needed(config, "llama"), {**_LORA, "lora_r": 64 if version_2 else 0, **_given(args, _LORA)}),
        _TOKENS | dict(config.get("tokens", {})),
        _ids("end_sym", args.get("end_sym", "")),
        (_ids("prompt_template", before), _ids("prompt_template", after)),
        args.get("chat_template", False),
        args.get("max_txt_len", 160),
        args.get("freeze_vit", True),
        args.get("freeze_qformer", True),
        args.get("max_context_len", 3800),
    )


def _given(args: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: args[name] for name in names if name in args}


def _ids(name: str, text: str) -> Sequence[int]:
    try:
        return tuple(map(int, text.split()))
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected token ids") from None


def _llama(config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    llm = language.llama(config).requires_grad_(False)
    rank, alpha, dropout, targets = (options[name] for name in _LORA)
    return lora(llm, rank, alpha, dropout, targets) if rank else llm


def lora(
    llm: nn.Module,
    r: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """A frozen language model that learns by LoRA (Hu et al. 2021, arXiv:2106.09685), peft's."""
    import peft

    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=modules_to_save,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llm, config)


_HASHES = "2277 29937"  # "###" behind a word

SYSTEM = System(
    build=build,
    presets={
        "vicuna-7b": {"class": "MiniGPT4", "args": {"end_sym": _HASHES}, "llama": language.LLAMA_7B},
        "vicuna-13b": {"class": "MiniGPT4", "args": {"end_sym": _HASHES}, "llama": language.LLAMA_13B},
        "llama-2-7b": {
            "class": "MiniGPT4",
            "args": {"has_qformer": False, "end_sym": "2"},
            "llama": {**language.LLAMA_7B, "rms_norm_eps": 1e-5},
        },
        "v2": {
            "class": "MiniGPTv2",
            "args": {"img_size": 448, "end_sym": "2", "chat_template": True, "prompt_template": "{}"},
            "llama": {**language.LLAMA_7B, "rms_norm_eps": 1e-5},
        },
    },
    paper="arXiv:2304.10592",
)
