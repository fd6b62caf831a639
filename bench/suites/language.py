"""Cross-entropy over a vocabulary from hidden states, against all logits at once and the published fused kernels.

N tokens of D channels, V words. The products hidden weightT, and in the backward G weight and GT hidden, take 2 N D V
floating-point operations each.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, leaf
from mmfuse.bench.providers import Load, auto_chunked, eager, formula, gpu, products, torch_chunked
from mmfuse.fused.language import linear_cross_entropy


def _inputs(device: torch.device, dtype: torch.dtype, N: int, D: int, V: int) -> tuple[Tensor, ...]:
    hidden, weight = leaf(device, dtype, N, D), leaf(device, dtype, V, D, scale=D**-0.5)
    return hidden, weight, torch.randint(V, (N,), device=device)


def eager_formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def _peer(backend: str, module: str) -> Load:
    def make() -> Any:
        import_module(module)  # absent if it is not installed
        return partial(linear_cross_entropy, backend=backend)

    return gpu(make)


def _flops(mode: str, N: int, D: int, V: int) -> float:
    return (2 if mode == "fwd" else 6) * N * D * V


CASES = [
    Case(
        name="linear_cross_entropy",
        op="linear_cross_entropy",
        ours=linear_cross_entropy,
        peers={
            **formula(eager_formula),
            "compile-chunked": auto_chunked(eager(eager_formula)),
            "torch-chunked": torch_chunked(),
            "liger": _peer("liger", "liger_kernel"),
            "cut_cross_entropy": _peer("cut_cross_entropy", "cut_cross_entropy"),
        },
        inputs=_inputs,
        outputs=("loss", "d hidden", "d weight"),
        # a small one, BERT's masked words of a batch of 64, CoCa's captions
        cpu=[{"N": n, "D": d, "V": v} for n, d, v in ((128, 256, 8192), (288, 768, 30522), (1024, 768, 49408))],
        cuda=[{"N": n, "D": 768, "V": v} for n, v in ((2048, 30522), (19456, 49408), (65536, 49408))],
        growth="N",
        small={"N": 70, "D": 16, "V": 90},
        flops=_flops,
        bytes=lambda mode, itemsize, N, D, V: (1 if mode == "fwd" else 2) * (N + V) * D * itemsize,
        anchors=products(lambda hidden, weight, labels: [(hidden, weight, 1)], partial(_flops, "fwd")),
    ),
]


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    hidden, weight, bias = torch.randn(70, 48), 48**-0.5 * torch.randn(130, 48), 0.1 * torch.randn(130)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "labels": torch.randint(130, (70,))}
    given["labels"][::5] = -100
    return {name: t.to(device) for name, t in given.items()}


def _mean(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=16, **options)


def _distilled(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
    teacher = (hidden.roll(1, 0), weight, bias)
    return _mean(hidden, weight, bias, labels, teacher=teacher, alpha=0.4, label_smoothing=0.1, **options)


CHECKS = [
    Check("linear_cross_entropy", "N=70 D=48 V=130", _check_inputs, differentiated(_mean)),
    Check("linear_cross_entropy", "N=70 D=48 V=130, teacher, smoothing", _check_inputs, differentiated(_distilled)),
]
