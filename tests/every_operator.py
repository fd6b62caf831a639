"""A module with a call of every operator that leaves as a node, and what goes into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.kernels.head import select_head
from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.op import routed_ffn, routed_layer_norm, routed_linear, routed_rms_norm
from mmfuse.kernels.multiway.routing import Routing
from mmfuse.kernels.points import mini_pointnet, nearest_neighbors
from mmfuse.kernels.qformer import few_query_attention, project_kv, token_attention
from mmfuse.kernels.text import embed_text

# each is told to be different from the others: equal sizes would be taken for one
B, L, S, D, H = 3, 5, 9, 16, 24
DYNAMIC = {"pixels": {0: "batch"}, "tokens": {0: "batch"}, "ids": {0: "batch", 1: "length"}, "rows": {0: "rows"}}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=draw))

        self.stem, self.bias, self.cls, self.position = (
            parameter(D, 3, 8, 8), parameter(D), parameter(1, D), parameter(4, D),
        )  # fmt: skip
        self.gamma, self.beta, self.head = parameter(D), parameter(D), parameter(7, D)
        self.codes, self.gallery, self.words = parameter(11, D), parameter(13, D), parameter(40, D)
        self.word_position = parameter(32, D)
        self.w1, self.b1 = parameter(2, H, D), parameter(2, H)
        self.w2, self.b2 = parameter(2, D, H), parameter(2, D)
        self.gammas, self.betas, self.wide = parameter(2, D), parameter(2, D), parameter(2, H)
        self.table, self.queries = parameter(3, 3, D), parameter(1, 4, 2, D // 2)
        self.kv, self.key_weight, self.value_weight = parameter(1, 2, D, D), parameter(D, D), parameter(D, D)
        self.layers = nn.ParameterList(parameter(*s) for s in ((8, 3), (8,), (8, 8), (8,), (8, 16), (8,), (6, 8), (6,)))
        self.relative = parameter(2, S, S)

    def forward(self, pixels: Tensor, tokens: Tensor, ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """pixels uint8 [batch, 3, 16, 16]; tokens [batch, S, D]; ids [batch, length]; rows [rows, D]."""
        routing = Routing.from_split(len(tokens), S, 4)
        x = routing.pack(tokens.flatten(0, 1)) if routing.order is not None else tokens.flatten(0, 1)
        ffn = routed_ffn(
            x, list(self.w1), list(self.b1), list(self.w2), list(self.b2), routing,
            norm=(list(self.wide), list(self.wide), 1e-5), residual=x,
        )  # fmt: skip
        heads = x.unflatten(1, (2, -1))
        projected = project_kv(tokens, self.kv, None, 2, (self.gamma, self.beta, 1e-5))
        values, indices = mmfuse.similarity_topk(rows, self.gallery, 3)
        layers = [(self.layers[2 * i], self.layers[2 * i + 1]) for i in range(4)]
        return {
            "patches": mmfuse.patch_embed(
                pixels, self.stem, self.bias, mean=(0.4, 0.5, 0.6), std=0.25, prefix=self.cls, position=self.position
            ),
            "first": select_head(tokens, 0, (self.gamma, self.beta, 1e-5), self.head),
            "last": select_head(tokens, ids.argmax(1), (self.gamma, self.beta, 1e-5), self.head, normalize=False),
            "linear": routed_linear(x, self.w1, self.b1, routing, activation="gelu"),
            "normed linear": routed_linear(x, self.w1, self.b1, routing, input_norm=(self.gammas, self.betas, 1e-5)),
            "normed ffn": routed_ffn(
                x, self.w1, self.b1, self.w2, self.b2, routing, input_norm=(self.gammas, self.betas, 1e-5)
            ),
            "ffn": ffn,
            "normed": routed_layer_norm(x, self.gammas, self.betas, routing),
            "rms": routed_rms_norm(x, self.gammas, routing),
            "attended": packed_attention(
                heads, heads.flip(1), heads + 1, routing, (("all", "none"), ("all", "causal")), self.relative
            ),
            "nearest": mmfuse.nearest_code(rows, self.codes),
            "cosine": mmfuse.nearest_code(rows, self.codes, metric="cosine"),
            "values": values,
            "indices": indices,
            "embedded": embed_text(ids, self.words, position=self.word_position, norm=(self.gamma, None, 1e-6)),
            "largest": mmfuse.max_query_similarity(tokens, rows),
            "grid": mmfuse.interpolate_position(self.table, (4, 4)),
            "projected": projected,
            "queried": few_query_attention(self.queries, projected[..., 0, 0, :, :], projected[..., 0, 1, :, :])[0],
            "seen": token_attention(
                self.queries, tokens, self.key_weight, self.value_weight, lengths=ids.sum(1).clamp(max=S)
            )[0],
            "hidden": token_attention(self.queries, tokens, self.key_weight, self.value_weight, bias=tokens.sum(2))[0],
            "points": mini_pointnet(tokens[..., :3], layers),
            "neighbors": nearest_neighbors(tokens[:, :4, :3].round(), tokens[..., :3].round(), 5),  # with ties
        }


def inputs(batch: int = B, length: int = L, rows: int = 6, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, S, (batch, length), generator=draw)
    ids[0] = 0  # of an image with no token to see
    return {
        "pixels": torch.randint(0, 256, (batch, 3, 16, 16), generator=draw, dtype=torch.uint8),
        "tokens": torch.randn(batch, S, D, generator=draw),
        "ids": ids,
        "rows": torch.randn(rows, D, generator=draw),
    }
