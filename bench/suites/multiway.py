"""Modality experts at BEiT-3's sizes: B pairs of S rows of an image and L of a text, width D, hidden 4 D, two experts.

`routed_ffn` is the feed-forward network with its inner norm, on a stream that is sorted by expert: eager has each
expert's modules on its slice, and puts the rows together. `multiway_layer` is the whole layer, `multiway_encoder` four
of them; there eager is torchscale's, which splits and concatenates the rows [B, S + L, D] at every module.
`multiway_kinds` is B images, B pairs and B texts in one stream; eager has a pass for each, and so has `passes`, of our
own layer. All are bound by their products. A routing is made once, as it serves a batch for all layers.

`packed_attention` is the attention alone, of pairs whose texts have padding: eager puts the rows together sample by
sample and has a mask of the keys, as users do; `flex` is torch's flex_attention over the stream.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench import inputs
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, of_case, ramp
from mmfuse.bench.providers import eager, formula, gpu, products, then
from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear
from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.routing import Part

_EPS, _HEAD = 1e-5, 64
_DEPTH = 4

_NAMES = "x sizes g1 c1 wqkv bqkv gi ci wo bo g2 c2 w1 b1 gf cf w2 b2"


def _sizes(sizes: Tensor) -> tuple[int, int, int]:
    """(B, S, L), the rows of an empty tensor of these sizes."""
    return tuple(sizes.shape[:3])  # type: ignore[return-value]


def _routing(sizes: Tensor) -> Routing:
    return _made_once(*_sizes(sizes), sizes.device)


@cache
def _made_once(b: int, s: int, length: int, device: torch.device) -> Routing:
    return Routing.from_split(b, s + length, s, device=device)


def _inputs(device: torch.device, dtype: torch.dtype, B: int, S: int, L: int, D: int) -> tuple[Tensor, ...]:
    leaf = partial(inputs.leaf, device, dtype)
    shapes = [(D,), (D,), (3 * D, D), (3 * D,), (D,), (D,), (D, D), (D,), (D,), (D,)]
    shapes += [(4 * D, D), (4 * D,), (4 * D,), (4 * D,), (D, 4 * D), (D,)]
    weights = [leaf(2, *shape, scale=shape[-1] ** -0.5 if len(shape) == 2 else 1.0) for shape in shapes]
    # sizes travel as those of a tensor without numbers
    sizes = torch.empty(B, S, L, 0, dtype=torch.int64, device=device)
    return leaf(B * (S + L), D, scale=1.0), sizes, *weights


def _ffn_inputs(device: torch.device, dtype: torch.dtype, **shape: int) -> tuple[Tensor, ...]:
    x, sizes, *weights = _inputs(device, dtype, **shape)
    return x, sizes, *weights[-6:]


# --- the network ----------------------------------------------------------------------------------------------------


def ffn(x: Tensor, sizes: Tensor, *weights: Tensor) -> Tensor:
    """Each expert's modules on its slice."""
    b, s, length = _sizes(sizes)
    return torch.cat([_ffn_of(t, *of) for t, *of in _pairs(x.split([b * s, b * length]), weights)])


def _ffn_of(x: Tensor, w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.gelu(F.linear(x, w1, b1)), gamma.shape, gamma, beta, _EPS), w2, b2)


def _pairs(parts: Any, weights: Any) -> Any:
    return zip(parts, *(w.unbind(0) for w in weights), strict=True)


def _grouped_mm(x: Tensor, w: Tensor, b: Tensor, rows: tuple[int, int]) -> Tensor:
    ends = torch.tensor([rows[0], sum(rows)], dtype=torch.int32, device=x.device)
    return F.grouped_mm(x, w.transpose(1, 2), offs=ends) + _by_rows(b, rows)


def _by_rows(t: Tensor, rows: tuple[int, int]) -> Tensor:
    return torch.cat([row.expand(n, -1) for row, n in zip(t, rows, strict=True)])


