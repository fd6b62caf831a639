"""BLIP's four uses: pre-training, retrieval, captioning and visual question answering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import HardNegativeSampler, Ranking, rerank
from mmfuse.fused.captioning import constrain, draw, keep_top_k, keep_top_p
from mmfuse.models.blip.decoding import CaptionDecoder, extend, search
from mmfuse.models.blip.med import BertConfig, BertLMHeadModel, BertModel, Context
from mmfuse.models.contrast import Features, ImageTextContrast, matched
from mmfuse.models.vit import VisionTransformer

_SMOOTHING = 0.1  # of the words that follow


class Losses(NamedTuple):
    loss_ita: Tensor
    loss_itm: Tensor
    loss_lm: Tensor | None

    @property
    def total(self) -> Tensor:
        return self.loss_ita + self.loss_itm + (0 if self.loss_lm is None else self.loss_lm)


def starting(ids: Tensor, token: int) -> Tensor:
    """ids [B, L] with `token` in place of the first."""
    return ids.index_fill(1, ids.new_zeros(1), token)


def word_loss(
    decoder: BertLMHeadModel,
    ids: Tensor,
    mask: Tensor,
    context: Context,
    pad: int,
    prompt: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy, with smoothed labels, of each word with the next one, unless that is `pad` or of the prompt."""
    labels = ids.masked_fill(ids == pad, -100)
    labels[:, :prompt] = -100
    hidden = decoder.hidden(ids, mask, context)[:, :-1]
    return decoder.loss(hidden, labels[:, 1:], reduction, label_smoothing=_SMOOTHING)


