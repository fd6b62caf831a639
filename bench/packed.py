"""Patches of many sizes and the patches that are masked: SigLIP2's ragged stem, MAE's loss, resampled positions.

`packed`: B pictures of many aspect ratios, at most L patches of 16 x 16 each and padded to L, width D, a table of
16 x 16 positions. Against transformers' stem, which weighs all 256 positions for every token, and its former loop over
pictures. `masked_loss`: MAE's, of B pictures of S x S bytes, 75 percent masked, targets normalised. `position`: timm's
resize of a G x G table to H x H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, differentiated
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels.patch.positions.op import INTERPOLATE, interpolate_position
from mmfuse.kernels.patch.ragged.op import PACKED, patch_embed_packed
from mmfuse.kernels.patch.reconstruction.op import LOSS, masked_patch_loss

_P, _K = 16, 768
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Fn = Callable[..., Tensor]


def _ramp(y: Tensor) -> Tensor:
    """A scalar whose gradient is another number for every feature."""
    wide = torch.promote_types(y.dtype, torch.float32)
    features = torch.linspace(-1, 1, y.shape[-1], dtype=wide, device=y.device)
    return (y.to(wide).flatten(0, -2) @ features).mean()


def _loss(fn: Fn, *args: Tensor, **options: Any) -> Tensor:
    return _ramp(fn(*args, **options))


# --- SigLIP2 --------------------------------------------------------------------------------------------------------


def _shapes(B: int, L: int) -> Tensor:
    """[B, 2] grids of at most L patches, from 1 : 3 to 3 : 1."""
    grids = []
    for i in range(B):
        h = max(1, int(math.sqrt(L * 3 ** (2 * (i * 7 % 13) / 12 - 1))))
        grids.append((min(h, L), max(1, L // h)))
    return torch.tensor(grids)


def _packed_inputs(device: torch.device, dtype: torch.dtype, B: int, L: int, G: int, D: int) -> tuple[Tensor, ...]:
    shapes = ((D, _K), _K**-0.5), ((D,), 0.1), ((G * G, D), 0.1)
    leaves = [(scale * torch.randn(shape, device=device)).to(dtype).requires_grad_() for shape, scale in shapes]
    return (*leaves, torch.randn(B, L, _K, device=device).to(dtype), _shapes(B, L).to(device))


def siglip2(weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
    """transformers, Siglip2VisionEmbeddings: the weights of 256 positions for every token, a second product."""
    y, sizes, side = F.linear(patches, weight, bias), grids.float()[:, None], math.isqrt(len(table))
    at = torch.arange(patches.shape[1], device=grids.device, dtype=torch.float32)[None, :, None]
    rows = torch.div(at, sizes[..., 1:], rounding_mode="floor")
    index = torch.cat([rows, at - rows * sizes[..., 1:]], dim=-1) * (at < sizes.prod(-1, keepdim=True))
    scale = side / sizes
    centre = (index + 0.5) * scale - 0.5
    source = torch.arange(side, device=grids.device, dtype=torch.float32)
    w = (1 - (source - centre[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    w = w / w.sum(-1, keepdim=True)
    w = (w[..., 0, :, None] * w[..., 1, None, :]).flatten(-2)
    wide = torch.promote_types(table.dtype, torch.float32)
    return y + (w.to(wide) @ table.to(wide)).to(y.dtype)


def loop(weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
    """transformers before 5.0: one interpolation, and one wait for the device, for each picture."""
    y, side = F.linear(patches, weight, bias), math.isqrt(len(table))
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).view(side, side, -1).permute(2, 0, 1)[None]
    positions = []
    for h, w in grids.tolist():
        p = F.interpolate(wide, (h, w), mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).t()
        positions.append(torch.cat([p, p[:1].expand(patches.shape[1] - h * w, -1)]))
    return y + torch.stack(positions).to(y.dtype)


def _packed(weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grids: Tensor, **options: Any) -> Tensor:
    return patch_embed_packed(patches, grids, weight, bias, table=table, **options).tokens


def _packed_probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.empty(4, 64, device=device, dtype=dtype),) * 2


def _product(device: torch.device, dtype: torch.dtype) -> Any:
    kept: list[Tensor] = []

    def run(weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
        if not kept:  # fresh memory costs page faults, which are no part of a product
            kept.append(weight.new_empty(patches.shape[0] * patches.shape[1], len(weight)))
        return torch.mm(patches.flatten(0, 1), weight.detach().t(), out=kept[0])

    return run


# --- MAE ------------------------------------------------------------------------------------------------------------


def _mae_inputs(device: torch.device, dtype: torch.dtype, B: int, S: int) -> tuple[Tensor, ...]:
    n = (S // _P) ** 2
    prediction = torch.randn(B, n, _K, device=device).to(dtype).requires_grad_()
    pixels = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, device=device)
    return prediction, pixels, torch.rand(B, n, device=device).argsort(1) >= n // 4


def mae(prediction: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """The official forward_loss on pictures normalised as torchvision does."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=wide, device=pixels.device)[:, None, None] for v in (_MEAN, _STD))
    x = (pixels.to(wide) / 255 - mean) / std
    b, c, s, _ = x.shape
    target = x.reshape(b, c, s // _P, _P, s // _P, _P).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, _K)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    row = ((prediction - target) ** 2).mean(-1)
    m = mask.to(row.dtype)
    return (row * m).sum() / m.sum()


def _mae(prediction: Tensor, pixels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return masked_patch_loss(prediction, pixels, mask, patch=_P, mean=_MEAN, std=_STD, **options)


def _mae_probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(1, 4, 64, device=device, dtype=dtype),)


def _copy(device: torch.device, dtype: torch.dtype) -> Any:
    """Of the prediction."""
    kept: list[Tensor] = []

    def run(prediction: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.empty_like(prediction))
        return kept[0].copy_(prediction.detach())

    return run


# --- positions ------------------------------------------------------------------------------------------------------


def _position_inputs(device: torch.device, dtype: torch.dtype, G: int, H: int, D: int) -> tuple[Tensor, ...]:
    return ((0.1 * torch.randn(G, G, D, device=device)).to(dtype).requires_grad_(), torch.empty(H, device=device))


def timm_resize(table: Tensor, side: Tensor) -> Tensor:
    """timm's resample_abs_pos_embed: bicubic, antialiased, in float32."""
    n, wide = len(side), torch.promote_types(table.dtype, torch.float32)
    y = F.interpolate(table.to(wide).permute(2, 0, 1)[None], (n, n), mode="bicubic", antialias=True)
    return y[0].flatten(1).t().to(table.dtype)


def _resize(table: Tensor, side: Tensor, **options: Any) -> Tensor:
    return interpolate_position(table, (len(side), len(side)), "bicubic_aa", **options)


def _position_probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(2, 2, 64, device=device, dtype=dtype),)


