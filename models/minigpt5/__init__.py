"""MiniGPT-5 (Zheng et al. 2023, arXiv:2310.02239) under the official key names.

model = mmfuse.models.create("minigpt5", "vicuna-7b")
model.unet = diffusers.UNet2DConditionModel.from_pretrained(...)  # for the losses
model(ids, mask, labels, images, moments(vae, written)).total.backward()
paint(model.unet, vae, scheduler, model.generate(prompt, images), torch.randn(1, 4, 64, 64))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmfuse.models.blip2 import language, needed, qformer_config, visual_encoder
from mmfuse.models.minigpt4 import MiniGPT4, lora
from mmfuse.models.minigpt5.diffusion import moments, paint
from mmfuse.models.minigpt5.model import Draws, Embedded, Generated, Losses, MiniGPT5, Tokens
from mmfuse.models.registry import System, check_keys

__all__ = ["Draws", "Embedded", "Generated", "Losses", "MiniGPT5", "Tokens", "build", "moments", "paint"]

_ARGS = (
    *("vit_model", "image_size", "num_query_token", "vit_precision", "freeze_vit", "freeze_qformer"),
    *("llama_model", "max_txt_len", "end_sym"),
)
_SWITCHES = ("class", "img_token_num", "IS_STAGE2", "USE_LORA", "USE_CFG", "snr_loss", "vae_scaling_factor")
_PARTS = ("args", "vit", "bert", "llama", "clip_text", "unet", "scheduler", "llm_to_t2i_mapping", "tokens")
_MAPPING = {
    "d_model": 1024,
    "nhead": 8,
    "num_encoder_layers": 4,
    "num_decoder_layers": 4,
    "dim_feedforward": 4096,
    "activation": "relu",
    "norm_first": True,
    "batch_first": True,
}
_TOKENS = {"bos": 1, "eos": 2, "IMG0": 32000, "ImageHere": 32008, "base_size": 32000, "size": 32009}
# Stable Diffusion 2.1's
_CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The official model; "args", "vit", "bert" and "llama" as MiniGPT-4's, "clip_text" as transformers'.

    "unet" is diffusers' config; without it the model has none, and its `unet` may be set to one.
    """
    check_keys(config, (*_SWITCHES, *_PARTS))
    args = config.get("args", {})
    check_keys(args, _ARGS)
    vision = {"img_size": args.get("image_size", 224)}
    vision |= {key: args[key] for key in ("vit_model", "vit_precision", "freeze_vit") if key in args}
    encoder = visual_encoder(vision, config.get("vit", {}))
    bert = qformer_config(config.get("bert", {}), {}, encoder_width=encoder.num_features, text=False)
    tokens = _TOKENS | dict(config.get("tokens", {}).get("llm", {}))
    llm = language.llama({**needed(config, "llama"), "vocab_size": tokens["size"]})
    if config.get("USE_LORA", False):
        llm = lora(llm, r=8, alpha=16, dropout=0.05, modules_to_save=["lm_head", "embed_tokens"])
    model = MiniGPT4(encoder, bert, args.get("num_query_token", 32), llm, {"pad": tokens["eos"], "bos": tokens["bos"]})
    return MiniGPT5(
        model,
        language.clip_text(config.get("clip_text", _CLIP_TEXT)),
        _MAPPING | dict(config.get("llm_to_t2i_mapping", {})),
        Tokens(*(tokens[name] for name in ("bos", "eos", "IMG0", "ImageHere", "base_size"))),
        config.get("img_token_num", 8),
        config.get("tokens", {}).get("sd", {}).get("max_length", 77),
        _scheduler(config.get("scheduler", {})),
        _unet(config["unet"]) if "unet" in config else None,
        config.get("vae_scaling_factor", 0.18215),
        config.get("snr_loss", True),
        config.get("IS_STAGE2", False),
    )


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("beta_schedule", "scaled_linear")
    if kind != "scaled_linear":
        raise ValueError(f"beta_schedule is {kind!r}, expected 'scaled_linear'")
    return {key: config[key] for key in ("beta_start", "beta_end", "num_train_timesteps") if key in config}


def _unet(config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(**config)


SYSTEM = System(
    build=build,
    presets={
        "vicuna-7b": {"llama": language.LLAMA_7B},
        "vicuna-7b-stage-2": {"llama": language.LLAMA_7B, "IS_STAGE2": True, "USE_LORA": True},
    },
    paper="arXiv:2310.02239",
)
