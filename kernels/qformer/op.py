"""The public functions of the Q-Former: argument checks and declarations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size, UnsupportedError
from mmfuse.kernels._runtime.arguments import (
    autocast,
    autocast_dtype,
    check,
    check_range,
    norm_of,
    outside_a_trace,
    real,
    require_integer,
)
from mmfuse.kernels._runtime.device import shared_memory
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels._runtime.sequences import flash, head_against, no_flash, no_xformers, xformers
from mmfuse.kernels.qformer import absorbed, blocked, compiled, reference, sequences
from mmfuse.kernels.qformer.arguments import Attended, Keys, Mapped, Outputs, Tokens, outputs_of, zero_behind

Norm = tuple[Tensor, Tensor, float]

# --- keys and values ------------------------------------------------------------------------------------------------


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, heads: int
) -> Tensor:
    norm = None if gamma is None or beta is None else (gamma, beta, eps)
    return reference.project_kv(x, weight, bias, heads, norm)


PROJECT_KV = Operator(
    "project_kv",
    forward=_project,
    differentiable=("x", "weight", "bias", "gamma", "beta"),
    # it is one product, and what follows from its gradient is what torch derives
    implementations=[Implementation("torch", function=_project)],
    export=OpSpec("MmfuseProjectKV"),
    example=lambda x, **how: project_kv(x[None], x[:2].view(1, 2, 1, -1), None, 1, **how),
)


def project_kv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    norm: Norm | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The keys and values of all layers that attend to x, by one product.

    A key's bias adds the same to all scores of a query, so it is left out, and its gradient is 0.

    Args:
        x: [..., E], float16, bfloat16, float32 or float64; any strides.
        weight, bias: [L, 2, D, E] and [L, 2, D] (or None), of the keys and of the values; in x's dtype, or autocast.
        heads: H, a divisor of D.
        norm: (weight, bias, eps) of the LayerNorm before each layer, [L, E], or of one for all, [E]. It becomes a part
            of the product, so that x is normalised once, and where x needs no gradient no [..., E] is formed for it.
        backend: "torch".

    Returns:
        [..., L, 2, H, D / H].

    Deterministic where torch's matrix product is. Differentiable in x, weight, bias and norm.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x is {x if not isinstance(x, Tensor) else 'a number'}, expected a tensor [..., E]")
    check("x", x, x.shape)
    e = x.shape[-1]
    if e == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one feature")
    check("weight", weight, ("L", 2, "D", e), " as x has features", like=("x", x))
    layers, _, d, _ = weight.shape
    require_integer("heads", heads)
    if heads < 1 or d % heads:
        raise ValueError(f"heads is {heads}, expected a divisor of {d}, the rows of weight")
    if bias is not None:
        check("bias", bias, (layers, 2, d), " as weight", like=("x", x))
    gamma, beta, eps = (None, None, 0.0) if norm is None else norm_of(norm)
    for name, t in (("norm's weight", gamma), ("norm's bias", beta)) if norm is not None else ():
        one = isinstance(t, Tensor) and t.dim() == 1
        check(name, t, (e,) if one else (layers, e), ", or of one layer for all", like=("x", x))
    parameters = {"weight": weight, "bias": bias, "norm's weight": gamma, "norm's bias": beta}
    _same_dtype("x", x, parameters)
    return PROJECT_KV(x, weight, bias, gamma, beta, eps, heads, backend=backend)


# --- attention over them --------------------------------------------------------------------------------------------


def _attend(passes: Any, q: Tensor, keys: Keys, seed: Tensor | None, dropout: float, wants_lse: bool) -> Outputs:
    return passes.attend(q, keys, wants_lse, seed, dropout)


def _attend_fake(q: Tensor, keys: Keys) -> Outputs:
    return outputs_of(q, keys.rows)


def _attend_grads(
    passes: Any,
    g: Tensor,
    q: Tensor,
    keys: Keys,
    seed: Tensor | None,
    dropout: float,
    o: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    needs: Any,
) -> dict[str, Tensor]:
    return passes.attend_grads(g, q, keys, Outputs(o, row_max, row_sum), needs, seed, dropout)


_WIDEST = 128  # head that a program holds


def _too_wide(q: Tensor) -> str | None:
    d = q.shape[3]
    return f"the head dim is {d}, a program holds at most {_WIDEST}" if d > _WIDEST else None


def _no_vectors(q: Tensor) -> str | None:
    return f"the head dim is {q.shape[3]}, no multiple of 8" if q.shape[3] % 8 else None


def shared_bytes(queries: int, longest: int, d: int, itemsize: int) -> int:
    """Of the compiled kernel: a head's keys and values, and what warps that share the keys of a query add up."""
    tiles, chunks = min(4, -(-queries // 16)), -(-longest // 16)
    splits = max(1, min(4 if tiles == 1 else 2, chunks))
    return (2 * 16 * chunks * itemsize + (splits - 1) * tiles * 16 * 4) * (-(-d // 32) * 32)


STATIC_BYTES = 1024  # of shared memory, beside them


def _many_keys(q: Tensor, keys: Keys) -> str | None:
    n = keys.longest
    if not q.is_cuda:
        return None
    wanted, has = shared_bytes(q.shape[1], n, q.shape[3], q.itemsize) + STATIC_BYTES, shared_memory(q.device)
    return f"{n} keys and values need {wanted} bytes of shared memory, this GPU has {has}" if wanted > has else None


_FEWEST = 4  # queries, up to which a product by itself for each is faster than one of all, measured


def _several_queries(q: Tensor) -> str | None:
    n = q.shape[1]
    return f"{n} queries: it is faster up to {_FEWEST}, by which keys and values are read once" if n > _FEWEST else None


def _shared(keys: Keys) -> str | None:
    return "kv_index is given: rows that share an image are one product" if keys.kv_index is not None else None


def _not_float32(q: Tensor) -> str | None:
    return f"dtype is {q.dtype}, it is of float32" if q.dtype != torch.float32 else None


def _gradient_asked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _no_backward(q: Tensor, keys: Keys) -> str | None:
    return "a gradient is asked for" if _gradient_asked(q, keys.k, keys.v) else None


def _drops(dropout: float) -> str | None:
    return "probabilities are dropped" if dropout else None


def _on_gpu(q: Tensor) -> str | None:
    return "device is cuda: image by image is for the cache of a CPU" if q.is_cuda else None


def _wants_lse(wants_lse: bool) -> str | None:
    return "lse is asked for, which it keeps to itself" if wants_lse else None


def _nothing(q: Tensor, keys: Keys) -> str | None:
    return "there are no queries or no keys" if not q.numel() or not keys.rows or not keys.k.numel() else None


def _products(q: Tensor, keys: Keys) -> int:
    return keys.rows * q.shape[1] * q.shape[2] * q.shape[3] * keys.longest


def _kind(q: Tensor, keys: Keys) -> str:
    """Where rows share images, or images differ in length, torch's attention repeats or pads."""
    whole = keys.kv_index is None and keys.lengths is None and keys.cu_seqlens is None
    return dtype_name(q.dtype) + ("" if whole else "-ragged")


FEW_QUERY = Operator(
    "few_query_attention",
    forward=_attend,
    backward=_attend_grads,
    fake=_attend_fake,
    differentiable=("q", "k", "v"),
    implementations=[
        Implementation(
            "cuda", passes=compiled.CUDA, against=[_too_wide, _no_vectors, _drops, _no_backward, _many_keys]
        ),
        Implementation("triton", passes=Deferred("mmfuse.kernels.qformer.kernel"), against=[_too_wide], traceable=True),
        Implementation(
            "cpu", passes=compiled.CPU, against=[_shared, _several_queries, _not_float32, _drops, _no_backward]
        ),
        Implementation("chunked", passes=blocked, against=[_on_gpu, _drops]),
        Implementation("sdpa", function=reference.sdpa, against=[_wants_lse]),
        Implementation("torch", function=reference.of_keys),
        # no one's first choice: neither was measured, and the second waits for lengths on the host
        Implementation(
            "flash_attn",
            function=partial(sequences.attend, flash),
            against=[no_flash, head_against, _wants_lse, _nothing],
        ),
        Implementation(
            "xformers",
            function=partial(sequences.attend, xformers),
            against=[no_xformers, head_against, _wants_lse, _nothing],
        ),
    ],
    size=Size("products", _products, _kind),
    export=OpSpec("MmfuseFewQueryAttention"),
    example=lambda x, **how: few_query_attention(x[None, :2, None], x[None, :, None], x[None, :, None], **how)[0],
)


@overload
def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    return_lse: bool = False,
    return_map: Literal[False] = False,
    backend: str | None = None,
) -> Attended: ...


@overload
def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    return_lse: bool = False,
    return_map: Literal[True],
    backend: str | None = None,
) -> Mapped: ...


def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    return_lse: bool = False,
    return_map: bool = False,
    backend: str | None = None,
) -> Attended | Mapped:
    """softmax(q k^T / sqrt(d)) v of a few queries over the tokens of images; 0 where an image has none.

    The cross-attention of a Q-Former (Li et al. 2023, arXiv:2301.12597) and of poolers and resamplers. Masks are
    lengths; rows that share an image share its keys and values by `kv_index`, and nothing is repeated for them.

    Args:
        q: [B, Q, H, d], float16, bfloat16, float32 or float64, any strides; or [1, Q, H, d]: the same for every row.
        k, v: [I, N, H, d] of images, in q's dtype, or autocast; or [T, H, d], packed, with `cu_seqlens`.
        kv_index: int64 [B], the image of each row, repeated as one likes; by default row b attends to image b.
        lengths: int64 [I], the tokens that an image has, which come first; by default N.
        dropout: of the probabilities, 0 <= dropout < 1. torch's generator is asked once a call.
        cu_seqlens: int32 or int64 [I + 1]: packed image i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1].
        longest: the most tokens of a packed image.
        return_lse: whether the result has lse; else it is None.
        return_map: return the probabilities, too, in plain torch, which differentiates o with respect to them.
        backend: "cuda", "triton", "cpu", "chunked", "sdpa" or "torch"; by default the first that accepts the arguments.
            By name alone: "flash_attn" (the package's version 2, else 4), on a GPU in 16 bits, and "xformers", both
            without lse; there rows that share an image are one sequence of queries.

    Returns:
        (o, lse) or (o, lse, map): o [B, Q, H, d] in q's dtype or that of autocast; lse [B, H, Q], the log of the sum of
        exp(scores), -inf without a key, in float32 (float64 for float64) and without a gradient; map [B, H, Q, N], the
        probabilities before dropout.

    Deterministic without dropout, but for gradients of "xformers"; with it, for a state of the generator. Scores and
    softmax in float32 (float64 for float64). Differentiable in q, k and v, and twice but by "sdpa" and the other
    libraries, which raise; the gradients of an image's keys and values are sums over its rows.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. An index or a length out of range is
            found on a CPU; a GPU would have to wait for it: there it gives NaN, or torch's assertion on the device.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check_queries(q)
    keys = _keys(q, k, v, kv_index, lengths, cu_seqlens, longest)
    if q.shape[0] not in (1, keys.rows):
        of = "the images" if kv_index is None else "kv_index"
        raise ValueError(f"q has {q.shape[0]} rows, expected {keys.rows} as {of}, or 1")
    dropout = real("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected 0 <= dropout < 1")
    if return_map:
        q, keys.k, keys.v = autocast(q, keys.k, keys.v)
        if backend not in (None, "torch"):
            raise UnsupportedError(f"backend is {backend!r}: with return_map plain torch forms the probabilities")
        return reference.mapped_attention(q, *reference.padded(keys), dropout)
    return _attended(attend(q, keys, dropout, return_lse, backend), return_lse)


def attend(q: Tensor, keys: Keys, dropout: float, wants_lse: bool = False, backend: str | None = None) -> Outputs:
    """What is checked, under autocast as a product would take it."""
    q, keys.k, keys.v = autocast(q, keys.k, keys.v)
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if dropout else None
    return FEW_QUERY(q, keys, seed, dropout, bool(wants_lse), backend=backend)


def _attended(found: Outputs, return_lse: bool) -> Attended:
    lse = found.row_max.detach() + found.row_sum.detach().log() if return_lse else None
    return Attended(found.o, lse)


# --- attention over the tokens themselves -----------------------------------------------------------------------------


def _tokens(passes: Any, q: Tensor, tokens: Tokens, wants_lse: bool) -> Outputs:
    return passes.attend(q, tokens, wants_lse)


def _tokens_fake(q: Tensor, tokens: Tokens) -> Outputs:
    return outputs_of(q, tokens.x.shape[0])


def _tokens_grads(passes: Any, g: Tensor, q: Tensor, tokens: Tokens, needs: Any) -> dict[str, Tensor]:
    return passes.attend_grads(g, q, tokens, needs)


def _by_triton(q: Tensor, tokens: Tokens, wants_lse: bool) -> Outputs:
    return FEW_QUERY(q, tokens.keys(q.shape[2]), None, 0.0, wants_lse, backend="triton")


def _biased(tokens: Tokens) -> str | None:
    return "bias is given" if tokens.bias is not None else None


def _of_tokens(q: Tensor, tokens: Tokens) -> bool:
    return _gradient_asked(q, tokens.x, tokens.key_weight, tokens.value_weight, tokens.value_bias, tokens.bias)


def _saved(q: Tensor, tokens: Tokens) -> int:
    """Products of an image, where its own, which are smaller ones, take 1.25 of the time, or 1.5 with a gradient."""
    formed, own = absorbed.multiplications(q, tokens)
    if _of_tokens(q, tokens):  # of keys and values once, of their own products the forward's a second time
        of_x = 1 if tokens.x.requires_grad else 0
        return max(0, (2 + of_x) * formed - (3 + of_x) * own * 3 // 2)
    return max(0, formed - own * 5 // 4)


def _grad_or_not(q: Tensor, tokens: Tokens) -> str:
    return dtype_name(q.dtype) + ("-grad" if _of_tokens(q, tokens) else "")


def _many_products(q: Tensor, tokens: Tokens) -> str | None:
    if not q.is_cuda:
        return None
    formed, own = absorbed.multiplications(q, tokens)
    if 4 * own <= formed:
        return None
    return "it takes more than a quarter of the products of keys and values, which are large ones"


def _half(q: Tensor) -> str | None:
    return "q W_k may leave the range of torch.float16" if q.dtype == torch.float16 else None


def _keys_apart(q: Tensor, tokens: Tokens, wants_lse: bool) -> Any:
    """Keys and values by torch, and the attention."""
    return None if tokens.bias is not None else FEW_QUERY(q, tokens.keys(q.shape[2]), None, 0.0, wants_lse)


TOKEN_ATTENTION = Operator(
    "token_attention",
    forward=_tokens,
    backward=_tokens_grads,
    fake=_tokens_fake,
    differentiable=("q", "x", "key_weight", "value_weight", "value_bias", "bias"),
    implementations=[
        Implementation("absorbed", function=reference.absorbed, against=[_half, _many_products]),
        Implementation(
            "triton", function=_by_triton, against=[_too_wide, _biased], kernels=["mmfuse.kernels.qformer.kernel"]
        ),
        Implementation("chunked", passes=absorbed, against=[_on_gpu, _half]),
        Implementation("sdpa", function=reference.sdpa_of_tokens, against=[_wants_lse, _biased]),
        Implementation("torch", function=reference.of_tokens),
    ],
    size=Size("products saved for an image", _saved, _grad_or_not),
    export=OpSpec("MmfuseTokenAttention", launches=_keys_apart),
    example=lambda x, **how: token_attention(x[None, :2, None], x[None], *[x.new_ones(2 * [x.shape[1]])] * 2, **how)[0],
)


def token_attention(
    q: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Attended:
    """Attention of a few queries over tokens, with the projections of keys and values inside.

    o = softmax(q (x W_k^T)^T / sqrt(d) + bias) (x W_v^T + b_v). Where that takes fewer products, the weights go to the
    side of the queries: (q W_k) x^T, and (P x) W_v^T; on a CPU image by image, so that each image's tokens stay in the
    cache. Elsewhere keys and values are formed. A key's bias changes nothing.

    Args:
        q: [B, Q, H, d], or [1, Q, H, d]: the same for every image; float16, bfloat16, float32 or float64.
        x: [B, N, E], q's dtype, or autocast.
        key_weight, value_weight: [H d, E].
        value_bias: [H d], or None.
        lengths: int64 [B], the tokens that an image has, which come first; by default N.
        bias: [B, N], added to the scores of a token, as masks are that hide any of them.
        return_lse: whether the result has lse; else it is None.
        backend: "absorbed", or "chunked", the same image by image; or with keys and values "triton" or "sdpa", without
            a bias, or "torch"; by default the first that accepts the arguments and pays.

    Returns:
        (o, lse) as `few_query_attention`'s; o is 0 where an image has no token.

    Deterministic where torch's matrix product is. Differentiable in q, x, weights and biases.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check_queries(q)
    check("x", x, ("B", "N", "E"), like=("q", q))
    (rows, _, heads, d), (images, n, e) = q.shape, x.shape
    width = heads * d
    if e == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one feature")
    if rows not in (1, images):
        raise ValueError(f"q has {rows} rows, expected {images} as x, or 1")
    for name, t in (("key_weight", key_weight), ("value_weight", value_weight)):
        check(name, t, (width, e), " as q has features and x has", like=("q", q))
    if value_bias is not None:
        check("value_bias", value_bias, (width,), " as q has features", like=("q", q))
    if bias is not None:
        check("bias", bias, (images, n), " as x has tokens", like=("x", x))
    given = {"x": x, "key_weight": key_weight, "value_weight": value_weight, "value_bias": value_bias, "bias": bias}
    _same_dtype("q", q, given)
    if lengths is not None:
        lengths = _checked_lengths(lengths, (images,), n, ("x", x))
        bias = None if bias is None else zero_behind(bias, lengths)
    tokens = Tokens(x, key_weight, value_weight, value_bias, lengths, bias)
    return _attended(attend_tokens(q, tokens, return_lse, backend), return_lse)


def attend_tokens(q: Tensor, tokens: Tokens, wants_lse: bool = False, backend: str | None = None) -> Outputs:
    """What is checked, under autocast as a product would take it."""
    if autocast_dtype(q) is not None:
        q, x, key_weight, value_weight = autocast(q, tokens.x, tokens.key_weight, tokens.value_weight)
        value_bias, bias = (None if t is None else autocast(t)[0] for t in (tokens.value_bias, tokens.bias))
        tokens = Tokens(x, key_weight, value_weight, value_bias, tokens.lengths, bias)
    return TOKEN_ATTENTION(q, tokens, bool(wants_lse), backend=backend)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_queries(q: Tensor) -> None:
    check("q", q, ("B", "Q", "H", "d"))
    if 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected at least one head of at least one feature")


def _keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> Keys:
    heads, d = q.shape[2:]
    shape: tuple[int | str, ...] = ("I", "N", heads, d) if cu_seqlens is None else ("T", heads, d)
    check("k", k, shape, " as q", like=("q", q))
    check("v", v, k.shape, " as k", like=("q", q))
    _same_dtype("q", q, {"k": k, "v": v})
    images, n = k.shape[0], k.shape[1]
    if cu_seqlens is None:
        if longest is not None:
            raise ValueError(f"longest is {longest}, expected None without cu_seqlens")
        if lengths is not None:
            lengths = _checked_lengths(lengths, (images,), n, ("k", k))
    else:
        if lengths is not None:
            raise ValueError("lengths and cu_seqlens are both given, expected one of them")
        check("cu_seqlens", cu_seqlens, ("I + 1",), dtype=(torch.int32, torch.int64), like=("k", k))
        require_integer("longest", longest)
        n, images = longest, cu_seqlens.shape[0] - 1  # type: ignore[assignment]
        if images < 0 or n < 0:
            raise ValueError(f"cu_seqlens has {images + 1} numbers and longest is {n}, expected at least 1 and 0")
        _check_bounds(cu_seqlens, k.shape[0], n)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    if kv_index is not None:
        check("kv_index", kv_index, ("B",), dtype=torch.int64, like=("k", k))
        check_range("kv_index", kv_index, images, "the number of images")
        kv_index = kv_index.contiguous()
    return Keys(k, v, kv_index, lengths, cu_seqlens, n)


def _checked_lengths(lengths: Tensor, shape: Any, n: int, like: tuple[str, Tensor]) -> Tensor:
    check("lengths", lengths, shape, f", one for each image of {like[0]}", torch.int64, like)
    check_range("lengths", lengths, n + 1, "the tokens of an image, and 1")
    return lengths.contiguous()


def _check_bounds(cu_seqlens: Tensor, total: int, longest: int) -> None:
    if cu_seqlens.is_cuda or not outside_a_trace() or type(cu_seqlens) is not Tensor:
        return
    bounds = cu_seqlens.tolist()
    sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] < 0 or bounds[-1] > total or any(size < 0 for size in sizes):
        raise ValueError(f"cu_seqlens is {bounds}, expected bounds that do not fall, from 0 to the {total} rows of k")
    if max(sizes, default=0) > longest:
        raise ValueError(f"longest is {longest}, expected at least {max(sizes)}, the most tokens of an image")


def _same_dtype(of: str, like: Tensor, given: Mapping[str, Tensor | None]) -> None:
    dtype = like.dtype
    for name, t in given.items():
        if t is not None and t.dtype != dtype and autocast_dtype(like) is None:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {dtype} as {of}")
