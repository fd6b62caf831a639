"""Text embedding in plain torch, a few samples at a time: what stays in the cache is written once.

    x = scale E[id] + position + type,   y = LN(x),   0 where padded

The backward computes x again from the table, so that nothing of [B, L, D] is kept:
    dx = rstd (h - mean(h) - xhat mean(h xhat)),  h = gamma dy
    dE[k] = scale sum of dx over the tokens of id k,   dposition = sum over samples,   dtype = sum over all
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype

_BLOCK = 1 << 19  # elements of a block


@dataclass
class Words:
    """What `embed_text` takes, checked."""

    ids: Tensor  # [B, L] int64
    table: Tensor  # [V, D]
    text_position: Tensor | None  # [L, D]
    text_type: Tensor | None  # [D]
    gamma: Tensor | None  # [D]
    beta: Tensor | None  # [D]
    pad_mask: Tensor | None  # [B, L]
    scale: float
    eps: float | None  # None: no LayerNorm
    padding_idx: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, D) of the result."""
        return (*self.ids.shape, self.table.shape[1])

    @property
    def shift(self) -> Tensor | None:
        """What is added to every sample, [L, D] or [D], in the accumulation dtype."""
        acc = accumulation_dtype(self.table.dtype)
        given = [t.to(acc) for t in (self.text_position, self.text_type) if t is not None]
        return sum(given[1:], given[0]) if given else None


class TorchPasses:
    """The passes over tokens, in plain torch."""

    @staticmethod
    def embedded(words: Words, out: Tensor) -> tuple[Tensor, Tensor]:
        """Write y into `out` [B, L, D]; return (mean, 1 / standard deviation) of x [B, L], empty without a norm."""
        acc, tokens = accumulation_dtype(out.dtype), 0 if words.eps is None else words.ids.shape
        mean, rstd = (torch.empty(tokens, dtype=acc, device=out.device) for _ in range(2))
        gamma, beta = (t if t is None else t.to(acc) for t in (words.gamma, words.beta))
        for rows, x in _summed(words):
            if words.eps is not None:
                x, *stats = torch.native_layer_norm(x, x.shape[2:], gamma, beta, words.eps)
                mean[rows], rstd[rows] = (t[..., 0] for t in stats)
            out[rows] = x if words.pad_mask is None else x.masked_fill_(words.pad_mask[rows, :, None], 0)
        return mean, rstd

    @staticmethod
    def norm_grad(g: Tensor, words: Words, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dx [B, L, D] in g's dtype, dgamma [D], dbeta [D])."""
        dx = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        d = [g.shape[-1]]
        weight = mean.new_ones(d) if words.gamma is None else words.gamma.to(mean.dtype)
        dgamma, dbeta = torch.zeros_like(weight), torch.zeros_like(weight)
        for rows, x in _summed(words):
            dy = g[rows].to(mean.dtype)
            dy = dy if words.pad_mask is None else dy.masked_fill(words.pad_mask[rows, :, None], 0)
            given = (dy, x, d, mean[rows, :, None], rstd[rows, :, None], weight, weight, [True] * 3)
            dx[rows], of_gamma, of_beta = torch.ops.aten.native_layer_norm_backward(*given)
            dgamma += of_gamma
            dbeta += of_beta
        return dx, dgamma, dbeta

    @staticmethod
    def rows_summed(dx: Tensor, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor:
        """The sum of dx [B, L, D] for each id [rows, D]; torch sorts, and adds in order."""
        dx = dx.to(accumulation_dtype(dx.dtype)) if dx.device.type == "cpu" else dx
        pad = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_dense_backward(dx, ids, rows, pad, False)


def _summed(words: Words) -> Iterator[tuple[slice, Tensor]]:
    """Some samples, and x of them in the accumulation dtype."""
    b, length, d = words.shape
    shift, samples = words.shift, max(1, _BLOCK // max(1, length * d))
    for i in range(0, b, samples):
        rows = slice(i, i + samples)
        x = F.embedding(words.ids[rows], words.table).to(accumulation_dtype(words.table.dtype))
        x = x if words.scale == 1 else x.mul_(words.scale)
        yield rows, x if shift is None else x.add_(shift)


def backward(
    passes: Any, g: Tensor, words: Words, stats: Sequence[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    """The gradients of the fields that are wanted; `stats`: mean and rstd, where there is a norm."""
    grads, dx = {}, g
    if words.eps is not None:
        dx, grads["gamma"], grads["beta"] = passes.norm_grad(g, words, *stats)
    elif words.pad_mask is not None:
        dx = g.masked_fill(words.pad_mask[..., None], 0)
    if "table" in wanted:
        summed = passes.rows_summed(dx, words.ids, words.table.shape[0], words.padding_idx)
        grads["table"] = summed if words.scale == 1 else summed * words.scale
    if "text_position" in wanted or "text_type" in wanted:
        grads["text_position"] = dx.sum(0, dtype=accumulation_dtype(dx.dtype))
        grads["text_type"] = grads["text_position"].sum(0)
    return {name: grads[name].to(words.table.dtype) for name in wanted}
