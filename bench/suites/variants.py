"""Variants of CLIP's loss: the global contrastive loss, and prefixes of the features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench import inputs
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, features
from mmfuse.bench.providers import Anchor, formula, products
from mmfuse.bench.suites.contrastive import eager_clip
from mmfuse.kernels import clip_loss
from mmfuse.kernels.contrastive import global_contrastive_loss, matryoshka_clip_loss

_GAMMA, _EPS = 0.2, 1e-14
_PARTS = (8, 4, 2, 1)  # prefixes of D / 8, D / 4, D / 2 and D dimensions


def _global_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    state = torch.randn(2, N, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return *inputs.clip(device, dtype, N, D), *(state - 2)


def eager_global(image: Tensor, text: Tensor, scale: Tensor, log_u: Tensor, log_w: Tensor) -> Tensor:
    """FastCLIP's FastCLIPLoss in one process, on u and w."""
    mask = 1 - torch.eye(len(image), device=image.device, dtype=image.dtype)
    positive = (image * text).sum(-1, keepdim=True)
    loss = torch.zeros((), device=image.device)
    for similarity, old in ((image @ text.T, log_u), (text @ image.T, log_w)):
        g = (torch.exp((similarity - positive) * scale) * mask).sum(-1) / (len(image) - 1)
        u = (1 - _GAMMA) * old.exp() + _GAMMA * g.detach()
        loss = loss + (g / (u + _EPS)).mean()
    return loss / scale.detach()


def eager_matryoshka(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Two cross-entropies for each prefix, normalised for itself."""
    loss = torch.zeros((), device=image.device)
    for d in _dims(image):
        x, y = (F.normalize(t[:, :d], dim=-1) for t in (image, text))
        loss = loss + eager_clip(x, y, scale)
    return loss


def _dims(image: Tensor) -> list[int]:
    return [image.shape[1] // part for part in _PARTS]


def _global(image: Tensor, text: Tensor, scale: Tensor, u: Tensor, w: Tensor, backend: str | None = None) -> Tensor:
    return global_contrastive_loss(image, text, scale, u, w, _GAMMA, backend=backend)[0]


def _matryoshka(image: Tensor, text: Tensor, scale: Tensor, backend: str | None = None) -> Tensor:
    return matryoshka_clip_loss(image, text, scale, _dims(image), backend=backend)


def _gemms(dims: Callable[[Tensor], list[int]], count: int) -> dict[str, Anchor]:
    """Those of each prefix."""

    def sides(image: Tensor, text: Tensor, *rest: Tensor) -> Iterable[tuple[Tensor, Tensor, int]]:
        return ((image[:, :d], text[:, :d], count) for d in dims(image))

    return products(sides, lambda N, D: count * 2 * N * N * sum(dims(torch.empty(0, D))), f"gemm{count}")


def _case(dims: Callable[[Tensor], list[int]], **facts: Any) -> Case:
    anchors = _gemms(dims, 1) | _gemms(dims, 3)
    return Case(
        outputs=("loss", "d image", "d text", "d logit_scale"),
        cpu=[{"N": n, "D": 512} for n in (512, 2048)],
        cuda=[{"N": n, "D": d} for n, d in ((4096, 512), (8192, 768))],
        growth="N",
        small={"N": 40, "D": 32},
        flops=lambda mode, N, D: anchors["gemm1" if mode == "fwd" else "gemm3"].flops(N=N, D=D),
        bytes=lambda mode, itemsize, N, D: (2 if mode == "fwd" else 4) * N * D * itemsize,
        anchors=anchors,
        beside=lambda provider, mode: "gemm1" if mode == "fwd" else "gemm3",
        **facts,
    )


CASES = [
    _case(
        lambda image: [image.shape[1]],
        name="global_contrastive",
        op="global_contrastive_loss",
        ours=_global,
        peers=formula(eager_global),
        inputs=_global_inputs,
    ),
    _case(
        _dims,
        name="matryoshka",
        op="grouped_clip_loss",
        ours=_matryoshka,
        peers=formula(eager_matryoshka),
        inputs=inputs.clip,
    ),
]


def _first_step(image: Tensor, text: Tensor, scale: Tensor, backend: str | None) -> Tensor:
    u = torch.linspace(-4, 4, len(image), dtype=scale.dtype, device=image.device)
    return _global(image, text, scale, u, u.flip(0), backend=backend)


CHECKS = [
    Check("global_contrastive_loss", "N=129 D=96", features(scale=14.3), differentiated(_first_step)),
    Check("global_contrastive_loss", "N=129 D=96, scale 100", features(scale=100.0), differentiated(_first_step)),
    Check(
        "clip_loss", "N=129 D=96, decoupled", features(scale=14.3), differentiated(partial(clip_loss, decoupled=True))
    ),
    Check("grouped_clip_loss", "prefixes of 12 to 96", features(scale=14.3), differentiated(_matryoshka)),
]
