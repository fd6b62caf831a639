"""BLIP-2: the first stage, in which the Q-Former learns to see, and the second, before a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.fused.pretraining import Features, QFormerPretraining
from mmfuse.fused.qformer import CAPTION, ImageQueries, QFormerConfig
from mmfuse.models.blip2.language import nucleus
from mmfuse.models.blip2.vit import ClipViT, EvaViT


class Vision(ImageQueries):
    """What all of BLIP-2's descendants share: an image encoder, its LayerNorm, queries, and a Q-Former.

    Args:
        qformer: None for no Q-Former (MiniGPT-4 without one).
    """

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig | None,
        queries: int,
        freeze_vit: bool = True,
        eps: float = 1e-5,
        **more: Any,
    ):
        if qformer is None:
            nn.Module.__init__(self)
            self.ln_vision = nn.LayerNorm(visual_encoder.num_features, eps=eps)
        else:
            super().__init__(qformer, queries, eps=eps, **more)
        self.image_resolution = visual_encoder.image_resolution
        self.visual_encoder = visual_encoder.requires_grad_(not freeze_vit)

    def encode_image(self, image: Tensor) -> Tensor:
        """All tokens [B, N, width], normalised, of images [B, 3, R, R]."""
        return self.ln_vision(self.visual_encoder(image))

    def query(self, image: Tensor) -> Tensor:
        """What the queries find in images [B, 3, R, R], without a text: [B, Q, hidden]."""
        (query,) = self.bert(self.query_tokens, kv=self.see(self.visual_encoder(image), once=True))
        return query

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint, whose positions may be of another resolution."""
        state = dict(state_dict)
        for key in ("visual_encoder.pos_embed", "visual_encoder.positional_embedding"):
            if key in state:
                state[key] = self.visual_encoder.resized(state[key])
        return state


# --- the first stage ------------------------------------------------------------------------------------------------


class Pretraining(Vision, QFormerPretraining):
    """The first stage (section 3.2) with its image encoder: forward(image [B, 3, R, R], ids, mask)."""

    def features(self, image: Tensor, ids: Tensor, mask: Tensor) -> Features:
        return super().features(self.visual_encoder(image), ids, mask)

    @torch.no_grad()
    def generate(self, image: Tensor, max_length: int = 30, min_length: int = 10, top_p: float | None = None) -> Tensor:
        """Captions [B, at most max_length] from [DEC] to [SEP] and padding: the likeliest word, or one of the nucleus.

        top_p: draw from the fewest words that have this probability together (Holtzman et al. 2020). Before
        `min_length` tokens there is no [SEP].
        """
        kv = self.see(self.visual_encoder(image))
        ids = torch.full((len(image), 1), self.tokens["bos_DEC"], device=image.device)
        ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        while ids.shape[1] < max_length and not ended.all():
            _, caption = self.bert(self.query_tokens, [ids], sees=CAPTION, kv=kv)
            logits = self.caption_logits(caption[:, -1])
            if ids.shape[1] < min_length:
                logits[:, self.tokens["sep"]] = -torch.inf
            word = logits.argmax(1) if top_p is None else nucleus(logits, top_p)
            word = word.masked_fill(ended, self.tokens["pad"])
            ids, ended = torch.cat([ids, word[:, None]], dim=1), ended | (word == self.tokens["sep"])
        return ids


# --- the second stage -----------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What a language model is given."""

    embeds: Tensor  # [B, L, width]
    mask: Tensor  # [B, L], 1 = seen
    labels: Tensor  # [B, L], -100 = does not count; of T5 those of the decoder


class Answer(NamedTuple):
    loss: Tensor
    logits: Tensor  # [B, L, vocabulary]


