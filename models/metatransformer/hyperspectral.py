"""Hyperspectral images: one token per band (SpectralFormer, Hong et al. 2021, arXiv:2107.02988)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.models.metatransformer.encoder import Encoder


def neighbouring_bands(cube: Tensor, near_band: int) -> Tensor:
    """A patch around a pixel [N, p, p, bands] -> what each band's token sees [N, bands, p * p * near_band].

    The values are those of near_band bands around the token's, each with all its p * p pixels, modulo the number of
    bands: n = near_band // 2 before it, and the rest after it. The order is b - n, ..., b - 1, b, b + 1, ... for a
    single pixel and, as in the published code, b - 1, ..., b - n, b, b + 1, ... for larger patches.

    Raises:
        ValueError: a cube of another shape, or near_band smaller than 1.
    """
    if cube.dim() != 4 or cube.shape[1] != cube.shape[2]:
        raise ValueError(f"cube has shape {tuple(cube.shape)}, expected [N, p, p, bands]")
    if near_band < 1:
        raise ValueError(f"near_band is {near_band}, expected at least 1, the band itself")
    pixels, bands = cube.flatten(1, 2).mT, cube.shape[3]  # [N, bands, p * p]
    left = list(range(1, near_band // 2 + 1))
    right = [-shift for shift in range(1, near_band - len(left))]
    if cube.shape[1] == 1:
        left.reverse()
    shifts = torch.tensor([*left, 0, *right], device=cube.device)
    index = (torch.arange(bands, device=cube.device)[:, None] - shifts) % bands  # [bands, near_band]
    return pixels[:, index].flatten(2)


class BandEmbed(nn.Module):
    """Values per band [N, bands, K] -> tokens [N, 1 + bands, dim]: a class token, then a token per band.

    For K = 1 (one pixel, no neighbouring bands) the projection is an outer product. Up to num_patches bands.

    Raises:
        ValueError: bands of another K, or more than num_patches.
    """

    def __init__(self, patch_dim: int, num_patches: int, dim: int, emb_dropout: float = 0.0):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, num_patches + 1, dim))
        self.patch_to_embedding = nn.Linear(patch_dim, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(emb_dropout)

    def forward(self, bands: Tensor) -> Tensor:
        weight, bias = read(self.patch_to_embedding).weight, self.patch_to_embedding.bias
        positions = self.pos_embedding[0]
        if bands.dim() != 3 or bands.shape[2] != weight.shape[1] or bands.shape[1] >= len(positions):
            raise ValueError(
                f"bands has shape {tuple(bands.shape)}, expected [N, at most {len(positions) - 1}, {weight.shape[1]}]"
            )
        offset = bias + positions[1 : bands.shape[1] + 1]  # [bands, dim]
        x = torch.addcmul(offset, bands, weight[:, 0]) if weight.shape[1] == 1 else bands @ weight.T + offset
        first = (self.cls_token + positions[:1]).expand(x.shape[0], -1, -1)
        return self.dropout(torch.cat([first, x], dim=1))


class Hyperspectral(BandEmbed):
    """bands [N, bands, image_size^2 * near_band], as `neighbouring_bands` gives them, -> logits [N, num_classes].

    Only the sizes that are used have a meaning. The published model builds a SpectralFormer (`depth` to `dropout` and
    `mode`, ViT or CAF) and then puts the shared encoder in its place, so both modes are the same model.
    """

    encoder_prefix = "transformer."

    def __init__(
        self,
        image_size: int,
        near_band: int,
        num_patches: int,
        num_classes: int,
        dim: int,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 1024,
        pool: str = "cls",
        channels: int = 1,
        dim_head: int = 16,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        mode: str = "ViT",
    ):
        if mode not in ("ViT", "CAF"):
            raise ValueError(f"mode is {mode!r}, expected 'ViT' or 'CAF'")
        super().__init__(image_size**2 * near_band, num_patches, dim, emb_dropout)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    tokens = BandEmbed.forward

    def forward(self, encoder: Encoder, bands: Tensor) -> Tensor:  # type: ignore[override]
        return self.mlp_head(encoder(self.tokens(bands))[:, 0])
