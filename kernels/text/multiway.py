"""BEiT-3's visual and textual tokens (Wang et al. 2022, arXiv:2208.10442) in one buffer.

    out[:, 0]         cls + A[offset]
    out[:, 1 : 1+N]   patches (mask_token where masked) + A[offset + 1 :]
    out[:, 1+N :]     E[id] + B[offset :],  0 where padded

The product of the patches and the gather of the words write their rows where the encoder reads them: no concatenation,
no split between the two position tables, no multiplication by a padding mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels.contrastive.backends import no_reason
from mmfuse.kernels.patch.op import PATCH_EMBED, backward_from, forward_into, stem_of
from mmfuse.kernels.patch.reference import patch_embed as patch_embed_reference
from mmfuse.kernels.patch.stem import Stem
from mmfuse.kernels.text import blocked, reference
from mmfuse.kernels.text.op import checked, passes, reasons_against_chunked, reasons_against_triton


def _stem(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    position: Tensor,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Stem:
    prefix = 0 if cls_token is None else 1
    rows = {"position": position[prefix:], "prefix_position": position[:prefix] if prefix else None}
    if cls_token is not None:
        rows["prefix"] = cls_token[None]
    if mask is not None:
        rows |= {"mask": mask, "mask_token": mask_token}
    return stem_of(pixels, weight, bias, mean=mean, std=std, dtype=dtype, **rows)  # type: ignore[arg-type]


def _fwd(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    position: Tensor,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ids: Tensor,
    table: Tensor,
    text_position: Tensor,
    pad_mask: Tensor | None,
    padding_idx: int | None,
    compute: torch.dtype,
    backend: str,
) -> Tensor:
    stem = _stem(pixels, weight, bias, cls_token, position, mask_token, mask, mean, std, table.dtype)
    stem = stem._replace(compute=compute)
    b, r, n = stem.shape()
    out = torch.empty(b, r + n + ids.shape[1], table.shape[1], dtype=table.dtype, device=table.device)
    forward_into(out, 0, stem, backend=backend)
    words = (ids, table, text_position, None, None, None, pad_mask, 1.0, None)
    blocked.forward(_words(backend), *words, out[:, r + n :])
    return out


def _words(backend: str) -> Any:
    return passes("triton" if backend in ("cuda", "triton") else "chunked")


def _fwd_fake(pixels, weight, bias, cls_token, position, *others):  # type: ignore[no-untyped-def]
    ids, table = others[4:6]
    return table.new_empty(ids.shape[0], position.shape[0] + ids.shape[1], table.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, padding_idx, compute, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (padding_idx, compute, backend)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [*needs[:6], *needs[10:12]]
    grads = multiway_bwd(g, *ctx.saved_tensors, *ctx.options, wanted)
    given = [d if need else None for d, need in zip(grads, wanted, strict=True)]
    return (*given[:6], *[None] * 4, *given[6:], *[None] * 4)


def _bwd(
    g: Tensor,
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    position: Tensor,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ids: Tensor,
    table: Tensor,
    text_position: Tensor,
    pad_mask: Tensor | None,
    padding_idx: int | None,
    compute: torch.dtype,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    stem = _stem(pixels, weight, bias, cls_token, position, mask_token, mask, mean, std, table.dtype)
    stem = stem._replace(compute=compute)
    names = {"pixels": needs[0], "weight": needs[1], "bias": needs[2], "prefix": needs[3], "position": needs[4]}
    names |= {"prefix_position": needs[4] and cls_token is not None, "mask_token": needs[5] and mask is not None}
    wanted = [name for name, need in names.items() if need]
    seen = position.shape[0]
    found = backward_from(g[:, :seen], stem, wanted, backend=backend) if wanted else {}
    rows = [found[name] for name in ("prefix_position", "position") if name in found]
    of_mask = found.get("mask_token")
    if needs[5] and of_mask is None and mask_token is not None:  # without a mask
        of_mask = torch.zeros_like(mask_token)
    of_cls = found["prefix"][0].clone() if needs[3] else None
    of_rows = torch.cat(rows) if rows else None
    of_vision = (*map(found.get, ("pixels", "weight", "bias")), of_cls, of_rows, of_mask)
    grads = [g.new_empty(0) if t is None else t for t in of_vision]
    unused = table.new_empty(0)
    words = (ids, table, text_position, None, None, None, pad_mask, unused, unused)
    needed = [needs[6], needs[7], False, False, False]
    grads += blocked.backward(_words(backend), g[:, seen:], *words, 1.0, False, padding_idx, needed)[:2]
    return grads


def _bwd_fake(g, *args):  # type: ignore[no-untyped-def]
    given, needs = [*args[:6], *args[10:12]], args[-1]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else g.new_empty(0)
        for t, need in zip(given, needs, strict=True)
    ]


multiway_bwd = register("multiway_bwd", _bwd, _bwd_fake)
multiway_fwd = register("multiway_fwd", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _reference(*given: Any) -> Tensor:
    pixels, weight, bias, cls_token, position, mask_token, mask, mean, std, *others = given
    ids, table, text_position, pad_mask, padding_idx, compute = others
    stem = _stem(pixels, weight, bias, cls_token, position, mask_token, mask, mean, std, table.dtype)
    tokens = patch_embed_reference(stem._replace(compute=compute))
    words = reference.embed_text(ids, table, text_position, None, None, None, pad_mask, 1.0, None, padding_idx)
    return torch.cat([tokens, words], dim=1)


def _fused(backend: str, *given: Any) -> Tensor:
    return multiway_fwd(*given, backend)


def _reasons_against(backend: str, of_words: Callable[..., list[str]], *given: Any) -> list[str]:
    pixels, weight, ids, table = given[0], given[1], given[9], given[10]
    of_patches = next(i for i in PATCH_EMBED.implementations if i.name == backend).reasons_against(pixels, weight)
    return list(dict.fromkeys(of_patches + of_words(ids, table)))


def _example(features: Tensor) -> tuple[Any, ...]:
    pixels = torch.empty(1, 3, 16, 16 * len(features), dtype=torch.uint8, device=features.device)
    ids = torch.zeros(1, len(features), dtype=torch.int64, device=features.device)
    weight = features.new_empty(features.shape[1], 3, 16, 16)
    return (pixels, weight, *[None] * 2, features, *[None] * 4, ids, features, features, None, None, features.dtype)


MULTIWAY_TOKENS = Op(
    "multiway_tokens",
    [
        Impl("cuda", partial(_fused, "cuda"), partial(_reasons_against, "cuda", reasons_against_triton)),
        Impl(
            "triton",
            partial(_fused, "triton"),
            partial(_reasons_against, "triton", reasons_against_triton),
            only_named_in_the_interpreter,
        ),
        Impl("cpu", partial(_fused, "cpu"), partial(_reasons_against, "cpu", reasons_against_chunked)),
        Impl("chunked", partial(_fused, "chunked"), partial(_reasons_against, "chunked", reasons_against_chunked)),
        Impl("torch", _reference, no_reason),
    ],
    example=_example,
)


def multiway_tokens(
    pixels: Tensor,
    ids: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    cls_token: Tensor | None = None,
    position: Tensor,
    table: Tensor,
    text_position: Tensor,
    position_offset: int = 2,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pad_mask: Tensor | None = None,
    padding_idx: int | None = None,
    mean: Any = None,
    std: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The tokens that enter BEiT-3's encoder for a picture and its text: class token, patches, words, with positions.

    As torchscale's `VisionEmbedding`, `TextEmbedding` and two `PositionalEmbedding`s, with what its encoder does next
    (embedding scale 1, no LayerNorm, padded words to 0).

    Args:
        pixels: [B, C, H, W], uint8 or floating point. mean, std: of its normalisation, as in `patch_embed`.
        ids: int64 or int32 [B, L].
        weight: [D, C, P, P'] of the patches' convolution; bias: [D] or None.
        cls_token: [D], or None for none.
        position: A [at least offset + 1 + N, D], of the class token and the patches.
        table: E [V, D] of the words, which gives the dtype of the result; text_position: B [at least offset + L, D].
        position_offset: the first row of both tables that is used; 2, as fairseq counts.
        mask: bool [B, N] of the patches that `mask_token` [D] stands for.
        pad_mask: bool [B, L], the words that are padding: their tokens are 0.
        padding_idx: the row of E that gets no gradient.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, 1 + N + L, D] (N + L without a class token), rounded once.

    Deterministic. Differentiable once in everything that is floating point, but mean and std.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] != pixels.shape[0]:
        raise ValueError(f"ids has {ids.shape[0]} rows, expected {pixels.shape[0]} as pixels")
    ids, words, *_ = checked(ids, table, text_position, position_offset, None, None, padding_idx, pad_mask)
    if cls_token is not None and cls_token.shape != weight.shape[:1]:
        raise ValueError(f"cls_token has shape {tuple(cls_token.shape)}, expected [{weight.shape[0]}]")
    if weight.shape[0] != table.shape[1]:
        raise ValueError(f"weight has {weight.shape[0]} features, expected {table.shape[1]} as table")
    masking: dict[str, Any] = {} if mask is None else {"mask": mask, "mask_token": mask_token}
    stem = stem_of(pixels, weight, bias, mean=mean, std=std, dtype=table.dtype, **masking)
    rows = (cls_token is not None) + stem.shape()[2]
    if position.dim() != 2 or position_offset < 0 or position.shape[0] < position_offset + rows:
        least = f"expected at least {rows} rows + position_offset {position_offset}"
        raise ValueError(f"position has shape {tuple(position.shape)}, {least}")
    seen = position[position_offset : position_offset + rows]
    vision = (pixels, weight, bias, cls_token, seen, mask_token, mask, stem.mean, stem.std)
    given = (*vision, ids, table, words, pad_mask, padding_idx, stem.compute)
    return MULTIWAY_TOKENS.select(*given, backend=backend).fn(*given)
