"""The encoder that all modalities share: pre-norm ViT blocks (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read


class Attention(nn.Module):
    def __init__(self, dim: int, qkv_bias: bool):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, heads: int, padding: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, dim / heads]
        mask = None if padding is None else ~padding[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, heads: int, eps: float, padding: Tensor | None) -> Tensor:
        x = x + self.attn(_layer_norm(x, self.norm1, eps), heads, padding)
        return x + self.mlp(_layer_norm(x, self.norm2, eps))


class Encoder(nn.Sequential):
    """tokens [B, L, dim] -> features [B, L, dim], under the keys of "Meta-Transformer_base_patch16_encoder.pth".

    No class token, position or final norm: those are of the modality. The task folders run the same weights with other
    settings, which are arguments here.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True):
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, expected a multiple of num_heads {num_heads}")
        super().__init__(*(Block(dim, mlp_ratio, qkv_bias) for _ in range(depth)))
        self.dim, self.num_heads = dim, num_heads
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def states(
        self,
        x: Tensor,
        *,
        heads: int | None = None,
        eps: float = 1e-5,
        position: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> list[Tensor]:
        """The tokens and what every block makes of them. `position` is added before each block; tokens where
        `padding` (bool [B, L]) are not attended to."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"tokens have width {x.shape[-1]}, expected {self.dim} as the encoder's dim")
        states = [x]
        for block in self:
            x = states[-1] if position is None else states[-1] + position
            states.append(block(x, heads or self.num_heads, eps, padding))
        return states

    def forward(
        self,
        x: Tensor,
        *,
        heads: int | None = None,
        eps: float = 1e-5,
        position: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        return self.states(x, heads=heads, eps=eps, position=position, padding=padding)[-1]


def _layer_norm(x: Tensor, norm: nn.LayerNorm, eps: float) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, read(norm).weight, norm.bias, eps)
