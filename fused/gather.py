"""The rows of all processes of a group, as constants."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, in the order of their ranks; each has as many (`require_equal_batches`)."""
    t = t.detach().contiguous()
    everything = t.new_empty(dist.get_world_size(group) * len(t), *t.shape[1:])
    dist.all_gather_into_tensor(everything, t, group=group)
    return everything


def require_equal_batches(batch: Tensor, group: dist.ProcessGroup | None) -> None:
    """A RuntimeError on every rank if their batches differ in size; on a GPU too without waiting for the answer."""
    sizes = gather_rows(torch.full((1,), len(batch), device=batch.device), group)
    torch._assert_async((sizes == len(batch)).all(), "the ranks' batches differ in size, expected equal batches")
