"""Attention among the rows of each sample, wherever in the stream they lie: its checks and its declaration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from inspect import signature
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec
from mmfuse.kernels._runtime.arguments import check, constant, real
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.multiway import reference
from mmfuse.kernels.multiway.arguments import Attended
from mmfuse.kernels.multiway.reference import KINDS
from mmfuse.kernels.multiway.routing import Reading, Routing

_NONE, _CAUSAL, _ALL = range(3)  # of `reference.KINDS`

# --- implementations that know sequences of rows one after another ----------------------------------------------------


class _Rows(NamedTuple):
    """Some places of each sample, one sample after another."""

    order: Tensor  # int64 [T]: the stream's row of each; behind the last any
    at: Tensor  # int64 [T]: where each row of the stream is among them
    among: Tensor  # bool [T, 1, 1]: whether it is
    bounds: Tensor  # int32 [B + 1]: of the samples

    @staticmethod
    def of(mask: Tensor, reading: Reading) -> _Rows:
        """Of the places that a mask [B, S] has."""
        flat, row, t = mask.flatten(), reading.row.flatten(), len(reading.place)
        rank = flat.cumsum(0) - 1
        order = rank.new_zeros(t + 1).scatter_(0, rank.where(flat, t), row)[:-1]
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return _Rows(order, rank[reading.place].clamp(min=0), flat[reading.place][:, None, None], bounds)


class _Take(torch.autograd.Function):
    """Rows in another order; what is behind the last one has no gradient, whatever stands there."""

    @staticmethod
    def forward(x: Tensor, rows: _Rows) -> Tensor:
        return x.index_select(0, rows.order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return torch.where(ctx.rows.among, g.index_select(0, ctx.rows.at), 0), None


def _by_sequences(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    sees: Sequence[int],
    dropout: float,
) -> tuple[Tensor]:
    """A call for all rows, or one for those of each segment: it sees some segments, and of itself what came before."""
    places = torch.arange(reading.row.numel(), device=q.device).view_as(reading.row)
    rows = reading.place[reading.row] == places
    out = torch.zeros_like(q)
    for mine, seen, causal in _calls(sees, reading.segment):
        from_, to = _Rows.of(rows & mine, reading), _Rows.of(reading.attended & seen, reading)
        longest = reading.row.shape[1]
        given = _Take.apply(q, from_), _Take.apply(k, to), _Take.apply(v, to), from_.bounds, to.bounds
        y = attend(*given, longest, longest, causal, dropout)
        out = torch.where(from_.among, y.index_select(0, from_.at), out)
    return (out.flatten(1),)


def _calls(sees: Sequence[int], segment: Tensor) -> list[tuple[Any, Any, bool]]:
    if not sees:
        return [(True, True, False)]
    found = []
    for i, of in enumerate(_by_segment(sees)):
        seen = [j for j, kind in enumerate(of) if kind != _NONE]
        found.append((segment == i, torch.isin(segment, constant(seen, segment.device).long()), of[i] == _CAUSAL))
    return found


def _by_segment(sees: Sequence[int]) -> list[Sequence[int]]:
    """What each segment sees of each."""
    k = isqrt(len(sees))
    return [sees[i : i + k] for i in range(0, k * k, k or 1)]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    attend, _ = _flash_function()
    options = {"dropout_p": dropout} if dropout else {}
    found: Any = attend(  # type: ignore[misc]
        q, k, v, cu_seqlens_q=from_, cu_seqlens_k=to, max_seqlen_q=m, max_seqlen_k=n, causal=causal, deterministic=True,
        **options,
    )  # fmt: skip
    # version 4 has the logs of the sums beside it
    return found[0] if isinstance(found, tuple) else found


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    options |= {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    found: Any = varlen_attn(q, k, v, from_, to, m, n, **options)
    return found


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    queries, keys = (bounds.diff().tolist() for bounds in (from_, to))
    mask = BlockDiagonalMask.from_seqlens(queries, keys, device=q.device)
    mask = mask.make_causal_from_bottomright() if causal else mask
    rows, of_keys = sum(queries), sum(keys)
    y = memory_efficient_attention(q[None, :rows], k[None, :of_keys], v[None, :of_keys], attn_bias=mask, p=dropout)
    return F.pad(y[0], (0, 0, 0, 0, 0, len(q) - rows))


@cache
def _flash_function() -> tuple[Callable[..., Any] | None, str]:
    """flash_attn's second version, else its fourth; or None, and why."""
    why = []
    for module in ("flash_attn", "flash_attn.cute"):
        try:
            attend = import_module(module).flash_attn_varlen_func
        except Exception as error:  # noqa: BLE001  one that was built for another torch raises anything
            why.append(f"{module} is not there: {type(error).__name__}")
            continue
        if {"max_seqlen_q", "deterministic"} <= signature(attend).parameters.keys():
            return attend, ""
        why.append(f"this {module} has no deterministic gradients")
    return None, ", ".join(why)


