"""The public functions of the mini-PointNet: argument checks and declarations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import autocast, check, real
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive import MAX_QUERY
from mmfuse.kernels.points.pointnet import blocked, reference
from mmfuse.kernels.points.pointnet.blocked import Layers

Layer = tuple[Tensor, Tensor]

_LAYERS = tuple(f.name for f in fields(Layers))


def _many(x: Tensor) -> str | None:
    return f"a group has {x.shape[1]} points, more than the 256 of a byte" if x.shape[1] > 256 else None


# products M k D
_SIZE = Size("products", lambda x, layers: x.shape[0] * x.shape[1] * layers.w4.shape[0])


def _implementations(function: Any) -> list[Implementation]:
    """With the last product's `maximum` and `gradient` of the largest similarity over queries."""
    of = MAX_QUERY.implementations
    return [
        Implementation("triton", passes=of["triton"].passes, against=[_many]),
        *(Implementation(name, passes=of[name].passes, against=[_many]) for name in ("cpu", "chunked")),
        Implementation("torch", function=function),
    ]


def _example(x: Tensor) -> tuple[Tensor, list[Layer]]:
    d = x.shape[1]
    return x[:, None], [(x.new_empty(d, width), x.new_empty(d)) for width in (d, d, 2 * d, d)]


# --- tokens ---------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    y: Tensor  # [M, D]
    peak: Tensor  # [M, D], the neighbours that they come from


def _forward(passes: Any, x: Tensor, layers: Layers) -> Tokens:
    return Tokens(*blocked.forward(passes, x, layers))


def _fake(x: Tensor, layers: Layers) -> Tokens:
    shape = (x.shape[0], layers.w4.shape[0])
    return Tokens(x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8))


POINTNET = Operator(
    "mini_pointnet",
    forward=_forward,
    backward=blocked.backward,
    fake=_fake,
    differentiable=("x", *_LAYERS),
    implementations=_implementations(lambda x, layers: (reference.mini_pointnet(x, layers),)),
    size=_SIZE,
    export=OpSpec("MmfuseMiniPointNet"),
    example=lambda x, **how: mini_pointnet(*_example(x), **how),
)


def mini_pointnet(groups: Tensor, layers: Sequence[Layer], *, backend: str | None = None) -> Tensor:
    """A token for each group of points: two layers, their maximum beside every point, two layers, the maximum.

    a = relu(W1 x + b1), f = W2 a + b2, h = relu(W3 [max_j f; f] + b3), y = max_j (W4 h + b4): the embedding of
    Point-BERT (Yu et al. 2022, section 3.1) and openpoints, with normalisation folded into W1, b1 and W3, b3.

    Args:
        groups: [..., k, C], float16, bfloat16, float32 or float64; any strides.
        layers: four pairs (weight, bias) of [C1, C], [C2, C1], [C3, 2 C2] and [D, C3]; same dtype and device.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments. All but "torch"
            take k <= 256, keep one byte for each output and compute the rest again for the gradient.

    Returns:
        [..., D] in the dtype of `groups`.
        Under autocast, float32 operands are rounded to the autocast dtype first, as a matrix product would.

    Accumulation in float32 (float64 for float64). A gradient goes to the first point that reaches a maximum.
    Deterministic: two runs are equal bitwise. Differentiable in groups and layers.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    x, given = _arguments(groups, layers)
    y: Tensor = POINTNET(x, given, backend=backend)[0]
    return _as_given(y, groups)


# --- training -------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    y: Tensor  # [M, D]
    mean: Tensor  # [C3]
    var: Tensor  # [C3]
    peak: Tensor  # [M, D]


def _train(passes: Any, x: Tensor, layers: Layers, scale: Tensor, eps: float) -> Trained:
    return Trained(*blocked.training(passes, x, layers, scale, eps))


def _train_fake(x: Tensor, layers: Layers) -> Trained:
    mean = x.new_empty(layers.w3.shape[0], dtype=accumulation_dtype(x.dtype))
    y, peak = _fake(x, layers)
    return Trained(y, mean, torch.empty_like(mean), peak)


TRAINING = Operator(
    "mini_pointnet_training",
    forward=_train,
    backward=blocked.training_backward,
    fake=_train_fake,
    differentiable=("x", *_LAYERS, "scale"),
    implementations=_implementations(reference.training),
    size=_SIZE,
    example=lambda x, **how: mini_pointnet_training(*_example(x), x.new_empty(x.shape[1]), **how),
)


def mini_pointnet_training(
    groups: Tensor, layers: Sequence[Layer], scale: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`mini_pointnet` with batch normalisation of the third product v = W3 [max_j f; f], by statistics of all points.

    h = relu(scale (v - mean) / sqrt(var + eps) + b3); the rest is as in `mini_pointnet`.

    Args:
        groups: [..., k, C], at least one point.
        layers: four pairs, as for `mini_pointnet`; b3 is the bias of the normalisation.
        scale: [C3], its weight.
        eps: of the normalisation.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        tokens [..., D] in the dtype of `groups`; mean [C3] and biased variance [C3] of v in float32 (float64 for
        float64), which have no gradient.

    Deterministic. Differentiable in groups, layers and scale; kept for that are one byte for each output, mean and
    variance.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    x, given = _arguments(groups, layers)
    if x.numel() == 0:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected at least one point")
    check("scale", scale, given.b3.shape, like=("groups", groups))
    eps = real("eps", eps)
    y, mean, var, *_ = TRAINING(x, given, scale, eps, backend=backend)
    return _as_given(y, groups), mean, var


# --- checks ---------------------------------------------------------------------------------------------------------


def _as_given(y: Tensor, groups: Tensor) -> Tensor:
    """Tokens [M, D] as [..., D]."""
    return y if groups.dim() == 3 else y.view(*groups.shape[:-2], y.shape[1])


_NAMES = tuple(f"layers[{i}] {kind}" for i in range(4) for kind in ("weight", "bias"))


def _arguments(groups: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Layers]:
    check("groups", groups)
    if groups.dim() < 2:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected [..., k, C]")
    if groups.shape[-2] == 0:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected at least one point in a group")
    tensors = [t for pair in layers for t in pair]
    if len(tensors) != 8:
        raise ValueError(f"layers has {len(tensors) // 2} pairs, expected 4 of (weight, bias)")
    width, like = groups.shape[-1], ("groups", groups)
    for i in range(0, 8, 2):
        weight, bias = tensors[i : i + 2]
        check(_NAMES[i], weight, ("out", width), like=like)
        width = weight.shape[0]
        check(_NAMES[i + 1], bias, (width,), like=like)
        width = 2 * width if i == 2 else width
    x, *operands = autocast(groups, *tensors)
    for i, t in enumerate(operands):
        if t.dtype != x.dtype:
            raise TypeError(f"{_NAMES[i]} has dtype {t.dtype}, expected {x.dtype} as groups")
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:]), Layers(*operands)
