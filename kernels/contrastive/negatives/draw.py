"""Draws without replacement in proportion to softmax weights, while blocks of logits stream by.

    argmax_j S_j + G_j,   G_j = -log(E_j),   E_j ~ Exp(1)      is a draw from softmax(S): the Gumbel-max trick,

and the k largest are k draws without replacement. Weights softmax(S)_j + eps are two races of independent exponentials,
whose minimum has the sum of the rates:

    max(S_j - logsumexp(S) + G_j, log(eps) + G'_j)

so that each race streams on its own and the log-sum-exp, over all columns, is needed only at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.negatives.noise import gumbel

# what is not a number still can be drawn, after all that is one; what is masked cannot
LOWEST = -1e30
# of logits: on a CPU, plain torch makes the noise of a block within the cache, while the compiled pass prefers the
# products of a large one
_BLOCK_BYTES = {"cpu": 16 << 20, "chunked": 1 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Candidates:
    """Queries, the keys among which each draws, and how."""

    query: Tensor  # [B, D]
    keys: Tensor  # [N, D]
    scale: Tensor
    ids: Tensor  # [B]
    key_ids: Tensor  # [N], equal to a query's where it does not draw the key
    seed: Tensor
    k: int
    row_offset: int
    mixture: float
    both: bool  # the keys draw among the queries too


class TorchTile:
    """The passes over a block of logits in plain torch, any float dtype, any device."""

    @staticmethod
    def lse(u: Tensor, scale: Tensor, dim: int) -> Tensor:
        """log-sum-exp of scale * u over the columns (dim = 1) or the rows (dim = 0)."""
        return (u * scale).logsumexp(dim)

    @staticmethod
    def race(u, scale, ids, key_ids, seed, row, col, stream, first, key, index) -> None:  # type: ignore[no-untyped-def]
        """Merge the keys scale * u + G of a block into the running largest `key` and their `index`, both [count, k].

        An odd stream is the rows' own race among the columns, an even one the columns' among the rows; `first` is the
        index of the first candidate.
        """
        # a scale of 0 is a race without logits, whatever they are
        s = torch.where(scale == 0, scale, u * scale)
        keys = torch.where(s >= LOWEST, s, LOWEST) + gumbel(seed, stream, row, col, (len(u), u.shape[1]), u.dtype)
        keys.masked_fill_(ids[:, None] == key_ids, -torch.inf)
        keys = keys if stream % 2 else keys.t()
        values, indices = [], []
        for _ in range(min(key.shape[1], keys.shape[1])):
            value, j = keys.max(1, keepdim=True)
            keys.scatter_(1, j, -torch.inf)
            values.append(value)
            indices.append(j + first)
        merged = merge(torch.cat([key, *values], 1), torch.cat([index, *indices], 1), key.shape[1])
        key.copy_(merged[0])
        index.copy_(merged[1])


def compiled_tile(namespace: Any) -> SimpleNamespace:
    """The same passes from the compiled part, in float32."""

    def lse(u: Tensor, scale: Tensor, dim: int) -> Tensor:
        (m, n), none = u.shape, u.new_empty(0)
        top = [u.new_full((k,), -torch.inf) for k in (n, m)]
        total = [u.new_zeros(k) for k in (n, m)]
        # a diagonal that begins past the last column masks nothing
        namespace.logit_stats(u, scale, n, none, top[1], total[1], top[0], total[0], none)
        return top[dim] + total[dim].log()

    return SimpleNamespace(race=namespace.gumbel_race.default, lse=lse)


def merge(key: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys [count, m] of distinct indices, first on ties, and the indices; -1 beside -inf."""
    keys, indices = [], []
    for _ in range(k):
        largest, at = key.max(1, keepdim=True)
        j = torch.where(largest > -torch.inf, index.gather(1, at), -1)
        key = key.masked_fill(index == j, -torch.inf)
        keys.append(largest)
        indices.append(j)
    return torch.cat(keys, 1), torch.cat(indices, 1)


