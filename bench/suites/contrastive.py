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
from mmfuse.bench import inputs
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import TEMPERATURE, differentiated, features, pair, scalar
from mmfuse.bench.providers import Anchor, Load, amp, auto_chunked, compiled, eager, gpu, products, torch_chunked
from mmfuse.kernels import clip_loss, siglip_loss

_Loss = Callable[..., Tensor]


def _siglip_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    return *pair(device, dtype, N, D), *(scalar(v, device, dtype) for v in (10.0, -10.0))


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


def _references(name: str, loss: _Loss) -> dict[str, Load]:
    """The formula, open_clip's loss, and torch.compile of the latter where it is there."""
    once = compiled(lambda *on: _open_clip(name)(*on) if _has_open_clip() else amp(loss))
    return {"eager": eager(loss), "open_clip": _open_clip(name), "compile": once}


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
    loss = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, normalized_inputs=True, stable=False)
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


def _cross_entropy(features: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(features @ weight.T, label)


def _liger() -> _Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _two_calls(partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32))


def _cut_cross_entropy() -> _Loss:
    from cut_cross_entropy import linear_cross_entropy

    # its default skips the small probabilities, which here are the whole repulsion between negatives
    return _two_calls(partial(linear_cross_entropy, filter_eps=None))


# --- cases ----------------------------------------------------------------------------------------------------------


def _gemms(count: int) -> dict[str, Anchor]:
    return products(lambda image, text, *_: [(image, text, count)], lambda N, D: count * 2 * N * N * D, f"gemm{count}")


_case = partial(
    Case,
    definitions=("eager", "open_clip"),
    spare=lambda: "eager" if _has_open_clip() else "open_clip",
    cpu=[{"N": n, "D": 512} for n in (512, 2048, 8192)],
    # ViT-B, ViT-L and the batches that contrastive training uses
    cuda=[{"N": n, "D": d} for n, d in ((4096, 512), (32768, 768), (65536, 768))],
    growth="N",
    small={"N": 40, "D": 32},
    flops=lambda mode, N, D: (2 if mode == "fwd" else 6) * N * N * D,
    bytes=lambda mode, itemsize, N, D: (2 if mode == "fwd" else 4) * N * D * itemsize,
    anchors=_gemms(1) | _gemms(3) | _gemms(4),
    beside=lambda provider, mode: "gemm1" if mode == "fwd" else "gemm4" if "recompute" in provider else "gemm3",
)

CASES = [
    _case(
        name="clip",
        op="clip_loss",
        ours=clip_loss,
        peers={
            **_references("ClipLoss", eager_clip),
            "compile-chunked": lambda *on: _two_calls(auto_chunked(eager(_cross_entropy))(*on)),
            "torch-chunked": torch_chunked(_two_calls),
            "inf_cl": gpu(_inf_cl),
            "memeff": gpu(_memeff),
            "liger": gpu(_liger),
            "cut_cross_entropy": gpu(_cut_cross_entropy),
        },
        options={"save": ("store", "recompute")},
        inputs=inputs.clip,
        outputs=("loss", "d image", "d text", "d logit_scale"),
    ),
    _case(
        name="siglip",
        op="siglip_loss",
        ours=siglip_loss,
        peers={**_references("SigLipLoss", eager_siglip), "siglip_kernel": gpu(_siglip_kernel)},
        inputs=_siglip_inputs,
        outputs=("loss", "d image", "d text", "d logit_scale", "d logit_bias"),
    ),
]

CHECKS = [
    Check("clip_loss", "N=129 D=96", features(scale=14.3), differentiated(clip_loss)),
    Check("clip_loss", "N=129 D=96, scale 100", features(scale=100.0), differentiated(clip_loss)),
    Check("siglip_loss", "N=129 D=96", features(scale=10.0, bias=-10.0), differentiated(siglip_loss)),
    Check("siglip_loss", "N=129 D=96, scale 100", features(scale=100.0, bias=-10.0), differentiated(siglip_loss)),
]
