"""The public function of the select-token head: argument checks and declaration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import autocast, check, check_range, integers, norm_of, scalar
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, autocast_is_on
from mmfuse.kernels.head import blocked, reference
from mmfuse.kernels.head.blocked import Head

# the widest row that a program of the GPU's kernels holds
_WIDEST = 16384


class Outputs(NamedTuple):
    out: Tensor  # [B / clips, O]
    rows: Tensor  # [B, D]
    mean: Tensor  # [B]
    rstd: Tensor  # [B]
    y: Tensor  # [B, O]
    inverse: Tensor  # [B], 1 / |y|


def _forward(passes: Any, x: Tensor, head: Head) -> Outputs:
    z, rows, mean, rstd = passes.normalized(x, head, (x if head.weight is None else head.weight).dtype)
    y = z if head.weight is None else blocked.product(z, head.weight.t())
    out, inverse = passes.unit(y, head)
    return Outputs(out, rows, mean, rstd, y, inverse)


def _fake(x: Tensor, head: Head) -> Outputs:
    (b, _, d), of = x.shape, x if head.weight is None else head.weight
    width = d if head.weight is None else of.shape[0]
    row = x.new_empty(b, dtype=accumulation_dtype(x.dtype))
    mean, rstd, inverse = (torch.empty_like(row) for _ in range(3))
    return Outputs(of.new_empty(b // head.clips, width), x.new_empty(b, d), mean, rstd, of.new_empty(b, width), inverse)


def _mixed(x: Tensor, head: Head) -> str | None:
    mixed = any(t is not None and t.dtype != x.dtype for t in (head.gamma, head.beta, head.weight))
    return f"dtypes differ from {x.dtype}" if mixed else None


def _wide(x: Tensor) -> str | None:
    return f"D is {x.shape[-1]}: a program holds rows of at most {_WIDEST}" if x.shape[-1] > _WIDEST else None


SELECT_HEAD = Operator(
    "select_head",
    forward=_forward,
    backward=blocked.backward,
    fake=_fake,
    differentiable=("x", "gamma", "beta", "weight", "scale"),
    implementations=[
        Implementation("cuda", passes=blocked.CompiledPasses, against=[_mixed]),
        Implementation("triton", passes=Deferred("mmfuse.kernels.head.kernel"), against=[_wide], traceable=True),
        Implementation("chunked", passes=blocked.TorchPasses),
        Implementation("torch", function=lambda x, head: (reference.select_head(x, head),)),
    ],
    size=Size("numbers", lambda x: x.shape[0] * x.shape[2]),
    example=lambda x, **how: select_head(x.unsqueeze(1), 0, (None, None, 1e-6), x, **how),
    export=OpSpec("MmfuseSelectHead"),
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
        ValueError, TypeError: an argument does not fit; the message names it. An index out of range raises on a CPU, in
            a compiled graph, too; on a GPU it gives a row of NaN, and in plain torch a device-side assertion.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    head = _head(x, index, norm, weight, normalize, scale, clips)
    return SELECT_HEAD(x, head, backend=backend)[0]


def _head(
    x: Tensor,
    index: int | Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor | None,
    normalize: bool,
    scale: Tensor | float | None,
    clips: int | None,
) -> Head:
    """The arguments, checked."""
    check("x", x, ("B", "L", "D"))
    b, length, d = x.shape
    if length == 0 or d == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, L, D] with at least one token and one feature")
    at = None
    if isinstance(index, Tensor):
        at = integers("index", index, x, "x")
        check_range("index", at, length, "the tokens of x")
    elif index != 0:
        raise ValueError(f"index is {index!r}, expected 0 or a tensor [{b}]")
    gamma, beta, eps = norm_of(norm)
    for name, t in (("norm's weight", gamma), ("norm's bias", beta)):
        if t is not None:
            check(name, t, (d,), " as x has features", (x.dtype, accumulation_dtype(x.dtype)), ("x", x))
    if weight is not None:
        check("weight", weight, ("O", d), " as x has features", like=("x", x))
        cast = autocast(weight)[0]
        if cast is weight and weight.dtype != x.dtype and not autocast_is_on(x.device.type):
            raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} as x")
        weight = cast
    per = 1 if clips is None else clips
    if per < 1 or b % per:
        raise ValueError(f"clips is {clips}, expected a number >= 1 that divides the {b} rows of x")
    factor = None if scale is None else scalar("scale", scale, x)
    return Head(at, gamma, beta, weight, factor, eps, normalize, per)
