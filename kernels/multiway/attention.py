"""Attention among the rows of each sample, wherever in the stream they lie: its checks and its declaration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mmfuse.kernels._runtime import Implementation, Operator
from mmfuse.kernels._runtime.arguments import check, constant, real
from mmfuse.kernels.multiway import reference
from mmfuse.kernels.multiway.routing import Reading, Routing

Sees = tuple[tuple[str, ...], ...]


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
    sees: Sees | None,
    dropout: float,
) -> Tensor:
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
    return out.flatten(1)


def _calls(sees: Sees | None, segment: Tensor) -> list[tuple[Any, Any, bool]]:
    if sees is None:
        return [(True, True, False)]
    found = []
    for i, of in enumerate(sees):
        seen = [j for j, kind in enumerate(of) if kind != "none"]
        found.append((segment == i, torch.isin(segment, constant(seen, segment.device).long()), of[i] == "causal"))
    return found


def _flash(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, from_, to, m, n, dropout_p=dropout, causal=causal, deterministic=True)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    window: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    found: Any = varlen_attn(q, k, v, from_, to, m, n, **window)
    return found


@cache
def _flash_is_missing() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # one that was built for another torch raises anything
        return f"flash_attn is not there: {type(error).__name__}"
    found = signature(flash_attn_varlen_func).parameters
    return None if "deterministic" in found else "this flash_attn has no deterministic gradients"


def _no_flash() -> str | None:
    return "it is not for graphs" if torch.compiler.is_compiling() else _flash_is_missing()


_HAS_WINDOW = "window_size" in signature(varlen_attn).parameters


def _no_varlen(sees: Sees | None) -> str | None:
    causal = any("causal" in of for of in sees or ())
    return "this torch's has no window, so nothing causal" if causal and not _HAS_WINDOW else None


def _not_half(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"device is {q.device.type}"
    return None if q.dtype in (torch.float16, torch.bfloat16) else f"dtype is {q.dtype}, it has 16 bits"


def _head(q: Tensor) -> str | None:
    d = q.shape[2]
    return f"d is {d}, expected a multiple of 8 up to 256" if d % 8 or d > 256 else None


def _biased(bias: Tensor | None) -> str | None:
    return None if bias is None else "bias is given"


def _dropped(dropout: float) -> str | None:
    return f"dropout is {dropout}" if dropout else None


def _not_by_segments(sees: Sees | None, reading: Reading) -> str | None:
    for i, of in enumerate(sees or ()):
        causal = [j for j, kind in enumerate(of) if kind == "causal"]
        last = max((j for j, kind in enumerate(of) if kind != "none"), default=i)
        if causal and (causal != [i] or last != i):
            return f"segment {i} sees what comes before in another one, or something behind itself"
        if causal and not reading.full:
            return f"segment {i} is causal, and samples have padding or lack segments"
    return None


_SEQUENCES: list[Any] = [_not_half, _head, _biased, _not_by_segments]
PACKED_ATTENTION = Operator(
    "packed_attention",
    forward=reference.packed_attention,
    differentiable=("q", "k", "v", "bias"),
    implementations=[
        Implementation("flash_attn", function=partial(_by_sequences, _flash), against=[_no_flash, *_SEQUENCES]),
        Implementation(
            "varlen", function=partial(_by_sequences, _torch_varlen), against=[_no_varlen, *_SEQUENCES, _dropped]
        ),
        Implementation("torch", function=reference.packed_attention),
    ],
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
        q, k, v: [T, H, d], of one floating-point dtype; rows in the order of `routing`, which knows its samples.
        routing: which rows are a sample's, segment by segment, and which of them are padding that nobody attends to.
        sees: K x K of "all", "causal" or "none": what a segment's rows see of another's, "causal" the rows of the same
            number and those before. By default all.
        bias: [H, P, P], of the places of a query and of a key, as the routing's `places` number them.
        dropout: the probability of a probability to be 0.
        backend: "flash_attn" or "varlen" (torch's), both without a bias, on a GPU and in 16 bits; or "torch". By
            default the first that accepts the arguments.

    Returns:
        [T, H d] in q's dtype.

    Deterministic without dropout, but for torch's own variable-length attention, whose gradients are only with
    `torch.use_deterministic_algorithms`. Differentiable in q, k, v and bias.

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
    for name, t in (("k", k), ("v", v)):
        check(name, t, q.shape, ", as q", dtype=q.dtype, like=("q", q))
    segments = len(routing.places)
    if sees is not None:
        sees = tuple(map(tuple, sees))
        if [len(of) for of in sees] != [segments] * segments or not all(
            kind in reference.KINDS for of in sees for kind in of
        ):
            raise ValueError(f"sees is {sees}, expected {segments} x {segments} of {', '.join(reference.KINDS)}")
    if bias is not None:
        check("bias", bias, (q.shape[1], "P", "P"), like=("q", q))
    if not 0 <= real("dropout", dropout) <= 1:
        raise ValueError(f"dropout is {dropout}, expected a probability")
    return PACKED_ATTENTION(q, k, v, reading, routing.places, sees, bias, dropout, backend=backend)
