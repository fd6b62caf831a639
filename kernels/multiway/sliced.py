"""A product for each run of rows, written where its rows belong: nothing is split, gathered or put together.

    z = x W_e^T + b_e          dx = dz W_e,   dW_e = sum of dz^T x,   db_e = sum of dz over the expert's runs

What is between two products is `rows`: plain torch (`TorchRows`) or the compiled part's (`CompiledRows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.multiway.arguments import FFN, GATED, Ending, Linear, Runs, by_expert, flags_by_expert
from mmfuse.kernels.multiway.reference import activate, ended

Parameters = Sequence[Tensor]

# --- products -------------------------------------------------------------------------------------------------------


def product(x: Tensor, weights: Parameters, biases: Parameters, runs: Runs, residual: Tensor | None = None) -> Tensor:
    """x W_e^T + b_e, and the residual."""
    w, b = by_expert(weights, 2), by_expert(biases, 1)
    out = x.new_empty(x.shape[0], w[0].shape[0])
    for e, rows in runs.slices():
        y, w_t = out[rows], w[e].t()
        if residual is None:
            torch.addmm(b[e], x[rows], w_t, out=y) if b else torch.mm(x[rows], w_t, out=y)
        elif b:
            torch.add(residual[rows], b[e], out=y).addmm_(x[rows], w_t)
        else:
            torch.addmm(residual[rows], x[rows], w_t, out=y)
    return out


def product_grad(dz: Tensor, weights: Parameters, runs: Runs, out: Tensor) -> Tensor:
    """The gradient of x, into `out`."""
    w = by_expert(weights, 2)
    for e, rows in runs.slices():
        torch.mm(dz[rows], w[e], out=out[rows])
    return out


def weight_grads(dz: Tensor, x: Tensor, weights: Parameters, needs: Sequence[bool], runs: Runs) -> list[Tensor]:
    """dW of those that are needed."""
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights]
    each = by_expert(grads, 2)
    wanted, fresh = flags_by_expert(needs, len(each)), set(range(len(each)))
    for e, rows in runs.slices():
        if not wanted[e] or rows.start == rows.stop:
            continue
        dz_t = dz[rows].t()
        torch.mm(dz_t, x[rows], out=each[e]) if e in fresh else each[e].addmm_(dz_t, x[rows])
        fresh.discard(e)
    for e in fresh:
        each[e].zero_()
    return grads


def bias_grads(dz: Tensor, biases: Parameters, needs: Sequence[bool], runs: Runs) -> list[Tensor]:
    acc = accumulation_dtype(dz.dtype)
    sums = _sums(biases, acc)
    each = by_expert(sums, 1)
    wanted = flags_by_expert(needs, len(each))
    for e, rows in runs.slices():
        if wanted[e]:
            each[e].add_(dz[rows].sum(0, dtype=acc))
    return [cast(s, t.dtype) for s, t in zip(sums, biases, strict=True)]


def _sums(parameters: Parameters, acc: torch.dtype) -> list[Tensor]:
    return [torch.zeros(t.shape, dtype=acc, device=t.device) for t in parameters]


# --- one product ----------------------------------------------------------------------------------------------------


class LinearOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # the product, kept for an activation's gradient or the scale's; else empty


def keeps_product(linear: Linear, needs: Any) -> bool:
    below = any(needs.weights) or any(needs.biases) or needs.x
    return needs.scale or (below and linear.activation != "none")


def linear(linear: Linear, runs: Runs, ending: Ending, needs: Any) -> LinearOut:
    x, residual = linear.x, ending.residual
    plain = linear.activation == "none" and ending.scale is None and ending.row_scale is None
    if plain and (residual is None or residual.dtype == x.dtype):
        return LinearOut(product(x, linear.weights, linear.biases, runs, residual), x.new_empty(0))
    z = product(x, linear.weights, linear.biases, runs)
    out = ended(activate(z, linear.activation), ending)
    return LinearOut(out, z if needs and keeps_product(linear, needs) else x.new_empty(0))


def linear_grads(g: Tensor, z: Tensor, linear: Linear, runs: Runs, ending: Ending, needs: Any) -> dict[str, Any]:
    x, grads = linear.x, {"residual": g}
    y = activate(z, linear.activation) if needs.scale else z
    dz = _through(g, y, ending, needs, grads, x.dtype)
    if linear.activation != "none":
        dz = activation_grad(dz, z, linear.activation)
    return grads | _product_grads(dz, x, linear.weights, linear.biases, runs, needs)


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
    dz: Tensor, x: Tensor, weights: Parameters, biases: Parameters, runs: Runs, needs: Any, of: str = ""
) -> dict[str, Any]:
    grads: dict[str, Any] = {}
    of_weights, of_biases = (getattr(needs, f"{kind}{of}") for kind in ("weights", "biases"))
    if any(of_weights):
        grads[f"weights{of}"] = weight_grads(dz, x, weights, of_weights, runs)
    if any(of_biases):
        grads[f"biases{of}"] = bias_grads(dz, biases, of_biases, runs)
    if needs.x and of != "_out":
        grads["x"] = product_grad(dz, weights, runs, torch.empty_like(x, memory_format=torch.contiguous_format))
    return grads


# --- two products ---------------------------------------------------------------------------------------------------


class FFNOut(NamedTuple):
    out: Tensor  # [T, N]
    z: Tensor  # [T, F] or [T, 2 F]: the first product, from which all that follows is computed again
    mean: Tensor  # [T], of the norm; else empty
    rstd: Tensor
    y: Tensor  # [T, N]: the second product, kept for the scale's gradient; else empty


def ffn(rows: Any, ffn: FFN, runs: Runs, ending: Ending, needs: Any) -> FFNOut:
    x = ffn.x
    z = product(x, ffn.weights_in, ffn.biases_in, runs)
    h, mean, rstd = rows.forward(z, ffn, runs)
    plain, residual = ending.scale is None and ending.row_scale is None, ending.residual
    if plain and (residual is None or residual.dtype == x.dtype):
        out = product(h, ffn.weights_out, ffn.biases_out, runs, residual)
        return FFNOut(out, z, mean, rstd, x.new_empty(0))
    y = product(h, ffn.weights_out, ffn.biases_out, runs)
    return FFNOut(ended(y, ending), z, mean, rstd, y if needs and needs.scale else x.new_empty(0))


def ffn_grads(rows: Any, g: Tensor, saved: FFNOut, ffn: FFN, runs: Runs, ending: Ending, needs: Any) -> dict[str, Any]:
    grads: dict[str, Any] = {"residual": g}
    x, z = ffn.x, saved.z
    dy = _through(g, saved.y, ending, needs, grads, x.dtype)
    if needs.x or any((*needs.weights_in, *needs.biases_in, *needs.gammas, *needs.betas)):
        width = z.shape[1] // (2 if ffn.activation in GATED else 1)
        dh = product_grad(dy, ffn.weights_out, runs, z.new_empty(z.shape[0], width))
        h, dz, grads["gammas"], grads["betas"] = rows.backward(dh, z, saved.mean, saved.rstd, ffn, runs)
        grads |= _product_grads(dz, x, ffn.weights_in, ffn.biases_in, runs, needs, "_in")
    else:
        h, _, _ = rows.forward(z, ffn, runs)
    return grads | _product_grads(dy, h, ffn.weights_out, ffn.biases_out, runs, needs, "_out")


# --- what is between them -------------------------------------------------------------------------------------------


def activation_grad(g: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = z.chunk(2, 1)
        kind = "silu" if activation == "swiglu" else "gelu"
        return torch.cat([activation_grad(g * up, gate, kind), g * activate(gate, kind)], 1)
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(g, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "quick_gelu":
        s = torch.sigmoid(1.702 * z)
        return g * (s + 1.702 * z * s * (1 - s))
    return torch.ops.aten.silu_backward(g, z)


class TorchRows:
    """Activation and norm in plain torch, in the dtype of accumulation where there is a norm."""

    @staticmethod
    def forward(z: Tensor, ffn: FFN, runs: Runs) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulation_dtype(z.dtype)
        h = activate(z, ffn.activation)
        stats = torch.empty(len(z) if ffn.gammas else 0, dtype=acc, device=z.device)
        mean, rstd = stats, torch.empty_like(stats)
        if ffn.gammas:
            out = torch.empty_like(h)
            for rows, gamma, beta in _norms(ffn, runs):
                given = cast(h[rows], acc), h.shape[1:], cast(gamma, acc), cast(beta, acc), ffn.eps
                out[rows], m, s = torch.native_layer_norm(*given)
                mean[rows], rstd[rows] = m[:, 0], s[:, 0]
            h = out
        return h, mean, rstd

    @staticmethod
    def backward(
        dh: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, ffn: FFN, runs: Runs
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(the second product's operand again, dz, dgammas, dbetas)"""
        acc = accumulation_dtype(z.dtype)
        h = activate(z, ffn.activation)
        dgammas, dbetas = (_sums(of, acc) for of in (ffn.gammas, ffn.betas))
        if ffn.gammas:
            out, g = torch.empty_like(h), torch.empty_like(dh)
            sums = [by_expert(t, 1) for t in (dgammas, dbetas)]
            for (rows, gamma, beta), (e, _) in zip(_norms(ffn, runs), runs.slices(), strict=True):
                of, w, b = cast(h[rows], acc), cast(gamma, acc), cast(beta, acc)
                stats = mean[rows, None], rstd[rows, None]
                out[rows] = (of - stats[0]) * stats[1] * w + b
                given = cast(dh[rows], acc), of, h.shape[1:], *stats, w, b, [True] * 3
                g[rows], *both = torch.ops.aten.native_layer_norm_backward(*given)
                for total, part in zip(sums, both, strict=True):
                    total[e].add_(part)
            h, dh = out, g
        dz = dh if ffn.activation == "none" else activation_grad(dh, z, ffn.activation)
        return h, dz, *_like(dgammas, dbetas, ffn)


