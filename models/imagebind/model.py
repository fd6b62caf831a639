"""ImageBind (Girdhar et al. 2023, arXiv:2305.05665): six modalities in the space of images, under the official keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.imagebind import SCALES, ImageBindLoss, LogitScale
from mmfuse.kernels.head import select_head
from mmfuse.models.imagebind.preprocessors import IMUTokens, PadIm2Video, PatchTokens, Stem, TextTokens
from mmfuse.models.imagebind.trunk import Trunk
from mmfuse.models.registry import check_keys, instantiate

MODALITIES = ("vision", "text", "audio", "depth", "thermal", "imu")


class Head(nn.Sequential):
    """LayerNorm and projection of one token, x [B, L, D] and its `index` to [B, out_dim].

    The LayerNorm is layer 0, the projection the last.
    """

    def forward(
        self, x: Tensor, index: int | Tensor = 0, normalize: bool = False, scale: Tensor | None = None, clips: int = 1
    ) -> Tensor:
        norm, *between, proj = self
        norm_args = (read(norm).weight, norm.bias, norm.eps)
        if not (between and self.training):
            return select_head(x, index, norm_args, read(proj).weight, normalize=normalize, scale=scale, clips=clips)
        y = select_head(x, index, norm_args, normalize=False)
        for layer in (*between, proj):
            y = layer(y)
        y = F.normalize(y, dim=-1) if normalize else y
        y = y if scale is None else scale * y
        return y.unflatten(0, (-1, clips)).mean(1)


class TextHead(nn.Module):
    def __init__(self, proj: Head):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor, index: Tensor, **options: Any) -> Tensor:
        return self.proj(x, index, **options)


def _head(dim: int, out_dim: int, dropout: float | None = None) -> Head:
    """The official layers: what selects the token has a place, and no parameters."""
    norm, proj = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, out_dim, bias=False)
    return Head(norm, nn.Identity(), *([] if dropout is None else [nn.Dropout(dropout)]), proj)


class ImageBind(nn.Module):
    """One tower for each modality into one space. The arguments are the official constructor's, and its fixed sizes.

    Args:
        video_frames: frames of the clips that the image positions are learned for.
        kernel_size: (frames, height, width) of an image patch.
        audio_kernel_size, audio_stride: of the patches of a spectrogram, which overlap.
        audio_num_mel_bins, audio_target_len: size of a spectrogram.
        depth_kernel_size, thermal_kernel_size: of a patch.
        imu_kernel_size: officially without effect: a patch has 8 samples.
        <modality>_embed_dim, _num_blocks, _num_heads, _drop_path: of a trunk.
        out_embed_dim: width of the common space.
        vision_img_size: [3, frames, H, W], by default video_frames frames of 224 x 224.
        depth_img_size, thermal_img_size: [1, H, W]. imu_img_size: [6, samples].
        text_context_length, text_vocab_size: of the text tower.
    """

    def __init__(
        self,
        video_frames: int = 2,
        kernel_size: Sequence[int] = (2, 14, 14),
        audio_kernel_size: int = 16,
        audio_stride: int = 10,
        out_embed_dim: int = 768,
        vision_embed_dim: int = 1024,
        vision_num_blocks: int = 24,
        vision_num_heads: int = 16,
        audio_embed_dim: int = 768,
        audio_num_blocks: int = 12,
        audio_num_heads: int = 12,
        audio_num_mel_bins: int = 128,
        audio_target_len: int = 204,
        audio_drop_path: float = 0.1,
        text_embed_dim: int = 768,
        text_num_blocks: int = 12,
        text_num_heads: int = 12,
        depth_embed_dim: int = 384,
        depth_kernel_size: int = 16,
        depth_num_blocks: int = 12,
        depth_num_heads: int = 8,
        depth_drop_path: float = 0.0,
        thermal_embed_dim: int = 768,
        thermal_kernel_size: int = 16,
        thermal_num_blocks: int = 12,
        thermal_num_heads: int = 12,
        thermal_drop_path: float = 0.0,
        imu_embed_dim: int = 512,
        imu_kernel_size: int = 8,
        imu_num_blocks: int = 6,
        imu_num_heads: int = 8,
        imu_drop_path: float = 0.7,
        vision_img_size: Sequence[int] | None = None,
        depth_img_size: Sequence[int] = (1, 224, 224),
        thermal_img_size: Sequence[int] = (1, 224, 224),
        text_context_length: int = 77,
        text_vocab_size: int = 49408,
        imu_img_size: Sequence[int] = (6, 2000),
    ):
        super().__init__()
        vision_img_size = vision_img_size or (3, video_frames, 224, 224)
        self.embed_dim, self.image_resolution = out_embed_dim, vision_img_size[-1]
        self.input_sizes = {
            "vision": (vision_img_size[0], *vision_img_size[2:]),
            "audio": (1, audio_num_mel_bins, audio_target_len),
            "depth": tuple(depth_img_size),
            "thermal": tuple(thermal_img_size),
            "imu": tuple(imu_img_size),
        }

        def flat(channels: int, dim: int, kernel: int, stride: int) -> Stem:
            return Stem(nn.Conv2d(channels, dim, kernel, stride, bias=False), norm=True)

        kernel = tuple(kernel_size)
        images = nn.Conv3d(3, vision_embed_dim, kernel, kernel, bias=False)
        audio = flat(1, audio_embed_dim, audio_kernel_size, audio_stride)
        depth = flat(1, depth_embed_dim, depth_kernel_size, depth_kernel_size)
        thermal = flat(1, thermal_embed_dim, thermal_kernel_size, thermal_kernel_size)
        self.modality_preprocessors = nn.ModuleDict(
            {
                "vision": PatchTokens(vision_img_size, Stem(images, norm=False, pad=PadIm2Video(2))),
                "text": TextTokens(text_vocab_size, text_context_length, text_embed_dim),
                "audio": PatchTokens((1, audio_num_mel_bins, audio_target_len), audio),
                "depth": PatchTokens(depth_img_size, depth_stem=depth),
                "thermal": PatchTokens(thermal_img_size, thermal),
                "imu": IMUTokens(imu_img_size, imu_embed_dim),
            }
        )
        self.modality_trunks = nn.ModuleDict(
            {
                "vision": Trunk(vision_embed_dim, vision_num_blocks, vision_num_heads, pre_norm=True),
                "text": Trunk(text_embed_dim, text_num_blocks, text_num_heads, causal=True),
                "audio": Trunk(audio_embed_dim, audio_num_blocks, audio_num_heads, audio_drop_path, bias_kv=True),
                "depth": Trunk(depth_embed_dim, depth_num_blocks, depth_num_heads, depth_drop_path, bias_kv=True),
                "thermal": Trunk(
                    thermal_embed_dim, thermal_num_blocks, thermal_num_heads, thermal_drop_path, bias_kv=True
                ),
                "imu": Trunk(imu_embed_dim, imu_num_blocks, imu_num_heads, imu_drop_path, bias_kv=True),
            }
        )
        text_head = Head(nn.LayerNorm(text_embed_dim, eps=1e-6), nn.Linear(text_embed_dim, out_embed_dim, bias=False))
        self.modality_heads = nn.ModuleDict(
            {
                "vision": _head(vision_embed_dim, out_embed_dim),
                "text": TextHead(text_head),
                "audio": _head(audio_embed_dim, out_embed_dim),
                "depth": _head(depth_embed_dim, out_embed_dim),
                "thermal": _head(thermal_embed_dim, out_embed_dim),
                "imu": _head(imu_embed_dim, out_embed_dim, dropout=0.5),
            }
        )
        # unit length is part of the head; place 1 is official
        self.modality_postprocessors = nn.ModuleDict(
            {m: nn.ModuleList([nn.Identity(), LogitScale(s, learnable=m == "text")]) for m, s in SCALES.items()}
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings [B, out_embed_dim] of each modality given: unit length times min(exp(logit scale), 100).

        Images have no scale. An input of five dimensions or more is a batch of clips [B, S, ...]: the mean of their
        embeddings, which has not unit length any more.

        Args:
            inputs: "vision" [B, 3, H, W], normalised floats or uint8, or clips [B, S, 3, T, H, W]; "text" ids [B, L],
                read at the highest id; "audio" [B, 1, mel, frames] or clips; "depth" and "thermal" [B, 1, H, W]; "imu"
                [B, 6, samples].
        """
        return {modality: self.encode(modality, x) for modality, x in inputs.items()}

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """The embedding of one modality."""
        if modality not in MODALITIES:
            raise ValueError(f"modality is {modality!r}, expected one of {', '.join(MODALITIES)}")
        clips = x.shape[1] if x.dim() >= 5 else 1
        x = x.flatten(0, 1) if x.dim() >= 5 else x
        tokens = self.modality_trunks[modality](self.modality_preprocessors[modality](x))
        index = x.argmax(-1) if modality == "text" else 0
        scale = self.logit_scale(modality)
        factor = None if scale is None else scale()
        return self.modality_heads[modality](tokens, index, normalize=True, scale=factor, clips=clips)

    def logit_scale(self, modality: str) -> LogitScale | None:
        """The module of a modality's scale; images have none."""
        if modality not in self.modality_postprocessors:
            return None
        steps: Any = self.modality_postprocessors[modality]
        return steps[1]

    def loss(
        self, inputs: Mapping[str, Tensor | tuple[Tensor, Tensor]], output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """InfoNCE of images with every other modality given, both ways, in one grouped loss (equation 1).

        inputs: as for `forward`, pairs by row; a modality with images of its own has a pair (vision, modality). The
        returned loss is that of `mmfuse.fused.ImageBindLoss` at the model's own scales, of which that of text learns.
        """

        embeddings = {
            m: self.encode(m, x) if isinstance(x, Tensor) else (self.encode("vision", x[0]), self.encode(m, x[1]))
            for m, x in inputs.items()
        }
        scales = {m: scale for m in SCALES if (scale := self.logit_scale(m)) is not None}
        return ImageBindLoss(scales)(embeddings, output_dict)


OVERRIDES = (
    "vision_img_size",
    "depth_img_size",
    "thermal_img_size",
    "text_context_length",
    "text_vocab_size",
    "imu_img_size",
)


def build(config: Mapping[str, Any]) -> ImageBind:
    """ImageBind from its arguments, plain or as {"constructor": the official, "hardcoded_overrides": the sizes}."""
    if "constructor" not in config:
        return instantiate(ImageBind, config)
    check_keys(config, ("constructor", "hardcoded_overrides"))
    overrides = config.get("hardcoded_overrides", {})
    check_keys(overrides, OVERRIDES)
    return instantiate(ImageBind, {**config["constructor"], **overrides})
