"""A small CoCa trained on scikit-learn's digits and their captions: the fused loss follows the eager one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse import use_backend
from mmfuse.models import create
from mmfuse.models.coca import CoCa

datasets = pytest.importorskip("sklearn.datasets")

STEPS, BATCH, HELD_OUT = 160, 64, 300
PAD, START, END, FIRST_DIGIT, VOCAB = 0, 1, 2, 8, 18  # the words of "a photo of the digit" are 3 to 7
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 8,
        "patch_size": 4,
        "layers": 1,
        "width": 64,
        "head_width": 32,
        "attentional_pool": True,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
    },
    "text_cfg": {"context_length": 9, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 1, "embed_cls": True},
    "multimodal_cfg": {"context_length": 9, "width": 32, "heads": 2, "layers": 1},
}


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, captions "a photo of the digit seven", one in four "seven", and classes."""
    images, classes = (torch.from_numpy(t) for t in datasets.load_digits(return_X_y=True))
    images = (images.float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    long = describe(classes)
    short = torch.full_like(long, PAD)
    short[:, 0], short[:, 1], short[:, 2] = START, FIRST_DIGIT + classes, END
    captions = torch.where(torch.arange(len(classes))[:, None] % 4 == 0, short, long)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return images[order], captions[order], classes[order]


def describe(classes: Tensor) -> Tensor:
    captions = torch.tensor([START, 3, 4, 5, 6, 7, 0, END, PAD]).repeat(len(classes), 1)
    captions[:, 6] = FIRST_DIGIT + classes
    return captions


def eager(model: CoCa, image: Tensor, text: Tensor) -> Tensor:
    out = model(image, text)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    label = torch.arange(len(logits))
    contrastive = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    return contrastive + 2 * F.cross_entropy(out["logits"].mT, out["labels"], ignore_index=PAD)


def train(loss, steps: int) -> tuple[CoCa, Tensor]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = create("coca", CONFIG)
    images, captions, _ = (t[HELD_OUT:] for t in digits())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / STEPS))
    curve = []
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        value = loss(model, images[rows], captions[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        curve.append(value.detach())
    return model, torch.stack(curve)


def test_it_learns_to_name_digits() -> None:
    with use_backend("chunked"):  # such small batches would step aside
        model, got = train(CoCa.loss, STEPS)
    _, want = train(eager, 40)
    torch.testing.assert_close(got[:40], want, rtol=0, atol=1e-4)
    assert got[-10:].mean() < 0.5 * got[:10].mean()
    images, _, classes = (t[:HELD_OUT] for t in digits())
    options = {"sot_token_id": START, "eos_token_id": END, "seq_len": 9, "min_seq_len": 0}
    captions = model.eval().generate(images, generation_type="top_k", fixed_output_length=True, **options)
    right = (captions == describe(classes)).all(1)
    assert right.float().mean() > 0.8
