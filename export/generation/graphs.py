"""A part of a model as an ONNX graph, and the parts of language models: one graph for a prompt and for a word after it.

Rows are numbered instead of embedded: a word by its id, row j of the images by -1 - j, so that a prompt is integers and
the graph that decodes a word, which needs the table of words anyway, can also read a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.export.onnx import export_onnx
from mmfuse.models.blip import Context

# sizes of samples: neither 1 nor equal to one another, as such sizes would be taken for constants
BATCH, WORDS, PAST, ROWS, TEXT = 2, 5, 3, 7, 6


@dataclass
class Part:
    """A module, a sample of its inputs, the names of its outputs, and those of the axes that are free."""

    module: nn.Module
    inputs: Mapping[str, Any]
    outputs: Sequence[str]
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def sample(self) -> Any:
        """Its outputs."""
        with torch.no_grad():
            return self.module(**self.inputs)

    def write(self, path: Path) -> None:
        export_onnx(self.module, self.inputs, path, dynamic=self.free, outputs=self.outputs)


# --- language models -------------------------------------------------------------------------------------------------


def cache_name() -> str:
    """What transformers calls a cache, which it renamed."""
    from transformers import GenerationMixin

    named = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in named else "past_key_values"


def filled(states: Sequence[Tensor]) -> Any:
    """A cache of each layer's key and value [B, heads, L, d]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(0, len(states), 2):
        cache.update(states[i], states[i + 1], i // 2)
    return cache


def states(cache: Any) -> tuple[Tensor, ...]:
    """Key and value of each layer; a cache made for more layers than the decoder has keeps those empty."""
    return tuple(t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values))


class Embedded(nn.Module):
    """Numbered rows [B, L] as the language model's embeddings [B, L, width]."""

    def __init__(self, words: nn.Module):
        super().__init__()
        self.words = words

    def forward(self, rows: Tensor, images: Tensor) -> Tensor:
        of_images = images[(-1 - rows).clamp(min=0)]
        return torch.where((rows < 0)[..., None], of_images, self.words(rows.clamp(min=0)))


