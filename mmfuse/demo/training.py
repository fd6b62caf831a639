"""The small CLIP of `digits.py` trained twice: with open_clip's loss, and with the fused one in its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmfuse.bench import memory
from mmfuse.bench.report import memory as size
from mmfuse.demo import digits, plots
from mmfuse.demo.digits import Digits, Trained
from mmfuse.demo.page import Page
from mmfuse.fused import ClipLoss
from mmfuse.models.clip import CLIP

if TYPE_CHECKING:
    from mmfuse.demo import Settings


def show(page: Page, settings: Settings) -> CLIP:
    """The section; returns the model that was trained with the fused loss."""
    import open_clip

    page.section("Training")
    steps, batch = settings.of(500, 60), settings.of(128, 64)
    data, held_out = digits.load(settings.device)
    eager_loss = open_clip.ClipLoss()
    eager = train(page, "eager loss", eager_loss, data, held_out, steps, batch)
    fused = train(page, "fused loss", ClipLoss(), data, held_out, steps, batch)

    parameters = sum(p.numel() for p in fused.model.parameters())
    page.text(
        f"A CLIP of {parameters:,} parameters learns scikit-learn's handwritten digits ({len(data.grey)} images of "
        f"8 x 8 pixels) and the colour of their ink from captions, in {steps} steps of {batch} pairs: the same seed, "
        "images and captions with both losses. It names a image by the nearest of the 80 captions, zero-shot; "
        f"accuracy is over {len(held_out.grey)} images held out."
    )
    page.table(
        ("", "last loss", "ms per step", "zero-shot accuracy", "digit and ink"),
        [
            (name, f"{run.losses[-20:].mean():.4f}", f"{1e3 * run.seconds / steps:.1f}", f"{digit:.2%}", f"{both:.2%}")
            for name, run in (("open_clip.ClipLoss", eager), ("mmfuse.fused.ClipLoss", fused))
            for digit, both in [accuracy(run.model, held_out)]
        ],
    )
    page.figure(
        "training",
        "The loss of every step, eager and fused, their difference, and the accuracy on the way.",
        plots.training(eager, fused),
    )
    found = digits.similarities(fused.model, held_out).cpu()
    page.figure(
        "digits",
        "Held-out digits under the caption that the model finds nearest (wrong ones are crossed), and the similarity "
        "of each digit's images with the nearest caption of every digit: the mean cosine.",
        plots.samples(held_out, found),
    )
    apart = (fused.losses - eager.losses)[:50].abs().max().item()
    page.claim(apart < 1e-4, f"the first 50 losses differ by less than 1e-4 (at most {apart:.1e})")
    if not settings.quick:
        shares = [accuracy(run.model, held_out)[0] for run in (eager, fused)]
        named = " and ".join(f"{share:.2%}" for share in shares)
        page.claim(min(shares) > 0.9, f"zero-shot accuracy is above 90% with both losses ({named})")
        page.claim(abs(shares[0] - shares[1]) <= 0.01, "the two accuracies are within one point")
    if settings.device.type == "cuda":
        page.text("Where the matrix of logits is large, a whole step of training costs:")
        rows = ((name, *cost(loss, data, 8192)) for name, loss in (("eager", eager_loss), ("fused", ClipLoss())))
        page.table(("batch of 8192", "ms per step", "peak memory"), rows)
    return fused.model


def train(page: Page, name: str, loss: nn.Module, data: Digits, held_out: Digits, steps: int, batch: int) -> Trained:
    """`digits.train` with a bar, and a look at the accuracy twenty times on the way."""
    found: list[tuple[int, float]] = []
    looking = 0.0

    def each(step: int, model: CLIP) -> None:
        nonlocal looking
        tick(f"{name}, step {step + 1} of {steps}", step + 1)
        if (step + 1) % max(1, steps // 20) == 0:
            start = time.perf_counter()
            found.append((step + 1, accuracy(model, held_out)[0]))
            looking += time.perf_counter() - start

    start = time.perf_counter()
    with _one_thread(), page.progress(steps) as tick:
        model, losses = digits.train(loss, data, steps, batch, each)
    return Trained(model, losses, found, time.perf_counter() - start - looking)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain little from a second thread, and lose much to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def accuracy(model: CLIP, data: Digits) -> tuple[float, float]:
    """Shares of the images whose nearest caption has the right digit, and the right ink as well."""
    nearest = digits.similarities(model, data).flatten(1).argmax(1)
    digit = nearest % 10 == data.digit
    ink = nearest // 10 == torch.arange(len(nearest), device=nearest.device) % len(digits.INKS)
    return digit.float().mean().item(), (digit & ink).float().mean().item()


def cost(loss: nn.Module, data: Digits, batch: int, steps: int = 5) -> tuple[str, str]:
    """Milliseconds and peak memory of a whole step."""
    digits.train(loss, data, 1, batch)
    start = time.perf_counter()
    _, peak = memory.peak(lambda: digits.train(loss, data, steps, batch), data.grey.device)
    return f"{1e3 * (time.perf_counter() - start) / steps:.1f}", size(peak)
