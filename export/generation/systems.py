"""The models that can be exported for generation, each from both sides.

`parts` cuts a model into graphs, and `standin` puts what runs them into the place of the model's modules. The rest, how
a prompt is laid out and which words are taken, is the model class's own code: `StandIn.generate` is its `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmfuse._compat import allow_torchvision
from mmfuse.export.generation import graphs
from mmfuse.export.generation.graphs import BATCH, TEXT, Part, flat, pairs
from mmfuse.export.generation.sessions import Sessions, repeated
from mmfuse.export.require import require
from mmfuse.models.blip import Context


class StandIn:
    """Of a model's class, the methods; of the model, only `attributes`."""

    def __init__(self, cls: type, attributes: Mapping[str, Any]):
        vars(self).update(attributes)
        self.__cls = cls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__cls, name)
        return found.__get__(self) if hasattr(found, "__get__") else found


class Call(nn.Module):
    """A function of a model and tensors, as a module."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.function(self.model, **inputs)


class System:
    """One class of models."""

    cls: ClassVar[str]  # module:name
    image: ClassVar[str] = "image"  # what its `generate` calls the pixels
    needed: ClassVar[tuple[str, ...]] = ()  # parts beside vision, prefill and decode
    kept: ClassVar[tuple[str, ...]] = ()  # attributes of the model that its `generate` reads

    def load(self) -> type:
        module, _, name = self.cls.partition(":")
        if module == "transformers":
            allow_torchvision()
            require("transformers")
        return getattr(import_module(module), name)

    def images(self, image: Tensor) -> Tensor:
        """Pixels as `generate` takes them, as images [N, 3, R, R]."""
        return image.flatten(0, -4)

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        """The graphs; image [BATCH, 3, R, R], the sample."""
        raise NotImplementedError

    def settings(self, model: Any) -> dict[str, Any]:
        """What else of the model `standin` needs, for a JSON file."""
        raise NotImplementedError

    def read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from a file, with configurations made objects again."""
        made = dict(settings)
        if "config" in made:
            made["config"] = self.load().config_class.from_dict(dict(made["config"]))  # type: ignore[attr-defined]
        if "language" in made:
            made["language"] = _languages().configs(made["language"])
        return made

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the class's `generate` finds in the place of the model's attributes."""
        raise NotImplementedError


def language_parts(model: Any, width: int) -> dict[str, Part]:
    return (graphs.seq2seq if model.config.is_encoder_decoder else graphs.causal)(model, width)


def language(sessions: Sessions, configs: Mapping[str, Any]) -> Any:
    languages = _languages()
    kind = languages.Seq2SeqLanguage if configs["config"].is_encoder_decoder else languages.CausalLanguage
    return kind(sessions, **configs)


def _languages() -> Any:
    """What stands on transformers, which BLIP of `mmfuse.models` does without."""
    allow_torchvision()
    require("transformers")
    return import_module("mmfuse.export.generation.language")


def described(model: Any) -> dict[str, Any]:
    """Of a language model, what `language` needs besides its graphs."""
    return {"config": model.config.to_dict(), "generation_config": model.generation_config.to_dict()}


def _part(model: nn.Module, function: Callable[..., Tensor], output: str, **inputs: Tensor) -> Part:
    """Of `function(model, **inputs)`, whose batch is free, and the length of texts."""
    free = {name: {0: "batch"} | ({1: "text"} if t.dtype == torch.int64 else {}) for name, t in inputs.items()}
    return Part(Call(model, function), inputs, [output], free)


def _text() -> dict[str, Tensor]:
    """A sample of an instruction for the queries."""
    ids, mask = torch.ones(BATCH, TEXT, dtype=torch.long), torch.ones(BATCH, TEXT, dtype=torch.long)
    return {"qformer_ids": ids, "qformer_mask": mask}


# --- transformers ----------------------------------------------------------------------------------------------------


def _found(states: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def _hf_vision_part(model: Any, image: Tensor) -> Part:
    def vision(m: Any, pixel_values: Tensor) -> Tensor:
        return m.vision_model(pixel_values=pixel_values, return_dict=True).last_hidden_state

    return _part(model, vision, "states", pixel_values=image)


def _hf_vision(sessions: Sessions) -> Callable[..., Any]:
    def vision(pixel_values: Tensor, interpolate_pos_encoding: bool = False, **_: Any) -> Any:
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding is True, expected False: the graph has one size's positions")
        return _found(*sessions.run("vision", sessions.pixels(pixel_values)))

    return vision


class HfBlip2(System):
    cls, image = "transformers:Blip2ForConditionalGeneration", "pixel_values"
    needed = ("qformer", "projection")

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        vision = _hf_vision_part(model, image)
        states = vision.sample()
        qformer = self.qformer(model, states)
        query = qformer.sample().to(states.dtype)
        projection = _part(model, lambda m, query: m.language_projection(query), "images", query=query)
        width = projection.sample().shape[-1]
        return {"vision": vision, "qformer": qformer, "projection": projection} | language_parts(
            model.language_model, width
        )

    def qformer(self, model: Any, states: Tensor) -> Part:
        def query(m: Any, states: Tensor) -> Tensor:
            found = m.qformer(
                query_embeds=m.query_tokens.expand(states.shape[0], -1, -1),
                encoder_hidden_states=states,
                return_dict=True,
            )
            return found.last_hidden_state.to(states.dtype)

        return _part(model, query, "query", states=states)

    def settings(self, model: Any) -> dict[str, Any]:
        return {"config": model.config.to_dict(), "language": described(model.language_model)}

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        llm = language(sessions, settings["language"])
        return {
            "config": settings["config"],
            "query_tokens": torch.empty(1, 1, 1),
            "vision_model": _hf_vision(sessions),
            "qformer": lambda encoder_hidden_states, **_: _found(*sessions.run("qformer", encoder_hidden_states)),
            "language_projection": lambda query: llm.number(*sessions.run("projection", query)),
            "language_model": llm,
            "get_input_embeddings": llm.get_input_embeddings,
        }


class HfInstructBlip(HfBlip2):
    cls = "transformers:InstructBlipForConditionalGeneration"

    def qformer(self, model: Any, states: Tensor) -> Part:
        def query(m: Any, states: Tensor, qformer_ids: Tensor, qformer_mask: Tensor) -> Tensor:
            tokens = m.query_tokens.expand(states.shape[0], -1, -1)
            found = m.qformer(
                input_ids=qformer_ids,
                attention_mask=torch.cat([qformer_mask.new_ones(tokens.shape[:2]), qformer_mask], dim=1),
                query_embeds=tokens,
                encoder_hidden_states=states,
                return_dict=True,
            )
            return found.last_hidden_state[:, : tokens.shape[1]].to(states.dtype)

        return _part(model, query, "query", states=states, **_text())

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        parts = super().standin(sessions, settings)

        def get_image_features(
            pixel_values: Tensor,
            qformer_input_ids: Tensor,
            qformer_attention_mask: Tensor | None = None,
            interpolate_pos_encoding: bool = False,
            **_: Any,
        ) -> Any:
            states = parts["vision_model"](pixel_values, interpolate_pos_encoding).last_hidden_state
            mask = torch.ones_like(qformer_input_ids) if qformer_attention_mask is None else qformer_attention_mask
            query = sessions.run("qformer", states, qformer_input_ids, mask)
            return SimpleNamespace(pooler_output=parts["language_projection"](*query))

        return parts | {"get_image_features": get_image_features}


class HfBlip(System):
    cls, image = "transformers:BlipForConditionalGeneration", "pixel_values"

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        vision = _hf_vision_part(model, image)
        return {"vision": vision} | graphs.blip(model.text_decoder, vision.sample())

    def settings(self, model: Any) -> dict[str, Any]:
        return {
            "config": model.config.to_dict(),
            "decoder_input_ids": model.decoder_input_ids,
            "language": described(model.text_decoder),
        }

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "config": settings["config"],
            "decoder_input_ids": settings["decoder_input_ids"],
            "vision_model": _hf_vision(sessions),
            "text_decoder": _languages().CaptionLanguage(sessions, **settings["language"]),
        }


# --- mmfuse: BLIP-2 and what stands on it ----------------------------------------------------------------------------


class Blip2(System):
    """An image encoder, a Q-Former, a projection and a language model, by the names of the last two."""

    needed = ("projection",)
    projection: ClassVar[str]
    llm: ClassVar[str]

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        vision = _part(model, lambda m, image: m.encode_image(image), "states", image=image)
        found = {"vision": vision}
        states = vision.sample()
        if hasattr(model, "Qformer"):
            found["qformer"] = self.qformer(model, states)
            states = found["qformer"].sample()
        found["projection"] = _part(model, self.project(model), "images", query=states)
        return found | language_parts(getattr(model, self.llm), found["projection"].sample().shape[-1])

    def qformer(self, model: Any, states: Tensor) -> Part:
        def query(m: Any, states: Tensor) -> Tensor:
            (query,) = m.bert(m.query_tokens, kv=m.bert.project(states))
            return query

        return _part(model, query, "query", states=states)

    def project(self, model: Any) -> Callable[..., Tensor]:
        return lambda m, query: getattr(m, self.projection)(query)

    def settings(self, model: Any) -> dict[str, Any]:
        own = {name: getattr(model, name) for name in self.kept}
        return own | {"language": described(getattr(model, self.llm))}

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        llm = language(sessions, settings["language"])
        return {
            **{name: settings[name] for name in self.kept},
            "query": lambda image: _query(sessions, image),
            self.projection: lambda query: llm.number(*sessions.run("projection", query)),
            self.llm: llm,
        }


def _query(sessions: Sessions, image: Tensor, *text: Tensor) -> Tensor:
    """What the projection reads of images [B, 3, R, R]."""
    (states,) = sessions.run("vision", sessions.pixels(image))
    return sessions.run("qformer", states, *text)[0] if "qformer" in sessions.sessions else states


class OPT(Blip2):
    cls, projection, llm = "mmfuse.models.blip2:OPT", "opt_proj", "opt_model"
    kept = ("pad", "prompt_length")


class T5(Blip2):
    cls, projection, llm = "mmfuse.models.blip2:T5", "t5_proj", "t5_model"


class InstructedT5(Blip2):
    cls, projection, llm = "mmfuse.models.instructblip:T5", "t5_proj", "t5_model"

    def images(self, image: Tensor) -> Tensor:
        """A video [B, 3, F, R, R] frame by frame."""
        return image.transpose(1, 2).flatten(0, 1) if image.dim() == 5 else image

    def qformer(self, model: Any, states: Tensor) -> Part:
        if not model.bert.config.text:
            return super().qformer(model, states)

        def query(m: Any, states: Tensor, qformer_ids: Tensor, qformer_mask: Tensor) -> Tensor:
            kv, kept = m.bert.project(states), qformer_mask.sum(1)
            (query,) = m.bert(m.query_tokens, [qformer_ids], [kept], kv=kv, query_only=True)
            return query

        return _part(model, query, "query", states=states, **_text())

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        parts = super().standin(sessions, settings)

        def image_prompt(image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            frames = image.shape[2] if image.dim() == 5 else 1
            reads_text = len(sessions.inputs["qformer"]) > 1
            text = [t.repeat_interleave(frames, 0) for t in (ids, mask)] if reads_text else []
            query = _query(sessions, self.images(image), *text)
            return parts[self.projection](query).unflatten(0, (-1, frames)).flatten(1, 2)

        return parts | {"image_prompt": image_prompt}


class InstructedVicuna(InstructedT5):
    cls, projection, llm = "mmfuse.models.instructblip:Vicuna", "llm_proj", "llm_model"
    kept = ("pad", "eos")


class MiniGPT4(Blip2):
    cls, projection, llm = "mmfuse.models.minigpt4:MiniGPT4", "llama_proj", "llama_model"
    kept = ("tokens", "template")

    def project(self, model: Any) -> Callable[..., Tensor]:
        if hasattr(model, "Qformer"):
            return super().project(model)
        # of the image encoder's tokens, as `MiniGPT4.image_tokens` joins them
        return lambda m, query: m.llama_proj(query[:, 1:].unflatten(1, (-1, 4)).flatten(2))

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        return super().standin(sessions, settings) | {"image_tokens": lambda image: _query(sessions, image)}


# --- mmfuse: BLIP ----------------------------------------------------------------------------------------------------


class MedStandIn:
    """In the place of BLIP's text decoder for one call of `generate`: `CaptionDecoder` steps it."""

    def __init__(self, sessions: Sessions):
        self.run = sessions.run
        self.bert = SimpleNamespace(context=self.context)
        self.cls = SimpleNamespace(predictions=SimpleNamespace(decoder=lambda logits: logits))

    def context(self, states: Tensor, mask: None = None) -> Context:
        self.seen: Sequence[Tensor] = self.run("prefill", states)
        return Context(tuple(pairs(self.seen)))

    def hidden(self, ids: Tensor, mask: Tensor, context: Context, past: list[Any]) -> Tensor:
        """Logits [rows, 1, V], as the head's product is in the graph."""
        self.seen = repeated(self.seen, len(ids))
        logits, *present = self.run("decode", ids, *flat(past), *self.seen)
        past[:] = pairs(present)
        return logits[:, None]


