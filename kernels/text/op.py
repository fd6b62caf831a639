"""The public function of text embedding: argument checks, autograd, and choice of implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.arguments import first_outside
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter, triton_reasons
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.contrastive.backends import DTYPES, no_reason
from mmfuse.kernels.text import blocked, reference

# the widest row that a program of the GPU's kernels holds
_WIDEST = 16384
# measured on 2 cores
_EAGER_ELEMENTS = 1 << 20


def passes(backend: str) -> Any:
    if backend == "triton":
        from mmfuse.kernels.text import kernel

        return kernel
    return blocked.TorchPasses


def _fwd(
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    type_embed: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    pad_mask: Tensor | None,
    scale: float,
    eps: float | None,
    padding_idx: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=table.device)
    given = (ids, table, position, type_embed, gamma, beta, pad_mask, scale, eps)
    return out, *blocked.forward(passes(backend), *given, out)


def _fwd_fake(ids, table, *given):  # type: ignore[no-untyped-def]
    row = table.new_empty(0 if given[-3] is None else ids.shape, dtype=accumulation_dtype(table.dtype))
    return table.new_empty(*ids.shape, table.shape[1]), row, torch.empty_like(row)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, eps, padding_idx, ctx.backend = inputs
    ctx.options = (scale, eps is not None, padding_idx)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[1:6])
    grads = embed_text_bwd(g, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return None, *(d if need else None for d, need in zip(grads, needs, strict=True)), *[None] * 5


def _bwd(
    g: Tensor,
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    type_embed: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    pad_mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    normed: bool,
    padding_idx: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (ids, table, position, type_embed, gamma, beta, pad_mask, mean, rstd)
    return blocked.backward(passes(backend), g, *given, scale, normed, padding_idx, needs)


def _bwd_fake(g, ids, *args):  # type: ignore[no-untyped-def]
    like, needs = args[:5], args[-2]
    return tuple(
        g.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(like, needs, strict=True)
    )


embed_text_bwd = register("embed_text_bwd", _bwd, _bwd_fake)
embed_text_fwd = register("embed_text_fwd", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _fused(backend: str, *given: Any) -> Tensor:
    return embed_text_fwd(*given, backend)[0]


def reasons_against_triton(ids: Tensor, table: Tensor, *_: Any) -> list[str]:
    wide = table.shape[1] > _WIDEST
    why = [f"D is {table.shape[1]}: a program holds rows of at most {_WIDEST}"] if wide else []
    return triton_reasons(table, DTYPES) + why


def reasons_against_chunked(ids: Tensor, table: Tensor, *_: Any) -> list[str]:
    return [] if table.device.type in ("cpu", "cuda") else [f"device is {table.device.type}"]


def _small(ids: Tensor, table: Tensor, *_: Any) -> list[str]:
    numbers = ids.numel() * table.shape[1]
    # a dynamic batch is not worth a graph for each side
    few = table.device.type == "cpu" and isinstance(numbers, int) and numbers < _EAGER_ELEMENTS
    return [f"eager is faster for less than {_EAGER_ELEMENTS} numbers on a CPU"] if few else []


EMBED_TEXT = Op(
    "embed_text",
    [
        Impl("triton", partial(_fused, "triton"), reasons_against_triton, only_named_in_the_interpreter),
        Impl("chunked", partial(_fused, "chunked"), reasons_against_chunked, _small),
        Impl("torch", reference.embed_text, no_reason),
    ],
    example=lambda features: (
        torch.zeros(1, len(features), dtype=torch.int64, device=features.device),
        features,
        *[None] * 5,
        1.0,
        None,
        None,
    ),
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
    given = checked(ids, table, position, position_offset, type_embed, norm, padding_idx, pad_mask)
    ids, position, gamma, beta, eps = given
    arguments = (ids, table, position, type_embed, gamma, beta, pad_mask, float(scale), eps, padding_idx)
    return EMBED_TEXT.select(*arguments, backend=backend).fn(*arguments)


def checked(
    ids: Tensor,
    table: Tensor,
    position: Tensor | None,
    position_offset: int,
    type_embed: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    padding_idx: int | None,
    pad_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float | None]:
    """(ids int64, position [L, D], gamma, beta, eps)."""
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"table is {getattr(table, 'dtype', type(table).__name__)}, expected floating-point [V, D]")
    if table.dim() != 2 or table.shape[1] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected [V, D]")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids is {getattr(ids, 'dtype', type(ids).__name__)}, expected int64 or int32 [B, L]")
    if ids.dim() != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}, expected [B, L]")
    if ids.device != table.device:
        raise ValueError(f"ids is on {ids.device}, expected {table.device} as table")
    v, d = table.shape
    ids = ids.to(torch.int64).contiguous()
    if (wrong := first_outside(ids, v)) is not None:
        raise ValueError(f"ids has {wrong}, expected 0 <= id < {v}, the rows of table")
    length = ids.shape[1]
    if position is not None:
        if position.dim() != 2 or position.shape[1] != d:
            raise ValueError(f"position has shape {tuple(position.shape)}, expected [P, {d}] as table has features")
        if position_offset < 0 or position.shape[0] < length + position_offset:
            raise ValueError(
                f"position has {position.shape[0]} rows, expected at least {length} + position_offset {position_offset}"
            )
        position = position[position_offset : position_offset + length]
    gamma = beta = eps = None
    if norm is not None:
        try:
            gamma, beta, eps = norm
        except (TypeError, ValueError):
            raise ValueError(f"norm is {norm!r}, expected (weight [D] or None, bias [D] or None, eps)") from None
        eps = float(eps)
    named = (("type_embed", type_embed), ("norm's weight", gamma), ("norm's bias", beta))
    for name, t in named:
        if t is not None and t.shape != (d,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected [{d}] as table has features")
    for name, t in (("position", position), *named):
        if t is not None and t.dtype != table.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {table.dtype} as table")
        if t is not None and t.device != table.device:
            raise ValueError(f"{name} is on {t.device}, expected {table.device} as table")
    if padding_idx is not None and not 0 <= padding_idx < v:
        raise ValueError(f"padding_idx is {padding_idx}, expected 0 <= padding_idx < {v}, the rows of table")
    if pad_mask is not None and (pad_mask.dtype != torch.bool or pad_mask.shape != ids.shape):
        raise ValueError(f"pad_mask is {pad_mask.dtype} {tuple(pad_mask.shape)}, expected bool {tuple(ids.shape)}")
    return ids, position, gamma, beta, eps
