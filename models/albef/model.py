"""ALBEF's three uses: pre-training, retrieval and visual question answering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import Ranking, rerank
from mmfuse.models.albef.bert import BertConfig, BertForLanguage, BertModel
from mmfuse.models.contrast import Features, ImageTextContrast, Twins, matched
from mmfuse.models.vit import VisionTransformer


class MaskDraws(NamedTuple):
    """The random draws of masked language modelling, each [B, L]."""

    masked: Tensor  # 1 = a candidate for masking
    replace: Tensor  # 1 = becomes [MASK]
    random: Tensor  # 1 = otherwise becomes a random word
    words: Tensor  # those words


class Losses(NamedTuple):
    loss_mlm: Tensor | None
    loss_ita: Tensor
    loss_itm: Tensor

    @property
    def total(self) -> Tensor:
        return self.loss_ita + self.loss_itm + (0 if self.loss_mlm is None else self.loss_mlm)


class ALBEF(ImageTextContrast):
    """What pre-training and retrieval share: image-text contrast over its queues (ITC), image-text matching (ITM)."""

    text_encoder: Any
    text_encoder_m: Any

    def __init__(
        self,
        config: Mapping[str, Any],
        bert: BertConfig,
        vit: Mapping[str, Any],
        text_encoder: type[nn.Module],
        with_ids: bool,
    ):
        super().__init__(
            lambda: VisionTransformer(config["image_res"], **vit),
            lambda: text_encoder(bert),
            (config["vision_width"], bert.hidden_size, config["embed_dim"]),
            config["queue_size"],
            config["momentum"],
            config["temp"],
            with_ids,
        )

    def match(self, image_embeds: Tensor, text_embeds: Tensor, mask: Tensor) -> Tensor:
        """ITM logits [B, 2] of B pairs of token embeddings; column 1 is "they match"."""
        return self.itm_head(self.bert().fusion(text_embeds, mask, image_embeds)[:, 0])

    @torch.no_grad()
    def retrieve(self, f: Features, mask: Tensor, k: int, batch_size: int = 16) -> tuple[Ranking, Ranking]:
        """(texts of every image, images of every text): the k most similar, ranked by their matching logit.

        f: `encode_image` and `encode_text` of a test set; the numbers of images and of texts may differ. mask: of the
        texts. `batch_size` queries, each with its k candidates, are matched at once.
        """

        def score(images: Tensor, texts: Tensor) -> Tensor:
            return self.match(f.image_embeds[images], f.text_embeds[texts], mask[texts])[:, 1]

        def texts_of(images: Tensor, texts: Tensor) -> Tensor:
            return score(images.repeat_interleave(k), texts.flatten()).view_as(texts)

        def images_of(texts: Tensor, images: Tensor) -> Tensor:
            return score(images.flatten(), texts.repeat_interleave(k)).view_as(images)

        return (
            rerank(f.image_feat, f.text_feat, texts_of, k, batch_size=batch_size),
            rerank(f.text_feat, f.image_feat, images_of, k, batch_size=batch_size),
        )

    def itm(self, f: Features, mask: Tensor, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, logits [3B, 2]): the pairs, each text with its negative image, each image with its negative text.

        negatives: (an image for each text, a text for each image), [B] each. Where there is none (-1) the row does not
        count.
        """
        images, texts, labels = matched(*negatives)
        logits = self.match(f.image_embeds[images], f.text_embeds[texts], mask[texts])
        return F.cross_entropy(logits, labels), logits


