"""The public function of text embedding: argument checks and declaration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import check, check_range, norm_of, real, require_integer
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.text import blocked, reference
from mmfuse.kernels.text.blocked import Words

# what embeds words, also beside patches
WORDS: dict[str, Any] = {"triton": Deferred("mmfuse.kernels.text.kernel"), "chunked": blocked.TorchPasses}

# the widest row that a program of the GPU's kernels holds
_WIDEST = 16384


class Outputs(NamedTuple):
    out: Tensor  # [B, L, D]
    mean: Tensor  # [B, L], or empty without a norm, as rstd
    rstd: Tensor


def _forward(passes: Any, words: Words) -> Outputs:
    out = words.table.new_empty(words.shape)
    return Outputs(out, *passes.embedded(words, out))


def _fake(words: Words) -> Outputs:
    table = words.table
    row = table.new_empty(0 if words.eps is None else words.ids.shape, dtype=accumulation_dtype(table.dtype))
    return Outputs(table.new_empty(words.shape), row, torch.empty_like(row))


def _backward(passes: Any, g: Tensor, words: Words, mean: Tensor, rstd: Tensor, needs: Any) -> dict[str, Tensor]:
    wanted = [name for name, need in needs._asdict().items() if need]
    return blocked.backward(passes, g, words, (mean, rstd), wanted)


def too_wide(words: Words) -> str | None:
    """Why a kernel cannot take rows of this width."""
    d = words.table.shape[1]
    return f"D is {d}: a program holds rows of at most {_WIDEST}" if d > _WIDEST else None


def _shift_apart(words: Words) -> Any:
    """The sum of positions and type, which is of weights, and the rest."""
    if words.text_position is None or words.text_type is None:
        return None
    return EMBED_TEXT(replace(words, text_position=words.shift, text_type=None))


EMBED_TEXT = Operator(
    "embed_text",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=("table", "text_position", "text_type", "gamma", "beta"),
    on=lambda words: words.table,
    implementations=[
        Implementation("triton", passes=WORDS["triton"], against=[too_wide], traceable=True),
        Implementation("chunked", passes=WORDS["chunked"]),
        Implementation("torch", function=lambda words: (reference.embed_text(words),)),
    ],
    size=Size("numbers", lambda words: math.prod(words.shape)),
    export=OpSpec("MmfuseEmbedText", launches=_shift_apart),
    example=lambda x, **how: embed_text(torch.zeros(1, len(x), dtype=torch.int64, device=x.device), x, **how),
)


def embed_text(
    ids: Tensor,
    table: Tensor,
    *,
    position: Tensor | None = None,
    position_offset: int = 0,
    type_embed: Tensor | None = None,
    scale: float = 1.0,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    padding_idx: int | None = None,
    pad_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Token embeddings with position, type, LayerNorm and padding, in one pass: LN(scale E[id] + P[l + offset] + type).

    CLIP and ImageBind: position alone; BERT: position, type 0, norm; BEiT-3: position_offset=2, pad_mask.

    Args:
        ids: int64 or int32 [B, L].
        table: E [V, D], float16, bfloat16, float32 or float64; the result has its dtype.
        position: P [at least L + position_offset, D], same dtype; row l + position_offset belongs to token l.
        type_embed: [D], same dtype, added to every token.
        scale: factor of the embeddings, e.g. sqrt(D).
        norm: (weight [D] or None, bias [D] or None, eps) of a LayerNorm, None for none.
        padding_idx: the row of E that gets no gradient, as in `torch.nn.Embedding`.
        pad_mask: bool [B, L]: the result of a token is 0 where it is set, and nothing gets a gradient from there.

    Returns:
        [B, L, D].

    Deterministic: gradients of E are summed over sorted ids in a fixed order, without atomics. Sums and statistics in
    float32 (float64 for float64), one rounding at the store. The backward computes x again: no [B, L, D] is kept.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. An id out of range raises on a CPU; on a
            GPU it gives a row of NaN, and in plain torch a device-side assertion.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    words = words_of(ids, table, position, position_offset, padding_idx, pad_mask, type_embed, scale, norm)
    return EMBED_TEXT(words, backend=backend)[0]


def words_of(
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    position_offset: int,
    padding_idx: int | None,
    pad_mask: Tensor | None,
    type_embed: Tensor | None = None,
    scale: float = 1.0,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Words:
    """The arguments, checked."""
    check("table", table, ("V", "D"))
    check("ids", ids, ("B", "L"), "", (torch.int64, torch.int32), ("table", table))
    v, d = table.shape
    if d == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected at least one feature")
    ids = cast(ids, torch.int64).contiguous()
    check_range("ids", ids, v, "the rows of table")
    length = ids.shape[1]
    require_integer("position_offset", position_offset)
    if position is not None:
        check("position", position, ("P", d), " as table has features", table.dtype, ("table", table))
        if position_offset < 0 or position.shape[0] < length + position_offset:
            raise ValueError(
                f"position has {position.shape[0]} rows, expected at least {length} + position_offset {position_offset}"
            )
        position = position.narrow(0, position_offset, length)
    gamma, beta, eps = (None, None, None) if norm is None else norm_of(norm)
    for name, t in (("type_embed", type_embed), ("norm's weight", gamma), ("norm's bias", beta)):
        if t is not None:
            check(name, t, (d,), " as table has features", table.dtype, ("table", table))
    if padding_idx is not None:
        require_integer("padding_idx", padding_idx)
    if padding_idx is not None and not 0 <= padding_idx < v:
        raise ValueError(f"padding_idx is {padding_idx}, expected 0 <= padding_idx < {v}, the rows of table")
    if pad_mask is not None:
        check("pad_mask", pad_mask, ids.shape, " as ids", torch.bool, ("table", table))
    return Words(ids, table, position, type_embed, gamma, beta, pad_mask, real("scale", scale), eps, padding_idx)
