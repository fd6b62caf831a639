"""The public functions of the mini-PointNet: argument checks, registration and choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.arguments import autocast, check_features
from mmfuse.kernels.contrastive.backends import (
    no_reason,
    reasons_against_chunked,
    reasons_against_cpu,
    reasons_against_triton,
)
from mmfuse.kernels.contrastive.max_query import blocked as max_query
from mmfuse.kernels.points.pointnet import blocked, reference

Layer = tuple[Tensor, Tensor]


def _passes(backend: str) -> Any:
    """The last product's `maximum` and `gradient`."""
    if backend == "triton":
        from mmfuse.kernels.contrastive.max_query import kernel

        return kernel
    tile = max_query.TorchTile if backend == "chunked" else max_query.compiled_tile(torch.ops.mmfuse_cpu)
    return SimpleNamespace(maximum=partial(max_query.maximum, tile), gradient=partial(max_query.gradient, tile))


def _operands(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """As the products take them: 16 bits on a GPU, float32 on a CPU."""
    dtype = x.dtype if x.is_cuda else accumulation_dtype(x.dtype)
    return [t.to(dtype) for t in tensors]


# --- tokens ---------------------------------------------------------------------------------------------------------


def _fwd(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return blocked.forward(_passes(backend), x, *_operands(x, w1, b1, w2, b2, w3, b3, w4, b4))


def _fwd_fake(x: Tensor, *layers: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], layers[6].shape[0])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = pointnet_bwd(dy, *ctx.saved_tensors, ctx.backend)
    return (*(d if need else None for d, need in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _bwd(
    dy: Tensor, peak: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    w4: Tensor, b4: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layers = (w1, b1, w2, b2, w3, b3, w4, b4)
    dx, *rest = blocked.backward(_passes(backend), dy, peak, x, *_operands(x, *layers))
    return (dx, *(d.to(t.dtype) for d, t in zip(rest, layers, strict=True)))  # type: ignore[return-value]


def _bwd_fake(dy: Tensor, peak: Tensor, x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, *layers[:-1]))


pointnet_bwd = register("mini_pointnet_bwd", _bwd, _bwd_fake)
pointnet_fwd = register("mini_pointnet", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _fused(backend: str, x: Tensor, *layers: Tensor) -> Tensor:
    return pointnet_fwd(x, *layers, backend)[0]


# --- training -------------------------------------------------------------------------------------------------------


def _norm(mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, eps: float) -> blocked.Norm:
    return blocked.Norm(mean, (var + eps).rsqrt(), scale.to(mean.dtype), shift.to(mean.dtype))


def _train(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor,
    scale: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layers = _operands(x, w1, b1, w2, b2, w3, b3, w4, b4)
    mean, var = blocked.statistics(x, *layers[:5])
    y, peak = blocked.forward(_passes(backend), x, *layers, norm=_norm(mean, var, scale, b3, eps))
    return y, mean, var, peak


def _train_fake(x: Tensor, *layers: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(layers[4].shape[0], dtype=accumulation_dtype(x.dtype))
    y, peak = _fwd_fake(x, *layers)
    return y, mean, torch.empty_like(mean), peak


def _train_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _train_backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = train_bwd(dy, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return (*(d if need else None for d, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


def _train_bwd(
    dy: Tensor, mean: Tensor, var: Tensor, peak: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor, scale: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layers = (w1, b1, w2, b2, w3, b3, w4, b4)
    norm = _norm(mean, var, scale, b3, eps)
    dx, *rest = blocked.training_backward(_passes(backend), dy, peak, norm, x, *_operands(x, *layers))
    return (dx, *(d.to(t.dtype) for d, t in zip(rest, (*layers, scale), strict=True)))  # type: ignore[return-value]


def _train_bwd_fake(dy: Tensor, mean: Tensor, var: Tensor, peak: Tensor, x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, *layers[:9]))


train_bwd = register("mini_pointnet_training_bwd", _train_bwd, _train_bwd_fake)
train_op = register("mini_pointnet_training", _train, _train_fake, setup_context=_train_setup, backward=_train_backward)


def _trained(backend: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var, _ = train_op(*inputs, backend)
    return y, mean, var


# --- choice ---------------------------------------------------------------------------------------------------------


def _many(x: Tensor) -> list[str]:
    return [f"a group has {x.shape[1]} points, more than the 256 of a byte"] if x.shape[1] > 256 else []


def _against_triton(x: Tensor, *_: object) -> list[str]:
    return reasons_against_triton(x) + _many(x)


def _against_cpu(x: Tensor, *_: object) -> list[str]:
    return reasons_against_cpu(x) + _many(x)


def _against_chunked(x: Tensor, *_: object) -> list[str]:
    return reasons_against_chunked(x) + _many(x)


# on a CPU, eager is faster for fewer than this many products M k D, and always in a dtype that is not here: it
# multiplies bfloat16 where the processor does, and float64 gains nothing. Measured on 2 cores with AVX-512 BF16
_EAGER_PRODUCTS = {
    "cpu": {torch.float32: 1 << 17, torch.float16: 1 << 13},
    "chunked": {torch.float32: 1 << 20, torch.float16: 1 << 13},
}


def _aside(backend: str, x: Tensor, *layers: Any) -> list[str]:
    if x.device.type != "cpu":
        return []
    least = _EAGER_PRODUCTS[backend].get(x.dtype)
    if least is None:
        return [f"eager is faster in {str(x.dtype)[6:]}"]
    products = x.shape[0] * x.shape[1] * layers[6].shape[0] if len(layers) > 6 else least
    # a dynamic batch is not worth a graph for each side
    if isinstance(products, int) and products < least:
        return [f"eager is faster for less than {least} products in {str(x.dtype)[6:]}"]
    return []


POINTNET = Op(
    "mini_pointnet",
    [
        Impl("triton", partial(_fused, "triton"), _against_triton, only_named_in_the_interpreter),
        Impl("cpu", partial(_fused, "cpu"), _against_cpu, partial(_aside, "cpu")),
        Impl("chunked", partial(_fused, "chunked"), _against_chunked, partial(_aside, "chunked")),
        Impl("torch", reference.mini_pointnet, no_reason),
    ],
)
TRAINING = Op(
    "mini_pointnet_training",
    [
        Impl("triton", partial(_trained, "triton"), _against_triton, only_named_in_the_interpreter),
        Impl("cpu", partial(_trained, "cpu"), _against_cpu, partial(_aside, "cpu")),
        Impl("chunked", partial(_trained, "chunked"), _against_chunked, partial(_aside, "chunked")),
        Impl("torch", reference.training, no_reason),
    ],
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
    Deterministic: two runs are equal bitwise. Differentiable once in groups and layers.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    x, tensors = _arguments(groups, [t for pair in layers for t in pair], 8)
    impl = POINTNET.select(x, *tensors, backend=backend)
    y: Tensor = impl.fn(x, *tensors)
    return y.view(*groups.shape[:-2], y.shape[1])


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

    Deterministic. Differentiable once in groups, layers and scale; kept for that are one byte for each output, mean and
    variance.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    x, tensors = _arguments(groups, [t for pair in layers for t in pair], 8)
    if x.numel() == 0:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected at least one point")
    if scale.shape != tensors[5].shape or scale.device != x.device:
        raise ValueError(
            f"scale is {tuple(scale.shape)} on {scale.device}, expected {tuple(tensors[5].shape)} on {x.device}"
        )
    impl = TRAINING.select(x, *tensors, scale, eps, backend=backend)
    y, mean, var = impl.fn(x, *tensors, scale, eps)
    return y.view(*groups.shape[:-2], y.shape[1]), mean, var


_NAMES = ("layers[0] weight", "layers[0] bias", "layers[1] weight", "layers[1] bias", "layers[2] weight",
          "layers[2] bias", "layers[3] weight", "layers[3] bias")  # fmt: skip


def _arguments(groups: Tensor, tensors: list[Tensor], count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not isinstance(groups, Tensor) or groups.dim() < 2 or not groups.is_floating_point():
        check_features("groups", groups, "[M, k, C]")
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected [..., k, C]")
    if groups.shape[-2] == 0:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected at least one point in a group")
    if len(tensors) != count:
        raise ValueError(f"layers has {len(tensors) // 2} pairs, expected {count // 2} of (weight, bias)")
    width = groups.shape[-1]
    for i, (name, t) in enumerate(zip(_NAMES, tensors, strict=False)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is {type(t).__name__}, expected a tensor")
        shape = (t.shape[0], width) if i % 2 == 0 and t.dim() == 2 else (width,)
        if t.shape != shape or (i % 2 == 0 and t.dim() != 2):
            expected = f"[out, {width}]" if i % 2 == 0 else f"[{width}]"
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
        if t.device != groups.device:
            raise ValueError(f"{name} is on {t.device}, expected {groups.device} as groups")
        if i % 2 == 0:
            width = t.shape[0]
        elif i == 3:
            width *= 2
    x, *operands = autocast(groups, *tensors)
    for name, t in zip(_NAMES, operands, strict=False):
        if t.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {x.dtype} as groups")
    return x.reshape(-1, *x.shape[-2:]), tuple(operands)
