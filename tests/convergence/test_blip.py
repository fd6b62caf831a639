"""A tiny BLIP on scikit-learn's digits and their captions.

As tests: the fused losses follow the eager ones, and fall. As a program (some minutes,
`PYTHONPATH=tests python -m convergence.test_blip`): what CapFilt is worth when 30 % of the captions are shuffled.
Its result is in models/README.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmfuse import use_backend
from mmfuse.models.blip import Features, Losses, Pretraining, bootstrap

pytest.importorskip("sklearn.datasets")

from convergence.captions import BERT, LENGTH, VIT, Pairs, pairs, start, tokens, train  # noqa: E402  (needs scikit-learn)
from mmfuse.demo.digits import DIGITS, WORDS, Digits, caption, load  # noqa: E402

_DEC = BERT["vocab_size"]
CONFIG = {
    "variant": "pretrain",
    "config": {"image_size": 8, "embed_dim": 32, "queue_size": 64, "momentum": 0.95},
    "med_config": BERT,
    "vit": VIT,
    "tokenizer": {
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": _DEC,
        "enc_token_id": _DEC + 1,
        "len": _DEC + 2,
    },
    "prompt_ids": (1, 2),  # none
}
_ENDS = {"max_length": LENGTH - 1, "min_length": 1}


def named(ids: Tensor) -> Tensor:
    """The digit [N] that texts [N, L] name, -1 where none is."""
    words = torch.tensor([4 + WORDS.index(word) for word in DIGITS])
    found = (ids[..., None] == words).any(-2).double()
    return torch.where(found.sum(-1) == 1, found.argmax(-1), -1)


class Accuracy(NamedTuple):
    similar: float  # share of new pictures whose most similar caption of ten is right
    match: float  # the same, of the three most similar the one that matches best
    written: float  # share of new pictures whose own caption names the digit


@torch.no_grad()
def accuracy(model: Pretraining, digits: Digits) -> Accuracy:
    image, right = pairs(digits).image[: len(digits.digit)], digits.digit
    ids = torch.stack([tokens(caption(0, digit)) for digit in range(10)])
    mask = ids.ne(0).long()
    (image_embeds, image_feat), (text_embeds, text_feat) = model.encode_image(image), model.encode_text(ids, mask)
    similar = ((image_feat @ text_feat.T).argmax(1) == right).double().mean().item()
    ranking, _ = model.retrieve(Features(image_embeds, text_embeds, image_feat, text_feat), ids, mask, k=3)
    written = named(model.generate(image, num_beams=3, **_ENDS)) == right
    return Accuracy(similar, ranking.recall((1,), right, torch.arange(10))[1], written.double().mean().item())


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load(torch.device("cpu"))


def test_the_curves_agree_and_fall(digits: tuple[Digits, Digits]) -> None:
    torch.manual_seed(0)
    data, curves = pairs(digits[0]), []
    for backend in ("chunked", "torch"):
        with use_backend(backend):
            curves.append(train(start("blip", CONFIG), data, 60, 32, alpha=0.4))
    fused, eager = curves
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    # matching needs some hundred steps before it leaves the prior
    ita_and_lm = [0, 2]
    assert (eager[-10:, ita_and_lm].mean(0) < 0.85 * eager[:3, ita_and_lm].mean(0)).all(), (
        "it does not learn, so the curves say little"
    )


class FineTuned(torch.nn.Module):
    """One part of the losses of a model."""

    def __init__(self, model: Pretraining, part: Callable[[Losses], Tensor]):
        super().__init__()
        self.model, self.part = model, part

    def forward(self, *args: Tensor, **options: tuple[Tensor, Tensor]) -> Losses:
        losses = self.model(*args, **options)
        zero = losses.loss_ita.detach() * 0
        return Losses(self.part(losses), zero, zero)


def capfilt(
    human: Pairs, web: Pairs, digit: Tensor, steps: int, batch: int, seed: int
) -> tuple[dict, Pretraining, Pretraining]:
    """(numbers of the filter, the model of noisy pairs, the model of bootstrapped ones); `digit` is the web's truth."""
    noisy = start("blip", CONFIG, seed)
    train(noisy, Pairs(*(torch.cat(t) for t in zip(human, web, strict=True))), steps, batch, alpha=0.4)
    captioner, judge = copy.deepcopy(noisy), copy.deepcopy(noisy)
    train(FineTuned(captioner, lambda losses: losses.loss_lm), human, steps // 3, batch, 0.4, rate=5e-4)
    train(FineTuned(judge, lambda losses: losses.loss_ita + losses.loss_itm), human, steps // 3, batch, 0.4, rate=5e-4)
    found = bootstrap(captioner, judge, web.image, web.ids, web.ids.ne(0).long(), **_ENDS)
    right = named(found.ids) == digit[:, None]
    numbers = {"web right": right[:, 0], "synthetic right": right[:, 1], "kept": found.kept.flatten()}
    for column, name in enumerate(("web", "synthetic")):
        kept, good = found.kept[:, column], right[:, column]
        numbers |= {f"{name}: precision": good[kept], f"{name}: recall": kept[good]}
    rows, ids, _ = found.pairs
    clean = Pairs(torch.cat([human.image, web.image[rows]]), torch.cat([human.ids, ids[:, :LENGTH]]))
    bootstrapped = start("blip", CONFIG, seed)
    train(bootstrapped, clean, steps, batch, alpha=0.4)
    return {name: t.double().mean().item() for name, t in numbers.items()}, noisy, bootstrapped


def main() -> None:
    parser = argparse.ArgumentParser(description="CapFilt on digits of which some captions are shuffled")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--human", type=int, default=200, help="pictures with captions that are right")
    parser.add_argument("--shuffled", type=float, default=0.3, help="share of the other pictures' captions")
    args = parser.parse_args()
    training, held_out = load(torch.device("cpu"))
    few, rest = (Digits(*(t[part] for t in training)) for part in (slice(args.human), slice(args.human, None)))
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        human, web = pairs(few), pairs(rest, args.shuffled)
        numbers, *models = capfilt(human, web, rest.digit.repeat(2), args.steps, args.batch, seed)
        print(f"seed {seed}:", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()), flush=True)
        for name, model in zip(("noisy", "bootstrapped"), models, strict=True):
            print(
                f"  {name}:",
                ", ".join(f"{k} {v:.3f}" for k, v in accuracy(model, held_out)._asdict().items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
