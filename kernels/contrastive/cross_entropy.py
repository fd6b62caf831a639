"""The mean cross-entropy of logits as a product leaves them: on a CPU those of bfloat16 are read as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Implementation, Operator
from mmfuse.kernels._runtime.dtypes import cast

_LEAST = 1 << 18  # logits, from which on two passes less of float32 are worth two calls


class Rows(NamedTuple):
    loss: Tensor  # [n] in float32
    row_max: Tensor  # [n] of the logits
    row_sum: Tensor  # [n] of exp(logit - row_max)


def _compiled(logits: Tensor, labels: Tensor) -> Rows:
    found = Rows(*(torch.empty(len(logits)) for _ in range(3)))
    torch.ops.mmfuse_cpu.cross_entropy(logits.contiguous(), labels, *found)
    return found


def _compiled_grad(g: Tensor, logits: Tensor, labels: Tensor, row_max: Tensor, row_sum: Tensor) -> Tensor:
    d = torch.empty(logits.shape, dtype=logits.dtype)
    torch.ops.mmfuse_cpu.cross_entropy_grad(g.contiguous(), logits.contiguous(), labels, row_max, row_sum, d)
    return d


def _rows(passes: Any, logits: Tensor, labels: Tensor) -> Rows:
    return passes.rows(logits, labels)


def _fake(logits: Tensor) -> Rows:
    return Rows(*(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3)))


def _grads(
    passes: Any, g: Tensor, logits: Tensor, labels: Tensor, row_max: Tensor, row_sum: Tensor
) -> dict[str, Tensor]:
    return {"logits": passes.grad(g, logits, labels, row_max, row_sum)}


def _formula(logits: Tensor, labels: Tensor) -> Rows:
    none = logits.new_empty(0)
    return Rows(F.cross_entropy(logits.float(), labels, reduction="none"), none, none)


ROWS = Operator(
    "_cross_entropy",
    forward=_rows,
    backward=_grads,
    fake=_fake,
    differentiable=("logits",),
    implementations=[
        Implementation("cpu", passes=SimpleNamespace(rows=_compiled, grad=_compiled_grad)),
        Implementation("torch", function=_formula),
    ],
)


def mean_cross_entropy(logits: Tensor, target: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """`F.cross_entropy` of logits [n, V] in a wider dtype; `target`: labels int64 [n], or probabilities [n, V].

    options: as torch's, "label_smoothing" and "ignore_index", which is no label here.
    """
    narrow = logits.dtype == torch.bfloat16 and logits.is_cpu and logits.numel() >= _LEAST
    plain = target.dim() == 1 and dtype == torch.float32 and not options.get("label_smoothing")
    if narrow and plain and not torch.compiler.is_compiling():
        return ROWS(logits, target).loss.mean()
    return F.cross_entropy(cast(logits, dtype), target, **options)
