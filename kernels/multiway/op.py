"""The public functions of modality experts: argument checks and declarations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import autocast, autocast_dtype, check, one_of, real
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.multiway import reference, sliced
from mmfuse.kernels.multiway.arguments import (
    ACTIVATIONS,
    FFN,
    GATED,
    Ending,
    Linear,
    Norm,
    Runs,
    by_expert,
    experts_of,
    runs_of,
)
from mmfuse.kernels.multiway.routing import Routing
from mmfuse.kernels.multiway.rows import CompiledRows, Normed, TorchRows
from mmfuse.kernels.multiway.sliced import FFNOut, LinearOut, keeps_product

Parameters = Tensor | Sequence[Tensor]
Activation = Literal["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu", "geglu"]


def _unknown_bounds(runs: Runs) -> str | None:
    return "the bounds of the runs are known to the device alone" if runs.bounds is None else None


def _passes(by: Any, rows: Any) -> Any:
    """What computes an operator, from products by expert and what is between them."""
    return SimpleNamespace(
        linear=partial(sliced.linear, by, rows),
        linear_grads=partial(sliced.linear_grads, by, rows),
        ffn=partial(sliced.ffn, by, rows),
        ffn_grads=partial(sliced.ffn_grads, by, rows),
        norm=rows.forward,
        norm_grads=rows.backward,
    )


def _kernels() -> Any:
    from mmfuse.kernels.multiway import kernel

    return _passes(kernel, kernel.rows)


_TRITON: dict[str, Any] = {
    "passes": Deferred(_kernels),
    "kernels": ["mmfuse.kernels.multiway.kernel"],
    "traceable": True,
}
# a run's expert is one of 4 bits, and each tile looks at every run; the widest row that a program holds
_MOST_RUNS, _WIDEST = 16, 16384


def _many_runs(runs: Runs) -> str | None:
    n = len(runs.experts)
    return f"there are {n} runs, the kernels look at {_MOST_RUNS} at most" if n > _MOST_RUNS else None


def _many_experts(runs: Runs) -> str | None:
    n = max(runs.experts, default=0) + 1
    return f"there are {n} experts, the kernels know {_MOST_RUNS} at most" if n > _MOST_RUNS else None


def _lists(*parameters: Sequence[Tensor], dims: int) -> str | None:
    several = any(len(of) > 1 or (len(of) == 1 and of[0].dim() == dims) for of in parameters)
    return "parameters are a list, the kernels read one tensor of all experts" if several else None


def _linear_lists(linear: Linear) -> str | None:
    return _lists(linear.weights, dims=2) or _lists(linear.biases, dims=1)


def _norm_lists(norm: Norm) -> str | None:
    return _lists(norm.gammas, norm.betas, dims=1)


def _ffn_lists(ffn: FFN) -> str | None:
    return _lists(ffn.weights_in, ffn.weights_out, dims=2) or _lists(
        ffn.biases_in, ffn.biases_out, ffn.inner_gammas, ffn.inner_betas, dims=1
    )


def _gated(ffn: FFN) -> str | None:
    return f"activation is {ffn.activation}, the kernels' rows are not gated" if ffn.activation in GATED else None


def _too_wide(norm: Norm) -> str | None:
    d = norm.gammas[0].shape[-1] if norm.gammas else 0
    return f"rows have {d} numbers: a program of the norm holds at most {_WIDEST}" if d > _WIDEST else None


def _no_norm(norm: Norm) -> str | None:
    return None if norm.gammas else "there is no norm, of which alone the compiled part has the rows"


_NO_NORM = Norm([], [], True, 0.0)
_FEW = [_many_runs, _many_experts]


def _unless_compiled(count: int) -> int | None:
    """In a graph no implementation steps aside: plain torch would have a run's rows as its sizes."""
    return None if torch.compiler.is_compiling() else count


def _linear_products(linear: Linear) -> int | None:
    return _unless_compiled(linear.x.shape[0] * math.prod(linear.weights[0].shape[-2:]))


def _ffn_products(ffn: FFN) -> int | None:
    w1, w2 = math.prod(ffn.weights_in[0].shape[-2:]), math.prod(ffn.weights_out[0].shape[-2:])
    return _unless_compiled(ffn.x.shape[0] * (w1 + w2))


