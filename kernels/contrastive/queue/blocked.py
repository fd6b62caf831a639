"""One pass over keys and queue in plain torch: a product for the logits of student and teacher, one for the gradient.

Of the keys and the queue nothing is copied, unless 16-bit ones are widened on a CPU: then a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.blocked import finite
from mmfuse.kernels.contrastive.negatives.draw import Candidates, Draw

# logits that are held at a time, student's and teacher's, and those that a softmax goes over at once
_LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_PASS_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_KEYS = 4096


@dataclass
class Directions:
    """W directions alike: each has queries, keys and, after the keys, a queue; W is 1 or 2."""

    query: Tensor  # [W, B, D]
    keys: Tensor  # [W, K, D]
    queue: Tensor  # [M, D]
    temp: Tensor  # []
    alpha: Tensor  # [], of the teacher
    query_m: Tensor | None = None  # [W, B, D], the teacher's
    other_queue: Tensor | None = None  # [M, D], of the second direction
    ids: Tensor | None = None  # [B]
    key_ids: Tensor | None = None  # [K]
    queue_ids: Tensor | None = None  # [M]

    @property
    def queues(self) -> list[Tensor]:
        return [self.queue] if self.other_queue is None else [self.queue, self.other_queue]

    def each(self) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """(query, query_m, keys, queue) of every direction."""
        teachers = [None] * len(self.queues) if self.query_m is None else self.query_m.unbind()
        return list(zip(self.query.unbind(), teachers, self.keys.unbind(), self.queues, strict=True))

    def masks(self) -> tuple[Tensor, Tensor]:
        """Ids of the queries and of the keys, equal where a key is not to be drawn."""
        if self.ids is not None and self.key_ids is not None:
            return self.ids, self.key_ids
        b, k = (torch.arange(t.shape[1], device=t.device) for t in (self.query, self.keys))
        return b, k

    def drawn(self, hard_negatives: Callable[..., Any], k: int, mixture: float, seeds: Tensor) -> Tensor:
        """[W, B, k], from a pass of its own over the keys."""
        draws = [
            hard_negatives(Candidates(x, y.to(x.dtype), 1 / self.temp, *self.masks(), seed, k, 0, mixture, False))[0]
            for x, y, seed in zip(self.query, self.keys, seeds, strict=True)
        ]
        return torch.stack(draws)


def scan(
    given: Directions, paired: bool, need: bool, see: Callable[[int, Tensor, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """(row [W, B], g [W, B, D]): row_i = sum_j T_ij (rho_i - S_ij) and g_i = sum_j (P_ij sum_k T_ik - T_ij) K_j.

    T is `alpha` of the teacher's softmax and, where `paired`, 1 - alpha of the positives: equal ids, or column i.
    Without `paired` there are no targets: row_i = rho_i and g_i = sum_j P_ij K_j. `g` is empty unless `need`.
    `see(way, S, i)` gets each block of a direction's logits, rows i and following, all columns.
    """
    rows, grads = zip(*(_scan(given, way, paired, need, see) for way in range(len(given.query))), strict=True)
    return torch.stack(rows), torch.stack(grads)


def scan_and_draw(
    given: Directions, need: bool, k: int, mixture: float, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with pairs, and draws [W, B, k] among the keys from the same logits."""
    own, other = given.masks()
    one = torch.ones_like(given.temp)
    draws = [Draw(len(own), k, seed, given.temp.dtype, mixture=mixture) for seed in seeds]

    def see(way: int, s: Tensor, first: int) -> None:
        draws[way].add(s[:, : len(other)], one, own[first : first + len(s)], other, row=first)

    return *scan(given, True, need, see), torch.stack([draw.result() for draw in draws])


