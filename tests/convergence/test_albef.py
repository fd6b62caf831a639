"""A tiny ALBEF on scikit-learn's digits and their captions.

As tests: the fused losses follow the eager ones, and fall. As a program (`python tests/convergence/test_albef.py`,
some minutes): what momentum distillation is worth when 30 % of the captions are shuffled. Its result is in
models/README.md.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmfuse import use_backend
from mmfuse.models import create
from mmfuse.models.albef import ALBEF, Features

pytest.importorskip("sklearn.datasets")

from mmfuse.demo.digits import TEMPLATES, WORDS, Digits, caption, load, paint  # noqa: E402  (needs scikit-learn)

LENGTH = 9  # [CLS], up to 7 words, [SEP]
CONFIG = {
    "variant": "pretrain",
    "config": {
        "image_res": 8,
        "vision_width": 64,
        "embed_dim": 32,
        "temp": 0.07,
        "mlm_probability": 0.15,
        "queue_size": 64,
        "momentum": 0.95,
    },
    "bert_config": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 4 + len(WORDS),
        "fusion_layer": 1,
        "encoder_width": 64,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.06,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "vit": {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2},
    "tokenizer": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3},
}


class Pairs(NamedTuple):
    image: Tensor  # [N, 3, 8, 8]
    ids: Tensor  # [N, LENGTH]


def tokens(text: str) -> Tensor:
    ids = [1, *(4 + WORDS.index(word) for word in text.split()), 2]
    return torch.tensor(ids + [0] * (LENGTH - len(ids)))


def pairs(digits: Digits, shuffled: float = 0.0, inks: int = 1) -> Pairs:
    """Every picture twice, each with one of the templates' captions; a share of the pairs has its captions permuted."""
    grey, digit = digits.grey.repeat(2, 1, 1), digits.digit.repeat(2)
    ink, template = torch.arange(len(digit)) % inks, torch.randint(len(TEMPLATES), digit.shape)
    ids = torch.stack([tokens(caption(*row)) for row in torch.stack([ink, digit, template], 1).tolist()])
    wrong = torch.randperm(len(ids))[: int(shuffled * len(ids))]
    ids[wrong] = ids[wrong.roll(1)]
    return Pairs(paint(grey, ink), ids)


def train(data: Pairs, steps: int, batch: int, alpha: float, seed: int = 0) -> tuple[ALBEF, Tensor]:
    """(model, losses [steps, 3]: MLM, ITA, ITM). The same seed gives the same pairs, masks and negatives."""
    torch.manual_seed(seed)
    model = create("albef", CONFIG)
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        for weight in (p for p in encoder.parameters() if p.dim() > 1):
            weight.data.mul_(3)  # the official deviation of 0.02 is for a width of 768
    model.visual_encoder_m.load_state_dict(model.visual_encoder.state_dict())
    online = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(online, lr=2e-3, weight_decay=0.02)
    # warm-up, then a cosine down to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    curve = []
    for step in range(steps):
        rows = torch.randperm(len(data.ids))[:batch]
        ids = data.ids[rows]
        # another pair each, at random: a draw by similarity may fall otherwise after the last digit of a float
        negatives = tuple((torch.arange(batch) + torch.randint(1, batch, (batch,))) % batch for _ in range(2))
        # the share of soft targets grows at first, as in the official training
        losses = model(data.image[rows], ids, ids.ne(0).long(), alpha * min(1, step / 100), negatives=negatives)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        schedule.step()
        curve.append(torch.stack([loss.detach() for loss in losses]))
    return model.eval(), torch.stack(curve)


@torch.no_grad()
def accuracy(model: ALBEF, digits: Digits, inks: int = 1) -> tuple[float, float]:
    """Share of new pictures whose best caption of all is right: by similarity, and by match among the best three."""
    ink = torch.arange(len(digits.digit)) % inks
    ids = torch.stack([tokens(caption(*which)) for which in product(range(inks), range(10))])
    mask = ids.ne(0).long()
    (image_embeds, image_feat), (text_embeds, text_feat) = (
        model.encode_image(paint(digits.grey, ink)),
        model.encode_text(ids, mask),
    )
    right = 10 * ink + digits.digit
    similar = ((image_feat @ text_feat.T).argmax(1) == right).double().mean().item()
    ranking, _ = model.retrieve(Features(image_embeds, text_embeds, image_feat, text_feat), mask, k=3)
    return similar, ranking.recall((1,), right, torch.arange(len(ids)))[1]


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load(torch.device("cpu"))


def test_the_curves_agree_and_fall(digits: tuple[Digits, Digits]) -> None:
    torch.manual_seed(0)
    data, curves = pairs(digits[0]), []
    for backend in ("chunked", "torch"):
        with use_backend(backend):
            curves.append(train(data, 60, 32, alpha=0.4)[1])
    fused, eager = curves
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    # matching needs some hundred steps before it leaves the prior
    mlm_and_ita = slice(0, 2)
    assert (eager[-10:, mlm_and_ita].mean(0) < 0.85 * eager[:3, mlm_and_ita].mean(0)).all(), (
        "it does not learn, so the curves say little"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Momentum distillation on digits of which some captions are shuffled")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shuffled", type=float, default=0.3)
    parser.add_argument("--inks", type=int, default=1, help="colours, at most 8, which the captions name")
    args = parser.parse_args()
    training, held_out = load(torch.device("cpu"))
    for alpha in (0.0, 0.4):
        reached = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model, _ = train(pairs(training, args.shuffled, args.inks), args.steps, args.batch, alpha, seed)
            reached.append(accuracy(model, held_out, args.inks))
        for name, values in zip(("by similarity", "by match"), zip(*reached, strict=True), strict=True):
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"alpha {alpha}, {name}: {sum(values) / len(values):.3f} ({each})", flush=True)


if __name__ == "__main__":
    main()
