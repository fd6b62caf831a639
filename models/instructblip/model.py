"""InstructBLIP: BLIP-2 whose queries read the instruction, too, before a T5 or a Vicuna."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.fused.qformer import QFormerConfig
from mmfuse.models.blip2 import Answer, Prompt, Vision
from mmfuse.models.blip2.language import in_order, without_frequencies
from mmfuse.models.blip2.vit import ClipViT, EvaViT


class Instructed(Vision):
    """What both have in common: an image or a video, seen with an instruction, before a language model's words."""

    proj: str  # the name of the projection into the language model

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig,
        queries: int,
        llm: nn.Module,
        width: int,
        freeze_vit: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__(visual_encoder, qformer, queries, freeze_vit, eps=eps)
        self.embed_dim = width
        setattr(self, f"{self.proj}_model", llm.requires_grad_(False))
        setattr(self, f"{self.proj}_proj", nn.Linear(qformer.hidden_size, width))

    @property
    def language(self) -> Any:
        return getattr(self, f"{self.proj}_model")

    def image_prompt(self, image: Tensor, qformer_ids: Tensor, qformer_mask: Tensor) -> Tensor:
        """What the queries find, for the language model: [B, Q, width].

        image [B, 3, R, R], or a video [B, 3, F, R, R], of which each frame is seen alone: [B, F Q, width].
        qformer_ids, qformer_mask [B, T]: the instruction, padded on the right.
        """
        frames = image.shape[2] if image.dim() == 5 else 1
        if image.dim() == 5:
            image = image.transpose(1, 2).flatten(0, 1)
        kv = self.see(self.visual_encoder(image), once=True)
        texts, kept = [], []
        if self.bert.config.text:
            texts, kept = [qformer_ids.repeat_interleave(frames, 0)], [qformer_mask.sum(1).repeat_interleave(frames)]
        (query,) = self.bert(self.query_tokens, texts, kept, kv=kv, query_only=True)
        return getattr(self, f"{self.proj}_proj")(query).unflatten(0, (-1, frames)).flatten(1, 2)

    def with_words(self, image_prompt: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [B, L, width], mask [B, L]) of images before words."""
        words = self.language.get_input_embeddings()(ids)
        seen = mask.new_ones(image_prompt.shape[:2])
        return torch.cat([image_prompt, words], dim=1), torch.cat([seen, mask], dim=1)

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return without_frequencies(super().official_state(state_dict))


class T5(Instructed):
    """Before the encoder of a frozen Flan-T5."""

    proj = "t5"

    def prompt(self, image_prompt: Tensor, ids: Tensor, mask: Tensor, output_ids: Tensor) -> Prompt:
        """Of the encoder, and the decoder's labels."""
        pad = self.language.config.pad_token_id
        return Prompt(*self.with_words(image_prompt, ids, mask), output_ids.masked_fill(output_ids == pad, -100))

    def forward(
        self,
        image: Tensor,
        qformer_ids: Tensor,
        qformer_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        output_ids: Tensor,
        output_mask: Tensor,
    ) -> Answer:
        """The loss of answers (`output_ids`) to instructions, which both tokenizers have: texts [B, T] and masks."""
        given = self.prompt(self.image_prompt(image, qformer_ids, qformer_mask), ids, mask, output_ids)
        found = self.language(
            inputs_embeds=given.embeds,
            attention_mask=given.mask,
            decoder_attention_mask=output_mask,
            labels=given.labels,
        )
        return Answer(found.loss, found.logits)

    @torch.no_grad()
    def generate(
        self, image: Tensor, qformer_ids: Tensor, qformer_mask: Tensor, ids: Tensor, mask: Tensor, **how: Any
    ) -> Tensor:
        """The decoder's tokens, its start first; `how` is transformers' `generate`'s."""
        embeds, mask = self.with_words(self.image_prompt(image, qformer_ids, qformer_mask), ids, mask)
        return self.language.generate(inputs_embeds=embeds, attention_mask=mask, **how)


class Vicuna(Instructed):
    """Before the words of a frozen Vicuna.

    Args:
        pad: the id that was added to the vocabulary for padding. Bos and eos are both `eos`.
    """

    proj = "llm"

    def __init__(self, *args: Any, pad: int, eos: int = 2, **more: Any):
        super().__init__(*args, **more)
        self.pad, self.eos = pad, eos

    def words(self, ids: Tensor, mask: Tensor, output_ids: Tensor, output_mask: Tensor) -> tuple[Tensor, ...]:
        """(ids, mask, labels) of the instruction, the answer without its bos, and then the instruction's padding."""
        rank = torch.cat([2 * (1 - mask), torch.ones_like(output_mask[:, 1:])], dim=1)
        tokens = torch.cat([ids, output_ids[:, 1:]], dim=1)
        labels = tokens.masked_fill((rank != 1) | (tokens == self.pad), -100)
        seen = torch.cat([mask, output_mask[:, 1:]], dim=1)
        return in_order(tokens, rank), in_order(seen, rank), in_order(labels, rank)

    def prompt(
        self, image_prompt: Tensor, ids: Tensor, mask: Tensor, output_ids: Tensor, output_mask: Tensor
    ) -> Prompt:
        ids, mask, labels = self.words(ids, mask, output_ids, output_mask)
        embeds, seen = self.with_words(image_prompt, ids, mask)
        ignored = labels.new_full(image_prompt.shape[:2], -100)
        return Prompt(embeds, seen, torch.cat([ignored, labels], dim=1))

    def forward(
        self,
        image: Tensor,
        qformer_ids: Tensor,
        qformer_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        output_ids: Tensor,
        output_mask: Tensor,
    ) -> Answer:
        """The loss of answers (`output_ids`, bos first) to instructions, which both tokenizers have: [B, T] and masks.

        All are padded on the right.
        """
        prompt = self.image_prompt(image, qformer_ids, qformer_mask)
        given = self.prompt(prompt, ids, mask, output_ids, output_mask)
        found = self.language(inputs_embeds=given.embeds, attention_mask=given.mask, labels=given.labels)
        return Answer(found.loss, found.logits)

    @torch.no_grad()
    def generate(
        self, image: Tensor, qformer_ids: Tensor, qformer_mask: Tensor, ids: Tensor, mask: Tensor, **how: Any
    ) -> Tensor:
        """New tokens after instructions, padded on the right; `how` is transformers' `generate`'s."""
        ids, mask = in_order(ids, mask), in_order(mask, mask)  # padding to the left, behind the image
        embeds, mask = self.with_words(self.image_prompt(image, qformer_ids, qformer_mask), ids, mask)
        how = {"eos_token_id": self.eos, "pad_token_id": self.eos} | how
        new = self.language.generate(inputs_embeds=embeds, attention_mask=mask, **how)
        return new.where(new != 0, self.eos)  # an unknown word ends an answer
