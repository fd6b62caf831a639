"""VLMo's objectives: pre-training on pairs and on text, and the downstream tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import HardNegativeSampler, linear_cross_entropy
from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.multiway import MultiwayLinear
from mmfuse.kernels import clip_loss
from mmfuse.kernels.text import embed_text
from mmfuse.models.registry import check_keys, instantiate
from mmfuse.models.vlmo.transformer import Batch, Hidden, MultiwayTransformer, dense, official, to_official

# of the text's embeddings and of the words' head, as BERT has it
_EPS = 1e-12


@dataclass(frozen=True)
class VLMoConfig:
    """The entries of the official config that the model depends on; a loss exists where its name is not 0."""

    loss_names: Mapping[str, float] = field(default_factory=dict)
    image_size: int = 224
    vocab_size: int = 30522
    max_text_len: int = 40
    max_text_len_of_initckpt: int = 196
    drop_path_rate: float = 0.1
    vqav2_label_size: int = 3129
    model_arch: str = ""
    load_path: str = ""  # no effect, as the next
    test_only: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in self.loss_names:
            if name not in _LOSSES:
                raise ValueError(f"loss_names has {name!r}, expected some of {', '.join(_LOSSES)}")
        object.__setattr__(self, "names", tuple(name for name, weight in self.loss_names.items() if weight > 0))


_LOSSES = ("itm", "itc", "mlm", "textmlm", "vqa", "nlvr2", "irtr")


class Features(NamedTuple):
    """Of a batch after the last norm."""

    text: Tensor | None  # [B, L, D]
    image: Tensor | None  # [B, 1 + N, D]
    raw_cls: Tensor  # [B, D], the first token: of pairs after the norm, otherwise before it


class Contrast(NamedTuple):
    """Features of matching images and texts [B, D], of unit length: by their own experts, and by those of pairs."""

    image: Tensor
    text: Tensor
    image_fused: Tensor | None = None
    text_fused: Tensor | None = None


class Losses(NamedTuple):
    mlm: Tensor
    itc: Tensor
    itm: Tensor

    @property
    def total(self) -> Tensor:
        return self.mlm + self.itc + self.itm


class WordHead(nn.Module):
    """Hidden states to words: a layer, a norm, and the products with the vocabulary."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, _EPS)
        self.decoder = nn.Linear(width, vocabulary)

    def hidden(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.hidden(x))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; a word labelled -100 does not count."""
        return linear_cross_entropy(self.hidden(x), read(self.decoder).weight, labels, bias=self.decoder.bias)


class VLMo(nn.Module):
    """One transformer for images, texts and pairs, with the heads of the losses that its config names.

    Args:
        arch: of the transformer, the official names.
        config: see `VLMoConfig`.
        arch_call: no effect.
    """

    EXPERTS = ("text", "image", "pair")

    def __init__(self, arch: Mapping[str, Any], config: Mapping[str, Any], arch_call: str = ""):
        super().__init__()
        check_keys(config, (f.name for f in fields(VLMoConfig) if f.init))
        self.config = VLMoConfig(**config)
        losses, length = self.config.names, self.config.max_text_len
        sizes: dict[str, Any] = {"img_size": self.config.image_size, "text_len": length}
        sizes |= {"longest_text": self.config.max_text_len_of_initckpt, "drop_path_rate": self.config.drop_path_rate}
        arch = dict(arch)
        if "textmlm" in losses:  # no experts of pairs yet
            arch["vlffn_start_layer_index"] = arch.get("depth", 12)
        self.transformer = instantiate(MultiwayTransformer, arch | sizes)
        self.embed_dim, self.image_resolution = self.transformer.embed_dim, self.config.image_size
        d = self.embed_dim
        self.word = nn.Embedding(self.config.vocab_size, d)
        absolute = self.transformer.table is None
        self.word_position = nn.Embedding(length, d) if absolute else None
        self.word_type, self.word_norm = nn.Parameter(torch.zeros(d)), nn.LayerNorm(d, _EPS)
        self.kind = nn.Embedding(3 if "nlvr2" in losses else 2, d)  # of text, image, and a second image
        self.pooler = nn.Linear(d, d)
        self.draw = HardNegativeSampler("vlmo")
        if {"itc", "irtr"} & {*losses}:
            self.image_head, self.text_head = (nn.Linear(d, d, bias=False) for _ in range(2))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "itc" in losses:
            self.image_fused_head, self.text_fused_head = (nn.Linear(d, d, bias=False) for _ in range(2))
            self.logit_vl_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "itm" in losses:
            self.match_head = nn.Linear(d, 2)
        if {"mlm", "textmlm"} & {*losses}:
            self.word_head = WordHead(d, self.config.vocab_size)
        if "vqa" in losses:
            self.answer_head = _classifier(d, 2 * d, self.config.vqav2_label_size)
        if "nlvr2" in losses:
            self.reason_head = _classifier(2 * d, 2 * d, 2)
        self.apply(_initialise)

    # --- the transformer --------------------------------------------------------------------------------------------

    def texts(self, ids: Tensor, mask: Tensor, fused: bool = False) -> Batch:
        """Texts [B, L], L as the config says, as what enters the blocks; mask [B, L] is 0 after their ends."""
        position = None if self.word_position is None else read(self.word_position).weight
        norm = (read(self.word_norm).weight, self.word_norm.bias, _EPS)
        x = embed_text(ids, read(self.word).weight, position=position, type_embed=self.word_type, norm=norm)
        return Batch(text=x + read(self.kind).weight[0], words=mask.sum(1), fused=fused)

    def images(self, image: Tensor, kind: int = 1, fused: bool = False) -> Batch:
        """Images [B, 3, H, W] as what enters the blocks; kind 2 is the second image of a text."""
        return Batch(image=self.transformer.embed(image, read(self.kind).weight[kind]), fused=fused)

    def pairs(self, ids: Tensor, mask: Tensor, image: Tensor, kind: int = 1) -> Batch:
        """Both, of texts and their images."""
        return self.texts(ids, mask)._replace(image=self.images(image, kind).image)

    def forward(self, batch: Batch) -> Features:
        """What `texts`, `images` or `pairs` gave, through the blocks."""
        return self.features(self.transformer([batch])[0])

    def features(self, hidden: Hidden) -> Features:
        """Of one batch that went through the blocks."""
        norm = self.transformer.norm
        text, image = (None if t is None else norm(t) for t in hidden[:2])
        if text is not None and image is not None:
            return Features(text, image, text[:, 0])
        raw = hidden.text if image is None else hidden.image
        return Features(text, image, raw[:, 0])  # type: ignore[index]

    def pooled(self, pair: Features) -> Tensor:
        """[B, D] of pairs."""
        return torch.tanh(self.pooler(pair.raw_cls))

    # --- pre-training -----------------------------------------------------------------------------------------------

    def contrast(self, image: Hidden, text: Hidden) -> Contrast:
        """The projected class tokens; by the experts of pairs as well, where they went through those."""

        def project(x: Tensor, head: nn.Linear) -> Tensor:
            return F.normalize(head(self.transformer.norm(x[:, 0])), dim=-1)

        found = Contrast(project(image.image, self.image_head), project(text.text, self.text_head))
        if image.fused is None or text.fused is None:
            return found
        fused = project(image.fused, self.image_fused_head), project(text.fused, self.text_fused_head)
        return Contrast(found.image, found.text, *fused)

    def contrastive_loss(self, f: Contrast) -> Tensor:
        """Image-text contrast; with the experts of pairs the mean of both losses."""
        loss = clip_loss(f.image, f.text, self.logit_scale.exp())
        if f.image_fused is None or f.text_fused is None:
            return loss
        return (loss + clip_loss(f.image_fused, f.text_fused, self.logit_vl_scale.exp())) / 2

    def pretrain(
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        masked_ids: Tensor,
        labels: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """Masked words, contrast and matching, in two forwards: the second one's negatives are found by the first one.

        Args:
            image: [B, 3, H, W]. ids, mask: the texts [B, L], 0 in `mask` after their ends.
            masked_ids, labels: the texts with words masked, and these words (elsewhere -100).
            negatives: (an image for each text, a text for each image), by default drawn by similarity.
        """
        single = self.images(image, fused=True), self.texts(ids, mask, fused=True)
        pair, of_image, of_text = self.transformer([self.pairs(masked_ids, mask, image), *single])
        mlm = 0.25 * self.word_head.loss(self.features(pair).text, labels)
        f = self.contrast(of_image, of_text)
        if negatives is None:
            texts, images = self.draw(f.image.detach(), f.text.detach(), self.logit_scale.detach().exp())
            negatives = images[:, 0], texts[:, 0]
        match = self.match(image, ids, mask, negatives)
        labels = torch.zeros(len(match), dtype=torch.int64, device=match.device)
        labels[: len(image)] = 1
        return Losses(mlm, self.contrastive_loss(f), F.cross_entropy(match, labels))

    def match(self, image: Tensor, ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [3 B, 2] of the pairs, of each text with its negative image, of each image with its negative text."""
        images, texts = negatives
        image = torch.cat([image, image[images], image])
        ids, mask = torch.cat([ids, ids, ids[texts]]), torch.cat([mask, mask, mask[texts]])
        return self.match_head(self.pooled(self(self.pairs(ids, mask, image))))

    def text_loss(self, masked_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Masked words of texts alone: the stage between the images and the pairs."""
        return self.word_head.loss(self(self.texts(masked_ids, mask)).text, labels)

    @torch.no_grad()
    def begin_with(self, earlier: VLMo) -> None:
        """Go on from an earlier stage: all that both have. Experts of pairs, which that of texts lacks, stay."""
        own = self.state_dict()
        for key, t in earlier.state_dict().items():
            if key in own:
                (own[key] if own[key].shape == t.shape else own[key][: len(t)]).copy_(t)

    # --- downstream -------------------------------------------------------------------------------------------------

    def retrieval(self, image: Tensor, ids: Tensor, mask: Tensor) -> Contrast:
        """Features of images and texts, whose `contrastive_loss` is the fine-tuning's, in one forward."""
        return self.contrast(*self.transformer([self.images(image), self.texts(ids, mask)]))

    def answer(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, answers] of a question about an image."""
        return self.answer_head(self.pooled(self(self.pairs(ids, mask, image))))

    @staticmethod
    def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
        """Binary cross-entropy to soft scores, summed over the answers and averaged over the batch."""
        return F.binary_cross_entropy_with_logits(logits, scores) * logits.shape[1]

    def visual_reasoning(self, image_a: Tensor, image_b: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, 2] of whether a text is true of two images, in one forward."""
        pairs = [self.pairs(ids, mask, image_a), self.pairs(ids, mask, image_b, kind=2)]
        pooled = [self.pooled(self.features(hidden)) for hidden in self.transformer(pairs)]
        return self.reason_head(torch.cat(pooled, dim=1))

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own state from unilm's."""
        of_transformer, given = _parts(state_dict)
        if (table := given.pop("relative_position_bias_table", None)) is not None:
            of_transformer["table"] = table
        found = _within(official(of_transformer, self.transformer.start, len(self.transformer.blocks)))
        given.pop("text_embeddings.position_ids", None)  # a buffer of some releases of transformers
        if self.word_position is None:
            given.pop("text_embeddings.position_embeddings.weight", None)  # kept, and not used
        types = given.pop("text_embeddings.token_type_embeddings.weight", None)
        if types is not None:
            found["word_type"] = types[0]  # the only one that is used
        for key, t in given.items():
            module, _, leaf = key.rpartition(".")
            found[_KEYS.get(key) or f"{_MODULES.get(module, module)}.{leaf}".lstrip(".")] = t
        return found

    def to_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """unilm's state from its own."""
        of_transformer, given = _parts(state_dict)
        table = of_transformer.pop("table", None)
        found = _within(to_official(of_transformer, self.transformer.start, len(self.transformer.blocks)))
        if table is not None:
            found["relative_position_bias_table"] = table
        kind = given.pop("word_type")
        length, width = self.config.max_text_len, len(kind)
        found["text_embeddings.token_type_embeddings.weight"] = torch.stack([kind, torch.zeros_like(kind)])
        found["text_embeddings.position_ids"] = torch.arange(length, device=kind.device)[None]
        if self.word_position is None:
            found["text_embeddings.position_embeddings.weight"] = kind.new_zeros(length, width)
        modules, keys = ({ours: theirs for theirs, ours in of.items()} for of in (_MODULES, _KEYS))
        for key, t in given.items():
            module, _, leaf = key.rpartition(".")
            found[keys.get(key) or f"{modules.get(module, module)}.{leaf}".lstrip(".")] = t
        return found

    def dense_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own state, of one expert, from BEiT's."""
        found = dense(state_dict, len(self.transformer.blocks))
        if (rows := found.get("table")) is not None and (table := self.transformer.table) is not None:
            # what is between words, and between words and patches, stays
            found["table"] = torch.cat([rows, table.detach()[len(rows) :].to(rows)])
        return _within(found)


_TRANSFORMER = "transformer."


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's, and what is around it."""
    inside = {k.removeprefix(_TRANSFORMER): t for k, t in state.items() if k.startswith(_TRANSFORMER)}
    return inside, {k: t for k, t in state.items() if not k.startswith(_TRANSFORMER)}


def _within(of_transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_TRANSFORMER + k: t for k, t in of_transformer.items()}


def _classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))


def _initialise(module: nn.Module) -> None:
    """Normal of 0.02, no bias."""
    if isinstance(module, (nn.Embedding, nn.Linear, MultiwayLinear)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# the modules by their official names
_MODULES = {
    "text_embeddings.word_embeddings": "word",
    "text_embeddings.position_embeddings": "word_position",
    "text_embeddings.LayerNorm": "word_norm",
    "token_type_embeddings": "kind",
    "pooler.dense": "pooler",
    "itc_image_proj.fc": "image_head",
    "itc_text_proj.fc": "text_head",
    "itc_vl_image_proj.fc": "image_fused_head",
    "itc_vl_text_proj.fc": "text_fused_head",
    "itm_score.fc": "match_head",
    "mlm_score.transform.dense": "word_head.dense",
    "mlm_score.transform.LayerNorm": "word_head.norm",
    "mlm_score.decoder": "word_head.decoder",
}
for _i in (0, 1, 3):
    _MODULES |= {f"vqa_classifier.{_i}": f"answer_head.{_i}", f"nlvr2_classifier.{_i}": f"reason_head.{_i}"}
_KEYS = {"mlm_score.bias": "word_head.decoder.bias"}
