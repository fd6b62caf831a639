"""Modality experts in plain PyTorch: what each operation means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfuse.kernels._runtime.arguments import constant
from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels._runtime.reasons import transforming
from mmfuse.kernels._runtime.registration import AS_IT_IS
from mmfuse.kernels.multiway.arguments import FFN, GATED, Ending, Linear, Norm, Runs, by_expert
from mmfuse.kernels.multiway.routing import Reading, experts_of, taken

Expert = Callable[[Tensor, int], Tensor]


def routed(x: Tensor, experts: int, runs: Runs, expert: Expert) -> Tensor:
    """Each row by its expert."""
    if runs.bounds is not None:
        parts = list(zip(x.split_with_sizes([b - a for a, b in pairwise(runs.bounds)]), runs.experts, strict=True))
        # one without rows has the gradient 0
        parts += [(x[:0], e) for e in range(experts) if e not in runs.experts]
        return torch.cat([expert(rows, e) for rows, e in parts])
    # every expert for all rows: nobody has to know where a run ends
    own = experts_of(runs.experts, runs.offsets, len(x))
    y = torch.zeros((), dtype=x.dtype, device=x.device)
    for e in range(experts):
        mine = (own == e)[:, None]
        y = y + torch.where(mine, expert(torch.where(mine, x, 0), e), 0)
    return y


def _experts(parameters: Sequence[Tensor], dim: int) -> int:
    return parameters[0].shape[0] if parameters[0].dim() > dim else len(parameters)


def _product(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Expert:
    """W_e x + b_e: [T, K] to [T, N]."""
    w, b = by_expert(weights, 2), by_expert(biases, 1)
    return lambda rows, e: F.linear(rows, w[e], b[e] if b else None)


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


def routed_linear(linear: Linear, norm: Norm, runs: Runs, ending: Ending) -> Tensor:
    operand, product = _operand(norm, linear.weights[0].dtype), _product(linear.weights, linear.biases)
    z = routed(linear.x, _experts(linear.weights, 2), runs, lambda rows, e: product(operand(rows, e), e))
    return ended(activate(z, linear.activation), ending)


def routed_norm(x: Tensor, norm: Norm, runs: Runs) -> Tensor:
    """Over the rows of [T, D]; the statistics of 16-bit rows in float32."""
    return routed(x, _experts(norm.gammas, 1), runs, _normed(norm))


def _normed(norm: Norm) -> Expert:
    gamma, beta, eps = by_expert(norm.gammas, 1), by_expert(norm.betas, 1), norm.eps

    def expert(rows: Tensor, e: int) -> Tensor:
        g, b = cast(gamma[e], rows.dtype), cast(beta[e], rows.dtype) if beta else None
        # not torch.nn.functional's, which looks for cuDNN at every call
        return torch.layer_norm(rows, g.shape, g, b, eps) if norm.centred else torch.rms_norm(rows, g.shape, g, eps)

    return expert


def _operand(norm: Norm, dtype: torch.dtype) -> Expert:
    """A product's: the rows, or their norm in the product's dtype."""
    if not norm.gammas:
        return lambda rows, e: rows
    normed = _normed(norm)
    return lambda rows, e: cast(normed(rows, e), dtype)


def routed_ffn(ffn: FFN, norm: Norm, runs: Runs, ending: Ending) -> Tensor:
    operand, inner = (
        _operand(norm, ffn.weights_in[0].dtype),
        _normed(Norm(ffn.inner_gammas, ffn.inner_betas, True, ffn.inner_eps)),
    )
    first, second = _product(ffn.weights_in, ffn.biases_in), _product(ffn.weights_out, ffn.biases_out)

    def expert(rows: Tensor, e: int) -> Tensor:
        h = activate(first(operand(rows, e), e), ffn.activation)
        return second(inner(h, e) if ffn.inner_gammas else h, e)

    return ended(routed(ffn.x, _experts(ffn.weights_in, 2), runs, expert), ending)


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
    """q [T, H, d], k and v [T, H / G, d]: softmax(q k^T / sqrt(d) + bias) v among the rows of a sample; [T, H d].

    sees: K x K numbers of `KINDS`, or none: all see all.
    """
    row, segment, within = reading.row, reading.segment, reading.within
    mask = None if reading.full else reading.attended[:, None, None, :]  # [B, 1, 1, S]
    if sees:
        kinds = constant(sees, q.device).view(len(places), -1)
        kind = kinds[segment[:, :, None], segment[:, None, :]]  # [B, S, S]
        seen = ((kind == 2) | ((kind == 1) & (within[:, None, :] <= within[:, :, None])))[:, None]
        mask = seen if mask is None else mask & seen
    if bias is not None:
        place = constant(places, q.device).long()[segment] + within
        of_pairs = bias[:, place[:, :, None], place[:, None, :]].transpose(0, 1)  # [B, H, S, S]
        mask = of_pairs if mask is None else of_pairs.masked_fill(~mask, float("-inf"))
    (b, s), (_, heads, d), shared, of_samples = row.shape, q.shape, k.shape[1], [q, k, v]
    if not reading.in_order:  # a place behind the last row has no gradient
        at, back = row.flatten(), reading.place
        of_samples = [taken(t, at, back) for t in of_samples]
    of_heads = zip(of_samples, (heads, shared, shared), strict=True)
    q_of, k_of, v_of = [t.reshape(b, s, h, d).transpose(1, 2) for t, h in of_heads]  # [B, H, S, d]
    # the fused ones have no forward mode
    with sdpa_kernel(SDPBackend.MATH) if transforming() else AS_IT_IS:
        y = F.scaled_dot_product_attention(
            q_of, k_of, v_of, attn_mask=mask, dropout_p=dropout, enable_gqa=heads != shared
        )
    y = y.transpose(1, 2).reshape(b * s, heads * d)
    if reading.in_order:
        return y
    return taken(y, back, at) if reading.full else y.index_select(0, back)
