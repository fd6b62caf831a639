"""Video: tubelets, and the VideoMAE v2 transformer (Wang et al. 2023, arXiv:2303.16727) with blocks of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.metatransformer.encoder import MLP, Encoder
from mmfuse.models.metatransformer.images import Patches, Size, check_shape, pair


class VideoEmbed(Patches):
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
        tubelet = (tubelet_size, *pair(patch_size))
        proj = nn.Conv3d(in_chans, embed_dim, tubelet, stride=tubelet)
        super().__init__(proj, (num_frames, *pair(img_size)), position)

    def forward(self, pixels: Tensor) -> Tensor:
        channels, frames, *size = self.shape
        if self.pos_embed is None and pixels.dim() == 5:
            frames = pixels.shape[2]
        check_shape("pixels", pixels, (channels, frames, *size))
        return self.embed(pixels)


class Attention(nn.Module):
    """Without a key bias. `cos_attn`: unit queries and keys, logits times exp(scale), at most 100, learned per head."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, qk_scale: float | None, cos_attn: bool, dropout: float):
        super().__init__()
        self.heads, self.cos_attn, self.dropout = heads, cos_attn, dropout
        inner = dim // heads * heads
        if cos_attn:
            self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        else:
            self.qk_scale = qk_scale or None
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.cos_attn:
            q = F.normalize(q, dim=-1) * self.scale.clamp(max=4.6052).exp()
            k = F.normalize(k, dim=-1)
        scale = 1.0 if self.cos_attn else self.qk_scale
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=scale)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        eps: float,
        init_values: float,
        drop: float,
        drop_path: float,
        attention: Attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), init_values)) if init_values > 0 else None for _ in range(2)
        )
        self.drop, self.drop_path = nn.Dropout(drop), drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        x = self.drop(x)
        if gamma is not None:
            x = gamma * x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1), self.drop_path, self.training)


class VideoMAE(nn.Module):
    """pixels [B, in_chans, all_frames, img_size, img_size] -> logits [B, num_classes]; the shared encoder is not used.

    With use_learnable_pos_emb the table is a parameter without a gradient, as published.
    """

    encoder_prefix = None

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        init_values: float = 0.0,
        use_learnable_pos_emb: bool = False,
        init_scale: float = 0.0,
        all_frames: int = 16,
        tubelet_size: int = 2,
        use_mean_pooling: bool = True,
        with_cp: bool = False,
        cos_attn: bool = False,
    ):
        super().__init__()
        if cos_attn and qk_scale is not None:
            raise ValueError(f"qk_scale is {qk_scale}, expected None with cos_attn, whose scale is learned")
        self.patch_embed = VideoEmbed(img_size, patch_size, in_chans, embed_dim, all_frames, tubelet_size)
        patches = self.patch_embed.num_patches
        self.pos_embed: Tensor
        if use_learnable_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, patches, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            self.register_buffer("pos_embed", sinusoids(patches, embed_dim)[None], persistent=False)
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                mlp_ratio,
                norm_eps,
                init_values,
                drop_rate,
                drop_path[i],
                Attention(embed_dim, num_heads, qkv_bias, qk_scale, cos_attn, attn_drop_rate),
            )
            for i in range(depth)
        )
        self.norm = nn.Identity() if use_mean_pooling else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if use_mean_pooling else None
        self.head_dropout = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head.weight.data.mul_(init_scale)

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.patch_embed.embed(pixels, self.pos_embed[0].detach())

    def forward(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        x = self.pos_drop(self.tokens(pixels))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 0]) if self.fc_norm is None else self.fc_norm(x.mean(1))
        return self.head(self.head_dropout(x))


def sinusoids(rows: int, width: int) -> Tensor:
    """[rows, width]: sines of position / 10000^(2 (j // 2) / width) in the even columns j, cosines in the odd ones."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()
