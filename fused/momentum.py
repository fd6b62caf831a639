"""Contrastive learning against momentum encoders and a queue of their features, as in ALBEF, BLIP and MoCo."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.gather import gather_rows, require_equal_batches
from mmfuse.kernels.contrastive.queue import queue_itc_losses


class MomentumQueueITC(nn.Module):
    """Image-text contrastive loss with momentum distillation, and its queues (Li et al. 2021, section 3.2 and 3.3).

    Buffers are those of the official code: `image_queue` and `text_queue` [embed_dim, queue_size] (unit random columns
    until they are filled), `queue_ptr` [1], and with `with_ids` `idx_queue` [1, queue_size] (-100 where empty). The
    queues lie in memory as rows [queue_size, embed_dim], of which the buffers are transposed views: an enqueue writes
    whole rows, the loss reads them in place, and checkpoints have the official layout.

    Args:
        embed_dim: D.
        queue_size: M, any number; a batch that reaches the end wraps around.
        with_ids: keep an id for each column, for positives by equal ids.
        process_group: gather the enqueued features of this group, which must have equal batches. None: enqueue the own.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor
    idx_queue: Tensor

    def __init__(
        self,
        embed_dim: int,
        queue_size: int,
        with_ids: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        for name in ("image_queue", "text_queue"):
            columns = F.normalize(torch.randn(embed_dim, queue_size), dim=0)
            self.register_buffer(name, columns.t().contiguous().t())
        if with_ids:
            self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_m: Tensor,
        text_m: Tensor,
        temp: Tensor | float,
        alpha: float = 0.0,
        ids: Tensor | None = None,
        *,
        negatives: int = 0,
        mixture: float = 0.0,
        seed: Tensor | int | None = None,
    ) -> tuple[Tensor, ...]:
        """(image-to-text, text-to-image) losses against the queues as they are, which come before `enqueue`.

        With `negatives` = k also the hard negatives of image-text matching, out of the same logits: the result is then
        (image-to-text, text-to-image, texts [B, k] of the images, images [B, k] of the texts), int64 rows of the batch,
        as `HardNegativeSampler` draws them from `text_m` and `image_m` with the same seed.

        Args:
            image, text: [B, D] features, normalised; with gradient.
            image_m, text_m: [B, D] of the momentum encoders; no gradient.
            temp: the divisor, a float or a tensor of one element, differentiable; clamping it is the caller's.
            alpha: weight of the teacher's soft targets; 0 does not compute them.
            ids: [B] integers, for positives by equal ids (`with_ids`), which no draw takes.
            negatives, mixture, seed: draws per row, and the rest as for `mmfuse.hard_negatives`.

        Raises:
            ValueError: `ids` without `with_ids`; or as `mmfuse.queue_itc_loss`.
        """
        self._check(ids, required=False)
        queues = self.image_queue.t(), self.text_queue.t()
        return queue_itc_losses(
            image,
            text,
            image_m,
            text_m,
            *queues,
            temp,
            alpha=alpha,
            ids=ids,
            queue_ids=None if ids is None else self.idx_queue[0],
            negatives=negatives,
            mixture=mixture,
            seed=seed,
        )

    @torch.no_grad()
    def enqueue(self, image_m: Tensor, text_m: Tensor, ids: Tensor | None = None) -> None:
        """Put a batch of momentum features [B, D] (and ids [B]) in place of the oldest; no synchronisation.

        Raises:
            ValueError: the features are not as wide as the queue, more than it has, or of different shapes; ids are
                missing or not expected.
            RuntimeError: the group's batches differ in size.
        """
        self._check(ids, required=True)
        size = self.image_queue.shape[1]
        if image_m.shape[1:] != self.image_queue.shape[:1]:
            raise ValueError(f"image_m has shape {tuple(image_m.shape)}, expected [B, {len(self.image_queue)}]")
        if image_m.shape != text_m.shape:
            raise ValueError(f"text_m has shape {tuple(text_m.shape)}, expected {tuple(image_m.shape)} as image_m")
        if ids is not None and ids.shape != image_m.shape[:1]:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, expected [{len(image_m)}]")
        if self.process_group is not None:
            require_equal_batches(image_m, self.process_group)
        image_m, text_m = self._gather(image_m), self._gather(text_m)
        if len(image_m) > size:
            raise ValueError(
                f"image_m has {len(image_m)} rows over all ranks, expected at most the {size} of the queue"
            )
        at = (self.queue_ptr + torch.arange(len(image_m), device=self.queue_ptr.device)) % size
        self.image_queue.t().index_copy_(0, at, image_m.to(self.image_queue.dtype))
        self.text_queue.t().index_copy_(0, at, text_m.to(self.text_queue.dtype))
        if ids is not None:
            self.idx_queue[0].index_copy_(0, at, self._gather(ids.to(self.idx_queue.dtype)))
        self.queue_ptr.add_(len(image_m)).remainder_(size)

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentumQueueITC:
        # a process group cannot be copied: it is shared
        memo[id(self.process_group)] = self.process_group
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _check(self, ids: Tensor | None, required: bool) -> None:
        with_ids = hasattr(self, "idx_queue")
        if ids is not None and not with_ids:
            raise ValueError("ids are given, expected None: the queue was made without with_ids")
        if ids is None and with_ids and required:
            raise ValueError("ids is None, expected [B] integers: the queue was made with with_ids")

    def _gather(self, t: Tensor) -> Tensor:
        return t if self.process_group is None else gather_rows(t, self.process_group)


@torch.no_grad()
def momentum_update(params: Iterable[Tensor], momentum_params: Iterable[Tensor], m: float) -> None:
    """p_m = m p_m + (1 - m) p for all pairs, in place and in one launch per dtype and device (He et al. 2020, (2)).

    Raises:
        RuntimeError: the two differ in number or dtype, or in shapes that do not broadcast.
    """
    torch._foreach_lerp_(list(momentum_params), list(params), 1 - m)
