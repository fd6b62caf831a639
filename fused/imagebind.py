"""ImageBind's loss: every modality bound to images, all pairs in one grouped contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfuse.kernels import grouped_clip_loss

# the released model's logit scales; that of text is learned
SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}


class LogitScale(nn.Module):
    """min(exp(log_logit_scale), largest): at the cap there is no gradient, where an in-place clamp would keep one."""

    log_logit_scale: Tensor

    def __init__(self, initial: float, learnable: bool, largest: float = 100.0) -> None:
        super().__init__()
        self.largest = largest
        start = torch.ones([]) * math.log(initial)
        if learnable:
            self.log_logit_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_logit_scale", start)

    def forward(self) -> Tensor:
        return torch.clip(self.log_logit_scale.exp(), max=self.largest)


class ImageBindLoss(nn.Module):
    """The sum over modalities M of InfoNCE(I, M) + InfoNCE(M, I) (Girdhar et al. 2023, equation 1 and section 3.2).

    forward(embeddings, output_dict=False): `embeddings` gives for each modality its embeddings [b, D], of which row i
    belongs to row i of `embeddings["vision"]`, or a pair (vision [b, D], modality [b, D]) where the modality has
    a batch of its own. Other modalities than `scales` names raise. Returns the sum, a scalar in float32 (float64 for
    float64 embeddings), or `{"<modality>_loss": scalar}` whose values add up to it.

    Args:
        scales: modality to initial logit scale, by default those of the released model: text 1/0.07, audio 20, depth 5,
            thermal 10, imu 5; or the `LogitScale` of a model. A scale never exceeds 100; there its gradient is zero.
        learnable: the modalities whose scale is a parameter (`logit_scales.<modality>.log_logit_scale`); the others' is
            a buffer.
        normalize: divide each embedding by its L2 norm first. The released model returns embeddings that its heads have
            normalised and multiplied by their scale: normalising takes that factor out again.

    Deterministic. On a GPU all pairs share one launch of each kernel (`mmfuse.grouped_clip_loss`).

    Raises:
        ValueError: no modality is given, one is unknown, "vision" is missing; or as `mmfuse.grouped_clip_loss`.
    """

    def __init__(
        self,
        scales: Mapping[str, float | LogitScale] | None = None,
        learnable: tuple[str, ...] = ("text",),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        scales = SCALES if scales is None else scales
        if unknown := set(learnable) - set(scales):
            raise ValueError(f"learnable has {sorted(unknown)}, expected modalities of scales: {sorted(scales)}")
        self.normalize = normalize
        self.logit_scales = nn.ModuleDict(
            {name: s if isinstance(s, LogitScale) else LogitScale(s, name in learnable) for name, s in scales.items()}
        )

    def forward(
        self, embeddings: Mapping[str, Tensor | tuple[Tensor, Tensor]], output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        names = [name for name in embeddings if name != "vision"]
        if not names or not set(names) <= set(self.logit_scales):
            raise ValueError(
                f"embeddings has {sorted(embeddings)}, expected 'vision' and some of {sorted(self.logit_scales)}"
            )
        pairs = [self._pair(name, embeddings) for name in names]
        scales = [self.logit_scales[name]() for name in names]
        images, others = zip(*pairs, strict=True)
        losses = grouped_clip_loss(images, others, scales, normalize=self.normalize, weights=(1.0, 1.0))
        if output_dict:
            return {f"{name}_loss": loss for name, loss in zip(names, losses, strict=True)}
        return losses.sum()

    def _pair(self, name: str, embeddings: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        given = embeddings[name]
        if not isinstance(given, Tensor):
            return given
        image = embeddings.get("vision")
        if not isinstance(image, Tensor):
            raise ValueError(
                f"embeddings has no tensor 'vision' to pair {name!r} with, expected one or a pair of tensors"
            )
        return image, given
