"""The text and multimodal encoder: a BERT whose upper layers attend to an image, under xbert's key names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmfuse.models import bert
from mmfuse.models.bert import Embeddings, Encoder, LanguageModel, Layer, additive, causal, initialize


@dataclass(frozen=True, kw_only=True)
class BertConfig(bert.BertConfig):
    """The entries of the official config file. Layers from `fusion_layer` on have cross-attention."""

    fusion_layer: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fusion_layer <= self.num_hidden_layers:
            raise ValueError(f"fusion_layer is {self.fusion_layer}, expected 0 to {self.num_hidden_layers}")


class BertModel(nn.Module):
    """The layers below `fusion_layer` encode a text alone (`text`), the rest fuse it with an image (`fusion`).

    `forward` is both. Masks are [B, L] of 1 (token) and 0 (pad); `context` [B, K, encoder_width] is what the
    cross-attention sees. A causal model is a decoder.
    """

    def __init__(self, config: BertConfig, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.embeddings = Embeddings(config, types=True)
        self.encoder = Encoder(*(Layer(config, i >= config.fusion_layer) for i in range(config.num_hidden_layers)))
        initialize(self, config.initializer_range)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        bias = self._bias(mask, x)
        for layer in self.encoder.layer[: self.config.fusion_layer]:
            x = layer(x, layer.attention.keys_values(x), bias)
        return x

    def fusion(self, x: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        bias = self._bias(mask, x)
        context_bias = None if context_mask is None else additive(context_mask, x.dtype)
        for layer in self.encoder.layer[self.config.fusion_layer :]:
            seen = layer.crossattention.keys_values(context)
            x = layer(x, layer.attention.keys_values(x), bias, seen, context_bias)
        return x

    def forward(self, ids: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        return self.fusion(self.text(ids, mask), mask, context, context_mask)

    def _bias(self, mask: Tensor, x: Tensor) -> Tensor:
        return additive(causal(mask) if self.causal else mask, x.dtype)


class BertForLanguage(LanguageModel):
    """BERT with a language head: masked (`causal=False`) or a decoder (`causal=True`)."""

    def __init__(self, config: BertConfig, causal: bool = False):
        super().__init__(BertModel(config, causal), config)
