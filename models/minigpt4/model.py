"""MiniGPT-4 and MiniGPT-v2: one linear layer between an image encoder and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.fused.qformer import QFormerConfig
from mmfuse.models.blip2 import Answer, Prompt, Vision
from mmfuse.models.blip2.language import in_order, without_frequencies
from mmfuse.models.blip2.vit import ClipViT, EvaViT

# what a text has in the place of a token id
IMAGE, PADDING = -1, -2


class Turns(NamedTuple):
    """A conversation as a prompt and what is learned of the rest."""

    prompt_ids: Tensor  # [B, L], the first question
    ids: Tensor  # [B, L], the answers, and between them the questions
    labels: Tensor  # [B, L], the answers alone, -100 elsewhere


class Places(NamedTuple):
    """What is where, [B, S] each, in texts whose images have become rows of their own."""

    token: Tensor  # its place in the text
    real: Tensor  # whether it is no padding
    of_image: Tensor  # whether it is a row of an image
    nth: Tensor  # of which of the text's images
    within: Tensor  # and which of its rows


def places(ids: Tensor, queries: int) -> Places:
    """Of texts [B, L] in which each `IMAGE` becomes `queries` rows."""
    counts = torch.where(ids == IMAGE, queries, (ids != PADDING).long())
    ends = counts.cumsum(1)
    at = torch.arange(int(ends[:, -1].max()), device=ids.device).expand(len(ids), -1).contiguous()
    real = at < ends[:, -1:]
    token = torch.searchsorted(ends, at, right=True).clamp(max=ids.shape[1] - 1)
    of_image = real & (ids.gather(1, token) == IMAGE)
    nth = ((ids == IMAGE).cumsum(1) - 1).gather(1, token).clamp(min=0)
    within = (at - (ends - counts).gather(1, token)).clamp(0, queries - 1)
    return Places(token, real, of_image, nth, within)


class MiniGPT4(Vision):
    """Texts are token ids [B, L], in which `IMAGE` stands for an image and `PADDING`, on the right, for nothing.

    Args:
        qformer: None for four neighbouring patches as one token, the connector of MiniGPT-v2.
        llm: a Llama, with LoRA or frozen.
        tokens: "pad" and "bos", ids.
        end: ids after an answer.
        template: ids before and after a question.
        chat_template: whether `forward` puts the prompt into the template.
        max_txt_len: tokens of an answer at most.
        max_context_len: rows of a prompt that is learned from, images' among them, at most; what is behind is cut off.
    """

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig | None,
        queries: int,
        llm: nn.Module,
        tokens: Mapping[str, int],
        end: Sequence[int] = (),
        template: tuple[Sequence[int], Sequence[int]] = ((), ()),
        chat_template: bool = False,
        max_txt_len: int = 160,
        freeze_vit: bool = True,
        freeze_qformer: bool = True,
        max_context_len: int = 3800,
    ):
        super().__init__(visual_encoder, qformer, queries, freeze_vit)
        self.ln_vision.requires_grad_(not freeze_vit)
        self.tokens, self.end, self.template = tokens, end, template
        self.chat_template, self.max_txt_len, self.max_context_len = chat_template, max_txt_len, max_context_len
        if qformer is None:
            width = 4 * visual_encoder.num_features
        else:
            width = qformer.hidden_size
            for part in (self.Qformer, self.query_tokens):
                part.requires_grad_(not freeze_qformer)
        self.llama_model: Any = llm
        self.embed_dim = self.llama_model.config.hidden_size
        self.llama_proj = nn.Linear(width, self.embed_dim)

    def image_tokens(self, image: Tensor) -> Tensor:
        """What the projection reads of images [I, 3, R, R]: [I, Q, width]."""
        if hasattr(self, "Qformer"):
            return self.query(image)
        return self.encode_image(image)[:, 1:].unflatten(1, (-1, 4)).flatten(2)

    def image_prompt(self, image: Tensor) -> Tensor:
        """Of images [B, 3, R, R], or several each [B, n, 3, R, R], for the language model: [B, n, Q, embed_dim]."""
        image = image if image.dim() == 5 else image[:, None]
        return self.llama_proj(self.image_tokens(image.flatten(0, 1))).unflatten(0, image.shape[:2])

    def wrap(self, ids: Tensor, image_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [B, S, embed_dim], mask [B, S]) of texts with images in them, the padding's embedding behind.

        The i-th `IMAGE` of a row is image i of image_prompt [B, n, Q, embed_dim].
        """
        at = places(ids, image_prompt.shape[2])
        words = self.embed(ids.gather(1, at.token).where(at.real & ~at.of_image, PADDING))
        row = torch.arange(len(ids), device=ids.device)[:, None]
        embeds = torch.where(at.of_image[..., None], image_prompt[row, at.nth, at.within], words)
        return embeds, at.real.long()

    def embed(self, ids: Tensor) -> Tensor:
        return self.llama_model.get_input_embeddings()(ids.where(ids != PADDING, self.tokens["pad"]))

    def question(self, ids: Tensor) -> Tensor:
        """In the template."""
        before, after = self.template
        return joined(_constant(before, ids), ids, _constant(after, ids))

    def answer(self, ids: Tensor) -> Tensor:
        """With the end behind it, where there is an answer."""
        return joined(ids, _constant(self.end, ids))

    def conversation(self, questions: Tensor, answers: Tensor) -> Turns:
        """Of turns [B, turns, L] each; a turn that is all padding is none."""
        ids, labels = [], []
        for turn, (question, answer) in enumerate(zip(questions.unbind(1), answers.unbind(1), strict=True)):
            there = (question != PADDING).any(1, keepdim=True)
            if turn:
                asked = self.question(joined(question)).where(there, PADDING)
                asked = torch.cat([_constant([self.tokens["bos"]], asked).where(there, PADDING), asked], dim=1)
                ids.append(asked)
                labels.append(torch.full_like(asked, -100))
            ids.append(self.answer(answer).where(there, PADDING))
            labels.append(ids[-1])
        rank = (torch.cat(ids, dim=1) == PADDING).long()
        all_ids, all_labels = (in_order(torch.cat(t, dim=1), rank)[:, : self._longest(rank)] for t in (ids, labels))
        return Turns(self.question(questions[:, 0]), all_ids, self.targets(all_labels))

    def _longest(self, rank: Tensor) -> int:
        return min(int((1 - rank).sum(1).max()), self.max_txt_len)

    def targets(self, ids: Tensor) -> Tensor:
        return ids.masked_fill((ids == PADDING) | (ids == self.tokens["pad"]), -100)

    def prompt(self, image: Tensor, prompt_ids: Tensor, ids: Tensor, labels: Tensor) -> Prompt:
        """Bos, the prompt, what is learned with its padding, and the prompt's padding."""
        embeds, mask = (t[:, : self.max_context_len] for t in self.wrap(prompt_ids, self.image_prompt(image)))
        bos = _constant([self.tokens["bos"]], ids)
        rank = torch.cat([torch.zeros_like(bos), 2 * (1 - mask), torch.ones_like(ids)], dim=1)
        ignored = labels.new_full((len(ids), 1 + mask.shape[1]), -100)
        return Prompt(
            in_order(torch.cat([self.embed(bos), embeds, self.embed(ids)], dim=1), rank),
            in_order(torch.cat([torch.ones_like(bos), mask, (ids != PADDING).long()], dim=1), rank),
            in_order(torch.cat([ignored, labels], dim=1), rank),
        )

    def forward(self, image: Tensor, prompt_ids: Tensor, ids: Tensor, labels: Tensor | None = None) -> Answer:
        """The loss of answers [B, L] to prompts [B, L] about images [B, 3, R, R] or [B, n, 3, R, R].

        The answers' end is added. With labels [B, L], as `conversation` gives them, ids are taken as they are.
        """
        if labels is None:
            prompt_ids = self.question(prompt_ids) if self.chat_template else prompt_ids
            ids = self.answer(ids)[:, : self.max_txt_len]
            labels = self.targets(ids)
        given = self.prompt(image, prompt_ids, ids, labels)
        found = self.llama_model(inputs_embeds=given.embeds, attention_mask=given.mask, labels=given.labels)
        return Answer(found.loss, found.logits)

    def context(self, image: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [B, S, embed_dim], mask [B, S]) of bos and prompts, zeros to their left."""
        ids = torch.cat([_constant([self.tokens["bos"]], prompt_ids), prompt_ids], dim=1)
        embeds, mask = self.wrap(ids, self.image_prompt(image))
        return in_order(embeds * mask[..., None], mask), in_order(mask, mask)

    @torch.no_grad()
    def generate(self, image: Tensor, prompt_ids: Tensor, **how: Any) -> Tensor:
        """New tokens after prompts, which are taken as they are; `how` is transformers' `generate`'s."""
        embeds, mask = self.context(image, prompt_ids)
        return self.llama_model.generate(inputs_embeds=embeds, attention_mask=mask, **how)

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With peft's names of today in the place of those of its release 0.2."""
        own, state = self.state_dict(), {}
        for key, t in without_frequencies(super().official_state(state_dict)).items():
            key = key.replace(".lm_head.0.", ".lm_head.")
            for matrix in ("lora_A", "lora_B"):
                key = key.replace(f".{matrix}.weight", f".{matrix}.default.weight")
            wrapped = key.removesuffix("weight") + "base_layer.weight"
            state[wrapped if wrapped in own else key] = t
        return state


def joined(*parts: Tensor) -> Tensor:
    """Texts [B, L] one after another, without padding between them."""
    ids = torch.cat(parts, dim=1)
    rank = (ids == PADDING).long()
    return in_order(ids, rank)[:, : int((1 - rank).sum(1).max())]


def _constant(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).expand(len(like), -1)
