"""A tiny ALBEF on scikit-learn's digits and their captions.

As tests: the fused losses follow the eager ones, and fall. As a program (some minutes,
`PYTHONPATH=tests python -m convergence.test_albef`): what momentum distillation is worth when 30 % of the captions are
shuffled. Its result is in models/README.md.
"""

from __future__ import annotations

import argparse
from itertools import product

import pytest
import torch

from mmfuse import use_backend
from mmfuse.models.albef import ALBEF, Features

pytest.importorskip("sklearn.datasets")

from convergence.captions import BERT, VIT, pairs, start, tokens, train  # noqa: E402  (needs scikit-learn)
from mmfuse.demo.digits import Digits, caption, load, paint  # noqa: E402

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
    "bert_config": BERT | {"fusion_layer": 1},
    "vit": VIT,
    "tokenizer": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3},
}


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
            curves.append(train(start("albef", CONFIG), data, 60, 32, alpha=0.4))
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
            data, model = pairs(training, args.shuffled, args.inks), start("albef", CONFIG, seed)
            train(model, data, args.steps, args.batch, alpha)
            reached.append(accuracy(model, held_out, args.inks))
        for name, values in zip(("by similarity", "by match"), zip(*reached, strict=True), strict=True):
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"alpha {alpha}, {name}: {sum(values) / len(values):.3f} ({each})", flush=True)


if __name__ == "__main__":
    main()
