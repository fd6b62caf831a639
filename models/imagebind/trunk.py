"""The transformer of a modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """`nn.MultiheadAttention` on [B, L, D]; with `bias_kv` every query also sees one learned key and value."""

    def __init__(self, dim: int, heads: int, causal: bool, bias_kv: bool):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"width is {dim} with {heads} attention heads, expected a multiple of the heads")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.bias_k = nn.Parameter(torch.empty(1, 1, dim)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, dim)) if bias_kv else None
        nn.init.xavier_uniform_(self.in_proj_weight)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, b.to(t.dtype).expand(t.shape[0], -1, -1)], 1)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, L, D / heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DropPath(nn.Module):
    """In training, leave out a sample's branch with probability `rate`, and scale the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool, bias_kv: bool, drop_path: float):
        super().__init__()
        self.attn = Attention(dim, heads, causal, bias_kv)
        self.drop_path = DropPath(drop_path)
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm_1(x)))
        return x + self.drop_path(self.mlp(self.norm_2(x)))


class Trunk(nn.Module):
    """Pre-norm blocks, without a norm at the end; drop path grows from 0 to `drop_path`. x: [B, L, D].

    pre_norm: a LayerNorm before the first block (images). bias_kv: see `Attention` (audio, depth, thermal, IMU).
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        drop_path: float = 0.0,
        pre_norm: bool = False,
        causal: bool = False,
        bias_kv: bool = False,
    ):
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(nn.LayerNorm(dim, eps=1e-6) if pre_norm else nn.Identity())
        rates = [drop_path * i / max(1, blocks - 1) for i in range(blocks)]
        self.blocks = nn.Sequential(*(Block(dim, heads, causal, bias_kv, rate) for rate in rates))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pre_transformer_layer(x))
