"""Whole Q-Formers of L layers, H heads of d, FFN of 4 H d, Q queries over N tokens of E features, each baseline apart.

`qformer` sees B images: against plain lines with torch's attention, the same by torch.compile, and transformers'
class. `qformer_windows` is Granite Speech's projector, all of whose layers see a window of 15 frames: 200 are a minute.
`qformer_rerank` matches R texts of T tokens with one image, which eager repeats for every text, as LAVIS does;
`qformer_stage1` is a training step of BLIP-2's first stage with texts of T tokens, a frozen image encoder and gradients
of all weights: two passes against LAVIS's four.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.bench.cases import Case
from mmfuse.bench.providers import copy, eager, formula
from mmfuse.fused import QFormerConfig, QFormerPretraining
from mmfuse.fused.qformer import to_transformers
from mmfuse.kernels._runtime import use_backend

_VOCABULARY, _START, _WIDTH = 30523, 30522, 256


def _made(layers: int, queries: int, e: int, heads: int, d: int, freq: int = 2) -> QFormerPretraining:
    config = QFormerConfig(
        cross_attention_freq=freq,
        encoder_width=e,
        hidden_size=heads * d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * heads * d,
        vocab_size=_VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return QFormerPretraining(config, queries, _WIDTH, {"bos_DEC": _START, "pad": 0}).eval()


@lru_cache(maxsize=2)
def _model(device: torch.device, dtype: torch.dtype, *sizes: int) -> QFormerPretraining:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _made(*sizes).to(device, dtype)


def _of(x: Tensor, sizes: Tensor) -> QFormerPretraining:
    return _model(x.device, x.dtype, *sizes.tolist())


def _using(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else use_backend(backend)


# --- in plain PyTorch -------------------------------------------------------------------------------------------------


def plain(model: Any, query: Tensor | None, ids: Tensor | None, x: Tensor | None, sees: Tensor | None = None) -> Tensor:
    """The last states [B, Q + T, D], as transformers and LAVIS compute them; sees [Q + T, Q + T] is True where seen."""
    embeddings, parts = model.bert.embeddings, []
    queries = 0 if query is None else query.shape[1]
    if query is not None:
        parts.append(_norm(embeddings.LayerNorm, query))
    if ids is not None:
        words = embeddings.word_embeddings(ids) + embeddings.position_embeddings.weight[: ids.shape[1]]
        parts.append(_norm(embeddings.LayerNorm, words))
    h = torch.cat(parts, dim=1)
    for layer in model.bert.encoder.layer:
        h = _attend(layer.attention, h, h, sees)
        query, text = h[:, :queries], h[:, queries:]
        if layer.crossattention is not None and x is not None:
            query = _attend(layer.crossattention, query, x)
        parts = [_feed_forward(layer.intermediate_query, layer.output_query, query)] if queries else []
        parts += [_feed_forward(layer.intermediate, layer.output, text)] if ids is not None else []
        h = torch.cat(parts, dim=1)
    return h


def _linear(module: Any, x: Tensor) -> Tensor:
    """As nn.Linear does it."""
    return F.linear(x, module.weight, module.bias)


def _norm(module: Any, x: Tensor) -> Tensor:
    """As nn.LayerNorm does it."""
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _output(out: Any, x: Tensor, residual: Tensor) -> Tensor:
    y = F.dropout(_linear(out.dense, x), out.dropout.p, out.dropout.training)
    return _norm(out.LayerNorm, residual + y)


def _feed_forward(into: Any, out: Any, x: Tensor) -> Tensor:
    return _output(out, F.gelu(_linear(into.dense, x)), x)


def _attend(block: Any, h: Tensor, x: Tensor, sees: Tensor | None = None) -> Tensor:
    of = block.self
    q, k, v = (
        _linear(project, t).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for project, t in ((of.query, h), (of.key, x), (of.value, x))
    )
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    return _output(block.output, o.transpose(1, 2).flatten(2), h)


# --- images -----------------------------------------------------------------------------------------------------------


def _images(
    device: torch.device, dtype: torch.dtype, B: int, L: int, Q: int, N: int, E: int, H: int, d: int, freq: int = 2
) -> tuple[Tensor, ...]:
    return torch.randn(B, N, E, device=device).to(dtype), torch.tensor([L, Q, E, H, d, freq])


def eager_images(x: Tensor, sizes: Tensor) -> Tensor:
    model = _of(x, sizes)
    return plain(model, model.query_tokens.expand(len(x), -1, -1), None, x)


def _our_images(x: Tensor, sizes: Tensor, backend: str | None = None) -> Tensor:
    model = _of(x, sizes)
    bert = model.bert
    with _using(backend):
        return bert(model.query_tokens, kv=bert.project(x, once=True))[0]


def _transformers(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    @lru_cache(maxsize=1)
    def theirs(device: torch.device, dtype: torch.dtype, *sizes: int) -> nn.Module:
        ours = _model(device, dtype, *sizes)
        layers, _, e, heads, d, freq = sizes
        config = Blip2QFormerConfig(
            hidden_size=heads * d,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * heads * d,
            encoder_hidden_size=e,
            cross_attention_frequency=freq,
            attn_implementation="sdpa",
            use_qformer_text_input=True,
        )
        model = Blip2QFormerModel(config).to(device, dtype).eval()
        model.load_state_dict(to_transformers(ours.bert.state_dict()))
        return model

    def run(x: Tensor, sizes: Tensor) -> Tensor:
        query = _of(x, sizes).query_tokens.expand(len(x), -1, -1)
        found = theirs(x.device, x.dtype, *sizes.tolist())(query, encoder_hidden_states=x)
        return found.last_hidden_state

    return run


# --- texts with an image ----------------------------------------------------------------------------------------------


def _texts(
    device: torch.device, dtype: torch.dtype, R: int, T: int, L: int, Q: int, N: int, E: int, H: int, d: int
) -> tuple[Tensor, ...]:
    x, sizes = _images(device, dtype, 1, L, Q, N, E, H, d)
    return x, torch.randint(1000, _START, (R, T), device=device), sizes


def eager_texts(x: Tensor, ids: Tensor, sizes: Tensor) -> Tensor:
    """LAVIS' compute_itm: the image's tokens are repeated."""
    model, rows = _of(x, sizes), len(ids)
    queries = model.query_tokens.expand(rows, -1, -1)
    h = plain(model, queries, ids, x.repeat(rows, 1, 1))
    return model.itm_head(h[:, : queries.shape[1]]).mean(1)


def _our_texts(x: Tensor, ids: Tensor, sizes: Tensor, backend: str | None = None) -> Tensor:
    model = _of(x, sizes)
    with _using(backend):
        kv = model.bert.project(x).at(torch.zeros(len(ids), dtype=torch.int64, device=x.device))
        return model.match(kv, ids)


# --- a step of the first stage ----------------------------------------------------------------------------------------


class _Step(nn.Module):
    def __init__(self, model: QFormerPretraining, run: Callable[..., Tensor]):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *given: Any) -> Tensor:
        return self.run(self.model, *given)


@lru_cache(maxsize=2)
def _shapes(*sizes: int) -> QFormerPretraining:
    with torch.device("meta"):
        return _made(*sizes)


def _batch(
    device: torch.device, dtype: torch.dtype, B: int, T: int, L: int, Q: int, N: int, E: int, H: int, d: int
) -> tuple[Tensor, ...]:
    weights = torch.cat([p.flatten() for p in _made(L, Q, E, H, d).parameters()])
    ids = torch.randint(1000, _START, (B, T), device=device)
    x = torch.randn(B, N, E, device=device).to(dtype)
    return x, ids, weights.to(device, dtype).requires_grad_(), torch.tensor([L, Q, E, H, d])


def _with_weights(run: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    model = _shapes(*sizes.tolist())
    named = dict(model.named_parameters())
    parts = weights.split([p.numel() for p in named.values()])
    state = {f"model.{name}": t.view(p.shape) for (name, p), t in zip(named.items(), parts, strict=True)}
    return torch.func.functional_call(_Step(model, run), state, (x, ids))


def _negatives(ids: Tensor) -> tuple[Tensor, Tensor]:
    own = torch.arange(len(ids), device=ids.device)
    return own.roll(1), own.roll(2)


def four_passes(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """LAVIS' Blip2Qformer.forward on one process, with negatives that are given."""
    batch, length = ids.shape
    own, (images, texts) = torch.arange(batch, device=ids.device), _negatives(ids)
    x = model.ln_vision(x)
    tokens, queries = model.query_tokens.expand(batch, -1, -1), model.query_tokens.shape[1]
    query, text = plain(model, tokens, None, x), plain(model, None, ids, None)
    image, text = F.normalize(model.vision_proj(query), dim=-1), F.normalize(model.text_proj(text[:, 0]), dim=-1)
    scores = torch.matmul(image[:, None], text[:, :, None]).squeeze(-1).amax(2) / model.temp
    itc = (
        F.cross_entropy(scores, own, label_smoothing=0.1) + F.cross_entropy(scores.t(), own, label_smoothing=0.1)
    ) / 2
    pairs = plain(
        model,
        model.query_tokens.expand(3 * batch, -1, -1),
        torch.cat([ids, ids, ids[texts]]),
        torch.cat([x, x[images], x]),
    )
    labels = (torch.arange(3 * batch, device=ids.device) < batch).long()
    itm = F.cross_entropy(model.itm_head(pairs[:, :queries]).mean(1), labels)
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = _START
    sees = torch.ones(queries + length, queries + length, dtype=torch.bool, device=ids.device).tril()
    sees[:queries, :queries] = True
    caption = plain(model, tokens, decoder_ids, x, sees)[:, queries:]
    head = model.predictions
    logits = head.decoder(head.transform(caption))[:, :-1]
    return itc + itm + F.cross_entropy(logits.flatten(0, 1), decoder_ids[:, 1:].flatten(), label_smoothing=0.1)


