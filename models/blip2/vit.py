"""The image encoders: EVA's ViT-g (Fang et al. 2022, arXiv:2211.07636) and CLIP's ViT-L, all tokens, not normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfuse.fused import PatchEmbed, vit_tokens
from mmfuse.fused.acceleration.plain import are_plain
from mmfuse.models.clip import Transformer
from mmfuse.models.vit import MLP


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # a key's bias would add the same to all scores of a query
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        # an adapter, say, is to be called
        qkv = F.linear(x, self.qkv.weight, bias) if are_plain((nn.Linear,), self.qkv) else self.qkv(x) + bias
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, width / heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EvaViT(nn.Module):
    """image [B, 3, R, R] -> tokens [B, 1 + (R / patch_size)^2, embed_dim], the class token first."""

    def __init__(
        self,
        img_size: int,
        patch_size: int = 14,
        embed_dim: int = 1408,
        depth: int = 39,
        num_heads: int = 16,
        mlp_ratio: float = 4.3637,
        norm_eps: float = 1e-6,
        use_grad_checkpoint: bool = False,
    ):
        super().__init__()
        self.grid, self.num_features = _grid(img_size, patch_size), embed_dim
        _check_heads(embed_dim, num_heads)
        self.image_resolution, self.use_grad_checkpoint = img_size, use_grad_checkpoint
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth))
        for weight in (self.cls_token, self.pos_embed, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        _check_image(image, self.image_resolution)
        image = image.to(self.pos_embed.dtype)
        x = vit_tokens(image, self.patch_embed.proj, self.cls_token[0, 0], self.pos_embed[0])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use_grad_checkpoint else block(x)
        return x

    def resized(self, table: Tensor) -> Tensor:
        """A position table [1, 1 + n, embed_dim] of another grid at this one's."""
        one = table.shape[:1] == (1,)
        return _resized(table[0], self.grid, align_corners=False)[None] if one else table


class ClipViT(nn.Module):
    """image [B, 3, R, R] -> tokens [B, 1 + (R / patch_size)^2, width]: CLIP's without its last layer and norm."""

    def __init__(self, img_size: int, patch_size: int = 14, width: int = 1024, layers: int = 23, heads: int = 16):
        super().__init__()
        self.grid, self.num_features = _grid(img_size, patch_size), width
        self.image_resolution = img_size
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)

    def forward(self, image: Tensor) -> Tensor:
        _check_image(image, self.image_resolution)
        image = image.to(self.class_embedding.dtype)
        x = vit_tokens(image, self.conv1, self.class_embedding, self.positional_embedding)
        return self.transformer(self.ln_pre(x))

    def resized(self, table: Tensor) -> Tensor:
        """A position table [1 + n, width] of another grid at this one's."""
        return _resized(table, self.grid, align_corners=True)


def _resized(table: Tensor, grid: int, align_corners: bool) -> Tensor:
    of_class, of_patches = table.tensor_split([1])
    side = round(len(of_patches) ** 0.5)
    if side == grid:
        return table
    image = of_patches.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=align_corners)
    return torch.cat([of_class, image[0].flatten(1).t()])


def _grid(img_size: int, patch_size: int) -> int:
    if img_size % patch_size:
        raise ValueError(f"img_size is {img_size}, expected a multiple of patch_size {patch_size}")
    return img_size // patch_size


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"embed_dim is {width}, expected a multiple of num_heads {heads}")


def _check_image(image: Tensor, resolution: int) -> None:
    expected = (3, resolution, resolution)
    if image.shape[1:] != expected:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected [B, {', '.join(map(str, expected))}]")
