"""The public functions of ragged batches: argument checks, declaration, packing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size, products
from mmfuse.kernels._runtime.arguments import (
    PIXELS,
    autocast_dtype,
    check,
    constant,
    one_of,
    outside_a_trace,
    require_integer,
)
from mmfuse.kernels._runtime.dtypes import cast, dtype_name
from mmfuse.kernels.patch.arguments import check_dtype, vector
from mmfuse.kernels.patch.positions.op import check_factors, check_table
from mmfuse.kernels.patch.ragged import blocked, reference
from mmfuse.kernels.patch.ragged.layout import Places, layout, layout_of
from mmfuse.kernels.patch.ragged.stem import fold, weight_grad


class PackedTokens(NamedTuple):
    """What `patch_embed_packed` returns."""

    tokens: Tensor
    cu_seqlens: Tensor
    ids: Tensor


_MERGES = {"raster": 1, "merge2": 2}


def _forward(
    passes: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    places: Places,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    return passes.forward(x, fold(x, weight, bias, mean, std, compute), table, places, dtype)


def _backward(
    passes: Any,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    places: Places,
    compute: torch.dtype,
    needs: Any,
) -> dict[str, Tensor]:
    f, source, grads = fold(x, weight, bias, mean, std, compute), places.source, {}
    if needs.weight or needs.bias:
        product, total = blocked.backward(g, x, f.subtract, source, compute, needs.weight)
        if needs.weight:
            grads["weight"] = weight_grad(f, product, total).to(weight.dtype)
        grads["bias"] = total.to(weight.dtype if bias is None else bias.dtype)
    if needs.x:
        dy = g.to(compute) if source is None else blocked.of_patches(g.to(compute), source, len(x))
        dx = products.mm(dy, weight.to(compute))
        grads["x"] = (dx if f.scale is None else dx * f.scale).to(x.dtype)
    if needs.table and table is not None:
        grads["table"] = passes.table_grad(g, len(x), places, f.bias.dtype).to(table.dtype)
    return grads


def _elsewhere(x: Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"device is {x.device.type}: it reads the grids on the host"


def _example(x: Tensor, **how: Any) -> PackedTokens:
    grids = torch.tensor([[len(x), 1]], device=x.device)
    return patch_embed_packed(x, grids, x.new_zeros(x.shape[1], x.shape[1]), **how)


PACKED = Operator(
    "patch_embed_packed",
    forward=_forward,
    backward=_backward,
    fake=lambda x, weight, places, dtype: x.new_empty((places.place.shape[0], weight.shape[0]), dtype=dtype),
    differentiable=("x", "weight", "bias", "table"),
    on="weight",
    implementations=[
        Implementation("triton", passes=Deferred("mmfuse.kernels.patch.ragged.kernel"), traceable=True),
        Implementation("chunked", passes=blocked, against=[_elsewhere]),
        Implementation("torch", function=reference.patch_embed_packed),
    ],
    # "torch" goes over the rows in a loop, which a graph of any size cannot
    size=Size("patches", lambda x: x.shape[0], kind=lambda compute: dtype_name(compute)),
    example=_example,
    export=OpSpec("MmfusePatchEmbedPacked"),
)


def patch_embed_packed(
    patches: Tensor,
    grids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    table: Tensor | tuple[Tensor, Tensor] | None = None,
    mode: str = "bilinear_aa",
    keep_aspect: bool = False,
    order: Literal["raster", "merge2"] = "raster",
    mean: Any = None,
    std: Any = None,
    channels_last: bool = True,
    ids_keep: Tensor | None = None,
    pad_position: Literal["first", "none"] = "first",
    padded_length: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> PackedTokens:
    """Patches of images of any sizes to tokens, each image with positions of its own grid, without reading the grids.

    token = W . patch + bias + P'[row, column],  P' = `table` resampled to (h, w) as `interpolate_position` does
    (NaViT, Dehghani et al. 2023; SigLIP2, NaFlex, Qwen2-VL and Qwen3-VL, Idefics2 by their modes and orders).

    Args:
        patches: [T, K], the images' patches one after the other, or [B, L, K] with each image's in the first rows of
            its L; uint8, float16, bfloat16, float32 or float64, any strides. T may exceed what the grids hold: rows
            past the end get no position.
        grids: [B, 2] (h, w) or [B, 3] (frames, h, w), integers on the patches' device. 0 is an empty image.
        weight: [D, K], in the order of the patches' elements. bias: [D] or None.
        table: the learned positions, [gh, gw, D] or [g * g, D]; or a pair ([gh, D], [gw, D]), whose resampled rows are
            summed. None: no positions (Qwen2-VL's are rotary, from `ids`). Every frame has the same.
        mode, keep_aspect: as for `interpolate_position`; with `lookup` a grid beyond the table's repeats its last row.
        order: of the patches of an image, "raster" or "merge2": 2 x 2 blocks, each four after one another (Qwen's
            spatial merge; h and w are even).
        mean, std: [C] numbers or tensors, or [K]. uint8 pixels enter as (x / 255 - mean) / std, others as
            (x - mean) / std; uint8 with neither as x.
        channels_last: whether K is (py, px, c), as SigLIP2 and NaFlex have it, or (c, py, px), (c, t, py, px). Only
            mean and std need it.
        ids_keep: int64 [T'] rows of `patches` [T, K] to compute, image by image, each at most once: what is left of an
            image after dropping patches.
        pad_position: of the rows past an image's patches in [B, L, K]: its first position (SigLIP2), or none (NaFlex).
        padded_length: with patches [T, K]: give [B, padded_length, D] instead, zeros past each image's tokens. It is at
            least the longest image.
        dtype: of the tokens; by default the weight's, or that of autocast where it is on.
        backend: "triton", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        tokens [T, D], [T', D] or [B, L, D]; cu_seqlens [B + 1] int32, where each image's tokens begin when packed; ids
        [..., 2] (row, column) or [..., 3] (frame, row, column) int64 of each token, 0 past the end.

    The weights of an interpolation are computed in float32 (float64 for float64), no tensor of them per token is held
    ("torch" holds those of some thousand tokens). 16-bit operands accumulate in float32 and are rounded once.
    Deterministic: two runs are equal bitwise. Differentiable in weight, bias, table and floating-point patches.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. What depends on the values of `grids` is
            checked on a CPU only.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    k, d = _check(patches, grids, weight)
    check_dtype(dtype)
    one_of("order", order, _MERGES)
    one_of("pad_position", pad_position, ("first", "none"))
    merge = _MERGES[order]
    bias = vector("bias", bias, (d,), patches, "[D]")
    mean = _channel_values("mean", mean, k, channels_last, patches)
    std = _channel_values("std", std, k, channels_last, patches)
    joined, shape, factored, mode = _table(table, mode, d, patches, keep_aspect)
    padded_in = patches.shape[1] if patches.dim() == 3 else None
    if padded_length is not None:
        require_integer("padded_length", padded_length)
        if padded_length < 0:
            raise ValueError(f"padded_length is {padded_length}, expected a number >= 0")
    if padded_in is not None and (ids_keep is not None or padded_length is not None):
        raise ValueError("patches is [B, L, K], expected [T, K] with ids_keep or padded_length")
    if ids_keep is not None and padded_length is not None:
        raise ValueError("ids_keep and padded_length are given, expected one of them")
    if ids_keep is not None:
        check("ids_keep", ids_keep, ("T'",), "", torch.int64, ("patches", patches))
    x, length = patches.reshape(-1, k), padded_length if padded_in is None else padded_in
    sizes = None
    if grids.device.type == "cpu" and not torch.compiler.is_compiling() and type(grids) is Tensor:
        sizes = grids.tolist()  # one wait for the host, whatever is asked of them
        _check_grids(sizes, merge, length, x.shape[0], ids_keep)
    grids = cast(grids, torch.int64)
    pads = bool(padded_in) and pad_position == "first"
    how: dict[str, Any] = {
        "padded_in": padded_in,
        "padded_out": padded_length,
        "merge": merge,
        "keep_aspect": keep_aspect,
        "pad_first": pads,
    }
    if not sizes or ids_keep is not None or not outside_a_trace() or torch.jit.is_tracing():
        at = layout(grids, x.shape[0], **how, ids_keep=ids_keep)
    else:
        at = layout_of(sizes, x.shape[0], **how)

    compute = autocast_dtype(weight) or weight.dtype
    places = Places(
        grids, at.place, at.source, at.start, padded_in or 0, pads, merge, keep_aspect, *shape, factored, mode
    )  # fmt: skip
    tokens = PACKED(x, weight, bias, joined, mean, std, places, compute, dtype or compute, backend=backend)
    ids = at.ids
    if length is not None:
        b = grids.shape[0]
        tokens, ids = tokens.view(b, length, tokens.shape[1]), ids.view(b, length, ids.shape[1])
    return PackedTokens(tokens, at.cu_seqlens, ids)


def _check(patches: Tensor, grids: Tensor, weight: Tensor) -> tuple[int, int]:
    check("patches", patches, dtype=PIXELS)
    check("weight", weight, ("D", "K"), ": flatten a convolution's", like=("patches", patches))
    check("grids", grids, dtype="integers", like=("patches", patches))
    d, k = weight.shape
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D, K], not empty")
    if patches.dim() not in (2, 3) or patches.shape[-1] != k:
        raise ValueError(f"patches has shape {tuple(patches.shape)}, expected [T, {k}] or [B, L, {k}] as weight")
    if grids.dim() != 2 or grids.shape[1] not in (2, 3):
        raise ValueError(f"grids has shape {tuple(grids.shape)}, expected [B, 2] (h, w) or [B, 3] (frames, h, w)")
    if patches.dim() == 3 and patches.shape[0] != grids.shape[0]:  # len() of a traced tensor is a constant
        raise ValueError(f"grids has {grids.shape[0]} rows, expected {patches.shape[0]} as patches has images")
    return k, d


def _check_grids(sizes: list[list[int]], merge: int, length: int | None, patches: int, ids_keep: Tensor | None) -> None:
    if sizes and min(map(min, sizes)) < 0:
        raise ValueError("grids has a negative number, expected (h, w) >= 0")
    if merge > 1 and any(n % merge for size in sizes for n in size[-2:]):
        raise ValueError(f"grids has a size that is not a multiple of {merge}, expected even ones for order merge2")
    count = list(map(prod, sizes))
    if length is not None and max(count, default=0) > length:
        raise ValueError(f"grids has an image of {max(count)} patches, expected at most {length}")
    if length is None and sum(count) > patches:
        raise ValueError(f"grids add up to {sum(count)} patches, expected at most the {patches} of patches")
    if ids_keep is not None and len(ids_keep) and not 0 <= ids_keep.min() <= ids_keep.max() < patches:
        raise ValueError(f"ids_keep has values from {ids_keep.min()} to {ids_keep.max()}, expected 0 to {patches - 1}")


def _table(
    table: Any, mode: str, d: int, like: Tensor, keep_aspect: bool
) -> tuple[Tensor | None, tuple[int, int], bool, str]:
    """(table [S, D], (gh, gw), whether it is two tables, mode)."""
    if table is None:
        return None, (1, 1), False, "lookup"
    if isinstance(table, (tuple, list)):
        y, x = check_factors(table, mode)
        joined, shape, mode = torch.cat([y, x]), (len(y), len(x)), "bilinear" if mode == "linear_1d" else mode
    else:
        shape = check_table(table, mode)
        joined = table if table.dim() == 2 else table.flatten(0, 1)
    check("table", joined, ("S", d), " as weight has rows", like=("patches", like))
    return joined, shape, isinstance(table, (tuple, list)), mode


def _channel_values(name: str, given: Any, k: int, channels_last: bool, like: Tensor) -> Tensor | None:
    """[K] values from one for each channel."""
    if given is None:
        return None
    v = given if isinstance(given, Tensor) else constant(given, like.device)
    v = v.reshape(-1)
    check(name, v, like=("patches", like))
    if len(v) == 0 or k % len(v):
        raise ValueError(f"{name} has {len(v)} values, expected [C] with K = {k} a multiple of C, or [K]")
    return v.repeat(k // len(v)) if channels_last else v.repeat_interleave(k // len(v))


# --- packing --------------------------------------------------------------------------------------------------------


def pack_images(
    images: Sequence[Tensor],
    patch: int,
    *,
    order: Literal["raster", "merge2"] = "raster",
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """(patches [T, K], grids [B, 2] int64) of images [C, H, W] of any sizes, for `patch_embed_packed`.

    Args:
        images: at least one, of one dtype (bytes stay bytes) and device, any strides; H and W multiples of `patch`.
        patch: P, with K = C P^2.
        order, channels_last: as for `patch_embed_packed`.

    Raises:
        ValueError: an image does not fit; the message names it.
    """
    m, rows, grids = _MERGES[order], [], []
    for i, image in enumerate(images):
        if image.dim() != 3 or any(n % (patch * m) for n in image.shape[1:]):
            shape = tuple(image.shape)
            raise ValueError(f"images[{i}] has shape {shape}, expected [C, H, W], H and W multiples of {patch * m}")
        x = image.unfold(1, patch, patch).unfold(2, patch, patch)  # [C, h, w, P, P]
        grids.append(x.shape[1:3])
        x = x.permute(1, 2, 3, 4, 0) if channels_last else x.permute(1, 2, 0, 3, 4)
        x = x.unflatten(1, (x.shape[1] // m, m)).unflatten(0, (x.shape[0] // m, m)).transpose(1, 2)
        rows.append(x.reshape(-1, patch * patch * image.shape[0]))
    return torch.cat(rows), torch.tensor(grids).to(rows[0].device, non_blocking=True)


def pack_first_fit(lengths: Sequence[int], capacity: int, *, sort: bool = False) -> list[list[int]]:
    """Which images share a sequence of `capacity` tokens: each goes into the first that has room for it.

    NaViT's greedy packing (Dehghani et al. 2023, appendix A). On the host, before the batch is made.

    Args:
        lengths: tokens of each image.
        capacity: of a sequence.
        sort: longest first (first-fit decreasing), which leaves less empty; otherwise in the order of arrival.

    Returns:
        the indices of the images of each sequence.

    Raises:
        ValueError: an image is longer than a sequence.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]) if sort else range(len(lengths)):
        if not 0 <= lengths[i] <= capacity:
            raise ValueError(f"lengths[{i}] is {lengths[i]}, expected 0 to the capacity, {capacity}")
        at = next((g for g, left in enumerate(room) if left >= lengths[i]), len(groups))
        if at == len(groups):
            groups.append([])
            room.append(capacity)
        groups[at].append(i)
        room[at] -= lengths[i]
    return groups


def drop_patches(noise: Tensor, grids: Tensor, keep: Tensor, total: int) -> Tensor:
    """ids_keep [total] of packed images: of image b the `keep[b]` patches with the least noise, in the images' order.

    Args:
        noise: [T] floating-point, one for each patch.
        grids: [B, 2 | 3] as for `patch_embed_packed`.
        keep: [B] int64, how many to keep of each image: NaViT draws a rate for each.
        total: sum of `keep`, which the host knows; nothing is read from the device.

    Deterministic: two runs are equal bitwise.
    """
    check("noise", noise, ("T",))
    check("keep", keep, grids.shape[:1], " as grids", "integers")
    end = grids.prod(1).cumsum(0)
    image = torch.searchsorted(end, torch.arange(noise.shape[0], device=noise.device), right=True)
    by_noise = noise.argsort(stable=True)
    shuffled = by_noise[image[by_noise].argsort(stable=True)]  # image by image, least noise first
    begin = torch.cat([end.new_zeros(1), end])
    rank = torch.arange(noise.shape[0], device=noise.device) - begin[image]
    kept = rank < torch.cat([keep, keep.new_zeros(1)])[image]
    # those to keep first, in order: a sort, for a selection would wait for their number
    return shuffled[(~kept).to(torch.int8).argsort(stable=True)[:total]]
