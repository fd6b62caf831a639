"""The losses against a momentum queue in plain PyTorch, on the whole matrix of logits: their meaning.

S = x KT / tau            x [B, D] queries, K [K + M, D] the keys of this batch and, after them, the queue
ALBEF    L = mean_i sum_j T_ij (rho_i - S_ij)    T = alpha softmax(x_m KT / tau) + (1 - alpha) Y     Li et al. 2021, (6)
MoCo     L = mean_i (rho_i - S_i+)               the keys of row i: its own, and the queue           He et al. 2020, (1)

with rho_i = logsumexp_j S_ij and Y the positives, 1 / count each: key i, or the keys with an equal id.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels._runtime.registration import without_autocast
from mmfuse.kernels.contrastive.queue.blocked import Directions

_FEW = 1 << 17  # multiplications, up to which a product of 16 bits takes longer than one of float32 with the casts


def queue_itc_loss(given: Directions) -> Tensor:
    """The losses of all directions [W]."""
    temp, ids = given.temp, given.ids
    (ways, b, width), n = given.query.shape, given.keys.shape[1] + given.queue.shape[0]
    query, query_m = given.query, given.query_m
    pairs = zip(given.keys.unbind(), given.queues, strict=True)
    rows = torch.cat([cast(t, query.dtype) for pair in pairs for t in pair]).detach()
    # a graph is for any size
    if query.is_cpu and not torch.compiler.is_compiling() and ways * b * n * width <= _FEW:
        query, rows = cast(query, temp.dtype), cast(rows, temp.dtype)
        query_m = None if query_m is None else cast(query_m, temp.dtype)
    keys = rows.view(ways, n, width).mT
    # autocast has rounded the operands already, and would round the few once more
    with without_autocast(query):
        log_p = torch.log_softmax(_logits(torch.bmm(query, keys), temp), 2)
        with torch.no_grad():
            if ids is None or given.key_ids is None or given.queue_ids is None:
                targets = torch.eye(b, n, dtype=temp.dtype, device=temp.device)
            else:
                same = (ids[:, None] == torch.cat([given.key_ids, given.queue_ids])).to(temp.dtype)
                targets = same / same.sum(1, keepdim=True).clamp_min(1)
            if query_m is not None:
                soft = torch.softmax(_logits(torch.bmm(query_m, keys), temp), 2)
                targets = targets.lerp(soft, given.alpha)
    return (targets * log_p).sum((1, 2)) / -b


def moco_loss(query: Tensor, key: Tensor, queue: Tensor, temp: Tensor) -> Tensor:
    own = (query.to(temp.dtype) * key.detach()).sum(1, keepdim=True) / temp
    # a copy: the queue may change before the backward
    negatives = queue.detach().to(query.dtype, copy=True)
    s = torch.cat([own, _logits(query @ negatives.t(), temp)], dim=1)
    return F.cross_entropy(s, torch.zeros(len(s), dtype=torch.long, device=s.device))


def _logits(products: Tensor, temp: Tensor) -> Tensor:
    # products in the operands' dtype, as eager code computes them; the loss itself in float32 or float64
    return cast(products, temp.dtype) / temp
