"""A small CLIP that learns scikit-learn's handwritten digits, and the colour of their ink, from captions alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models import create
from mmfuse.models.clip import CLIP

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.9, 0.2),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.2),
    "purple": (0.7, 0.3, 0.9),
    "orange": (1.0, 0.6, 0.1),
    "cyan": (0.2, 0.9, 0.9),
}
TEMPLATES = (
    "the digit {digit} in {ink}",
    "a handwritten {digit} in {ink}",
    "{ink} {digit}",
    "number {digit} written in {ink} ink",
)

WORDS = sorted({word for t in TEMPLATES for word in t.split() if "{" not in word} | {*DIGITS, *INKS})
LENGTH = 7  # of a text in tokens
CONFIG = {
    "embed_dim": 64,
    "image_resolution": 8,
    "vision_layers": 3,
    "vision_width": 96,
    "vision_patch_size": 4,
    "vision_heads": 2,
    "context_length": LENGTH,
    "vocab_size": len(WORDS) + 2,  # padding first, the end of a text last
    "transformer_width": 64,
    "transformer_heads": 2,
    "transformer_layers": 2,
}


class Digits(NamedTuple):
    grey: Tensor  # [N, 8, 8] in [0, 1]
    digit: Tensor  # [N]


class Trained(NamedTuple):
    model: CLIP
    losses: Tensor  # [steps]
    accuracy: list[tuple[int, float]]  # (steps done, share of the held-out digits named right)
    seconds: float


def load(device: torch.device) -> tuple[Digits, Digits]:
    """1200 images to train on, and 597 to be judged by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    grey = torch.tensor(data.images, dtype=torch.float32)[order].to(device) / 16
    digit = torch.tensor(data.target)[order].to(device)
    return Digits(grey[:1200], digit[:1200]), Digits(grey[1200:], digit[1200:])


def paint(grey: Tensor, ink: Tensor) -> Tensor:
    """Images [N, 8, 8] as the model sees them, [N, 3, 8, 8], each in its ink."""
    colour = torch.tensor(list(INKS.values()), device=grey.device)[ink]
    return (grey[:, None] * colour[:, :, None, None] - 0.25) / 0.35


def caption(ink: int, digit: int, template: int = 0) -> str:
    return TEMPLATES[template].format(ink=list(INKS)[ink], digit=DIGITS[digit])


def tokenize(texts: Iterable[str]) -> Tensor:
    """Word ids [N, LENGTH]."""
    ids = [[*(1 + WORDS.index(word) for word in text.split()), len(WORDS) + 1] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in ids])


def train(
    loss: nn.Module, data: Digits, steps: int, batch: int, each: Callable[[int, CLIP], None] = lambda step, model: None
) -> tuple[CLIP, Tensor]:
    """A trained model and the loss of every step. Same seed, same images, same captions for every `loss`."""
    device = data.grey.device
    torch.manual_seed(0)
    texts = tokenize(caption(*which) for which in product(range(len(INKS)), range(10), range(len(TEMPLATES))))
    texts = texts.view(len(INKS), 10, len(TEMPLATES), LENGTH).to(device)
    model = cast(CLIP, create("clip", CONFIG)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    # warm-up, then a cosine down to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    losses = []
    for step in range(steps):
        which, ink, template = (
            torch.randint(n, (batch,)).to(device) for n in (len(data.grey), len(INKS), len(TEMPLATES))
        )
        image = model.encode_image(paint(data.grey[which], ink))
        text = model.encode_text(texts[ink, data.digit[which], template])
        value = loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), model.logit_scale.exp())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
        each(step, model)
    return model, torch.stack(losses).cpu()


@torch.no_grad()
def similarities(model: CLIP, data: Digits) -> Tensor:
    """Cosines [N, inks, digits] of images with every caption; image i is in ink i modulo their number."""
    ink = torch.arange(len(data.grey), device=data.grey.device) % len(INKS)
    texts = tokenize(caption(*which) for which in product(range(len(INKS)), range(10)))
    image = F.normalize(model.encode_image(paint(data.grey, ink)), dim=-1)
    text = F.normalize(model.encode_text(texts.to(image.device)), dim=-1)
    return (image @ text.T).view(-1, len(INKS), 10)