class _Quack(torch.autograd.Function):
    """QuACK's product of each expert's rows (quack-kernels), and its gradients by the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, rows: tuple[int, int]) -> Tensor:
        from quack.gemm_interface import gemm

        bounds = torch.tensor([0, rows[0], sum(rows)], dtype=torch.int32, device=x.device)
        ctx.save_for_backward(x, w, bounds)
        ctx.gemm, ctx.rows = gemm, rows
        return gemm(x, w.mT, bias=b, cu_seqlens_m=bounds)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, bounds = ctx.saved_tensors
        dx, dw = ctx.gemm(g, w, cu_seqlens_m=bounds), ctx.gemm(g.mT, x, cu_seqlens_k=bounds)
        return dx, dw, torch.stack([part.sum(0) for part in g.split(ctx.rows)]), None


def _quack() -> Any:
    import quack.gemm_interface  # noqa: F401  (or it is absent)

    return then(ramp, partial(grouped, product=_Quack.apply))


def grouped(x: Tensor, sizes: Tensor, *weights: Tensor, product: Any = _grouped_mm) -> Tensor:
    """A grouped product, torch's or another one, and the rest in plain torch."""
    w1, b1, gamma, beta, w2, b2 = weights
    b, s, length = _sizes(sizes)
    rows = b * s, b * length
    z = product(x, w1, b1, rows)
    h = F.layer_norm(F.gelu(z), z.shape[1:], eps=_EPS) * _by_rows(gamma, rows) + _by_rows(beta, rows)
    return product(h, w2, b2, rows)


def _ffn(x: Tensor, sizes: Tensor, *weights: Tensor, **how: Any) -> Tensor:
    w1, b1, gamma, beta, w2, b2 = weights
    return routed_ffn(x, w1, b1, w2, b2, _routing(sizes), norm=(gamma, beta, _EPS), **how)


# --- the layer ------------------------------------------------------------------------------------------------------


