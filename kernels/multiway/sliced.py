"""A product for each run of rows, written where its rows belong: nothing is split, gathered or put together.

    z = x W_e^T + b_e          dx = dz W_e,   dW_e = sum of dz^T x,   db_e = sum of dz over the expert's runs

`by` computes products: this module, or the kernels. `rows` computes what is between two of them (rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.multiway.arguments import FFN, GATED, Ending, Linear, Norm, Runs, by_expert, flags_by_expert
from mmfuse.kernels.multiway.reference import activate, ended
from mmfuse.kernels.multiway.rows import activation_grad, like, sums

Parameters = Sequence[Tensor]

# --- products -------------------------------------------------------------------------------------------------------


def finished(
    x: Tensor, weights: Parameters, biases: Parameters, runs: Runs, activation: str, ending: Ending, keep: bool
) -> tuple[Tensor, Tensor]:
    """(the product with its activation and its ending, the product if it is kept)"""
    residual, none = ending.residual, x.new_empty(0)
    plain = activation == "none" and ending.scale is None and ending.row_scale is None
    if plain and (residual is None or residual.dtype == x.dtype):
        return product(x, weights, biases, runs, residual), none
    z = product(x, weights, biases, runs)
    return ended(activate(z, activation), ending), z if keep else none


def product(x: Tensor, weights: Parameters, biases: Parameters, runs: Runs, residual: Tensor | None = None) -> Tensor:
    """x W_e^T + b_e, and the residual."""
    w, b = by_expert(weights, 2), by_expert(biases, 1)
    out = x.new_empty(x.shape[0], w[0].shape[0])
    for e, rows in runs.slices():
        add = None if residual is None else residual[rows]
        products.linear(x[rows], w[e], b[e] if b else None, add, out[rows])
    return out


def product_grad(dz: Tensor, weights: Parameters, runs: Runs, out: Tensor) -> Tensor:
    """The gradient of x, into `out`."""
    w = by_expert(weights, 2)
    for e, rows in runs.slices():
        products.mm(dz[rows], w[e], out[rows])
    return out


def parameter_grads(
    dz: Tensor,
    x: Tensor,
    weights: Parameters,
    biases: Parameters,
    of_weights: Sequence[bool],
    of_biases: Sequence[bool],
    runs: Runs,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dW, db): those that are needed."""
    acc = accumulation_dtype(dz.dtype)
    dw = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights]
    db = sums(biases, acc)
    dw_of, db_of = by_expert(dw, 2), by_expert(db, 1)
    w_wanted, b_wanted = (flags_by_expert(needs, len(dw_of)) for needs in (of_weights, of_biases))
    fresh = set(range(len(dw_of)))
    for e, rows in runs.slices():
        if rows.start == rows.stop:
            continue
        if w_wanted[e]:
            dz_t = dz[rows].t()
            products.mm(dz_t, x[rows], dw_of[e]) if e in fresh else products.add_mm_(dw_of[e], dz_t, x[rows])
            fresh.discard(e)
        if b_wanted and b_wanted[e]:
            db_of[e].add_(dz[rows].sum(0, dtype=acc))
    for e in fresh:
        dw_of[e].zero_()
    return dw, like(db, biases)


# --- one product ----------------------------------------------------------------------------------------------------


class LinearOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # the product, kept for an activation's gradient or the scale's; else empty


def keeps_product(linear: Linear, needs: Any) -> bool:
    below = any(needs.weights) or any(needs.biases) or needs.x
    return needs.scale or (below and linear.activation != "none")


def linear(by: Any, linear: Linear, runs: Runs, ending: Ending, needs: Any) -> LinearOut:
    keep = bool(needs) and keeps_product(linear, needs)
    given = linear.x, linear.weights, linear.biases, runs, linear.activation
    return LinearOut(*by.finished(*given, ending, keep))


