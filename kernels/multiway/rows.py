"""Activation and norm of rows, by the expert of each run: in plain torch, or by the compiled part.

h = act(z)        y = gamma_e (h - mean) rstd + beta_e, or h without a norm; the mean is 0 where it is not centred
a = gamma_e g,  xhat = (h - mean) rstd,  dh = rstd (a - mean(a) - xhat mean(a xhat)),  dz = act'(z) dh
dgamma_e = sum of g xhat,  dbeta_e = sum of g over the expert's runs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.multiway.arguments import GATED, Norm, Runs, by_expert
from mmfuse.kernels.multiway.reference import activate

Parameters = Sequence[Tensor]


class Normed(NamedTuple):
    out: Tensor  # [T, D]
    mean: Tensor  # [T], as rstd; empty without a norm
    rstd: Tensor


class Grads(NamedTuple):
    dz: Tensor
    again: Tensor  # y, where it is asked for
    gammas: list[Tensor]
    betas: list[Tensor]


class TorchRows:
    """In the dtype of accumulation, rounded at the end."""

    AT_ONCE = None

    @staticmethod
    def forward(z: Tensor, activation: str, norm: Norm, runs: Runs) -> Normed:
        h, acc = activate(z, activation), accumulation_dtype(z.dtype)
        if not norm.gammas:
            return Normed(h, *(z.new_empty(0, dtype=acc) for _ in range(2)))
        h = cast(h, acc)
        mean = h.mean(1, keepdim=True) if norm.centred else h.new_zeros(len(h), 1)
        xhat = h - mean
        rstd = (xhat.square().mean(1, keepdim=True) + norm.eps).rsqrt()
        xhat *= rstd
        return Normed(_scaled(xhat, norm, runs, z.dtype), mean[:, 0], rstd[:, 0])

    @staticmethod
    def backward(
        g: Tensor, z: Tensor, activation: str, norm: Norm, mean: Tensor, rstd: Tensor, runs: Runs, again: bool
    ) -> Grads:
        acc = accumulation_dtype(z.dtype)
        h, dgammas, dbetas = activate(z, activation), list[Tensor](), list[Tensor]()
        if norm.gammas:
            g, xhat = cast(g, acc), (cast(h, acc) - mean[:, None]) * rstd[:, None]
            dgammas, dbetas = sums(norm.gammas, acc), sums(norm.betas, acc)
            dgamma, dbeta, a = by_expert(dgammas, 1), by_expert(dbetas, 1), torch.empty_like(xhat)
            for e, rows, gamma, beta in norm.of_runs(runs):
                torch.mul(g[rows], gamma, out=a[rows])  # type: ignore[arg-type]
                dgamma[e].add_((g[rows] * xhat[rows]).sum(0))
                if beta is not None:
                    dbeta[e].add_(g[rows].sum(0))
            centre = a.mean(1, keepdim=True) if norm.centred else 0
            g = cast((a - centre - xhat * (a * xhat).mean(1, keepdim=True)) * rstd[:, None], z.dtype)
            h = _scaled(xhat, norm, runs, z.dtype) if again else h
        dz = g if activation == "none" else activation_grad(g, z, activation)
        return Grads(dz, h, like(dgammas, norm.gammas), like(dbetas, norm.betas))


class CompiledRows:
    """One pass each way, of GELU or no activation, in float32 and bfloat16 on a CPU."""

    AT_ONCE = 5 << 19  # numbers of [n, F] that stay in the cache, and whose memory the system gives once: 10 MiB

    @staticmethod
    def forward(z: Tensor, activation: str, norm: Norm, runs: Runs) -> Normed:
        z, out = _dense(z), torch.empty(z.shape, dtype=z.dtype)
        mean, rstd = (torch.empty(len(z) if norm.gammas else 0) for _ in range(2))
        for _, rows, gamma, beta in norm.of_runs(runs):
            given = z[rows], _float(gamma), _float(beta), out[rows], mean[rows], rstd[rows]
            torch.ops.mmfuse_cpu.expert_rows(*given, activation == "gelu", norm.centred, norm.eps)
        return Normed(out, mean, rstd)

    @staticmethod
    def backward(
        g: Tensor, z: Tensor, activation: str, norm: Norm, mean: Tensor, rstd: Tensor, runs: Runs, again: bool
    ) -> Grads:
        g, z = _dense(g), _dense(z)
        dz, y = torch.empty_like(z), torch.empty_like(z) if again else z.new_empty(0)
        dgammas, dbetas = (sums(of, torch.float32) for of in (norm.gammas, norm.betas or norm.gammas))
        dgamma, dbeta = by_expert(dgammas, 1), by_expert(dbetas, 1)
        for e, rows, gamma, beta in norm.of_runs(runs):
            to = dz[rows], y[rows], *((dgamma[e], dbeta[e]) if norm.gammas else (mean, mean))
            given = g[rows], z[rows], _float(gamma), _float(beta), mean[rows], rstd[rows], *to
            torch.ops.mmfuse_cpu.expert_rows_grad(*given, activation == "gelu", norm.centred)
        return Grads(dz, y, like(dgammas, norm.gammas), like(dbetas, norm.betas))


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


def sums(parameters: Parameters, acc: torch.dtype) -> list[Tensor]:
    """Zeros for the gradients of parameters."""
    return [torch.zeros(t.shape, dtype=acc, device=t.device) for t in parameters]


def like(grads: Sequence[Tensor], parameters: Parameters) -> list[Tensor]:
    return [cast(d, t.dtype) for d, t in zip(grads, parameters, strict=False)]


def _scaled(xhat: Tensor, norm: Norm, runs: Runs, dtype: torch.dtype) -> Tensor:
    out = torch.empty(xhat.shape, dtype=dtype, device=xhat.device)
    for _, rows, gamma, beta in norm.of_runs(runs):
        y = torch.mul(xhat[rows], gamma)  # type: ignore[arg-type]
        out[rows] = y if beta is None else y.add_(beta)
    return out


def _dense(t: Tensor) -> Tensor:
    """For code that reads memory as it lies."""
    return t.contiguous().resolve_neg()


def _float(t: Tensor | None) -> Tensor:
    return torch.empty(0) if t is None else _dense(t.float())
