"""Images: photographs, infrared, X-ray; and the patches that audio and video share with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfuse.fused import vit_tokens
from mmfuse.fused.acceleration.plain import read
from mmfuse.kernels import patch_embed
from mmfuse.models.metatransformer.encoder import Encoder

Size = int | Sequence[int]


class Patches(nn.Module):
    """What `proj`, a convolution that is never called, has for a kernel, with a learned position per patch or none.

    Pixels past the last whole patch are dropped, as a convolution does.
    """

    def __init__(self, proj: nn.Conv2d | nn.Conv3d, sizes: Sequence[int], position: bool):
        super().__init__()
        self.proj = proj
        self.shape = (proj.in_channels, *sizes)
        kernels = zip(sizes, proj.kernel_size, proj.stride, strict=True)
        self.num_patches = math.prod((size - kernel) // stride + 1 for size, kernel, stride in kernels)
        self.pos_embed = nn.Parameter(torch.zeros(self.num_patches, proj.out_channels)) if position else None
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, pixels: Tensor, position: Tensor | None = None) -> Tensor:
        """Tokens of pixels with `position` [N, D], by default the module's own."""
        proj = self.proj
        if proj.stride == proj.kernel_size:
            for dim, kernel in enumerate(proj.kernel_size, start=2):
                pixels = pixels.narrow(dim, 0, pixels.shape[dim] // kernel * kernel)
        position = self.pos_embed if position is None else position
        # as wide as the weights under autocast, too: the residual stream begins here
        dtype = read(proj).weight.dtype
        return patch_embed(pixels, proj.weight, proj.bias, stride=proj.stride, position=position, dtype=dtype)


class ImageEmbed(Patches):
    """Pixels [B, in_c, S, S] -> [B, (S / patch_size)^2, embed_dim]; photographs, infrared and X-ray images.

    Sizes are one number, or height and width. Pixels are float, or uint8 taken as numbers. `position` (not in the
    published tokenizer) adds a learned table.

    Raises:
        ValueError: pixels of another shape.
    """

    def __init__(
        self, img_size: Size = 224, patch_size: Size = 16, in_c: int = 3, embed_dim: int = 768, position: bool = False
    ):
        patch = pair(patch_size)
        super().__init__(nn.Conv2d(in_c, embed_dim, patch, stride=patch), pair(img_size), position)

    def forward(self, pixels: Tensor) -> Tensor:
        check_shape("pixels", pixels, self.shape)
        return self.embed(pixels)


class XRay(nn.Module):
    """pixels [B, in_chans, img_size, img_size] -> logits: timm's ViT around the shared encoder.

    `num_heads` has no effect: the encoder's are used, as published.
    """

    encoder_prefix = "blocks."

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.patch_embed = ImageEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def tokens(self, pixels: Tensor) -> Tensor:
        return vit_tokens(pixels, self.patch_embed.proj, self.cls_token[0, 0], self.pos_embed[0])

    def forward(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        return self.head(self.norm(encoder(self.tokens(pixels)))[:, 0])


def pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape[1:] != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected [B, {', '.join(map(str, shape))}]")
