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

from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import TEMPERATURE, differentiated, near, scalar, unit, units, weighted
from mmfuse.bench.providers import eager, formula, products
from mmfuse.kernels import max_query_loss, max_query_similarity

_SMOOTHING = 0.1


def _inputs(device: torch.device, dtype: torch.dtype, B: int, N: int, Q: int, D: int) -> tuple[Tensor, ...]:
    image_all, noise = (unit(device, torch.float32, N, *q, D) for q in ((Q,), ()))
    image_all, text_all = image_all.to(dtype), near(image_all[:, 0], noise).to(dtype)
    image, text = (t[:B].clone().requires_grad_() for t in (image_all, text_all))
    return image, text, image_all, text_all, scalar(TEMPERATURE, device, dtype)


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


def _sides(image: Tensor, text: Tensor, image_all: Tensor, text_all: Tensor, temp: Tensor) -> list[Any]:
    return [(image.flatten(0, 1), text_all, 1), (image_all.flatten(0, 1), text, 1)]


def _flops(mode: str, B: int, N: int, Q: int, D: int) -> float:
    return 4 * B * N * Q * D + (0 if mode == "fwd" else 4 * B * N * D)


CASES = [
    Case(
        name="max_query",
        op="max_query_loss",
        ours=_ours,
        peers={"lavis": eager(lavis), **formula(eager_product)},
        definitions=("eager", "lavis"),
        inputs=_inputs,
        outputs=("loss", "d image", "d text", "d temp"),
        cpu=[{"B": b, "N": n, "Q": 32, "D": 256} for b, n in ((16, 256), (32, 512), (128, 2048))],
        # the Q-Former's published batch, 100 on each of 16 GPUs
        cuda=[{"B": b, "N": n, "Q": 32, "D": 256} for b, n in ((100, 100), (100, 1600), (256, 8192))],
        growth="N",
        small={"B": 6, "N": 15, "Q": 5, "D": 16},
        flops=_flops,
        bytes=lambda mode, itemsize, B, N, Q, D: (B + N + (0 if mode == "fwd" else B)) * (Q + 1) * D * itemsize,
        anchors=products(_sides, partial(_flops, "fwd"), "products"),
    ),
]


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    given = units(image_all=(37, 32, 48), text_all=(37, 48), temp=TEMPERATURE)(device)
    return {"image": given["image_all"][:9].clone(), "text": given["text_all"][:9].clone(), **given}


def _similarity(image: Tensor, text: Tensor, backend: str | None) -> Tensor:
    return weighted(max_query_similarity(image, text, backend=backend))


CHECKS = [
    Check("max_query_loss", "B=9 N=37 Q=32 D=48", _check_inputs, differentiated(_ours)),
    Check(
        "max_query_similarity",
        "B=9 N=37 Q=32 D=48",
        units(image=(9, 32, 48), text_all=(37, 48)),
        differentiated(_similarity),
    ),
]
