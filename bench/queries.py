"""BLIP-2's contrastive loss, the largest similarity over an image's queries, against LAVIS's lines and one product.

B own images of Q unit query vectors and their B texts, against N of each, in both directions; gradients to the own.
The products q TT and Q_all tT take 4 B N Q D floating-point operations; the gradient of a pair is one row each of dq
and dt, 4 B N D in all. LAVIS multiplies operands that it has expanded to [B, N, Q, D] first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, differentiated
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels.contrastive.max_query.op import MAX_QUERY, max_query_loss, max_query_similarity

_TEMPERATURE, _SMOOTHING = 0.07, 0.1


def _inputs(device: torch.device, dtype: torch.dtype, B: int, N: int, Q: int, D: int) -> tuple[Tensor, ...]:
    image_all, noise = (F.normalize(torch.randn(N, *q, D, device=device), dim=-1) for q in ((Q,), ()))
    text_all = F.normalize(0.3 * image_all[:, 0] + 0.954 * noise, dim=-1)
    image_all, text_all = image_all.to(dtype), text_all.to(dtype)
    image, text = (t[:B].clone().requires_grad_() for t in (image_all, text_all))
    temp = torch.tensor(_TEMPERATURE, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return image, text, image_all, text_all, temp.requires_grad_()


def _loss(i2t: Tensor, t2i: Tensor, temp: Tensor) -> Tensor:
    label = torch.arange(len(i2t), device=i2t.device)
    one = partial(F.cross_entropy, target=label, label_smoothing=_SMOOTHING)
    return (one(i2t / temp) + one(t2i / temp)) / 2


def eager_product(image: Tensor, text: Tensor, image_all: Tensor, text_all: Tensor, temp: Tensor) -> Tensor:
    """One matrix product per direction, and the maximum of its [B, N, Q] result."""
    i2t = (image.flatten(0, 1) @ text_all.T).unflatten(0, image.shape[:2]).max(1)[0]
    t2i = (image_all.flatten(0, 1) @ text.T).unflatten(0, image_all.shape[:2]).max(1)[0]
    return _loss(i2t, t2i.T, temp)


def lavis(image: Tensor, text: Tensor, image_all: Tensor, text_all: Tensor, temp: Tensor) -> Tensor:
    """LAVIS, blip2_qformer.py: batched products, for which torch copies both operands to [B, N, Q, D]."""
    i2t = torch.matmul(image.unsqueeze(1), text_all.unsqueeze(-1)).squeeze(-1).max(-1)[0]
    t2i = torch.matmul(text.unsqueeze(1).unsqueeze(1), image_all.permute(0, 2, 1)).squeeze(2).max(-1)[0]
    return _loss(i2t, t2i, temp)


def _ours(image: Tensor, text: Tensor, image_all: Tensor, text_all: Tensor, temp: Tensor, **options: Any) -> Tensor:
    return max_query_loss(
        image, text, temp, image_all=image_all, text_all=text_all, label_smoothing=_SMOOTHING, **options
    )


def _products(device: torch.device, dtype: torch.dtype) -> Any:
    kept: list[Tensor] = []

    def run(image: Tensor, text: Tensor, image_all: Tensor, text_all: Tensor, temp: Tensor) -> Tensor:
        if not kept:  # fresh memory costs page faults, which are no part of a product
            kept[:] = (image.new_empty(len(q) * q.shape[1], len(t)) for q, t in ((image, text_all), (image_all, text)))
        torch.mm(image.flatten(0, 1), text_all.T, out=kept[0])
        return torch.mm(image_all.flatten(0, 1), text.T, out=kept[1])

    return run


def _flops(mode: str, B: int, N: int, Q: int, D: int) -> float:
    return 4 * B * N * Q * D + (0 if mode == "fwd" else 4 * B * N * D)


def _bytes(mode: str, itemsize: int, B: int, N: int, Q: int, D: int) -> float:
    return (B + N + (0 if mode == "fwd" else B)) * (Q + 1) * D * itemsize


def _probe(device: torch.device, dtype: torch.dtype, queries: int = 1) -> tuple[Tensor, Tensor]:
    return torch.empty(256, queries, 1, device=device, dtype=dtype), torch.empty(2048, 1, device=device, dtype=dtype)


def _default(device: torch.device, dtype: torch.dtype) -> list[str]:
    first = chosen(MAX_QUERY, 2, _probe(device, dtype, 32))
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" else []
    return ["lavis", "eager", "compile", "mmfuse", *named, "mmfuse-chunked"]


CASES = [
    Case(
        name="max_query",
        inputs=_inputs,
        outputs=("loss", "d image", "d text", "d temp"),
        providers={
            "lavis": eager(lavis),
            "eager": eager(eager_product),
            "compile": compiled(eager(eager_product)),
            **ours(MAX_QUERY, _ours, _probe),
        },
        definitions=("eager", "lavis"),
        # the image-to-text direction: image, text_all
        chosen=lambda inputs, backend=None: chosen(MAX_QUERY, 2, (inputs[0], inputs[3]), backend),
        default=_default,
        dims=("B", "N", "Q", "D"),
        shapes={
            "cpu": [{"B": b, "N": n, "Q": 32, "D": 256} for b, n in ((16, 256), (32, 512), (128, 2048))],
            # the Q-Former's published batch, 100 on each of 16 GPUs
            "cuda": [{"B": b, "N": n, "Q": 32, "D": 256} for b, n in ((100, 100), (100, 1600), (256, 8192))],
        },
        growth="N",
        small={"B": 6, "N": 15, "Q": 5, "D": 16},
        flops=_flops,
        bytes=_bytes,
        anchors={"products": Anchor(_products, partial(_flops, "fwd"))},
        anchor=lambda provider, mode: "products",
    ),
]


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    image_all, text_all = (F.normalize(torch.randn(37, *q, 48), dim=-1).to(device) for q in ((32,), ()))
    image, text = image_all[:9].clone(), text_all[:9].clone()
    temp = torch.tensor(_TEMPERATURE, device=device)
    return {"image": image, "text": text, "image_all": image_all, "text_all": text_all, "temp": temp}


def _similarity(image: Tensor, text: Tensor, backend: str) -> Tensor:
    # weights that differ, so that a gradient in the wrong place shows
    u = max_query_similarity(image, text, backend=backend)
    return (u * torch.linspace(-1, 1, u.numel(), dtype=u.dtype, device=u.device).view_as(u)).sum()


def _pair_inputs(device: torch.device) -> dict[str, Tensor]:
    return {k: v for k, v in _check_inputs(device).items() if k in ("image", "text_all")}


CHECKS = [
    Check("max_query_loss", "B=9 N=37 Q=32 D=48", _check_inputs, differentiated(_ours)),
    Check("max_query_similarity", "B=9 N=37 Q=32 D=48", _pair_inputs, differentiated(_similarity)),
]
