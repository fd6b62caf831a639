"""open_clip's contrastive losses, computed without the N x N matrix of logits.

Constructor, arguments, attributes and outputs are those of open_clip 3.3.0; open_clip itself is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.kernels import clip_loss, siglip_loss
from mmfuse.kernels._runtime import UnsupportedError


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy: `open_clip.loss.ClipLoss` on `mmfuse.clip_loss`.

    forward(image_features [N, D], text_features [N, D], logit_scale, logit_bias=None, output_dict=False) returns a
    scalar, or `{"contrastive_loss": scalar}`. `logit_scale` is already exponentiated: a float, or a tensor of one
    element (0-d or [1]). Deterministic.

    It differs from open_clip in three things: the loss of 16-bit features is float32; the gradient of `logit_bias`,
    which softmax does not see, is exactly zero; and a `logit_scale` of more than one element is refused. For a single
    process `local_loss` and `gather_with_grad` change nothing, as there.

    Raises:
        UnsupportedError: `world_size` is above 1 or `use_horovod` is set: there is no distributed form yet.
        ValueError: the two features differ in shape; or as `mmfuse.clip_loss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}
        require_one_process(self)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The labels [num_logits], int64; kept for the next call if `cache_labels`. `forward` does not need them."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device, dtype=torch.long)
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits per image, logits per text), each [N, N] and in memory. `forward` does not need them."""
        require_one_process(self)
        logits_per_image = logit_scale * image_features @ text_features.T
        logits_per_text = logit_scale * text_features @ image_features.T
        if logit_bias is not None:
            logits_per_image += logit_bias
            logits_per_text += logit_bias
        return logits_per_image, logits_per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        require_one_process(self)
        require_pairs(image_features, text_features)
        loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss: `open_clip.loss.SigLipLoss` on `mmfuse.siglip_loss`.

    forward(image_features [N, D], text_features [N, D], logit_scale, logit_bias, output_dict=False) returns a scalar,
    or `{"contrastive_loss": scalar}`. `logit_scale` (already exponentiated) and `logit_bias` are floats or tensors of
    one element (0-d or [1]); `logit_bias` may be None. Deterministic.

    It differs from open_clip in two things: the loss of 16-bit features is float32, and a `logit_scale` or
    `logit_bias` of more than one element is refused.

    Raises:
        UnsupportedError: `world_size` is above 1: there is no distributed form yet.
        ValueError: unknown `dist_impl`; the two features differ in shape; or as `mmfuse.siglip_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is {dist_impl!r}, expected 'bidir', 'shift', 'reduce' or 'gather'")
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}
        require_one_process(self)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """The labels [num_logits, num_logits]: 1 for a pair, otherwise -1. `forward` does not need them."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        if not negative_only:
            labels = 2 * torch.eye(num_logits, device=device, dtype=dtype) + labels
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The logits [N, N], in memory. `forward` does not need them."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits += logit_bias
        return logits

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        require_pairs(image_features, text_features)
        return siglip_loss(image_features, text_features, logit_scale, logit_bias, negative_only=negative_only)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        require_one_process(self)
        require_pairs(image_features, text_features)
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def distributed(loss: Any) -> str | None:
    """Why a loss with open_clip's attributes needs more than one process, or None."""
    if loss.world_size > 1:
        return f"world_size is {loss.world_size}, expected 1: there is no distributed form yet"
    if getattr(loss, "use_horovod", False):
        return "use_horovod is set: there is no distributed form yet"
    return None


def require_one_process(loss: Any) -> None:
    if why := distributed(loss):
        raise UnsupportedError(f"{type(loss).__name__}: {why}")


def require_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features has shape {tuple(text_features.shape)}, expected {tuple(image_features.shape)} "
            "as image_features"
        )
