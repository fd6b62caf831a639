"""Pixels to tokens: B pictures of S x S bytes, patches of P x P, width D, class token and positions; all in one buffer.

The product takes 2 B N K D floating-point operations, N = (S / P)^2 and K = 3 P^2. Besides torchvision's steps before
timm's stem, the alternatives are the recipe of vLLM (one pass that normalises, a copy into rows, a linear layer), and
the stem alone on a picture that something else has normalised already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, differentiated
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels.patch.op import PATCH_EMBED, patch_embed

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Fn = Callable[..., Tensor]


def _inputs(grad: bool, device: torch.device, dtype: torch.dtype, B: int, S: int, P: int, D: int) -> tuple[Tensor, ...]:
    """(weight, bias, class token [1, D], positions [1 + N, D], pixels)"""
    n, k = (S // P) ** 2, 3 * P * P
    shapes = ((D, 3, P, P), k**-0.5), ((D,), 0.1), ((1, D), 0.1), ((1 + n, D), 0.1)
    leaves = [(scale * torch.randn(shape, device=device)).to(dtype).requires_grad_(grad) for shape, scale in shapes]
    return (*leaves, torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, device=device))


def _per_channel(pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, dtype=dtype, device=pixels.device)[:, None, None] for v in (_MEAN, _STD))
    return mean, std


def _normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """torchvision's ToDtype(scale=True) and Normalize."""
    mean, std = _per_channel(pixels, dtype)
    return pixels.to(dtype).mul_(1 / 255).sub_(mean).div_(std)


def _join(y: Tensor, cls: Tensor, position: Tensor) -> Tensor:
    return torch.cat([cls.to(y.dtype).expand(len(y), -1, -1), y], dim=1) + position.to(y.dtype)


def _stem(x: Tensor, weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor) -> Tensor:
    """timm's PatchEmbed and _pos_embed."""
    return _join(F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2), cls, position)


