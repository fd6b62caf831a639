"""A few learned queries gather the tokens of images: poolers and resamplers.

The queries are the same for every image: they are projected once, and neither keys nor values are formed where that
takes less (`token_attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import are_plain
from mmfuse.kernels._runtime.arguments import check
from mmfuse.kernels.qformer import few_query_attention, project_kv, token_attention


class AttentionalPooler(nn.Module):
    """open_clip's pooler of CoCa (Yu et al. 2022, arXiv:2205.01917): learned queries attend to tokens.

    The constructor, the parameters and the output are open_clip's. Deterministic where torch's matrix product is.

    Args:
        d_model: the queries' width.
        context_dim: the tokens' width.
        n_head: a divisor of d_model.
        n_queries: 256 in CoCa, whose first one is for the contrast.
        norm_layer: of queries and of tokens, called with a width.
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_head: int = 8,
        n_queries: int = 256,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"d_model is {d_model}, expected a multiple of n_head {n_head}")
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = nn.MultiheadAttention(d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = norm_layer(d_model)
        self.ln_k = norm_layer(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, context_dim] to [B, n_queries, d_model]."""
        query, x = self.ln_q(self.query)[None], self.ln_k(x)
        if are_plain((nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear), *self.attn.modules()):
            return attention(self.attn, query, x)
        return self.attn(query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


def attention(module: nn.MultiheadAttention, query: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """nn.MultiheadAttention of queries [1, Q, D] over x [B, N, E], with a bias [B, N] of the scores."""
    of_query, of_keys, of_values = _weights(module)
    bias_q, _, bias_v = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q = F.linear(query, of_query, bias_q).unflatten(-1, (module.num_heads, -1))
    o = token_attention(q, x, of_keys, of_values, bias_v, bias=bias).o
    return F.linear(o.flatten(2), module.out_proj.weight, module.out_proj.bias)


def _weights(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    if module.in_proj_weight is not None:
        return module.in_proj_weight.chunk(3)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


class _PerceiverAttention(nn.Module):
    """Of latents [B or 1, n, D] over an image's tokens and the latents themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """media: keys and values [B, N, 2, heads, dim_head] of the tokens."""
        latents = self.norm_latents(latents)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1))
        own = self.to_kv(latents).unflatten(-1, (2, self.heads, -1))
        # the tokens' keys are there without what the bias of their norm adds to them: that counts by its difference
        k, v = torch.cat([media, (own - self._shift()).expand(len(media), -1, -1, -1, -1)], dim=1).unbind(2)
        return self.to_out(few_query_attention(q, k, v).o.flatten(2))

    def _shift(self) -> Tensor:
        of_keys, of_values = F.linear(self.norm_media.bias, self.to_kv.weight).unflatten(-1, (2, self.heads, -1))
        return torch.stack([of_keys, torch.zeros_like(of_values)])

    def media(self, x: Tensor) -> Tensor:
        """The keys and values of tokens by themselves."""
        return self.to_kv(self.norm_media(x)).unflatten(-1, (2, self.heads, -1)) - self._shift()


class PerceiverResampler(nn.Module):
    """Flamingo's resampler (Alayrac et al. 2022, arXiv:2204.14198, section 3.1.1): videos to a few latents.

    The keys and values of all layers, each behind a LayerNorm of its own, are one product of the tokens, which are
    normalised once. The constructor, the parameters and the output are open_flamingo's. Deterministic where torch's
    matrix product is.

    Args:
        dim: D, of tokens and latents.
        depth: layers.
        dim_head, heads: of the attention.
        num_latents: n.
        max_num_media: of learned embeddings of the place of an image among others; None for none.
        max_num_frames: the same of a frame in a video.
        ff_mult: the width of the feed-forward networks in units of dim.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1")
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = None if max_num_frames is None else nn.Parameter(torch.randn(max_num_frames, dim))
        self.media_time_embs = None if max_num_media is None else nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers: Any = nn.ModuleList(
            nn.ModuleList([_PerceiverAttention(dim, dim_head, heads), _feed_forward(dim, ff_mult * dim)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, F, V, D] of T images of F frames to [B, T, n, D].

        Raises:
            ValueError: x has another shape, or more images or frames than there are embeddings for.
        """
        check("x", x, ("B", "T", "F", "V", self.latents.shape[1]))
        (batch, images, frames), of = x.shape[:3], [attend for attend, _ in self.layers]
        if self.frame_embs is not None:
            x = x + _first(frames, self.frame_embs, "frames")[:, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + _first(images, self.media_time_embs, "images")
        x = x.flatten(0, 1)
        if are_plain((nn.Linear, nn.LayerNorm), *(m for attend in of for m in (attend.to_kv, attend.norm_media))):
            weight = torch.stack([attend.to_kv.weight.unflatten(0, (2, -1)) for attend in of])
            gamma, beta = (torch.stack([getattr(a.norm_media, name) for a in of]) for name in ("weight", "bias"))
            media = project_kv(x, weight, None, of[0].heads, (gamma, beta, of[0].norm_media.eps))
        else:
            media = torch.stack([attend.media(x) for attend in of], 2)
        latents = self.latents[None]
        for i, (attend, feed_forward) in enumerate(self.layers):
            latents = attend(latents, media[:, :, i]) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents).unflatten(0, (batch, images))


def _first(n: int, embeddings: Tensor, name: str) -> Tensor:
    if n > len(embeddings):
        raise ValueError(f"x has {n} {name}, expected at most {len(embeddings)}, for which there are embeddings")
    return embeddings[:n]


def _feed_forward(dim: int, hidden: int) -> nn.Sequential:
    into, out = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), into, nn.GELU(), out)
