"""CLIP's and SigLIP's losses against open_clip's, torch.compile of them, and the published kernels.

N pairs of unit features of D dimensions, a pair at a cosine of 0.3, and the logit scale (and bias) that training starts
from. Forward and backward need three matrix products, 6 N^2 D floating-point operations: U = X YT, G Y and GT X. What
keeps no logits computes U twice: four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse._compat import allow_torchvision
from mmfuse.bench.cases import Anchor, Case, Check, Load, differentiated
from mmfuse.bench.providers import amp, chosen, compiled, eager, ours, peer
from mmfuse.kernels._runtime import Op
from mmfuse.kernels.contrastive.op import CLIP, SIGLIP, clip_loss, siglip_loss

_Loss = Callable[..., Tensor]

_TEMPERATURE = 0.07
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0


def _features(device: torch.device, dtype: torch.dtype, N: int, D: int) -> list[Tensor]:
    image, noise = (F.normalize(torch.randn(N, D, device=device), dim=-1) for _ in range(2))
    text = F.normalize(0.3 * image + 0.954 * noise, dim=-1)
    return [t.to(dtype).requires_grad_() for t in (image, text)]


def _scalar(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    # parameters are float32 beside 16-bit features
    return torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device=device, requires_grad=True)


def _clip_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    return *_features(device, dtype, N, D), _scalar(1 / _TEMPERATURE, device, dtype)


def _siglip_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    scalars = (_scalar(v, device, dtype) for v in (_SIGLIP_SCALE, _SIGLIP_BIAS))
    return *_features(device, dtype, N, D), *scalars


# --- what the field computes ----------------------------------------------------------------------------------------


def eager_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss in one process: two products, two cross-entropies."""
    label = torch.arange(len(image), device=image.device)
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, label) + F.cross_entropy(per_text, label)) / 2


def eager_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss in one process."""
    logits = scale * image @ text.T + bias
    z = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(z * logits).sum() / len(image)


def _open_clip(name: str) -> Load:
    def load(device: torch.device, dtype: torch.dtype) -> _Loss:
        allow_torchvision()
        return amp(getattr(import_module("open_clip.loss"), name)())

    return load


@cache
def _has_open_clip() -> bool:
    try:
        _open_clip("ClipLoss")(torch.device("cpu"), torch.float32)
    except Exception:  # importing a package built for another torch can raise anything
        return False
    return True


def _compiled(name: str, loss: _Loss) -> Load:
    """torch.compile of open_clip's loss, or of the same formula where open_clip is absent."""
    return compiled(lambda *on: _open_clip(name)(*on) if _has_open_clip() else amp(loss))


# --- published kernels, for CUDA ------------------------------------------------------------------------------------


def _inf_cl() -> _Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        head = next(h for h in (256, 128, 64, 32) if image.shape[1] % h == 0)
        one = partial(cal_flash_loss, scale=scale, head_dim=head)
        return (one(image, text).mean() + one(text, image).mean()) / 2

    return loss


def _memeff() -> _Loss:
    from memeff import MemoryEfficientCLIPLoss

    # the textbook gradient; the temperature is a constant of the module
    loss = MemoryEfficientCLIPLoss(temperature=_TEMPERATURE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: loss(image, text)


def _siglip_kernel() -> _Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)