def _scan(
    given: Directions, way: int, paired: bool, need: bool, see: Callable[[int, Tensor, int], None] | None
) -> tuple[Tensor, Tensor]:
    """(row [B], g [B, D]) of one direction."""
    x, x_m, keys, queue = given.each()[way]
    temp, alpha, ids = given.temp, given.alpha, given.ids
    acc, b, n = accumulation_dtype(x.dtype), len(x), len(keys) + len(queue)
    new: dict[str, Any] = {"dtype": acc, "device": x.device}
    row, g = torch.zeros(b, **new), torch.zeros(x.shape if need else 0, **new)
    if not n:
        return (row if paired else row.fill_(-torch.inf)), g
    queries = [x] if x_m is None else [x, x_m]
    all_ids = None if given.key_ids is None or given.queue_ids is None else torch.cat([given.key_ids, given.queue_ids])
    height = max(1, _LOGIT_BYTES[x.device.type] // (len(queries) * n * acc.itemsize))
    step = max(1, _PASS_BYTES[x.device.type] // (n * acc.itemsize))
    logits = torch.empty(len(queries) * min(height, b), n, **new)
    for i in range(0, b, height):
        # the teacher's rows below the student's: one product reads the keys once for both
        both = products.operand(torch.cat([q[i : i + height] for q in queries]), acc)
        u = logits[: len(both)]
        # keys first: a tall product is so much faster than a wide one that it pays for the transposition
        tall = torch.empty(min(_KEYS, n), len(both), **new)
        for at, k in _blocks(keys, queue, x.dtype):
            u[:, at : at + len(k)] = products.mm(products.operand(k, acc), both.t(), tall[: len(k)]).div_(temp).t()
        s, teacher = u[: len(both) // len(queries)], u[len(both) // len(queries) :]
        if see is not None:
            see(way, s, i)
        for j in range(0, len(s), step):
            first = i + j
            span = slice(first, first + len(s[j : j + step]))
            hard = None if ids is None or all_ids is None else ids[span, None] == all_ids
            row[span] = _rows(s[j : j + step], teacher[j : j + step], alpha, hard, first, paired, need)
        for at, k in _blocks(keys, queue, x.dtype) if need else ():
            products.add_mm_(g[i : i + height], s[:, at : at + len(k)], k.to(acc))
    return row, g


def _blocks(keys: Tensor, queue: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The keys and then the queue, as (first column, [k, D] rounded to the queries' dtype)."""
    for first, source in ((0, keys), (len(keys), queue)):
        for i in range(0, len(source), _KEYS):
            yield first + i, source[i : i + _KEYS].to(dtype)


def _rows(
    s: Tensor, teacher: Tensor, alpha: Tensor, hard: Tensor | None, first: int, paired: bool, need: bool
) -> Tensor:
    """The rows' loss from logits s [R, N]; s becomes G, and the teacher's logits its softmax."""
    top = s.amax(1, keepdim=True)
    top = top if paired else finite(top)
    s.sub_(top)
    target = s.new_zeros(len(s))  # sum_j T_ij (S_ij - max)
    weight: Tensor | float = 1.0  # sum_j T_ij
    if len(teacher):
        torch.softmax(teacher, 1, out=teacher)
        target += alpha * torch.linalg.vecdot(teacher, s)
    if hard is not None:
        count = hard.sum(1, keepdim=True).to(s.dtype)
        hard = hard.to(s.dtype).mul_((1 - alpha) / count.clamp_min(1))
        target += torch.linalg.vecdot(hard, s)
        # a row without a match has no hard targets
        weight = alpha + (1 - alpha) * (count > 0).to(s.dtype)[:, 0]
    elif paired:
        target += (1 - alpha) * s[:, first:].diagonal()
    p = s.exp_()
    total = p.sum(1)
    loss = weight * torch.log(total) - target
    if need:
        p.mul_((weight / total)[:, None])
        if len(teacher):
            p.addcmul_(teacher, alpha, value=-1)
        if hard is not None:
            p.sub_(hard)
        elif paired:
            p[:, first:].diagonal().sub_(1 - alpha)
    return loss if paired else loss + top[:, 0]
