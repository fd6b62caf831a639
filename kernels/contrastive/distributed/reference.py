"""The distributed losses in plain PyTorch, as open_clip computes them: their meaning, and the fallback everywhere.

clip_loss     local or global logits on gathered features; what carries a gradient is the mode's choice
siglip_loss   one block of logits per rank's texts, all of them kept for the backward
"""

from __future__ import annotations

from typing import Any

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


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    peers: Peers,
    local_loss: bool,
    gather_with_grad: bool,
    divisor: float,
    w_image: float,
    w_text: float,
) -> Tensor:
    x, y = (gathered(t, peers, gather_with_grad, not local_loss) for t in (image, text))
    s = scale.to(image.dtype)
    per_image = (s * (image if local_loss else x)) @ y.t()
    per_text = (s * text) @ x.t() if local_loss else per_image.t()
    label = torch.arange(len(per_image), device=image.device) + (peers.own.start if local_loss else 0)
    rows, columns = (F.cross_entropy(z.to(scale.dtype), label, reduction="sum") for z in (per_image, per_text))
    return (w_image * rows + w_text * columns) / divisor


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, peers: Peers, *_: object) -> Tensor:
    y = _Gather.apply(text, peers)
    s = ((scale.to(image.dtype) * image) @ y.t()).to(scale.dtype) + bias
    z = s.new_full(s.shape, -1.0)
    z.diagonal(peers.own.start)[: len(image)].fill_(1.0)
    return -F.logsigmoid(z * s).sum() / max(1, len(image))