def _two_calls(cross_entropy: _Loss) -> _Loss:
    """CLIP's loss from a fused linear cross-entropy (features, weight, label), one call per direction."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label = torch.arange(len(image), device=image.device)
        return (cross_entropy(scale * image, text, label) + cross_entropy(scale * text, image, label)) / 2

    return loss


def _liger() -> _Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _two_calls(partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32))


def _cut_cross_entropy() -> _Loss:
    from cut_cross_entropy import linear_cross_entropy

    # its default skips the small probabilities, which here are the whole repulsion between negatives
    return _two_calls(partial(linear_cross_entropy, filter_eps=None))


# --- cases ----------------------------------------------------------------------------------------------------------


def _products(count: int) -> Anchor:
    """U = X YT, then G Y, then GT X, then U again: the first `count` of them."""

    def load(device: torch.device, dtype: torch.dtype) -> _Loss:
        kept: list[Tensor] = []

        def run(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
            out = kept or [image.new_empty(len(image), len(text)), torch.empty_like(image), torch.empty_like(text)]
            if device.type == "cpu":  # where fresh memory costs page faults, which are no part of a product
                kept[:] = out
            u, gy, gx = out
            torch.mm(image, text.T, out=u)
            if count > 1:
                torch.mm(u, text, out=gy)
                torch.mm(u.T, image, out=gx)
            if count > 3:
                torch.mm(image, text.T, out=u)
            return u

        return run

    return Anchor(load, lambda N, D: count * 2 * N * N * D)


def _flops(mode: str, N: int, D: int) -> float:
    return (2 if mode == "fwd" else 6) * N * N * D


def _bytes(mode: str, itemsize: int, N: int, D: int) -> float:
    return (2 if mode == "fwd" else 4) * N * D * itemsize


def _pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    features = torch.empty(1, 1, device=device, dtype=dtype)
    return features, features


def _default(op: Op, saves: tuple[str, ...], peers: list[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Every alternative once: no implementation under two names, none of another device."""
    features = torch.empty(1024, 512, device=device, dtype=dtype)
    first = chosen(op, 2, (features, features))
    named = ["", *(f"-{b}" for b in ("cuda", "triton") if device.type == "cuda" and b != first)]
    baseline = "open_clip" if _has_open_clip() else "eager"
    fused = [f"mmfuse{b}{save}" for b in named for save in ([f"[{s}]" for s in saves] or [""])]
    return [baseline, "compile", *(peers if device.type == "cuda" else []), *fused, "mmfuse-chunked"]


def _case(  # type: ignore[no-untyped-def]
    name: str, op: Op, loss: _Loss, formula: _Loss, saves: tuple[str, ...], peers: dict[str, Load], **own
) -> Case:
    reference = {"clip": "ClipLoss", "siglip": "SigLipLoss"}[name]
    return Case(
        name=name,
        providers={
            "eager": eager(formula),
            "open_clip": _open_clip(reference),
            "compile": _compiled(reference, formula),
            **peers,
            **ours(op, loss, _pair, save=saves),
        },
        definitions=("eager", "open_clip"),
        chosen=partial(chosen, op, 2),
        default=partial(_default, op, saves, list(peers)),
        dims=("N", "D"),
        shapes={
            "cpu": [{"N": n, "D": 512} for n in (512, 2048, 8192)],
            # ViT-B, ViT-L and the batches that contrastive training uses
            "cuda": [{"N": n, "D": d} for n, d in ((4096, 512), (32768, 768), (65536, 768))],
        },
        growth="N",
        small={"N": 40, "D": 32},
        flops=_flops,
        bytes=_bytes,
        anchors={f"gemm{count}": _products(count) for count in (1, 3, 4)},
        **own,
    )


CASES = [
    _case(
        "clip",
        CLIP,
        clip_loss,
        eager_clip,
        saves=("store", "recompute"),
        peers={
            "inf_cl": peer(_inf_cl),
            "memeff": peer(_memeff),
            "liger": peer(_liger),
            "cut_cross_entropy": peer(_cut_cross_entropy),
        },
        inputs=_clip_inputs,
        outputs=("loss", "d image", "d text", "d logit_scale"),
        anchor=lambda provider, mode: "gemm1" if mode == "fwd" else "gemm4" if "recompute" in provider else "gemm3",
    ),
    _case(
        "siglip",
        SIGLIP,
        siglip_loss,
        eager_siglip,
        saves=(),
        peers={"siglip_kernel": peer(_siglip_kernel)},
        inputs=_siglip_inputs,
        outputs=("loss", "d image", "d text", "d logit_scale", "d logit_bias"),
        anchor=lambda provider, mode: "gemm1" if mode == "fwd" else "gemm3",
    ),
]


def _inputs(**scalars: float) -> Callable[[torch.device], dict[str, Tensor]]:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        image, text = (F.normalize(torch.randn(129, 96), dim=-1).to(device) for _ in range(2))
        return {"image": image, "text": text, **{k: torch.tensor(v, device=device) for k, v in scalars.items()}}

    return inputs


CHECKS = [
    Check("clip_loss", "N=129 D=96", _inputs(scale=14.3), differentiated(clip_loss)),
    Check("clip_loss", "N=129 D=96, scale 100", _inputs(scale=100.0), differentiated(clip_loss)),
    Check("siglip_loss", "N=129 D=96", _inputs(scale=10.0, bias=-10.0), differentiated(siglip_loss)),
    Check("siglip_loss", "N=129 D=96, scale 100", _inputs(scale=100.0, bias=-10.0), differentiated(siglip_loss)),
]
