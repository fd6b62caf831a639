"""Pictures (image, infrared, X-ray), video and audio: tokens of patches, through `mmfuse.kernels.patch_embed`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfuse.kernels.patch import patch_embed


class _Patches(nn.Module):
    """What `proj`, a convolution that is never called, has for a kernel, with a learned position per patch or none."""

    def __init__(self, proj: nn.Module, patches: int, position: bool):
        super().__init__()
        self.proj = proj
        self.num_patches = patches
        self.pos_embed = nn.Parameter(torch.zeros(patches, len(proj.weight))) if position else None
        if position:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, pixels: Tensor) -> Tensor:
        proj = self.proj
        return patch_embed(pixels, proj.weight, proj.bias, stride=proj.stride, position=self.pos_embed)


class ImageEmbed(_Patches):
    """Pixels [B, in_c, S, S] -> [B, (S / patch_size)^2, embed_dim]; images, infrared and X-ray pictures.

    Pixels are float, or uint8 taken as numbers. `position` (not in the published tokenizer) adds a learned table.

    Raises:
        ValueError: pixels of another shape, or img_size not a multiple of patch_size.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_c: int = 3, embed_dim: int = 768, position: bool = False
    ):
        _check_multiple("img_size", img_size, "patch_size", patch_size)
        proj = nn.Conv2d(in_c, embed_dim, patch_size, stride=patch_size)
        super().__init__(proj, (img_size // patch_size) ** 2, position)
        self.shape = (in_c, img_size, img_size)

    def forward(self, pixels: Tensor) -> Tensor:
        _check_shape("pixels", pixels, self.shape)
        return self.embed(pixels)


class VideoEmbed(_Patches):
    """Pixels [B, in_chans, T, S, S] -> [B, (T / tubelet_size) (S / patch_size)^2, embed_dim], time first.

    Without `position`, T may be any multiple of tubelet_size.

    Raises:
        ValueError: pixels of another shape, or sizes that are no multiples of the patch's.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_frames: int = 16,
        tubelet_size: int = 2,
        position: bool = False,
    ):
        _check_multiple("img_size", img_size, "patch_size", patch_size)
        _check_multiple("num_frames", num_frames, "tubelet_size", tubelet_size)
        tubelet = (tubelet_size, patch_size, patch_size)
        patches = num_frames // tubelet_size * (img_size // patch_size) ** 2
        super().__init__(nn.Conv3d(in_chans, embed_dim, tubelet, stride=tubelet), patches, position)
        self.shape = (in_chans, num_frames, img_size, img_size)

    def forward(self, pixels: Tensor) -> Tensor:
        channels, frames, *size = self.shape
        if self.pos_embed is None and pixels.dim() == 5:
            frames = pixels.shape[2]
        _check_shape("pixels", pixels, (channels, frames, *size))
        return self.embed(pixels)


class AudioEmbed(_Patches):
    """Spectrograms [B, frames, mels], as `fbank` gives them, -> [B, patches, embed_dim], frequency first.

    The overlapping patches of AST (Gong et al. 2021, arXiv:2104.01778); the published tokenizer of this modality
    cannot be constructed.

    Raises:
        ValueError: a spectrogram of another shape.
    """

    def __init__(
        self,
        frames: int = 1024,
        mels: int = 128,
        patch_size: int = 16,
        stride: int = 10,
        embed_dim: int = 768,
        position: bool = False,
    ):
        patches = ((mels - patch_size) // stride + 1) * ((frames - patch_size) // stride + 1)
        super().__init__(nn.Conv2d(1, embed_dim, patch_size, stride=stride), patches, position)
        self.shape = (frames, mels)

    def forward(self, spectrogram: Tensor) -> Tensor:
        _check_shape("spectrogram", spectrogram, self.shape)
        return self.embed(spectrogram.mT[:, None])


def _check_multiple(name: str, size: int, of: str, unit: int) -> None:
    if size % unit:
        raise ValueError(f"{name} is {size}, expected a multiple of {of} {unit}")


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape[1:] != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected [B, {', '.join(map(str, shape))}]")