class Pretraining(ALBEF):
    """Pre-training: MLM + ITC + ITM (eq. 5), each of the first two distilled from the momentum model (section 3.3)."""

    def __init__(self, config: Mapping[str, Any], bert: BertConfig, vit: Mapping[str, Any], tokens: Mapping[str, int]):
        super().__init__(config, bert, vit, BertForLanguage, with_ids=False)
        self.tokens, self.mlm_probability = tokens, config["mlm_probability"]

    def bert(self, twin: str = "") -> BertModel:
        return getattr(self, f"text_encoder{twin}").bert

    # a training step, of which the queues' own forward (`itc`) is a part
    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        alpha: float = 0.0,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
        mask_draws: MaskDraws | None = None,
    ) -> Losses:
        """The losses of a training step. It also moves the momentum model and the queues on.

        image [B, 3, R, R]; ids and mask [B, L], a row being [CLS] ... [SEP] and padding, where the mask is 0.
        alpha: share of the momentum model's soft targets. The random draws may be given: see `itm` and
        `MaskDraws`.
        """
        self.clamp_temp()
        f = self.features(image, ids, mask)
        with torch.no_grad():
            self.momentum_update()
            f_m = self.features(image, ids, mask, "_m")
        loss_i2t, loss_t2i, *drawn = self.itc(f, f_m, alpha, negatives=0 if negatives else 1)
        loss_ita = (loss_i2t + loss_t2i) / 2
        self.enqueue(f_m.image_feat, f_m.text_feat)
        loss_itm, _ = self.itm(f, mask, negatives or (drawn[1][:, 0], drawn[0][:, 0]))
        masked_ids, labels = self.mask_tokens(ids, mask_draws)
        loss_mlm = self.mlm(masked_ids, labels, mask, f.image_embeds, f_m.image_embeds, alpha)
        return Losses(loss_mlm, loss_ita, loss_itm)

    def mask_tokens(self, ids: Tensor, draws: MaskDraws | None = None) -> tuple[Tensor, Tensor]:
        """(ids with words masked, labels: the original id there and -100 elsewhere). [CLS] and padding stay."""
        draws = draws or self.draw_masks(ids)
        masked = draws.masked.bool() & (ids != self.tokens["pad_token_id"]) & (ids != self.tokens["cls_token_id"])
        replace = masked & draws.replace.bool()
        random = masked & ~replace & draws.random.bool()
        out = ids.where(~replace, self.tokens["mask_token_id"]).where(~random, draws.words)
        return out, ids.where(masked, -100)

    def draw_masks(self, ids: Tensor) -> MaskDraws:
        """80 % of the masked words become [MASK], 10 % a random word, 10 % stay."""
        masked, replace, random = (
            torch.rand(ids.shape, device=ids.device) < p for p in (self.mlm_probability, 0.8, 0.5)
        )
        words = torch.randint(self.bert().config.vocab_size, ids.shape, device=ids.device)
        return MaskDraws(masked, replace, random, words)

    def mlm(
        self,
        masked_ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        image_embeds: Tensor,
        image_embeds_m: Tensor,
        alpha: float,
    ) -> Tensor:
        """Masked language modelling given the image, with the momentum model as teacher."""
        teacher = None
        if alpha:
            with torch.no_grad():
                teacher = self.text_encoder_m, self.text_encoder_m.hidden(masked_ids, mask, image_embeds_m)
        hidden = self.text_encoder.hidden(masked_ids, mask, image_embeds)
        return self.text_encoder.loss(hidden, labels, "mean", teacher, alpha)


class Retrieval(ALBEF):
    """Fine-tuning for retrieval: ITC + ITM, where several texts may belong to one image (`idx`)."""

    def __init__(self, config: Mapping[str, Any], bert: BertConfig, vit: Mapping[str, Any]):
        super().__init__(config, bert, vit, BertModel, with_ids=True)
        self.distill = config["distill"]

    def bert(self, twin: str = "") -> BertModel:
        return getattr(self, f"text_encoder{twin}")

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
        """The losses of a training step, as in pre-training. idx [B]: the images' ids; equal ids are positives."""
        f = self.features(image, ids, mask)
        with torch.no_grad():
            self.momentum_update()
            f_m = self.features(image, ids, mask, "_m")
        alpha = alpha if self.distill else 0.0
        loss_i2t, loss_t2i, *drawn = self.itc(f, f_m, alpha, idx, negatives=0 if negatives else 1)
        loss_ita = (loss_i2t + loss_t2i) / 2
        self.enqueue(f_m.image_feat, f_m.text_feat, idx)
        loss_itm, _ = self.itm(f, mask, negatives or (drawn[1][:, 0], drawn[0][:, 0]))
        return Losses(None, loss_ita, loss_itm)


class RankedAnswers(NamedTuple):
    ids: Tensor  # [B, k], into the candidates, the best first
    probs: Tensor  # [B, k], of these k
    first_token: Tensor  # [B, N], probability of every candidate's first token
    log_probs: Tensor  # [B, k], what the k were ranked by, in the order of their first token's probability


