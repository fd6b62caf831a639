"""Variants of CLIP's loss: the global contrastive loss, and prefixes of the features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, differentiated
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels._runtime import Op
from mmfuse.kernels.contrastive import clip_loss, global_contrastive_loss, matryoshka_clip_loss
from mmfuse.kernels.contrastive.global_loss.op import GLOBAL
from mmfuse.kernels.contrastive.grouped.op import GROUPED

_Fn = Callable[..., Tensor]

_TEMPERATURE, _GAMMA, _EPS = 0.07, 0.2, 1e-14
_PARTS = (8, 4, 2, 1)  # prefixes of D / 8, D / 4, D / 2 and D dimensions


def _inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    image, noise = (F.normalize(torch.randn(N, D, device=device), dim=-1) for _ in range(2))
    text = F.normalize(0.3 * image + 0.954 * noise, dim=-1)
    scale = torch.tensor(1 / _TEMPERATURE, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return *(t.to(dtype).requires_grad_() for t in (image, text)), scale.requires_grad_()


def _global_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    state = torch.randn(2, N, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return *_inputs(device, dtype, N, D), *(state - 2)


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
    label = torch.arange(len(image), device=image.device)
    loss = torch.zeros((), device=image.device)
    for d in _dims(image):
        x, y = (F.normalize(t[:, :d], dim=-1) for t in (image, text))
        loss = loss + (F.cross_entropy(scale * x @ y.T, label) + F.cross_entropy(scale * y @ x.T, label)) / 2
    return loss


def _dims(image: Tensor) -> list[int]:
    return [image.shape[1] // part for part in _PARTS]


def _global(image: Tensor, text: Tensor, scale: Tensor, u: Tensor, w: Tensor, backend: str | None = None) -> Tensor:
    return global_contrastive_loss(image, text, scale, u, w, _GAMMA, backend=backend)[0]


def _matryoshka(image: Tensor, text: Tensor, scale: Tensor, backend: str | None = None) -> Tensor:
    return matryoshka_clip_loss(image, text, scale, _dims(image), backend=backend)


def _products(dims: Callable[[Tensor], list[int]], count: int) -> Anchor:
    """X YT, then G Y, then GT X of each prefix: the first `count` of them."""

    def load(device: torch.device, dtype: torch.dtype) -> _Fn:
        def run(image: Tensor, text: Tensor, *rest: Tensor) -> Tensor:
            for d in dims(image):
                x, y = image[:, :d], text[:, :d]
                u = x @ y.T
                if count == 3:
                    u @ y, u.T @ x
            return u

        return run

    return Anchor(load, lambda N, D: count * 2 * N * N * sum(dims(torch.empty(0, D))))


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    features = torch.empty(2048, 512, device=device, dtype=dtype)
    return features, features


def _default(op: Op, device: torch.device, dtype: torch.dtype) -> list[str]:
    other = device.type == "cuda" and chosen(op, 2, _probe(device, dtype)) != "triton"
    return ["eager", "compile", "mmfuse", *(["mmfuse-triton"] if other else []), "mmfuse-chunked"]


def _case(
    name: str, op: Op, loss: _Fn, formula: _Fn, inputs: Callable[..., Any], dims: Callable[[Tensor], list[int]]
) -> Case:
    anchors = {f"gemm{count}": _products(dims, count) for count in (1, 3)}
    return Case(
        name=name,
        inputs=inputs,
        outputs=("loss", "d image", "d text", "d logit_scale"),
        providers={"eager": eager(formula), "compile": compiled(eager(formula)), **ours(op, loss, _probe)},
        definitions=("eager",),
        chosen=partial(chosen, op, 2),
        default=partial(_default, op),
        dims=("N", "D"),
        shapes={
            "cpu": [{"N": n, "D": 512} for n in (512, 2048)],
            "cuda": [{"N": n, "D": d} for n, d in ((4096, 512), (8192, 768))],
        },
        growth="N",
        small={"N": 40, "D": 32},
        flops=lambda mode, N, D: anchors["gemm1" if mode == "fwd" else "gemm3"].flops(N=N, D=D),
        bytes=lambda mode, itemsize, N, D: (2 if mode == "fwd" else 4) * N * D * itemsize,
        anchors=anchors,
        anchor=lambda provider, mode: "gemm1" if mode == "fwd" else "gemm3",
    )


CASES = [
    _case("global_contrastive", GLOBAL, _global, eager_global, _global_inputs, lambda image: [image.shape[1]]),
    _case("matryoshka", GROUPED, _matryoshka, eager_matryoshka, _inputs, _dims),
]


def _check_inputs(scale: float) -> Callable[[torch.device], dict[str, Tensor]]:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        image, text = (F.normalize(torch.randn(129, 96), dim=-1).to(device) for _ in range(2))
        return {"image": image, "text": text, "scale": torch.tensor(scale, device=device)}

    return inputs


def _first_step(image: Tensor, text: Tensor, scale: Tensor, backend: str) -> Tensor:
    u = torch.linspace(-4, 4, len(image), dtype=scale.dtype, device=image.device)
    return _global(image, text, scale, u, u.flip(0), backend=backend)


CHECKS = [
    Check("global_contrastive_loss", "N=129 D=96", _check_inputs(14.3), differentiated(_first_step)),
    Check("global_contrastive_loss", "N=129 D=96, scale 100", _check_inputs(100.0), differentiated(_first_step)),
    Check(
        "clip_loss", "N=129 D=96, decoupled", _check_inputs(14.3), differentiated(partial(clip_loss, decoupled=True))
    ),
    Check("grouped_clip_loss", "prefixes of 12 to 96", _check_inputs(14.3), differentiated(_matryoshka)),
]
