"""BEiT-3's visual and textual tokens (Wang et al. 2022, arXiv:2208.10442) in one buffer.

    out[:, 0]         cls + A[offset]
    out[:, 1 : 1+N]   patches (mask_token where masked) + A[offset + 1 :]
    out[:, 1+N :]     E[id] + B[offset :],  0 where padded

The product of the patches and the gather of the words write their rows where the encoder reads them: no concatenation,
no split between the two position tables, no multiplication by a padding mask.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import PIXELS, check
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels.patch import PATCH_EMBED, Stem, stem_of
from mmfuse.kernels.text import blocked, reference
from mmfuse.kernels.text.blocked import Words
from mmfuse.kernels.text.op import WORDS, too_wide, words_of

_OF_PATCHES = ("pixels", "weight", "bias", "prefix", "position", "prefix_position", "mask_token")
_OF_WORDS = ("table", "text_position")


def _forward(passes: Any, stem: Stem, words: Words) -> Tensor:
    out, (_, r, n) = _fake(stem, words), stem.shape
    passes.patches.forward_into(out, 0, stem)
    passes.words.embedded(words, out[:, r + n :])
    return out


def _fake(stem: Stem, words: Words) -> Tensor:
    b, r, n = stem.shape
    _, length, d = words.shape
    return words.table.new_empty(b, r + n + length, d)


def _backward(passes: Any, g: Tensor, stem: Stem, words: Words, needs: Any) -> dict[str, Tensor]:
    _, r, n = stem.shape
    of_patches, of_words = ([name for name in names if getattr(needs, name)] for names in (_OF_PATCHES, _OF_WORDS))
    grads = passes.patches.backward_from(g[:, : r + n], stem, of_patches) if of_patches else {}
    return grads | blocked.backward(passes.words, g[:, r + n :], words, (), of_words)


def _reference(stem: Stem, words: Words) -> Tensor:
    tokens = PATCH_EMBED.implementations["torch"].function(stem)  # type: ignore[misc]
    return torch.cat([tokens, reference.embed_text(words)], dim=1)


def _of_patches(name: str, stem: Stem) -> str | None:
    return "; ".join(PATCH_EMBED.reasons_against(name, (stem,))) or None


def _implementation(name: str) -> Implementation:
    on_gpu = name in ("cuda", "triton")
    passes = SimpleNamespace(
        patches=PATCH_EMBED.implementations[name].passes, words=WORDS["triton" if on_gpu else "chunked"]
    )
    against: list[Any] = [partial(_of_patches, name), *([too_wide] if on_gpu else [])]
    kernels = [*PATCH_EMBED.implementations[name].kernels, WORDS["triton"].module] if name == "triton" else []
    return Implementation(name, passes=passes, against=against, kernels=kernels)


def _example(x: Tensor, **how: Any) -> Tensor:
    """A word beside each patch of 16 x 16."""
    pixels, ids = x.new_zeros(1, 3, 16, 16 * len(x)), torch.zeros(1, len(x), dtype=torch.int64, device=x.device)
    weight = x.new_zeros(x.shape[1], 3, 16, 16)
    return embed_pair(pixels, ids, weight=weight, position=x, table=x, text_position=x, position_offset=0, **how)


EMBED_PAIR = Operator(
    "embed_pair",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=(*_OF_PATCHES, *_OF_WORDS),
    on=lambda words: words.table,
    implementations=[
        *map(_implementation, ("cuda", "triton", "cpu", "chunked")),
        Implementation("torch", function=_reference),
    ],
    size=Size("products", lambda stem: stem.products, kind=lambda stem: dtype_name(stem.compute)),
    export=OpSpec("MmfuseEmbedPair"),
    example=_example,
)


def embed_pair(
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
    """The tokens that enter BEiT-3's encoder for an image and its text: class token, patches, words, with positions.

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

    Deterministic. Differentiable in everything that is floating point, but mean and std.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    check("pixels", pixels, ("B", "C", "H", "W"), dtype=PIXELS)
    check("ids", ids, (pixels.shape[0], "L"), " as pixels", (torch.int64, torch.int32), ("pixels", pixels))
    words = words_of(ids, table, text_position, position_offset, padding_idx, pad_mask)
    d = table.shape[1]
    check("weight", weight, (d, "C", "P", "P'"), " as table has features", like=("table", table))
    if cls_token is not None:
        check("cls_token", cls_token, (d,), " as table has features", like=("table", table))
    check("position", position, ("P", d), " as table has features", like=("table", table))
    masking: dict[str, Any] = {} if mask is None else {"mask": mask, "mask_token": mask_token}
    stem = stem_of(pixels, weight, bias, mean=mean, std=std, dtype=table.dtype, **masking)
    prefix = 0 if cls_token is None else 1
    rows = prefix + stem.shape[2]
    if position.shape[0] < position_offset + rows:
        least = f"expected at least {rows} rows + position_offset {position_offset}"
        raise ValueError(f"position has shape {tuple(position.shape)}, {least}")
    # all of it is itself, which has no gradient to put together
    used = position if len(position) == rows else position.narrow(0, position_offset, rows)
    # without a mask its token has a gradient all the same, of zeros
    stem.mask_token = mask_token
    stem.prefix = None if cls_token is None else cls_token.unsqueeze(0)
    stem.place(used)
    return EMBED_PAIR(stem, words, backend=backend)
    return EMBED_PAIR(stem, words, backend=backend)
