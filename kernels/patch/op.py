"""The public function of patch embedding: argument checks, autograd, choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter, triton_missing
from mmfuse.kernels.contrastive.backends import (
    compiled_reasons,
    no_reason,
    reasons_against_chunked,
    reasons_against_triton,
)
from mmfuse.kernels.patch import blocked, reference
from mmfuse.kernels.patch.arguments import Norm, channel_values, check_source, norm, vector
from mmfuse.kernels.patch.stem import DIFFERENTIABLE, Stem

# --- registration ---------------------------------------------------------------------------------------------------


def passes(backend: str) -> Any:
    """`forward_into` and `backward_from` of a backend."""
    if backend in ("triton", "cuda"):
        from mmfuse.kernels.patch import kernel

        return kernel.passes(backend)
    tile = blocked.TorchTile if backend == "chunked" else blocked.compiled_tile(torch.ops.mmfuse_cpu)
    return SimpleNamespace(
        forward_into=partial(blocked.forward_into, tile), backward_from=partial(blocked.backward_from, tile)
    )


def _fwd(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stem_weight: Tensor | None,
    stem_bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    prefix_position: Tensor | None,
    mask_token: Tensor | None,
    type_embed: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    mask: Tensor | None,
    ids_keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    stride: Sequence[int],
    layout: str,
    padding: str,
    stem_eps: float,
    pre_eps: float,
    compute: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    stem = Stem.of(locals())
    b, r, n = stem.shape()
    out = torch.empty(b, r + n, stem.weight.shape[0], dtype=stem.dtype, device=stem.pixels.device)
    passes(backend).forward_into(out, 0, stem)
    return out


def _fwd_fake(*args):  # type: ignore[no-untyped-def]
    stem = Stem.of(dict(zip(Stem._fields, args, strict=False)))
    b, r, n = stem.shape()
    return stem.weight.new_empty((b, r + n, stem.weight.shape[0]), dtype=stem.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:16])
    ctx.options = inputs[16:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    grads = patch_bwd(g, *ctx.saved_tensors, *ctx.options, needs)
    return (*(d if need else None for d, need in zip(grads, needs, strict=True)), *[None] * (24 - DIFFERENTIABLE))


def _bwd(
    g: Tensor,
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stem_weight: Tensor | None,
    stem_bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    prefix_position: Tensor | None,
    mask_token: Tensor | None,
    type_embed: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    mask: Tensor | None,
    ids_keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    stride: Sequence[int],
    layout: str,
    padding: str,
    stem_eps: float,
    pre_eps: float,
    compute: torch.dtype,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    stem = Stem.of(locals())
    grads = passes(backend).backward_from(g, stem, needs)
    return [g.new_empty(0) if d is None else d for d in grads]


def _bwd_fake(g, *args):  # type: ignore[no-untyped-def]
    return [
        torch.empty_like(given, memory_format=torch.contiguous_format) if need else g.new_empty(0)
        for given, need in zip(args, args[-1], strict=False)
    ][:DIFFERENTIABLE]


patch_bwd = register("patch_bwd", _bwd, _bwd_fake)
patch_fwd = register("patch_fwd", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _fused(backend: str, stem: Stem) -> Tensor:
    steps = [] if stem.stride is None else list(stem.stride)
    return patch_fwd(*stem[:16], steps, *stem[17:], backend)


# what an implementation is chosen by: pixels, weight, and for a call the dtype of its products and their number


def _reasons_against_cuda(pixels: Tensor, weight: Tensor, *_: object) -> list[str]:
    """The compiled part gathers the patches, of bytes; the rest is as in triton."""
    why = compiled_reasons("cuda", weight)
    if pixels.dtype != torch.uint8:
        why.append(f"pixels has dtype {pixels.dtype}, the compiled part gathers uint8")
    return why + ([missing] if (missing := triton_missing()) else [])


def _reasons_against_triton(pixels: Tensor, weight: Tensor, *_: object) -> list[str]:
    return reasons_against_triton(weight)


def _reasons_against_cpu(pixels: Tensor, weight: Tensor, *_: object) -> list[str]:
    return compiled_reasons("cpu", weight)


# on a CPU, eager is faster for fewer than this many multiplications: folding the weight and reading it again are no
# longer small beside the product; and it multiplies in bfloat16, which newer processors do at twice the speed. Measured
# on 2 cores with AVX-512 BF16
_EAGER_PRODUCTS = {"cpu": 400_000_000, "chunked": 2_000_000_000}


def _aside(
    backend: str, pixels: Tensor, weight: Tensor, compute: torch.dtype | None = None, products: int | None = None
) -> list[str]:
    if pixels.device.type != "cpu":
        return []
    compute = compute or weight.dtype
    if compute == torch.bfloat16:
        return ["eager multiplies bfloat16 at twice the speed"]
    products, few = pixels.numel() * weight.shape[0] if products is None else products, _EAGER_PRODUCTS[backend]
    # a dynamic batch is not worth a graph for each side
    if not isinstance(products, int) or compute == torch.float16 or products >= few:
        return []
    return [f"eager is faster for less than {few // 1_000_000} million products"]  # torch.compile knows no {:g}


PATCH_EMBED = Op(
    "patch_embed",
    [
        Impl("cuda", partial(_fused, "cuda"), _reasons_against_cuda),
        Impl("triton", partial(_fused, "triton"), _reasons_against_triton, only_named_in_the_interpreter),
        Impl("cpu", partial(_fused, "cpu"), _reasons_against_cpu, partial(_aside, "cpu")),
        Impl("chunked", partial(_fused, "chunked"), reasons_against_chunked, partial(_aside, "chunked")),
        Impl("torch", reference.patch_embed, no_reason),
    ],
    # images of 16 x 16 patches, one patch for each row of features
    example=lambda features: (
        torch.empty(1, 3, 16, 16 * len(features), dtype=torch.uint8, device=features.device),
        features.new_empty(features.shape[1], 3, 16, 16),
    ),
)


# --- the public function --------------------------------------------------------------------------------------------


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] | None = None,
    layout: Literal["nchw", "nhwc", "ntchw", "patches"] = "nchw",
    mean: Any = None,
    std: Any = None,
    stem_norm: Norm | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    prefix_position: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    ids_keep: Tensor | None = None,
    type_embed: Tensor | None = None,
    pre_norm: Norm | None = None,
    padding: Literal["error", "zero"] = "error",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pixels to the tokens of a vision transformer: one product, written where the encoder reads.

    product + bias -> stem_norm -> mask_token -> + position -> prefix rows in front -> + type_embed -> pre_norm

    Args:
        pixels: uint8, float16, bfloat16, float32 or float64, any strides (a crop is not copied). Layout "nchw" is
            [B, C, H, W], or [B, C, T, H, W] and [B, C, L] as the weight has dimensions; "nhwc" [B, H, W, C],
            [B, T, H, W, C] or [B, L, C]; "ntchw" [B, T, C, H, W]; "patches" [B, N, K] in the order of the weight's
            flattening.
        weight: [D, C, P, P'], [D, C, t, P, P'] or [D, C, k] of a convolution, or [D, K] of a linear layer with layout
            "patches". An image without T under a temporal weight is a still: every frame is the image, and the
            temporal slices are summed first.
        bias: [D], or None.
        stride: of the patches, an int or one for each dimension; by default the kernel's size.
        mean, std: [C] numbers or tensors (a number: for all channels). uint8 pixels enter as (x / 255 - mean) / std,
            others as (x - mean) / std; uint8 with neither enters as x. With layout "patches": [K], or [C] where K is C
            blocks.
        stem_norm: (weight [D], bias [D] or None, eps), LayerNorm of the patch tokens.
        prefix: [R, D], class and register tokens in front.
        position: [N, D], added to the patch tokens. prefix_position: [R, D], added to the prefix.
        mask: bool [B, N]; the token of a masked patch is `mask_token` [D] (before the position), by selection: not even
            a NaN in its pixels is seen.
        ids_keep: int64 [B, M], the patches to compute, in this order; position and mask go with them.
        type_embed: [D], added to every row.
        pre_norm: as stem_norm, of every row at the end.
        padding: "error": a kernel that tiles the pixels must fit; under an overlapping or spaced stride what is left
            over at the end is dropped, as a convolution does. "zero": the end is filled with zeros (after the
            normalisation) so that no pixel is dropped.
        dtype: of the result; by default the weight's, or that of autocast where it is on.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, R + N, D] (M for N with ids_keep), rounded once.

    The mean is folded into the bias of the rounded, scaled weight, so that pixels enter the product exactly; 16-bit
    weights multiply uint8 pixels in float16 with a power of two for each row, whatever their own range.

    Deterministic: two runs are equal bitwise. Differentiable once in weight, bias, norms, prefix, position,
    prefix_position, mask_token, type_embed and floating-point pixels.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. ids_keep out of range is a ValueError on
            a CPU and a device-side assertion on a GPU, as in torch's own indexing.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    stem = stem_of(
        pixels,
        weight,
        bias,
        stride=stride,
        layout=layout,
        mean=mean,
        std=std,
        stem_norm=stem_norm,
        prefix=prefix,
        position=position,
        prefix_position=prefix_position,
        mask=mask,
        mask_token=mask_token,
        ids_keep=ids_keep,
        type_embed=type_embed,
        pre_norm=pre_norm,
        padding=padding,
        dtype=dtype,
    )
    return _select(stem, backend).fn(stem)


def _select(stem: Stem, backend: str | None) -> Impl:
    b, _, n = stem.shape()
    return PATCH_EMBED.select(stem.pixels, stem.weight, stem.compute, b * n * stem.weight.numel(), backend=backend)


def stem_of(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] | None = None,
    layout: Literal["nchw", "nhwc", "ntchw", "patches"] = "nchw",
    mean: Any = None,
    std: Any = None,
    stem_norm: Norm | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    prefix_position: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    ids_keep: Tensor | None = None,
    type_embed: Tensor | None = None,
    pre_norm: Norm | None = None,
    padding: Literal["error", "zero"] = "error",
    dtype: torch.dtype | None = None,
) -> Stem:
    """The checked arguments of `patch_embed`, for `forward_into` and `backward_from`."""
    g, channels, _ = check_source(pixels, weight, stride, layout, padding)
    for name, t in (("prefix", prefix), ("mask", mask), ("ids_keep", ids_keep)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} is {type(t).__name__}, expected a tensor")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point dtype")
    b, n, d = pixels.shape[0], g.patches, weight.shape[0]
    mean = channel_values("mean", mean, channels, layout, pixels)
    std = channel_values("std", std, channels, layout, pixels)
    bias = vector("bias", bias, (d,), pixels, "[D]")
    stem_weight, stem_bias, stem_eps = norm("stem_norm", stem_norm, weight)
    pre_weight, pre_bias, pre_eps = norm("pre_norm", pre_norm, weight)
    if prefix is not None and prefix.dim() == 2:
        prefix = vector("prefix", prefix, (prefix.shape[0], d), pixels, "[R, D]")
    elif prefix is not None:
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, expected [R, {d}]")
    position = vector("position", position, (n, d), pixels, "[N, D], one row for each patch")
    if prefix_position is not None and prefix is None:
        raise ValueError("prefix_position is given without prefix, expected both")
    if prefix is not None:
        prefix_position = vector("prefix_position", prefix_position, (prefix.shape[0], d), pixels, "[R, D] as prefix")
    if (mask is None) != (mask_token is None):
        raise ValueError("mask and mask_token go together, expected both or neither")
    mask_token = vector("mask_token", mask_token, (d,), pixels, "[D]")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool")
        if mask.shape != (b, n):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected [{b}, {n}]: one for each patch")
        if mask.device != pixels.device:
            raise ValueError(f"mask is on {mask.device}, expected {pixels.device} as pixels")
    if ids_keep is not None:
        if ids_keep.dtype != torch.int64:
            raise TypeError(f"ids_keep has dtype {ids_keep.dtype}, expected int64")
        if ids_keep.dim() != 2 or ids_keep.shape[0] != b:
            raise ValueError(f"ids_keep has shape {tuple(ids_keep.shape)}, expected [{b}, M]")
        if ids_keep.device != pixels.device:
            raise ValueError(f"ids_keep is on {ids_keep.device}, expected {pixels.device} as pixels")
    type_embed = vector("type_embed", type_embed, (d,), pixels, "[D]")
    kind = pixels.device.type
    compute = weight.dtype
    if torch.is_autocast_enabled(kind) and compute != torch.float64:
        compute = torch.get_autocast_dtype(kind)
    stride = (stride,) * (weight.dim() - 2) if isinstance(stride, int) else stride
    dtype = dtype or compute
    return Stem.of(locals())


# --- for operators that write into a larger buffer ------------------------------------------------------------------


def _blocks(stem: Stem, backend: str | None) -> Any:
    name = _select(stem, backend).name
    return passes("chunked" if name == "torch" else name)


def forward_into(out: Tensor, offset: int, stem: Stem, *, backend: str | None = None) -> None:
    """Write the tokens of `stem` into out[:, offset : offset + R + N], outside of autograd."""
    _blocks(stem, backend).forward_into(out, offset, stem)


def backward_from(grad: Tensor, stem: Stem, names: Sequence[str], *, backend: str | None = None) -> dict[str, Tensor]:
    """The gradients of the stem's tensors of these names, from that of its rows [B, R + N, D]."""
    needs = [name in names for name in Stem._fields[:DIFFERENTIABLE]]
    grads = _blocks(stem, backend).backward_from(grad, stem, needs)
    return {name: d for name, d in zip(Stem._fields, grads, strict=False) if d is not None}
