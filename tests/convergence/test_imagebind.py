"""A small ImageBind that never sees sound with text or with video, and retrieves one by the other through images.

Scanned digits of scikit-learn, captions, and each digit's pair of telephone tones in noise. Half of the training
pictures come with captions, the other half with tones. `python tests/convergence/test_imagebind.py` prints the table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmfuse import use_backend
from mmfuse.models import create
from mmfuse.models.imagebind import ImageBind

datasets = pytest.importorskip("sklearn.datasets")

STEPS, HELD_OUT = 500, 300
START, FIRST_DIGIT, END, VOCAB = 0, 6, 16, 17  # the words of "a photo of the digit" are 1 to 5
# frequencies of the keys 0 to 9 of a telephone, in Hz
LOW = (941, 697, 697, 697, 770, 770, 770, 852, 852, 852)
HIGH = (1336, 1209, 1336, 1477, 1209, 1336, 1477, 1209, 1336, 1477)
RATE, SAMPLES, BINS, FRAMES = 4000, 1024, 40, 15
CONFIG = {
    "out_embed_dim": 24,
    "vision_img_size": (3, 2, 8, 8),
    "kernel_size": (2, 4, 4),
    "audio_num_mel_bins": BINS,
    "audio_target_len": FRAMES,
    "audio_kernel_size": 8,
    "audio_stride": 5,
    "audio_drop_path": 0.0,
    "text_context_length": 8,
    "text_vocab_size": VOCAB,
    "depth_img_size": (1, 16, 16),
    "thermal_img_size": (1, 16, 16),
    "imu_img_size": (6, 16),
}
CONFIG |= {
    f"{m}_{k}": v
    for m in ("vision", "text", "audio")
    for k, v in (("embed_dim", 32), ("num_blocks", 1), ("num_heads", 2))
}
CONFIG |= {
    f"{m}_{k}": v
    for m in ("depth", "thermal", "imu")
    for k, v in (("embed_dim", 8), ("num_blocks", 1), ("num_heads", 1))
}


class Digits(NamedTuple):
    image: Tensor  # [N, 3, 8, 8]
    digit: Tensor  # [N]


def digits() -> tuple[Digits, Digits]:
    """(pictures to train on, those held out)."""
    images, classes = (torch.from_numpy(t) for t in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = (images.float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)[order]
    classes = classes[order]
    return Digits(images[HELD_OUT:], classes[HELD_OUT:]), Digits(images[:HELD_OUT], classes[:HELD_OUT])


def say(digit: Tensor, generator: torch.Generator) -> Tensor:
    """Log spectrograms [N, 1, BINS, FRAMES] of the digits' tones, of any loudness and phase, in noise half as loud."""
    n = len(digit)
    t = torch.arange(SAMPLES) / RATE
    wave = 0.5 * torch.randn(n, SAMPLES, generator=generator)
    for tones in (LOW, HIGH):
        frequency = torch.tensor(tones)[digit][:, None] * (1 + 0.01 * torch.randn(n, 1, generator=generator))
        loudness = 0.7 + torch.rand(n, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(n, 1, generator=generator)
        wave += loudness * torch.sin(2 * math.pi * frequency * t + phase)
    power = torch.stft(wave, 128, 64, window=torch.hann_window(128), center=False, return_complex=True).abs().square()
    low = round(600 / RATE * 128)
    return (power[:, None, low : low + BINS, :FRAMES].add(1e-3).log() - 3) / 2


def describe(digit: Tensor) -> Tensor:
    """Ids of "a photo of the digit seven"."""
    caption = torch.tensor([START, 1, 2, 3, 4, 5, 0, END]).repeat(len(digit), 1)
    caption[:, 6] = FIRST_DIGIT + digit
    return caption


def one_of_each(digit: Tensor) -> Tensor:
    """A row of each digit 0 to 9, so that no pair of a batch is another's positive."""
    return torch.multinomial((digit == torch.arange(10)[:, None]).float(), 1)[:, 0]


def film(image: Tensor) -> Tensor:
    """Two clips [N, 2, 3, 2, 8, 8] of two frames: the picture still, and moving by a pixel."""
    moved = image.roll(1, dims=-1)
    return torch.stack([torch.stack([image, image], 2), torch.stack([image, moved], 2)], 1)


def train(steps: int = STEPS, seed: int = 0) -> tuple[ImageBind, Tensor]:
    """Each step has pairs of picture and caption, and other pairs of picture and tones, in one grouped loss."""
    torch.manual_seed(seed)
    model = create("imagebind", CONFIG)
    pictures, _ = digits()
    half = len(pictures.image) // 2
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS, pct_start=0.1)
    curve = []
    for _ in range(steps):
        with_text, with_sound = one_of_each(pictures.digit[:half]), half + one_of_each(pictures.digit[half:])
        sound = say(pictures.digit[with_sound], generator)
        inputs = {
            "vision": pictures.image[with_text],
            "text": describe(pictures.digit[with_text]),
            "audio": (pictures.image[with_sound], sound),
        }
        loss = model.loss(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.detach())
    return model.eval(), torch.stack(curve)


@torch.no_grad()
def retrieval(model: ImageBind) -> dict[str, float]:
    """R@1 on held-out pictures and fresh sounds: the best of ten captions, or of all films, is of the digit."""
    _, pictures = digits()
    every = torch.arange(10)
    inputs = {
        "vision": pictures.image,
        "text": describe(every),
        "audio": say(pictures.digit, torch.Generator().manual_seed(99)),
    }
    found = model(inputs)
    video = model({"vision": film(pictures.image)})["vision"]
    heard, captions = found["audio"], found["text"]

    def right(query: Tensor, gallery: Tensor, of_query: Tensor, of_gallery: Tensor) -> float:
        return (of_gallery[(query @ gallery.T).argmax(1)] == of_query).float().mean().item()

    return {
        "image to text": right(found["vision"], captions, pictures.digit, every),
        "image to audio": right(found["vision"], heard, pictures.digit, pictures.digit),
        "audio to text": right(heard, captions, pictures.digit, every),
        "text to audio": right(captions, heard, every, pictures.digit),
        "audio to video": right(heard, video, pictures.digit, pictures.digit),
        "video to audio": right(video, heard, pictures.digit, pictures.digit),
    }


def test_images_bind_what_never_met() -> None:
    with use_backend("chunked"):  # such small batches would step aside
        model, curve = train()
    assert curve[-10:].mean() < 0.7 * curve[:10].mean()
    chance = 0.1
    found = retrieval(model)
    assert found["audio to text"] > 5 * chance and found["audio to video"] > 5 * chance, found


if __name__ == "__main__":
    import sys
    import time

    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
        start = time.perf_counter()
        model, curve = train(seed=seed)
        print(
            seed,
            {k: round(v, 3) for k, v in retrieval(model).items()},
            f"{time.perf_counter() - start:.1f} s",
            curve[[0, -1]],
        )
