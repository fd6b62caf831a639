"""ALBEF's and BLIP's image encoder: a ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) under timm 0.4's key names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import PatchEmbed, vit_tokens


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, width / heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016): all of an image's branch, or nothing of it."""
        if not (self.training and self.drop_path):
            return branch
        return branch * F.dropout(branch.new_ones(len(branch), 1, 1), self.drop_path)


class VisionTransformer(nn.Module):
    """image [B, C, R, R] -> tokens [B, 1 + (R / patch_size)^2, embed_dim], the class token first, all normalised."""

    def __init__(
        self,
        image_res: int,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        if image_res % patch_size:
            raise ValueError(f"image_res is {image_res}, expected a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of num_heads {num_heads}")
        self.image_res, self.in_chans = image_res, in_chans
        self.patch_embed = PatchEmbed(image_res, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_res // patch_size) ** 2 + 1, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for weight in (self.cls_token, self.pos_embed, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        expected = (self.in_chans, self.image_res, self.image_res)
        if image.shape[1:] != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected [B, {', '.join(map(str, expected))}]")
        image = image.to(self.pos_embed.dtype)
        x = vit_tokens(image, self.patch_embed.proj, self.cls_token[0, 0], self.pos_embed[0])
        return self.norm(self.blocks(x))
