"""The parts of a BERT with cross-attention (Devlin et al. 2018), under the key names of ALBEF's and BLIP's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import linear_cross_entropy
from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.qformer import Predictions
from mmfuse.kernels.text import embed_text

KeysValues = tuple[Tensor, Tensor]  # each [B, heads, K, hidden_size / heads]


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The entries of the official config file."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
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


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (1 = token, 0 = pad) [B, K] or [B, Q, K] as what is added to attention scores, for all heads."""
    mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    return (1 - mask.to(dtype)) * -10000.0


def causal(mask: Tensor) -> Tensor:
    """The mask [B, L, L] of a decoder: a token sees itself and those before it, of mask [B, L]."""
    return mask[:, None] * torch.ones_like(mask[0]).expand(mask.shape[1], -1).tril()


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
    """Attention of x [B, L, hidden] to keys and values, with its residual and LayerNorm."""

    def __init__(self, config: BertConfig, key_width: int):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = Projections(config, key_width)
        self.output = Output(config, config.hidden_size)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of context [B, K, key_width]."""
        return self._by_head(self.self.key(context)), self._by_head(self.self.value(context))

    def forward(self, x: Tensor, keys_values: KeysValues, bias: Tensor | None) -> Tensor:
        k, v = keys_values
        q = self.self.query(x)
        if len(q) != len(k):  # rows in a run see the same context: they are so many more queries
            q = q.reshape(len(k), -1, q.shape[-1])
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(self._by_head(q), k, v, bias, dropout)
        return self.output(attended.transpose(1, 2).reshape(x.shape), x)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: BertConfig, cross: bool = True):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention: Any = Attention(config, config.encoder_width) if cross else None
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        own: KeysValues,
        bias: Tensor,
        context: KeysValues | None = None,
        context_bias: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, hidden] attends to the text's `own` keys, then, where there is one, to the `context`."""
        x = self.attention(x, own, bias)
        if context is not None:
            x = self.crossattention(x, context, context_bias)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: BertConfig, types: bool, padding: bool = True):
        super().__init__()
        width = config.hidden_size
        pad = config.pad_token_id if padding else None
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if types else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """ids [B, L] at the positions from `start` on."""
        longest = self.position_ids.shape[1]
        if ids.dim() != 2 or start + ids.shape[1] > longest:
            raise ValueError(f"token ids have shape {tuple(ids.shape)}, expected [B, L] with L <= {longest - start}")
        words, types, norm = read(self.word_embeddings), self.token_type_embeddings, read(self.LayerNorm)
        x = embed_text(
            ids,
            words.weight,
            position=read(self.position_embeddings).weight,
            position_offset=start,
            type_embed=None if types is None else read(types).weight[0],  # every token is of type 0
            norm=(norm.weight, norm.bias, norm.eps),
            padding_idx=words.padding_idx,
        )
        return self.dropout(x)


class Encoder(nn.Module):
    layer: Any

    def __init__(self, *layers: Layer):
        super().__init__()
        self.layer = nn.ModuleList(layers)


def initialize(module: nn.Module, std: float) -> None:
    """Weights normal, biases and the word of padding 0, in all of `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            nn.init.zeros_(part.weight[part.padding_idx])


class Head(nn.Module):
    def __init__(self, config: BertConfig, words: nn.Embedding):
        super().__init__()
        self.predictions = Predictions(words, config.layer_norm_eps)


class LanguageModel(nn.Module):
    """A BERT with a language head. `hidden` and `logits` take what the BERT takes."""

    def __init__(self, bert: Any, config: BertConfig):
        super().__init__()
        self.bert = bert
        self.cls = Head(config, bert.embeddings.word_embeddings)
        initialize(self.cls.predictions.transform, config.initializer_range)

    def hidden(self, *args: Any, **options: Any) -> Tensor:
        """What the logits are a linear map of, [B, L, hidden_size]."""
        return self.cls.predictions.transform(self.bert(*args, **options))

    def logits(self, *args: Any, **options: Any) -> Tensor:
        """[B, L, vocab_size]. `loss` does not need them."""
        return self.cls.predictions.decoder(self.hidden(*args, **options))

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        reduction: str,
        teacher: Teacher = None,
        alpha: float = 0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of `hidden` with `labels`, and with what the `teacher`'s own head makes of its hidden."""
        head = read(self.cls.predictions.decoder)
        soft = None
        if teacher is not None:
            model, hidden_m = teacher
            soft = (hidden_m, model.cls.predictions.decoder.weight, model.cls.predictions.decoder.bias)
        return linear_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            label_smoothing=label_smoothing,
            reduction=reduction,
            teacher=soft,
            alpha=alpha,
        )


Teacher = tuple[LanguageModel, Tensor] | None
