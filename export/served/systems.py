"""The parts of the reference systems that leave PyTorch, each as one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.export.served import SERVED, Samples, Served, Sizes, Writes
from mmfuse.export.served.tiny import TINY
from mmfuse.models.imagebind.model import MODALITIES
from mmfuse.models.minigpt4 import IMAGE


class Task(nn.Module):
    """A use of a model as a module: `call(model, **inputs)` gives the outputs in order."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, **inputs: Tensor) -> Any:
        return self._call(self.model, **inputs)


_BATCH = {"batch": 1}, {"batch": 3}, {"batch": 8}
# a batch, and how long its texts are
_TEXTS = tuple({"batch": b, "length": n} for b, n in ((1, 5), (3, 7), (8, 4)))


def _declare(
    name: str,
    call: Callable[..., Any],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    samples: Samples,
    sizes: Sequence[Sizes] = _BATCH,
    tiny: Mapping[str, Any] | None = None,
    writes: Writes | None = None,
) -> None:
    tiny = TINY[name.partition("/")[0]] if tiny is None else tiny
    SERVED[name] = Served(name, tuple(outputs), dynamic, lambda model: Task(model, call), samples, sizes, tiny, writes)


def _image(model: Any, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """[B, 3, R, R], normalised pixels."""
    size = model.image_resolution
    return torch.randn(sizes.get("batch", sizes.get("image_batch", 1)), 3, size, size, generator=generator)


def _text(words: int, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [B, L]: a first word, others, and zeros behind them, in each row from another place on."""
    ids = torch.randint(3, words, (batch, length), generator=generator)
    ids[:, 0] = 2
    kept = torch.randint(2, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length) < kept).long()
    return ids * mask, mask


def _pairs(
    words: Callable[[Any], int],
    names: tuple[str, str] = ("ids", "mask"),
    length: Callable[[Any], int] | None = None,
    seen: bool = True,
) -> Samples:
    """Images with texts. `length` where it is fixed; `seen`: the mask is 1 where there are words, else 0."""

    def samples(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        n = length(model) if length else sizes["length"]
        ids, mask = _text(words(model), sizes["batch"], n, generator)
        return {"image": _image(model, sizes, generator), names[0]: ids, names[1]: mask if seen else 1 - mask}

    return samples


def _images(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": _image(model, sizes, generator)}


def _prompts(words: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts before new words."""
    ids = torch.randint(10, words, (sizes["batch"], sizes["length"]), generator=generator)
    return {"ids": ids, "mask": torch.ones_like(ids)}


_FEW = {"max_new_tokens": 6}
_ONE, _TWO = {0: "batch"}, {0: "batch", 1: "length"}
_PAIR = {"image": _ONE, "ids": _TWO, "mask": _TWO}


# --- image and text, one tower each ---------------------------------------------------------------------------------


def _unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=-1, keepdim=True)


def _clip(clip: Any, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """CLIP with its embeddings, of length 1, beside its logits: temperature times cosine."""
    image_embeds, text_embeds = _unit(clip.encode_image(image)), _unit(clip.encode_text(text))
    logits = clip.logit_scale.exp() * image_embeds @ text_embeds.T
    return logits, logits.T, image_embeds, text_embeds


def _clip_samples(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Each text ends somewhere with the end token, the highest id, then zeros."""
    length, vocabulary = model.context_length, model.token_embedding.num_embeddings
    image, texts = _image(model, sizes, generator), sizes["text_batch"]
    text = torch.randint(1, vocabulary - 1, (texts, length), generator=generator)
    end = torch.randint(1, length, (texts, 1), generator=generator)
    return {"image": image, "text": torch.where(torch.arange(length) < end, text, 0).scatter(1, end, vocabulary - 1)}


_declare(
    "clip",
    _clip,
    ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    {"image": {0: "image_batch"}, "text": {0: "text_batch"}},
    _clip_samples,
    # an empty batch switches one tower off, and the last is large enough for a steady error
    [{"image_batch": i, "text_batch": t} for i, t in ((1, 1), (3, 2), (2, 0), (0, 2), (4, 16))],
)


def _coca(coca: Any, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    found = coca(image, text)
    return found["image_features"], found["text_features"], found["logits"]


def _coca_samples(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    ids, _ = _text(model.text.token_embedding.num_embeddings, sizes["batch"], model.text.context_length, generator)
    return {"image": _image(model, sizes, generator), "text": ids}


_declare(
    "coca",
    _coca,
    ("image_features", "text_features", "logits"),
    {"image": _ONE, "text": _ONE},
    _coca_samples,
)


# --- image and text, fused ------------------------------------------------------------------------------------------


def _albef(albef: Any, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    f = albef.features(image, ids, mask)
    return f.image_feat, f.text_feat, albef.match(f.image_embeds, f.text_embeds, mask)


def _blip(blip: Any, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    f = blip.features(image, ids, mask)
    return f.image_feat, f.text_feat, blip.match(blip.context(f.image_embeds), ids, mask)


def _bert_words(model: Any) -> int:
    return model.text_encoder.embeddings.word_embeddings.num_embeddings


_CAPTIONER = TINY["blip"] | {"variant": "caption", "config": {"image_size": TINY["blip"]["config"]["image_size"]}}
_CAPTIONS = Writes(_CAPTIONER, _images, {"num_beams": 1, "max_length": 12})
for _name, _call, _writes in (("albef", _albef, None), ("blip", _blip, _CAPTIONS)):
    _declare(
        _name, _call, ("image_feat", "text_feat", "match_logits"), _PAIR, _pairs(_bert_words), _TEXTS, writes=_writes
    )


def _vlmo(vlmo: Any, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    contrast = vlmo.retrieval(image, ids, mask)
    return contrast.image, contrast.text, vlmo.answer(image, ids, mask)


_declare(
    "vlmo",
    _vlmo,
    ("image_feat", "text_feat", "answer_logits"),
    {"image": _ONE, "ids": _ONE, "mask": _ONE},
    _pairs(lambda model: model.word.num_embeddings, length=lambda model: model.config.max_text_len),
)


def _beit3(beit3: Any, image: Tensor, text_ids: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
    tokens = beit3(image, text_ids, padding_mask)
    return beit3.encode_image(image), beit3.encode_text(text_ids, padding_mask), tokens.image, tokens.text


_declare(
    "beit3",
    _beit3,
    ("image_feat", "text_feat", "image_tokens", "text_tokens"),
    {"image": _ONE, "text_ids": _TWO, "padding_mask": _TWO},
    _pairs(lambda model: model.beit3.word.num_embeddings, ("text_ids", "padding_mask"), seen=False),
    _TEXTS,
)


_declare(
    "vqkd",
    lambda vqkd, image: vqkd.encode(image),
    ("codes",),
    {"image": _ONE},
    lambda model, sizes, generator: {"image": _image(model, sizes, generator)},
)


# --- Q-Formers ------------------------------------------------------------------------------------------------------


def _blip2(blip2: Any, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    f = blip2.features(image, ids, mask)
    return f.image_feats, f.text_feat, blip2.match(f.kv, ids, f.kept)


def _qformer_words(model: Any) -> int:
    return model.bert.embeddings.word_embeddings.num_embeddings - 1


_declare("blip2", _blip2, ("image_feats", "text_feat", "match_logits"), _PAIR, _pairs(_qformer_words), _TEXTS)


def _prompt(model: Any, image: Tensor) -> Tensor:
    """What a language model reads of images: [B, Q, width]."""
    prompt = model.image_prompt(image)
    return prompt.flatten(0, 1) if prompt.dim() == 4 else prompt


_declare(
    "blip2/opt",
    lambda model, image: model.opt_proj(model.query(image)),
    ("image_prompt",),
    {"image": _ONE},
    _images,
    tiny=TINY["blip2/opt"],
    writes=Writes(TINY["blip2/opt"], lambda m, s, g: _images(m, s, g) | _prompts(50, s, g), _FEW),
)


def _chats(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _prompts(50, sizes, generator)["ids"]
    ids[:, 1] = IMAGE
    return {"image": _image(model, sizes, generator)[:, None], "prompt_ids": ids}


_declare(
    "minigpt4", _prompt, ("image_prompt",), {"image": _ONE}, _images, writes=Writes(TINY["minigpt4"], _chats, _FEW)
)


def _instructed(model: Any, image: Tensor, qformer_ids: Tensor, qformer_mask: Tensor) -> Tensor:
    return model.image_prompt(image, qformer_ids, qformer_mask)


_instructions = _pairs(_qformer_words, ("qformer_ids", "qformer_mask"))
_declare(
    "instructblip",
    _instructed,
    ("image_prompt",),
    {"image": _ONE, "qformer_ids": _TWO, "qformer_mask": _TWO},
    _instructions,
    _TEXTS,
    writes=Writes(TINY["instructblip"], lambda m, s, g: _instructions(m, s, g) | _prompts(50, s, g), _FEW),
)


def _vokens(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"voken_states": torch.randn(sizes["batch"], model.vokens, model.fc[0].in_features, generator=generator)}


_declare(
    "minigpt5/mapper",
    lambda model, voken_states: model.conditioning(voken_states),
    ("conditioning",),
    {"voken_states": _ONE},
    _vokens,
)
_declare(
    "minigpt5/connector",
    lambda model, image: _prompt(model.model, image),
    ("image_prompt",),
    {"image": _ONE},
    lambda model, sizes, generator: _images(model.model, sizes, generator),
)


# --- many modalities ------------------------------------------------------------------------------------------------


def _bound(modality: str, model: Any, **inputs: Tensor) -> Tensor:
    return model.encode(modality, inputs[modality])


def _bound_samples(modality: str, model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    stem, batch = model.modality_preprocessors[modality], sizes["batch"]
    if modality == "text":
        words = stem.token_embedding.num_embeddings
        ids = torch.randint(1, words - 1, (batch, stem.pos_embed.shape[1]), generator=generator)
        return {"text": ids.scatter(1, torch.randint(1, ids.shape[1], (batch, 1), generator=generator), words - 1)}
    return {modality: torch.randn(batch, *model.input_sizes[modality], generator=generator)}


for _modality in MODALITIES:
    _declare(
        f"imagebind/{_modality}",
        partial(_bound, _modality),
        ("embedding",),
        {_modality: _ONE},
        partial(_bound_samples, _modality),
    )


def _component(name: str, model: Any, **inputs: Tensor) -> Any:
    return model(name, *inputs.values())


def _of(*shape: int) -> Samples:
    def samples(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        return {"data": torch.randn(sizes["batch"], *(sizes.get("length", 0) or n for n in shape), generator=generator)}

    return samples


def _table(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Categories of the first columns, numbers in the others."""
    categories = torch.randint(1, 3, (sizes["batch"], 3), generator=generator).float()
    return {"data": torch.cat([categories, torch.randn(sizes["batch"], 2, generator=generator)], dim=1)}


_COMPONENTS: dict[str, Samples] = {
    "image": _of(3, 48, 48),
    "video": _of(3, 4, 32, 32),
    "time_series": _of(12, 5),
    "hyperspectral": _of(10, 1),
    "x_ray": _of(3, 32, 32),
    "audio": _of(64, 64),
    "tabular": _table,
    "points": _of(48, 3),
}
for _name, _samples in _COMPONENTS.items():
    _part: dict[str, Any] = {"encoder": TINY["metatransformer"]["encoder"], "components": {}}
    _part["components"] = {_name: TINY["metatransformer"]["components"][_name]}
    _declare(
        f"metatransformer/{_name}", partial(_component, _name), ("features",), {"data": _ONE}, _samples, tiny=_part
    )