def linear_grads(
    by: Any, g: Tensor, z: Tensor, linear: Linear, runs: Runs, ending: Ending, needs: Any
) -> dict[str, Any]:
    x, grads = linear.x, {"residual": g}
    y = activate(z, linear.activation) if needs.scale else z
    dz = _through(g, y, ending, needs, grads, x.dtype)
    if linear.activation != "none":
        dz = activation_grad(dz, z, linear.activation)
    return grads | _product_grads(by, dz, x, linear.weights, linear.biases, runs, needs)


def _through(g: Tensor, y: Tensor, ending: Ending, needs: Any, grads: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The gradient of y, what the ending was given, and that of its scale."""
    dy = g if ending.row_scale is None else g * ending.row_scale[:, None]
    if ending.scale is not None:
        if needs.scale:
            acc = accumulation_dtype(dtype)
            grads["scale"] = cast((dy * y).sum(0, dtype=acc), ending.scale.dtype)
        dy = dy * ending.scale
    return cast(dy, dtype)


def _product_grads(
    by: Any, dz: Tensor, x: Tensor, weights: Parameters, biases: Parameters, runs: Runs, needs: Any, of: str = ""
) -> dict[str, Any]:
    grads: dict[str, Any] = {}
    wanted = [getattr(needs, f"{kind}{of}") for kind in ("weights", "biases")]
    if any(map(any, wanted)):
        found = by.parameter_grads(dz, x, weights, biases, *wanted, runs)
        grads = dict(zip((f"weights{of}", f"biases{of}"), found, strict=True))
    if needs.x and of != "_out":
        grads["x"] = by.product_grad(dz, weights, runs, torch.empty_like(x, memory_format=torch.contiguous_format))
    return grads


# --- two products ---------------------------------------------------------------------------------------------------


class FFNOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # [T, F] or [T, 2 F]: the first product, from which all that follows is computed again
    mean: Tensor  # [T], of the norm; else empty
    rstd: Tensor
    y: Tensor  # [T, N]: the second product, kept for the scale's gradient; else empty


def ffn(by: Any, rows: Any, ffn: FFN, runs: Runs, ending: Ending, needs: Any) -> FFNOut:
    z, _ = by.finished(ffn.x, ffn.weights_in, ffn.biases_in, runs, "none", _NOTHING, False)
    h, mean, rstd = rows.forward(z, ffn.activation, _norm(ffn), runs)
    keep = bool(needs) and needs.scale
    out, y = by.finished(h, ffn.weights_out, ffn.biases_out, runs, "none", ending, keep)
    return FFNOut(out, z, mean, rstd, y)


def _norm(ffn: FFN) -> Norm:
    return Norm(ffn.gammas, ffn.betas, True, ffn.eps)


_NOTHING = Ending(None, None, None)


def ffn_grads(
    by: Any, rows: Any, g: Tensor, saved: FFNOut, ffn: FFN, runs: Runs, ending: Ending, needs: Any
) -> dict[str, Any]:
    grads: dict[str, Any] = {"residual": g}
    x, z = ffn.x, saved.z
    dy = _through(g, saved.y, ending, needs, grads, x.dtype)
    if needs.x or any((*needs.weights_in, *needs.biases_in, *needs.gammas, *needs.betas)):
        width = z.shape[1] // (2 if ffn.activation in GATED else 1)
        dh = by.product_grad(dy, ffn.weights_out, runs, z.new_empty(z.shape[0], width))
        given = dh, z, ffn.activation, _norm(ffn), saved.mean, saved.rstd, runs
        dz, h, grads["gammas"], grads["betas"] = rows.backward(*given, again=True)
        grads |= _product_grads(by, dz, x, ffn.weights_in, ffn.biases_in, runs, needs, "_in")
    else:
        h = rows.forward(z, ffn.activation, _norm(ffn), runs).out
    return grads | _product_grads(by, dy, h, ffn.weights_out, ffn.biases_out, runs, needs, "_out")
