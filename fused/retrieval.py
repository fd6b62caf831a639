"""Image-text matching: hard negatives to train on, and the re-ranking of retrieval results by the matching head.

    similarity (ITC) of all pairs -> the k most similar of each query -> matching score (ITM) of these k only

Li et al. 2021 (ALBEF), section 5; Li et al. 2022 (BLIP); Li et al. 2023 (BLIP-2), which add the similarity to the
matching score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfuse.kernels import hard_negatives, similarity_topk
from mmfuse.kernels.contrastive.negatives.op import OTHER_DIRECTION

# what differs between the papers' draws: whether pairs of equal ids are masked instead of the pairs themselves (None:
# where ids are given), and what is added to the probabilities
_VARIANTS: dict[str, tuple[bool | None, float]] = {
    "albef": (False, 0.0),
    "albef_retrieval": (True, 0.0),
    "blip": (False, 1e-4),
    "blip_retrieval": (True, 0.0),
    "vlmo": (False, 0.0),
    "blip2": (None, 0.0),
}


class HardNegativeSampler(nn.Module):
    """A hard negative text for each image and image for each text, for image-text matching.

    forward(image [B, D], text [B, D], logit_scale, ids=None, *, image_all=None, text_all=None, all_ids=None,
    row_offset=0, seed=None) returns (texts [B, k] of the images, images [B, k] of the texts), int64 indices into
    `text_all` and `image_all`; -1 where nothing is left to draw.

    `image_all` and `text_all` [N, D] are what is drawn from: the momentum features in ALBEF's and BLIP's pre-training,
    the features of all ranks in VLMo and BLIP-2, with this rank's at `row_offset`. By default the features themselves;
    then one pass over the logits serves both directions. `logit_scale` is 1 / temperature. `ids` [B] and `all_ids` [N]
    are the images' ids; `seed` is as for `mmfuse.hard_negatives`.

    Args:
        variant: whose draw it is. "albef", "blip" (1e-4 added to the probabilities) and "vlmo" mask the own pair;
            "albef_retrieval" and "blip_retrieval" mask equal ids; "blip2" equal ids where they are given.
        k: negatives per row, without replacement.
        generator: where seeds come from, on the features' device; None is torch's own. `torch.compile` does not trace a
            generator: inside of it give `seed`, a tensor drawn outside.

    Raises:
        ValueError: an unknown variant; ids that are missing or not used; or as `mmfuse.hard_negatives`.
    """

    def __init__(self, variant: str = "albef", k: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if variant not in _VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(_VARIANTS)}")
        self.variant, self.k, self.generator = variant, k, generator

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        ids: Tensor | None = None,
        *,
        image_all: Tensor | None = None,
        text_all: Tensor | None = None,
        all_ids: Tensor | None = None,
        row_offset: int = 0,
        seed: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        by_ids, mixture = _VARIANTS[self.variant]
        if by_ids is not None and by_ids != (ids is not None):
            raise ValueError(
                f"ids is {'missing' if by_ids else 'given'}: {self.variant} masks "
                + ("equal ids" if by_ids else "the pairs")
            )
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=image.device, generator=self.generator)
        options = {"k": self.k, "ids": ids, "key_ids": all_ids, "row_offset": row_offset, "mixture": mixture}
        if image_all is None and text_all is None:
            texts, images = hard_negatives(image, text, logit_scale, seed=seed, both=True, **options)
            return texts, images
        texts = hard_negatives(image, text if text_all is None else text_all, logit_scale, seed=seed, **options)
        other = seed ^ OTHER_DIRECTION
        images = hard_negatives(text, image if image_all is None else image_all, logit_scale, seed=other, **options)
        return texts, images

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, k={self.k}"


@dataclass(frozen=True)
class Ranking:
    """The k best of a gallery of `size` for each query, best first.

    Attributes:
        scores: [B, k], by which they are ranked.
        indices: [B, k] int64, into the gallery.
        similarities: [B, k], by which they were chosen.
    """

    scores: Tensor
    indices: Tensor
    similarities: Tensor
    size: int

    def matrix(self, fill: float = -100.0) -> Tensor:
        """The scores as ALBEF's evaluation keeps them: [B, size], `fill` outside of the k best."""
        return self.scores.new_full((len(self.scores), self.size), fill).scatter_(1, self.indices, self.scores)

    def recall(
        self,
        at: Sequence[int] = (1, 5, 10),
        query_ids: Tensor | None = None,
        gallery_ids: Tensor | None = None,
    ) -> dict[int, float]:
        """The share of queries with a right answer among the first r, for each r in `at`.

        Right is what has the query's id; by default query i and row i of the gallery. For the texts of images,
        `gallery_ids` holds each text's image; for the images of texts, `query_ids` does.

        Raises:
            ValueError: more answers are asked for than were ranked, or ids are not [B] and [size].
        """
        ids = [
            torch.arange(n, device=self.indices.device) if given is None else given.to(self.indices.device)
            for given, n in ((query_ids, len(self.indices)), (gallery_ids, self.size))
        ]
        for name, t, n in zip(("query_ids", "gallery_ids"), ids, (len(self.indices), self.size), strict=True):
            if t.shape != (n,):
                raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({n},)")
        if max(at) > self.indices.shape[1]:
            raise ValueError(f"at is {tuple(at)}, expected at most the {self.indices.shape[1]} that were ranked")
        right = ids[1][self.indices] == ids[0][:, None]
        return {r: right[:, :r].any(1).double().mean().item() for r in at}


@torch.no_grad()
def rerank(
    queries: Tensor,
    gallery: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    k: int,
    *,
    add_similarity: bool = False,
    batch_size: int = 16,
) -> Ranking:
    """Retrieval in two stages: the k most similar of the gallery for each query, ranked by a matching score.

    Args:
        queries: [B, D] contrastive features (ITC), e.g. of the images.
        gallery: [N, D] of the other modality, same dtype and device.
        score: score(query [m], candidates [m, k]) -> [m, k], the matching logits (ITM) of m queries, given as int64
            indices, with the candidates of each.
        k: candidates per query, `k_test` in the papers' code; at most N.
        add_similarity: add the similarity to the matching logit, as BLIP and BLIP-2 do; ALBEF does not.
        batch_size: queries per call of `score`.

    Returns:
        A `Ranking`; of equal scores, the more similar comes first. Deterministic if `score` is.

    Raises:
        ValueError: `score` returned another shape; or as `mmfuse.similarity_topk`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    similarities, candidates = similarity_topk(queries, gallery, k)
    scores = torch.empty_like(similarities)
    for query in torch.arange(len(queries), device=queries.device).split(batch_size):
        found = score(query, candidates[query])
        if found.shape != (len(query), k):
            raise ValueError(f"score returned shape {tuple(found.shape)}, expected ({len(query)}, {k})")
        scores[query] = found.to(scores.dtype)
    if add_similarity:
        scores += similarities
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Ranking(scores, candidates.gather(1, order), similarities.gather(1, order), len(gallery))
