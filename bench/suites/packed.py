"""Patches of many sizes and the patches that are masked: ragged stems, MAE's loss, resampled positions.

`packed`: B images of many aspect ratios, at most L patches of 16 x 16 each and padded to L, width D, a table of
16 x 16 positions. Against transformers' stem, which weighs all 256 positions for every token, and its former loop over
images. `patch_rows`: Qwen2.5-VL's stem of N patches that its processor has flattened, two frames of 14 x 14, width D;
transformers runs a Conv3d, and with its `fusion_mapping` a linear layer. `masked_loss`: MAE's, of B images of S x S
bytes, 75 percent masked, targets normalised. `position`: timm's resize of a G x G table to H x H.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import MEAN, STD, differentiated, leaf, of_case, per_channel, ramp
from mmfuse.bench.providers import Fn, copy, eager, formula, products, then
from mmfuse.kernels import interpolate_position, masked_patch_loss, patch_embed, patch_embed_packed

_P, _K = 16, 768


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
    leaves = [leaf(device, dtype, *shape, scale=scale) for shape, scale in shapes]
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
    """transformers before 5.0: one interpolation, and one wait for the device, for each image."""
    y, side = F.linear(patches, weight, bias), math.isqrt(len(table))
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).view(side, side, -1).permute(2, 0, 1)[None]
    positions = []
    for h, w in grids.tolist():
        p = F.interpolate(wide, (h, w), mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).t()
        positions.append(torch.cat([p, p[:1].expand(patches.shape[1] - h * w, -1)]))
    return y + torch.stack(positions).to(y.dtype)


def _packed(weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grids: Tensor, **options: Any) -> Tensor:
    return patch_embed_packed(patches, grids, weight, bias, table=table, **options).tokens


# --- Qwen2.5-VL -----------------------------------------------------------------------------------------------------


def _rows_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    return leaf(device, dtype, D, 3, 2, 14, 14, scale=1176**-0.5), torch.randn(N, 1176, device=device).to(dtype)


def qwen(weight: Tensor, rows: Tensor) -> Tensor:
    """transformers, Qwen2_5_VisionPatchEmbed."""
    return F.conv3d(rows.view(-1, *weight.shape[1:]), weight, stride=weight.shape[2:]).view(-1, len(weight))


def _fusion_mapping(device: torch.device, dtype: torch.dtype) -> Fn:
    from transformers.fusion_mapping import PatchEmbeddingsFusionSpec
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

    fused = PatchEmbeddingsFusionSpec().make_fused_class(Qwen2_5_VisionPatchEmbed)

    @cache
    def module(width: int) -> Any:
        with torch.device("meta"):
            return fused(embed_dim=width)

    def run(weight: Tensor, rows: Tensor) -> Tensor:
        return functional_call(module(len(weight)), {"linear_proj.weight": weight.flatten(1)}, (rows,))

    return run


def _rows(weight: Tensor, rows: Tensor, **options: Any) -> Tensor:
    return patch_embed(rows[None], weight, layout="patches", **options)[0]


# --- MAE ------------------------------------------------------------------------------------------------------------


def _mae_inputs(device: torch.device, dtype: torch.dtype, B: int, S: int) -> tuple[Tensor, ...]:
    n = (S // _P) ** 2
    prediction = torch.randn(B, n, _K, device=device).to(dtype).requires_grad_()
    pixels = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, device=device)
    return prediction, pixels, torch.rand(B, n, device=device).argsort(1) >= n // 4


def mae(prediction: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """The official forward_loss on images normalised as torchvision does."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    mean, std = per_channel(pixels, wide)
    x = (pixels.to(wide) / 255 - mean) / std
    b, c, s, _ = x.shape
    target = x.reshape(b, c, s // _P, _P, s // _P, _P).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, _K)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    row = ((prediction - target) ** 2).mean(-1)
    m = mask.to(row.dtype)
    return (row * m).sum() / m.sum()


def _mae(prediction: Tensor, pixels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return masked_patch_loss(prediction, pixels, mask, patch=_P, mean=MEAN, std=STD, **options)


# --- positions ------------------------------------------------------------------------------------------------------


def _position_inputs(device: torch.device, dtype: torch.dtype, G: int, H: int, D: int) -> tuple[Tensor, ...]:
    return leaf(device, dtype, G, G, D, scale=0.1), torch.empty(H, device=device)


def timm_resize(table: Tensor, side: Tensor) -> Tensor:
    """timm's resample_abs_pos_embed: bicubic, antialiased, in float32."""
    n, wide = len(side), torch.promote_types(table.dtype, torch.float32)
    y = F.interpolate(table.to(wide).permute(2, 0, 1)[None], (n, n), mode="bicubic", antialias=True)
    return y[0].flatten(1).t().to(table.dtype)


def _resize(table: Tensor, side: Tensor, **options: Any) -> Tensor:
    return interpolate_position(table, (len(side), len(side)), "bicubic_aa", **options)


# --- cases ----------------------------------------------------------------------------------------------------------

CASES = [
    Case(
        name="packed",
        op="patch_embed_packed",
        ours=then(ramp, _packed),
        peers={**formula(then(ramp, siglip2)), "loop": eager(then(ramp, loop))},
        definitions=("eager", "loop"),
        inputs=_packed_inputs,
        outputs=("loss", "d weight", "d bias", "d table"),
        cpu=[{"B": b, "L": 256, "G": 16, "D": d} for b, d in ((8, 384), (32, 768), (64, 1152), (256, 1152))],
        cuda=[{"B": b, "L": 256, "G": 16, "D": 1152} for b in (32, 256, 1024)],
        growth="B",
        small={"B": 2, "L": 8, "G": 2, "D": 16},
        flops=lambda mode, B, L, G, D: (2 if mode == "fwd" else 4) * B * L * _K * D,
        bytes=lambda mode, size, B, L, G, D: (1 if mode == "fwd" else 2) * B * L * (_K + D) * size,
        anchors=products(
            lambda weight, bias, table, patches, grids: [(patches.flatten(0, 1), weight, 1)],
            lambda B, L, G, D: 2 * B * L * _K * D,
        ),
    ),
    Case(
        name="patch_rows",
        op="patch_embed",
        ours=then(ramp, _rows),
        peers={
            **formula(then(ramp, qwen)),
            "fusion_mapping": lambda *on: then(ramp, _fusion_mapping(*on)),
        },
        inputs=_rows_inputs,
        outputs=("loss", "d weight"),
        cpu=[{"N": n, "D": 1280} for n in (256, 1024, 4096)],
        cuda=[{"N": n, "D": 1280} for n in (4096, 16384, 65536)],
        growth="N",
        small={"N": 12, "D": 16},
        flops=lambda mode, N, D: (2 if mode == "fwd" else 4) * N * 1176 * D,
        bytes=lambda mode, size, N, D: (1 if mode == "fwd" else 2) * (N * (1176 + D) + 1176 * D) * size,
        anchors=products(lambda weight, rows: [(rows, weight.flatten(1), 1)], lambda N, D: 2 * N * 1176 * D),
    ),
    Case(
        name="masked_loss",
        op="masked_patch_loss",
        ours=_mae,
        peers=formula(mae),
        inputs=_mae_inputs,
        outputs=("loss", "d prediction"),
        cpu=[{"B": b, "S": 224} for b in (8, 32, 64)],
        cuda=[{"B": b, "S": 224} for b in (64, 256, 1024)],
        growth="B",
        small={"B": 2, "S": 32},
        flops=lambda mode, B, S: (8 if mode == "fwd" else 16) * B * 3 * S * S,
        bytes=lambda mode, size, B, S: 3 * B * S * S * (1 + size if mode == "fwd" else 2 + 3 * size),
        anchors=copy(lambda prediction, *_: prediction.shape, lambda B, S: 3 * B * S * S),
    ),
    Case(
        name="position",
        op="interpolate_position",
        ours=then(ramp, _resize),
        peers=formula(then(ramp, timm_resize)),
        inputs=_position_inputs,
        outputs=("loss", "d table"),
        cpu=[{"G": 14, "H": h, "D": 768} for h in (16, 24, 37)],
        cuda=[{"G": 14, "H": h, "D": 1024} for h in (24, 37, 64)],
        growth="H",
        small={"G": 2, "H": 3, "D": 16},
        flops=lambda mode, G, H, D: (2 if mode == "fwd" else 4) * H * (G * G + H * G) * D,
        bytes=lambda mode, size, G, H, D: (1 if mode == "fwd" else 2) * (G * G + H * H) * D * size,
        anchors=copy(lambda table, side: (len(side) ** 2, table.shape[-1]), lambda G, H, D: H * H * D),
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _packed_check(device: torch.device) -> dict[str, Tensor]:
    tensors = {"weight": torch.randn(24, 12), "bias": torch.randn(24), "table": torch.randn(9, 24)}
    tensors |= {"patches": torch.randn(3, 8, 12), "grids": torch.tensor([(2, 3), (1, 5), (4, 2)])}
    return {k: t.to(device) for k, t in tensors.items()}


def _position_check(device: torch.device) -> dict[str, Tensor]:
    return {"table": torch.randn(3, 3, 24, device=device)}


def _resized(table: Tensor, backend: str | None) -> Tensor:
    return ramp(interpolate_position(table, (5, 2), "bicubic", backend=backend))


CHECKS = [
    Check("patch_embed_packed", "B=3 L=8 K=12 D=24", _packed_check, differentiated(then(ramp, _packed))),
    Check(
        "masked_patch_loss",
        "B=2 S=48 P=16",
        of_case(_mae_inputs, "prediction pixels mask", B=2, S=48),
        differentiated(_mae),
    ),
    Check("interpolate_position", "3x3 to 5x2 D=24", _position_check, differentiated(_resized)),
]