class CompiledRows:
    """The same by the compiled part, in one pass: of GELU, or no activation."""

    @staticmethod
    def forward(z: Tensor, ffn: FFN, runs: Runs) -> tuple[Tensor, Tensor, Tensor]:
        h, mean = torch.empty_like(z), torch.empty(len(z) if ffn.gammas else 0)
        rstd = torch.empty_like(mean)
        for rows, gamma, beta in _norms(ffn, runs):
            given = z[rows], _dense(gamma.float()), _dense(beta.float()), h[rows], mean[rows], rstd[rows]
            torch.ops.mmfuse_cpu.expert_rows(*given, ffn.activation == "gelu", True, ffn.eps)
        return h, mean, rstd

    @staticmethod
    def backward(
        dh: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, ffn: FFN, runs: Runs
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(the second product's operand again, dz in place of dh, dgammas, dbetas)"""
        h = torch.empty_like(z)
        dgammas, dbetas = (_sums(of, torch.float32) for of in (ffn.gammas, ffn.betas))
        dgamma, dbeta = by_expert(dgammas, 1), by_expert(dbetas, 1)
        for (rows, gamma, beta), (e, _) in zip(_norms(ffn, runs), runs.slices(), strict=True):
            sums = (dgamma[e], dbeta[e]) if ffn.gammas else (mean, mean)
            given = (
                dh[rows],
                z[rows],
                _dense(gamma.float()),
                _dense(beta.float()),
                mean[rows],
                rstd[rows],
                dh[rows],
                h[rows],
            )
            torch.ops.mmfuse_cpu.expert_rows_grad(*given, *sums, ffn.activation == "gelu", True)
        return h, dh, *_like(dgammas, dbetas, ffn)


def _dense(t: Tensor) -> Tensor:
    """For code that reads memory as it lies."""
    return t.contiguous().resolve_neg()


class NormOut(NamedTuple):
    out: Tensor  # [T, D]
    mean: Tensor  # [T], as rstd
    rstd: Tensor


def norm(x: Tensor, gammas: Parameters, betas: Parameters, centred: bool, eps: float, runs: Runs) -> NormOut:
    """By the compiled part."""
    x, gamma, beta = _dense(x), by_expert(gammas, 1), by_expert(betas, 1)
    out, mean, rstd = torch.empty_like(x), torch.empty(len(x)), torch.empty(len(x))
    none = torch.empty(0)
    for e, rows in runs.slices():
        both = _dense(gamma[e].float()), _dense(beta[e].float()) if beta else none
        given = x[rows], *both, out[rows], mean[rows], rstd[rows]
        torch.ops.mmfuse_cpu.expert_rows(*given, False, centred, eps)
    return NormOut(out, mean, rstd)


def norm_grads(
    g: Tensor, x: Tensor, gammas: Parameters, betas: Parameters, mean: Tensor, rstd: Tensor, centred: bool, runs: Runs
) -> dict[str, Any]:
    g, x, dx = _dense(g), _dense(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = [_sums(of, torch.float32) for of in (gammas, betas or gammas)]
    gamma, dgamma, dbeta = (by_expert(t, 1) for t in (gammas, *sums))
    none = torch.empty(0)
    for e, rows in runs.slices():
        given = g[rows], x[rows], _dense(gamma[e].float()), none, mean[rows], rstd[rows], dx[rows], none.to(x.dtype)
        torch.ops.mmfuse_cpu.expert_rows_grad(*given, dgamma[e], dbeta[e], False, centred)
    pairs = {"gammas": zip(sums[0], gammas, strict=True), "betas": zip(sums[1], betas, strict=False)}
    return {"x": dx} | {name: [cast(d, t.dtype) for d, t in of] for name, of in pairs.items()}


def _norms(ffn: FFN, runs: Runs) -> list[tuple[slice, Tensor, Tensor]]:
    """Rows, gamma and beta of each run; without a norm all rows, and none."""
    if not ffn.gammas:
        none = torch.empty(0)
        return [(rows, none, none) for _, rows in runs.slices()]
    gamma, beta = by_expert(ffn.gammas, 1), by_expert(ffn.betas, 1)
    return [(rows, gamma[e], beta[e]) for e, rows in runs.slices()]


def _like(dgammas: list[Tensor], dbetas: list[Tensor], ffn: FFN) -> tuple[list[Tensor], list[Tensor]]:
    gammas = [cast(d, t.dtype) for d, t in zip(dgammas, ffn.gammas, strict=True)]
    return gammas, [cast(d, t.dtype) for d, t in zip(dbetas, ffn.betas, strict=True)]