_SLICES, _CPU = (_passes(sliced, rows) for rows in (TorchRows, CompiledRows))


# --- one product ----------------------------------------------------------------------------------------------------


def _linear(passes: Any, linear: Linear, norm: Norm, runs: Runs, ending: Ending, needs: Any) -> LinearOut:
    return passes.linear(linear, norm, runs, ending, needs)


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the norm of a product's operand, without their numbers."""
    row = x.new_empty(x.shape[0] if norm.gammas else 0, dtype=accumulation_dtype(x.dtype))
    return row, torch.empty_like(row)


def _linear_fake(linear: Linear, norm: Norm, ending: Ending, needs: Any) -> LinearOut:
    x, w = linear.x, by_expert(linear.weights, 2)[0]
    t, wide = x.shape[0], w.shape[0]
    n = wide // 2 if linear.activation in GATED else wide
    out = w.new_empty(t, n, dtype=w.dtype if ending.residual is None else ending.residual.dtype)
    z = w.new_empty((t, wide) if needs and keeps_product(linear, needs) else 0)
    return LinearOut(out, z, *_statistics(x, norm))


def _linear_backward(
    passes: Any,
    g: Tensor,
    linear: Linear,
    norm: Norm,
    runs: Runs,
    ending: Ending,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Any,
) -> dict[str, Any]:
    return passes.linear_grads(g, LinearOut(g, z, mean, rstd), linear, norm, runs, ending, needs)


def _norm_apart(linear: Linear, norm: Norm, runs: Runs, ending: Ending) -> Any:
    """The norm, and the product."""
    if not norm.gammas:
        return None
    x = ROUTED_NORM(linear.x, norm, runs)[0].to(linear.weights[0].dtype)
    return ROUTED_LINEAR(replace(linear, x=x), _NO_NORM, runs, ending)


