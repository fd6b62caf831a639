"""A tiny BLIP-2 on scikit-learn's digits: the first stage's curves, and captions of the second for unseen digits."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse import use_backend
from mmfuse._compat import allow_torchvision
from mmfuse.models import create

pytest.importorskip("sklearn.datasets")
allow_torchvision()
pytest.importorskip("transformers")

from convergence.captions import BERT, LENGTH, VIT, Pairs, pairs, tokens  # noqa: E402  (needs scikit-learn)
from mmfuse.demo.digits import Digits, caption, load, paint  # noqa: E402

_DEC = BERT["vocab_size"]
_ARGS = {"img_size": 8, "num_query_token": 4, "freeze_vit": False}
_BERT = {key: value for key, value in BERT.items() if key not in ("vocab_size", "encoder_width")}
_VIT = {key: value for key, value in VIT.items() if key != "mlp_ratio"}
STAGE_1 = {
    "class": "Blip2Qformer",
    "args": _ARGS | {"embed_dim": 32},
    "vit": _VIT,
    "bert": _BERT,
    "tokens": {"bert": {"size": _DEC + 1, "pad": 0, "cls": 1, "sep": 2, "bos_DEC": _DEC}},
}
STAGE_2 = {
    "class": "Blip2OPT",
    "args": _ARGS,
    "vit": _VIT,
    "bert": _BERT,
    "opt": {
        "vocab_size": _DEC,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "init_std": 0.06,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load(torch.device("cpu"))


def start(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = create("blip2", config)
    for weight in (p for p in model.visual_encoder.parameters() if p.dim() > 1):
        weight.data.mul_(3)  # the official deviation of 0.02 is for a width of 1408
    return model.train()


def train(parameters: Any, loss: Any, steps: int, rate: float = 2e-3) -> Tensor:
    """The losses of all steps; loss() draws its batch."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    curve = []
    for _ in range(steps):
        losses = loss()
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        curve.append(losses.detach())
    return torch.stack(curve)


# --- the first stage ------------------------------------------------------------------------------------------------


def stage_1(data: Pairs, steps: int, batch: int) -> Tensor:
    model = start(STAGE_1)

    def loss() -> Tensor:
        rows = torch.randperm(len(data.ids))[:batch]
        ids = data.ids[rows]
        # a draw by similarity may fall otherwise after the last digit of a float
        negatives = tuple((torch.arange(batch) + torch.randint(1, batch, (batch,))) % batch for _ in range(2))
        return torch.stack(list(model(data.image[rows], ids, ids.ne(0).long(), negatives=negatives)))

    return train([p for p in model.parameters() if p.requires_grad], loss, steps)


def test_the_curves_agree_and_fall(digits: tuple[Digits, Digits]) -> None:
    torch.manual_seed(0)
    data, curves = pairs(digits[0]), []
    for using in (nullcontext(), use_backend("torch")):
        with using:
            curves.append(stage_1(data, 40, 32))
    fused, eager = curves
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    # matching needs some hundred steps before it leaves the prior
    itc_and_lm = [0, 2]
    assert (eager[-10:, itc_and_lm].mean(0) < 0.85 * eager[:3, itc_and_lm].mean(0)).all(), (
        "it does not learn, so the curves say little"
    )


# --- the second stage -----------------------------------------------------------------------------------------------


def test_opt_captions_digits_that_it_has_not_seen(digits: tuple[Digits, Digits]) -> None:
    """A small OPT learns the captions as texts, and is frozen; then the Q-Former learns to prompt it."""
    training, held_out = digits
    model = start(STAGE_2)
    texts = torch.stack([tokens(caption(0, digit)) for digit in range(10)])
    masks = texts.ne(0).long()
    opt = model.opt_model.requires_grad_(True)

    def language() -> Tensor:
        return opt(texts, attention_mask=masks, labels=texts.masked_fill(texts == 0, -100)).loss

    train(opt.parameters(), language, 60)
    opt.requires_grad_(False)

    def loss() -> Tensor:
        rows = torch.randperm(len(training.digit))[:32]
        digit = training.digit[rows]
        return model(paint(training.grey[rows], torch.zeros_like(rows)), texts[digit], masks[digit]).loss

    train([p for p in model.parameters() if p.requires_grad], loss, 400, rate=4e-3)
    model.eval()
    image = paint(held_out.grey, torch.zeros_like(held_out.digit))
    begin = torch.ones(len(image), 1, dtype=torch.int64)
    how = {"max_new_tokens": LENGTH - 1, "num_beams": 3, "do_sample": False}
    written = model.generate(image, begin, torch.ones_like(begin), **how)
    right = nn.functional.pad(written, (0, LENGTH - 1 - written.shape[1])) == texts[held_out.digit, 1:]
    assert right.all(1).double().mean() > 0.9
