"""Attention of other libraries, which know sequences of rows one after another: what they are called with.

An adapter takes q [T, H, d], k and v [T', heads, d], int32 bounds [S + 1] of S sequences among the rows of each, the
most rows of one, whether a row sees what came before alone, and the dropout of probabilities; it returns [T, H, d].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class Rows(NamedTuple):
    """Some rows of each sequence, one sequence after another."""

    order: Tensor  # int64 [T]: which row of the stream each is; behind the last any
    at: Tensor  # int64 [T]: where each row of the stream is among them
    among: Tensor  # bool [T, 1, 1]: whether it is
    bounds: Tensor  # int32 [S + 1]: of the sequences

    @staticmethod
    def of(mask: Tensor, row: Tensor | None = None, place: Tensor | None = None) -> Rows:
        """Of the places that a mask [S, N] has.

        Args:
            row: int64 [S, N], the stream's row at each place; by default the rows are the places in turn.
            place: int64 [T], the place of each row.
        """
        flat = mask.flatten()
        rank = flat.cumsum(0) - 1
        if row is None or place is None:
            t, row, here, at = len(flat), torch.arange(len(flat), device=mask.device), flat, rank
        else:
            t, row, here, at = len(place), row.flatten(), flat[place], rank[place]
        order = rank.new_zeros(t + 1).scatter_(0, rank.where(flat, t), row)[:-1]
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return Rows(order, at.clamp(min=0), here[:, None, None], bounds)

    def take(self, x: Tensor) -> Tensor:
        """The rows of a stream in this order."""
        y: Tensor = _Take.apply(x, self)
        return y


class _Take(torch.autograd.Function):
    """What is behind the last row has no gradient, whatever stands there."""

    @staticmethod
    def forward(x: Tensor, rows: Rows) -> Tensor:
        return x.index_select(0, rows.order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return torch.where(ctx.rows.among, g.index_select(0, ctx.rows.at), 0), None


# --- the adapters ---------------------------------------------------------------------------------------------------


def flash(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    attend, _ = flash_function()
    options = {"dropout_p": dropout} if dropout else {}
    found: Any = attend(  # type: ignore[misc]
        q, k, v, cu_seqlens_q=from_, cu_seqlens_k=to, max_seqlen_q=m, max_seqlen_k=n, causal=causal, deterministic=True,
        **options,
    )  # fmt: skip
    # version 4 has the logs of the sums beside it
    return found[0] if isinstance(found, tuple) else found


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    options |= {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    found: Any = varlen_attn(q, k, v, from_, to, m, n, **options)
    return found


def xformers(
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
def flash_function() -> tuple[Callable[..., Any] | None, str]:
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


def no_flash(dropout: float) -> str | None:
    if torch.compiler.is_compiling():
        return "it is not for graphs"
    attend, why = flash_function()
    if attend is None:
        return why
    undropped = dropout and "dropout_p" not in signature(attend).parameters
    return f"dropout is {dropout}, this version has none" if undropped else None


def no_xformers(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"device is {q.device.type}"
    if q.dtype == torch.float64:
        return f"dtype is {q.dtype}, it has 32 bits at most"
    return "it is not for graphs" if torch.compiler.is_compiling() else _xformers_is_missing()


@cache
def _xformers_is_missing() -> str | None:
    try:
        import_module("xformers.ops")
    except Exception as error:  # noqa: BLE001  as above
        return f"xformers is not there: {type(error).__name__}"
    return None


HAS_WINDOW, HAS_GROUPS = (n in signature(varlen_attn).parameters for n in ("window_size", "enable_gqa"))


def head_against(q: Tensor) -> str | None:
    d = q.shape[-1]
    return f"d is {d}, expected a multiple of 8 up to 256" if d % 8 or d > 256 else None
