"""The public function of patch embedding: argument checks and declaration."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import autocast_dtype, check
from mmfuse.kernels._runtime.device import triton_missing
from mmfuse.kernels._runtime.dispatch import exported_by, forced_backend
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels.patch import blocked, reference
from mmfuse.kernels.patch.arguments import Norm, channel_values, check_dtype, check_source, norm
from mmfuse.kernels.patch.stem import DIFFERENTIABLE, Stem


def _forward(passes: Any, stem: Stem) -> Tensor:
    out = _fake(stem)
    passes.forward_into(out, 0, stem)
    return out


def _fake(stem: Stem) -> Tensor:
    b, r, n = stem.shape
    return stem.weight.new_empty((b, r + n, stem.weight.shape[0]), dtype=stem.dtype)


def _backward(passes: Any, g: Tensor, stem: Stem, needs: Any) -> dict[str, Tensor]:
    wanted = [name for name, need in needs._asdict().items() if need]
    return passes.backward_from(g, stem, wanted)


def _kernel(name: str) -> Any:
    from mmfuse.kernels.patch import kernel

    return kernel.passes(name)


def _blocks(tile: Any) -> Any:
    functions: dict[str, Any] = {"forward_into": blocked.forward_into, "backward_from": blocked.backward_from}
    return SimpleNamespace(**{name: partial(function, tile()) for name, function in functions.items()})


def _no_bytes(stem: Stem) -> str | None:
    """The compiled part gathers the patches; the rest is as in triton."""
    if stem.pixels.dtype != torch.uint8:
        return f"pixels has dtype {stem.pixels.dtype}, the compiled part gathers uint8"
    return triton_missing()


def _kind(compute: torch.dtype, bare: bool) -> str:
    return dtype_name(compute) + "-bare" * bare


def steps_aside(pixels: Any, weight: Tensor, bare: bool = False) -> bool:
    """Whether `patch_embed` of these images would run plain torch: a look of a few microseconds.

    Args:
        pixels, weight: as `patch_embed` takes them.
        bare: nothing is added to the product, nor is it normalised.

    Not where an implementation is named or a graph exported, nor for bytes, which a library would have to normalise.
    """
    # flat: after a convolution every function that is called has left the cache
    if not isinstance(pixels, Tensor) or not pixels.is_cpu or not pixels.is_floating_point():
        return False
    if forced_backend() is not None or exported_by() is not None:
        return False
    compute = autocast_dtype(weight) or weight.dtype
    products = pixels.numel() * weight.shape[0]  # of patches that tile the images
    name = "cpu" if load("cpu") is None else "chunked"
    return PATCH_EMBED.below(name, pixels.device, products, _kind(compute, bare)) is not None


def _example(x: Tensor, **how: Any) -> Tensor:
    """Images of 16 x 16 patches, one patch for each row of features."""
    pixels = torch.zeros(1, 3, 16, 16 * len(x), dtype=torch.uint8, device=x.device)
    return patch_embed(pixels, x.new_zeros(x.shape[1], 3, 16, 16), **how)


PATCH_EMBED = Operator(
    "patch_embed",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=DIFFERENTIABLE,
    on=lambda stem: stem.weight,
    implementations=[
        Implementation("cuda", passes=Deferred(partial(_kernel, "cuda")), against=[_no_bytes]),
        Implementation("triton", passes=Deferred(partial(_kernel, "triton")), kernels=["mmfuse.kernels.patch.kernel"]),
        Implementation(
            "cpu",
            passes=Deferred(partial(_blocks, lambda: blocked.compiled_tile(torch.ops.mmfuse_cpu))),
        ),
        Implementation("chunked", passes=_blocks(lambda: blocked.TorchTile)),
        Implementation("torch", function=reference.patch_embed),
    ],
    # eager multiplies bfloat16 at twice the speed on newer processors
    size=Size("products", lambda stem: stem.products, kind=lambda stem: _kind(stem.compute, stem.bare)),
    example=_example,
    export=OpSpec("MmfusePatchEmbed"),
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
    pos_embed: Tensor | None = None,
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
        pos_embed: [R + N, D], in place of both.
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

    Deterministic: two runs are equal bitwise. Differentiable in weight, bias, norms, prefix, position,
    prefix_position, mask_token, type_embed and floating-point pixels.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. ids_keep out of range is a ValueError on
            a CPU and a device-side assertion on a GPU, as in torch's own indexing.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    stem = stem_of(
        pixels, weight, bias, stride=stride, layout=layout, mean=mean, std=std, stem_norm=stem_norm, prefix=prefix,
        position=position, prefix_position=prefix_position, pos_embed=pos_embed, mask=mask, mask_token=mask_token,
        ids_keep=ids_keep, type_embed=type_embed, pre_norm=pre_norm, padding=padding, dtype=dtype,
    )  # fmt: skip
    return PATCH_EMBED(stem, backend=backend)


def stem_of(
    pixels: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int | tuple[int, ...] | None = None,
    layout: str = "nchw", mean: Any = None, std: Any = None, stem_norm: Norm | None = None,
    prefix: Tensor | None = None, position: Tensor | None = None, prefix_position: Tensor | None = None,
    pos_embed: Tensor | None = None, mask: Tensor | None = None, mask_token: Tensor | None = None,
    ids_keep: Tensor | None = None, type_embed: Tensor | None = None, pre_norm: Norm | None = None,
    padding: str = "error", dtype: torch.dtype | None = None,
) -> Stem:  # fmt: skip
    """The checked arguments of `patch_embed`."""
    channels = check_source(pixels, weight, stride, layout, padding)
    check_dtype(dtype)
    b, d, like = pixels.shape[0], weight.shape[0], ("pixels", pixels)
    if prefix is not None:
        check("prefix", prefix, ("R", d), like=like)
    if mask is not None:
        check("mask", mask, (b, "N"), ": one for each patch", torch.bool, like)
    if ids_keep is not None:
        check("ids_keep", ids_keep, (b, "M"), "", torch.int64, like)
    mean = channel_values("mean", mean, channels, layout, pixels)
    std = channel_values("std", std, channels, layout, pixels)
    stem_weight, stem_bias, stem_eps = norm("stem_norm", stem_norm, weight)
    pre_weight, pre_bias, pre_eps = norm("pre_norm", pre_norm, weight)
    compute = autocast_dtype(weight) or weight.dtype
    stride = (stride,) * (weight.dim() - 2) if isinstance(stride, int) else stride
    for name, t in (("bias", bias), ("mask_token", mask_token), ("type_embed", type_embed)):
        if t is not None:
            check(name, t, (d,), ": [D]", like=like)
    vectors = (bias, stem_weight, stem_bias, mask_token, type_embed, pre_weight, pre_bias, mean, std)
    # the kernels read a vector without its stride
    dense = [None if t is None else t.contiguous() for t in vectors]
    bias_, stem_weight, stem_bias, token_, type_, pre_weight, pre_bias, mean, std = dense
    stem = Stem(
        pixels, weight, bias_, stem_weight, stem_bias, prefix, position, prefix_position, token_, type_,
        pre_weight, pre_bias, mask, ids_keep, mean, std, stride, layout, padding, stem_eps, pre_eps, compute,
        dtype or compute,
    )  # fmt: skip
    n, r = stem.geometry.patches, 0 if prefix is None else prefix.shape[0]
    if prefix_position is not None and prefix is None:
        raise ValueError("prefix_position is given without prefix, expected both")
    if pos_embed is not None and not (position is prefix_position is None):
        raise ValueError("pos_embed is given with position or prefix_position, expected it in place of both")
    if (mask is None) != (mask_token is None):
        raise ValueError("mask and mask_token go together, expected both or neither")
    for name, t, shape, meaning in (
        ("position", position, (n, d), ": [N, D], one row for each patch"),
        ("prefix_position", prefix_position, (r, d), ": [R, D] as prefix"),
        ("pos_embed", pos_embed, (r + n, d), ": [R + N, D], one row for each of prefix and for each patch"),
    ):
        if t is not None:
            check(name, t, shape, meaning, like=like)
    if mask is not None and mask.shape[1] != n:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected [{b}, {n}]: one for each patch")
    if pos_embed is not None:
        stem.place(pos_embed)
    return stem
