"""Pictures (image, infrared, X-ray), video and audio: tokens of patches, through `mmfuse.kernels.patch_embed`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfuse.kernels.patch import patch_embed

Size = int | Sequence[int]


class _Patches(nn.Module):
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

    def embed(
        self,
        pixels: Tensor,
        position: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_position: Tensor | None = None,
    ) -> Tensor:
        """Tokens of pixels, with what a model adds to them and puts in front: see `patch_embed`."""
        proj = self.proj
        if proj.stride == proj.kernel_size:
            for dim, kernel in enumerate(proj.kernel_size, start=2):
                pixels = pixels.narrow(dim, 0, pixels.shape[dim] // kernel * kernel)
        position = self.pos_embed if position is None else position
        return patch_embed(
            pixels,
            proj.weight,
            proj.bias,
            stride=proj.stride,
            position=position,
            prefix=prefix,
            prefix_position=prefix_position,
        )


class ImageEmbed(_Patches):
    """Pixels [B, in_c, S, S] -> [B, (S / patch_size)^2, embed_dim]; images, infrared and X-ray pictures.

    Sizes are one number, or height and width. Pixels are float, or uint8 taken as numbers. `position` (not in the
    published tokenizer) adds a learned table.

    Raises:
        ValueError: pixels of another shape.
    """

    def __init__(
        self, img_size: Size = 224, patch_size: Size = 16, in_c: int = 3, embed_dim: int = 768, position: bool = False
    ):
        patch = _pair(patch_size)
        super().__init__(nn.Conv2d(in_c, embed_dim, patch, stride=patch), _pair(img_size), position)

    def forward(self, pixels: Tensor) -> Tensor:
        _check_shape("pixels", pixels, self.shape)
        return self.embed(pixels)


class VideoEmbed(_Patches):
    """Pixels [B, in_chans, T, S, S] -> [B, (T / tubelet_size) (S / patch_size)^2, embed_dim], time first.

    Without `position` (as for images), T may be any number of frames.

    Raises:
        ValueError: pixels of another shape.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_frames: int = 16,
        tubelet_size: int = 2,
        position: bool = False,
    ):
        tubelet = (tubelet_size, *_pair(patch_size))
        proj = nn.Conv3d(in_chans, embed_dim, tubelet, stride=tubelet)
        super().__init__(proj, (num_frames, *_pair(img_size)), position)

    def forward(self, pixels: Tensor) -> Tensor:
        channels, frames, *size = self.shape
        if self.pos_embed is None and pixels.dim() == 5:
            frames = pixels.shape[2]
        _check_shape("pixels", pixels, (channels, frames, *size))
        return self.embed(pixels)


class AudioEmbed(_Patches):
    """Spectrograms [B, frames, mels], as `fbank` gives them, -> [B, patches, embed_dim], frequency first.

    The overlapping patches of AST (Gong et al. 2021, arXiv:2104.01778); the published tokenizer of this modality
    cannot be constructed. `position` as for images.

    Raises:
        ValueError: a spectrogram of another shape.
    """

    def __init__(
        self,
        frames: int = 1024,
        mels: int = 128,
        patch_size: Size = 16,
        stride: Size = 10,
        embed_dim: int = 768,
        position: bool = False,
    ):
        proj = nn.Conv2d(1, embed_dim, _pair(patch_size), stride=_pair(stride))
        super().__init__(proj, (mels, frames), position)

    def forward(self, spectrogram: Tensor, position: Tensor | None = None) -> Tensor:
        _check_shape("spectrogram", spectrogram, self.shape[:0:-1])
        return self.embed(spectrogram.mT[:, None], position)


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape[1:] != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected [B, {', '.join(map(str, shape))}]")
