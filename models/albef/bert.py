"""The text and multimodal encoder: a BERT whose upper layers attend to an image, under xbert's key names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import linear_cross_entropy
from mmfuse.kernels.text import embed_text


@dataclass(frozen=True)
class BertConfig:
    """The entries of the official config file. Layers from `fusion_layer` on have cross-attention."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    fusion_layer: int
    encoder_width: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    architectures: Any = None
    model_type: str = "bert"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected 'gelu'")
        if not 0 <= self.fusion_layer <= self.num_hidden_layers:
            raise ValueError(f"fusion_layer is {self.fusion_layer}, expected 0 to {self.num_hidden_layers}")


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (1 = token, 0 = pad) [B, K] or [B, Q, K] as what is added to attention scores, for all heads."""
    mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    return (1 - mask.to(dtype)) * -10000.0


class Projections(nn.Module):
    def __init__(self, config: BertConfig, key_width: int):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_width, config.hidden_size)
        self.value = nn.Linear(key_width, config.hidden_size)


class Output(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Attention of x [B, L, hidden] over `context` [B, K, key_width], with its residual and LayerNorm."""

    def __init__(self, config: BertConfig, key_width: int):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = Projections(config, key_width)
        self.output = Output(config, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            project(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, t in ((self.self.query, x), (self.self.key, context), (self.self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        return self.output(attended.transpose(1, 2).flatten(2), x)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: BertConfig, cross: bool):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_width) if cross else None
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(
        self, x: Tensor, bias: Tensor, context: Tensor | None = None, context_bias: Tensor | None = None
    ) -> Tensor:
        x = self.attention(x, x, bias)
        if self.crossattention is not None:
            x = self.crossattention(x, context, context_bias)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, ids: Tensor) -> Tensor:
        longest = self.position_ids.shape[1]
        if ids.dim() != 2 or ids.shape[1] > longest:
            raise ValueError(f"token ids have shape {tuple(ids.shape)}, expected [B, L] with L <= {longest}")
        words, position = self.word_embeddings, self.position_embeddings.weight
        kind = self.token_type_embeddings.weight[0]  # every token is of type 0
        norm = self.LayerNorm.weight, self.LayerNorm.bias, self.LayerNorm.eps
        x = embed_text(ids, words.weight, position=position, type_embed=kind, norm=norm, padding_idx=words.padding_idx)
        return self.dropout(x)


class Encoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i >= config.fusion_layer) for i in range(config.num_hidden_layers))


class BertModel(nn.Module):
    """The layers below `fusion_layer` encode a text alone (`text`), the rest fuse it with an image (`fusion`).

    `forward` is both. Masks are [B, L] of 1 (token) and 0 (pad); `context` [B, K, encoder_width] is what the
    cross-attention sees. A causal model is a decoder.
    """

    def __init__(self, config: BertConfig, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        bias = self._bias(mask, x)
        for layer in self.encoder.layer[: self.config.fusion_layer]:
            x = layer(x, bias)
        return x

    def fusion(self, x: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        bias = self._bias(mask, x)
        context_bias = None if context_mask is None else additive(context_mask, x.dtype)
        for layer in self.encoder.layer[self.config.fusion_layer :]:
            x = layer(x, bias, context, context_bias)
        return x

    def forward(self, ids: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        return self.fusion(self.text(ids, mask), mask, context, context_mask)

    def _bias(self, mask: Tensor, x: Tensor) -> Tensor:
        if self.causal:
            mask = mask[:, None] * torch.ones_like(mask[0]).expand(mask.shape[1], -1).tril()
        return additive(mask, x.dtype)


class Transform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """The head: a transform, then logits over the vocabulary with the word embeddings as weight."""

    def __init__(self, config: BertConfig, words: nn.Embedding):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight, self.decoder.bias = words.weight, self.bias


class Head(nn.Module):
    def __init__(self, config: BertConfig, words: nn.Embedding):
        super().__init__()
        self.predictions = Predictions(config, words)


class BertForLanguage(nn.Module):
    """BERT with a language head: masked (`causal=False`) or a decoder (`causal=True`)."""

    def __init__(self, config: BertConfig, causal: bool = False):
        super().__init__()
        self.bert = BertModel(config, causal)
        self.cls = Head(config, self.bert.embeddings.word_embeddings)
        self.bert._initialize(self.cls.predictions.transform.dense)

    def hidden(self, ids: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """What the logits are a linear map of, [B, L, hidden_size]."""
        return self.cls.predictions.transform(self.bert(ids, mask, context, context_mask))

    def logits(self, ids: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """[B, L, vocab_size]. `loss` does not need them."""
        return self.cls.predictions.decoder(self.hidden(ids, mask, context, context_mask))

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str, teacher: Teacher = None, alpha: float = 0) -> Tensor:
        """Cross-entropy of `hidden` with `labels`, and with what the `teacher`'s own head makes of its hidden."""
        head = self.cls.predictions.decoder
        soft = None
        if teacher is not None:
            model, hidden_m = teacher
            soft = (hidden_m, model.cls.predictions.decoder.weight, model.cls.predictions.decoder.bias)
        return linear_cross_entropy(
            hidden, head.weight, labels, bias=head.bias, reduction=reduction, teacher=soft, alpha=alpha
        )


Teacher = tuple[BertForLanguage, Tensor] | None