def _two_passes(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return model(x, ids, torch.ones_like(ids), negatives=_negatives(ids)).total


def _our_step(*given: Tensor, backend: str | None = None) -> Tensor:
    with _using(backend):
        return _with_weights(_two_passes, *given)


# --- cases ------------------------------------------------------------------------------------------------------------


def _pass_flops(
    rows: int, cross: int, L: int, Q: int, N: int, E: int, H: int, d: int, T: int = 0, freq: int = 2
) -> float:
    """Of `rows` rows of Q queries and T tokens, of which `cross` images are projected."""
    D, S, some = H * d, Q + T, -(-L // freq)
    layer = S * (4 * D + 8 * D) * D + 2 * S * S * D
    return 2 * (rows * (L * layer + some * (2 * Q * D * D + 2 * Q * N * D)) + cross * some * 2 * N * E * D)


def _image_flops(mode: str, B: int, freq: int = 2, **size: int) -> float:
    return _pass_flops(B, B, freq=freq, **size)


def _text_flops(mode: str, R: int, **size: int) -> float:
    return _pass_flops(R, 1, **size)


def _step_flops(mode: str, B: int, T: int, **size: int) -> float:
    pairs = _pass_flops(3 * B, 0, T=T, **size)
    once = _pass_flops(B, B, **size) + 2 * _pass_flops(B, 0, T=T, **(size | {"Q": 0})) + pairs
    return (1 if mode == "fwd" else 3) * once


def _read(mode: str, size: int, L: int, E: int, H: int, d: int, **rest: int) -> float:
    """The weights of queries."""
    D = H * d
    return (1 if mode == "fwd" else 3) * size * (L * 12 * D * D + (L + 1) // 2 * 2 * (E + D) * D)


_BLIP2 = {"L": 12, "Q": 32, "N": 257, "E": 1408, "H": 12, "d": 64}
_GRANITE = {"L": 2, "Q": 3, "N": 15, "E": 1024, "H": 16, "d": 64}
_SMALL = {"L": 2, "Q": 3, "N": 5, "E": 24, "H": 2, "d": 16}
_COPY: dict[str, Any] = {"anchors": copy(lambda x, *rest: (2, *x.shape), lambda **shape: 0.0), "bytes": _read}


CASES = [
    Case(
        name="qformer",
        op="packed_attention",
        ours=_our_images,
        peers={**formula(eager_images), "transformers": _transformers},
        inputs=_images,
        outputs=("states",),
        growth="B",
        modes=("fwd",),
        cpu=[{"B": b, **_BLIP2} for b in (1, 8, 32)],
        cuda=[{"B": b, **_BLIP2} for b in (1, 32, 256)],
        small={"B": 2, **_SMALL},
        flops=_image_flops,
        **_COPY,
    ),
    Case(
        name="qformer_windows",
        op="packed_attention",
        ours=_our_images,
        peers={**formula(eager_images), "transformers": _transformers},
        inputs=partial(_images, freq=1),
        outputs=("states",),
        growth="B",
        modes=("fwd",),
        cpu=[{"B": b, **_GRANITE} for b in (32, 200)],
        cuda=[{"B": b, **_GRANITE} for b in (200, 3200)],
        small={"B": 2, **_SMALL},
        flops=partial(_image_flops, freq=1),
        **_COPY,
    ),
    Case(
        name="qformer_rerank",
        op="packed_attention",
        ours=_our_texts,
        peers=formula(eager_texts),
        inputs=_texts,
        outputs=("logits",),
        growth="R",
        modes=("fwd",),
        cpu=[{"R": r, "T": 16, **_BLIP2} for r in (16, 128)],
        cuda=[{"R": r, "T": 16, **_BLIP2} for r in (128, 1024)],
        small={"R": 3, "T": 4, **_SMALL},
        flops=_text_flops,
        **_COPY,
    ),
    Case(
        name="qformer_stage1",
        op="packed_attention",
        ours=_our_step,
        peers={"eager": eager(partial(_with_weights, four_passes))},
        inputs=_batch,
        outputs=("loss", "d weights"),
        growth="B",
        modes=("fwd+bwd",),
        cpu=[{"B": b, "T": 32, **_BLIP2} for b in (4, 16)],
        cuda=[{"B": b, "T": 32, **_BLIP2} for b in (32, 100)],
        small={"B": 3, "T": 5, **_SMALL},
        flops=_step_flops,
        judged=False,  # a step in float64 takes minutes
        **_COPY,
    ),
]
