"""open_clip's contrastive losses, computed without the N x N matrix of logits, on one process or many.

Constructor, arguments, attributes and outputs are those of open_clip 3.3 and, with SigLIP's `chunk_size`, of the one
after it; open_clip itself is not needed. With `world_size` above 1 each rank calls its own loss on its own features, as
there. Three attributes may be set beside open_clip's: `group`, the process group (None: the default one), `grad_scale`,
"open_clip" or "true", and `dist_impl`, of SigLIP its own, of CLIP "gather" or "ring" (`mmfuse.distributed_clip_loss`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmfuse.kernels import (
    clip_loss,
    distill_clip_loss,
    distributed_clip_loss,
    distributed_siglip_loss,
    siglip_loss,
)
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.arguments import scalar
from mmfuse.kernels.contrastive.distributed.peers import Peers, agree_on_sizes, members
from mmfuse.kernels.contrastive.distributed.reference import gathered


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy: `open_clip.loss.ClipLoss` on `mmfuse.clip_loss`.

    forward(image_features [b, D], text_features [b, D], logit_scale, logit_bias=None, output_dict=False) returns a
    scalar, or `{"contrastive_loss": scalar}`. `logit_scale` is already exponentiated: a float, or a tensor of one
    element (0-d or [1]). On several ranks value and gradients are those of open_clip's (local_loss, gather_with_grad)
    on every rank, and b may differ by rank (`mmfuse.distributed_clip_loss` says what the loss then is). Deterministic.

    It differs from open_clip in three things: the loss of 16-bit features is float32; the gradient of `logit_bias`,
    which softmax does not see, is exactly zero; and a `logit_scale` of more than one element is refused. For a single
    process `local_loss` and `gather_with_grad` change nothing, as there.

    Raises:
        UnsupportedError: `use_horovod` is set.
        ValueError: the two features differ in shape; `rank` and `world_size` are not those of the process group; or as
            `mmfuse.clip_loss` and `mmfuse.distributed_clip_loss`.
    """

    group: Any = None
    grad_scale: Literal["open_clip", "true"] = "open_clip"

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
        _require_torch_distributed(self)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The labels [num_logits], int64; kept for the next call if `cache_labels`. `forward` does not need them."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device, dtype=torch.long)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
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
        """(logits per image, logits per text), [b or N, N] each and in memory. `forward` does not need them."""
        _require_torch_distributed(self)
        if self.world_size > 1:
            _, (all_image, all_text) = _gather(self, image_features, text_features)
            if self.local_loss:
                logits_per_image = logit_scale * image_features @ all_text.T
                logits_per_text = logit_scale * text_features @ all_image.T
            else:
                logits_per_image = logit_scale * all_image @ all_text.T
                logits_per_text = logits_per_image.T
        else:
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
        loss = _contrastive(self, image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """CoCa's contrastive and captioning losses: `open_clip.loss.CoCaLoss` on `ClipLoss`.

    forward(image_features [b, D], text_features [b, D], logits [b, T, V], labels [b, T], logit_scale,
    output_dict=False) returns (contrastive, caption), each times its weight, or a dict of "contrastive_loss" and
    "caption_loss". The caption loss is the cross-entropy of the logits, the mean over labels other than `pad_id`, and 0
    on a rank without rows. A `clip_loss_weight` of 0 leaves the contrastive loss out: an integer 0, and nothing is
    gathered.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        clip = torch.zeros((), dtype=torch.long, device=logits.device)
        if self.clip_loss_weight:
            clip = self.clip_loss_weight * _contrastive(self, image_features, text_features, logit_scale)
        # one token per row: the same mean as over the permuted [b, V, T], whose softmax would run across rows
        tokens = logits.flatten(0, 1)
        # the mean over no rows at all would be NaN
        caption = self.caption_loss(tokens, labels.flatten()) if len(tokens) else tokens.sum()
        caption = caption * self.caption_loss_weight
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and the cross-entropy with a teacher's softmaxes: `open_clip.loss.DistillClipLoss`.

    forward(image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale,
    output_dict=False) returns (contrastive, distill), or a dict of "contrastive_loss" and "distill_loss"; on
    `mmfuse.distill_clip_loss`. The teacher's features [b, Dt] and scale get gradients too, where they require them.
    On several ranks the features are gathered as (local_loss, gather_with_grad) say, the teacher's too.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The cross-entropy of two matrices of logits in memory. `forward` does not need it."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        contrastive, distill = _distilled(self, student, logit_scale, teacher, dist_logit_scale)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss: `open_clip.loss.SigLipLoss` on `mmfuse.siglip_loss`.

    forward(image_features [b, D], text_features [b, D], logit_scale, logit_bias, output_dict=False) returns a scalar,
    or `{"contrastive_loss": scalar}`. `logit_scale` (already exponentiated) and `logit_bias` are floats or tensors of
    one element (0-d or [1]); `logit_bias` may be None. On several ranks it is the loss of this rank's images and all
    ranks' texts, which travel as `dist_impl` says (`mmfuse.distributed_siglip_loss`). `chunk_size`, the rows of logits
    that open_clip holds at once, changes nothing: no logits are held. Deterministic.

    It differs from open_clip in two things: the loss of 16-bit features is float32, and a `logit_scale` or
    `logit_bias` of more than one element is refused.

    Raises:
        ValueError: unknown `dist_impl`; the two features differ in shape; `rank` and `world_size` are not those of the
            process group; or as `mmfuse.siglip_loss`.
    """

    group: Any = None

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is {dist_impl!r}, expected 'bidir', 'shift', 'reduce' or 'gather'")
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

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
        """The logits of two blocks of features, in memory. `forward` does not need them."""
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
        pairs = (image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1:
            loss = distributed_siglip_loss(*pairs, group=_group(self), dist_impl=self.dist_impl)
        else:
            require_pairs(image_features, text_features)
            loss = siglip_loss(*pairs)
        return {"contrastive_loss": loss} if output_dict else loss


# --- functions, not methods: accelerate() runs the forwards above on open_clip's own modules -----------------------


def _contrastive(
    loss: Any, image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> Tensor:
    _require_torch_distributed(loss)
    if loss.world_size <= 1:
        require_pairs(image, text)
        return clip_loss(image, text, logit_scale, logit_bias)
    value = distributed_clip_loss(
        image,
        text,
        logit_scale,
        group=_group(loss),
        local_loss=loss.local_loss,
        gather_with_grad=loss.gather_with_grad,
        grad_scale=getattr(loss, "grad_scale", "open_clip"),
        dist_impl=getattr(loss, "dist_impl", "gather"),
    )
    return value + 0 * logit_bias.sum().to(value.dtype) if isinstance(logit_bias, Tensor) else value


def _distilled(
    loss: Any,
    student: tuple[Tensor, Tensor],
    logit_scale: Tensor | float,
    teacher: tuple[Tensor, Tensor],
    teacher_scale: Tensor | float,
) -> tuple[Tensor, Tensor]:
    _require_torch_distributed(loss)
    require_pairs(*student)
    require_pairs(*teacher)
    # open_clip multiplies each model's features by themselves, so that their dtypes may differ
    dtype = torch.promote_types(student[0].dtype, teacher[0].dtype)
    (x, y), (tx, ty) = (tuple(t.to(dtype) for t in pair) for pair in (student, teacher))
    if loss.world_size <= 1:
        return distill_clip_loss(x, y, logit_scale, tx, ty, teacher_scale)
    peers, (all_x, all_y) = _gather(loss, x, y)
    _, (all_tx, all_ty) = _gather(loss, tx, ty)
    if not loss.local_loss:
        return distill_clip_loss(all_x, all_y, logit_scale, all_tx, all_ty, teacher_scale)
    if not len(x):
        # no pair to take the mean over, as in ClipLoss; the other ranks' gradients still pass through what is gathered
        empty = sum(t[:0].sum() for t in (all_x, all_y, all_tx, all_ty))
        nothing = empty * scalar("logit_scale", logit_scale, x) * scalar("dist_logit_scale", teacher_scale, x)
        return nothing, nothing
    # each direction over this rank's rows of it
    rows = {"weights": (0.5, 0.0), "row_offset": peers.own.start}
    to_text = distill_clip_loss(x, all_y, logit_scale, tx, all_ty, teacher_scale, **rows)
    to_image = distill_clip_loss(y, all_x, logit_scale, ty, all_tx, teacher_scale, **rows)
    # "true": the mean over ranks is the mean over all pairs, also where the ranks' numbers of pairs differ
    share = peers.size * len(x) / peers.total if getattr(loss, "grad_scale", "open_clip") == "true" else 1.0
    return share * (to_text[0] + to_image[0]), share * (to_text[1] + to_image[1])


@torch.compiler.disable
def _gather(loss: Any, image: Tensor, text: Tensor) -> tuple[Peers, list[Tensor]]:
    """The features of all ranks, with the gradients that the loss's mode gives them."""
    local = bool(loss.local_loss)
    with_grad = bool(loss.gather_with_grad) or getattr(loss, "grad_scale", "open_clip") == "true"
    peers = agree_on_sizes(_group(loss), image, None, {"local_loss": local, "gather_with_grad": with_grad})
    return peers, [gathered(t, peers, with_grad, not local) for t in (image, text)]


def _group(loss: Any) -> Any:
    group = getattr(loss, "group", None)
    rank, size = members(group)
    if (loss.rank, loss.world_size) != (rank, size):
        raise ValueError(
            f"{type(loss).__name__} has rank {loss.rank} and world_size {loss.world_size}, expected {rank} and {size} "
            "as the process group"
        )
    return group


def unsupported(loss: Any) -> str | None:
    """Why a loss with open_clip's attributes has no fused form, or None."""
    if getattr(loss, "use_horovod", False):
        return "use_horovod is set, expected torch.distributed"
    return None


def _require_torch_distributed(loss: Any) -> None:
    if why := unsupported(loss):
        raise UnsupportedError(f"{type(loss).__name__}: {why}")


def require_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features has shape {tuple(text_features.shape)}, expected {tuple(image_features.shape)} "
            "as image_features"
        )
