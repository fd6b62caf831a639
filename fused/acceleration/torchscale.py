"""torchscale's multiway encoder (BEiT-3's) with the rows of each modality together, from the first layer to the last.

torchscale splits the rows [B, S, D] in front of every module and puts them together behind it. Here they are [S, B, D]
from the first layer on, so that each expert's rows lie together and the samples are a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear
from mmfuse.kernels._runtime.arguments import autocast_dtype, constant
from mmfuse.kernels._runtime.dispatch import forced_backend

_PAIR = ("torchscale.component.multiway_network:MultiwayNetwork",)
_NONE = ("builtins:NoneType",)
_LINEAR = ("torch.nn.modules.linear:Linear",)
_NORM = ("torch.nn.modules.normalization:LayerNorm",)
_DROPOUT = ("torch.nn.modules.dropout:Dropout",)
_DROPOUTS = ("dropout_module", "activation_dropout_module")
_FFN = ("torchscale.component.feedforward_network:FeedForwardNetwork",)


def _pair(path: str, of: Sequence[str], optional: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    return {path: (*_PAIR, *optional), f"{path}.*": (*of, *optional)}


OF_LAYER = {
    "self_attn": ("torchscale.component.multihead_attention:MultiheadAttention",),
    **{key: of for name in ("q", "k", "v", "out") for key, of in _pair(f"self_attn.{name}_proj", _LINEAR).items()},
    **_pair("self_attn.inner_attn_ln", _NORM, _NONE),
    "self_attn.dropout_module": _DROPOUT,
    **_pair("self_attn_layer_norm", _NORM),
    **_pair("final_layer_norm", _NORM),
    **_pair("ffn", _FFN),
    **{f"ffn.*.{name}": _LINEAR for name in ("fc1", "fc2")},
    "ffn.*.ffn_layernorm": (*_NORM, *_NONE),
    **{f"ffn.*.{name}": _DROPOUT for name in _DROPOUTS},
    "dropout_module": _DROPOUT,
    "drop_path": (*_NONE, "torchscale.component.droppath:DropPath"),
}
OF_ENCODER = {
    "dropout_module": _DROPOUT,
    "embed_positions": (*_NONE, "torchscale.component.multiway_network:MutliwayEmbedding"),
    "layers.*": ("torchscale.architecture.encoder:EncoderLayer",),
    **{f"layers.*.{path}": of for path, of in OF_LAYER.items()},
    **_pair("layernorm_embedding", _NORM, _NONE),
    **_pair("layer_norm", _NORM, _NONE),
}
OF_NETWORK = {
    "*": (*_LINEAR, *_NORM, *_FFN),
    **{f"*.{name}": (*_LINEAR, *_NONE) for name in ("fc1", "fc2")},
    "*.ffn_layernorm": (*_NORM, *_NONE),
    **{f"*.{name}": (*_DROPOUT, *_NONE) for name in _DROPOUTS},
}
OF_EMBEDDING = {"*": ("torchscale.component.embedding:PositionalEmbedding",)}
_ACTIVATIONS = {F.gelu: "gelu", F.silu: "silu"}
# fairseq's positions begin at 2
_FIRST = 2


class _Stream:
    """Rows [T, D] of B samples, in the order of their places: those of all samples in front of the split are A's.

    With a split of -1 or 0 there is one expert, and the order is that of the samples.
    """

    def __init__(self, x: Tensor, split: int) -> None:
        self.shape = b, s = x.shape[:2]
        self.pair = split > 0
        self.names = "AB" if self.pair else "A" if split else "B"
        bounds, runs = ((0, b * split, b * s), (0, 1)) if self.pair else ((0, b * s), (0,))
        self.routing = Routing(len(runs), runs, constant(bounds, x.device).long(), bounds)

    def pack(self, x: Tensor) -> Tensor:
        """[T, D] of [B, S, D]."""
        return (x.transpose(0, 1) if self.pair else x).flatten(0, 1)

    def unpack(self, x: Tensor) -> Tensor:
        """[B, S, D] of [T, D], a view."""
        b, s = self.shape
        return x.unflatten(0, (s, b)).transpose(0, 1) if self.pair else x.unflatten(0, (b, s))

    def experts(self, pair: Any) -> list[Any]:
        return [getattr(pair, name) for name in self.names]

    def norm(self, pair: Any, x: Tensor) -> Tensor:
        weights, biases, eps = _norm_of(self.experts(pair))
        return routed_layer_norm(x, weights, biases, self.routing, eps)

    def linear(self, pair: Any, x: Tensor, norm: Any = None, **ending: Tensor | None) -> Tensor:
        """`norm`: a pair of them in front, or None."""
        of, before = self.experts(pair), None if norm is None else _norm_of(self.experts(norm))
        biases = None if of[0].bias is None else [m.bias for m in of]
        return routed_linear(x, [m.weight for m in of], biases, self.routing, input_norm=before, **ending)

    def ffn(self, pair: Any, x: Tensor, norm: Any = None, **ending: Tensor | None) -> Tensor:
        of, before = self.experts(pair), None if norm is None else _norm_of(self.experts(norm))
        norms = [m.ffn_layernorm for m in of]
        return routed_ffn(
            x, [m.fc1.weight for m in of], [m.fc1.bias for m in of], [m.fc2.weight for m in of],
            [m.fc2.bias for m in of], self.routing, activation=_ACTIVATIONS[of[0].activation_fn],
            norm=None if norms[0] is None else _norm_of(norms), input_norm=before, **ending,
        )  # fmt: skip


def _norm_of(experts: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], float]:
    return [m.weight for m in experts], [m.bias for m in experts], experts[0].eps


def forward(
    encoder: Any,
    src_tokens: Tensor | None,
    encoder_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    return_all_hiddens: bool = False,
    token_embeddings: Tensor | None = None,
    multiway_split_position: int | None = None,
    features_only: bool = False,
    incremental_state: Any = None,
    positions: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The encoder's forward over one stream of rows.

    Its own runs for tokens, hidden states, given positions and a caption's next word, and where activations are dropped
    (dropped paths are the encoder's own draws).
    """
    call = {name: value for name, value in locals().items() if name not in ("encoder", "kwargs")} | kwargs
    missing = src_tokens is not None or return_all_hiddens or positions is not None or incremental_state is not None
    x, split = token_embeddings, multiway_split_position
    if missing or x is None or not _takes(encoder, x, split, attn_mask) or _drops(encoder, *encoder.layers):
        return type(encoder).forward(encoder, **call)
    stream = _Stream(x, split)
    embedding = x = encoder.embed_scale * x
    if encoder.embed_positions is not None:
        parts = x.split([split, x.shape[1] - split], 1) if stream.pair else [x]
        places = [m(t) for m, t in zip(stream.experts(encoder.embed_positions), parts, strict=True)]
        x = x + torch.cat(places, 1)
    y = stream.pack(x)
    if encoder.layernorm_embedding is not None:
        y = stream.norm(encoder.layernorm_embedding, y)
    padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if encoder_padding_mask is not None:
        padding = encoder_padding_mask
        y = y * (1 - stream.pack(padding.unsqueeze(-1).type_as(y)))
    mask = _mask(y, encoder_padding_mask, attn_mask)
    for layer in encoder.layers:
        y = _layer(layer, y, stream, mask)
    if encoder.layer_norm is not None:
        y = stream.norm(encoder.layer_norm, y)
    y = stream.unpack(y).contiguous()
    if not features_only and encoder.output_projection is not None:
        y = encoder.output_projection(y)
    return {
        "encoder_out": y,
        "encoder_embedding": embedding,
        "encoder_padding_mask": padding,
        "encoder_states": [],
        "l_aux": [None] * len(encoder.layers),
    }


