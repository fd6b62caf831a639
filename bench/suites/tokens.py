"""Tokens beside the patches: embedded text, BEiT-3's images and text in one buffer, the head that reads one token.

`embed_text` is BERT's: B texts of L ids of V words, width D, position, type and LayerNorm. `multiway` is BEiT-3's: B
images of S x S in patches of 16 and texts of L of 64,010 words, both position tables, padded words to zero; against
torchscale's modules. `select_head` is ImageBind's image head on B x L tokens of width D: officially LayerNorm of every
token, of which one is projected to O. All of them are bound by memory, but for the patches' product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench import inputs
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, of_case, ramp
from mmfuse.bench.providers import Fn, copy, eager, formula, products, then
from mmfuse.kernels.head import select_head
from mmfuse.kernels.text import embed_pair, embed_text

_P, _V, _OFFSET = 16, 64010, 2  # BEiT-3's
_EPS = 1e-6

_leaf = partial(inputs.leaf, scale=0.5)


# --- embed_text -----------------------------------------------------------------------------------------------------


def _text_inputs(device: torch.device, dtype: torch.dtype, B: int, L: int, V: int, D: int) -> tuple[Tensor, ...]:
    leaf = partial(_leaf, device, dtype)
    ids = torch.randint(0, V, (B, L), device=device)
    return leaf(V, D), leaf(512 if L <= 512 else L, D), leaf(D), leaf(D), leaf(D), ids


def bert(table: Tensor, position: Tensor, kind: Tensor, gamma: Tensor, beta: Tensor, ids: Tensor) -> Tensor:
    """transformers, BertEmbeddings: three lookups, two sums, a LayerNorm."""
    x = F.embedding(ids, table) + kind
    x = x + F.embedding(torch.arange(ids.shape[1], device=ids.device), position)
    return F.layer_norm(x, x.shape[-1:], gamma, beta, _EPS)


def _bert(*given: Tensor, **options: Any) -> Tensor:
    table, position, kind, gamma, beta, ids = given
    return embed_text(ids, table, position=position, type_embed=kind, norm=(gamma, beta, _EPS), **options)


# --- embed_pair ------------------------------------------------------------------------------------------------


def _multiway_inputs(
    device: torch.device, dtype: torch.dtype, B: int, S: int, L: int, D: int, V: int = _V
) -> tuple[Tensor, ...]:
    leaf, n = partial(_leaf, device, dtype), (S // _P) ** 2
    vision = ((D, 3, _P, _P), (D,), (D,), (_OFFSET + 1 + n, D))
    pixels = torch.randn(B, 3, S, S, device=device).to(dtype)
    tensors = (*(leaf(*shape) for shape in vision), leaf(V, D), leaf(_OFFSET + L, D))
    return (*tensors, pixels, torch.randint(0, V, (B, L), device=device))


def _padded(ids: Tensor) -> Tensor:
    """The last quarter of a text."""
    return (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] * 3 // 4).expand_as(ids)


def beit3(*given: Tensor) -> Tensor:
    """torchscale's steps: two concatenations, a split of the sequence, a product with the padding mask."""
    weight, bias, cls, a, table, b, pixels, ids = given
    x = F.conv2d(pixels, weight, bias, stride=_P).flatten(2).transpose(1, 2)
    x = torch.cat([cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = torch.cat([x, F.embedding(ids, table)], dim=1)
    seen, words = x.split([x.shape[1] - ids.shape[1], ids.shape[1]], dim=1)
    indices = [torch.arange(_OFFSET, t.shape[1] + _OFFSET, device=x.device)[None] for t in (seen, words)]
    x = x + torch.cat([F.embedding(i, t) for i, t in zip(indices, (a, b), strict=True)], dim=1)
    padded = torch.cat([ids.new_zeros(seen.shape[:2], dtype=torch.bool), _padded(ids)], dim=1)
    return x * (1 - padded[..., None].type_as(x))


def _torchscale(device: torch.device, dtype: torch.dtype) -> Fn:
    """torchscale's own modules, with the given tensors as their parameters."""
    from torchscale.component import embedding, multiway_network

    def run(*given: Tensor) -> Tensor:
        weight, bias, cls, a, table, b, pixels, ids = given
        with torch.device("meta"):
            side, d = pixels.shape[-1], len(weight)
            vision = embedding.VisionEmbedding(side, _P, 3, d, prepend_cls_token=True)
            text = embedding.TextEmbedding(*table.shape)
            positions = [embedding.PositionalEmbedding(*t.shape) for t in (a, b)]
            position = multiway_network.MutliwayEmbedding(positions)
        call = torch.func.functional_call
        of_vision = {"proj.weight": weight, "proj.bias": bias, "cls_token": cls[None, None]}
        x = torch.cat([call(vision, of_vision, pixels), call(text, {"weight": table}, ids)], dim=1)
        position.split_position = x.shape[1] - ids.shape[1]
        x = x + call(position, {"A.weight": a, "B.weight": b}, x)
        seen = ids.new_zeros(len(ids), position.split_position, dtype=torch.bool)
        return x * (1 - torch.cat([seen, _padded(ids)], dim=1)[..., None].type_as(x))

    return eager(then(ramp, run))(device, dtype)


def _multiway(*given: Tensor, **options: Any) -> Tensor:
    names = ("weight", "bias", "cls_token", "position", "table", "text_position")
    *parameters, pixels, ids = given
    options |= dict(zip(names, parameters, strict=True))
    return embed_pair(pixels, ids, pad_mask=_padded(ids), **options)


def _patches(weight: Tensor, *others: Tensor) -> list[Any]:
    # rows of as many numbers, in whatever order
    return [(others[-2].view(-1, weight[0].numel()), weight.flatten(1), 1)]


def _product_flops(mode: str, B: int, S: int, L: int, D: int) -> float:
    return (2 if mode == "fwd" else 4) * B * (S // _P) ** 2 * 3 * _P * _P * D


# --- select_head ----------------------------------------------------------------------------------------------------


def _head_inputs(device: torch.device, dtype: torch.dtype, B: int, L: int, D: int, O: int) -> tuple[Tensor, ...]:  # noqa: E741
    leaf = partial(_leaf, device, dtype)
    return leaf(B, L, D), leaf(D), leaf(D), leaf(O, D)


def imagebind(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    """imagebind_model.py: LayerNorm, SelectElement(0), Linear, Normalize and the scale of audio."""
    y = F.layer_norm(x, x.shape[-1:], gamma, beta, _EPS)[:, 0]
    return 20.0 * F.normalize(F.linear(y, weight), dim=-1)


def selected_first(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    """The same with the LayerNorm after the selection."""
    return 20.0 * F.normalize(F.linear(F.layer_norm(x[:, 0], x.shape[-1:], gamma, beta, _EPS), weight), dim=-1)


def _head(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return select_head(x, 0, (gamma, beta, _EPS), weight, scale=20.0, **options)


def _head_flops(mode: str, B: int, L: int, D: int, O: int) -> float:  # noqa: E741
    return (2 if mode == "fwd" else 6) * B * D * O


def _head_bytes(mode: str, itemsize: int, B: int, L: int, D: int, O: int) -> float:  # noqa: E741
    return (D * O + B * O + (2 * B * D if mode == "fwd" else 4 * B * D + B * L * D)) * itemsize


# --- cases ----------------------------------------------------------------------------------------------------------

CASES = [
    Case(
        name="embed_text",
        op="embed_text",
        ours=then(ramp, _bert),
        peers=formula(then(ramp, bert)),
        inputs=_text_inputs,
        outputs=("loss", "d table", "d position", "d type", "d gamma", "d beta"),
        cpu=[
            {"B": b, "L": 128, "V": v, "D": d}
            for b, v, d in ((8, 8192, 256), (8, 30522, 768), (32, 30522, 768), (128, 30522, 768))
        ],
        cuda=[{"B": b, "L": 128, "V": 30522, "D": 768} for b in (64, 256, 1024)],
        growth="B",
        small={"B": 3, "L": 6, "V": 50, "D": 32},
        flops=lambda mode, B, L, V, D: (10 if mode == "fwd" else 30) * B * L * D,
        bytes=lambda mode, size, B, L, V, D: (2 * B * L * D if mode == "fwd" else (4 * B * L + V) * D) * size,
        anchors=copy(lambda *t: (t[-1].numel(), t[0].shape[1]), lambda B, L, V, D: B * L * D),
    ),
    Case(
        name="multiway",
        op="embed_pair",
        ours=then(ramp, _multiway),
        peers={**formula(then(ramp, beit3)), "torchscale": _torchscale},
        definitions=("eager", "torchscale"),
        inputs=_multiway_inputs,
        outputs=("loss", "d weight", "d bias", "d cls", "d A", "d table", "d B"),
        cpu=[{"B": b, "S": 224, "L": 64, "D": 768} for b in (4, 16, 32)],
        cuda=[{"B": b, "S": 224, "L": 64, "D": 768} for b in (32, 256, 1024)],
        growth="B",
        small={"B": 2, "S": 32, "L": 5, "D": 16},
        flops=_product_flops,
        bytes=lambda mode, size, B, S, L, D: B * ((S // _P) ** 2 + 1 + 2 * L) * D * size + 3 * B * S * S * size,
        anchors=products(_patches, partial(_product_flops, "fwd")),
    ),
    Case(
        name="select_head",
        op="select_head",
        ours=then(ramp, _head),
        peers={**formula(then(ramp, imagebind)), "selected-first": eager(then(ramp, selected_first))},
        definitions=("eager", "selected-first"),
        inputs=_head_inputs,
        outputs=("loss", "d x", "d gamma", "d beta", "d weight"),
        cpu=[{"B": b, "L": 257, "D": 1280, "O": 1024} for b in (8, 32, 64)],
        cuda=[{"B": b, "L": 257, "D": 1280, "O": 1024} for b in (64, 256, 1024)],
        growth="B",
        small={"B": 4, "L": 5, "D": 32, "O": 16},
        flops=_head_flops,
        bytes=_head_bytes,
        anchors=products(lambda x, gamma, beta, weight: [(x[:, 0], weight, 1)], partial(_head_flops, "fwd")),
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------

CHECKS = [
    Check(
        "embed_text",
        "B=5 L=9 V=30 D=48",
        of_case(_text_inputs, "table position type gamma beta ids", B=5, L=9, V=30, D=48),
        differentiated(then(ramp, _bert)),
    ),
    Check(
        "embed_pair",
        "B=3 S=32 L=6 D=48",
        of_case(_multiway_inputs, "weight bias cls A table B pixels ids", B=3, S=32, L=6, D=48, V=30),
        differentiated(then(ramp, _multiway)),
    ),
    Check(
        "select_head",
        "B=9 L=5 D=48 O=40",
        of_case(_head_inputs, "x gamma beta weight", B=9, L=5, D=48, O=40),
        differentiated(then(ramp, _head)),
    ),
]
