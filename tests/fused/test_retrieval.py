"""Hard negatives as a module, and retrieval re-ranking against the loops of the official evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.fused import HardNegativeSampler, rerank
from mmfuse.kernels import hard_negatives


def features(*sizes: int) -> list[Tensor]:
    return [F.normalize(torch.randn(n, 16), dim=-1) for n in sizes]


# --- hard negatives -------------------------------------------------------------------------------------------------


def test_variants_are_the_operator() -> None:
    image, text = features(12, 12)
    ids = torch.arange(12) // 2
    for variant, given, options in (
        ("albef", None, {}),
        ("vlmo", None, {}),
        ("blip", None, {"mixture": 1e-4}),
        ("albef_retrieval", ids, {"ids": ids}),
        ("blip_retrieval", ids, {"ids": ids}),
        ("blip2", None, {}),
        ("blip2", ids, {"ids": ids}),
    ):
        got = HardNegativeSampler(variant, k=2)(image, text, 5.0, given, seed=3)
        expected = hard_negatives(image, text, 5.0, k=2, seed=3, both=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_keys_of_all_ranks_and_momentum_features() -> None:
    image, text, image_all, text_all = features(6, 6, 18, 18)
    ids, all_ids = torch.arange(6, 12), torch.arange(18)
    texts, images = HardNegativeSampler("albef")(
        image, text, 5.0, image_all=image_all, text_all=text_all, row_offset=6, seed=3
    )
    assert torch.equal(texts, hard_negatives(image, text_all, 5.0, row_offset=6, seed=3))
    assert images.shape == (6, 1) and (images[:, 0] != ids).all() and images.max() > 6
    by_ids = HardNegativeSampler("blip_retrieval")(
        image, text, 5.0, ids, image_all=image_all, text_all=text_all, all_ids=all_ids, row_offset=6, seed=3
    )
    assert torch.equal(by_ids[0], texts) and torch.equal(by_ids[1], images)
    # equal features in both directions: their noise is not the same
    texts, images = HardNegativeSampler()(image_all, image_all, 1.0, image_all=image_all, text_all=image_all, seed=3)
    assert (texts != images).any()


def test_seeds_of_the_module() -> None:
    image, text = features(30, 30)
    draw = [HardNegativeSampler(generator=torch.Generator().manual_seed(5))(image, text, 1.0) for _ in range(2)]
    assert torch.equal(draw[0][0], draw[1][0])
    torch.manual_seed(6)
    first = HardNegativeSampler()(image, text, 1.0)[0]
    torch.manual_seed(6)
    assert torch.equal(HardNegativeSampler()(image, text, 1.0)[0], first)


def test_errors_of_the_module() -> None:
    image, text = features(4, 4)
    with pytest.raises(ValueError, match="variant is 'clip', expected one of albef, "):
        HardNegativeSampler("clip")
    with pytest.raises(ValueError, match="ids is missing: blip_retrieval masks equal ids"):
        HardNegativeSampler("blip_retrieval")(image, text, 1.0)
    with pytest.raises(ValueError, match="ids is given: albef masks the pairs"):
        HardNegativeSampler("albef")(image, text, 1.0, torch.arange(4))


# --- re-ranking -----------------------------------------------------------------------------------------------------


def official_scores(queries: Tensor, gallery: Tensor, itm: Tensor, k: int, add: bool) -> Tensor:
    """evaluation() of ALBEF's Retrieval.py; of BLIP's with `add`."""
    matrix = torch.full((len(queries), len(gallery)), -100.0)
    for i, sims in enumerate(queries @ gallery.t()):
        topk_sim, topk_idx = sims.topk(k=k, dim=0)
        score = itm[i, topk_idx]
        matrix[i, topk_idx] = score + topk_sim if add else score
    return matrix


def official_recall(scores: Tensor, right: list[list[int]], at: int) -> float:
    """itm_eval(): the rank of the best right answer, one query at a time."""
    ranks = []
    for index, score in enumerate(scores):
        order = score.argsort(descending=True).tolist()
        ranks.append(min(order.index(j) for j in right[index]))
    return sum(r < at for r in ranks) / len(ranks)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("add", [False, True])
def test_official_evaluation(add: bool, batch_size: int) -> None:
    images, texts = features(9, 18)
    image_of = torch.arange(18) // 2
    itm = torch.randn(9, 18)
    itm[image_of, torch.arange(18)] += 1

    def score(query: Tensor, candidates: Tensor) -> Tensor:
        assert query.shape == (len(candidates),) and candidates.shape[1] == 12 and len(query) <= batch_size
        return itm[query[:, None], candidates]

    ranking = rerank(images, texts, score, 12, add_similarity=add, batch_size=batch_size)
    matrix = official_scores(images, texts, itm, 12, add)
    torch.testing.assert_close(ranking.matrix(), matrix)
    assert torch.equal(ranking.indices, matrix.argsort(1, descending=True)[:, :12])
    torch.testing.assert_close(ranking.similarities, (images @ texts.t()).gather(1, ranking.indices))
    recall = ranking.recall((1, 5, 10), gallery_ids=image_of)
    texts_of = [[2 * i, 2 * i + 1] for i in range(9)]
    assert recall == pytest.approx({r: official_recall(matrix, texts_of, r) for r in (1, 5, 10)})

    back = rerank(texts, images, lambda t, i: itm[i, t[:, None]], 7, add_similarity=add, batch_size=batch_size)
    matrix = official_scores(texts, images, itm.t(), 7, add)
    torch.testing.assert_close(back.matrix(), matrix)
    recall = back.recall((1, 5), query_ids=image_of)
    assert recall == pytest.approx({r: official_recall(matrix, [[int(i)] for i in image_of], r) for r in (1, 5)})


def test_equal_scores_keep_the_order_of_similarity() -> None:
    images, texts = features(3, 8)
    ranking = rerank(images, texts, lambda q, c: torch.zeros(c.shape, dtype=torch.float16), 5)
    assert torch.equal(ranking.indices, (images @ texts.t()).topk(5).indices)
    assert ranking.scores.dtype == torch.float32


def test_errors_of_rerank() -> None:
    images, texts = features(3, 8)
    with pytest.raises(ValueError, match=r"score returned shape \(3,\), expected \(3, 4\)"):
        rerank(images, texts, lambda q, c: torch.zeros(len(q)), 4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        rerank(images, texts, lambda q, c: c.float(), 4, batch_size=0)
    ranking = rerank(images, texts, lambda q, c: c.float(), 4)
    with pytest.raises(ValueError, match=r"at is \(1, 5\), expected at most the 4"):
        ranking.recall((1, 5))
    with pytest.raises(ValueError, match=r"gallery_ids has shape \(3,\), expected \(8,\)"):
        ranking.recall((1,), gallery_ids=torch.arange(3))