def _no_flash(dropout: float) -> str | None:
    if torch.compiler.is_compiling():
        return "it is not for graphs"
    attend, why = _flash_function()
    if attend is None:
        return why
    undropped = dropout and "dropout_p" not in signature(attend).parameters
    return f"dropout is {dropout}, this version has none" if undropped else None


def _no_xformers(q: Tensor) -> str | None:
    if torch.compiler.is_compiling() or q.device.type != "cuda":
        return "it is not for graphs" if q.device.type == "cuda" else f"device is {q.device.type}"
    return _xformers_is_missing()


@cache
def _xformers_is_missing() -> str | None:
    try:
        import_module("xformers.ops")
    except Exception as error:  # noqa: BLE001  as above
        return f"xformers is not there: {type(error).__name__}"
    return None


_HAS_WINDOW, _HAS_GROUPS = (n in signature(varlen_attn).parameters for n in ("window_size", "enable_gqa"))


def _no_varlen(q: Tensor, k: Tensor, sees: Sequence[int]) -> str | None:
    if not _HAS_GROUPS and (why := _grouped(q, k)):
        return why
    return "this torch's has no window, so nothing causal" if _CAUSAL in sees and not _HAS_WINDOW else None


def _not_half(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"device is {q.device.type}"
    return None if q.dtype in (torch.float16, torch.bfloat16) else f"dtype is {q.dtype}, it has 16 bits"


def _head(q: Tensor) -> str | None:
    d = q.shape[2]
    return f"d is {d}, expected a multiple of 8 up to 256" if d % 8 or d > 256 else None


def _grouped(q: Tensor, k: Tensor) -> str | None:
    return None if q.shape[1] == k.shape[1] else f"k has {k.shape[1]} heads, q has {q.shape[1]}"


def _biased(bias: Tensor | None) -> str | None:
    return None if bias is None else "bias is given"


def _dropped(dropout: float) -> str | None:
    return f"dropout is {dropout}" if dropout else None


def _not_by_segments(sees: Sequence[int], reading: Reading) -> str | None:
    for i, of in enumerate(_by_segment(sees)):
        causal = [j for j, kind in enumerate(of) if kind == _CAUSAL]
        last = max((j for j, kind in enumerate(of) if kind != _NONE), default=i)
        if causal and (causal != [i] or last != i):
            return f"segment {i} sees what comes before in another one, or something behind itself"
        if causal and not reading.full:
            return f"segment {i} is causal, and samples have padding or lack segments"
    return None


# --- torch's flex_attention -------------------------------------------------------------------------------------------


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
) -> tuple[Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, at = len(q), reading.place
    sample, segment, within = at // reading.row.shape[1], *(x.flatten()[at] for x in (reading.segment, reading.within))
    attended, place = reading.attended.flatten()[at], constant(places, q.device).long()[segment] + within
    kinds = constant(sees or [_ALL] * len(places) ** 2, q.device).view(len(places), -1)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kind = kinds[segment[i], segment[j]]
        seen = (kind == _ALL) | ((kind == _CAUSAL) & (within[j] <= within[i]))
        return (sample[i] == sample[j]) & attended[j] & seen

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, place[i], place[j]]  # type: ignore[index]

    mask = create_block_mask(visible, None, None, t, t, device=q.device)
    attend: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    given = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = attend(*given, score_mod=None if bias is None else biased, block_mask=mask, enable_gqa=grouped)
    return (y[0].transpose(0, 1).flatten(1),)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _no_flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    if not q.numel():
        return "there are no rows"
    asks = [x is not None and x.requires_grad for x in (q, k, v, bias)]
    if asks[3] and torch.is_grad_enabled():
        return "it adds up the bias' gradient in any order"
    # asked for or not: torch refuses such a tensor itself
    return "it has no gradients on a CPU" if any(asks) and not q.is_cuda else None


# --- the declaration --------------------------------------------------------------------------------------------------


def _attend(
    passes: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    dropout: float,
) -> Attended:
    return passes.attend(q, k, v, reading, places, sees, bias)


def _attend_fake(q: Tensor) -> Attended:
    t, heads, d = q.shape
    stats = (q.new_empty(heads, t, dtype=accumulation_dtype(q.dtype)) for _ in range(2))
    return Attended(q.new_empty(t, heads * d), *stats)


def _attend_grads(
    passes: Any,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    needs: Any,
) -> dict[str, Any]:
    return passes.attend_grads(g, q, k, v, reading, places, sees, bias, Attended(out, row_max, row_sum), needs)


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    dropout: float,
) -> tuple[Tensor]:
    return (reference.packed_attention(q, k, v, reading, places, sees, bias, dropout),)


