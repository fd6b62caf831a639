"""The Q-Former (Li et al. 2023, BLIP-2, arXiv:2301.12597, section 3.1) over keys and values that passes share.

A post-LN BERT whose first rows are learned queries. They alone see the image, in every `cross_attention_freq`-th layer,
and they have an FFN of their own. Parameters have the official names (LAVIS, `Qformer.bert.*`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import HOOKS_OF_ALL, are_plain
from mmfuse.kernels._runtime.arguments import autocast_dtype, check, check_range
from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels._runtime.products import linear
from mmfuse.kernels._runtime.registration import is_plain
from mmfuse.kernels.multiway.attention import PACKED_ATTENTION, kinds_of
from mmfuse.kernels.multiway.routing import Part, Routing
from mmfuse.kernels.qformer import project_kv
from mmfuse.kernels.qformer.arguments import Keys, Tokens
from mmfuse.kernels.qformer.op import attend, attend_tokens
from mmfuse.kernels.text.blocked import Words
from mmfuse.kernels.text.op import EMBED_TEXT

Sees = Sequence[Sequence[str]]

# what a segment's rows see of another's; queries come first
CAPTION: Sees = (("all", "none"), ("all", "causal"))  # image-grounded text generation
# queries, the text of the contrast, the text that is generated: three objectives in one pass
CONTRAST_AND_CAPTION: Sees = (("all", "none", "none"), ("none", "all", "none"), ("all", "none", "causal"))


@dataclass(frozen=True)
class QFormerConfig:
    """The entries of the official BERT config that count, and BLIP-2's own.

    text: whether there are word and position embeddings and an FFN of texts.
    """

    encoder_width: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30523
    max_position_embeddings: int = 512
    cross_attention_freq: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    text: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected 'gelu'")
        if self.cross_attention_freq < 1:
            raise ValueError(f"cross_attention_freq is {self.cross_attention_freq}, expected at least 1")


@dataclass(frozen=True)
class QFormerKV:
    """The keys and values of images for every cross-attention layer, computed once for all passes over them.

    Attributes:
        kv: [I, N, layers with cross-attention, 2, heads, head dim]; or the tokens [I, N, encoder_width] themselves, for
            one pass.
        lengths: int64 [I], the tokens that an image has, which come first; None for all N.
        index: int64 [B], the image of each row of a pass; None for one row per image.
    """

    kv: Tensor
    lengths: Tensor | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        like = ("kv", self.kv)
        if self.lengths is not None:
            images, n = self.kv.shape[:2]
            check("lengths", self.lengths, (images,), ", one for each image", torch.int64, like)
            check_range("lengths", self.lengths, n + 1, "the tokens of an image, and 1")
            object.__setattr__(self, "lengths", self.lengths.contiguous())
        if self.index is not None:
            check("index", self.index, ("B",), dtype=torch.int64, like=like)
            check_range("index", self.index, self.kv.shape[0], "the number of images")
            object.__setattr__(self, "index", self.index.contiguous())

    @property
    def rows(self) -> int:
        """B."""
        return (self.kv if self.index is None else self.index).shape[0]

    @property
    def formed(self) -> bool:
        """Whether keys and values are there."""
        return self.kv.dim() == 6

    def at(self, index: Tensor) -> QFormerKV:
        """For rows that attend to the images [B] int64 of these: negatives, instructions, beams; nothing is copied.

        Raises:
            ValueError: an image is out of range (checked on a CPU), or these are tokens for one pass.
        """
        if not self.formed:
            raise ValueError("these are tokens for one pass, expected keys and values: project without once=True")
        if self.index is not None:
            check("index", index, ("B",), dtype=torch.int64, like=("kv", self.kv))
            check_range("index", index, self.rows, "the number of rows")
            index = self.index[index]
        return QFormerKV(self.kv, self.lengths, index)

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of the i-th layer that has cross-attention, [I, N, heads, head dim]."""
        k, v = self.kv.select(2, i).unbind(2)
        return k, v


# nn.Module seeks an attribute elsewhere before it looks among parameters and children, which takes as long as a view:
# here they are read from where they lie.


def _children(module: nn.Module) -> Any:
    return module._modules


