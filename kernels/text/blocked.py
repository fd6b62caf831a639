"""Text embedding in plain torch, a few samples at a time: what stays in the cache is written once.

    x = scale E[id] + position + type,   y = LN(x),   0 where padded

The backward computes x again from the table, so that nothing of [B, L, D] is kept:
    dx = rstd (h - mean(h) - xhat mean(h xhat)),  h = gamma dy
    dE[k] = scale sum of dx over the tokens of id k,   dposition = sum over samples,   dtype = sum over all
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype

_BLOCK = 1 << 19  # elements of a block


class TorchPasses:
    """The passes over tokens, in plain torch."""

    @staticmethod
    def embedded(
        ids: Tensor,
        table: Tensor,
        shift: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        pad: Tensor | None,
        scale: float,
        eps: float | None,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write y into `out` [B, L, D]; return (mean, 1 / standard deviation) of x [B, L], empty without a norm."""
        acc, d = accumulation_dtype(table.dtype), [table.shape[1]]
        mean, rstd = (torch.empty(ids.shape if eps is not None else 0, dtype=acc, device=ids.device) for _ in range(2))
        gamma, beta = (t if t is None else t.to(acc) for t in (gamma, beta))
        for rows in _blocks(ids, table):
            x = _summed(ids[rows], table, shift, scale)
            if eps is not None:
                x, *stats = torch.native_layer_norm(x, d, gamma, beta, eps)
                mean[rows], rstd[rows] = (t[..., 0] for t in stats)
            out[rows] = x if pad is None else x.masked_fill_(pad[rows, :, None], 0)
        return mean, rstd

    @staticmethod
    def norm_grad(
        g: Tensor,
        ids: Tensor,
        table: Tensor,
        shift: Tensor | None,
        gamma: Tensor | None,
        pad: Tensor | None,
        scale: float,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx [B, L, D] in g's dtype, dgamma [D], dbeta [D])."""
        dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        d = [g.shape[-1]]
        weight = mean.new_ones(d) if gamma is None else gamma.to(mean.dtype)
        dgamma, dbeta = torch.zeros_like(weight), torch.zeros_like(weight)
        for rows in _blocks(ids, table):
            x = _summed(ids[rows], table, shift, scale)
            dy = g[rows].to(mean.dtype)
            dy = dy if pad is None else dy.masked_fill(pad[rows, :, None], 0)
            given = (dy, x, d, mean[rows, :, None], rstd[rows, :, None], weight, weight, [True] * 3)
            dx[rows], of_gamma, of_beta = torch.ops.aten.native_layer_norm_backward(*given)
            dgamma += of_gamma
            dbeta += of_beta
        return dx, dgamma, dbeta

    @staticmethod
    def rows_summed(dx: Tensor, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor:
        """The sum of dx [B, L, D] for each id [rows, D]; torch sorts, and adds in order."""
        acc = accumulation_dtype(dx.dtype)
        dx = dx.to(acc) if dx.device.type == "cpu" else dx
        pad = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_dense_backward(dx, ids, rows, pad, False)


def _blocks(ids: Tensor, table: Tensor) -> list[slice]:
    samples = max(1, _BLOCK // max(1, ids.shape[1] * table.shape[1]))
    return [slice(i, i + samples) for i in range(0, ids.shape[0], samples)]


def _summed(ids: Tensor, table: Tensor, shift: Tensor | None, scale: float) -> Tensor:
    """x in the accumulation dtype."""
    x = F.embedding(ids, table).to(accumulation_dtype(table.dtype))
    x = x if scale == 1 else x.mul_(scale)
    return x if shift is None else x.add_(shift)


def shift_of(position: Tensor | None, type_embed: Tensor | None, table: Tensor) -> Tensor | None:
    """What is added to every sample, [L, D] or [D], in the accumulation dtype."""
    given = [t.to(accumulation_dtype(table.dtype)) for t in (position, type_embed) if t is not None]
    return sum(given[1:], given[0]) if given else None


def forward(
    passes: Any,
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    type_embed: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    pad: Tensor | None,
    scale: float,
    eps: float | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    shift = shift_of(position, type_embed, table)
    return passes.embedded(ids, table, shift, gamma, beta, pad, scale, eps, out)


def backward(
    passes: Any,
    g: Tensor,
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    type_embed: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    pad: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    normed: bool,
    padding_idx: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dtable, dposition, dtype_embed, dgamma, dbeta), an empty one where `needs` says no."""
    need_table, need_position, need_type, need_gamma, need_beta = needs
    dtable, dposition, dtype, dgamma, dbeta = (table.new_empty(0) for _ in needs)
    dx = g
    if normed:
        shift = shift_of(position, type_embed, table)
        dx, sum_gamma, sum_beta = passes.norm_grad(g, ids, table, shift, gamma, pad, scale, mean, rstd)
        dgamma = sum_gamma.to(gamma.dtype) if need_gamma and gamma is not None else dgamma
        dbeta = sum_beta.to(beta.dtype) if need_beta and beta is not None else dbeta
    elif pad is not None:
        dx = g.masked_fill(pad[..., None], 0)
    if need_table:
        summed = passes.rows_summed(dx, ids, table.shape[0], padding_idx)
        dtable = (summed if scale == 1 else summed * scale).to(table.dtype)
    if need_position or need_type:
        of_position = dx.sum(0, dtype=accumulation_dtype(dx.dtype))
        if need_position and position is not None:
            dposition = of_position.to(position.dtype)
        if need_type and type_embed is not None:
            dtype = of_position.sum(0).to(type_embed.dtype)
    return dtable, dposition, dtype, dgamma, dbeta