_MOST_SEGMENTS, _WIDEST = 4, 128  # what a segment sees is a few bits, and a program holds a head


def _many_segments(places: Sequence[int]) -> str | None:
    n = len(places)
    return f"a sample has {n} segments, the kernel knows {_MOST_SEGMENTS} at most" if n > _MOST_SEGMENTS else None


def _too_wide(q: Tensor) -> str | None:
    d = q.shape[2]
    return None if 0 < d <= _WIDEST else f"d is {d}, a program holds 1 to {_WIDEST}"


_SEQUENCES: list[Any] = [_not_half, _head, _biased, _not_by_segments]
PACKED_ATTENTION = Operator(
    "packed_attention",
    forward=_attend,
    backward=_attend_grads,
    fake=_attend_fake,
    differentiable=("q", "k", "v", "bias"),
    implementations=[
        Implementation("flash_attn", function=partial(_by_sequences, _flash), against=[_no_flash, *_SEQUENCES]),
        Implementation(
            "varlen", function=partial(_by_sequences, _torch_varlen), against=[_no_varlen, *_SEQUENCES, _dropped]
        ),
        Implementation(
            "triton",
            passes=Deferred("mmfuse.kernels.multiway.attention_kernel"),
            against=[_many_segments, _too_wide, _dropped],
            traceable=True,
        ),
        Implementation("torch", function=_formula),
        # no one's first choice: the one waits for lengths on the host, the other makes its mask anew for each call
        Implementation(
            "xformers",
            function=partial(_by_sequences, _xformers),
            against=[_no_xformers, _head, _grouped, _biased, _not_by_segments],
        ),
        Implementation("flex_attention", function=_flex, against=[_no_flex, _dropped]),
    ],
    export=OpSpec("MmfusePackedAttention"),
    example=lambda x, **how: packed_attention(
        x[:, None],
        x[:, None].tanh(),
        x[:, None].cumsum(2),
        Routing.from_split(1, len(x), len(x) // 2, device=x.device),
        **how,
    ),
)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    sees: Sequence[Sequence[str]] | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention among the rows of each sample: softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017).

    Args:
        q, k, v: [T, H, d], of one floating-point dtype; rows in the order of `routing`, which knows its samples. k and
            v may have fewer heads, a divisor of H: consecutive heads of q share one (Ainslie et al. 2023).
        routing: which rows are a sample's, segment by segment, and which of them are padding that nobody attends to.
        sees: K x K of "all", "causal" or "none": what a segment's rows see of another's, "causal" the rows of the same
            number and those before. By default all.
        bias: [H, P, P], of the places of a query and of a key, as the routing's `places` number them; P is at least
            the routing's `span`.
        dropout: the probability of a probability to be 0.
        backend: "flash_attn" or "varlen" (torch's), both without a bias, on a GPU and in 16 bits; "triton", without
            dropout; or "torch". By default the first of these that accepts the arguments. By name alone: "xformers",
            which has dropout and float32 but no bias, and "flex_attention", without dropout or a bias' gradient.

    Returns:
        [T, H d] in q's dtype.

    Deterministic without dropout, but for gradients of "varlen" and "xformers", which are only with
    `torch.use_deterministic_algorithms`, and for those of "flex_attention". Differentiable in q, k, v and bias; by
    "triton" twice.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is {type(routing).__name__}, expected a Routing")
    reading = routing.reading
    if reading is None:
        raise ValueError(
            "routing has no samples, expected one of Routing.of, Routing.from_split or Routing.from_splits"
        )
    check("q", q, (len(reading.place), "H", "d"))
    check("k", k, (q.shape[0], "heads", q.shape[2]), dtype=q.dtype, like=("q", q))
    check("v", v, k.shape, ", as k", dtype=q.dtype, like=("q", q))
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"k has {k.shape[1]} heads, expected a divisor of q's {q.shape[1]}")
    segments = len(routing.places)
    kinds: list[int] = []
    if sees is not None:
        if [len(of) for of in sees] != [segments] * segments or not all(kind in KINDS for of in sees for kind in of):
            raise ValueError(f"sees is {sees}, expected {segments} x {segments} of {', '.join(KINDS)}")
        kinds = [KINDS.index(kind) for of in sees for kind in of]
    if bias is not None:
        p = bias.shape[1] if isinstance(bias, Tensor) and bias.dim() == 3 else "P"
        check("bias", bias, (q.shape[1], p, p), like=("q", q))
        if bias.shape[1] < routing.span:
            raise ValueError(f"bias has {bias.shape[1]} places, expected at least {routing.span} as routing")
    if not 0 <= real("dropout", dropout) <= 1:
        raise ValueError(f"dropout is {dropout}, expected a probability")
    return PACKED_ATTENTION(q, k, v, reading, routing.places, kinds, bias, dropout, backend=backend)[0]