class VQA(Twins, nn.Module):
    """Visual question answering as generation: a decoder answers from the fused states of image and question."""

    momentum = 0.995
    visual_encoder: VisionTransformer
    text_decoder: BertForLanguage
    text_decoder_m: BertForLanguage

    def __init__(
        self,
        config: Mapping[str, Any],
        bert: BertConfig,
        vit: Mapping[str, Any],
        tokens: Mapping[str, int],
        decoder: BertConfig,
    ):
        super().__init__()
        self.embed_dim, self.image_resolution = bert.hidden_size, config["image_res"]
        self.distill, self.pad = config["distill"], tokens["pad_token_id"]

        def parts() -> dict[str, nn.Module]:
            return {
                "visual_encoder": VisionTransformer(config["image_res"], **vit),
                "text_encoder": BertModel(bert),
                "text_decoder": BertForLanguage(decoder, causal=True),
            }

        if self.distill:
            self.make_twins(parts)
        else:
            for name, part in parts().items():
                setattr(self, name, part)

    def question(self, image: Tensor, ids: Tensor, mask: Tensor, twin: str = "") -> Tensor:
        """Fused states [B, L, hidden size] of questions about images."""
        image_embeds = getattr(self, f"visual_encoder{twin}")(image)
        return getattr(self, f"text_encoder{twin}")(ids, mask, image_embeds)

    def forward(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: Sequence[int],
        weights: Tensor,
        alpha: float = 0.0,
    ) -> Tensor:
        """The loss of a training step: sum over answers of weight * the answer's summed loss, per image.

        image [B, 3, R, R], questions [B, L]; answers [sum(k), La], k[b] of them for question b, with weights [sum(k)].
        It also moves the momentum model on.
        """
        repeats = torch.as_tensor(k, device=image.device)

        def per_answer(t: Tensor) -> Tensor:
            return t.repeat_interleave(repeats, dim=0, output_size=len(answer_ids))

        states, mask = self.question(image, question_ids, question_mask), per_answer(question_mask)
        teacher = None
        if self.distill:
            with torch.no_grad():
                self.momentum_update()
                if alpha:
                    states_m = per_answer(self.question(image, question_ids, question_mask, "_m"))
                    hidden_m = self.text_decoder_m.hidden(answer_ids, answer_mask, states_m, mask)
                    teacher = self.text_decoder_m, hidden_m[:, :-1]
        loss = self.answer_loss(per_answer(states), mask, answer_ids, answer_mask, teacher, alpha)
        return (weights * loss).sum() / len(image)

    def answer_loss(
        self,
        states: Tensor,
        mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        teacher: tuple[BertForLanguage, Tensor] | None = None,
        alpha: float = 0.0,
    ) -> Tensor:
        """Next-token cross-entropy [A] of each of A answers, summed over its tokens, given its question's states."""
        hidden = self.text_decoder.hidden(answer_ids, answer_mask, states, mask)[:, :-1]
        labels = answer_ids.masked_fill(answer_ids == self.pad, -100)[:, 1:]
        return self.text_decoder.loss(hidden, labels, "none", teacher, alpha if teacher else 0.0).sum(1)

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
        """The best k of N candidate answers [N, La], first by their first token, then by all of them.

        The official score counts the first token twice, and so does this one.
        """
        states = self.question(image, question_ids, question_mask)
        start = candidate_ids[:1, :1].expand(len(image), 1)
        logits = self.text_decoder.logits(start, torch.ones_like(start), states, question_mask)[:, 0]
        first_token = logits.softmax(-1)[:, candidate_ids[:, 1]]
        p, ids = first_token.topk(k)
        chosen = ids.flatten()
        states, mask = (t.repeat_interleave(k, dim=0) for t in (states, question_mask))
        loss = self.answer_loss(states, mask, candidate_ids[chosen], candidate_mask[chosen])
        log_probs = p.log() - loss.view(-1, k)
        probs, order = log_probs.softmax(-1).topk(k)
        return RankedAnswers(ids.gather(1, order), probs, first_token, log_probs)
