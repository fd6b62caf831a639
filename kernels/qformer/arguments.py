"""The checked arguments of attention, which its implementations share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype


class Attended(NamedTuple):
    o: Tensor  # [B, Q, H, d]
    lse: Tensor | None  # [B, H, Q], log of the sum of exp(scores); -inf where there is no key; no gradient


class Outputs(NamedTuple):
    """What implementations compute. Of the statistics only row_max + log(row_sum) means something to others."""

    o: Tensor  # [B, Q, H, d]
    row_max: Tensor  # [B, H, Q] of the scores
    row_sum: Tensor  # [B, H, Q] of exp(score - row_max); apart, both are exact to a rounding


def outputs_of(q: Tensor, rows: int) -> Outputs:
    """Without their numbers."""
    _, queries, heads, d = q.shape
    stats = (q.new_empty(rows, heads, queries, dtype=accumulation_dtype(q.dtype)) for _ in range(2))
    return Outputs(q.new_empty(rows, queries, heads, d), *stats)


class Mapped(NamedTuple):
    o: Tensor
    lse: Tensor
    map: Tensor  # [B, H, Q, N], the probabilities before dropout


@dataclass
class Keys:
    """What queries attend to: the tokens of images, padded, or packed one image after another."""

    k: Tensor  # [I, N, H, d], or packed [T, H, d]
    v: Tensor  # as k
    kv_index: Tensor | None  # int64 [B], the image of each row; None: row b attends to image b
    lengths: Tensor | None  # int64 [I], of padded images; None: N
    cu_seqlens: Tensor | None  # int64 [I + 1], where packed images begin and end
    longest: int  # N, or the most tokens of a packed image

    @property
    def images(self) -> int:
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def rows(self) -> int:
        """B."""
        return self.images if self.kv_index is None else self.kv_index.shape[0]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """int64 [I] each: where an image's tokens begin and end among all."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1], self.cu_seqlens[1:]
        first = torch.arange(self.images, device=self.k.device) * self.longest
        return first, first + (self.longest if self.lengths is None else self.lengths)


@dataclass
class Tokens:
    """Tokens, and what makes keys and values of them."""

    x: Tensor  # [I, N, E]
    key_weight: Tensor  # [H d, E]
    value_weight: Tensor  # [H d, E]
    value_bias: Tensor | None  # [H d]
    lengths: Tensor | None  # int64 [I]; None: N
    bias: Tensor | None  # [I, N], added to the scores

    def keys(self, heads: int) -> Keys:
        """As they are formed."""
        x = self.x if self.lengths is None else zero_behind(self.x, self.lengths)
        (images, n), rows = x.shape[:2], x.flatten(0, 1)
        of_heads = (images, n, heads, self.key_weight.shape[0] // heads)
        k = F.linear(rows, self.key_weight).view(of_heads)
        v = F.linear(rows, self.value_weight, self.value_bias).view(of_heads)
        return Keys(k, v, None, self.lengths, None, n)


def zero_behind(t: Tensor, lengths: Tensor) -> Tensor:
    """Without what lies behind an image's last token, which may be no number: times a probability of 0 it is none."""
    real = torch.arange(t.shape[1], device=t.device) < lengths[:, None]
    return t.where(real.view(*real.shape, *[1] * (t.dim() - 2)), 0)