def layer_forward(
    layer: Any,
    x: Tensor,
    encoder_padding_mask: Tensor | None,
    attn_mask: Tensor | None = None,
    rel_pos: Tensor | None = None,
    multiway_split_position: int | None = None,
    incremental_state: Any = None,
) -> tuple[Tensor, None]:
    """One layer's forward; its own runs with relative positions, for a caption's next word and where it drops."""
    call = {name: value for name, value in locals().items() if name != "layer"}
    split = multiway_split_position
    if rel_pos is not None or incremental_state is not None or not _takes(layer, x, split, attn_mask) or _drops(layer):
        return type(layer).forward(layer, **call)
    stream = _Stream(x, split)
    y = _layer(layer, stream.pack(x), stream, _mask(x, encoder_padding_mask, attn_mask))
    return stream.unpack(y).contiguous(), None


def network_forward(network: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """One pair's forward; its own runs for one modality, and where activations are dropped."""
    split, of = network.split_position, network.A
    narrow = isinstance(of, nn.LayerNorm) and autocast_dtype(x) is not None  # of which autocast makes float32
    if kwargs or narrow or x.dim() != 3 or not 0 < split <= x.shape[1] or _any_drops(_dropouts(network)):
        return type(network).forward(network, x, **kwargs)
    stream = _Stream(x, split)
    operation = {nn.Linear: stream.linear, nn.LayerNorm: stream.norm}.get(type(of), stream.ffn)
    return stream.unpack(operation(network, stream.pack(x))).contiguous()


def embedding_forward(embedding: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Positions [1, S, D] as rows of the tables; its own forward runs for given ones, and beyond the last."""
    split, length = embedding.split_position, x.shape[1]
    counts = {-1: [length, 0], 0: [0, length]}.get(split, [split, length - split])
    tables = embedding.A.weight, embedding.B.weight
    fits = all(0 <= n <= len(table) - _FIRST for n, table in zip(counts, tables, strict=True))
    if not fits or any(given is not None for given in kwargs.values()):
        return type(embedding).forward(embedding, x, **kwargs)
    found = [table[_FIRST : _FIRST + n] for n, table in zip(counts, tables, strict=True) if n or split > 0]
    return torch.cat(found)[None]


def _takes(module: Any, x: Tensor, split: Any, attn_mask: Tensor | None) -> bool:
    if not isinstance(split, int) or not -1 <= split <= x.shape[1] or x.dim() != 3:
        return False
    # torchscale would add the 1 of a Boolean mask
    return attn_mask is None or (attn_mask.dim() == 2 and attn_mask.dtype != torch.bool)


def _drops(*modules: Any) -> bool:
    """Whether activations are dropped, in whatever mode the modules around are."""
    dropouts = [modules[0].dropout_module]
    for layer in modules:
        if hasattr(layer, "ffn"):
            dropouts += [layer.dropout_module, layer.self_attn.dropout_module, *_dropouts(layer.ffn)]
    return _any_drops(dropouts)


def _dropouts(network: Any) -> list[Any]:
    return [d for m in (network.A, network.B) for d in (getattr(m, name, None) for name in _DROPOUTS) if d is not None]


def _any_drops(dropouts: Sequence[Any]) -> bool:
    return any(d.training and d.p > 0 for d in dropouts)


def _mask(x: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """What is added to scores [B, H, S, S], or which of them count; None: all."""
    counts = None if padding is None else ~padding.to(torch.bool)[:, None, None, :]
    if attn_mask is None:
        return counts
    added = attn_mask.masked_fill(attn_mask.to(torch.bool), -1e8).to(x.dtype)
    return added if counts is None else added.masked_fill(~counts, float("-inf"))


def _layer(layer: Any, x: Tensor, stream: _Stream, mask: Tensor | None) -> Tensor:
    """[T, D]; the norms are in front of the branches, or behind what they are added to."""
    attention, first = layer.self_attn, layer.normalize_before
    h = stream.norm(layer.self_attn_layer_norm, x) if first else x
    q, k, v = (
        stream.unpack(stream.linear(pair, h)).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for pair in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    h = stream.pack(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    ending = {"residual": _scaled(x, layer), "row_scale": _kept(layer, x, stream)}
    x = stream.linear(attention.out_proj, h, attention.inner_attn_ln, **ending)
    x = x if first else stream.norm(layer.self_attn_layer_norm, x)
    ending = {"residual": _scaled(x, layer), "row_scale": _kept(layer, x, stream)}
    x = stream.ffn(layer.ffn, x, layer.final_layer_norm if first else None, **ending)
    return x if first else stream.norm(layer.final_layer_norm, x)


def _scaled(x: Tensor, layer: Any) -> Tensor:
    """The residual, scaled by DeepNorm (Wang et al. 2022, arXiv:2203.00555)."""
    return x if layer.alpha == 1 else x * layer.alpha


def _kept(layer: Any, x: Tensor, stream: _Stream) -> Tensor | None:
    """The factor [T] of each row, drawn for its sample as timm's `drop_path` draws it."""
    path = layer.drop_path
    if path is None or not path.training or not path.drop_prob:
        return None
    keep = 1 - float(path.drop_prob)
    factor = x.new_empty(stream.shape[0], 1, 1).bernoulli_(keep)
    return stream.pack((factor / keep if keep else factor).expand(*stream.shape, 1))[:, 0]


def few_rows(module: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether torchscale's own code is the faster one, measured on a CPU: for one modality, or few rows."""
    given = (*args, *kwargs.values())
    x = next((t for t in given if isinstance(t, Tensor) and t.dim() == 3), None)
    if x is None or x.device.type != "cpu" or forced_backend() is not None:
        return False
    split = next((n for n in given if isinstance(n, int) and not isinstance(n, bool)), -1)
    rows = x.shape[0] * x.shape[1]
    return split < 1 or (isinstance(rows, int) and rows < (512 if torch.is_grad_enabled() else 256))


def against_layer(layer: Any) -> str | None:
    """Why a layer has to keep its own forward, or None."""
    attention = layer.self_attn
    if attention.xpos is not None:
        return "its attention rotates positions"
    if attention.scaling != (attention.embed_dim // attention.num_heads) ** -0.5:
        return "its attention has a scaling of its own"
    if layer.ffn.A.activation_fn not in _ACTIVATIONS:
        return f"its activation is {layer.ffn.A.activation_fn.__name__}, expected gelu or silu"
    return None


def against_encoder(encoder: Any) -> str | None:
    """Why an encoder has to keep its own forward, or None."""
    if encoder.relative_position is not None:
        return "it has relative positions"
    return next((why for layer in encoder.layers if (why := against_layer(layer))), None)


def on_a_cpu(module: Any, x: Tensor, **kwargs: Any) -> bool:
    """Whether torchscale's own code is no slower: with copies on either side one module alone gains nothing there."""
    return x.device.type == "cpu" and forced_backend() is None


def against_network(network: Any) -> str | None:
    """Why a pair of modules has to keep its own forward, or None."""
    a, b = network.A, network.B
    if network.dim != 1:
        return f"it splits dimension {network.dim}, expected 1"
    if type(a) is not type(b):
        return f"its experts are {type(a).__name__} and {type(b).__name__}, expected one class"
    if isinstance(a, nn.LayerNorm) and (a.weight is None or a.bias is None or a.weight.dim() != 1 or a.eps != b.eps):
        return "its norms are not of the last dimension, have other eps, or no weight or bias"
    if hasattr(a, "activation_fn") and a.activation_fn not in _ACTIVATIONS:
        return f"its activation is {a.activation_fn.__name__}, expected gelu or silu"
    return None


def against_embedding(embedding: Any) -> str | None:
    """Why tables of positions have to keep their own forward, or None."""
    if embedding.dim != 1:
        return f"it splits dimension {embedding.dim}, expected 1"
    if any(m.padding_idx is not None or m.max_norm is not None or m.sparse for m in (embedding.A, embedding.B)):
        return "its tables have a padding_idx, a max_norm or sparse gradients"
    return None