def _halves(x: Tensor) -> Routing:
    return Routing.from_split(1, len(x), len(x) // 2, device=x.device)


ROUTED_LINEAR = Operator(
    "routed_linear",
    forward=_linear,
    backward=_linear_backward,
    fake=_linear_fake,
    differentiable=("x", "weights", "biases", "gammas", "betas", "residual", "scale"),
    on=lambda linear: linear.x,
    implementations=[
        Implementation("triton", against=[*_FEW, _linear_lists, _norm_lists, _too_wide], **_TRITON),
        Implementation("cpu", passes=_CPU, against=[_unknown_bounds, _no_norm, lambda linear: _no_half(linear.x)]),
        Implementation("slices", passes=_SLICES, against=[_unknown_bounds]),
        Implementation(
            "torch",
            function=lambda linear, norm, runs, ending: (reference.routed_linear(linear, norm, runs, ending),),
        ),
    ],
    example=lambda x, **how: routed_linear(x, x.new_ones(2, 4, x.shape[1]), None, _halves(x), **how),
    size=Size("products", _linear_products),
    export=OpSpec("MmfuseRoutedLinear", launches=_norm_apart),
)


def routed_linear(
    x: Tensor,
    weight: Parameters,
    bias: Parameters | None,
    routing: Routing,
    *,
    activation: Activation = "none",
    input_norm: tuple[Parameters, Parameters, float] | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each row through its expert's linear layer: residual + row_scale scale act(W_e LN_e(x) + b_e).

    Args:
        x: [T, K], float16, bfloat16, float32 or float64, any strides; rows in the order of `routing`.
        weight: [E, N, K] or [E N, K], or a list of E tensors [N, K] that keep their own gradients; of x's dtype, or
            autocast. [2 N, K] each where the activation is gated: the gate's rows, then those that it multiplies.
        bias: [E, N], [E N] or E tensors [N] ([2 N]), or None; other parameters likewise.
        routing: which rows are whose.
        activation: "none", "gelu" (by erf), "gelu_tanh", "quick_gelu" (z sigmoid(1.702 z)), "silu", or gated:
            "swiglu" (silu(gate) up), "geglu" (gelu(gate) up).
        input_norm: (weight [E, K], bias [E, K], eps) of a LayerNorm before the product, each of one tensor or a list;
            None: there is none. What it gives is not kept for the backward, which computes it again.
        residual: [T, N], added at the end; the result has its dtype.
        scale: [N], of all experts: LayerScale (Touvron et al. 2021, arXiv:2103.17239).
        row_scale: [T], a factor of each row's branch without a gradient: stochastic depth.
        backend: "triton", "cpu" (with a norm), "slices" or "torch"; by default the first that accepts the arguments.

    Returns:
        [T, N], in x's dtype or that of autocast without a residual.

    Deterministic where torch's matrix product is. Differentiable in all but row_scale. The gradient of an expert
    without rows is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    one_of("activation", activation, ACTIVATIONS)
    runs = _rows_of(x, routing)
    weights, biases, n = _product("weight", weight, "bias", bias, x.shape[1], activation, routing, x)
    before = _before("input_norm", input_norm, x.shape[1], routing, x)
    ending = _ending(residual, scale, row_scale, x, n)
    if autocast_dtype(x) is not None:
        rounded, *parameters = autocast(x, *weights, *biases)
        x = x if before.gammas else rounded  # autocast leaves a norm's rows alone
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    linear = Linear(x, weights, biases, activation)
    return ROUTED_LINEAR(linear, before, runs, ending, backend=backend)[0]


# --- two products ---------------------------------------------------------------------------------------------------


def _ffn(passes: Any, ffn: FFN, norm: Norm, runs: Runs, ending: Ending, needs: Any) -> FFNOut:
    return passes.ffn(ffn, norm, runs, ending, needs)


def _ffn_fake(ffn: FFN, norm: Norm, ending: Ending, needs: Any) -> FFNOut:
    w1, w2 = (by_expert(of, 2)[0] for of in (ffn.weights_in, ffn.weights_out))
    t, wide, n = ffn.x.shape[0], w1.shape[0], w2.shape[0]
    out = w2.new_empty(t, n, dtype=w2.dtype if ending.residual is None else ending.residual.dtype)
    z, y = w1.new_empty((t, wide) if needs else 0), w2.new_empty((t, n) if needs and needs.scale else 0)
    inner_mean, inner_rstd = _statistics(ffn.x, Norm(ffn.inner_gammas, ffn.inner_betas, True, ffn.inner_eps))
    return FFNOut(out, z, inner_mean, inner_rstd, y, *_statistics(ffn.x, norm))


def _ffn_backward(
    passes: Any,
    g: Tensor,
    ffn: FFN,
    norm: Norm,
    runs: Runs,
    ending: Ending,
    z: Tensor,
    inner_mean: Tensor,
    inner_rstd: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Any,
) -> dict[str, Any]:
    saved = FFNOut(g, z, inner_mean, inner_rstd, y, mean, rstd)
    return passes.ffn_grads(g, saved, ffn, norm, runs, ending, needs)


def _layers_apart(ffn: FFN, norm: Norm, runs: Runs, ending: Ending) -> Any:
    """Both products, each behind its norm."""
    inner = Norm(ffn.inner_gammas, ffn.inner_betas, True, ffn.inner_eps)
    first = Linear(ffn.x, ffn.weights_in, ffn.biases_in, ffn.activation)
    x = ROUTED_LINEAR(first, norm, runs, Ending(None, None, None))[0]
    return ROUTED_LINEAR(Linear(x, ffn.weights_out, ffn.biases_out, "none"), inner, runs, ending)


def _not_gelu(ffn: FFN) -> str | None:
    return None if ffn.activation in ("gelu", "none") else f"activation is {ffn.activation}, the compiled part has gelu"


def _no_half(x: Tensor) -> str | None:
    return "dtype is torch.float16, the compiled part has float32 and bfloat16" if x.dtype == torch.float16 else None


ROUTED_FFN = Operator(
    "routed_ffn",
    forward=_ffn,
    backward=_ffn_backward,
    fake=_ffn_fake,
    differentiable=(
        "x",
        "weights_in",
        "biases_in",
        "inner_gammas",
        "inner_betas",
        "weights_out",
        "biases_out",
        "gammas",
        "betas",
        "residual",
        "scale",
    ),
    on=lambda ffn: ffn.x,
    implementations=[
        Implementation("triton", against=[*_FEW, _ffn_lists, _gated, _norm_lists, _too_wide], **_TRITON),
        Implementation(
            "cpu",
            passes=_CPU,
            against=[_unknown_bounds, _not_gelu, lambda ffn: _no_half(ffn.x)],
        ),
        Implementation("slices", passes=_SLICES, against=[_unknown_bounds]),
        Implementation(
            "torch", function=lambda ffn, norm, runs, ending: (reference.routed_ffn(ffn, norm, runs, ending),)
        ),
    ],
    example=lambda x, **how: routed_ffn(
        x, x.new_ones(2, 4, x.shape[1]), None, x.new_ones(2, 3, 4), None, _halves(x), **how
    ),
    size=Size("products", _ffn_products),
    export=OpSpec("MmfuseRoutedFFN", launches=_layers_apart),
)


def routed_ffn(
    x: Tensor,
    weight_in: Parameters,
    bias_in: Parameters | None,
    weight_out: Parameters,
    bias_out: Parameters | None,
    routing: Routing,
    *,
    activation: Activation = "gelu",
    norm: tuple[Parameters, Parameters, float] | None = None,
    input_norm: tuple[Parameters, Parameters, float] | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each row through its expert's feed-forward network: residual + row_scale scale (W2_e LN_e(act(W1_e x)) + b2_e).

    Only x, the first product and the statistics of the norm are kept for the backward, which computes the rest again.

    Args:
        x: [T, K], float16, bfloat16, float32 or float64; rows in the order of `routing`.
        weight_in: [E, F, K] or E tensors [F, K] ([2 F, K] where the activation is gated), bias_in: [E, F] or None.
        weight_out: [E, N, F] or E tensors [N, F], bias_out: [E, N] or None.
        routing: which rows are whose.
        activation: as in `routed_linear`.
        norm: (weight [E, F], bias [E, F], eps) of a LayerNorm before the second product (Magneto, arXiv:2210.06423).
        input_norm: (weight [E, K], bias [E, K], eps) of one before the first.
        residual, scale, row_scale: as in `routed_linear`.
        backend: "triton", "cpu", "slices" or "torch"; by default the first that accepts the arguments.

    Returns:
        [T, N], in the residual's dtype, or without one in x's or that of autocast.

    Deterministic where torch's matrix product is. Differentiable in all but row_scale. The gradient of an expert
    without rows is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    one_of("activation", activation, ACTIVATIONS)
    runs = _rows_of(x, routing)
    w1, b1, f = _product("weight_in", weight_in, "bias_in", bias_in, x.shape[1], activation, routing, x)
    w2, b2, n = _product("weight_out", weight_out, "bias_out", bias_out, f, "none", routing, x)
    inner = _before("norm", norm, f, routing, x)
    before = _before("input_norm", input_norm, x.shape[1], routing, x)
    ending = _ending(residual, scale, row_scale, x, n)
    if autocast_dtype(x) is not None:
        rounded, *all_ = autocast(x, *w1, *b1, *w2, *b2)
        parameters = iter(all_)
        w1, b1, w2, b2 = ([next(parameters) for _ in of] for of in (w1, b1, w2, b2))
        x = x if before.gammas else rounded
    ffn = FFN(x, w1, b1, inner.gammas, inner.betas, w2, b2, activation, inner.eps)
    return ROUTED_FFN(ffn, before, runs, ending, backend=backend)[0]


# --- norms ----------------------------------------------------------------------------------------------------------


def _norm(passes: Any, x: Tensor, norm: Norm, runs: Runs) -> Normed:
    return passes.norm(x, "none", norm, runs)


def _norm_fake(x: Tensor) -> Normed:
    row = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    return Normed(torch.empty_like(x, memory_format=torch.contiguous_format), row, torch.empty_like(row))


def _norm_backward(
    passes: Any, g: Tensor, x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, runs: Runs
) -> dict[str, Any]:
    found = passes.norm_grads(g, x, "none", norm, mean, rstd, runs, again=False)
    return {"x": found.dz, "gammas": found.gammas, "betas": found.betas}


ROUTED_NORM = Operator(
    "routed_layer_norm",
    forward=_norm,
    backward=_norm_backward,
    fake=_norm_fake,
    differentiable=("x", "gammas", "betas"),
    implementations=[
        Implementation("triton", against=[*_FEW, _norm_lists, _too_wide], **_TRITON),
        Implementation("cpu", passes=_CPU, against=[_unknown_bounds, _no_half]),
        Implementation("slices", passes=_SLICES, against=[_unknown_bounds]),
        Implementation("torch", function=lambda x, norm, runs: (reference.routed_norm(x, norm, runs),)),
    ],
    example=lambda x, **how: routed_layer_norm(x, x.new_ones(2, x.shape[1]).cumsum(1), None, _halves(x), **how),
    also={"routed_rms_norm": lambda x, **how: routed_rms_norm(x, x.new_ones(2, x.shape[1]), _halves(x), **how)},
    size=Size("numbers", lambda x: _unless_compiled(x.numel())),
    export=OpSpec("MmfuseRoutedNorm"),
)


def routed_layer_norm(
    x: Tensor,
    weight: Parameters,
    bias: Parameters | None,
    routing: Routing,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Each row through its expert's LayerNorm (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [T, D], float16, bfloat16, float32 or float64; rows in the order of `routing`.
        weight, bias: [E, D] or E tensors [D], of any floating-point dtype; bias may be None.
        routing: which rows are whose.
        backend: "triton", "cpu", "slices" or "torch"; by default the first that accepts the arguments.

    Returns:
        [T, D] in x's dtype. Statistics in float32 (float64 for float64).

    Deterministic. Differentiable in x, weight and bias. The gradient of an expert without rows is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    return _normed(x, weight, bias, True, routing, eps, backend)


def routed_rms_norm(
    x: Tensor, weight: Parameters, routing: Routing, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Each row through its expert's RMSNorm, x / sqrt(mean(x^2) + eps) weight (Zhang and Sennrich 2019).

    Arguments, result and errors as those of `routed_layer_norm`.
    """
    return _normed(x, weight, None, False, routing, eps, backend)


def _normed(
    x: Tensor,
    weight: Parameters,
    bias: Parameters | None,
    centred: bool,
    routing: Routing,
    eps: float,
    backend: str | None,
) -> Tensor:
    runs = _rows_of(x, routing)
    gammas = experts_of("weight", weight, x.shape[1:], routing, x)
    betas = [] if bias is None else experts_of("bias", bias, x.shape[1:], routing, x)
    return ROUTED_NORM(x, Norm(gammas, betas, centred, real("eps", eps)), runs, backend=backend)[0]


# --- checks ---------------------------------------------------------------------------------------------------------


def _rows_of(x: Tensor, routing: Routing) -> Runs:
    check("x", x, ("T", "K"))
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one feature")
    return runs_of(routing, x)


def _product(
    name: str,
    weight: Parameters,
    bias_name: str,
    bias: Parameters | None,
    k: int,
    activation: str,
    routing: Routing,
    x: Tensor,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Weights, biases, and what comes out."""
    weights = experts_of(name, weight, ("N", k), routing, x)
    wide = weights[0].shape[-2]
    biases = [] if bias is None else experts_of(bias_name, bias, (wide,), routing, x)
    dtype = x.dtype
    for t in (*weights, *biases):
        if t.dtype != dtype and autocast_dtype(x) is None:
            which = name if any(t is w for w in weights) else bias_name
            raise TypeError(f"{which} has dtype {t.dtype}, expected {dtype} as x")
    if activation in GATED and wide % 2:
        raise ValueError(f"{name} has {wide} rows, expected an even number for {activation}")
    return weights, biases, wide // 2 if activation in GATED else wide


def _before(name: str, norm: Any, width: int, routing: Routing, x: Tensor) -> Norm:
    """The LayerNorm before a product, or none."""
    if norm is None:
        return _NO_NORM
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(f"{name} is {type(norm).__name__}, expected (weight [E, {width}], bias [E, {width}], eps)")
    gammas = experts_of(f"{name}'s weight", norm[0], (width,), routing, x)
    betas = experts_of(f"{name}'s bias", norm[1], (width,), routing, x)
    return Norm(gammas, betas, True, real(f"{name}'s eps", norm[2]))


def _ending(residual: Tensor | None, scale: Tensor | None, row_scale: Tensor | None, x: Tensor, n: int) -> Ending:
    t = x.shape[0]
    if residual is scale is row_scale is None:
        return Ending(None, None, None)
    for name, given, shape in (("residual", residual, (t, n)), ("scale", scale, (n,)), ("row_scale", row_scale, (t,))):
        if given is not None:
            check(name, given, shape, like=("x", x))
    return Ending(residual, scale, None if row_scale is None else row_scale.detach())
