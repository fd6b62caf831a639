"""Where the pixels of a patch lie, and what masked autoencoders are asked to predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6


class Patches(NamedTuple):
    """How pixels [B, T, H, W, C] are cut: t x p x q pixels a patch, patches in the order (frame, row, column)."""

    t: int
    p: int
    q: int

    def grid(self, video: Tensor) -> tuple[int, int, int]:
        return video.shape[1] // self.t, video.shape[2] // self.p, video.shape[3] // self.q

    def of(self, video: Tensor) -> Tensor:
        """[B, N, t p q, C], elements in the order (t, py, px)."""
        b, _, _, _, c = video.shape
        gt, gh, gw = self.grid(video)
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


def entering(video: Tensor, mean: Tensor | None, std: Tensor | None, acc: torch.dtype) -> Tensor:
    """A copy of pixels [..., C] as the loss sees them."""
    x = video.to(acc, copy=True)
    if video.dtype == torch.uint8 and (mean is not None or std is not None):
        x.div_(255)
    if mean is not None:
        x.sub_(mean.to(acc))
    if std is not None:
        x.div_(std.to(acc))
    return x
