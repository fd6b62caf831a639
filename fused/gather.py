"""The rows of all processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes as constants, in the order of their ranks; each has as many.

    `require_equal_batches` asks whether they have.
    """
    t = t.detach().contiguous()
    everything = t.new_empty(dist.get_world_size(group) * len(t), *t.shape[1:])
    dist.all_gather_into_tensor(everything, t, group=group)
    return everything


def gather_rows_with_grad(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, with a gradient: each process gets the sum of what all have for its rows."""
    return _Gather.apply(t, group)


def require_equal_batches(batch: Tensor, group: dist.ProcessGroup | None) -> None:
    """A RuntimeError on every rank if their batches differ in size; on a GPU too without waiting for the answer."""
    sizes = gather_rows(torch.full((1,), len(batch), device=batch.device), group)
    torch._assert_async((sizes == len(batch)).all(), "the ranks' batches differ in size, expected equal batches")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        out = g.new_empty(len(g) // dist.get_world_size(ctx.group), *g.shape[1:])
        dist.reduce_scatter_tensor(out, g.contiguous(), group=ctx.group)
        return out, None
