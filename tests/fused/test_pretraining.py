"""BLIP-2's first stage in two passes against LAVIS's four."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.fused import QFormerConfig, QFormerPretraining
from mmfuse.fused.qformer import CAPTION

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 8,
}
NEGATIVES = torch.tensor([1, 2, 0, 1]), torch.tensor([3, 0, 1, 1])


def make() -> Any:
    torch.manual_seed(0)
    model = QFormerPretraining(QFormerConfig(encoder_width=12, **SIZES), 3, 10, {"bos_DEC": 29, "pad": 0}).double()
    for p in model.parameters():
        if p.dim():
            p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids, kept = torch.randint(3, 29, (4, 6)), torch.tensor([6, 2, 4, 5])
    ids[:, 0] = 1
    mask = (torch.arange(6) < kept[:, None]).long()
    return torch.randn(4, 7, 12, dtype=torch.float64), ids * mask, mask


def four_passes(model: Any, tokens: Tensor, ids: Tensor, mask: Tensor, ids_of_images: Tensor | None) -> list[Tensor]:
    """Each objective by itself over images that are repeated; the losses are torch's."""
    x, kept, own = model.ln_vision(tokens), mask.sum(1), torch.arange(len(ids))
    project, query_tokens, decoder_ids = model.bert.project, model.query_tokens, ids.clone()
    decoder_ids[:, 0] = 29
    (query,) = model.bert(query_tokens, kv=project(x))
    (text,) = model.bert(texts=[ids], kept=[kept])
    image, text = F.normalize(model.vision_proj(query), dim=-1), F.normalize(model.text_proj(text[:, 0]), dim=-1)
    scores = torch.einsum("iqd,jd->ijq", image, text).amax(2) / model.temp
    right = torch.eye(len(ids)) if ids_of_images is None else (ids_of_images[:, None] == ids_of_images).double()
    target = 0.9 * right / right.sum(1, keepdim=True) + 0.1 / len(ids)
    itc = sum(-(target * s.log_softmax(1)).sum(1).mean() for s in (scores, scores.T)) / 2
    images, texts = (torch.cat(t) for t in ((own, NEGATIVES[0], own), (own, own, NEGATIVES[1])))
    query, _ = model.bert(query_tokens, [ids[texts]], [kept[texts]], kv=project(x[images]))
    labels = (torch.arange(3 * len(ids)) < len(ids)).long()
    itm = F.cross_entropy(model.itm_head(query).mean(1), labels)
    _, caption = model.bert(query_tokens, [decoder_ids], [kept], CAPTION, project(x))
    head = model.predictions
    logits = head.decoder(head.transform(caption))[:, :-1].transpose(1, 2)
    words = decoder_ids.masked_fill(decoder_ids == 0, -100)[:, 1:]
    return [itc, itm, F.cross_entropy(logits, words, label_smoothing=0.1)]


@pytest.mark.parametrize("image_id", [None, torch.tensor([5, 7, 5, 9])])
def test_two_passes_are_four(image_id: Tensor | None) -> None:
    model, (tokens, ids, mask) = make(), batch()
    tokens.requires_grad_()
    leaves = [tokens, *model.parameters()]
    losses = model(tokens, ids, mask, image_id, negatives=NEGATIVES), four_passes(model, tokens, ids, mask, image_id)
    for got, want in zip(*losses, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype))
        # a loss leaves out the heads of the others, and one that has a formula for it has zeros there
        grads = (torch.autograd.grad(t, leaves, retain_graph=True, materialize_grads=True) for t in (got, want))
        torch.testing.assert_close(*grads)


def test_a_qformer_without_texts_is_named() -> None:
    with pytest.raises(ValueError, match="qformer has text=False, expected True"):
        QFormerPretraining(QFormerConfig(encoder_width=12, **SIZES, text=False), 3, 10, {"bos_DEC": 29, "pad": 0})
