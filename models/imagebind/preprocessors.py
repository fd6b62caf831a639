"""Tokens of the six modalities: one stem each, the class token in front, learned positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.kernels import patch_embed
from mmfuse.kernels.patch.positions import interpolate_position
from mmfuse.kernels.text import embed_text

# CLIP's, for pixels that come as bytes
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PadIm2Video(nn.Module):
    """A still image becomes `ntimes` frames: itself again ("repeat"), or nothing ("zero")."""

    def __init__(self, ntimes: int, pad_type: str = "repeat"):
        super().__init__()
        if pad_type not in ("zero", "repeat"):
            raise ValueError(f'pad_type is {pad_type!r}, expected "zero" or "repeat"')
        self.ntimes, self.pad_type = ntimes, pad_type

    def forward(self, image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Image [B, C, H, W] and kernel [D, C, t, P, P] to what gives the same tokens, without the frames if t fits."""
        repeat = self.pad_type == "repeat"
        if weight.shape[2] == self.ntimes:  # a still under a temporal kernel: its slices are summed
            return image, weight if repeat else weight[:, :, 0]
        video = image[:, :, None].expand(-1, -1, self.ntimes, -1, -1)
        if not repeat:
            video = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], dim=2)
        return video, weight


class Stem(nn.Module):
    """Patches by a layer without bias, and a LayerNorm where `norm` is set; a video stem has `pad` for still images."""

    def __init__(self, layer: nn.Conv2d | nn.Conv3d | nn.Linear, norm: bool, pad: PadIm2Video | None = None):
        super().__init__()
        self.proj = layer if pad is None else nn.Sequential(pad, layer)
        self.norm_layer = nn.LayerNorm(layer.weight.shape[0]) if norm else None

    @property
    def pad(self) -> PadIm2Video | None:
        first = self.proj[0] if isinstance(self.proj, nn.Sequential) else None
        return first if isinstance(first, PadIm2Video) else None

    @property
    def layer(self) -> Any:
        return self.proj[1] if isinstance(self.proj, nn.Sequential) else self.proj

    def patches_layout(self, size: Sequence[int]) -> tuple[int, ...]:
        """The grid of patches of an input of this size, [H, W] or [T, H, W]."""
        if self.pad is not None:
            *frames, h, w = size
            size = (frames[0] if frames not in ([], [1]) else self.pad.ntimes, h, w)
        layer = self.layer
        return tuple((n - k) // s + 1 for n, k, s in zip(size, layer.kernel_size, layer.stride, strict=True))

    def forward(self, x: Tensor, **rows: Tensor) -> Tensor:
        weight = read(self.layer).weight
        if self.pad is not None:
            x = x[:, :, 0] if x.dim() == 5 and x.shape[2] == 1 else x
            x, weight = self.pad(x, weight) if x.dim() == 4 else (x, weight)
        return self.embed(x, weight, self.layer.stride[-(weight.dim() - 2) :], **rows)

    def embed(self, x: Tensor, weight: Tensor, stride: tuple[int, ...], **rows: Tensor) -> Tensor:
        """The tokens; pixels that do not fill a patch at the ends are left over, as a convolution does."""
        inner = range(-1, 1 - x.dim(), -1)
        for dim, k, s in zip(inner, weight.shape[::-1], stride[::-1], strict=False):
            x = x.narrow(dim, 0, x.shape[dim] // k * k) if k == s else x
        norm = self.norm_layer
        stem_norm = None if norm is None else (read(norm).weight, norm.bias, norm.eps)
        values: dict[str, Any] = {"mean": PIXEL_MEAN, "std": PIXEL_STD} if x.dtype == torch.uint8 else {}
        # as wide as the weights under autocast, too: the residual stream begins here
        return patch_embed(x, weight, stride=stride, stem_norm=stem_norm, dtype=weight.dtype, **values, **rows)


class PositionTable(nn.Module):
    """Learned positions of the class token and of a grid of patches."""

    def __init__(self, patches_layout: tuple[int, ...], dim: int):
        super().__init__()
        self.patches_layout = patches_layout
        self.pos_embed = nn.Parameter(dim**-0.5 * torch.randn(1, 1 + math.prod(patches_layout), dim))

    def forward(self, patches: int, still: bool = True) -> tuple[Tensor, Tensor]:
        """Those of the class token [1, D] and of N patches [N, D], bicubic from the (zeroth) square if N is another."""
        cls, table = self.pos_embed[0].split([1, self.pos_embed.shape[1] - 1])
        if len(table) == patches:
            return cls, table
        *frames, h, w = self.patches_layout
        side = math.isqrt(patches)
        if h != w or side * side != patches or not (still or frames == [1]):
            raise ValueError(
                f"the input has {patches} patches, expected {len(table)} in {self.patches_layout}"
                + (", or a square number of a still image" if h == w else "")
            )
        return cls, interpolate_position(table[: h * w], (side, side), "bicubic_scale")


class PatchTokens(nn.Module):
    """Images, spectrograms, depth or thermal maps to tokens [B, 1 + N, D]; of images and depth both, the sum.

    Args:
        size: of the input the positions are learned for, [C, H, W] or [C, T, H, W].
        rgbt_stem: of images, audio and thermal maps. depth_stem: of depth.
    """

    def __init__(self, size: Sequence[int], rgbt_stem: Stem | None = None, depth_stem: Stem | None = None):
        super().__init__()
        stem = rgbt_stem or depth_stem
        if stem is None:
            raise ValueError("rgbt_stem and depth_stem are None, expected one or both")
        dim = stem.layer.weight.shape[0]
        self.rgbt_stem, self.depth_stem = rgbt_stem, depth_stem
        self.cls_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        self.pos_embedding_helper = PositionTable(stem.patches_layout(size[1:]), dim)

    def forward(self, x: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """`x` goes through the model's own stem, that of images if there are two; `depth` through that of depth."""
        first = self.rgbt_stem or self.depth_stem
        both = ((x, first), (depth, self.depth_stem))
        tokens = [self._tokens(given, stem) for given, stem in both if given is not None and stem is not None]
        return sum(tokens[1:], tokens[0])

    def _tokens(self, x: Tensor, stem: Stem) -> Tensor:
        patches = math.prod(stem.patches_layout(x.shape[2:]))
        cls, position = self.pos_embedding_helper(patches, still=x.dim() == 4)
        return stem(x, prefix=self.cls_token[0], prefix_position=cls, position=position)


class TextTokens(nn.Module):
    """Ids [B, L] to tokens [B, L, D], L <= context_length."""

    mask: Tensor

    def __init__(self, vocab_size: int, context_length: int, dim: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(1, context_length, dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # an official key; the attention is causal without it
        self.register_buffer("mask", torch.full((context_length, context_length), -torch.inf).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > self.pos_embed.shape[1]:
            raise ValueError(f"text has shape {tuple(ids.shape)}, expected [B, L] with L <= {self.pos_embed.shape[1]}")
        return embed_text(ids, read(self.token_embedding).weight, position=self.pos_embed[0])


class IMUTokens(nn.Module):
    """Signals [B, 6, T] to tokens [B, 1 + T // 8, D], each of 8 samples of every channel."""

    KERNEL, CHANNELS = 8, 6

    def __init__(self, size: Sequence[int], dim: int):
        super().__init__()
        self.imu_stem = Stem(nn.Linear(self.CHANNELS * self.KERNEL, dim, bias=False), norm=True)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(1, size[1] // self.KERNEL + 1, dim))
        self.cls_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))

    def forward(self, imu: Tensor) -> Tensor:
        weight = read(self.imu_stem.layer).weight.unflatten(1, (self.CHANNELS, self.KERNEL))
        rows = {"prefix": self.cls_token[0], "pos_embed": self.pos_embed[0]}
        return self.imu_stem.embed(imu, weight, (self.KERNEL,), **rows)
