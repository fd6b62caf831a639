"""BEiT-3's tasks on one encoder: retrieval, visual reasoning, question answering, classification and captioning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels import clip_loss
from mmfuse.models.beit3.encoder import CAPTIONING, BEiT3, Encoded, dense, official, to_official
from mmfuse.models.registry import instantiate

TOKENS = {"cls": 0, "pad": 1, "sep": 2, "mask": 64001}
# what the encoder is always built with
FIXED: Mapping[str, Any] = {
    "multiway": True,
    "layernorm_embedding": False,
    "no_output_layer": True,
    "subln": True,
    "encoder_normalize_before": True,
    "deepnorm": False,
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "rel_pos_buckets": 0,
    "xpos_rel_pos": False,
    "moe_freq": 0,
}
_ALSO = ("layernorm_eps", "in_chans")  # of the encoder, among the official fixed values


class Retrieval(NamedTuple):
    image: Tensor  # [B, D], of unit length
    text: Tensor  # [B, D], of unit length
    loss: Tensor


class Pooler(nn.Module):
    """The first token, normalised, projected, through tanh."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(x[:, 0])))


class Reasoner(nn.Module):
    """Two layers over the class tokens of two pairs."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm1, self.dense1 = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)
        self.norm2, self.dense2 = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3ForTasks(nn.Module):
    """BEiT-3 with the heads of some of its tasks.

    Args:
        tasks: of "pretraining", "retrieval", "nlvr2", "vqa", "imageclassification" and "captioning".
        encoder_config: of the encoder, torchscale's names. encoder_config_fixed: what it must be built with.
        nlvr2_num_classes, vqa_num_classes, imageclassification_num_classes: of those heads.
        codebook_size: visual tokens that masked patches are predicted as.
        imageclassification_label_smoothing, label_smoothing: of the classes, and of the words of a caption.
        drop_worst_ratio, drop_worst_after: from that step on, so large a share of the worst words does not count.
        token_ids: of "cls", "pad", "sep" and "mask".
        num_beams, num_max_bpe_tokens, length_penalty: of the search for captions.
    """

    EXPERTS = ("image", "text")

    def __init__(
        self,
        tasks: Sequence[str],
        encoder_config: Mapping[str, Any],
        encoder_config_fixed: Mapping[str, Any] | None = None,
        nlvr2_num_classes: int = 2,
        vqa_num_classes: int = 3129,
        imageclassification_num_classes: int = 1000,
        imageclassification_label_smoothing: float = 0.1,
        label_smoothing: float = 0.1,
        drop_worst_ratio: float = 0.2,
        drop_worst_after: int = 12000,
        token_ids: Mapping[str, int] = TOKENS,
        num_beams: int = 3,
        num_max_bpe_tokens: int = 32,
        length_penalty: float = 0.6,
        codebook_size: int = 8192,
    ):
        super().__init__()
        fixed = dict(encoder_config_fixed or {})
        also = {name: fixed.pop(name) for name in _ALSO if name in fixed}
        for name, value in fixed.items():
            if name not in FIXED or FIXED[name] != value:
                expected = FIXED.get(name, "no such key")
                raise ValueError(f"encoder_config_fixed has {name} = {value!r}, expected {expected}")
        self.beit3 = instantiate(BEiT3, also | dict(encoder_config))
        self.tasks, self.embed_dim, self.image_resolution = tuple(tasks), self.beit3.embed_dim, self.beit3.img_size
        self.class_smoothing, self.word_smoothing = imageclassification_label_smoothing, label_smoothing
        self.drop_worst_ratio, self.drop_worst_after = drop_worst_ratio, drop_worst_after
        self.token_ids, self.num_beams, self.length_penalty = dict(token_ids), num_beams, length_penalty
        self.max_words = num_max_bpe_tokens
        d = self.embed_dim
        for task in self.tasks:
            if task == "retrieval":
                self.image_head, self.text_head = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
                self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            elif task == "nlvr2":
                self.reasoner = Reasoner(d, nlvr2_num_classes)
            elif task == "vqa":
                self.pooler = Pooler(d)
                layers = nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, vqa_num_classes)
                self.answer_head = nn.Sequential(*layers)
            elif task == "imageclassification":
                self.class_norm, self.class_head = nn.LayerNorm(d), nn.Linear(d, imageclassification_num_classes)
            elif task in ("captioning", "pretraining"):
                self.word_head = nn.Linear(d, self.beit3.word.num_embeddings)
                if task == "pretraining":
                    self.code_head = nn.Linear(d, codebook_size)
            else:
                raise ValueError(f"tasks has {task!r}, expected some of {', '.join(_HEADS)}")

    def forward(self, *args: Any, **named: Any) -> Encoded:
        """The encoder's tokens; every task has its own method."""
        return self.beit3(*args, **named)

    # --- retrieval --------------------------------------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, D], of unit length."""
        return F.normalize(self.image_head(self.beit3(image=image).image[:, 0]), dim=-1)

    def encode_text(self, text_ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """[B, D], of unit length."""
        return F.normalize(self.text_head(self.beit3(text_ids=text_ids, padding_mask=padding_mask).text[:, 0]), dim=-1)

    def retrieval(self, image: Tensor, text_ids: Tensor, padding_mask: Tensor | None = None) -> Retrieval:
        """The features of matching images and texts, and their contrastive loss."""
        x, y = self.encode_image(image), self.encode_text(text_ids, padding_mask)
        return Retrieval(x, y, clip_loss(x, y, self.logit_scale.exp()))

    # --- answers ----------------------------------------------------------------------------------------------------

    def visual_reasoning(
        self, image_a: Tensor, image_b: Tensor, text_ids: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, classes] of whether the text is true of the two images: both pairs in one forward."""
        double = None if padding_mask is None else padding_mask.repeat(2, 1)
        found = self.beit3(torch.cat([image_a, image_b]), text_ids.repeat(2, 1), double)
        pair = torch.cat([found.image[:, 0], found.text[:, 0]], dim=1)  # [2 B, 2 D]
        return self.reasoner(torch.cat(pair.chunk(2), dim=1))

    def answer(self, image: Tensor, question: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits [B, answers]."""
        return self.answer_head(self.pooler(self.beit3(image, question, padding_mask).image))

    @staticmethod
    def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
        """Binary cross-entropy to soft scores, summed over the answers and averaged over the batch."""
        return F.binary_cross_entropy_with_logits(logits, scores) * logits.shape[1]

    def classify(self, image: Tensor) -> Tensor:
        """Logits [B, classes], of the mean of the patches."""
        return self.class_head(self.class_norm(self.beit3(image=image).image[:, 1:].mean(1)))

    def class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.class_smoothing)

    # --- captions ---------------------------------------------------------------------------------------------------

    def caption_logits(
        self, image: Tensor, text_ids: Tensor, padding_mask: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """Logits of the words [B, L, V], or of those where `masked` [B, L] is not 0: [n, V]."""
        text = self.beit3(image, text_ids, padding_mask, sees=CAPTIONING).text
        return self.word_head(text if masked is None else text[masked.bool()])

    def caption_loss(self, logits: Tensor, words: Tensor, step: int = 0) -> Tensor:
        """KL divergence of words [n] with smoothed labels from logits [n, V]; late in training without the worst."""
        others = self.word_smoothing / (logits.shape[1] - 1)
        target = torch.full_like(logits, others).scatter_(1, words[:, None], 1 - self.word_smoothing)
        loss = F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
        if self.drop_worst_ratio > 0 and step > self.drop_worst_after:
            loss = loss.topk(int(len(loss) * (1 - self.drop_worst_ratio)), largest=False).values
        return loss.mean()

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own state from unilm's."""
        of_encoder, of_heads = _parts(state_dict)
        found = official(of_encoder, len(self.beit3.layers))
        renamed = {theirs: ours for task in self.tasks for theirs, ours in _HEADS[task].items()}
        return _whole(found, _renamed(of_heads, renamed))

    def to_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """unilm's state from its own."""
        of_encoder, of_heads = _parts(state_dict)
        found = to_official(of_encoder, len(self.beit3.layers))
        renamed = {ours: theirs for task in self.tasks for theirs, ours in _HEADS[task].items()}
        return _whole(found, _renamed(of_heads, renamed))

    def dense_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own state, of one expert, from that of torchscale's encoder without `multiway`."""
        return _whole(dense(state_dict, len(self.beit3.layers)), {})


_ENCODER = "beit3."


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's, and that of the heads."""
    of_encoder = {k.removeprefix(_ENCODER): t for k, t in state.items() if k.startswith(_ENCODER)}
    return of_encoder, {k: t for k, t in state.items() if not k.startswith(_ENCODER)}


def _whole(of_encoder: Mapping[str, Tensor], of_heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_ENCODER + k: t for k, t in of_encoder.items()} | dict(of_heads)


def _renamed(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """With other names for some modules, or parameters of the model itself."""
    found = {}
    for key, t in state.items():
        module, _, leaf = key.rpartition(".")
        found[f"{modules[module]}.{leaf}" if module in modules else modules.get(key, key)] = t
    return found


# the heads' modules by their official names
_HEADS = {
    "retrieval": {"vision_head": "image_head", "language_head": "text_head"},
    "nlvr2": {f"head.{name}": f"reasoner.{name}" for name in ("norm1", "dense1", "norm2", "dense2")},
    "vqa": {f"head.{i}": f"answer_head.{i}" for i in (0, 1, 3)},
    "imageclassification": {"fc_norm": "class_norm", "head": "class_head"},
    "captioning": {"mlm_head": "word_head"},
    "pretraining": {},
}
