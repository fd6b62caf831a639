"""A product for each run of rows, written where its rows belong: nothing is split, gathered or put together.

    z = x W_e^T + b_e          dx = dz W_e,   dW_e = sum of dz^T x,   db_e = sum of dz over the expert's runs

`by` computes products: this module, or the kernels. `rows` computes what is between two of them (rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.multiway.arguments import FFN, GATED, Ending, Linear, Norm, Runs, by_expert, flags_by_expert
from mmfuse.kernels.multiway.reference import activate, ended
from mmfuse.kernels.multiway.rows import Normed, activation_grad, like, sums

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


def product(
    x: Tensor,
    weights: Parameters,
    biases: Parameters,
    runs: Runs,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x W_e^T + b_e, and the residual."""
    w, b = by_expert(weights, 2), by_expert(biases, 1)
    out = x.new_empty(x.shape[0], w[0].shape[0]) if out is None else out
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
    others: tuple[list[Tensor], list[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dW, db): those that are needed; added to what other rows gave."""
    acc = accumulation_dtype(dz.dtype)
    dw, db = others or ([t.new_empty(t.shape) for t in weights], sums(biases, acc))
    dw_of, db_of = by_expert(dw, 2), by_expert(db, 1)
    w_wanted, b_wanted = (flags_by_expert(needs, len(dw_of)) for needs in (of_weights, of_biases))
    fresh = set() if others else set(range(len(dw_of)))
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


# --- what a product takes -------------------------------------------------------------------------------------------


def normed(rows: Any, x: Tensor, norm: Norm, runs: Runs, dtype: torch.dtype) -> Normed:
    """The rows, or their norm in the product's dtype, and its statistics, of which all is computed again."""
    if not norm.gammas:
        none = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
        return Normed(x, none, torch.empty_like(none))
    out, mean, rstd = rows.forward(x, "none", norm, runs)
    return Normed(cast(out, dtype), mean, rstd)


def normed_grads(
    by: Any,
    rows: Any,
    dz: Tensor,
    x: Tensor,
    norm: Norm,
    mean: Tensor,
    rstd: Tensor,
    weights: Parameters,
    runs: Runs,
    needs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """What the product took, and the gradients of what that was made of."""
    below = needs.x or any((*needs.gammas, *needs.betas))
    if not below:
        return normed(rows, x, norm, runs, dz.dtype).out, {}
    dh = by.product_grad(dz, weights, runs, dz.new_empty(x.shape))
    if not norm.gammas:
        return x, {"x": dh}
    found = rows.backward(cast(dh, x.dtype), x, "none", norm, mean, rstd, runs, again=True)
    return cast(found.again, dz.dtype), {"x": found.dz, "gammas": found.gammas, "betas": found.betas}


# --- one product ----------------------------------------------------------------------------------------------------


class LinearOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # the product, kept for an activation's gradient or the scale's; else empty
    mean: Tensor  # [T], of the norm; else empty
    rstd: Tensor


def keeps_product(linear: Linear, needs: Any) -> bool:
    below = needs.x or any((*needs.weights, *needs.biases, *needs.gammas, *needs.betas))
    return needs.scale or (below and linear.activation != "none")


def linear(by: Any, rows: Any, linear: Linear, norm: Norm, runs: Runs, ending: Ending, needs: Any) -> LinearOut:
    keep = bool(needs) and keeps_product(linear, needs)
    h, mean, rstd = normed(rows, linear.x, norm, runs, linear.weights[0].dtype)
    out, z = by.finished(h, linear.weights, linear.biases, runs, linear.activation, ending, keep)
    return LinearOut(out, z, mean, rstd)


def linear_grads(
    by: Any, rows: Any, g: Tensor, saved: LinearOut, linear: Linear, norm: Norm, runs: Runs, ending: Ending, needs: Any
) -> dict[str, Any]:
    z, weights, grads = saved.z, linear.weights, {"residual": g}
    y = activate(z, linear.activation) if needs.scale else z
    dz = _through(g, y, ending, needs, grads, weights[0].dtype)
    if linear.activation != "none":
        dz = activation_grad(dz, z, linear.activation)
    h, below = normed_grads(by, rows, dz, linear.x, norm, saved.mean, saved.rstd, weights, runs, needs)
    return grads | below | _parameter_grads(by, dz, h, weights, linear.biases, runs, needs)


def _through(g: Tensor, y: Tensor, ending: Ending, needs: Any, grads: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The gradient of y, what the ending was given, and that of its scale."""
    dy = g if ending.row_scale is None else g * ending.row_scale[:, None]
    if ending.scale is not None:
        if needs.scale:
            acc = accumulation_dtype(dtype)
            grads["scale"] = cast((dy * y).sum(0, dtype=acc), ending.scale.dtype)
        dy = dy * ending.scale
    return cast(dy, dtype)


def _parameter_grads(
    by: Any,
    dz: Tensor,
    x: Tensor,
    weights: Parameters,
    biases: Parameters,
    runs: Runs,
    needs: Any,
    of: str = "",
    others: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    names = f"weights{of}", f"biases{of}"
    wanted = [getattr(needs, name) for name in names]
    if not any(map(any, wanted)):
        return {}
    to = [tuple(others[name] for name in names)] if names[0] in others else []
    return dict(zip(names, by.parameter_grads(dz, x, weights, biases, *wanted, runs, *to), strict=True))


# --- two products ---------------------------------------------------------------------------------------------------


class FFNOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # [T, F] or [T, 2 F]: the first product, from which all that follows is computed again
    inner_mean: Tensor  # [T], of the norm between the products; else empty
    inner_rstd: Tensor
    y: Tensor  # [T, N]: the second product, kept for the scale's gradient; else empty
    mean: Tensor  # [T], of the norm before the first; else empty
    rstd: Tensor


def ffn(by: Any, rows: Any, ffn: FFN, norm: Norm, runs: Runs, ending: Ending, needs: Any) -> FFNOut:
    blocks = _blocks(rows, ffn)
    if len(blocks) == 1:
        return _ffn(by, rows, ffn, norm, runs, ending, needs)
    w = by_expert(ffn.weights_in, 2)[0]
    z = w.new_empty(len(ffn.x), len(w)) if needs else None
    found = []
    for i in blocks:
        of_rows = _within(ffn, i), norm, runs.within(i), ending.within(i)
        found.append(_ffn(by, rows, *of_rows, needs, None if z is None else z[i]))
    parts = (f._replace(z=f.mean) for f in found)  # z is whole already
    return FFNOut(*map(torch.cat, zip(*parts, strict=True)))._replace(z=w.new_empty(0) if z is None else z)


def _blocks(rows: Any, ffn: FFN) -> list[slice]:
    """Of the rows that are seen at a time; in 16 bits sums over them would be rounded between."""
    t, w = len(ffn.x), by_expert(ffn.weights_in, 2)[0]
    if rows.AT_ONCE is None or w.dtype.itemsize == 2:
        return [slice(None)]
    count = max(1, -(-t * len(w) // rows.AT_ONCE))
    return [slice(t * i // count, t * (i + 1) // count) for i in range(count)]


def _within(ffn: FFN, rows: slice) -> FFN:
    return replace(ffn, x=ffn.x[rows])


def _ffn(
    by: Any, rows: Any, ffn: FFN, norm: Norm, runs: Runs, ending: Ending, needs: Any, z: Tensor | None = None
) -> FFNOut:
    x, mean, rstd = normed(rows, ffn.x, norm, runs, ffn.weights_in[0].dtype)
    if z is None:
        z, _ = by.finished(x, ffn.weights_in, ffn.biases_in, runs, "none", _NOTHING, False)
    else:
        by.product(x, ffn.weights_in, ffn.biases_in, runs, out=z)
    h, inner_mean, inner_rstd = rows.forward(z, ffn.activation, _inner(ffn), runs)
    keep = bool(needs) and needs.scale
    out, y = by.finished(h, ffn.weights_out, ffn.biases_out, runs, "none", ending, keep)
    return FFNOut(out, z if needs else z.new_empty(0), inner_mean, inner_rstd, y, mean, rstd)


def _inner(ffn: FFN) -> Norm:
    return Norm(ffn.inner_gammas, ffn.inner_betas, True, ffn.inner_eps)


_NOTHING = Ending(None, None, None)


def ffn_grads(
    by: Any, rows: Any, g: Tensor, saved: FFNOut, ffn: FFN, norm: Norm, runs: Runs, ending: Ending, needs: Any
) -> dict[str, Any]:
    blocks = _blocks(rows, ffn)
    if len(blocks) == 1:
        return _ffn_grads(by, rows, g, saved, ffn, norm, runs, ending, needs, {})
    total, dx = dict[str, Any](), list[Tensor]()
    for i in blocks:
        of_rows = FFNOut(*(t[i] for t in saved)), _within(ffn, i), norm, runs.within(i), ending.within(i)
        more = _ffn_grads(by, rows, g[i], *of_rows, needs, total)
        if "x" in more:
            dx.append(more.pop("x"))
        for name in total.keys() & _SUMS:
            more[name] = [a + b for a, b in zip(total[name], more[name], strict=True)]
        if "scale" in total:
            more["scale"] += total["scale"]
        total |= more
    return total | {"residual": g} | ({"x": torch.cat(dx)} if dx else {})


_SUMS = {"gammas", "betas", "inner_gammas", "inner_betas"}  # over rows, beside the weights' and biases'


def _ffn_grads(
    by: Any,
    rows: Any,
    g: Tensor,
    saved: FFNOut,
    ffn: FFN,
    norm: Norm,
    runs: Runs,
    ending: Ending,
    needs: Any,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    grads: dict[str, Any] = {"residual": g}
    z, inner, w1, w2 = saved.z, _inner(ffn), ffn.weights_in, ffn.weights_out
    dy = _through(g, saved.y, ending, needs, grads, w2[0].dtype)
    above = (*needs.weights_in, *needs.biases_in, *needs.inner_gammas, *needs.inner_betas)
    if needs.x or any((*above, *needs.gammas, *needs.betas)):
        width = z.shape[1] // (2 if ffn.activation in GATED else 1)
        dh = by.product_grad(dy, w2, runs, z.new_empty(z.shape[0], width))
        given = dh, z, ffn.activation, inner, saved.inner_mean, saved.inner_rstd, runs
        dz, h, grads["inner_gammas"], grads["inner_betas"] = rows.backward(*given, again=True)
        x, below = normed_grads(by, rows, dz, ffn.x, norm, saved.mean, saved.rstd, w1, runs, needs)
        grads |= below | _parameter_grads(by, dz, x, w1, ffn.biases_in, runs, needs, "_in", others)
    else:
        h = rows.forward(z, ffn.activation, inner, runs).out
    return grads | _parameter_grads(by, dy, h, w2, ffn.biases_out, runs, needs, "_out", others)