class OPT(Vision):
    """The queries' states before the words of a frozen OPT (section 3.3).

    Args:
        prompt_length: leading tokens of each text, bos included, that are not learned.
    """

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig,
        queries: int,
        opt_model: nn.Module,
        pad: int,
        prompt_length: int = 0,
        freeze_vit: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__(visual_encoder, qformer, queries, freeze_vit, eps=eps)
        self.pad, self.prompt_length = pad, prompt_length
        self.opt_model: Any = opt_model.requires_grad_(False)
        self.embed_dim = self.opt_model.config.word_embed_proj_dim
        self.opt_proj = nn.Linear(qformer.hidden_size, self.embed_dim)

    def prompt(self, image: Tensor, ids: Tensor, mask: Tensor) -> Prompt:
        """Images [B, 3, R, R] before texts, ids and mask [B, T]."""
        image_embeds = self.opt_proj(self.query(image))
        seen = mask.new_ones(image_embeds.shape[:2])
        targets = ids.masked_fill(ids == self.pad, -100)
        targets = torch.cat(
            [torch.full_like(targets[:, : self.prompt_length], -100), targets[:, self.prompt_length :]], 1
        )
        words = self.opt_model.get_input_embeddings()(ids)
        return Prompt(
            torch.cat([image_embeds, words], dim=1),
            torch.cat([seen, mask], dim=1),
            torch.cat([torch.full_like(seen, -100), targets], dim=1),
        )

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Answer:
        """The language model's loss on captions: ids and mask [B, T], bos first, padded on the right."""
        given = self.prompt(image, ids, mask)
        found = self.opt_model(inputs_embeds=given.embeds, attention_mask=given.mask, labels=given.labels)
        return Answer(found.loss, found.logits)

    @torch.no_grad()
    def generate(self, image: Tensor, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
        """New tokens after prompts [B, T], padded on the left; `how` is transformers' `generate`'s."""
        given = self.prompt(image, ids, mask)
        return self.opt_model.generate(inputs_embeds=given.embeds, attention_mask=given.mask, **how)


class T5(Vision):
    """The queries' states before the words of the encoder of a frozen Flan-T5 (section 3.3)."""

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig,
        queries: int,
        t5_model: nn.Module,
        freeze_vit: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__(visual_encoder, qformer, queries, freeze_vit, eps=eps)
        self.t5_model: Any = t5_model.requires_grad_(False)
        self.embed_dim = self.t5_model.config.d_model
        self.t5_proj = nn.Linear(qformer.hidden_size, self.embed_dim)

    def image_prompt(self, image: Tensor) -> Tensor:
        """[B, Q, d_model]."""
        return self.t5_proj(self.query(image))

    def prompt(self, image_prompt: Tensor, ids: Tensor, mask: Tensor, output_ids: Tensor) -> Prompt:
        """Of the encoder, and the decoder's labels."""
        words = self.t5_model.get_input_embeddings()(ids)
        seen = mask.new_ones(image_prompt.shape[:2])
        labels = output_ids.masked_fill(output_ids == self.t5_model.config.pad_token_id, -100)
        return Prompt(torch.cat([image_prompt, words], dim=1), torch.cat([seen, mask], dim=1), labels)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, output_ids: Tensor, output_mask: Tensor) -> Answer:
        """The loss of the decoder's texts (`output_ids`) given images and the encoder's texts, [B, T] each."""
        given = self.prompt(self.image_prompt(image), ids, mask, output_ids)
        return self.answer(given, output_mask)

    def answer(self, given: Prompt, output_mask: Tensor) -> Answer:
        found = self.t5_model(
            inputs_embeds=given.embeds,
            attention_mask=given.mask,
            decoder_attention_mask=output_mask,
            labels=given.labels,
        )
        return Answer(found.loss, found.logits)

    @torch.no_grad()
    def generate(self, image: Tensor, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
        """The decoder's tokens for prompts [B, T]; `how` is transformers' `generate`'s."""
        given = self.prompt(self.image_prompt(image), ids, mask, ids)
        return self.t5_model.generate(inputs_embeds=given.embeds, attention_mask=given.mask, **how)
