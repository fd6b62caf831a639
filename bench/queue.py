"""ALBEF's contrastive loss against its momentum queues, beside the official lines.

B pairs of unit features, M features of earlier batches in each queue, D dimensions, soft targets of the momentum
teacher; both directions, gradients to the online features and the temperature. A direction needs three products of
2 B M D floating-point operations: the student's logits, the teacher's, and the gradient of both together. What never
holds the logits makes four.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, differentiated
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels.contrastive.queue.op import QUEUE_ITC, moco_loss, queue_itc_loss

_TEMPERATURE, _ALPHA = 0.07, 0.4


def _inputs(device: torch.device, dtype: torch.dtype, B: int, M: int, D: int) -> tuple[Tensor, ...]:
    """image, text, image_m, text_m [B, D], queues [D, M] as official code keeps them, the same as rows [M, D], temp."""
    unit = [F.normalize(torch.randn(n, D, device=device), dim=-1) for n in (B, B, B, M, M)]
    image, noise, drift, image_rows, text_rows = unit
    text = F.normalize(0.3 * image + 0.954 * noise, dim=-1)
    image_m, text_m = (F.normalize(t + 0.3 * drift, dim=-1).to(dtype) for t in (image, text))
    image, text = (t.to(dtype).requires_grad_() for t in (image, text))
    rows = [t.to(dtype) for t in (image_rows, text_rows)]
    temp = torch.tensor(_TEMPERATURE, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return image, text, image_m, text_m, *(t.t().contiguous() for t in rows), *rows, temp.requires_grad_()


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
    i2t = queue_itc_loss(image, text_m, text_rows, temp, query_m=image_m, alpha=_ALPHA, backend=backend)
    t2i = queue_itc_loss(text, image_m, image_rows, temp, query_m=text_m, alpha=_ALPHA, backend=backend)
    return (i2t + t2i) / 2


def _products(count: int) -> Anchor:
    """The logits of student and teacher, and the gradient: `count` of a direction's, for both directions."""

    def load(device: torch.device, dtype: torch.dtype) -> Any:
        kept: list[Tensor] = []

        def run(image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, *queues: Tensor) -> Tensor:
            *_, image_rows, text_rows, temp = queues
            if not kept:  # fresh memory costs page faults, which are no part of a product
                kept[:] = [image.new_empty(2 * len(image), len(text_rows)), torch.empty_like(image)]
            logits, g = kept
            for x, x_m, rows in ((image, image_m, text_rows), (text, text_m, image_rows)):
                torch.mm(torch.cat([x, x_m]), rows.T, out=logits)
                for _ in range(count - 2):
                    torch.mm(logits[: len(x)], rows, out=g)
            return logits

        return run

    return Anchor(load, lambda B, M, D: count * 4 * B * M * D)


def _flops(mode: str, B: int, M: int, D: int) -> float:
    return (2 if mode == "fwd" else 3) * 4 * B * M * D


def _bytes(mode: str, itemsize: int, B: int, M: int, D: int) -> float:
    return (2 * M + (4 if mode == "fwd" else 6) * B) * D * itemsize


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        torch.empty(64, 256, device=device, dtype=dtype),
        *(torch.empty(n, 256, device=device, dtype=dtype) for n in (64, 65536)),
    )


def _default(device: torch.device, dtype: torch.dtype) -> list[str]:
    first = chosen(QUEUE_ITC, 3, _probe(device, dtype))
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" else []
    return ["eager", "compile", "mmfuse", *named, "mmfuse-chunked"]


CASES = [
    Case(
        name="queue_itc",
        inputs=_inputs,
        outputs=("loss", "d image", "d text", "d temp"),
        providers={"eager": eager(official), "compile": compiled(eager(official)), **ours(QUEUE_ITC, _ours, _probe)},
        definitions=("eager",),
        # image to text: image, text_m, and the texts' queue as rows
        chosen=lambda inputs, backend=None: chosen(QUEUE_ITC, 3, (inputs[0], inputs[3], inputs[7]), backend),
        default=_default,
        dims=("B", "M", "D"),
        shapes={
            kind: [{"B": 64, "M": m, "D": 256} for m in (4096, 16384, 65536)] for kind in ("cpu", "cuda")
        },  # ALBEF's and BLIP's batch per GPU and queue
        growth="M",
        small={"B": 5, "M": 40, "D": 16},
        flops=_flops,
        bytes=_bytes,
        anchors={f"gemm{count}": _products(count) for count in (2, 3, 4)},
        anchor=lambda provider, mode: "gemm2" if mode == "fwd" else "gemm4" if "triton" in provider else "gemm3",
    )
]


def _check_inputs(temp: float, ids: bool = False) -> Any:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        x, x_m, keys, queue = (F.normalize(torch.randn(n, 96), dim=-1).to(device) for n in (33, 33, 40, 500))
        given = {"query": x, "temp": torch.tensor(temp, device=device)}
        constants = {"query_m": x_m, "keys": keys, "queue": queue}
        if ids:
            for name, n in (("ids", 33), ("key_ids", 40), ("queue_ids", 500)):
                constants[name] = torch.randint(0, 100, (n,), device=device)
        return given | constants

    return inputs


def _itc(query: Tensor, temp: Tensor, **others: Any) -> Tensor:
    return queue_itc_loss(query, temp=temp, alpha=_ALPHA, **others)


def _moco(query: Tensor, temp: Tensor, keys: Tensor, queue: Tensor, **others: Any) -> Tensor:
    return moco_loss(query, keys[: len(query)], queue, temp, backend=others["backend"])


def _checked(fn: Any) -> Any:
    """Gradients of what has one: the query and the temperature."""

    def run(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        constants = {k: v for k, v in inputs.items() if k not in ("query", "temp")}
        leaves = {k: inputs[k] for k in ("query", "temp")}
        return differentiated(lambda query, temp, backend: fn(query, temp, backend=backend, **constants))(
            leaves, backend
        )

    return run


def _arguments(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return inputs["query"], inputs["keys"], inputs["queue"]


_check = partial(Check, arguments=_arguments)

CHECKS = [
    _check("queue_itc_loss", "B=33 K=40 M=500 D=96", _check_inputs(0.07), _checked(_itc)),
    _check("queue_itc_loss", "B=33 K=40 M=500 D=96, temperature 0.001", _check_inputs(0.001), _checked(_itc)),
    _check("queue_itc_loss", "B=33 K=40 M=500 D=96, ids", _check_inputs(0.07, ids=True), _checked(_itc)),
    _check("moco_loss", "B=33 M=500 D=96", _check_inputs(0.07), _checked(_moco)),
]
