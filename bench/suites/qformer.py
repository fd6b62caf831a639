"""A Q-Former's operations at the sizes of the models that have them, each baseline by itself.

`qformer_layer` is one cross-attention from the image's tokens on: B images of N tokens of E features, Q queries, H
heads of d. Baselines are what transformers runs: two projections and torch's attention in the model's dtype (`eager`),
by torch.compile, and in float32, as transformers keeps BLIP-2's Q-Former when the rest is loaded in float16.
`pooling_head` is the same of SigLIP's one query.
`few_query` is the attention alone, over keys and values that are there; `few_query_windows` that of thousands of
windows with few keys and the same queries; `few_query_shared` has R rows for one image, as re-ranking and beams do,
where eager repeats its keys and values. Whole Q-Formers are in `bench/qformer_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench import inputs, qformer_models
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, of_case, ramp, weighted
from mmfuse.bench.providers import Only, copy, eager, formula, gpu, products, then
from mmfuse.kernels import few_query_attention, token_attention


def scalar(o: Tensor) -> Tensor:
    """In the dtype of o: of a sum of rounded numbers, its ulp is what rounding alone may do."""
    return ramp(o).to(o.dtype)


# --- the layer ------------------------------------------------------------------------------------------------------


def _layer_inputs(
    device: torch.device, dtype: torch.dtype, B: int, Q: int, N: int, E: int, H: int, d: int
) -> tuple[Tensor, ...]:
    leaf = partial(inputs.leaf, device, dtype)
    q, x = leaf(B, Q, H, d), leaf(B, N, E)
    return q, x, leaf(H * d, E, scale=E**-0.5), leaf(H * d, E, scale=E**-0.5), leaf(H * d)


def layer(q: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
    """As transformers' classes do it."""
    heads = q.shape[2]
    k = F.linear(x, key_weight).unflatten(-1, (heads, -1))
    v = F.linear(x, value_weight, value_bias).unflatten(-1, (heads, -1))
    return attention(q, k, v)


