"""BLIP-2's image-text contrastive loss as a module, over one process or several."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from mmfuse.fused.gather import gather_rows, gather_rows_with_grad, require_equal_batches
from mmfuse.kernels import max_query_loss


class MaxQueryITC(nn.Module):
    """BLIP-2's image-text contrastive loss on `mmfuse.max_query_loss` (Li et al. 2023; LAVIS, `blip2_qformer.py`).

    forward(image_embeds [B, Q, D], text [B, D], temp, image_id=None [B] or [B, 1]) returns a scalar. The features are
    L2-normalised already; temp is the divisor, a float or a tensor of one element; equal `image_id` are positives.
    Each process's rows are compared with those of all processes, which must have the same B. Deterministic.

    Gradients are those of LAVIS: without `torch.distributed` they reach both features in both directions; with it the
    gathered features are constants, the own rows too, so they reach image_embeds in the image-to-text and text in the
    text-to-image direction alone. A batch of one works, where LAVIS's squeeze() fails.

    Args:
        label_smoothing: eps of the targets (1 - eps) positives + eps / N; 0.1 in LAVIS.
        gather_with_grad: let gradients through the gathered features, summed over the processes: the gradient of the
            sum of all processes' losses.
        process_group: by default all processes.

    Raises:
        ValueError, TypeError, UnsupportedError: as `mmfuse.max_query_loss`.
        RuntimeError: the processes' batches differ in size.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        gather_with_grad: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.gather_with_grad = gather_with_grad
        self.process_group = process_group

    def forward(
        self, image_embeds: Tensor, text: Tensor, temp: Tensor | float, image_id: Tensor | None = None
    ) -> Tensor:
        ids = None if image_id is None else image_id.flatten()
        if not (dist.is_available() and dist.is_initialized()):
            return max_query_loss(image_embeds, text, temp, label_smoothing=self.label_smoothing, ids=ids)
        require_equal_batches(text, self.process_group)
        gather = gather_rows_with_grad if self.gather_with_grad else gather_rows
        return max_query_loss(
            image_embeds,
            text,
            temp,
            image_all=gather(image_embeds, self.process_group),
            text_all=gather(text, self.process_group),
            row_offset=dist.get_rank(self.process_group) * len(text),
            label_smoothing=self.label_smoothing,
            ids=ids,
            all_ids=None if ids is None else gather_rows(ids, self.process_group),
        )
