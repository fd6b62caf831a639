"""The global contrastive loss with its per-sample normalisers (SogCLR, FastCLIP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfuse.kernels.contrastive import global_contrastive_loss


class GlobalContrastiveLoss(nn.Module):
    """`global_contrastive_loss` and the table of its normalisers, an entry for each sample of the data set.

    Buffers `log_u` and `log_w` [size], -inf until a sample is seen. In training mode `forward` updates the entries of
    its batch, without synchronisation; in evaluation mode it leaves them as they are.

    Args:
        size: the number of samples of the data set.
        gamma: the weight of a new value. An attribute, to be lowered during training: FastCLIP takes
            gamma_t = 0.5 (1 + cos(pi epoch / E)) (1 - gamma) + gamma up to epoch E (Wei et al. 2024).
        eps: added to the normalisers in the loss.
        rho: None for a fixed temperature (SogCLR, FastCLIP-v1). A number: the temperature is learned with the loss
            L + rho / s + mean(log u + log w) / (2 s) (FastCLIP-v3; its code's default is 8).
        normalize: divide each row by its L2 norm first.
    """

    log_u: Tensor
    log_w: Tensor

    def __init__(
        self, size: int, gamma: float, eps: float = 1e-14, rho: float | None = None, normalize: bool = False
    ) -> None:
        super().__init__()
        self.gamma, self.eps, self.rho, self.normalize = gamma, eps, rho, normalize
        for name in ("log_u", "log_w"):
            self.register_buffer(name, torch.full((size,), -torch.inf))

    def forward(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, index: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            image, text: [N, D] features.
            logit_scale: the multiplier, already exponentiated.
            index: [N] int64, which samples these are, none of them twice; or a pair, for images and texts that are
                numbered on their own. On the features' device.

        Raises:
            ValueError, TypeError: `index` is not [N] int64; or as `mmfuse.kernels.contrastive.global_contrastive_loss`.
        """
        at = (index, index) if isinstance(index, Tensor) else index
        for i in at:
            if i.shape != image.shape[:1]:
                raise ValueError(f"index has shape {tuple(i.shape)}, expected [{len(image)}] as image has rows")
            if i.dtype != torch.int64:
                raise TypeError(f"index has dtype {i.dtype}, expected int64")
        tables = (self.log_u, self.log_w)
        log_u, log_w = (table[i] for table, i in zip(tables, at, strict=True))
        loss, *new = global_contrastive_loss(
            image, text, logit_scale, log_u, log_w, self.gamma, eps=self.eps, normalize=self.normalize
        )
        if self.training:
            for table, i, value in zip(tables, at, new, strict=True):
                table.index_copy_(0, i, value.to(table.dtype))
        if self.rho is not None:
            log_u, log_w = new
            loss = loss + (self.rho + (log_u + log_w).mean() / 2) / logit_scale
        return loss