class Captioner(System):
    cls = "mmfuse.models.blip:Captioner"
    kept: ClassVar[tuple[str, ...]] = ("tokens", "prompt_ids")

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        vision = self.vision(model, image)
        return {"vision": vision} | graphs.med(model.text_decoder, vision.sample())

    def vision(self, model: Any, image: Tensor) -> Part:
        return _part(model, lambda m, image: m.visual_encoder(image), "states", image=image)

    def settings(self, model: Any) -> dict[str, Any]:
        return {name: getattr(model, name) for name in self.kept}

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **{name: settings[name] for name in self.kept},
            "visual_encoder": lambda image: sessions.run("vision", sessions.pixels(image))[0],
            "text_decoder": MedStandIn(sessions),
        }


class BlipPretraining(Captioner):
    cls = "mmfuse.models.blip:Pretraining"


class VQA(Captioner):
    cls = "mmfuse.models.blip:VQA"
    kept = ("tokens",)
    needed = ("question",)

    def parts(self, model: Any, image: Tensor) -> dict[str, Part]:
        vision, text = self.vision(model, image), torch.ones(BATCH, TEXT, dtype=torch.long)

        def question(m: Any, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return m.text_encoder(ids, mask, m.text_encoder.context(states))

        asked = _part(model, question, "fused", states=vision.sample(), ids=text, mask=text)
        return {"vision": vision, "question": asked} | graphs.med(model.text_decoder, asked.sample())

    def standin(self, sessions: Sessions, settings: Mapping[str, Any]) -> dict[str, Any]:
        class Encoder:
            def context(self, states: Tensor) -> Tensor:
                return states

            def __call__(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
                return sessions.run("question", states, ids, mask)[0]

        return super().standin(sessions, settings) | {"text_encoder": Encoder()}


SYSTEMS: dict[str, System] = {
    system.cls: system
    for system in (
        HfBlip(),
        HfBlip2(),
        HfInstructBlip(),
        Captioner(),
        BlipPretraining(),
        VQA(),
        OPT(),
        T5(),
        InstructedT5(),
        InstructedVicuna(),
        MiniGPT4(),
    )
}
