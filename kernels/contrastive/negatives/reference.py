"""Hard negatives in plain PyTorch on the whole matrix of logits: their meaning.

S = s query keysT, and a row draws a column of unequal id in proportion to softmax(S)_ij + eps, the softmax over all
columns (ALBEF, BLIP: eps = 1e-4 in BLIP's pre-training, otherwise 0). The largest of log(weight) + Gumbel noise is such
a draw, the k largest are k draws without replacement; the noise of the two terms is drawn apart (see `draw.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.negatives.draw import LOWEST, Candidates
from mmfuse.kernels.contrastive.negatives.noise import gumbel


def hard_negatives(given: Candidates) -> tuple[Tensor, Tensor]:
    """The draws [B, k] of the rows and, if both, [N, k] of the columns."""
    query, keys, k, mixture = given.query, given.keys, given.k, given.mixture
    acc = accumulation_dtype(query.dtype)
    s = given.scale * (query.to(acc) @ keys.to(acc).t())
    masked = given.ids[:, None] == given.key_ids

    def noise(stream: int) -> Tensor:
        return gumbel(given.seed, stream, given.row_offset, 0, (len(query), len(keys)), acc)

    def draw(dim: int) -> Tensor:
        race = s + noise(dim)
        if mixture:
            race = torch.fmax(s.log_softmax(dim) + noise(dim), math.log(mixture) + noise(dim + 2))
        race = torch.where(race >= LOWEST, race, LOWEST).masked_fill(masked, -torch.inf)
        key, index = race.sort(dim=dim, descending=True, stable=True)
        drawn = torch.where(key > -torch.inf, index, -1)
        drawn = drawn[:, :k] if dim else drawn[:k].t()
        return torch.nn.functional.pad(drawn, (0, k - drawn.shape[1]), value=-1).contiguous()

    return draw(1), draw(0) if given.both else given.ids.new_empty(0, k)
