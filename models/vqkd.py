"""VQ-KD (Peng et al. 2022, arXiv:2208.06366): visual tokens from which a teacher's features are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import NormEMAVectorQuantizer
from mmfuse.kernels import nearest_code
from mmfuse.models.registry import System, instantiate
from mmfuse.models.vit import VisionTransformer


class Tokenized(NamedTuple):
    codes: Tensor  # int64 [B, N]
    features: Tensor  # [B, N, decoder_out_dim], the teacher's as they are read from the codes
    loss: Tensor | None  # 1 - cosine to the teacher's features, and the quantizer's; None without a teacher


class VQKD(nn.Module):
    """Image, visual tokens, features.

    Args:
        img_size, patch_size, in_chans: of square images and patches.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder, and but for the depth of the decoder.
        decoder_depth: of the decoder. decoder_out_dim: width of the teacher's features.
        n_code, code_dim: of the codebook. decay: of its moving averages.
        quantize_kmeans_init: the codes are from the first batch.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_depth: int = 3,
        decoder_out_dim: int = 512,
        n_code: int = 8192,
        code_dim: int = 32,
        decay: float = 0.99,
        quantize_kmeans_init: bool = True,
    ):
        super().__init__()
        sizes: dict[str, Any] = {"embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        self.embed_dim, self.image_resolution, self.grid = embed_dim, img_size, img_size // patch_size
        self.encoder = VisionTransformer(img_size, patch_size, depth=depth, in_chans=in_chans, **sizes)
        self.decoder = VisionTransformer(self.grid, 1, depth=decoder_depth, in_chans=code_dim, **sizes)
        self.quantize = NormEMAVectorQuantizer(n_code, code_dim, 1.0, decay, kmeans_init=quantize_kmeans_init)
        self.encode_task_layer = _head(embed_dim, code_dim)
        self.decode_task_layer = _head(embed_dim, decoder_out_dim)

    def forward(self, image: Tensor, teacher: Tensor | None = None) -> Tokenized:
        """Image [B, C, H, W] with pixels in [-1, 1]; teacher: features [B, N, decoder_out_dim] of the same patches."""
        z = self._projected(image).mT.unflatten(2, (self.grid, self.grid))
        z, emb_loss, codes = self.quantize(z)
        features = self.decode_task_layer(self.decoder(z)[:, 1:])
        loss = None
        if teacher is not None:
            loss = (1 - F.cosine_similarity(features, teacher, dim=-1)).mean() + emb_loss
        return Tokenized(codes.view(len(image), -1), features, loss)

    def encode(self, image: Tensor) -> Tensor:
        """The visual tokens [B, N] of images, by the codes as they are."""
        z = F.normalize(self._projected(image), dim=-1)
        return nearest_code(z.flatten(0, 1), self.quantize.embedding.weight).view(z.shape[:2])

    def _projected(self, image: Tensor) -> Tensor:
        """[B, N, code_dim]."""
        return self.encode_task_layer(self.encoder(image)[:, 1:])

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own state from unilm's, where keys have no bias."""
        found = dict[str, Tensor]()
        for key, t in state_dict.items():
            if key.endswith("attn.q_bias"):
                v = state_dict[key.replace("q_bias", "v_bias")]
                found[key.replace("q_bias", "qkv.bias")] = torch.cat([t, torch.zeros_like(t), v])
            elif not key.endswith("attn.v_bias"):
                found[key.replace("coder.fc_norm.", "coder.norm.")] = t
        return found

    def to_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """unilm's state from its own; the bias of keys, which adds the same to all scores of a query, is left out."""
        found = dict[str, Tensor]()
        for key, t in state_dict.items():
            if key.endswith("attn.qkv.bias"):
                q, _, v = t.chunk(3)
                found |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
            else:
                found[key.replace("coder.norm.", "coder.fc_norm.")] = t
        return found


def _head(width: int, out: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
    for layer in (layers[0], layers[2]):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layers


SYSTEM = System(
    build=lambda config: instantiate(VQKD, config),
    presets={"base-clip": {}, "base-dino": {"decoder_depth": 1, "decoder_out_dim": 768}},
    paper="arXiv:2208.06366",
)
