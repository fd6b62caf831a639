"""Scikit-learn's digits with captions, some of them wrong, and the training of a model with a momentum twin on them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.demo.digits import TEMPLATES, WORDS, Digits, caption, paint
from mmfuse.models import create

LENGTH = 9  # [CLS], up to 7 words, [SEP]
VIT = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 4 + len(WORDS),
    "encoder_width": 64,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.06,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
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


def start(name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = create(name, config)
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        for weight in (p for p in encoder.parameters() if p.dim() > 1):
            weight.data.mul_(3)  # the official deviation of 0.02 is for a width of 768
    model.visual_encoder_m.load_state_dict(model.visual_encoder.state_dict())
    return model


def train(model: Any, data: Pairs, steps: int, batch: int, alpha: float, rate: float = 2e-3) -> Tensor:
    """The losses [steps, 3]. Pairs and negatives are drawn from torch's generator, as the model's own draws are."""
    model.train()
    online = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(online, lr=rate, weight_decay=0.02)
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
    model.eval()
    return torch.stack(curve)