class Draw:
    """k running draws for each of `count` rows (dim = 1: among columns) or columns (dim = 0: among rows).

    Args:
        seed: [] int64, on the device of the logits.
        dtype: of the logits, float32 or float64.
        row_offset: added to a row's index for its noise, so that the ranks of a group draw independently.
        mixture: eps above.
        tile: the passes over a block, `TorchTile` or `compiled_tile`.
    """

    def __init__(
        self,
        count: int,
        k: int,
        seed: Tensor,
        dtype: torch.dtype,
        *,
        dim: int = 1,
        row_offset: int = 0,
        mixture: float = 0.0,
        tile: Any = TorchTile,
    ) -> None:
        self.seed, self.dim, self.row_offset, self.mixture = seed, dim, row_offset, mixture
        self.tile = tile
        races = 2 if mixture else 1
        self.key = torch.full((races, count, k), -torch.inf, dtype=dtype, device=seed.device)
        self.index = torch.full((races, count, k), -1, device=seed.device)
        self.lse = torch.full((count if mixture else 0,), -torch.inf, dtype=dtype, device=seed.device)

    def add(self, u: Tensor, scale: Tensor, ids: Tensor, key_ids: Tensor, row: int = 0, col: int = 0) -> None:
        """Take in the logits scale * u [r, n] of the pairs that begin at (row, col).

        A pair of equal ids, [r] and [n] int64, is masked: `arange` of the rows and of the columns masks a diagonal.
        """
        if not u.numel():
            return
        first, mine = (col, slice(row, row + len(u))) if self.dim else (row, slice(col, col + u.shape[1]))
        for i, factor in enumerate((scale, torch.zeros_like(scale))[: len(self.key)]):
            self.tile.race(
                u, factor, ids, key_ids, self.seed, row + self.row_offset, col, 2 * i + self.dim, first,
                self.key[i, mine], self.index[i, mine],
            )  # fmt: skip
        if self.mixture:
            self.lse[mine] = torch.logaddexp(self.lse[mine], self.tile.lse(u, scale, self.dim))

    def take(self, race: int, mine: slice, key: Tensor, index: Tensor) -> None:
        """Take in what parts of the columns (rows) left: keys and indices [parts, count, k]."""
        keys, indices = torch.cat([self.key[race, mine], *key], 1), torch.cat([self.index[race, mine], *index], 1)
        self.key[race, mine], self.index[race, mine] = merge(keys, indices, self.key.shape[2])

    def result(self) -> Tensor:
        """[count, k] int64: what was drawn, first draw first; -1 where nothing was left."""
        if not self.mixture:
            return self.index[0]
        drawn, uniform = self.key[0] - self.lse[:, None], self.key[1] + math.log(self.mixture)
        # logits that are not numbers leave the uniform race
        drawn = drawn.nan_to_num(LOWEST, torch.inf, -torch.inf).masked_fill(self.index[0] < 0, -torch.inf)
        return merge(torch.cat([drawn, uniform], 1), torch.cat([*self.index], 1), drawn.shape[1])[1]


def hard_negatives(tile: Any, given: Candidates) -> tuple[Tensor, Tensor]:
    """The draws [B, k] of the rows and, if both, [N, k] of the columns, over blocks of rows."""
    query, keys, both = given.query, given.keys, given.both
    acc = accumulation_dtype(query.dtype)
    options = {"row_offset": given.row_offset, "mixture": given.mixture, "tile": tile}
    rows = Draw(len(query), given.k, given.seed, acc, dim=1, **options)
    columns = Draw(len(keys) if both else 0, given.k, given.seed, acc, dim=0, **options)
    x, y = (products.operand(t, acc) for t in (query, keys))
    kind = "cuda" if x.is_cuda else "chunked" if tile is TorchTile else "cpu"
    step = max(16, _BLOCK_BYTES[kind] // max(1, len(y) * acc.itemsize))
    logits = torch.empty(min(step, len(x)), len(y), dtype=acc, device=x.device)
    for i in range(0, len(x), step):
        block = slice(i, i + step)
        u = logits[: len(x) - i]
        products.mm(x[block], y.t(), u)
        for draw in (rows, columns)[: 1 + both]:
            draw.add(u, given.scale, given.ids[block], given.key_ids, row=i)
    return rows.result(), columns.result()
