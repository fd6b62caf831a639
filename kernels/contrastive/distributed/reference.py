"""The distributed losses in plain PyTorch, as open_clip computes them: their meaning, and the fallback everywhere.

clip_loss     local or global logits on gathered features; what carries a gradient is the mode's choice
siglip_loss   one block of logits per rank's texts, all of them kept for the backward
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.contrastive.distributed.peers import Peers


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.gather(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.scatter_sum(g), None


def gathered(t: Tensor, peers: Peers, with_grad: bool, own_grad: bool) -> Tensor:
    """All ranks' rows [N, ...]: with every rank's gradient, with that of the own rows alone, or without."""
    if with_grad:
        return _Gather.apply(t, peers)
    rows = peers.gather(t.detach())
    if not own_grad:
        return rows
    return torch.cat([rows[: peers.own.start], t, rows[peers.own.stop :]])


class Mode(NamedTuple):
    """How CLIP's loss is divided among the ranks, and what its fused forms keep."""

    local_loss: bool
    gather_with_grad: bool
    split_scale: bool  # the scale's gradient of a rank is that of its own positives' rows and columns
    divisor: float  # of the sum over pairs
    w_image: float
    w_text: float
    save: str
    ring: bool


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, peers: Peers, mode: Mode) -> Tensor:
    local = mode.local_loss
    x, y = (gathered(t, peers, mode.gather_with_grad, not local) for t in (image, text))
    s = scale.to(image.dtype)
    per_image = (s * (image if local else x)) @ y.t()
    per_text = (s * text) @ x.t() if local else per_image.t()
    label = torch.arange(len(per_image), device=image.device) + (peers.own.start if local else 0)
    rows, columns = (F.cross_entropy(z.to(scale.dtype), label, reduction="sum") for z in (per_image, per_text))
    return (mode.w_image * rows + mode.w_text * columns) / mode.divisor


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, peers: Peers, dist_impl: str) -> Tensor:
    # all at once, however the blocks would travel
    y = _Gather.apply(text, peers)
    s = ((-scale.to(image.dtype) * image) @ y.t()).to(scale.dtype) - bias  # -S
    s.diagonal(peers.own.start).neg_()
    return -F.logsigmoid(s).sum() / max(1, len(image))
