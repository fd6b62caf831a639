"""Point clouds: groups of neighbours, and positions that are added before every block (Pix4Point, Qian et al. 2022,
arXiv:2208.12259)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.fused import P3Embed, PointPatchEmbed
from mmfuse.models.metatransformer.encoder import Encoder

_EMBEDS: Mapping[str, type[PointPatchEmbed] | type[P3Embed]] = {"P3Embed": P3Embed, "PointPatchEmbed": PointPatchEmbed}
_ACTIVATIONS = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}


class PointCloud(nn.Module):
    """points [B, N, 3], features [B, C, N] (by default the points) -> the parts of `global_feat` side by side.

    `global_feat` names "cls", "max" and "avg" (or "mean") of the groups' tokens, separated by commas. With `distill`
    there is a second token; while training, the result is then (parts, that token). The published model initialises
    the frozen encoder anew after loading it; here it keeps its weights. `depth` to `drop_path_rate` have no effect on
    the published encoder, but for drop_rate without add_pos_each_block.
    """

    encoder_prefix = "blocks."

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_args: Mapping[str, Any] | None = None,
        norm_args: str | Mapping[str, Any] = "ln",
        act_args: str | Mapping[str, Any] | None = "gelu",
        add_pos_each_block: bool = True,
        global_feat: str = "cls,max",
        distill: bool = False,
    ):
        super().__init__()
        self.embed_dim, self.add_pos_each_block = embed_dim, add_pos_each_block
        self.global_feat = global_feat.split(",")
        for part in self.global_feat:
            if not any(name in part for name in ("cls", "max")) and part not in ("avg", "mean"):
                raise ValueError(f"global_feat names {part!r}, expected cls, max, avg or mean")
        self.patch_embed = _embed(in_channels, embed_dim, embed_args or {})
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.cls_pos = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02) if distill else None
        self.dist_pos = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02) if distill else None
        self.pos_embed = nn.Sequential(
            nn.Sequential(nn.Linear(3, 128), *_activation(act_args)), nn.Linear(128, embed_dim)
        )
        width = self.patch_embed.out_channels
        self.proj = nn.Identity() if width == embed_dim else nn.Linear(width, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm = _norm(norm_args, embed_dim)
        for module in (*self.pos_embed.modules(), self.proj):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(
        self, points: Tensor, features: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """(points and features of every stage, tokens, positions); both of the latter [B, 1 or 2 + G, embed_dim]."""
        p_list, x_list = self.patch_embed(points, points.mT if features is None else features)
        x = self.proj(x_list[-1].mT)
        special = [token for token in (self.cls_token, self.dist_token) if token is not None]
        special_pos = [position for position in (self.cls_pos, self.dist_pos) if position is not None]
        x, position = (
            torch.cat([*(t.expand(x.shape[0], -1, -1) for t in first), rest], dim=1)
            for first, rest in ((special, x), (special_pos, self.pos_embed(p_list[-1])))
        )
        return p_list, x_list, x, position

    def tokens(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        """What the first block is given."""
        _, _, x, position = self.embed(points, features)
        return x + position

    def features(
        self, encoder: Encoder, points: Tensor, features: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(points of every stage, features of every stage, normalised tokens)."""
        p_list, x_list, x, position = self.embed(points, features)
        x = encoder(x, position=position) if self.add_pos_each_block else encoder(self.pos_drop(x + position))
        return p_list, x_list, self.norm(x)

    def seg_features(
        self, encoder: Encoder, points: Tensor, features: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(points, features) of every stage for a decoder; the last stage's features are all tokens [B, D, L]."""
        p_list, x_list, x = self.features(encoder, points, features)
        return p_list, [*x_list[:-1], x.mT]

    def forward(
        self, encoder: Encoder, points: Tensor, features: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = self.features(encoder, points, features)[2]
        groups = x[:, 1 if self.dist_token is None else 2 :]
        parts = []
        for part in self.global_feat:
            if "cls" in part:
                parts.append(x[:, 0])
            elif "max" in part:
                parts.append(groups.amax(1))
            else:
                parts.append(groups.mean(1))
        joined = torch.cat(parts, dim=1)
        return (joined, x[:, 1]) if self.dist_token is not None and self.training else joined


def _embed(in_channels: int, embed_dim: int, embed_args: Mapping[str, Any]) -> PointPatchEmbed | P3Embed:
    options = dict(embed_args)
    name = options.pop("NAME", "PointPatchEmbed")
    if name not in _EMBEDS:
        raise ValueError(f"embed_args has NAME {name!r}, expected one of {', '.join(_EMBEDS)}")
    return _EMBEDS[name](**options | {"in_channels": in_channels, "embed_dim": embed_dim})


def _norm(norm_args: str | Mapping[str, Any], dim: int) -> nn.LayerNorm:
    options = {"norm": norm_args} if isinstance(norm_args, str) else dict(norm_args)
    if (name := options.pop("norm", None)) != "ln":
        raise ValueError(f"norm_args has norm {name!r}, expected 'ln': others do not take tokens [B, L, D]")
    return nn.LayerNorm(dim, **options)


def _activation(act_args: str | Mapping[str, Any] | None) -> list[nn.Module]:
    if act_args is None:
        return []
    options = {"act": act_args} if isinstance(act_args, str) else dict(act_args)
    options.pop("inplace", None)
    name = options.pop("act")
    if name not in _ACTIVATIONS:
        raise ValueError(f"act_args has act {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return [_ACTIVATIONS[name](**options)]
