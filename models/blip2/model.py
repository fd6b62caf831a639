"""BLIP-2: the first stage, in which the Q-Former learns to see, and the second, before a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import MaxQueryITC, linear_cross_entropy
from mmfuse.fused.gather import gather_rows, gather_rows_with_grad
from mmfuse.fused.qformer import CAPTION, CONTRAST_AND_CAPTION, QFormer, QFormerConfig, QFormerKV
from mmfuse.kernels import max_query_similarity
from mmfuse.models.bert import Predictions
from mmfuse.models.blip2.language import nucleus
from mmfuse.models.blip2.vit import ClipViT, EvaViT


class Vision(nn.Module):
    """What all of BLIP-2's descendants share: an image encoder, its LayerNorm, queries, and a Q-Former.

    Args:
        qformer: None for no Q-Former (MiniGPT-4 without one).
        predictions: with the Q-Former's language head.
        eps: of the LayerNorm; transformers takes the image encoder's 1e-6.
    """

    query_tokens: Tensor

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig | None,
        queries: int,
        freeze_vit: bool = True,
        predictions: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.image_resolution = visual_encoder.image_resolution
        self.visual_encoder = visual_encoder.requires_grad_(not freeze_vit)
        self.ln_vision = nn.LayerNorm(visual_encoder.num_features, eps=eps)
        if qformer is None:
            return
        self.Qformer = nn.Module()
        self.Qformer.bert = QFormer(qformer)
        if predictions:
            self.Qformer.cls = nn.Module()
            self.Qformer.cls.predictions = Predictions(qformer, self.bert.embeddings.word_embeddings)
            self.bert._initialize(self.predictions.transform.dense)
        self.query_tokens = nn.Parameter(torch.randn(1, queries, qformer.hidden_size) * qformer.initializer_range)

    @property
    def bert(self) -> QFormer:
        return self.Qformer.bert  # type: ignore[return-value]

    @property
    def predictions(self) -> Predictions:
        return self.Qformer.cls.predictions  # type: ignore[return-value]

    def encode_image(self, image: Tensor) -> Tensor:
        """All tokens [B, N, width], normalised, of images [B, 3, R, R]."""
        return self.ln_vision(self.visual_encoder(image))

    def see(self, tokens: Tensor) -> QFormerKV:
        """The Q-Former's keys and values of what the image encoder gives, [B, N, width]."""
        # with a frozen encoder the norm learns as a part of the product, without a gradient for the tokens
        if torch.is_grad_enabled() and self.ln_vision.weight.requires_grad and not tokens.requires_grad:
            return self.bert.project(tokens, norm=self.ln_vision)
        return self.bert.project(self.ln_vision(tokens))

    def query(self, image: Tensor) -> Tensor:
        """What the queries find in images [B, 3, R, R], without a text: [B, Q, hidden]."""
        (query,) = self.bert(self.query_tokens, kv=self.see(self.visual_encoder(image)))
        return query

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint, whose positions may be of another resolution."""
        state = dict(state_dict)
        for key in ("visual_encoder.pos_embed", "visual_encoder.positional_embedding"):
            if key in state:
                state[key] = self.visual_encoder.resized(state[key])
        return state


# --- the first stage ------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Of a batch of pairs, all from one pass."""

    ids: Tensor  # [B, T]
    kept: Tensor  # [B], tokens of each text
    tokens: Tensor  # [B, N, width], of the image encoder
    kv: QFormerKV
    query: Tensor  # [B, Q, hidden]
    text: Tensor  # [B, T, hidden], alone
    caption: Tensor  # [B, T, hidden], after the queries, each token without those behind it
    image_feats: Tensor  # [B, Q, embed_dim], normalised
    text_feat: Tensor  # [B, embed_dim], normalised


class Losses(NamedTuple):
    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor

    @property
    def total(self) -> Tensor:
        return self.loss_itc + self.loss_itm + self.loss_lm


