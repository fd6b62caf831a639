"""Images to tokens: timm's `PatchEmbed`, which also takes bytes, and the whole stem of a ViT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.fused.acceleration import stems
from mmfuse.fused.acceleration.plain import read
from mmfuse.kernels import patch_embed, resample_weight

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """timm's `PatchEmbed`: same constructor, state dict and outputs. `embed_layer=PatchEmbed` builds timm models on it.

    Args:
        img_size: int, (H, W), or None for any.
        patch_size, in_chans, embed_dim, bias: of the projection, a convolution whose stride is its kernel.
        norm_layer: LayerNorm, or None.
        flatten: tokens [B, N, D]; or, with `output_fmt="NHWC"`, [B, gh, gw, D].
        strict_img_size: refuse images of another size; otherwise the patch must divide them.
        dynamic_img_pad: fill up with zeros on the right and below to whole patches.
        uint8: take images as bytes too, and normalise them as (x/255 - mean)/std within the operator.
        mean, std: per channel, of pixels in [0, 1]; ImageNet's by default.

    Raises:
        ValueError: images of another size, an `output_fmt` that is not NLC or NHWC, or another norm than LayerNorm.
        TypeError: bytes without `uint8=True`.

    Deterministic. Source: Dosovitskiy et al., An Image is Worth 16x16 Words, equation 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        uint8: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.flatten = flatten and output_fmt in (None, "NLC")
        if not self.flatten and output_fmt != "NHWC":
            raise ValueError(f"output_fmt is {output_fmt!r} and flatten {flatten}, expected tokens, or NHWC")
        self.strict_img_size, self.dynamic_img_pad = strict_img_size, dynamic_img_pad
        factory = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **factory)
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()
        if why := stems.against_norm("norm_layer", self.norm):
            raise ValueError(why)
        if uint8 and not len(mean) == len(std) == in_chans:
            raise ValueError(f"mean and std have {len(mean)} and {len(std)} values, expected {in_chans} as in_chans")
        self.uint8 = (tuple(mean), tuple(std)) if uint8 else None
        self.img_size: tuple[int, int] | None = None
        self.set_input_size(img_size)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Images, or patches, of another size from now on; the weight is resampled for those (`resample_weight`)."""
        proj = self.proj
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            self.patch_size = proj.kernel_size = proj.stride = _pair(patch_size)
            weight = resample_weight(proj.weight.detach(), self.patch_size)
            proj.weight = nn.Parameter(weight, proj.weight.requires_grad)
        if img_size is not None:
            self.img_size = _pair(img_size)
        self.grid_size = None if self.img_size is None else self._whole_patches(self.img_size)
        self.num_patches = None if self.grid_size is None else math.prod(self.grid_size)

    def _whole_patches(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image of `img_size`."""
        (h, w), (ph, pw) = img_size, self.patch_size
        return (-(-h // ph), -(-w // pw)) if self.dynamic_img_pad else (h // ph, w // pw)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], floats or, with `uint8=True`, bytes, to [B, N, D]."""
        read(self.proj)
        return stems.timm_patch_embed(self, x, self.uint8)


def vit_tokens(
    pixels: Tensor, proj: nn.Conv2d, cls: Tensor, position: Tensor, *, ids_keep: Tensor | None = None
) -> Tensor:
    """The rows [B, 1 + N, D] of a ViT's first block: the class token and the patches of images, with their positions.

    Args:
        pixels: [B, C, H, W]. Those past the last whole patch are dropped, as a convolution does.
        proj: a convolution whose stride is its kernel; it is not called, and one with hooks or an adapter is refused.
        cls: [D].
        position: [1 + N, D], of the class token and of the patches.
        ids_keep: int64 [B, M], the patches to compute, by default all.

    Rows have the dtype of `proj`, under autocast too: the residual stream begins here.
    """
    (h, w), (ph, pw) = pixels.shape[-2:], read(proj).kernel_size
    return patch_embed(
        pixels[..., : h // ph * ph, : w // pw * pw],
        proj.weight,
        proj.bias,
        prefix=cls[None],
        pos_embed=position,
        ids_keep=ids_keep,
        dtype=proj.weight.dtype,
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
