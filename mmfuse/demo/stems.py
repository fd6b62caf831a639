"""The stem of timm's ViT-B/16 on the bytes of images, before and after `accelerate()`: tokens, errors, time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.demo.page import Page
from mmfuse.demo.swap import photographs
from mmfuse.kernels._runtime.numerics import error_and_bound

if TYPE_CHECKING:
    from mmfuse.demo import Settings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def show(page: Page, settings: Settings) -> None:
    from timm.models.vision_transformer import VisionTransformer

    page.section("Bytes to tokens")
    _, images = photographs()
    pixels = (images * 255).round().to(torch.uint8).to(settings.device)
    # mirrored and upside down as well
    pixels = torch.cat([pixels.flip(dims) for dims in ((), (-1,), (-2,), (-1, -2))])
    torch.manual_seed(0)
    model = VisionTransformer(depth=0, num_classes=0, global_pool="").to(settings.device).eval()
    model.norm = nn.Identity()
    nn.init.normal_(model.cls_token)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(_normalised(pixels.double()))
        eager = partial(_eager, model, pixels)
        own = eager()
        fused_model = copy.deepcopy(model)
        report = mmfuse.accelerate(fused_model, uint8=(MEAN, STD))
        fused = partial(fused_model, pixels)
        error, allowed, of_eager = error_and_bound(fused(), own, exact)
        seconds = _timed([eager, fused], settings.of(9, 1))
    page.text(
        f"{len(pixels)} images of 224 x 224 x 3 bytes, through a timm ViT-B/16 without its blocks. Eager makes "
        "floats of them, normalises them, convolves, puts the class token in front and adds the positions; "
        "accelerated, this is one operator that takes the bytes. Errors are against float64; medians, one after the "
        "other in turn."
    )
    page.pre(f"{report}")
    page.table(
        ("stem", "ms", "error"),
        [
            ("eager", f"{1e3 * seconds[0]:.1f}", f"{of_eager:.1e}"),
            ("accelerated", f"{1e3 * seconds[1]:.1f}", f"{error:.1e}"),
        ],
        left=1,
    )
    page.claim(error <= allowed and bool(report.replaced), "timm's ViT-B/16: accelerated, it takes bytes as they are")


def _eager(model: Any, pixels: Tensor) -> Tensor:
    return model(_normalised(pixels.float()))


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.div(255).sub_(mean).div_(std)


def _timed(runs: list[Callable[[], Tensor]], times: int) -> list[float]:
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(times):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run().cpu()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]
