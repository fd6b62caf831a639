"""Text: a token per word piece, or a ready sentence vector as one token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels.text import embed_text


def zero_padding(text_tensor: Tensor, tar_dim: int) -> Tensor:
    """Sentence vectors [B, E] (the published code takes CLIP's) -> [B, tar_dim], zeros appended.

    Raises:
        ValueError: vectors wider than tar_dim.
    """
    if text_tensor.dim() != 2 or text_tensor.shape[1] > tar_dim:
        raise ValueError(f"text_tensor has shape {tuple(text_tensor.shape)}, expected [B, at most {tar_dim}]")
    return F.pad(text_tensor, (0, tar_dim - text_tensor.shape[1]))


class TextEmbed(nn.Module):
    """Ids int64 [B, L] -> [B, L, embed_dim], each with its position; or vectors [B, E] -> [B, 1, embed_dim].

    The published tokenizer returns ids, or a vector that no sequence holds; a table of tokens is added here.

    Raises:
        ValueError: more than `length` ids, or vectors wider than embed_dim.
    """

    def __init__(self, vocab_size: int = 49408, length: int = 77, embed_dim: int = 768):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.positional_embedding = nn.Parameter(torch.empty(length, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, text: Tensor) -> Tensor:
        if text.is_floating_point():
            return zero_padding(text, self.token_embedding.weight.shape[1])[:, None]
        if text.dim() != 2 or text.shape[1] > len(self.positional_embedding):
            raise ValueError(
                f"text has shape {tuple(text.shape)}, expected ids [B, at most {len(self.positional_embedding)}]"
            )
        return embed_text(text, self.token_embedding.weight, position=self.positional_embedding)