class Pretraining(Vision):
    """Image-text contrast (ITC), matching (ITM) and generation (ITG), section 3.2, in two passes of the Q-Former.

    A step projects the keys and values of an image once. Over several processes the features of all are compared, and
    negatives come from all; their gradients are the official ones (`MaxQueryITC`).
    """

    def __init__(
        self,
        visual_encoder: EvaViT | ClipViT,
        qformer: QFormerConfig,
        queries: int,
        embed_dim: int,
        tokens: Mapping[str, int],
        freeze_vit: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__(visual_encoder, qformer, queries, freeze_vit, predictions=True, eps=eps)
        self.embed_dim, self.tokens = embed_dim, tokens
        self.vision_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.text_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.contrast = MaxQueryITC(label_smoothing=0.1)

    def forward(
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_id: Tensor | None = None,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The losses of a training step.

        image [B, 3, R, R]; ids and mask [B, T], a row being [CLS] ... [SEP] and padding, where the mask is 0.
        image_id [B]: pairs of equal id are positives and never negatives. negatives: see `itm`; drawn by default.
        """
        f = self.features(image, ids, mask)
        loss_itc = self.contrast(f.image_feats, f.text_feat, self.temp, image_id)
        if negatives is None:
            of_text, of_image = (p.multinomial(1)[:, 0] for p in self.negative_probabilities(f, image_id))
            negatives = of_text, of_image
        loss_itm, _ = self.itm(f, negatives)
        return Losses(loss_itc, loss_itm, self.caption_loss(f))

    def features(self, image: Tensor, ids: Tensor, mask: Tensor) -> Features:
        """Of ITC and ITG, in one pass over queries, texts, and texts that are generated."""
        tokens, kept = self.visual_encoder(image), mask.sum(1)
        kv, texts = self.see(tokens), [ids, self.decoder_ids(ids)]
        query, text, caption = self.bert(self.query_tokens, texts, [kept, kept], CONTRAST_AND_CAPTION, kv)
        image_feats, text_feat = self.image_feats(query), self.text_feats(text[:, 0])
        return Features(ids, kept, tokens, kv, query, text, caption, image_feats, text_feat)

    def image_feats(self, query: Tensor) -> Tensor:
        """[B, Q, hidden] into the common space, normalised."""
        return F.normalize(self.vision_proj(query), dim=-1)

    def text_feats(self, text: Tensor) -> Tensor:
        """[..., hidden] into the common space, normalised."""
        return F.normalize(self.text_proj(text), dim=-1)

    @torch.no_grad()
    def negative_probabilities(self, f: Features, image_id: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(of an image for each text, of a text for each image), [B, N] over the N pairs of all processes."""
        rank, batch = _rank(), len(f.ids)
        images, texts = (_everywhere(t) for t in (f.image_feats, f.text_feat))
        if image_id is None:
            own = torch.arange(batch, device=f.ids.device) + rank * batch
            excluded = own[:, None] == torch.arange(len(texts), device=f.ids.device)
        else:
            excluded = image_id.view(-1, 1) == _everywhere(image_id.flatten())
        of_texts = max_query_similarity(images, f.text_feat).t(), max_query_similarity(f.image_feats, texts)
        of_text, of_image = ((s / self.temp).masked_fill(excluded, -10000.0).softmax(1) for s in of_texts)
        return of_text, of_image

    def itm(self, f: Features, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, logits [3B, 2]): the pairs, each text with its negative image, each image with its negative text.

        negatives: (an image for each text, a text for each image), int64 [B] each, of the pairs of all processes.
        """
        image_neg, text_neg = negatives
        own = torch.arange(len(f.ids), device=f.ids.device)
        kv, ids, kept = f.kv, _everywhere(f.ids), _everywhere(f.kept)
        if _world() > 1:
            # only the chosen images of other processes are projected, with this one's weights
            chosen = gather_rows_with_grad(self.ln_vision(f.tokens), None)[image_neg]
            kv = dataclasses.replace(kv, kv=torch.cat([kv.kv, self.bert.project(chosen).kv]))
            image_neg = own + len(own)
        kv = kv.at(torch.cat([own, image_neg, own]))
        logits = self.match(kv, torch.cat([f.ids, f.ids, ids[text_neg]]), torch.cat([f.kept, f.kept, kept[text_neg]]))
        labels = torch.ones_like(own).repeat(3)
        labels[len(own) :] = 0
        return F.cross_entropy(logits, labels), logits

    def match(self, kv: QFormerKV, ids: Tensor, kept: Tensor) -> Tensor:
        """ITM logits [B, 2] of images and texts [B, T] with `kept` [B] tokens; column 1 is "they match"."""
        return self.itm_head(self.fuse(kv, ids, kept)).mean(1)

    def fuse(self, kv: QFormerKV, ids: Tensor, kept: Tensor) -> Tensor:
        """What the queries find in images together with texts: [B, Q, hidden]."""
        (query,) = self.bert(self.query_tokens, [ids], [kept], kv=kv, query_only=True)
        return query

    def decoder_ids(self, ids: Tensor) -> Tensor:
        """Texts that begin with [DEC] in the place of [CLS]."""
        return torch.cat([torch.full_like(ids[:, :1], self.tokens["bos_DEC"]), ids[:, 1:]], dim=1)

    def caption_labels(self, ids: Tensor) -> Tensor:
        """-100 at the padding; not shifted."""
        decoder_ids = self.decoder_ids(ids)
        return decoder_ids.masked_fill(decoder_ids == self.tokens["pad"], -100)

    def caption_loss(self, f: Features) -> Tensor:
        hidden, head = self.predictions.transform(f.caption)[:, :-1], self.predictions.decoder
        labels = self.caption_labels(f.ids)[:, 1:]
        return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, label_smoothing=0.1)

    def caption_logits(self, caption: Tensor) -> Tensor:
        """[B, T, vocabulary] of the states of captions."""
        return self.predictions.decoder(self.predictions.transform(caption))

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


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _everywhere(t: Tensor) -> Tensor:
    """The rows of all processes, without a gradient from the others'."""
    return gather_rows(t, None) if _world() > 1 else t


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
