"""The mixture of encoder and decoder: a BERT that attends to an image in every layer or in none (Li et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.models import bert
from mmfuse.models.bert import Embeddings, Encoder, KeysValues, LanguageModel, Layer, additive, causal, initialize


@dataclass(frozen=True, kw_only=True)
class BertConfig(bert.BertConfig):
    """The entries of the official config file."""

    add_cross_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.add_cross_attention:
            raise ValueError("add_cross_attention is False, expected True: every layer has cross-attention")


class Context(NamedTuple):
    """What cross-attention sees, projected once for all passes: every layer's keys and values [B, heads, K, d] each.

    A pass of n * B texts reads each context n times in a row.
    """

    keys_values: tuple[KeysValues, ...]
    bias: Tensor | None = None  # [B, 1, 1, K]

    def select(self, rows: Tensor) -> Context:
        """The contexts `rows` [P]."""
        bias = None if self.bias is None else self.bias[rows]
        return Context(tuple((k[rows], v[rows]) for k, v in self.keys_values), bias)


class BertModel(nn.Module):
    """`text` sees no image, `forward` a `context`. Masks are [B, L] of 1 (token) and 0 (pad). A causal one decodes.

    padding: whether the word of padding stays 0.
    """

    def __init__(self, config: BertConfig, causal: bool = False, padding: bool = True):
        super().__init__()
        self.config, self.causal = config, causal
        self.embeddings = Embeddings(config, types=False, padding=padding)
        self.encoder = Encoder(*(Layer(config) for _ in range(config.num_hidden_layers)))
        initialize(self, config.initializer_range)

    def share(self, other: BertModel) -> None:
        """Take all of the `other`'s modules but self-attention."""
        self.embeddings = other.embeddings
        for own, layer in zip(self.encoder.layer, other.encoder.layer, strict=True):
            own.crossattention, own.intermediate, own.output = layer.crossattention, layer.intermediate, layer.output

    def context(self, states: Tensor, mask: Tensor | None = None) -> Context:
        """Of states [B, K, encoder_width], of which `mask` [B, K] may hide some."""
        keys_values = tuple(layer.crossattention.keys_values(states) for layer in self.encoder.layer)
        return Context(keys_values, None if mask is None else additive(mask, states.dtype))

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States [B, L, hidden_size] of a text alone."""
        return self._states(ids, mask, [None] * len(self.encoder.layer))

    def forward(self, ids: Tensor, mask: Tensor, context: Context, past: list[KeysValues] | None = None) -> Tensor:
        """States [n * B, L, hidden_size] of texts, each given its context.

        past: keys and values of every layer before `ids`, to which those of `ids` are added; `mask` is then of all.
        """
        return self._states(ids, mask, context.keys_values, context.bias, past)

    def _states(self, ids, mask, contexts, context_bias=None, past=None):  # type: ignore[no-untyped-def]
        x = self.embeddings(ids, mask.shape[1] - ids.shape[1])
        if self.causal:
            mask = causal(mask)[:, -ids.shape[1] :]
        bias = additive(mask, x.dtype)
        for i, (layer, context) in enumerate(zip(self.encoder.layer, contexts, strict=True)):
            own = layer.attention.keys_values(x)
            if past is not None:
                own = past[i] = tuple(torch.cat(pair, dim=2) for pair in zip(past[i], own, strict=True))
            x = layer(x, own, bias, context, context_bias)
        return x


class BertLMHeadModel(LanguageModel):
    """The decoder, with the language head. `tied`: the encoder of which it shares all but self-attention."""

    bert: BertModel

    def __init__(self, config: BertConfig, tied: BertModel | None = None):
        bert = BertModel(config, causal=True)
        if tied is not None:
            bert.share(tied)
        super().__init__(bert, config)