def _in_float32(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: fn(*(t.float() for t in given))


def _layer(*given: Any, **how: Any) -> Tensor:
    return token_attention(*given, **how).o


def _layer_flops(mode: str, B: int, Q: int, N: int, E: int, H: int, d: int) -> float:
    formed, absorbed = 2 * N * (E + Q), Q * E * (2 * N / d + 2)
    return (1 if mode == "fwd" else 3) * B * H * d * 2 * min(formed, absorbed)


def _layer_bytes(mode: str, size: int, B: int, Q: int, N: int, E: int, H: int, d: int) -> float:
    return (1 if mode == "fwd" else 3) * size * (B * N * E + 2 * B * Q * H * d + 2 * H * d * E)


def _projection(q: Tensor, x: Tensor, key_weight: Tensor, *rest: Tensor) -> list[Any]:
    return [(x.flatten(0, 1), key_weight, 1)]


# --- attention ------------------------------------------------------------------------------------------------------


def _inputs(device: torch.device, dtype: torch.dtype, B: int, Q: int, N: int, H: int, d: int) -> tuple[Tensor, ...]:
    leaf = partial(inputs.leaf, device, dtype)
    return leaf(B, Q, H, d), leaf(B, N, H, d), leaf(B, N, H, d)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q.expand(k.shape[0], -1, -1, -1), k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _kernel(name: str) -> Callable[..., Tensor]:
    """torch's attention by one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*given: Any) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return scalar(attention(*given))

    return run


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scalar(compiled(q, k, v).transpose(1, 2))

    return run


def _ours(*given: Any, **how: Any) -> Tensor:
    return few_query_attention(*given, **how).o


def _flops(mode: str, B: int, Q: int, N: int, H: int, d: int) -> float:
    return (1 if mode == "fwd" else 3.5) * 4 * B * Q * N * H * d


def _bytes(mode: str, size: int, B: int, Q: int, N: int, H: int, d: int) -> float:
    return (1 if mode == "fwd" else 3) * size * 2 * B * (Q + N) * H * d


def _window_inputs(
    device: torch.device, dtype: torch.dtype, B: int, Q: int, N: int, H: int, d: int
) -> tuple[Tensor, ...]:
    q, k, v = _inputs(device, dtype, B, Q, N, H, d)
    return q.detach()[:1].requires_grad_(), k, v


def _shared_inputs(
    device: torch.device, dtype: torch.dtype, R: int, Q: int, N: int, H: int, d: int
) -> tuple[Tensor, ...]:
    leaf = partial(inputs.leaf, device, dtype)
    return leaf(R, Q, H, d), leaf(1, N, H, d), leaf(1, N, H, d), torch.zeros(R, dtype=torch.int64, device=device)


def repeated(q: Tensor, k: Tensor, v: Tensor, of: Tensor) -> Tensor:
    return attention(q, k.repeat(len(q), 1, 1, 1), v.repeat(len(q), 1, 1, 1))


def _shared_flops(mode: str, R: int, **size: int) -> float:
    return _flops(mode, B=R, **size)


def _shared_bytes(mode: str, size: int, R: int, Q: int, N: int, H: int, d: int) -> float:
    return (1 if mode == "fwd" else 3) * size * 2 * (R * Q + N) * H * d


_LAYER: dict[str, Any] = {
    "op": "token_attention",
    "ours": then(scalar, _layer),
    "peers": {
        **formula(then(scalar, layer)),
        "eager in float32": Only("cuda", eager(then(scalar, _in_float32(layer)))),
    },
    "inputs": _layer_inputs,
    "outputs": ("loss", "d q", "d x", "d key_weight", "d value_weight", "d value_bias"),
    "flops": _layer_flops,
    "bytes": _layer_bytes,
    "anchors": products(_projection, lambda B, N, E, H, d, **rest: 2 * B * N * E * H * d),
}
_KEYS: dict[str, Any] = {"op": "few_query_attention", "outputs": ("loss", "d q", "d k", "d v")}
_COPY: dict[str, Any] = {"anchors": copy(lambda q, k, *rest: (2, *k.shape), lambda **shape: 0.0)}
_BLIP2, _GRANITE = {"Q": 32, "N": 257, "H": 12, "d": 64}, {"Q": 3, "N": 15, "H": 16, "d": 64}
_SIGLIP = {"Q": 1, "N": 729, "H": 16, "d": 72}
_SMALL = {"Q": 2, "N": 5, "H": 2, "d": 16}
_KERNELS = {
    name: gpu(partial(_kernel, kind))
    for name, kind in (("flash", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION"), ("efficient", "EFFICIENT_ATTENTION"))
}

CASES = [
    Case(
        name="qformer_layer",
        growth="B",
        cpu=[{"B": b, "E": 1408, **_BLIP2} for b in (1, 8)],
        cuda=[{"B": b, "E": 1408, **_BLIP2} for b in (1, 32, 256)],
        small={"B": 2, "E": 24, **_SMALL},
        **_LAYER,
    ),
    Case(
        name="pooling_head",
        growth="B",
        cpu=[{"B": b, "E": 1152, **_SIGLIP} for b in (1, 8)],
        cuda=[{"B": b, "E": 1152, **_SIGLIP} for b in (8, 64)],
        small={"B": 2, "E": 24, **(_SMALL | {"Q": 1})},
        **_LAYER,
    ),
    Case(
        name="few_query",
        ours=then(scalar, _ours),
        peers={**formula(then(scalar, attention)), **_KERNELS, "flex": gpu(_flex)},
        inputs=_inputs,
        growth="B",
        cpu=[{"B": b, **_BLIP2} for b in (1, 8)],
        cuda=[{"B": b, **_BLIP2} for b in (1, 32, 256)],
        small={"B": 2, **_SMALL},
        flops=_flops,
        bytes=_bytes,
        **_KEYS,
        **_COPY,
    ),
    Case(
        name="few_query_windows",
        ours=then(scalar, _ours),
        peers=formula(then(scalar, attention)),
        inputs=_window_inputs,
        growth="B",
        cpu=[{"B": b, **_GRANITE} for b in (64, 512)],
        cuda=[{"B": b, **_GRANITE} for b in (512, 4096)],
        small={"B": 3, **_SMALL},
        flops=_flops,
        bytes=_bytes,
        **_KEYS,
        **_COPY,
    ),
    Case(
        name="few_query_shared",
        ours=then(scalar, _ours),
        peers=formula(then(scalar, repeated)),
        inputs=_shared_inputs,
        growth="R",
        cpu=[{"R": r, **_BLIP2} for r in (8, 64)],
        cuda=[{"R": r, **_BLIP2} for r in (128, 1024)],
        small={"R": 3, **_SMALL},
        flops=_shared_flops,
        bytes=_shared_bytes,
        **_KEYS,
        **_COPY,
    ),
    *qformer_models.CASES,
]


CHECKS = [
    Check("few_query_attention", "B=2 Q=3 N=7 H=2 d=24", of_case(_inputs, "q k v", B=2, Q=3, N=7, H=2, d=24),
          differentiated(_ours, ("o",), weighted)),
    Check("few_query_attention", "one query of 3 images", of_case(_window_inputs, "q k v", B=3, Q=1, N=70, H=4, d=16),
          differentiated(_ours, ("o",), weighted)),
    Check("few_query_attention", "4 rows of an image", of_case(_shared_inputs, "q k v of", R=4, Q=2, N=7, H=2, d=16),
          differentiated(_ours, ("o",), weighted)),
    Check("token_attention", "B=2 Q=3 N=7 E=48", of_case(_layer_inputs, "q x key_weight value_weight value_bias",
          B=2, Q=3, N=7, E=48, H=2, d=16), differentiated(_layer, ("o",), weighted)),
]  # fmt: skip
