"""Where the pixels of a patch lie, and what masked autoencoders are asked to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True)
class Target:
    """Pixels, where they are masked, and how they are cut into t x p x q: patches in the order (frame, row, column).

    `norm` is "patch" for MAE's targets, "channel" for VideoMAE's, or "none".
    """

    video: Tensor  # [B, T, H, W, C]
    mask: Tensor  # [B, N] bool
    mean: Tensor | None  # [C]
    std: Tensor | None  # [C]
    t: int
    p: int
    q: int
    norm: str

    @property
    def grid(self) -> tuple[int, int, int]:
        _, t, h, w, _ = self.video.shape
        return t // self.t, h // self.p, w // self.q

    @property
    def divisor(self) -> float:
        """Of pixels: bytes are numbers from 0 to 1 where they have a mean or a deviation."""
        statistics = self.mean is not None or self.std is not None
        return 255.0 if self.video.dtype == torch.uint8 and statistics else 1.0

    def affine(self, acc: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(scale [C], shift [C] or None): pixels enter as scale x + shift."""
        one = torch.ones(self.video.shape[4], dtype=acc, device=self.video.device)
        scale = one if self.std is None else 1 / self.std.to(acc)
        return scale / self.divisor, None if self.mean is None else -self.mean.to(acc) * scale

    def patches(self, video: Tensor) -> Tensor:
        """[B, N, t p q, C] of some images, elements in the order (t, py, px)."""
        (b, _, _, _, c), (gt, gh, gw) = video.shape, self.grid
        x = video.reshape(b, gt, self.t, gh, self.p, gw, self.q, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(b, gt * gh * gw, self.t * self.p * self.q, c)


def target_of(x: Tensor, norm: str) -> Tensor:
    """[..., K] targets of patches [..., n, C], written into them where they are normalised.

    "patch" is MAE's: all of a patch together, under the root. "channel" is VideoMAE's: each channel, beside the root.
    """
    if norm == "patch":
        x = x.flatten(-2)
        var, mean = torch.var_mean(x, -1, keepdim=True)
        return x.sub_(mean).mul_((var + EPS).rsqrt())
    if norm == "channel":
        var, mean = torch.var_mean(x, -2, keepdim=True)
        x = x.sub_(mean).div_(var.sqrt() + EPS)
    return x.flatten(-2)
