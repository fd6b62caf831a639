"""Attention among the rows of each sample, wherever in the stream they lie: its checks and its declaration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec
from mmfuse.kernels._runtime.arguments import check, constant, outside_a_trace, real
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._runtime.sequences import (
    HAS_GROUPS,
    HAS_WINDOW,
    Rows,
    flash,
    head_against,
    no_flash,
    no_xformers,
    torch_varlen,
    xformers,
)
from mmfuse.kernels.multiway import reference
from mmfuse.kernels.multiway.arguments import Attended
from mmfuse.kernels.multiway.reference import KINDS
from mmfuse.kernels.multiway.routing import Reading, Routing, taken

_NONE, _CAUSAL, _ALL = range(3)  # of `reference.KINDS`

# --- implementations that know sequences of rows one after another ----------------------------------------------------


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
        from_, to = (Rows.of(m, reading.row, reading.place) for m in (rows & mine, reading.attended & seen))
        longest = reading.row.shape[1]
        given = from_.take(q), to.take(k), to.take(v), from_.bounds, to.bounds
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


def _no_varlen(q: Tensor, k: Tensor, sees: Sequence[int]) -> str | None:
    if not HAS_GROUPS and (why := _grouped(q, k)):
        return why
    return "this torch's has no window, so nothing causal" if _CAUSAL in sees and not HAS_WINDOW else None


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


# --- samples of the same lengths together: nothing is padded for another one ------------------------------------------


def _by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    places: Sequence[int],
    sees: Sequence[int],
    bias: Tensor | None,
    dropout: float,
) -> tuple[Tensor]:
    order, back, groups = reading.alike
    rows = [of.row.numel() for of in groups]
    q, k, v = (t if reading.in_order else taken(t, order, back) for t in (q, k, v))
    each = zip(q.split(rows), k.split(rows), v.split(rows), groups, strict=True)
    y = torch.cat([reference.packed_attention(*of_group, places, sees, bias, dropout) for of_group in each])
    return (y if reading.in_order else taken(y, back, order),)


_CALL = 1 << 20  # what a group costs, in multiplications


def _one_length(q: Tensor, reading: Reading, sees: Sequence[int], bias: Tensor | None) -> str | None:
    if reading.full and not sees and bias is None:
        return "all samples have one length"
    if not q.is_cpu:
        return f"device is {q.device.type}, and the host reads lengths"
    if not outside_a_trace():
        return "the host reads lengths, which a graph does not know"
    if not q.numel():
        return "there are no rows"
    _, heads, d = q.shape
    # of a mask there is one for all samples of a group
    pairs, of_masks = reading.row.numel() * reading.row.shape[1], (0 if bias is None else heads) + bool(sees)
    if pairs * (heads * d + of_masks) < _CALL:
        return "there is too little to do: it is not worth a look at the lengths"
    groups = reading.alike[2]
    fewer = (pairs - sum(of.row.numel() * of.row.shape[1] for of in groups)) * heads * d
    fewer += (pairs - sum(of.row.shape[1] ** 2 for of in groups)) * of_masks
    if fewer < _CALL * len(groups):
        return f"by {len(groups)} groups of samples there are {fewer} fewer multiplications, too few to pay"
    return None


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


# what a segment sees and where it lies are a few bits, and a program holds a head
_MOST_SEGMENTS, _FARTHEST, _WIDEST = 4, 2**16 - 1, 128


def _many_segments(places: Sequence[int]) -> str | None:
    n = len(places)
    return f"a sample has {n} segments, the kernel knows {_MOST_SEGMENTS} at most" if n > _MOST_SEGMENTS else None


def _far(places: Sequence[int]) -> str | None:
    n = max(places, default=0)
    return f"a segment has place {n}, the kernel knows {_FARTHEST} at most" if n > _FARTHEST else None


def _too_wide(q: Tensor) -> str | None:
    d = q.shape[2]
    return None if 0 < d <= _WIDEST else f"d is {d}, a program holds 1 to {_WIDEST}"


_SEQUENCES: list[Any] = [head_against, _biased, _not_by_segments]
PACKED_ATTENTION = Operator(
    "packed_attention",
    forward=_attend,
    backward=_attend_grads,
    fake=_attend_fake,
    differentiable=("q", "k", "v", "bias"),
    implementations=[
        Implementation("flash_attn", function=partial(_by_sequences, flash), against=[no_flash, *_SEQUENCES]),
        Implementation(
            "varlen", function=partial(_by_sequences, torch_varlen), against=[_no_varlen, *_SEQUENCES, _dropped]
        ),
        Implementation(
            "triton",
            passes=Deferred("mmfuse.kernels.multiway.attention_kernel"),
            against=[_many_segments, _far, _too_wide, _dropped],
            traceable=True,
        ),
        Implementation("by_length", function=_by_length, against=[_one_length]),
        Implementation("torch", function=_formula),
        # no one's first choice: the one waits for lengths on the host, the other makes its mask anew for each call
        Implementation(
            "xformers",
            function=partial(_by_sequences, xformers),
            against=[no_xformers, head_against, _grouped, _biased, _not_by_segments],
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
            dropout; "by_length", on a CPU and where samples differ; or "torch". By default the first of these that
            accepts the arguments. By name alone: "xformers", which has dropout and float32 but no bias, and
            "flex_attention", without dropout or a bias' gradient.

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
    check("q", q, (reading.place.shape[0], "H", "d"))
    check("k", k, (q.shape[0], "heads", q.shape[2]), dtype=q.dtype, like=("q", q))
    check("v", v, k.shape, ", as k", dtype=q.dtype, like=("q", q))
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"k has {k.shape[1]} heads, expected a divisor of q's {q.shape[1]}")
    kinds = kinds_of(sees, len(routing.places))
    if bias is not None:
        p = bias.shape[1] if isinstance(bias, Tensor) and bias.dim() == 3 else "P"
        check("bias", bias, (q.shape[1], p, p), like=("q", q))
        if bias.shape[1] < routing.span:
            raise ValueError(f"bias has {bias.shape[1]} places, expected at least {routing.span} as routing")
    if not 0 <= real("dropout", dropout) <= 1:
        raise ValueError(f"dropout is {dropout}, expected a probability")
    return PACKED_ATTENTION(q, k, v, reading, routing.places, kinds, bias, dropout, backend=backend)[0]


def kinds_of(sees: Sequence[Sequence[str]] | None, segments: int) -> list[int]:
    """What segments see of each other as numbers of `KINDS`; none: all see all."""
    if sees is None:
        return []
    if [len(of) for of in sees] != [segments] * segments or not all(kind in KINDS for of in sees for kind in of):
        raise ValueError(f"sees is {sees}, expected {segments} x {segments} of {', '.join(KINDS)}")
    return [KINDS.index(kind) for of in sees for kind in of]
