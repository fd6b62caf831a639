"""What each rank runs in the tests of modules that gather features, and LAVIS's own lines."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfuse.fused import MaxQueryITC, MomentumQueueITC

IDS = torch.tensor([4, 7, 7, 4, 1, 7])


def lavis(image_feats: Tensor, text_feat: Tensor, temp: Tensor, gather, rank: int, image_id: Tensor | None = None):  # type: ignore[no-untyped-def]
    """Salesforce LAVIS, blip2_qformer.py, its names and formulas."""
    image_feats_all, text_feat_all = gather(image_feats), gather(text_feat)
    sim_q2t = torch.matmul(image_feats.unsqueeze(1), text_feat_all.unsqueeze(-1)).squeeze()
    sim_i2t, _ = sim_q2t.max(-1)
    sim_i2t = sim_i2t / temp
    sim_t2q = torch.matmul(text_feat.unsqueeze(1).unsqueeze(1), image_feats_all.permute(0, 2, 1)).squeeze()
    sim_t2i, _ = sim_t2q.max(-1)
    sim_t2i = sim_t2i / temp
    if image_id is not None:
        pos_idx = torch.eq(image_id.view(-1, 1), gather(image_id).view(1, -1)).to(sim_i2t.dtype)
        sim_targets = pos_idx / pos_idx.sum(1, keepdim=True)
        sim_targets = 0.9 * sim_targets + 0.1 * torch.ones_like(sim_targets) / sim_targets.size(1)
        loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * sim_targets, dim=1).mean()
        loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * sim_targets, dim=1).mean()
        return (loss_t2i + loss_i2t) / 2
    bs = image_feats.size(0)
    targets = torch.arange(rank * bs, rank * bs + bs)
    return (
        F.cross_entropy(sim_i2t, targets, label_smoothing=0.1) + F.cross_entropy(sim_t2i, targets, label_smoothing=0.1)
    ) / 2


def batch(rows: int) -> list[Tensor]:
    """The same on every process: image_feats, text_feat, temp."""
    draw = torch.Generator().manual_seed(3)
    image, text = (
        F.normalize(torch.randn(shape, generator=draw, dtype=torch.float64), dim=-1)
        for shape in ((rows, 5, 8), (rows, 8))
    )
    return [image, text, torch.tensor(0.07, dtype=torch.float64)]


def rows_of(rank: int, world: int, tensors: list[Tensor]) -> list[Tensor]:
    """A process's leaves, and its own temp."""
    *features, temp = tensors
    return [*(t.chunk(world)[rank].clone().requires_grad_() for t in features), temp.clone().requires_grad_()]


def sum_of_losses(image: Tensor, text: Tensor, temp: Tensor, ids: Tensor | None, world: int) -> Tensor:
    """Of all processes, with gradients through what they gather."""
    everyone = {3: image, 2: text, 1: ids}
    parts = [(None,) * world if t is None else t.chunk(world) for t in (image, text, ids)]
    losses = [
        lavis(i, t, temp, lambda x: everyone[x.dim()], r, own) for r, (i, t, own) in enumerate(zip(*parts, strict=True))
    ]
    return torch.stack(losses).sum()


def max_query(rank: int, world: int) -> None:
    def concat_all_gather(t: Tensor) -> Tensor:
        with torch.no_grad():
            every = [torch.empty_like(t) for _ in range(world)]
            dist.all_gather(every, t.contiguous())
            return torch.cat(every)

    whole = batch(6)
    for ids in (None, IDS):
        own = None if ids is None else ids.chunk(world)[rank]
        leaves = rows_of(rank, world, whole)
        got, want = MaxQueryITC()(*leaves, own), lavis(*leaves, concat_all_gather, rank, own)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))

        # through the gathered features: the gradient of the sum of all processes' losses
        got = MaxQueryITC(gather_with_grad=True)(*leaves, own)
        torch.testing.assert_close(got, want)
        everyone = [t.clone().requires_grad_() for t in whole]
        want_all = torch.autograd.grad(sum_of_losses(*everyone, ids, world), everyone[:2])
        for g, w in zip(torch.autograd.grad(got, leaves[:2]), want_all, strict=True):
            torch.testing.assert_close(g, w.chunk(world)[rank])

    # a group of one process: a batch of its own, and its gathered features are constants as well
    alone = [dist.new_group([r]) for r in range(world)][rank]
    leaves = rows_of(rank, world, whole)
    got = MaxQueryITC(process_group=alone)(*leaves)
    want = lavis(*leaves, Tensor.detach, 0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))

    with pytest.raises(RuntimeError, match="batches differ in size"):
        MaxQueryITC()(*(t[: 2 + rank] for t in whole[:2]), whole[2])


def momentum_queue(rank: int, size: int) -> None:
    queue = MomentumQueueITC(4, 10, with_ids=True, process_group=dist.group.WORLD)
    queue.enqueue(torch.full((3, 4), rank + 1.0), torch.full((3, 4), rank + 5.0), torch.arange(3) + 10 * rank)
    assert queue.idx_queue[0, :7].tolist() == [0, 1, 2, 10, 11, 12, -100] and queue.queue_ptr.item() == 6
    assert queue.image_queue[0, :6].tolist() == [1, 1, 1, 2, 2, 2] and queue.text_queue[3, 5] == 6
    other = copy.deepcopy(queue)
    assert other.process_group is queue.process_group and other.image_queue.data_ptr() != queue.image_queue.data_ptr()
    assert torch.equal(other.image_queue, queue.image_queue) and other.image_queue.t().is_contiguous()
    with pytest.raises(RuntimeError, match="differ in size"):
        queue.enqueue(torch.ones(2 + rank, 4), torch.ones(2 + rank, 4), torch.arange(2 + rank))
