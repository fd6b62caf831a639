"""Layers with an expert for each modality, over a stream of rows in which those of an expert lie together.

VLMo (Bao et al. 2021, arXiv:2111.02358) and BEiT-3 (Wang et al. 2022, arXiv:2208.10442). A `Routing` says which rows
are whose; it is an argument of every forward, never a state of the module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear
from mmfuse.kernels.multiway.attention import packed_attention


class MultiwayLinear(nn.Module):
    """[T, K] to [T, N], with weight [E, N, K] and bias [E, N]; initialised as `nn.Linear`."""

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        layers = [nn.Linear(in_features, out_features, bias) for _ in range(experts)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])) if bias else None

    def forward(
        self, x: Tensor, routing: Routing, residual: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """residual [T, N] and row_scale [T] as in `routed_linear`."""
        return routed_linear(x, self.weight, self.bias, routing, residual=residual, row_scale=row_scale)


class MultiwayLayerNorm(nn.Module):
    """[T, D] to [T, D], with weight and bias [E, D]."""

    def __init__(self, experts: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(experts, width)), nn.Parameter(torch.zeros(experts, width))
        self.eps = eps

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return routed_layer_norm(x, self.weight, self.bias, routing, self.eps)


class MultiwayFFN(nn.Module):
    """fc2(norm(gelu(fc1(x)))), the norm only with `sub_norm` (Magneto, arXiv:2210.06423)."""

    def __init__(self, experts: int, width: int, hidden: int, sub_norm: bool = False, eps: float = 1e-5):
        super().__init__()
        self.fc1 = MultiwayLinear(experts, width, hidden)
        self.norm = MultiwayLayerNorm(experts, hidden, eps) if sub_norm else None
        self.fc2 = MultiwayLinear(experts, hidden, width)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """residual [T, N], scale [N] and row_scale [T] as in `routed_ffn`."""
        fc1, fc2, norm = self.fc1, self.fc2, self.norm
        return routed_ffn(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, routing,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            residual=residual, scale=scale, row_scale=row_scale,
        )  # fmt: skip


class MultiwayBlock(nn.Module):
    """BEiT-3's layer: x + out(norm(attention(qkv(norm(x))))), then x + ffn(norm(x)); only the attention is shared.

    Args:
        experts: E. width, heads, hidden: of the layer.
        sub_norm: norms also before `out` and before the second product of the FFN.
        drop_path: probability that a sample skips a branch in training, its image and its text together.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        hidden: int,
        sub_norm: bool = True,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.heads, self.drop_path = _heads_of(width, heads), drop_path
        self.attention_norm = MultiwayLayerNorm(experts, width, eps)
        self.qkv = MultiwayLinear(experts, width, 3 * width)
        self.inner_norm = MultiwayLayerNorm(experts, width, eps) if sub_norm else None
        self.out = MultiwayLinear(experts, width, width)
        self.ffn_norm = MultiwayLayerNorm(experts, width, eps)
        self.ffn = MultiwayFFN(experts, width, hidden, sub_norm, eps)

    def forward(self, x: Tensor, routing: Routing, sees: Sequence[Sequence[str]] | None = None) -> Tensor:
        q, k, v = self.project(x, routing)
        return self.finish(x, packed_attention(q, k, v, routing, sees), routing)

    def project(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [T, heads, width / heads]."""
        q, k, v = self.qkv(self.attention_norm(x, routing), routing).unflatten(1, (3, self.heads, -1)).unbind(1)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, routing: Routing) -> Tensor:
        """The layer's output, from its input and what its heads found, both [T, width]."""
        if self.inner_norm is not None:
            attended = self.inner_norm(attended, routing)
        probability = self.drop_path if self.training else 0.0
        x = self.out(attended, routing, x, path_scale(x, routing, probability))
        normed = self.ffn_norm(x, routing)
        return self.ffn(normed, routing, x, row_scale=path_scale(x, routing, probability))


class MoMEBlock(nn.Module):
    """VLMo's layer: shared norm and attention, then a norm and an FFN for each modality, each branch scaled.

    Args:
        experts: E. width, heads, hidden: of the layer.
        layer_scale: initial scale of both branches, shared by the experts; None for none.
        drop_path: probability that a sample skips a branch in training; where its parts have different experts, each
            part for itself.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        hidden: int,
        layer_scale: float | None = 0.1,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.heads, self.drop_path = _heads_of(width, heads), drop_path
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # a key's bias would add the same to all scores of a query
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) if qkv_bias else None for _ in "qv")
        self.proj = nn.Linear(width, width)
        self.norm2, self.mlp = MultiwayLayerNorm(experts, width, eps), MultiwayFFN(experts, width, hidden)
        scaled = layer_scale is not None
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((width,), layer_scale)) if scaled else None for _ in range(2)
        )

    def forward(self, x: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
        """x [T, D]; bias [heads, P, P], of relative positions."""
        of_qkv = None
        if self.q_bias is not None and self.v_bias is not None:
            of_qkv = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(self.norm1(x), self.qkv.weight, of_qkv).unflatten(1, (3, self.heads, -1)).unbind(1)
        probability = self.drop_path if self.training else 0.0
        branch = self.proj(packed_attention(q, k, v, routing, bias=bias))
        branch = branch if self.gamma_1 is None else branch * self.gamma_1
        kept = path_scale(x, routing, probability)
        x = x + (branch if kept is None else branch * kept[:, None])
        kept = path_scale(x, routing, probability, separately=True)
        return self.mlp(self.norm2(x, routing), routing, x, self.gamma_2, kept)


def path_scale(x: Tensor, routing: Routing, probability: float, separately: bool = False) -> Tensor | None:
    """The factor [T] of each row: 0 for samples drawn with `probability`, for others 1 over what is left of it.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382); None where nothing is dropped. `separately`: the parts of a
    sample that have different experts are drawn each for itself.
    """
    if probability == 0 or not len(x):
        return None
    columns = routing.experts if separately else 1
    factor = x.new_empty(len(routing.first), columns).bernoulli_(1 - probability) / (1 - probability)
    return factor[routing.sample, routing.experts_of(len(x)) if separately else 0]


def _heads_of(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"width is {width} with {heads} heads, expected a multiple of the heads")
    return heads
