"""BLIP-2's first stage (Li et al. 2023, arXiv:2301.12597, section 3.2), in two passes of the Q-Former instead of four.

    image, text, caption = Q-Former([queries | text | generated text])     contrast (ITC) and generation (ITG)
    pairs, negatives     = Q-Former([queries | text])                      matching (ITM), after the draw of negatives

LAVIS runs the queries, the texts, the generated texts and the pairs one after another, and projects an image's keys and
values in each pass that sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.gather import gather_rows, gather_rows_with_grad
from mmfuse.fused.language import linear_cross_entropy
from mmfuse.fused.qformer import CONTRAST_AND_CAPTION, ImageQueries, Predictions, QFormerConfig, QFormerKV
from mmfuse.fused.queries import MaxQueryITC
from mmfuse.kernels import max_query_similarity


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


class QFormerPretraining(ImageQueries):
    """Image-text contrast (ITC), matching (ITM) and generation (ITG) of a Q-Former over an image encoder's tokens.

        losses = pretraining(tokens, ids, mask)
        losses.total.backward()

    A step projects the keys and values of an image once. Over several processes the features of all are compared, and
    negatives come from all; their gradients are the official ones (`MaxQueryITC`). Negatives are drawn without a
    synchronisation with the host. Parameters have the names of LAVIS' `Blip2Qformer`, but for the image encoder.

    Args:
        qformer: with texts.
        queries: Q.
        embed_dim: of the space of the contrast.
        tokens: ids: "bos_DEC", with which a generated text begins, and "pad".
        eps: of the LayerNorm of the image's tokens.
    """

    def __init__(
        self, qformer: QFormerConfig, queries: int, embed_dim: int, tokens: Mapping[str, int], eps: float = 1e-5
    ):
        if not qformer.text:
            raise ValueError("qformer has text=False, expected True: the first stage reads texts")
        super().__init__(qformer, queries, eps)
        self.Qformer.cls = nn.Module()
        self.Qformer.cls.predictions = Predictions(self.bert.embeddings.word_embeddings, qformer.layer_norm_eps)
        self.bert._initialize(self.predictions.transform.dense)
        self.embed_dim, self.tokens = embed_dim, tokens
        self.vision_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.text_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.contrast = MaxQueryITC(label_smoothing=0.1)

    @property
    def predictions(self) -> Predictions:
        return self.Qformer.cls.predictions  # type: ignore[return-value]

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

        Args:
            image: what `features` reads: [B, N, encoder_width], the tokens of an image encoder.
            ids, mask: int64 [B, T], a row being [CLS] ... [SEP] and padding, where the mask is 0.
            image_id: [B]: pairs of equal id are positives and never negatives.
            negatives: see `itm`; drawn by default.
        """
        f = self.features(image, ids, mask)
        loss_itc = self.contrast(f.image_feats, f.text_feat, self.temp, image_id)
        if negatives is None:
            of_text, of_image = (p.multinomial(1)[:, 0] for p in self.negative_probabilities(f, image_id))
            negatives = of_text, of_image
        loss_itm, _ = self.itm(f, negatives)
        return Losses(loss_itc, loss_itm, self.caption_loss(f))

    def features(self, tokens: Tensor, ids: Tensor, mask: Tensor) -> Features:
        """Of ITC and ITG, in one pass over queries, texts, and texts that are generated."""
        kept, kv, texts = mask.sum(1), self.see(tokens), [ids, self.decoder_ids(ids)]
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

    def match(self, kv: QFormerKV, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        """ITM logits [B, 2] of images and texts [B, T] with `kept` [B] tokens, or all; column 1 is "they match"."""
        return self.itm_head(self.fuse(kv, ids, kept)).mean(1)

    def fuse(self, kv: QFormerKV, ids: Tensor, kept: Tensor | None = None) -> Tensor:
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
        return linear_cross_entropy(hidden, read(head).weight, labels, bias=head.bias, label_smoothing=0.1)

    def caption_logits(self, caption: Tensor) -> Tensor:
        """[B, T, vocabulary] of the states of captions."""
        return self.predictions.decoder(self.predictions.transform(caption))


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _everywhere(t: Tensor) -> Tensor:
    """The rows of all processes, without a gradient from the others'."""
    return gather_rows(t, None) if _world() > 1 else t