class BLIP(ImageTextContrast):
    """What pre-training and retrieval share: image-text contrast over its queues (ITC), image-text matching (ITM)."""

    text_encoder: BertModel
    text_encoder_m: BertModel

    def __init__(
        self,
        config: Mapping[str, Any],
        med: BertConfig,
        vit: Mapping[str, Any],
        tokens: Mapping[str, int],
        with_ids: bool,
        padding: bool,
    ):
        super().__init__(
            partial(VisionTransformer, config["image_size"], **vit),
            partial(BertModel, med, padding=padding),
            (med.encoder_width, med.hidden_size, config["embed_dim"]),
            config["queue_size"],
            config["momentum"],
            0.07,
            with_ids,
        )
        self.tokens = tokens

    def bert(self, twin: str = "") -> BertModel:
        return getattr(self, f"text_encoder{twin}")

    def context(self, image_embeds: Tensor) -> Context:
        """What texts see of images, given by their tokens [B, K, vision width]."""
        return self.text_encoder.context(image_embeds)

    def fuse(self, context: Context, ids: Tensor, mask: Tensor) -> Tensor:
        """States [n * B, L, hidden_size] of texts, [ENC] in place of their first token, each given its image."""
        return self.text_encoder(starting(ids, self.tokens["enc_token_id"]), mask, context)

    def match(self, context: Context, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits [n * B, 2] of texts and their images; column 1 is "they match"."""
        return self.itm_head(self.fuse(context, ids, mask)[:, 0])

    def itm(
        self, context: Context, ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(loss, logits [3B, 2]): the pairs, each text with its negative image, each image with its negative text.

        negatives: (an image for each text, a text for each image), [B] each. Where there is none (-1) the row does not
        count.
        """
        images, texts, labels = matched(*negatives)
        logits = self.match(context.select(images), ids[texts], mask[texts])
        return F.cross_entropy(logits, labels), logits

    @torch.no_grad()
    def retrieve(self, f: Features, ids: Tensor, mask: Tensor, k: int, batch_size: int = 16) -> tuple[Ranking, Ranking]:
        """(texts of every image, images of every text): the k most similar, by similarity plus matching logit.

        f: `encode_image` and `encode_text` of a test set; the numbers of images and of texts may differ. ids, mask: of
        the texts. `batch_size` queries, each with its k candidates, are matched at once; an image's keys and values are
        computed once for all of its texts there.
        """

        def texts_of(images: Tensor, texts: Tensor) -> Tensor:
            context = self.context(f.image_embeds[images])
            return self.match(context, ids[texts.flatten()], mask[texts.flatten()])[:, 1].view_as(texts)

        def images_of(texts: Tensor, images: Tensor) -> Tensor:
            found, at = images.flatten().unique(return_inverse=True)
            context = self.context(f.image_embeds[found]).select(at)
            rows = texts.repeat_interleave(k)
            return self.match(context, ids[rows], mask[rows])[:, 1].view_as(images)

        options = {"add_similarity": True, "batch_size": batch_size}
        return (
            rerank(f.image_feat, f.text_feat, texts_of, k, **options),
            rerank(f.text_feat, f.image_feat, images_of, k, **options),
        )


class Captions:
    """Of a model with an image encoder and a decoder of words: `generate`."""

    visual_encoder: VisionTransformer
    text_decoder: BertLMHeadModel
    tokens: Mapping[str, int]
    prompt_ids: Sequence[int]  # [CLS], the words that every caption begins with, [SEP]

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        sample: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        *,
        top_k: int = 50,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Captions [B, T] of images [B, 3, R, R]: [DEC], the prompt's words, the caption's, [SEP], padding.

        Without `sample` by beam search (greedy with one beam), which divides the sum of log-probabilities by the number
        of tokens, [DEC] and prompt counted; with it by nucleus sampling: of the `top_k` likeliest words those that have
        `top_p` together.

        Args:
            max_length, min_length: in tokens, [DEC] and prompt counted; [SEP] is not taken before `min_length`.
            repetition_penalty: divides positive scores of words that are there already, and multiplies negative ones;
                by default 1, and when sampling 1.1.
            draws: uniform numbers [B, steps] in [0, 1) to sample with; by default torch's generator draws.
        """
        if repetition_penalty is None:
            repetition_penalty = 1.1 if sample else 1.0
        prompt = [self.tokens["bos_token_id"], *self.prompt_ids[1:-1]]
        if num_beams < 1:
            raise ValueError(f"num_beams is {num_beams}, expected at least 1")
        if max_length <= len(prompt):
            raise ValueError(f"max_length is {max_length}, expected more than the {len(prompt)} tokens of the prompt")
        context = self.text_decoder.bert.context(self.visual_encoder(image))
        decoder = CaptionDecoder(self.text_decoder, context, 1 if sample else num_beams)
        end = self.tokens["sep_token_id"]
        process = partial(constrain, eos=end, min_length=min_length, repetition_penalty=repetition_penalty)
        if not sample:
            return search(decoder, prompt, process, max_length, self.tokens)

        def choose(ids: Tensor, logits: Tensor) -> Tensor:
            probs = keep_top_p(keep_top_k(process(ids, logits), top_k), top_p).softmax(-1)
            return torch.multinomial(probs, 1) if draws is None else draw(probs, draws[:, ids.shape[1] - len(prompt)])

        return extend(decoder, prompt, choose, max_length, self.tokens)


class Pretraining(Captions, BLIP):
    """Pre-training: ITC + ITM + LM (section 3.2). The decoder shares all but self-attention with the encoder."""

    def __init__(
        self,
        config: Mapping[str, Any],
        med: BertConfig,
        vit: Mapping[str, Any],
        tokens: Mapping[str, int],
        prompt_ids: Sequence[int],
    ):
        # officially the table of words is resized after it was made, which drops the word of padding
        super().__init__(config, med, vit, tokens, with_ids=False, padding=False)
        self.prompt_ids = prompt_ids
        self.text_decoder = BertLMHeadModel(med, tied=self.text_encoder)

    # a training step, of which the queues' own forward (`itc`) is a part
    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        alpha: float = 0.0,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The losses of a training step. It also moves the momentum model and the queues on.

        image [B, 3, R, R]; ids and mask [B, L], a row being [CLS] ... [SEP] and padding, where the mask is 0.
        alpha: share of the momentum model's soft targets. The random draws may be given: see `itm`.
        """
        self.clamp_temp()
        f = self.features(image, ids, mask)
        with torch.no_grad():
            self.momentum_update()
            f_m = self.features(image, ids, mask, "_m")
        loss_i2t, loss_t2i, *drawn = self.itc(f, f_m, alpha, negatives=0 if negatives else 1, mixture=1e-4)
        self.enqueue(f_m.image_feat, f_m.text_feat)
        # the decoder's cross-attention is the encoder's
        context = self.context(f.image_embeds)
        loss_itm, _ = self.itm(context, ids, mask, negatives or (drawn[1][:, 0], drawn[0][:, 0]))
        return Losses((loss_i2t + loss_t2i) / 2, loss_itm, self.lm(context, ids, mask))

    def lm(self, context: Context, ids: Tensor, mask: Tensor) -> Tensor:
        """Language modelling of whole captions, each given its image."""
        ids = starting(ids, self.tokens["bos_token_id"])
        return word_loss(self.text_decoder, ids, mask, context, self.tokens["pad_token_id"])


class Retrieval(BLIP):
    """Fine-tuning for retrieval: ITC + ITM, where several texts may belong to one image (`idx`)."""

    def __init__(self, config: Mapping[str, Any], med: BertConfig, vit: Mapping[str, Any], tokens: Mapping[str, int]):
        super().__init__(config, med, vit, tokens, with_ids=True, padding=True)
        self.sampler = HardNegativeSampler("blip_retrieval")

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"queue_ptr" if key == "ptr_queue" else key: t for key, t in state_dict.items()}

    # a training step, of which the queues' own forward (`itc`) is a part
    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        idx: Tensor,
        alpha: float = 0.0,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The losses of a training step, as in pre-training. idx [B]: the images' ids; equal ids are positives.

        Negatives are drawn by the similarity of the features themselves, not of the momentum model's.
        """
        self.clamp_temp()
        f = self.features(image, ids, mask)
        with torch.no_grad():
            self.momentum_update()
            f_m = self.features(image, ids, mask, "_m")
        loss_i2t, loss_t2i = self.itc(f, f_m, alpha, idx)
        self.enqueue(f_m.image_feat, f_m.text_feat, idx)
        if negatives is None:
            texts, images = self.sampler(f.image_feat, f.text_feat, 1 / self.temp.detach(), idx)
            negatives = images[:, 0], texts[:, 0]
        loss_itm, _ = self.itm(self.context(f.image_embeds), ids, mask, negatives)
        return Losses((loss_i2t + loss_t2i) / 2, loss_itm, None)


class Captioner(Captions, nn.Module):
    """Fine-tuning for captioning: language modelling of what follows the prompt."""

    def __init__(
        self,
        config: Mapping[str, Any],
        med: BertConfig,
        vit: Mapping[str, Any],
        tokens: Mapping[str, int],
        prompt_ids: Sequence[int],
    ):
        super().__init__()
        self.embed_dim, self.image_resolution = med.hidden_size, config["image_size"]
        self.tokens, self.prompt_ids = tokens, prompt_ids
        self.visual_encoder = VisionTransformer(config["image_size"], **vit)
        self.text_decoder = BertLMHeadModel(med)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of captions ids [B, L], each [CLS], the prompt's words, the caption's, [SEP] and padding."""
        ids = starting(ids, self.tokens["bos_token_id"])
        context = self.text_decoder.bert.context(self.visual_encoder(image))
        pad, prompt = self.tokens["pad_token_id"], len(self.prompt_ids) - 1
        return word_loss(self.text_decoder, ids, mask, context, pad, prompt)


