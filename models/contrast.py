"""Image-text contrast with momentum twins: what ALBEF (Li et al. 2021) and BLIP (Li et al. 2022) share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import MomentumQueueITC, momentum_update
from mmfuse.models.vit import VisionTransformer


class Features(NamedTuple):
    """Of a batch of pairs: every token's embedding, and the [CLS] embeddings projected and normalised."""

    image_embeds: Tensor  # [B, K, vision width]
    text_embeds: Tensor  # [B, L, hidden size], of the text alone
    image_feat: Tensor  # [B, embed_dim]
    text_feat: Tensor  # [B, embed_dim]


class Twins:
    """Of a model some of whose parts have a momentum twin: `<name>_m` is a moving average of `<name>`."""

    momentum: float

    def make_twins(self, parts: Callable[[], Mapping[str, nn.Module]]) -> None:
        online, average = parts(), parts()
        self.twins = tuple(online)
        for (name, part), twin in zip(online.items(), average.values(), strict=True):
            twin.load_state_dict(part.state_dict())
            setattr(self, name, part)
            setattr(self, f"{name}_m", twin.requires_grad_(False))

    def momentum_update(self) -> None:
        online, average = (
            [p for name in self.twins for p in getattr(self, name + of).parameters()] for of in ("", "_m")
        )
        momentum_update(online, average, self.momentum)


class ImageTextContrast(Twins, MomentumQueueITC):
    """Two encoders, each with a momentum twin, the queues of their features, and a head of image-text matching.

    Args:
        image, text: make an encoder.
        widths: of the image's tokens, of the text's, and of the features (`embed_dim`).
    """

    visual_encoder: VisionTransformer

    def __init__(
        self,
        image: Callable[[], VisionTransformer],
        text: Callable[[], nn.Module],
        widths: tuple[int, int, int],
        queue_size: int,
        momentum: float,
        temp: float,
        with_ids: bool,
    ):
        vision_width, hidden_size, embed_dim = widths
        super().__init__(embed_dim, queue_size, with_ids)
        self.embed_dim, self.momentum = embed_dim, momentum
        self.make_twins(
            lambda: {
                "visual_encoder": image(),
                "vision_proj": nn.Linear(vision_width, embed_dim),
                "text_encoder": text(),
                "text_proj": nn.Linear(hidden_size, embed_dim),
            }
        )
        self.image_resolution = self.visual_encoder.image_res
        self.itm_head = nn.Linear(hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(float(temp)))

    def bert(self, twin: str = "") -> Any:
        """The encoder of texts, whose `text(ids, mask)` sees no image."""
        raise NotImplementedError

    def encode_image(self, image: Tensor, twin: str = "") -> tuple[Tensor, Tensor]:
        """(all tokens [B, K, vision width], normalised feature [B, embed_dim]) of images [B, 3, R, R]."""
        embeds = getattr(self, f"visual_encoder{twin}")(image)
        return embeds, F.normalize(getattr(self, f"vision_proj{twin}")(embeds[:, 0]), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor, twin: str = "") -> tuple[Tensor, Tensor]:
        """(all tokens [B, L, hidden size], normalised feature [B, embed_dim]) of texts: ids and mask [B, L]."""
        embeds = self.bert(twin).text(ids, mask)
        return embeds, F.normalize(getattr(self, f"text_proj{twin}")(embeds[:, 0]), dim=-1)

    def features(self, image: Tensor, ids: Tensor, mask: Tensor, twin: str = "") -> Features:
        image_embeds, image_feat = self.encode_image(image, twin)
        text_embeds, text_feat = self.encode_text(ids, mask, twin)
        return Features(image_embeds, text_embeds, image_feat, text_feat)

    @torch.no_grad()
    def clamp_temp(self) -> None:
        self.temp.clamp_(0.001, 0.5)

    def itc(
        self,
        f: Features,
        f_m: Features,
        alpha: float,
        idx: Tensor | None = None,
        negatives: int = 0,
        mixture: float = 0.0,
    ) -> tuple[Tensor, ...]:
        """(image-to-text, text-to-image) contrastive losses over the momentum features of the batch and the queues.

        Targets are alpha * the momentum model's softmax + (1 - alpha) * the positives: the own pair, or with `idx`
        all of equal id. With `negatives` = k also (texts [B, k] of the images, images [B, k] of the texts), drawn from
        the batch in proportion to the softmax of the same similarities plus `mixture`, never a positive; -1 where no
        other is left.
        """
        features = f.image_feat, f.text_feat, f_m.image_feat, f_m.text_feat
        return MomentumQueueITC.forward(self, *features, self.temp, alpha, idx, negatives=negatives, mixture=mixture)


def matched(image_neg: Tensor, text_neg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(images, texts, labels), [3B] each: the pairs, then texts with negative images, then images with negative texts.

    image_neg, text_neg: an image for each text and a text for each image, [B] each; -1 where there is none, whose label
    is -100 and does not count. Otherwise the label is 1 for the pairs, and 0.
    """
    own = torch.arange(len(image_neg), device=image_neg.device)
    absent = torch.cat([image_neg, text_neg]) < 0
    images = torch.cat([own, image_neg.clamp_min(0), own])
    texts = torch.cat([own, own, text_neg.clamp_min(0)])
    return images, texts, torch.cat([torch.ones_like(own), torch.where(absent, -100, 0)])
