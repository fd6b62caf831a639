"""transformers' own generation (greedy, sampling, beams, every logits processor) over graphs in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmfuse.export.generation.graphs import cache_name, states
from mmfuse.export.generation.sessions import Sessions, repeated

_UNAVAILABLE = (
    "output_attentions",
    "output_hidden_states",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)


def configs(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Of a language model, made objects again."""
    kind = entries["config"]["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {kind!r}, which this transformers does not know")
    return {
        "config": CONFIG_MAPPING[kind].from_dict(dict(entries["config"])),
        "generation_config": GenerationConfig.from_dict(dict(entries["generation_config"])),
    }


class Language(GenerationMixin):
    """A language model for one call of `generate`, from its prompt to its last word."""

    main_input_name, base_model_prefix, input_modalities = "input_ids", "", ("text",)
    device, dtype = torch.device("cpu"), torch.float32
    _is_stateful = False

    def __init__(self, sessions: Sessions, config: Any, generation_config: GenerationConfig):
        self.run, self.empty, self.cache_name = sessions.run, sessions.empty_cache, cache_name()
        self.config, self.generation_config = config, generation_config
        self.images = torch.empty(0)
        self.seen: Sequence[Tensor] = ()

    # --- what a model's own `generate` asks of its language model ---

    def number(self, images: Tensor) -> Tensor:
        """Take in the rows of images [B, Q, width]: their numbers [B, Q, 1]."""
        self.images = images.flatten(0, 1)
        return (-1 - torch.arange(len(self.images))).view(*images.shape[:2], 1)

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """Of ids [B, L] their numbers [B, L, 1]."""
        return lambda ids: ids[..., None]

    def generate(self, *args: Any, **how: Any) -> Any:
        for name in _UNAVAILABLE:
            if how.get(name):
                raise ValueError(f"{name} is {how[name]!r}, expected none: the graphs give the next word's logits")
        return super().generate(*args, **how)

    # --- what transformers' `generate` asks of a model ---

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = kwargs.get(self.cache_name)
        if cache is not None and cache.get_seq_length():
            input_ids = input_ids[:, -1:]
        elif inputs_embeds is not None and not self.config.is_encoder_decoder:
            input_ids = inputs_embeds[..., 0]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "cache": cache}

    def __call__(self, return_dict: bool = True, **inputs: Any) -> CausalLMOutput:
        return self.forward(**inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> CausalLMOutput:
        cache = getattr(cache, "self_attention_cache", cache)
        past = states(cache) if cache is not None and cache.get_seq_length() else self.empty(len(input_ids))
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past[0].shape[2] + input_ids.shape[1])
        logits, *present = self.step(input_ids, attention_mask, past)
        if cache is not None:
            for layer, key, value in zip(cache.layers, present[::2], present[1::2], strict=False):
                layer.is_initialized, layer.keys, layer.values = True, key, value
        return CausalLMOutput(logits=logits[:, None])

    def step(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        """Logits [rows, V] after ids [rows, n], and the cache with them."""
        raise NotImplementedError


class CausalLanguage(Language):
    """A decoder-only model: one graph for the prompt, whose rows are numbered, and for every word after it."""

    def step(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        return self.run("decode" if past[0].shape[2] else "prefill", ids, self.images, mask, *past)


class Seq2SeqLanguage(Language):
    """An encoder, which reads the prompt once, and a decoder."""

    def get_encoder(self) -> Seq2SeqLanguage.Encoder:
        return self.Encoder(self)

    class Encoder:
        main_input_name = "inputs_embeds"

        def __init__(self, language: Seq2SeqLanguage):
            self.language = language

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
            language, rows = self.language, inputs_embeds[..., 0]
            mask = torch.ones_like(rows) if attention_mask is None else attention_mask
            language.seen = (mask, *language.run("prefill", rows, language.images, mask))
            return BaseModelOutput(last_hidden_state=inputs_embeds)

        __call__ = forward

    def step(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        self.seen = repeated(self.seen, len(ids))
        prompt_mask, *seen = self.seen
        return self.run("decode", ids, prompt_mask, *past, *seen)


class CaptionLanguage(Language):
    """A decoder that attends to images in every layer: their keys and values are made once."""

    def generate(
        self, *args: Any, encoder_hidden_states: Tensor, encoder_attention_mask: Any = None, **how: Any
    ) -> Any:
        self.seen = self.run("prefill", encoder_hidden_states)
        return super().generate(*args, **how)

    def step(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        self.seen = repeated(self.seen, len(ids))
        return self.run("decode", ids, mask, *past, *self.seen)
