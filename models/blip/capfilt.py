"""CapFilt (Li et al. 2022, section 3.3): a captioner writes captions of web images, a filter drops those that differ.

web image, web caption -> captioner: a synthetic caption -> filter: keep each caption that matches the image
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.models.blip.model import BLIP, Captions, starting


class Bootstrapped(NamedTuple):
    """The captions of images, the web's in column 0 and the synthetic ones in column 1."""

    ids: Tensor  # [B, 2, L]: [CLS], words, [SEP], padding
    mask: Tensor  # [B, 2, L]
    kept: Tensor  # [B, 2] bool: the filter finds that the caption matches its image

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept: (rows of the images [N], ids [N, L], mask [N, L])."""
        rows, _ = at = self.kept.nonzero(as_tuple=True)
        return rows, self.ids[at], self.mask[at]


@torch.no_grad()
def bootstrap(
    captioner: Captions, judge: BLIP, image: Tensor, ids: Tensor, mask: Tensor, **options: Any
) -> Bootstrapped:
    """Images [B, 3, R, R] and their web captions ids and mask [B, L], with a synthetic caption each, both filtered.

    The captioner is a `Pretraining` or a `Captioner`, the filter `judge` a `Pretraining` or a `Retrieval`; in the paper
    both are fine-tuned from one pre-trained model. `options` are the captioner's, by default nucleus sampling, which
    the paper finds better than beam search (table 2). An image's keys and values are computed once for both captions.
    """
    written, pad = _synthetic(captioner, image, {"sample": True} | options), captioner.tokens["pad_token_id"]
    length = max(ids.shape[1], written.shape[1])
    both = torch.stack([F.pad(t, (0, length - t.shape[1]), value=pad) for t in (ids, written)], dim=1)
    seen = torch.stack([F.pad(t, (0, length - t.shape[1])) for t in (mask, (written != pad).to(mask.dtype))], dim=1)
    context = judge.context(judge.encode_image(image)[0])
    logits = judge.match(context, both.flatten(0, 1), seen.flatten(0, 1))
    return Bootstrapped(both, seen, logits.argmax(1).view(-1, 2).bool())


def _synthetic(captioner: Captions, image: Tensor, options: dict[str, Any]) -> Tensor:
    """Captions [B, L] without the prompt: [CLS], words, [SEP], padding."""
    tokens, prompt = captioner.tokens, len(captioner.prompt_ids) - 1
    ids = starting(captioner.generate(image, **options)[:, prompt - 1 :], tokens["cls_token_id"])
    # the longest ones were cut
    ended = (ids == tokens["sep_token_id"]).any(1, keepdim=True)
    end = torch.where(ended, tokens["pad_token_id"], tokens["sep_token_id"])
    return torch.cat([ids, end], dim=1)