def _affine(module: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(weight, bias); tools that change a parameter have an attribute in its place."""
    of: Any = module._parameters
    return (of["weight"], of["bias"]) if "weight" in of and "bias" in of else (module.weight, module.bias)


_CALL = nn.Module.__call__


class _Module(nn.Module):
    """Its call is its forward where nobody watches it: what nn.Module looks at takes as long as a small operation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watched = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        # what makes a graph puts a call of its own there
        if watched or any(HOOKS_OF_ALL) or self._compiled_call_impl or nn.Module.__call__ is not _CALL:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)


class Linear(_Module, nn.Linear):
    """nn.Linear; without a gradient by the fastest product of this CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *_affine(self))


class _LayerNorm(_Module, nn.LayerNorm):
    """nn.LayerNorm by torch's operator itself: its function in Python looks for cuDNN at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, *_affine(self), self.eps)


class _Dropout(_Module, nn.Dropout):
    """nn.Dropout, which calls nothing where it drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _active(self) else x


def _active(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


class _Projections(nn.Module):
    def __init__(self, config: QFormerConfig, key_width: int):
        super().__init__()
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(key_width, config.hidden_size)
        self.value = Linear(key_width, config.hidden_size)


class _Output(_Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = _LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = _Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        of = _children(self)
        return of["LayerNorm"](residual + of["dropout"](of["dense"](x)))


class _Intermediate(_Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(_children(self)["dense"](x))


class _Attention(_Module):
    def __init__(self, config: QFormerConfig, key_width: int):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = _Projections(config, key_width)
        self.output = _Output(config, config.hidden_size)

    def _heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


class SelfAttention(_Attention):
    """Of the rows [T, hidden] of a stream, with residual and LayerNorm; of the result the first `rows`, or all."""

    def forward(self, x: Tensor, routing: Routing, kinds: Sequence[int], rows: int | None) -> Tensor:
        own = _children(self)
        of, out = _children(own["self"]), own["output"]
        heads = (x.shape[0], self.heads, x.shape[1] // self.heads)
        q, k, v = [of[name](x).reshape(heads) for name in ("query", "key", "value")]
        # the operator itself: nothing is left to check of what was made here
        o = PACKED_ATTENTION(q, k, v, routing.reading, routing.places, kinds, None, self._dropout())[0]
        return out(o, x) if rows is None else out(o[:rows], x[:rows])


class CrossAttention(_Attention):
    """Of queries [B, Q, hidden] or [1, Q, hidden] over images: [B, Q, hidden], with residual and LayerNorm."""

    def forward(self, x: Tensor, kv: QFormerKV, layer: int) -> Tensor:
        own = _children(self)
        of = _children(own["self"])
        q, of_keys, of_values = self._heads_of(of["query"](x)), of["key"], of["value"]
        dropout, dtype = self._dropout(), kv.kv.dtype if autocast_dtype(q) else q.dtype
        # the operators themselves: kv has looked at its lengths and index
        if not kv.formed and not dropout and are_plain((Linear,), of_keys, of_values):
            check("kv", kv.kv, ("I", "N", of_keys.in_features), dtype=dtype)
            o = attend_tokens(q, Tokens(kv.kv, _affine(of_keys)[0], *_affine(of_values), kv.lengths, None)).o
        else:
            k, v = kv.layer(layer) if kv.formed else (self._heads_of(m(kv.kv)) for m in (of_keys, of_values))
            check("kv", k, ("I", "N", *q.shape[2:]), dtype=(dtype, q.dtype))
            o = attend(q, Keys(k, v, kv.index, kv.lengths, None, k.shape[1]), dropout).o
        return own["output"](o.flatten(2), x)


class QFormerLayer(_Module):
    def __init__(self, config: QFormerConfig, cross: bool):
        super().__init__()
        self.attention = SelfAttention(config, config.hidden_size)
        self.crossattention = CrossAttention(config, config.encoder_width) if cross else None
        if config.text:
            self.intermediate, self.output = _Intermediate(config), _Output(config, config.intermediate_size)
        self.intermediate_query, self.output_query = _Intermediate(config), _Output(config, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        kinds: Sequence[int],
        queries: int,
        kv: QFormerKV | None,
        layer: int,
        query_only: bool = False,
    ) -> Tensor:
        """x [T, hidden], of which the first rows are `queries` for each sample; `layer`: of those with cross-attention.

        kinds: what is seen, as `kinds_of`.

        With images, queries of one sample become those of all rows of kv. query_only: nobody reads the texts' states.
        """
        of_queries = queries * routing.first.shape[0]
        of = _children(self)
        x = of["attention"](x, routing, kinds, of_queries if query_only else None)
        of_texts = x.shape[0] - of_queries
        query, text = (x, None) if not of_texts else x.split_with_sizes([of_queries, of_texts])
        parts = []
        if queries:
            cross = of.get("crossattention")
            if cross is not None and kv is not None:
                query = cross(query.unflatten(0, (-1, queries)), kv, layer).flatten(0, 1)
            parts.append(of["output_query"](of["intermediate_query"](query), query))
        if text is not None:
            parts.append(of["output"](of["intermediate"](text), text))
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class QFormerEncoder(_Module):
    """The layers, over embeddings of queries and of any number of texts."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        freq = config.cross_attention_freq
        self.layer = nn.ModuleList(QFormerLayer(config, i % freq == 0) for i in range(config.num_hidden_layers))

    @property
    def draws(self) -> bool:
        """Whether something is dropped up to the first cross-attention: each row then has its own."""
        first = _children(next(iter(_children(self)["layer"])))["attention"]
        return first._dropout() > 0 or _active(_children(_children(first)["output"])["dropout"])

    @property
    def _crossing(self) -> list[Any]:
        """The projections of each layer with cross-attention."""
        every = [_children(layer).get("crossattention") for layer in _children(_children(self)["layer"]).values()]
        return [_children(of)["self"] for of in every if of is not None]

    @property
    def _reads_weights(self) -> bool:
        """Whether those of keys and values may be read in place of calls."""
        return are_plain((Linear,), *(m for p in self._crossing for m in (p.key, p.value)))

    def project(
        self, x: Tensor, lengths: Tensor | None = None, norm: nn.LayerNorm | None = None, once: bool = False
    ) -> QFormerKV:
        """Keys and values of images x [I, N, encoder_width]; arguments as `QFormer.project`'s."""
        check("x", x, ("I", "N", self.config.encoder_width))
        if norm is not None and not (self._reads_weights and are_plain((nn.LayerNorm,), norm)):
            x, norm = norm(x), None
        free = x.is_cpu and norm is None and not torch.is_grad_enabled()
        # weights that are sharded layer by layer are there while a layer runs
        if once and ((free and not self.draws) or not self._reads_weights):
            return QFormerKV(x, lengths)
        of, heads, d = self._crossing, self.config.num_attention_heads, self.config.hidden_size
        if (free and is_plain([x])) or not self._reads_weights:
            # product by product: no weight is copied, and adapters and hooks are called
            each = [_children(p)[name](x) for p in of for name in ("key", "value")]
            return QFormerKV(torch.cat(each, 2).view(*x.shape[:2], len(of), 2, heads, d // heads), lengths)
        weight = torch.stack([torch.stack([p.key.weight, p.value.weight]) for p in of])
        bias = torch.stack([torch.stack([p.key.bias, p.value.bias]) for p in of])
        affine = None if norm is None else (norm.weight, norm.bias, norm.eps)
        return QFormerKV(project_kv(x, weight, bias, heads, affine), lengths)

    def forward(
        self,
        query: Tensor | None,
        texts: Sequence[Tensor] = (),
        kept: Sequence[Tensor | None] | None = None,
        sees: Sees | None = None,
        kv: QFormerKV | None = None,
        query_only: bool = False,
    ) -> list[Tensor]:
        """The states of the queries, if there are any, and of each text; arguments as `QFormer`'s, but embedded."""
        segments, batch = list(texts), 0 if query is None else query.shape[0]
        if texts:
            batch = texts[0].shape[0]
        elif kv is not None:
            batch = kv.rows
        if query is not None:
            # the first layer sees no image before its cross-attention: once for all rows, where nothing is drawn
            once = query.shape[0] == 1 and not texts and not self.draws
            segments.insert(0, query if once else query.expand(batch, -1, -1))
        queries = 0 if query is None else query.shape[1]
        lengths = [None] * (len(segments) - len(texts)) + list(kept or [None] * len(texts))
        each = [t.flatten(0, 1) for t in segments]
        x = torch.cat(each) if len(each) != 1 else each[0]

        def route(samples: int) -> Routing:
            parts = [
                Part(int(i >= 1 or query is None), samples, t.shape[1], kept=lengths[i]) for i, t in enumerate(segments)
            ]
            return Routing.of(parts, 2, samples, x.device)

        routing, kinds, seen = route(segments[0].shape[0]), kinds_of(sees, len(segments)), 0
        layers = _children(self)["layer"]
        for i, layer in enumerate(layers, 1):
            x = layer(x, routing, kinds, queries, kv, seen, query_only and i == len(layers))
            seen += _children(layer).get("crossattention") is not None
            if routing.first.shape[0] != batch:
                routing = route(batch)
        sizes = [t.shape[1] for t in segments[: 1 if query_only else None]]
        rows = x.split([batch * size for size in sizes]) if len(sizes) != 1 else [x]
        return [t.unflatten(0, (batch, size)) for t, size in zip(rows, sizes, strict=True)]


class _Embeddings(_Module):
    position_ids: Tensor

    def __init__(self, config: QFormerConfig):
        super().__init__()
        width = config.hidden_size
        if config.text:
            self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.LayerNorm = _LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = _Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """Of texts; positions start at 0."""
        longest = self.position_ids.shape[1]
        if ids.dim() != 2 or ids.shape[1] > longest:
            raise ValueError(f"token ids have shape {tuple(ids.shape)}, expected [B, T] with T <= {longest}")
        of = _children(self)
        words, positions, norm = of["word_embeddings"], of["position_embeddings"], of["LayerNorm"]
        if not are_plain((nn.Embedding, _LayerNorm), words, positions, norm):
            return self.query(words(ids) + positions(self.position_ids[:, : ids.shape[1]]))
        check("token ids", ids, dtype=(torch.int64, torch.int32))
        ids, table = cast(ids, torch.int64).contiguous(), words.weight
        check_range("token ids", ids, table.shape[0], "the word embeddings")
        position, of_norm = positions.weight.narrow(0, 0, ids.shape[1]), _affine(norm)
        # the operator itself: the tables are the module's own
        given = Words(ids, table, position, None, *of_norm, None, 1.0, norm.eps, words.padding_idx)
        return of["dropout"](EMBED_TEXT(given)[0])

    def query(self, tokens: Tensor) -> Tensor:
        """Of queries, which have no positions."""
        of = _children(self)
        return of["dropout"](of["LayerNorm"](tokens))


class QFormer(_Module):
    """Queries [B, Q, hidden] and texts of ids [B, T] to their last states.

    An image's keys and values are computed once (`project`) and shared by passes and by rows:

        kv = qformer.project(image_embeds)
        query, text = qformer(query_tokens, [ids], kept=[lengths], kv=kv)
        query, text = qformer(query_tokens, [ids], kept=[lengths], kv=kv.at(negatives))
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = QFormerEncoder(config)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def project(
        self,
        image_embeds: Tensor,
        lengths: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        once: bool = False,
    ) -> QFormerKV:
        """The keys and values of images, for any number of passes.

        Args:
            image_embeds: [I, N, encoder_width].
            lengths: int64 [I], the tokens that each image has; by default N.
            norm: a LayerNorm before, as a part of the product: of a frozen encoder's tokens it learns without a
                gradient for them.
            once: for one pass, of one row per image. On a CPU without gradients and dropout, a layer then attends to
                the tokens (`token_attention`), which takes fewer products; and so does one with adapters or hooks, or
                whose weights are sharded layer by layer (`fully_shard`), which forms its own keys and values.
        """
        return self.encoder.project(image_embeds, lengths, norm, once)

    def forward(
        self,
        query: Tensor | None = None,
        texts: Sequence[Tensor] = (),
        kept: Sequence[Tensor | None] | None = None,
        sees: Sees | None = None,
        kv: QFormerKV | None = None,
        query_only: bool = False,
    ) -> list[Tensor]:
        """The last states of the queries [B, Q, hidden], if there are any, and of each text [B, T, hidden].

        Args:
            query: [B, Q, hidden], or [1, Q, hidden] for all rows; None for texts alone.
            texts: int64 [B, T] each, padded on the right.
            kept: of each text int64 [B], its tokens without the padding; None: all.
            sees: "all", "causal" or "none": what the rows of a segment see of another's; by default all see all.
            kv: of B images; without it nothing sees an image.
            query_only: the queries' states alone, without the last layer's work for the texts.

        Deterministic without dropout. Attention is scaled by 1 / sqrt(head dim) and masked by lengths alone.

        Raises:
            ValueError: there is nothing to encode, or a size does not fit.
        """
        if query is None and not texts:
            raise ValueError("query is None and texts is empty, expected one of them")
        if query is None and query_only:
            raise ValueError("query_only is True without query, expected queries")
        if texts and not self.config.text:
            raise ValueError(f"texts has {len(texts)} texts, expected none: the config has text=False")
        if query is not None:
            check("query", query, ("B", "Q", self.config.hidden_size))
        if texts:
            batch, of = texts[0].shape[0], "texts"
        else:
            batch, of = (query.shape[0], "query") if kv is None else (kv.rows, "kv")
        if kv is not None and kv.rows != batch:
            raise ValueError(f"kv has {kv.rows} rows, expected {batch} as {of}")
        if query is not None and query.shape[0] not in (1, batch):
            raise ValueError(f"query has {query.shape[0]} rows, expected {batch} as {of}, or 1")
        parts = _children(self)
        embed, embedded = parts["embeddings"], None
        if query is not None:
            embedded = embed.query(query.expand(batch, -1, -1) if _active(embed.dropout) else query)
        return parts["encoder"](embedded, [embed(ids) for ids in texts], kept, sees, kv, query_only)


class ImageQueries(nn.Module):
    """Learned queries that look at an image encoder's tokens, under the names of LAVIS.

    Args:
        queries: Q.
        eps: of the LayerNorm of the tokens; transformers takes the image encoder's 1e-6.
    """

    def __init__(self, qformer: QFormerConfig, queries: int, eps: float = 1e-5):
        super().__init__()
        self.ln_vision = nn.LayerNorm(qformer.encoder_width, eps=eps)
        self.Qformer = nn.Module()
        self.Qformer.bert = QFormer(qformer)
        self.query_tokens = nn.Parameter(torch.randn(1, queries, qformer.hidden_size) * qformer.initializer_range)

    @property
    def bert(self) -> QFormer:
        return self.Qformer.bert  # type: ignore[return-value]

    def see(self, tokens: Tensor, once: bool = False) -> QFormerKV:
        """The Q-Former's keys and values of what an image encoder gives, [B, N, encoder_width]; once: for one pass."""
        # with a frozen encoder the norm learns as a part of the product, without a gradient for the tokens
        if torch.is_grad_enabled() and self.ln_vision.weight.requires_grad and not tokens.requires_grad:
            return self.bert.project(tokens, norm=self.ln_vision, once=once)
        return self.bert.project(self.ln_vision(tokens), once=once)


class _Transform(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """BERT's language head: a transform, then logits over the vocabulary with the word embeddings as weight."""

    def __init__(self, words: nn.Embedding, eps: float):
        super().__init__()
        self.transform = _Transform(words.embedding_dim, eps)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        self.decoder = nn.Linear(words.embedding_dim, words.num_embeddings)
        self.decoder.weight, self.decoder.bias = words.weight, self.bias


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official names of the weights of transformers' `Blip2QFormerModel` or `InstructBlipQFormerModel`."""
    return {_official_name(key): t for key, t in state_dict.items()}


def to_transformers(state_dict: Mapping[str, Tensor], instruct: bool = False) -> dict[str, Tensor]:
    """The weights of a `QFormer` under the names of `Blip2QFormerModel`, or (`instruct`) `InstructBlipQFormerModel`.

    BLIP-2's has no embeddings of words and positions: they belong to the models around it.
    """
    norm = "embeddings.layernorm." if instruct else "layernorm."
    renamed = {
        key.replace("attention.self.", "attention.attention.").replace("embeddings.LayerNorm.", norm): t
        for key, t in state_dict.items()
        if not key.endswith("position_ids")
    }
    return {key: t for key, t in renamed.items() if instruct or not key.startswith("embeddings.")}


def _official_name(key: str) -> str:
    key = key.replace("attention.attention.", "attention.self.").replace("embeddings.layernorm.", "layernorm.")
    return f"embeddings.LayerNorm.{key.removeprefix('layernorm.')}" if key.startswith("layernorm.") else key
