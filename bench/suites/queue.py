"""ALBEF's contrastive loss against its momentum queues, beside the official lines.

B pairs of unit features, M features of earlier batches in each queue, D dimensions, soft targets of the momentum
teacher; both directions, gradients to the online features and the temperature. A direction needs three products of
2 B M D floating-point operations: the student's logits, the teacher's, and the gradient of both together. What never
holds the logits makes four.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import TEMPERATURE, differentiated, near, scalar, unit, units
from mmfuse.bench.providers import Anchor, Scratch, anchor, formula
from mmfuse.kernels import moco_loss, queue_itc_loss
from mmfuse.kernels.contrastive.queue import queue_itc_losses

_ALPHA = 0.4


def _inputs(device: torch.device, dtype: torch.dtype, B: int, M: int, D: int) -> tuple[Tensor, ...]:
    """image, text, image_m, text_m [B, D], queues [D, M] as official code keeps them, the same as rows [M, D], temp."""
    image, noise, drift, *rows = (unit(device, torch.float32, n, D) for n in (B, B, B, M, M))
    pair = (image, near(image, noise))
    image_m, text_m = (F.normalize(t + 0.3 * drift, dim=-1).to(dtype) for t in pair)
    image, text = (t.to(dtype).requires_grad_() for t in pair)
    rows = [t.to(dtype) for t in rows]
    temp = scalar(TEMPERATURE, device, dtype)
    return image, text, image_m, text_m, *(t.t().contiguous() for t in rows), *rows, temp


def official(
    image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, image_queue: Tensor, text_queue: Tensor, *rest: Tensor
) -> Tensor:
    """ALBEF, models/model_pretrain.py."""
    temp = rest[-1]
    with torch.no_grad():
        image_all = torch.cat([image_m.t(), image_queue.clone().detach()], dim=1)
        text_all = torch.cat([text_m.t(), text_queue.clone().detach()], dim=1)
        sim_i2t_m, sim_t2i_m = image_m @ text_all / temp, text_m @ image_all / temp
        hard = torch.zeros_like(sim_i2t_m).fill_diagonal_(1)
        i2t_targets = _ALPHA * F.softmax(sim_i2t_m, dim=1) + (1 - _ALPHA) * hard
        t2i_targets = _ALPHA * F.softmax(sim_t2i_m, dim=1) + (1 - _ALPHA) * hard
    sim_i2t, sim_t2i = image @ text_all / temp, text @ image_all / temp
    loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * i2t_targets, dim=1).mean()
    loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * t2i_targets, dim=1).mean()
    return (loss_i2t + loss_t2i) / 2


def _ours(
    image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, *queues: Tensor, backend: str | None = None
) -> Tensor:
    *_, image_rows, text_rows, temp = queues
    features = (image, text, image_m, text_m, image_rows, text_rows)
    i2t, t2i = queue_itc_losses(*features, temp, alpha=_ALPHA, backend=backend)
    return (i2t + t2i) / 2


def _products(count: int) -> Anchor:
    """The logits of student and teacher, and the gradient: `count` of a direction's, for both directions."""

    def run(scratch: Scratch, image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, *queues: Tensor) -> Tensor:
        *_, image_rows, text_rows, _ = queues
        for x, x_m, rows in ((image, image_m, text_rows), (text, text_m, image_rows)):
            logits = scratch.mm(torch.cat([x, x_m]), rows.T)
            for _ in range(count - 2):
                scratch.mm(logits[: len(x)], rows)
        return logits

    return anchor(run, lambda B, M, D: count * 4 * B * M * D)


_SIZES = [{"B": 64, "M": m, "D": 256} for m in (4096, 16384, 65536)]

CASES = [
    Case(
        name="queue_itc",
        op="queue_itc_loss",
        ours=_ours,
        peers=formula(official),
        inputs=_inputs,
        outputs=("loss", "d image", "d text", "d temp"),
        # ALBEF's and BLIP's batch per GPU and queue
        cpu=_SIZES,
        cuda=_SIZES,
        growth="M",
        small={"B": 5, "M": 40, "D": 16},
        flops=lambda mode, B, M, D: (2 if mode == "fwd" else 3) * 4 * B * M * D,
        bytes=lambda mode, itemsize, B, M, D: (2 * M + (4 if mode == "fwd" else 6) * B) * D * itemsize,
        anchors={f"gemm{count}": _products(count) for count in (2, 3, 4)},
        beside=lambda provider, mode: "gemm2" if mode == "fwd" else "gemm4" if "triton" in provider else "gemm3",
    )
]


# --- checks ---------------------------------------------------------------------------------------------------------

_CONSTANTS = {"query_m": (33, 96), "keys": (40, 96), "queue": (500, 96)}


def _check_inputs(temp: float, ids: bool = False) -> Any:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        given = units(query=(33, 96), temp=temp, **_CONSTANTS)(device)
        sizes = {"ids": 33, "key_ids": 40, "queue_ids": 500} if ids else {}
        return given | {name: torch.randint(0, 100, (n,), device=device) for name, n in sizes.items()}

    return inputs


def _itc(
    query: Tensor, temp: Tensor, query_m: Tensor, keys: Tensor, queue: Tensor, *ids: Tensor, backend: str | None
) -> Tensor:
    of: dict[str, Any] = dict(zip(("ids", "key_ids", "queue_ids"), ids, strict=False))
    return queue_itc_loss(query, keys, queue, temp, query_m=query_m, alpha=_ALPHA, backend=backend, **of)


def _moco(query: Tensor, temp: Tensor, query_m: Tensor, keys: Tensor, queue: Tensor, backend: str | None) -> Tensor:
    return moco_loss(query, keys[: len(query)], queue, temp, backend=backend)


CHECKS = [
    Check(op, name, inputs, differentiated(fn, constants=list(_CONSTANTS)))
    for op, name, inputs, fn in (
        ("queue_itc_loss", "B=33 K=40 M=500 D=96", _check_inputs(0.07), _itc),
        ("queue_itc_loss", "B=33 K=40 M=500 D=96, temperature 0.001", _check_inputs(0.001), _itc),
        ("queue_itc_loss", "B=33 K=40 M=500 D=96, ids", _check_inputs(0.07, ids=True), _itc),
        ("moco_loss", "B=33 M=500 D=96", _check_inputs(0.07), _moco),
    )
]
