"""BEiT-3's one objective: what is masked is predicted, patches as visual tokens (section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.fused import linear_cross_entropy
from mmfuse.fused.acceleration.plain import read
from mmfuse.models.beit3.encoder import Batch

if TYPE_CHECKING:
    from mmfuse.models.beit3.model import BEiT3ForTasks

IGNORED = -100
# of the patches of an image, of the words of a text, and of the words of a text that has an image (section 2.3)
SHARES = {"image": 0.4, "text": 0.15, "pair": 0.5}


class Masked(NamedTuple):
    """Images, texts or pairs, and what is to be predicted; the fields of a modality that is not there are None."""

    image: Tensor | None = None  # [B, C, H, W]
    patches: Tensor | None = None  # bool [B, N]: those that the mask token stands for
    codes: Tensor | None = None  # int64 [B, N]: the visual token of each patch
    text_ids: Tensor | None = None  # int64 [B, L], with masked words
    labels: Tensor | None = None  # int64 [B, L]: the masked words; elsewhere -100
    padding_mask: Tensor | None = None  # [B, L], nonzero where the text has ended


class Losses(NamedTuple):
    """Of one batch, each the mean over what is masked."""

    image: Tensor | None
    text: Tensor | None


def pretrain(model: BEiT3ForTasks, batches: Sequence[Masked]) -> list[Losses]:
    """The losses of each batch; images, texts and pairs are one stream of rows, in one forward."""
    given = [Batch(b.image, b.text_ids, b.padding_mask, b.patches) for b in batches]
    losses = []
    for b, found in zip(batches, model.beit3.together(given), strict=True):
        image = text = None
        if found.image is not None and b.patches is not None and b.codes is not None:
            image = _loss(found.image[:, 1:], model.code_head, b.codes.masked_fill(~b.patches.bool(), IGNORED))
        if found.text is not None and b.labels is not None:
            text = _loss(found.text, model.word_head, b.labels)
        losses.append(Losses(image, text))
    return losses


def _loss(x: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, read(head).weight, labels, bias=head.bias, ignore_index=IGNORED)


def mask_words(
    ids: Tensor, share: float, mask_id: int, special: Sequence[int], draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ids with masked words, labels): each word that is not special with probability `share`.

    Args:
        ids: int64 [B, L]. draws: [B, L] in [0, 1), by default at random.
    """
    draws = torch.rand(ids.shape, device=ids.device) if draws is None else draws
    chosen = (draws < share) & ~torch.isin(ids, torch.tensor(special, device=ids.device))
    return ids.masked_fill(chosen, mask_id), ids.masked_fill(~chosen, IGNORED)


def block_mask(
    grid: int, share: float = SHARES["image"], smallest: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """bool [grid^2]: blocks of patches until a share of them is masked (BEiT, arXiv:2106.08254, algorithm 1).

    Args:
        smallest: patches of a block, at least; its sides' ratio is from 0.3 to 1 / 0.3.
    """
    mask, wanted = torch.zeros(grid, grid, dtype=torch.bool), int(share * grid**2)
    while (missing := wanted - int(mask.sum())) > 0:
        area, ratio, top, left = torch.rand(4, generator=generator).tolist()
        area = smallest + area * max(0, missing - smallest)
        ratio = math.exp((2 * ratio - 1) * math.log(1 / 0.3))
        height, width = (min(grid, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
        top, left = int(top * (grid - height + 1)), int(left * (grid - width + 1))
        # a block that is larger than what is missing gives its last patches back
        new = (~mask[top : top + height, left : left + width]).nonzero()[:missing]
        mask[top + new[:, 0], left + new[:, 1]] = True
    return mask.flatten()
