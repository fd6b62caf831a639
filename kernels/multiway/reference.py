"""Modality experts in plain PyTorch: what each operation means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfuse.kernels._runtime.arguments import constant
from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels._runtime.reasons import transforming
from mmfuse.kernels.multiway.arguments import FFN, GATED, Ending, Linear, Norm, Runs, by_expert
from mmfuse.kernels.multiway.routing import Reading, experts_of, taken


def routed(x: Tensor, experts: int, runs: Runs, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each row by its expert."""
    if runs.bounds is not None:
        slices = runs.slices()
        # one without rows has the gradient 0
        slices += [(e, slice(0, 0)) for e in range(experts) if e not in runs.experts]
        return torch.cat([expert(x[rows], e) for e, rows in slices])
    # every expert for all rows: nobody has to know where a run ends
    own = experts_of(runs.experts, runs.offsets, len(x))
    y = torch.zeros((), dtype=x.dtype, device=x.device)
    for e in range(experts):
        mine = (own == e)[:, None]
        y = y + torch.where(mine, expert(torch.where(mine, x, 0), e), 0)
    return y


def product(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], runs: Runs) -> Tensor:
    """W_e x + b_e: [T, K] to [T, N]."""
    w, b = by_expert(weights, 2), by_expert(biases, 1)
    return routed(x, len(w), runs, lambda rows, e: F.linear(rows, w[e], b[e] if b else None))


def activate(z: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = z.chunk(2, 1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.silu(z) if activation == "silu" else z


def ended(y: Tensor, ending: Ending) -> Tensor:
    """residual + row_scale scale y, in the residual's dtype or y's."""
    residual, scale, row_scale = ending.residual, ending.scale, ending.row_scale
    dtype = y.dtype if residual is None else residual.dtype
    y = y if scale is None else y * scale
    if row_scale is not None:
        column = row_scale[:, None]
        y = y * column if residual is None else torch.addcmul(residual, y, column)
    elif residual is not None:
        y = residual + y
    return cast(y, dtype)


def normed(x: Tensor, norm: Norm, runs: Runs, dtype: torch.dtype) -> Tensor:
    """A product's operand: the rows, or their norm in the product's dtype."""
    return cast(routed_norm(x, norm, runs), dtype) if norm.gammas else x


def routed_linear(linear: Linear, norm: Norm, runs: Runs, ending: Ending) -> Tensor:
    x = normed(linear.x, norm, runs, linear.weights[0].dtype)
    z = product(x, linear.weights, linear.biases, runs)
    return ended(activate(z, linear.activation), ending)


def routed_norm(x: Tensor, norm: Norm, runs: Runs) -> Tensor:
    """Over the rows of [T, D]; the statistics of 16-bit rows in float32."""
    gamma, beta, d, eps = by_expert(norm.gammas, 1), by_expert(norm.betas, 1), x.shape[1:], norm.eps

    def expert(rows: Tensor, e: int) -> Tensor:
        if norm.centred:
            return F.layer_norm(rows, d, cast(gamma[e], rows.dtype), cast(beta[e], rows.dtype) if beta else None, eps)
        return F.rms_norm(rows, d, cast(gamma[e], rows.dtype), eps)

    return routed(x, len(gamma), runs, expert)


def routed_ffn(ffn: FFN, norm: Norm, runs: Runs, ending: Ending) -> Tensor:
    x = normed(ffn.x, norm, runs, ffn.weights_in[0].dtype)
    h = activate(product(x, ffn.weights_in, ffn.biases_in, runs), ffn.activation)
    if ffn.inner_gammas:
        h = routed_norm(h, Norm(ffn.inner_gammas, ffn.inner_betas, True, ffn.inner_eps), runs)
    return ended(product(h, ffn.weights_out, ffn.biases_out, runs), ending)


# what a segment sees of another
KINDS = ("none", "causal", "all")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """[T, H, d] each: softmax(q k^T / sqrt(d) + bias) v among the rows of a sample; [T, H d].

    sees: K x K numbers of `KINDS`, or none: all see all.
    """
    row, segment, within = reading.row, reading.segment, reading.within
    device, mask = q.device, None if reading.full else reading.attended[:, None, None, :]  # [B, 1, 1, S]
    if sees:
        kinds = constant(sees, device).view(len(places), -1)
        kind = kinds[segment[:, :, None], segment[:, None, :]]  # [B, S, S]
        seen = ((kind == 2) | ((kind == 1) & (within[:, None, :] <= within[:, :, None])))[:, None]
        mask = seen if mask is None else mask & seen
    if bias is not None:
        place = constant(places, device).long()[segment] + within
        of_pairs = bias[:, place[:, :, None], place[:, None, :]].transpose(0, 1)  # [B, H, S, S]
        mask = of_pairs if mask is None else of_pairs.masked_fill(~mask, float("-inf"))
    # [B, H, S, d]; a place behind the last row has no gradient
    q_of, k_of, v_of = (
        taken(t, row.flatten(), reading.place).unflatten(0, row.shape).transpose(1, 2) for t in (q, k, v)
    )
    # the fused ones have no forward mode
    with sdpa_kernel(SDPBackend.MATH) if transforming() else nullcontext():
        y = F.scaled_dot_product_attention(q_of, k_of, v_of, attn_mask=mask, dropout_p=dropout)
    y = y.transpose(1, 2).flatten(0, 1)
    y = taken(y, reading.place, row.flatten()) if reading.full else y.index_select(0, reading.place)
    return y.flatten(1)
