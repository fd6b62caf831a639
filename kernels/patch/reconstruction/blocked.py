"""The loss of masked autoencoders a few images at a time: targets come and go, the gradient makes them anew."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.patch.reconstruction.target import EPS, Target, target_of

_BLOCK_BYTES = 2 << 20  # of targets


def rows(prediction: Tensor, target: Target, ids: Tensor | None, weight: Tensor, grad: Tensor | None) -> Tensor:
    """weight_bj mean_k (prediction - target)^2 [B, M] for ids [B, M] int64 (None: every patch); 0 where weight is.

    With `grad` [B, M, K] given: into it 2 weight_bj (prediction - target) / K instead.
    """
    (b, m, k), video, acc = prediction.shape, target.video, weight.dtype
    out, c = weight.new_zeros(b, m), video.shape[4]
    scale, shift = (t if t is None else t.repeat(k // c) for t in target.affine(acc))
    step = max(1, _BLOCK_BYTES // max(1, video[:1].numel() * acc.itemsize))
    for i in range(0, b, step):
        block = slice(i, i + step)
        x, p, w = target.patches(video[block]), prediction[block], weight[block]
        if ids is not None:
            x = x.gather(1, ids[block, :, None, None].expand(-1, -1, *x.shape[2:]))
        x, p, w = x.flatten(0, 1).flatten(1), p.reshape(-1, k), w.flatten()
        # only what is masked; on a GPU it would wait for the number of them
        at = w.nonzero()[:, 0] if x.device.type == "cpu" else None
        if at is not None:
            x, p, w = x[at], p[at], w[at]
        x = x.to(acc)
        x = x * scale if shift is None else torch.addcmul(shift, x, scale)
        if target.norm == "patch":
            x.sub_(x.mean(1, keepdim=True))
            var = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_() / (k - 1)
            gap = torch.addcmul(p.to(acc), x, (var + EPS).rsqrt_(), value=-1)
        else:
            gap = target_of(x.unflatten(1, (-1, c)), target.norm).neg_().add_(p)
        into = out[block].view(-1) if grad is None else grad[block].view(-1, k)
        if grad is None:
            value = torch.linalg.vector_norm(gap, dim=1).square_().mul_(w).div_(k)
        else:
            value = gap.mul_((2 / k) * w[:, None]).to(grad.dtype)
        if at is not None:
            into.zero_()[at] = value
        else:
            into.copy_(torch.where(w.view(-1, *[1] * (value.dim() - 1)) != 0, value, 0))
    return out
