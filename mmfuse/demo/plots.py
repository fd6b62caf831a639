"""The demo's figures."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mmfuse.demo import digits
from mmfuse.demo.digits import Digits, Trained

_EAGER, _FUSED, _WRONG, _TEXT = "#8c8c8c", "#0b5fa5", "#b3261e", "#1b1f24"
_TITLE: dict[str, Any] = {"fontsize": 10, "loc": "left"}


def images(captions: list[str], pixels: Tensor, similarity: Tensor) -> Figure:
    """Images [N, 3, H, W] in [0, 1] under their captions, beside the similarity matrix [N, N]."""
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(7, 6))
    axes = left.subplots(2, -(-len(captions) // 2)).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, caption, image in zip(axes, captions, pixels, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy())
        ax.set_title(fill(caption, 18), fontsize=9)
    _matrix(right.subplots(), similarity, captions, captions, "{:.2f}")
    return figure


def training(eager: Trained, fused: Trained) -> Figure:
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    loss, apart, right = figure.subplots(1, 3)
    steps = range(1, len(eager.losses) + 1)
    difference = (fused.losses - eager.losses).abs().clamp(min=1e-8)
    loss.set_title("loss", **_TITLE)
    loss.plot(steps, eager.losses.numpy(), color=_EAGER, linewidth=4, alpha=0.6, label="open_clip.ClipLoss")
    loss.plot(steps, fused.losses.numpy(), color=_FUSED, linewidth=1.1, label="mmfuse.fused.ClipLoss")
    loss.legend(frameon=False, fontsize=9)
    apart.set_title("difference of the losses (equal: 1e-8)", **_TITLE)
    apart.plot(steps, difference.numpy(), color=_FUSED, linewidth=1)
    apart.plot((1, 50), (1e-4, 1e-4), color=_WRONG, linewidth=1.5)
    apart.annotate("bound, first 50 steps", (1, 1e-4), (0, 5), textcoords="offset points", fontsize=8, color=_WRONG)
    apart.set_yscale("log")
    apart.set_ylim(top=4e-4)
    right.set_title("zero-shot accuracy on held-out digits", **_TITLE)
    for run, color, width in ((eager, _EAGER, 4), (fused, _FUSED, 1.3)):
        right.plot(*zip(*run.accuracy, strict=True), color=color, linewidth=width, marker="o", markersize=width + 1.5)
    right.axhline(0.9, color=_WRONG, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for ax in (loss, apart, right):
        ax.set_xlabel("step")
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def samples(data: Digits, similarity: Tensor) -> Figure:
    """Images with the nearest caption, beside the mean similarity of each digit's images with its captions.

    similarity: cosines [N, inks, digits].
    """
    figure = Figure(figsize=(11, 4.7), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(8, 5))
    axes = left.subplots(3, 6).flatten()
    truth = data.digit.cpu()
    colours = torch.tensor(list(digits.INKS.values()))
    for i, ax in enumerate(axes):
        ink, digit = divmod(int(similarity[i].argmax()), 10)
        right_ink = i % len(colours)
        ax.imshow((data.grey[i].cpu()[:, :, None] * colours[right_ink]).numpy())
        mark, color = ("", _TEXT) if (digit, ink) == (int(truth[i]), right_ink) else ("\u2717 ", _WRONG)
        ax.set_title(mark + fill(digits.caption(ink, digit), 18), fontsize=8, color=color)
        ax.set_axis_off()
    nearest = similarity.amax(1)  # over the inks
    mean = torch.stack([nearest[truth == digit].mean(0) for digit in range(10)])
    _matrix(right.subplots(), mean, digits.DIGITS, digits.DIGITS, "{:.2f}")
    return figure


def _matrix(ax: Any, values: Tensor, rows: Any, columns: Any, form: str) -> None:
    """A heat-map with its numbers."""
    ax.imshow(values.numpy(), cmap="Blues")
    dark = values.min() + 0.65 * (values.max() - values.min())
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            color = "white" if value > dark else _TEXT
            ax.text(x, y, form.format(value), ha="center", va="center", fontsize=7, color=color)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xticks(range(len(columns)), columns, fontsize=8, rotation=35, ha="right")
    ax.set_xlabel("caption", fontsize=9)
    ax.set_ylabel("image", fontsize=9)
