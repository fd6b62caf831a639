"""The public function of the select-token head: argument checks, autograd, and choice of implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.arguments import first_outside
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.arguments import autocast, integers, scalar
from mmfuse.kernels.contrastive.backends import (
    no_reason,
    reasons_against_chunked,
    reasons_against_cuda,
    reasons_against_triton,
)
from mmfuse.kernels.head import blocked, reference

# the widest row that a program of the GPU's kernels holds
_WIDEST = 16384


def _passes(backend: str) -> Any:
    if backend == "triton":
        from mmfuse.kernels.head import kernel

        return kernel
    return blocked.CompiledPasses if backend == "cuda" else blocked.TorchPasses


def _fwd(
    x: Tensor,
    index: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    normalize: bool,
    clips: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return blocked.forward(_passes(backend), x, index, gamma, beta, weight, scale, eps, normalize, clips)


def _fwd_fake(x, index, gamma, beta, weight, scale, eps, normalize, clips, backend):  # type: ignore[no-untyped-def]
    b, _, d = x.shape
    of = x if weight is None else weight
    acc = accumulation_dtype(x.dtype)
    y = of.new_empty(b, d if weight is None else weight.shape[0])
    row = x.new_empty(b, dtype=acc)
    out = of.new_empty(b // clips, y.shape[1])
    return out, x.new_empty(b, d), row, torch.empty_like(row), y, torch.empty_like(row)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, index, gamma, beta, weight, scale, _, *ctx.options = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(index, gamma, beta, weight, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 10
    need_x, _, *needs = ctx.needs_input_grad[:6]
    grads = select_head_bwd(g, *ctx.saved_tensors, *ctx.options[:2], ctx.length, [need_x, *needs], ctx.options[2])
    dx, *others = (d if need else None for d, need in zip(grads, [need_x, *needs], strict=True))
    return dx, None, *others, None, None, None, None


def _bwd(
    g: Tensor,
    index: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor,
    inverse: Tensor,
    normalize: bool,
    clips: int,
    length: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (index, gamma, beta, weight, scale, rows, mean, rstd, y, inverse)
    return blocked.backward(_passes(backend), g, *given, normalize, clips, length, needs)


def _bwd_fake(g, index, gamma, beta, weight, scale, rows, *others):  # type: ignore[no-untyped-def]
    length, needs = others[-3:-1]
    like = [gamma, beta, weight, scale]
    dx = rows.new_empty((rows.shape[0], length, rows.shape[1]) if needs[0] else 0)
    return dx, *(
        rows.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(like, needs[1:], strict=True)
    )


select_head_bwd = register("select_head_bwd", _bwd, _bwd_fake)
select_head_fwd = register("select_head_fwd", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _fused(backend: str, *given: Any) -> Tensor:
    return select_head_fwd(*given, backend)[0]


def _mixed(x: Tensor, *given: Any) -> list[str]:
    tensors = [t for t in given[1:4] if isinstance(t, Tensor)]
    return [f"dtypes differ from {x.dtype}"] if any(t.dtype != x.dtype for t in tensors) else []


def _wide(x: Tensor, *_: Any) -> list[str]:
    return [f"D is {x.shape[-1]}: a program holds rows of at most {_WIDEST}"] if x.shape[-1] > _WIDEST else []


def _on_a_cpu(x: Tensor, *_: Any) -> list[str]:
    return ["on a CPU torch's own passes over the selected rows are as fast"] if x.device.type == "cpu" else []


SELECT_HEAD = Op(
    "select_head",
    [
        Impl("cuda", partial(_fused, "cuda"), lambda x, *given: reasons_against_cuda(x) + _mixed(x, *given)),
        Impl(
            "triton",
            partial(_fused, "triton"),
            lambda x, *_: reasons_against_triton(x) + _wide(x),
            only_named_in_the_interpreter,
        ),
        Impl("chunked", partial(_fused, "chunked"), reasons_against_chunked, _on_a_cpu),
        Impl("torch", reference.select_head, no_reason),
    ],
    example=lambda features: (features[:, None], None, None, None, features, None, 1e-6, True, 1),
)


def select_head(
    x: Tensor,
    index: int | Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor | None = None,
    *,
    normalize: bool = True,
    scale: Tensor | float | None = None,
    clips: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The head of a tower, on the one token that it reads: scale * unit(LayerNorm(x[b, index_b]) @ weight.T).

    ImageBind normalises all tokens and takes one of them (Girdhar et al. 2023, imagebind_model.py); CLIP's towers do
    without unit length. Here only the selected token is touched, forward and backward.

    Args:
        x: [B, L, D], float16, bfloat16, float32 or float64; any strides.
        index: 0 for the first token (the class token), or int64 [B], such as `ids.argmax(-1)` for CLIP's end of text.
        norm: (weight [D] or None, bias [D] or None, eps) of the LayerNorm, in x's dtype or float32.
        weight: [O, D] of the projection, None for none.
        normalize: divide each result by its L2 norm, or by 1e-12 if it is shorter.
        scale: a factor, already exponentiated: a float, or a tensor of one element.
        clips: rows b * clips to (b + 1) * clips are one sample's; the mean of their results is returned, which has not
            unit length any more.

    Returns:
        [B / clips, O], or [B / clips, D] without a weight; in x's dtype, with a weight in autocast's where it is on.

    Deterministic, forward and backward. Statistics, norms and sums in float32 (float64 for float64), one rounding at
    each of LayerNorm, projection and result. Differentiable in x, norm, weight and scale.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. An index out of range raises on a CPU; on
            a GPU it gives a row of NaN, and in plain torch a device-side assertion.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    at, gamma, beta, eps, weight, factor, per = _checked(x, index, norm, weight, scale, clips)
    given = (x, at, gamma, beta, weight, factor, eps, normalize, per)
    return SELECT_HEAD.select(*given, backend=backend).fn(*given)


def _checked(
    x: Tensor,
    index: int | Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor | None,
    scale: Tensor | float | None,
    clips: int | None,
) -> tuple[Any, ...]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}, expected a floating-point tensor [B, L, D]")
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, L, D] with at least one token and one feature")
    b, length, d = x.shape
    at = None
    if isinstance(index, Tensor):
        at = integers("index", index, x, "x")
        if (wrong := first_outside(at, length)) is not None:
            raise ValueError(f"index has {wrong}, expected 0 <= index < {length}, the tokens of x")
    elif index != 0:
        raise ValueError(f"index is {index!r}, expected 0 or a tensor [{b}]")
    try:
        gamma, beta, eps = norm
    except (TypeError, ValueError):
        raise ValueError(f"norm is {norm!r}, expected (weight [D] or None, bias [D] or None, eps)") from None
    for name, t in (("norm's weight", gamma), ("norm's bias", beta)):
        if t is not None and t.shape != (d,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected [{d}] as x has features")
        dtypes = dict.fromkeys((x.dtype, accumulation_dtype(x.dtype)))
        if t is not None and t.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {' or '.join(map(str, dtypes))} with x")
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != d:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [O, {d}] as x has features")
        cast = autocast(weight)[0]
        if cast is weight and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} as x")
        weight = cast
    per = 1 if clips is None else clips
    if per < 1 or b % per:
        raise ValueError(f"clips is {clips}, expected a number >= 1 that divides the {b} rows of x")
    factor = None if scale is None else scalar("scale", scale, x)
    return at, gamma, beta, float(eps), weight, factor, per