class CausalLM(nn.Module):
    """Rows [B, n] after a cache: the logits [B, V] of what follows, and the cache with them."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.embedded, self.cache = model, Embedded(model.get_input_embeddings()), cache_name()

    def forward(self, rows: Tensor, images: Tensor, mask: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        cache = filled(past)
        position = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)[:, -rows.shape[1] :]
        found = self.model(
            inputs_embeds=self.embedded(rows, images),
            attention_mask=mask,
            position_ids=position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache: cache},
        )
        return found.logits[:, -1], *states(cache)


class Seq2SeqPrompt(nn.Module):
    """The prompt through the encoder: what the decoder's cross-attention sees, keys and values of every layer."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.embedded, self.cache = model, Embedded(model.get_input_embeddings()), cache_name()

    def forward(self, rows: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        encoder = self.model.get_encoder()
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model(  # one step, of which only this cache is kept
            encoder_outputs=encoder(inputs_embeds=self.embedded(rows, images), attention_mask=mask, return_dict=True),
            attention_mask=mask,
            decoder_input_ids=rows.new_zeros(rows.shape[0], 1),
            use_cache=True,
            **{self.cache: cache},
        )
        return states(cache.cross_attention_cache)


class Seq2SeqDecoder(nn.Module):
    """Ids [B, n] after a cache, given the prompt's mask and keys and values: logits [B, V], and the cache with them."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.cache = model, cache_name()

    def forward(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor], seen: Sequence[Tensor]) -> tuple[Tensor, ...]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(filled(past), filled(seen))
        cache.is_updated = dict.fromkeys(range(len(seen) // 2), True)
        found = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=_like(seen)),
            attention_mask=mask,
            decoder_input_ids=ids,
            use_cache=True,
            **{self.cache: cache},
        )
        return found.logits[:, -1], *states(cache.self_attention_cache)


class BlipPrompt(nn.Module):
    """The images' keys and values for the cross-attention of transformers' BLIP decoder."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.cache = model, cache_name()

    def forward(self, seen: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.zeros(seen.shape[0], 1, dtype=torch.long)
        self.model(input_ids=ids, encoder_hidden_states=seen, is_decoder=True, use_cache=True, **{self.cache: cache})
        return states(cache.cross_attention_cache)


class BlipDecoder(nn.Module):
    """Ids [B, n] after a cache, given their mask and the images' keys and values."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.cache = model, cache_name()

    def forward(self, ids: Tensor, mask: Tensor, past: Sequence[Tensor], seen: Sequence[Tensor]) -> tuple[Tensor, ...]:
        from transformers import EncoderDecoderCache

        cache = EncoderDecoderCache(filled(past), filled(seen))
        cache.is_updated = dict.fromkeys(range(len(seen) // 2), True)
        found = self.model(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=_like(seen),
            is_decoder=True,
            use_cache=True,
            **{self.cache: cache},
        )
        return found.logits[:, -1], *states(cache.self_attention_cache)


def _like(seen: Sequence[Tensor]) -> Tensor:
    """States [B, L, width], of which only the shape is read: their keys and values are there."""
    return seen[0].transpose(1, 2).flatten(2)


class MedPrompt(nn.Module):
    """The keys and values of what the cross-attention of `mmfuse.models.blip`'s decoder sees."""

    def __init__(self, decoder: Any):
        super().__init__()
        self.decoder = decoder

    def forward(self, seen: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(self.decoder.bert.context(seen).keys_values))


class MedDecoder(nn.Module):
    """Ids [B, n] after keys and values of the text, given those of the context."""

    def __init__(self, decoder: Any):
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, past: Sequence[Tensor], seen: Sequence[Tensor]) -> tuple[Tensor, ...]:
        kept = pairs(past)
        mask = ids.new_ones(ids.shape[0], past[0].shape[2] + ids.shape[1])
        hidden = self.decoder.hidden(ids, mask, Context(tuple(pairs(seen))), kept)
        return self.decoder.cls.predictions.decoder(hidden[:, -1]), *flat(kept)


def pairs(states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Key and value of each layer."""
    return list(zip(states[::2], states[1::2], strict=True))


def flat(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [t for pair in pairs for t in pair]


# --- their parts -----------------------------------------------------------------------------------------------------


def causal(model: Any, width: int) -> dict[str, Part]:
    """A decoder-only language model: its prompt is read by the graph that decodes."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = 2 * config.num_hidden_layers
    inputs = {
        "rows": _ids(WORDS),
        "images": torch.zeros(ROWS, width, dtype=model.dtype),
        "mask": _ids(PAST + WORDS) + 1,
        "past": [torch.zeros(BATCH, heads, PAST, size, dtype=model.dtype)] * states,
    }
    free = {
        "rows": {0: "batch", 1: "new"},
        "images": {0: "image_rows"},
        "mask": {0: "batch", 1: "all"},
        "past": {0: "batch", 2: "past"},
    }
    part = Part(CausalLM(model), inputs, ["logits", *_numbered("present", states)], free)
    return {"prefill": part, "decode": part}


def seq2seq(model: Any, width: int) -> dict[str, Part]:
    """An encoder, which reads the prompt, and a decoder."""
    inputs = {
        "rows": _ids(WORDS),
        "images": torch.zeros(ROWS, width, dtype=model.dtype),
        "mask": _ids(WORDS) + 1,
    }
    axes = {0: "batch", 1: "prompt"}
    free = {"rows": axes, "images": {0: "image_rows"}, "mask": axes}
    prompt = Part(Seq2SeqPrompt(model), inputs, _numbered("seen", 2 * model.config.num_decoder_layers), free)
    return {
        "prefill": prompt,
        "decode": _decoder(Seq2SeqDecoder(model), prompt, {"mask": inputs["mask"]}, {"mask": axes}),
    }


def blip(decoder: Any, seen: Tensor) -> dict[str, Part]:
    """transformers' BLIP decoder, which attends to `seen` [B, K, width]."""
    prompt = _context(BlipPrompt(decoder), seen)
    mask = _ids(PAST + WORDS) + 1
    return {
        "prefill": prompt,
        "decode": _decoder(BlipDecoder(decoder), prompt, {"mask": mask}, {"mask": {0: "batch", 1: "all"}}),
    }


def med(decoder: Any, seen: Tensor) -> dict[str, Part]:
    """`mmfuse.models.blip`'s decoder, which attends to `seen` [B, K, width]."""
    prompt = _context(MedPrompt(decoder), seen)
    return {"prefill": prompt, "decode": _decoder(MedDecoder(decoder), prompt, {}, {})}


def _context(module: nn.Module, seen: Tensor) -> Part:
    part = Part(module, {"seen": seen}, [], {"seen": {0: "batch", 1: "context"}})
    part.outputs = _numbered("seen", len(part.sample()))
    return part


def _decoder(module: nn.Module, prompt: Part, own: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> Part:
    """A word after a cache, given what the prompt's part puts out."""
    seen = prompt.sample()
    past = [t[:, :, :PAST] for t in seen]
    free = {"ids": {0: "batch", 1: "new"}, **axes, "past": {0: "batch", 2: "past"}, "seen": {0: "batch", 2: "context"}}
    inputs = {"ids": _ids(WORDS), **own, "past": past, "seen": seen}
    return Part(module, inputs, ["logits", *_numbered("present", len(past))], free)


def _ids(length: int) -> Tensor:
    return torch.zeros(BATCH, length, dtype=torch.long)


def _numbered(kind: str, count: int) -> list[str]:
    """Names of keys (even) and values (odd) of the layers."""
    return [f"{kind}.{i}" for i in range(count)]