def _written(device: torch.device, dtype: torch.dtype) -> Any:
    kept: list[Tensor] = []

    def run(table: Tensor, side: Tensor) -> Tensor:
        if not kept:
            kept[:] = (torch.ones(len(side) ** 2, table.shape[-1], dtype=dtype, device=device) for _ in range(2))
        return kept[0].copy_(kept[1])

    return run


# --- cases ----------------------------------------------------------------------------------------------------------


def _default(op: Any, probe: Any, baselines: list[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    first = op.select(*probe(device, dtype)).name
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" else []
    return [*baselines, "mmfuse", *named, *(["mmfuse-chunked"] if device.type == "cpu" else [])]


def _case(name: str, op: Any, official: Fn, function: Fn, probe: Any, others: dict[str, Fn], **facts: Any) -> Case:
    return Case(
        name=name,
        providers={
            "eager": eager(official),
            "compile": compiled(eager(official)),
            **{n: eager(fn) for n, fn in others.items()},
            **ours(op, function, probe),
        },
        definitions=("eager", *others),
        default=partial(_default, op, probe, ["eager", "compile", *others]),
        **facts,
    )


CASES = [
    _case(
        "packed",
        PACKED,
        partial(_loss, siglip2),
        partial(_loss, _packed),
        _packed_probe,
        {"loop": partial(_loss, loop)},
        inputs=_packed_inputs,
        outputs=("loss", "d weight", "d bias", "d table"),
        chosen=lambda inputs, backend=None: chosen(PACKED, 2, (inputs[3], inputs[0]), backend),
        dims=("B", "L", "G", "D"),
        shapes={
            "cpu": [{"B": b, "L": 256, "G": 16, "D": d} for b, d in ((8, 384), (32, 768), (64, 1152), (256, 1152))],
            "cuda": [{"B": b, "L": 256, "G": 16, "D": 1152} for b in (32, 256, 1024)],
        },
        growth="B",
        small={"B": 2, "L": 8, "G": 2, "D": 16},
        flops=lambda mode, B, L, G, D: (2 if mode == "fwd" else 4) * B * L * _K * D,
        bytes=lambda mode, size, B, L, G, D: (1 if mode == "fwd" else 2) * B * L * (_K + D) * size,
        anchors={"product": Anchor(_product, lambda B, L, G, D: 2 * B * L * _K * D)},
        anchor=lambda provider, mode: "product",
    ),
    _case(
        "masked_loss",
        LOSS,
        mae,
        _mae,
        _mae_probe,
        {},
        inputs=_mae_inputs,
        outputs=("loss", "d prediction"),
        chosen=partial(chosen, LOSS, 1),
        dims=("B", "S"),
        shapes={
            "cpu": [{"B": b, "S": 224} for b in (8, 32, 64)],
            "cuda": [{"B": b, "S": 224} for b in (64, 256, 1024)],
        },
        growth="B",
        small={"B": 2, "S": 32},
        flops=lambda mode, B, S: (8 if mode == "fwd" else 16) * B * 3 * S * S,
        bytes=lambda mode, size, B, S: 3 * B * S * S * (1 + size if mode == "fwd" else 2 + 3 * size),
        anchors={"copy": Anchor(_copy, lambda B, S: 3 * B * S * S)},
        anchor=lambda provider, mode: "copy",
    ),
    _case(
        "position",
        INTERPOLATE,
        partial(_loss, timm_resize),
        partial(_loss, _resize),
        _position_probe,
        {},
        inputs=_position_inputs,
        outputs=("loss", "d table"),
        chosen=partial(chosen, INTERPOLATE, 1),
        dims=("G", "H", "D"),
        shapes={
            "cpu": [{"G": 14, "H": h, "D": 768} for h in (16, 24, 37)],
            "cuda": [{"G": 14, "H": h, "D": 1024} for h in (24, 37, 64)],
        },
        growth="H",
        small={"G": 2, "H": 3, "D": 16},
        flops=lambda mode, G, H, D: (2 if mode == "fwd" else 4) * H * (G * G + H * G) * D,
        bytes=lambda mode, size, G, H, D: (1 if mode == "fwd" else 2) * (G * G + H * H) * D * size,
        anchors={"copy": Anchor(_written, lambda G, H, D: H * H * D)},
        anchor=lambda provider, mode: "copy",
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _packed_check(device: torch.device) -> dict[str, Tensor]:
    tensors = {"weight": torch.randn(24, 12), "bias": torch.randn(24), "table": torch.randn(9, 24)}
    tensors |= {"patches": torch.randn(3, 8, 12), "grids": torch.tensor([(2, 3), (1, 5), (4, 2)])}
    return {k: t.to(device) for k, t in tensors.items()}


def _mae_check(device: torch.device) -> dict[str, Tensor]:
    prediction, pixels, mask = _mae_inputs(device, torch.float32, 2, 48)
    return {"prediction": prediction.detach(), "pixels": pixels, "mask": mask}


def _position_check(device: torch.device) -> dict[str, Tensor]:
    return {"table": torch.randn(3, 3, 24, device=device)}


def _resized(table: Tensor, **options: Any) -> Tensor:
    return _ramp(interpolate_position(table, (5, 2), "bicubic", **options))


CHECKS = [
    Check(
        "patch_embed_packed",
        "B=3 L=8 K=12 D=24",
        _packed_check,
        differentiated(partial(_loss, _packed)),
        lambda inputs: (inputs["patches"], inputs["weight"]),
    ),
    Check("masked_patch_loss", "B=2 S=48 P=16", _mae_check, differentiated(_mae)),
    Check("interpolate_position", "3x3 to 5x2 D=24", _position_check, differentiated(_resized)),
]
