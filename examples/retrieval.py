"""Retrieval in two stages: the k most similar of a gallery, exactly, and a slower score that ranks those again.

Digits of scikit-learn, as images: the features are 6 principal components, the slower score is the distance of the
images themselves under small shifts. Right is an answer of the same digit.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import mmfuse

digits = load_digits()
images, labels = torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target)
centred = images.flatten(1) - images.flatten(1).mean(0)
components = torch.linalg.svd(centred, full_matrices=False).Vh[:6]
features = F.normalize(centred @ components.T, dim=1)
(queries, gallery), query_ids, gallery_ids = features.split([300, 1497]), labels[:300], labels[300:]

similarity, index = mmfuse.similarity_topk(queries, gallery, 10)  # [300, 10] each, without the 300 x 1497 scores
print(f"first stage: R@1 {gallery_ids[index[:, 0]].eq(query_ids).double().mean():.3f}")
print(mmfuse.explain(mmfuse.similarity_topk, queries, gallery, 10))

shifted = torch.stack([images.roll((y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)], dim=1)  # [1797, 9, 8, 8]


def score(query: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """[m, k]: minus the least distance of m queries to k candidates each, over the shifts of the query."""
    apart = shifted[query][:, None] - images[300:][candidates][:, :, None]
    return -apart.square().sum((-2, -1)).amin(2)


ranking = mmfuse.fused.rerank(queries, gallery, score, k=10)
print(f"re-ranked: R@1 {ranking.recall((1,), query_ids, gallery_ids)[1]:.3f}")