class RankedAnswers(NamedTuple):
    best: Tensor  # [B], into the candidates
    ids: Tensor  # [B, k], into the candidates, by the probability of their first token
    log_probs: Tensor  # [B, k], of these k as a whole: minus their loss, with smoothed labels
    first_token: Tensor  # [B, N], probability of every candidate's first token


class VQA(nn.Module):
    """Visual question answering as generation: a decoder answers from the fused states of image and question."""

    def __init__(
        self,
        config: Mapping[str, Any],
        encoder: BertConfig,
        decoder: BertConfig,
        vit: Mapping[str, Any],
        tokens: Mapping[str, int],
    ):
        super().__init__()
        self.embed_dim, self.image_resolution, self.tokens = encoder.hidden_size, config["image_size"], tokens
        self.visual_encoder = VisionTransformer(config["image_size"], **vit)
        self.text_encoder = BertModel(encoder)
        self.text_decoder = BertLMHeadModel(decoder)

    def question(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Fused states [B, L, hidden_size] of questions about images, [ENC] in place of their first token."""
        context = self.text_encoder.context(self.visual_encoder(image))
        return self.text_encoder(starting(ids, self.tokens["enc_token_id"]), mask, context)

    def forward(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        n: Sequence[int],
        weights: Tensor,
    ) -> Tensor:
        """The loss of a training step: sum over answers of weight * the answer's summed loss, per image.

        image [B, 3, R, R], questions [B, L]; answers [sum(n), La], n[b] of them for question b, with weights [sum(n)].
        """
        rows = torch.arange(len(n), device=image.device).repeat_interleave(
            torch.as_tensor(n, device=image.device), output_size=len(answer_ids)
        )
        states = self.question(image, question_ids, question_mask)
        context = self.text_decoder.bert.context(states, question_mask).select(rows)
        answer_ids = starting(answer_ids, self.tokens["bos_token_id"])
        return (weights * self.answer_loss(context, answer_ids, answer_mask)).sum() / len(image)

    def answer_loss(self, context: Context, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss [n * B] of answers ids [n * B, La], which begin with [DEC], summed over their words."""
        pad = self.tokens["pad_token_id"]
        return word_loss(self.text_decoder, ids, mask, context, pad, reduction="none").sum(1)

    @torch.no_grad()
    def rank_answer(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int,
    ) -> RankedAnswers:
        """Of N candidate answers [N, La], which begin with [DEC], the k likeliest by their first word, then as a whole.

        The question's keys and values are computed once for all of its candidates.
        """
        states = self.question(image, question_ids, question_mask)
        context = self.text_decoder.bert.context(states, question_mask)
        first = CaptionDecoder(self.text_decoder, context)(candidate_ids[:1, :1].expand(len(image), 1))
        first_token = first.softmax(-1)[:, candidate_ids[:, 1]]
        ids = first_token.topk(k).indices
        loss = self.answer_loss(context, candidate_ids[ids.flatten()], candidate_mask[ids.flatten()])
        log_probs = -loss.view(-1, k)
        best = ids.gather(1, log_probs.argmax(1, keepdim=True)).squeeze(1)
        return RankedAnswers(best, ids, log_probs, first_token)

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        num_beams: int = 3,
        max_length: int = 10,
        min_length: int = 1,
    ) -> Tensor:
        """Answers [B, T] by beam search: [DEC], words, [SEP], padding. As officially, padding of questions is seen."""
        context = self.text_decoder.bert.context(self.question(image, question_ids, question_mask))
        decoder = CaptionDecoder(self.text_decoder, context, num_beams)
        end, begin = self.tokens["sep_token_id"], [self.tokens["bos_token_id"]]
        process = partial(constrain, eos=end, min_length=min_length, repetition_penalty=1.0)
        return search(decoder, begin, process, max_length, self.tokens)