def torchscale(x: Tensor, sizes: Tensor, *weights: Tensor, depth: int = 1) -> Tensor:
    """torchscale's EncoderLayer over [B, S + L, D], whose attention is torch's."""
    b, s, length = _sizes(sizes)
    d = x.shape[1]

    def split(t: Tensor, fn: Any, *of: Tensor) -> Tensor:
        if not s or not length:
            return fn(t, *(w[0 if s else 1] for w in of))
        return torch.cat([fn(part, *w) for part, *w in _pairs(t.split([s, length], 1), of)], 1)

    def norm(t: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(t, gamma.shape, gamma, beta, _EPS)

    g1, c1, wqkv, bqkv, gi, ci, wo, bo, g2, c2, *of_ffn = weights
    image, text = x.split([b * s, b * length])
    y = torch.cat([image.view(b, s, d), text.view(b, length, d)], 1)
    for _ in range(depth):
        h = split(y, norm, g1, c1)
        # torchscale has a module for each of the three
        three = zip(wqkv.chunk(3, 1), bqkv.chunk(3, 1), strict=True)
        q, k, v = (split(h, F.linear, w, c).unflatten(2, (-1, _head(d))).transpose(1, 2) for w, c in three)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + split(split(h, norm, gi, ci), F.linear, wo, bo)
        y = y + split(split(y, norm, g2, c2), _ffn_of, *of_ffn)
    return torch.cat([t.flatten(0, 1) for t in y.split([s, length], 1)])


def _head(d: int) -> int:
    return min(_HEAD, d)


def _layers(x: Tensor, sizes: Tensor, *weights: Tensor, depth: int = 1, routing: Any = _routing, **how: Any) -> Tensor:
    routing = routing(sizes)
    g1, c1, wqkv, bqkv, gi, ci, wo, bo, g2, c2, w1, b1, gf, cf, w2, b2 = weights
    for _ in range(depth):
        h = routed_linear(x, wqkv, bqkv, routing, input_norm=(g1, c1, _EPS))
        q, k, v = h.unflatten(1, (3, -1, _head(x.shape[1]))).unbind(1)
        h = packed_attention(q, k, v, routing)
        x = routed_linear(h, wo, bo, routing, input_norm=(gi, ci, _EPS), residual=x)
        x = routed_ffn(x, w1, b1, w2, b2, routing, norm=(gf, cf, _EPS), input_norm=(g2, c2, _EPS), residual=x, **how)
    return x


# --- images, pairs and texts ------------------------------------------------------------------------------------------


def _kinds(sizes: Tensor) -> Routing:
    return _kinds_once(*_sizes(sizes), sizes.device)


@cache
def _kinds_once(b: int, s: int, length: int, device: torch.device) -> Routing:
    images, pairs, texts = torch.arange(3 * b, device=device).split(b)
    parts = [Part(0, b, s, images), Part(0, b, s, pairs), Part(1, b, length, pairs), Part(1, b, length, texts)]
    return Routing.of(parts, 2, 3 * b, device)


def _kinds_inputs(device: torch.device, dtype: torch.dtype, B: int, S: int, L: int, D: int) -> tuple[Tensor, ...]:
    _, *others = _inputs(device, dtype, B, S, L, D)
    return inputs.leaf(device, dtype, 2 * B * (S + L), D, scale=1.0), *others


def passes(x: Tensor, sizes: Tensor, *weights: Tensor, layers: Any = torchscale) -> Tensor:
    """One for each kind."""
    b, s, length = _sizes(sizes)
    parts = x.split([b * s, b * (s + length), b * length])
    kinds = (sizes.new_empty(b, *of, 0) for of in ((s, 0), (s, length), (0, length)))
    return torch.cat([layers(part, kind, *weights) for part, kind in zip(parts, kinds, strict=True)])


# --- attention ------------------------------------------------------------------------------------------------------


def _attention_inputs(device: torch.device, dtype: torch.dtype, B: int, S: int, L: int, H: int) -> tuple[Tensor, ...]:
    q, k, v = (inputs.leaf(device, dtype, B * (S + L), H, _HEAD) for _ in range(3))
    kept = 1 + 7 * torch.arange(B, device=device) % L
    return q, k, v, torch.empty(B, S, L, 0, dtype=torch.int64, device=device), kept


def padded(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    b, s, length = _sizes(sizes)
    mask = torch.arange(s + length, device=q.device) < s + kept[:, None]
    q, k, v = (
        torch.cat([part.unflatten(0, (b, -1)) for part in t.split([b * s, b * length])], 1).transpose(1, 2)
        for t in (q, k, v)
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return torch.cat([part.flatten(0, 1) for part in y.transpose(1, 2).flatten(2).split([s, length], 1)])


def _attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, kept: Tensor, **how: Any) -> Tensor:
    b, s, length = _sizes(sizes)
    return packed_attention(q, k, v, _padded_once(b, s, length, kept.device), **how)


@cache
def _padded_once(b: int, s: int, length: int, device: torch.device) -> Routing:
    kept = 1 + 7 * torch.arange(b, device=device) % length
    return Routing.from_split(b, s + length, s, kept, device)


# --- cost -----------------------------------------------------------------------------------------------------------


def _ffn_flops(mode: str, B: int, S: int, L: int, D: int) -> float:
    return (1 if mode == "fwd" else 3) * 16 * B * (S + L) * D * D


def _layer_flops(mode: str, B: int, S: int, L: int, D: int, depth: int = 1) -> float:
    t = S + L
    return depth * (1 if mode == "fwd" else 3) * B * (24 * t * D * D + 4 * t * t * D)


def _kinds_flops(mode: str, B: int, S: int, L: int, D: int) -> float:
    pairs = S * S + L * L + (S + L) ** 2
    return (1 if mode == "fwd" else 3) * B * (48 * (S + L) * D * D + 4 * pairs * D)


def _bytes(mode: str, size: int, B: int, S: int, L: int, D: int, weights: int = 8, depth: int = 1) -> float:
    return (1 if mode == "fwd" else 3) * size * (2 * B * (S + L) * D + depth * 2 * weights * D * D)


def _products(x: Tensor, sizes: Tensor, *weights: Tensor) -> list[Any]:
    """The first one of the network."""
    w1 = weights[-6]
    _, s, length = _sizes(sizes)
    rows = len(x) // (s + length)
    return [(t, w, 1) for t, w in zip(x.split([rows * s, rows * length]), w1.unbind(0), strict=True)]


def _products_flops(B: int, S: int, L: int, D: int) -> float:
    return 8 * B * (S + L) * D * D


def _attention_flops(mode: str, B: int, S: int, L: int, H: int) -> float:
    return (2 if mode == "fwd" else 7) * 2 * B * H * (S + L) ** 2 * _HEAD


def _attention_bytes(mode: str, size: int, B: int, S: int, L: int, H: int) -> float:
    return (4 if mode == "fwd" else 12) * B * (S + L) * H * _HEAD * size


_GRADS = ["d x", *(f"d {name}" for name in _NAMES.split()[2:])]
_SHARED: dict[str, Any] = {
    "op": "routed_ffn",
    "growth": "B",
    "cpu": [{"B": b, "S": 197, "L": 64, "D": 768} for b in (1, 8)],
    "cuda": [{"B": b, "S": 197, "L": 64, "D": 768} for b in (8, 64, 256)],
    "small": {"B": 2, "S": 5, "L": 3, "D": 16},
    "anchors": products(_products, _products_flops),
}

CASES = [
    Case(
        name="routed_ffn",
        ours=then(ramp, _ffn),
        peers={**formula(then(ramp, ffn)), "grouped_mm": eager(then(ramp, grouped)), "quack": gpu(_quack)},
        inputs=_ffn_inputs,
        outputs=("loss", "d x", *_GRADS[-6:]),
        flops=_ffn_flops,
        bytes=_bytes,
        **_SHARED,
    ),
    Case(
        name="multiway_layer",
        ours=then(ramp, _layers),
        peers=formula(then(ramp, torchscale)),
        inputs=_inputs,
        outputs=("loss", *_GRADS),
        flops=_layer_flops,
        bytes=partial(_bytes, weights=12),
        **_SHARED,
    ),
    Case(
        name="multiway_encoder",
        ours=then(ramp, partial(_layers, depth=_DEPTH)),
        peers=formula(then(ramp, partial(torchscale, depth=_DEPTH))),
        inputs=_inputs,
        outputs=("loss", *_GRADS),
        flops=partial(_layer_flops, depth=_DEPTH),
        bytes=partial(_bytes, weights=12, depth=_DEPTH),
        **_SHARED,
    ),
    Case(
        name="multiway_kinds",
        ours=then(ramp, partial(_layers, routing=_kinds)),
        peers={
            **formula(then(ramp, passes)),
            "passes": eager(then(ramp, partial(passes, layers=_layers))),
        },
        inputs=_kinds_inputs,
        outputs=("loss", *_GRADS),
        flops=_kinds_flops,
        bytes=lambda mode, size, B, **shape: _bytes(mode, size, 2 * B, weights=12, **shape),
        **_SHARED | {"anchors": products(_products, lambda B, **shape: _products_flops(2 * B, **shape))},
    ),
    Case(
        name="packed_attention",
        op="packed_attention",
        ours=then(ramp, _attention),
        peers={
            **formula(then(ramp, padded)),
            "flex": gpu(lambda: then(ramp, partial(_attention, backend="flex_attention"))),
        },
        inputs=_attention_inputs,
        outputs=("loss", "d q", "d k", "d v"),
        growth="B",
        cpu=[{"B": b, "S": 197, "L": 64, "H": 12} for b in (1, 8)],
        cuda=[{"B": b, "S": 197, "L": 64, "H": 12} for b in (8, 64, 256)],
        small={"B": 2, "S": 5, "L": 3, "H": 2},
        flops=_attention_flops,
        bytes=_attention_bytes,
        anchors=products(
            lambda q, k, v, sizes, kept: [(q.flatten(1), k.flatten(1)[: sizes.shape[1]], 1)],
            lambda B, S, L, H: 2 * B * (S + L) * S * H * _HEAD,
        ),
    ),
]


def _norms(x: Tensor, sizes: Tensor, *weights: Tensor, **how: Any) -> Tensor:
    return routed_layer_norm(x, weights[0], weights[1], _routing(sizes), _EPS, **how)


def _linear(x: Tensor, sizes: Tensor, *weights: Tensor, **how: Any) -> Tensor:
    return routed_linear(x, weights[0], weights[1], _routing(sizes), activation="gelu", **how)


def _normed_linear(x: Tensor, sizes: Tensor, *weights: Tensor, **how: Any) -> Tensor:
    return _linear(x, sizes, *weights[:2], input_norm=(*weights[2:], _EPS), **how)


def _some(names: str) -> Any:
    """Of the layer's inputs those that are used."""
    at = [_NAMES.split().index(name) for name in names.split()]
    return lambda *device, **shape: tuple(_inputs(*device, **shape)[i] for i in at)


CHECKS = [
    Check(op, "B=2 S=5 L=3 D=48", of_case(make, names, B=2, S=5, L=3, D=48), differentiated(then(ramp, fn)))
    for op, make, names, fn in (
        ("routed_ffn", _ffn_inputs, "x sizes w1 b1 gf cf w2 b2", _ffn),
        *(
            (op, _some(names), names, fn)
            for op, names, fn in (
                ("routed_linear", "x sizes wqkv bqkv", _linear),
                ("routed_layer_norm", "x sizes g1 c1", _norms),
            )
        ),
    )
]
CHECKS += [
    Check(
        "routed_linear",
        "B=2 S=5 L=3 D=48, a norm before it",
        of_case(_some("x sizes wqkv bqkv g1 c1"), "x sizes wqkv bqkv g1 c1", B=2, S=5, L=3, D=48),
        differentiated(then(ramp, _normed_linear)),
    ),
    Check(
        "packed_attention",
        "B=2 S=5 L=3 H=2",
        of_case(_attention_inputs, "q k v sizes kept", B=2, S=5, L=3, H=2),
        differentiated(then(ramp, _attention)),
    ),
]