def torchvision_timm(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
    x = _normalise(pixels, torch.promote_types(weight.dtype, torch.float32))
    return _stem(x, weight, bias, cls, position)


def _normalised_in(device: torch.device, dtype: torch.dtype) -> Fn:
    """The stem on a picture in the weight's dtype: what is left when normalising costs nothing."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def run(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
        if id(pixels) not in kept:
            wide = torch.promote_types(weight.dtype, torch.float32)
            kept[id(pixels)] = pixels, _normalise(pixels, wide).to(weight.dtype)
        return _stem(kept[id(pixels)][1], weight, bias, cls, position)

    return run


def _vllm(device: torch.device, dtype: torch.dtype) -> Fn:
    """vLLM, layers/fusion/mm_input_norm.py and layers/conv.py; their Triton pass is torch.compile's here."""

    def affine(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return (pixels * scale + shift).to(dtype)

    one_pass = torch.compile(affine, dynamic=False) if device.type == "cuda" else affine

    def run(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
        mean, std = _per_channel(pixels, torch.promote_types(weight.dtype, torch.float32))
        x, p = one_pass(pixels, 1 / (255 * std), -mean / std, weight.dtype), weight.shape[-1]
        rows = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(len(x), -1, weight[0].numel())
        return _join(F.linear(rows, weight.flatten(1), bias), cls, position)

    return run


def _ours(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor, **options: Any) -> Tensor:
    return patch_embed(
        pixels,
        weight,
        bias,
        mean=_MEAN,
        std=_STD,
        prefix=cls,
        position=position[1:],
        prefix_position=position[:1],
        **options,
    )


def _squares(fn: Fn, *args: Tensor, **options: Any) -> Tensor:
    y = fn(*args, **options)
    return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()


def _loss_of(load: Any) -> Any:
    return lambda device, dtype: partial(_squares, load(device, dtype))


def _product(device: torch.device, dtype: torch.dtype) -> Any:
    """The stem's own product, of rows that are there, and one copy of the bytes."""
    kept: list[Tensor] = []

    def run(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
        if not kept:  # fresh memory costs page faults, which are no part of a product
            m = len(pixels) * (len(position) - 1)
            kept[:] = weight.new_ones(m, weight[0].numel()), weight.new_empty(m, len(weight)), pixels.clone()
        kept[2].copy_(pixels)
        return torch.mm(kept[0], weight.flatten(1).T, out=kept[1])

    return run


def _flops(mode: str, B: int, S: int, P: int, D: int) -> float:
    return (2 if mode == "fwd" else 4) * B * (S // P) ** 2 * 3 * P * P * D


def _bytes(mode: str, itemsize: int, B: int, S: int, P: int, D: int) -> float:
    n = (S // P) ** 2
    once = 3 * B * S * S + (B * (n + 1) * D + 3 * P * P * D + (n + 1) * D) * itemsize
    return once if mode == "fwd" else 2 * once


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.empty(768, 3, 16, 16, device=device, dtype=dtype)
    return torch.empty(8, 3, 224, 224, device=device, dtype=torch.uint8), weight


def _default(device: torch.device, dtype: torch.dtype) -> list[str]:
    first = chosen(PATCH_EMBED, 2, _probe(device, dtype))
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" else []
    return ["eager", "compile", "normalised-in", "vllm", "mmfuse", *named, "mmfuse-chunked"]


_PROVIDERS = {
    "eager": eager(torchvision_timm),
    "compile": compiled(eager(torchvision_timm)),
    "normalised-in": _normalised_in,
    "vllm": _vllm,
}
_SHAPES = {
    "cpu": [{"B": b, "S": 224, "P": p, "D": d} for b, p, d in ((1, 16, 768), (8, 14, 1024), (32, 16, 768))],
    # ViT-B/16, and ViT-g/14 of BLIP-2 and ImageBind's size
    "cuda": [{"B": b, "S": 224, "P": p, "D": d} for b, p, d in ((32, 16, 768), (256, 16, 768), (1024, 14, 1408))],
}


def _chosen(inputs: tuple[Tensor, ...], backend: str | None = None) -> str:
    return chosen(PATCH_EMBED, 2, (inputs[4], inputs[0]), backend)


_embed = partial(
    Case,
    chosen=_chosen,
    definitions=("eager",),
    default=_default,
    dims=("B", "S", "P", "D"),
    shapes=_SHAPES,
    growth="B",
    small={"B": 3, "S": 28, "P": 14, "D": 40},
    flops=_flops,
    bytes=_bytes,
    anchors={"product": Anchor(_product, partial(_flops, "fwd"))},
    anchor=lambda provider, mode: "product",
)


def _loss(*args: Tensor, **options: Any) -> Tensor:
    return _squares(_ours, *args, **options)


CASES = [
    _embed(
        name="patch_embed",
        inputs=partial(_inputs, False),
        outputs=("tokens",),
        providers={**_PROVIDERS, **ours(PATCH_EMBED, _ours, _probe)},
        modes=("fwd",),
    ),
    _embed(
        name="patch_embed_train",
        inputs=partial(_inputs, True),
        outputs=("loss", "d weight", "d bias", "d cls", "d position"),
        providers={
            **{name: _loss_of(load) for name, load in _PROVIDERS.items() if name != "compile"},
            "compile": compiled(_loss_of(_PROVIDERS["eager"])),
            **ours(PATCH_EMBED, _loss, _probe),
        },
        modes=("fwd+bwd",),
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    d, n = 48, 6
    pixels = torch.randint(0, 256, (3, 3, 28, 42), dtype=torch.uint8, device=device)
    shapes = {"weight": (d, 3, 14, 14), "bias": (d,), "prefix": (2, d), "position": (n, d), "mask_token": (d,)}
    values = {
        name: torch.randn(shape, device=device) * (0.04 if name == "weight" else 1.0) for name, shape in shapes.items()
    }
    return {"pixels": pixels, **values, "norm": 1 + 0.1 * torch.randn(d, device=device)}


def _weighted(y: Tensor) -> Tensor:
    # weights that differ, so that a gradient in the wrong place shows
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()


def _check_norms(
    pixels: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, position: Tensor, mask_token: Tensor, norm: Tensor,
    backend: str,
) -> Tensor:  # fmt: skip
    mask = torch.arange(18, device=pixels.device).view(3, 6) % 4 == 1
    more: dict[str, Any] = {
        "mask": mask,
        "mask_token": mask_token,
        "stem_norm": (norm, None, 1e-5),
        "pre_norm": (norm, bias, 1e-6),
    }
    y = patch_embed(
        pixels, weight, bias, mean=_MEAN, std=_STD, prefix=prefix, position=position, **more, backend=backend
    )
    return _weighted(y)


def _check_kept(
    pixels: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, position: Tensor, mask_token: Tensor, norm: Tensor,
    backend: str,
) -> Tensor:  # fmt: skip
    ids = torch.tensor([[4, 0], [1, 5], [3, 2]], device=pixels.device)
    y = patch_embed(
        pixels, weight, bias, mean=_MEAN, std=_STD, prefix=prefix, position=position, ids_keep=ids, backend=backend
    )
    return _weighted(y) + 0 * (mask_token.sum() + norm.sum())


CHECKS = [
    Check("patch_embed", "28x42 / 14, norms and mask", _check_inputs, differentiated(_check_norms)),
    Check("patch_embed", "28x42 / 14, kept patches", _check_inputs, differentiated(_check_kept)),
]
