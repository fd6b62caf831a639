"""Modality experts in plain PyTorch: what each operation means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.multiway.routing import Routing


def routed(x: Tensor, routing: Routing, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each run of rows by its expert."""
    runs = [expert(x[rows], e) for e, rows in routing.slices()]
    return torch.cat(runs) if len(runs) != 1 else runs[0]


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """[T, K] by [E, N, K] and [E, N]: [T, N]."""
    if not x.shape[0]:
        return x.new_zeros(0, weight.shape[1]) + 0 * weight.sum()
    return routed(x, routing, lambda rows, e: F.linear(rows, weight[e], None if bias is None else bias[e]))


def routed_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, routing: Routing, eps: float) -> Tensor:
    """[T, D] by [E, D] and [E, D]."""
    if not x.shape[0]:
        return x
    return routed(x, routing, lambda rows, e: F.layer_norm(rows, rows.shape[-1:], weight[e], bias[e], eps))


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    sees: Sequence[Sequence[str]] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """[T, H, d] each: softmax(q k^T / sqrt(d) + bias) v among the rows of a sample; [T, H d].

    Args:
        sees: K x K of "all", "causal" or "none": what a segment's rows see of another's. By default all.
        bias: [H, P, P], of the places of a query and of a key.
    """
    if not routing.first.shape[1]:
        raise ValueError(
            "routing has no samples, expected one of Routing.of, Routing.from_split or Routing.from_splits"
        )
    device = q.device
    ends = routing.lengths.cumsum(1)  # [B, K]
    at = torch.arange(routing.longest, device=device)
    segment = (at[None, :, None] >= ends[:, None, :]).sum(2)  # [B, S]; K behind the last row
    real = segment < ends.shape[1]
    segment = segment.clamp(max=ends.shape[1] - 1)
    within = at - (ends - routing.lengths).gather(1, segment)
    row = (routing.first.gather(1, segment) + within).where(real, 0)  # of the stream
    mask = (real & (within < routing.kept.gather(1, segment)))[:, None, None, :]  # [B, 1, 1, S]
    if sees is not None:
        kinds = torch.tensor([[("none", "causal", "all").index(kind) for kind in of] for of in sees], device=device)
        kind = kinds[segment[:, :, None], segment[:, None, :]]  # [B, S, S]
        causal = within[:, None, :] <= within[:, :, None]
        mask = mask & ((kind == 2) | ((kind == 1) & causal))[:, None]
    if bias is not None:
        place = (torch.tensor(routing.places, device=device)[segment] + within).where(real, 0)
        of_pairs = bias[:, place[:, :, None], place[:, None, :]].transpose(0, 1)  # [B, H, S, S]
        mask = of_pairs.masked_fill(~mask, float("-inf"))
    q_of, k_of, v_of = (t[row].transpose(1, 2) for t in (q, k, v))  # [B, H, S, d]
    y = F.scaled_dot_product_attention(q_of, k_of, v_of, attn_mask=mask)
    y = y.transpose(1, 2).flatten(2)
    return y.new_zeros(len(q), y.shape[2]).index_put((row[real],), y[real])
