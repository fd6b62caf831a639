"""Pixels to tokens: B images of S x S bytes, patches of P x P, width D, class token and positions; all in one buffer.

The product takes 2 B N K D floating-point operations, N = (S / P)^2 and K = 3 P^2. Besides torchvision's steps before
timm's stem, the alternatives are the recipe of vLLM (one pass that normalises, a copy into rows, a linear layer), and
the stem alone on a image that something else has normalised already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import MEAN, STD, differentiated, leaf, per_channel, weighted
from mmfuse.bench.providers import Fn, Load, Scratch, anchor, compiled, eager, then
from mmfuse.kernels import patch_embed


def _inputs(grad: bool, device: torch.device, dtype: torch.dtype, B: int, S: int, P: int, D: int) -> tuple[Tensor, ...]:
    """(weight, bias, class token [1, D], positions [1 + N, D], pixels)"""
    n, k = (S // P) ** 2, 3 * P * P
    shapes = ((D, 3, P, P), k**-0.5), ((D,), 0.1), ((1, D), 0.1), ((1 + n, D), 0.1)
    leaves = [leaf(device, dtype, *shape, scale=scale).requires_grad_(grad) for shape, scale in shapes]
    return (*leaves, torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, device=device))


def _normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """torchvision's ToDtype(scale=True) and Normalize."""
    mean, std = per_channel(pixels, dtype)
    return pixels.to(dtype).mul_(1 / 255).sub_(mean).div_(std)


def _join(y: Tensor, cls: Tensor, position: Tensor) -> Tensor:
    return torch.cat([cls.to(y.dtype).expand(len(y), -1, -1), y], dim=1) + position.to(y.dtype)


def _stem(x: Tensor, weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor) -> Tensor:
    """timm's PatchEmbed and _pos_embed."""
    return _join(F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2), cls, position)


def torchvision_timm(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
    x = _normalised(pixels, torch.promote_types(weight.dtype, torch.float32))
    return _stem(x, weight, bias, cls, position)


def _normalised_in(device: torch.device, dtype: torch.dtype) -> Fn:
    """The stem on a image in the weight's dtype: what is left when normalising costs nothing."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def run(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
        if id(pixels) not in kept:
            wide = torch.promote_types(weight.dtype, torch.float32)
            kept[id(pixels)] = pixels, _normalised(pixels, wide).to(weight.dtype)
        return _stem(kept[id(pixels)][1], weight, bias, cls, position)

    return run


def _vllm(device: torch.device, dtype: torch.dtype) -> Fn:
    """vLLM, layers/fusion/mm_input_norm.py and layers/conv.py; their Triton pass is torch.compile's here."""

    def affine(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return (pixels * scale + shift).to(dtype)

    one_pass = torch.compile(affine, dynamic=False) if device.type == "cuda" else affine

    def run(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
        mean, std = per_channel(pixels, torch.promote_types(weight.dtype, torch.float32))
        x, p = one_pass(pixels, 1 / (255 * std), -mean / std, weight.dtype), weight.shape[-1]
        rows = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(len(x), -1, weight[0].numel())
        return _join(F.linear(rows, weight.flatten(1), bias), cls, position)

    return run


_EAGER = eager(torchvision_timm)
_PEERS = {"eager": _EAGER, "compile": compiled(_EAGER), "normalised-in": _normalised_in, "vllm": _vllm}


def _squares(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()


def _trained(load: Load) -> Load:
    return lambda device, dtype: then(_squares, load(device, dtype))


def _embed(pixels: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    return patch_embed(pixels, weight, bias, mean=MEAN, std=STD, prefix=prefix, **options)


def _ours(weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor, **options: Any) -> Tensor:
    return _embed(pixels, weight, bias, cls, pos_embed=position, **options)


# --- cases ----------------------------------------------------------------------------------------------------------


def _product(scratch: Scratch, weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, pixels: Tensor) -> Tensor:
    """The stem's own product, of rows that are there, and one copy of the bytes."""
    m, k = len(pixels) * (len(position) - 1), weight[0].numel()
    scratch.kept(pixels.clone).copy_(pixels)
    return scratch.mm(scratch.kept(lambda: weight.new_ones(m, k)), weight.flatten(1).T)


def _flops(mode: str, B: int, S: int, P: int, D: int) -> float:
    return (2 if mode == "fwd" else 4) * B * (S // P) ** 2 * 3 * P * P * D


def _bytes(mode: str, itemsize: int, B: int, S: int, P: int, D: int) -> float:
    n = (S // P) ** 2
    once = 3 * B * S * S + (B * (n + 1) * D + 3 * P * P * D + (n + 1) * D) * itemsize
    return once if mode == "fwd" else 2 * once


_case = partial(
    Case,
    op="patch_embed",
    cpu=[{"B": b, "S": 224, "P": p, "D": d} for b, p, d in ((1, 16, 768), (8, 14, 1024), (32, 16, 768))],
    # ViT-B/16, and ViT-g/14 of BLIP-2 and ImageBind's size
    cuda=[{"B": b, "S": 224, "P": p, "D": d} for b, p, d in ((32, 16, 768), (256, 16, 768), (1024, 14, 1408))],
    growth="B",
    small={"B": 3, "S": 28, "P": 14, "D": 40},
    flops=_flops,
    bytes=_bytes,
    anchors={"product": anchor(_product, partial(_flops, "fwd"))},
)

CASES = [
    _case(
        name="patch_embed",
        ours=_ours,
        peers=_PEERS,
        inputs=partial(_inputs, False),
        outputs=("tokens",),
        modes=("fwd",),
    ),
    _case(
        name="patch_embed_train",
        ours=then(_squares, _ours),
        peers={name: _trained(load) for name, load in _PEERS.items()} | {"compile": compiled(_trained(_EAGER))},
        inputs=partial(_inputs, True),
        outputs=("loss", "d weight", "d bias", "d cls", "d position"),
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


def _check_norms(*given: Tensor, backend: str | None) -> Tensor:
    pixels, _, bias, *_, mask_token, norm = given
    mask = torch.arange(18, device=pixels.device).view(3, 6) % 4 == 1
    norms: dict[str, Any] = {"stem_norm": (norm, None, 1e-5), "pre_norm": (norm, bias, 1e-6)}
    return weighted(_embed(*given[:4], position=given[4], mask=mask, mask_token=mask_token, **norms, backend=backend))


def _check_kept(*given: Tensor, backend: str | None) -> Tensor:
    ids = torch.tensor([[4, 0], [1, 5], [3, 2]], device=given[0].device)
    return weighted(_embed(*given[:4], position=given[4], ids_keep=ids, backend=backend)) + 0 * sum(
        t.sum() for t in given[5:]
    )


CHECKS = [
    Check("patch_embed", "28x42 / 14, norms and mask", _check_inputs, differentiated(_check_norms)),
    Check("patch_embed", "28x42 / 14, kept patches", _check_inputs, differentiated(_check_kept)),
]
