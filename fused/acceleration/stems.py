"""Stems of timm, open_clip and transformers: from pixels to the rows of the first block in one operator.

Each function is the method of its library, arguments and outputs included; `uint8`, a (mean, std) per channel that
`accelerate(model, uint8=...)` gives, lets it take the bytes of images as (x/255 - mean)/std. Tokens are rounded once,
at the end; masked tokens are selected, so what lies under a mask never reaches the output, be it NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmfuse.kernels import patch_embed, patch_embed_packed
from mmfuse.kernels._runtime.arguments import autocast_dtype
from mmfuse.kernels.patch import steps_aside

Norm = tuple[Tensor, Tensor | None, float]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


# --- timm ---------------------------------------------------------------------------------------------------------


def timm_patch_embed(module: Any, x: Tensor, uint8: Statistics | None = None) -> Tensor:
    """timm's PatchEmbed: [B, C, H, W] to [B, N, D], or [B, gh, gw, D] where it does not flatten."""
    pixels, norm = _timm_pixels(module, x), _norm(module.norm)
    dtype = _dtype(module.proj, norm)
    tokens = _rows(module.proj, pixels, uint8, dtype=dtype, padding=_padding(module), stem_norm=norm)
    return tokens if module.flatten else tokens.unflatten(1, module.dynamic_feat_size(x.shape[-2:]))


def timm_patch_embed_with_size(module: Any, x: Tensor, uint8: Statistics | None = None) -> tuple[Tensor, list[int]]:
    """timm's PatchEmbedWithSize: the tokens and their grid; images of any whole number of patches."""
    grid = [s // p for s, p in zip(x.shape[-2:], module.patch_size, strict=True)]
    pixels = _whole(module.proj, x) if module.img_size is None else x
    norm = _norm(module.norm)
    tokens = _rows(module.proj, pixels, uint8, dtype=_dtype(module.proj, norm), stem_norm=norm)
    return tokens if module.flatten else tokens.unflatten(1, grid), grid


def timm_forward_features(
    model: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    uint8: Statistics | None = None,
) -> Tensor:
    """timm's VisionTransformer.forward_features: patches, class and register tokens and positions in one operator."""
    x = _timm_stem(model, x, uint8)
    if attn_mask is not None or is_causal:
        for block in model.blocks:
            x = block(x, attn_mask=attn_mask, is_causal=is_causal)
    elif model.grad_checkpointing:
        from timm.models import checkpoint_seq

        x = checkpoint_seq(model.blocks, x)
    else:
        x = model.blocks(x)
    return model.norm(x)


def _timm_stem(model: Any, x: Tensor, uint8: Statistics | None) -> Tensor:
    embed, drop = model.patch_embed, model.patch_drop
    pixels = _timm_pixels(embed, x)
    prefix = [t[0] for t in (model.cls_token, model.reg_token) if t is not None]
    rows = 0 if model.no_embed_class else model.num_prefix_tokens
    position, grid = model.pos_embed, embed.dynamic_feat_size(pixels.shape[-2:])
    if position is not None and model.dynamic_img_size:
        from timm.layers import resample_abs_pos_embed

        position = resample_abs_pos_embed(position, grid, embed.grid_size, num_prefix_tokens=rows)
    # positions are dropped before patches: only without the former can the latter be left out from the start
    dropped = position is not None and model.pos_drop.training and model.pos_drop.p > 0
    keep = None
    if not dropped and drop.training and getattr(drop, "prob", 0.0) > 0:
        patches = grid[0] * grid[1]
        count = max(1, int(patches * (1.0 - drop.prob)))
        keep = torch.randn(x.shape[0], patches, device=x.device).argsort(-1)[:, :count]
        keep = keep.sort(-1)[0] if drop.ordered else keep
    stem_norm, pre_norm = _norm(embed.norm), None if dropped else _norm(model.norm_pre)
    positions = {} if position is None else {"pos_embed" if rows else "position": position[0]}
    tokens = _rows(
        embed.proj,
        pixels,
        uint8,
        dtype=_dtype(embed.proj, stem_norm, *prefix, position, pre_norm),
        padding=_padding(embed),
        stem_norm=stem_norm,
        prefix=torch.cat(prefix) if prefix else None,
        **positions,
        ids_keep=keep,
        pre_norm=pre_norm,
    )
    return model.norm_pre(drop(model.pos_drop(tokens))) if dropped else tokens


def _timm_pixels(module: Any, x: Tensor) -> Tensor:
    expected = module.img_size
    if expected is not None and module.strict_img_size and tuple(x.shape[-2:]) != tuple(expected):
        raise ValueError(f"x has images of {tuple(x.shape[-2:])}, expected {tuple(expected)}")
    whole = _whole(module.proj, x)
    return x if module.dynamic_img_pad or expected is not None else whole


def _padding(module: Any) -> Literal["error", "zero"]:
    return "zero" if module.dynamic_img_pad else "error"


def against_timm_patch_embed(module: Any) -> str | None:
    """Why timm's PatchEmbed stays, or None."""
    if not module.flatten and module.output_fmt != "NHWC":
        return f"its output is {module.output_fmt.value}, expected NLC or NHWC"
    return _against_projection(module.proj) or against_norm("norm", module.norm)


def against_timm_model(model: Any) -> str | None:
    """Why timm's VisionTransformer stays, or None."""
    return against_timm_patch_embed(model.patch_embed) or against_norm("norm_pre", model.norm_pre)


def naflex_embeds(
    module: Any,
    x: Tensor,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
    uint8: Statistics | None = None,
) -> tuple[Tensor, tuple[int, int] | None]:
    """timm's NaFlexEmbeds: patches [B, L, K] of images of any sizes, or [B, C, H, W], with positions of each grid.

    The library reads the grids of a batch back to the host, and resamples the positions of each on its own.
    """
    if x.dim() == 5:  # patches of another size than the weight's, which it resamples
        return type(module).forward(module, x, patch_coord, patch_valid)
    prefix = [t[0] for t in (module.cls_token, module.reg_token) if t is not None]
    dtype = _dtype(module.proj, *prefix)  # positions are added in place, so they cannot widen it
    if patch_coord is None:
        ph, pw = module.patch_size
        pixels = x if module.dynamic_img_pad or module.is_linear else _whole(module.proj, x)
        grid = tuple(-(-s // p) for s, p in zip(pixels.shape[-2:], (ph, pw), strict=True))
        weight, bias = _operands(module.proj)
        if module.is_linear and module.channels_last:
            weight = weight.unflatten(1, (ph, pw, -1)).permute(0, 3, 1, 2)
        elif module.is_linear:
            weight = weight.unflatten(1, (-1, ph, pw))
        tokens = patch_embed(
            pixels,
            weight,
            bias,
            padding=_padding(module),
            prefix=torch.cat(prefix) if prefix else None,
            position=_naflex_positions(module, grid),
            dtype=dtype,
            **_statistics(pixels, uint8),
        )
        return module.pos_drop(tokens), grid
    table, mode = None, "lookup"
    if module.pos_embed_type == "learned":
        table, mode = module.pos_embed[0], _naflex_mode(module)
    elif module.pos_embed_type == "factorized":
        table, mode = (module.pos_embed_y[0], module.pos_embed_x[0]), "linear_1d"
    tokens = patch_embed_packed(
        x,
        patch_coord.amax(1) + 1,
        *_operands(module.proj),
        table=table,
        mode=mode,
        keep_aspect=module.pos_embed_ar_preserving,
        channels_last=module.channels_last,
        pad_position="none",
        dtype=dtype,
        **_statistics(x, uint8),
    ).tokens
    if prefix:
        tokens = torch.cat([torch.cat(prefix).expand(x.shape[0], -1, -1), tokens], 1)
    return module.pos_drop(tokens), None


def _naflex_positions(module: Any, grid: tuple[int, ...]) -> Tensor | None:
    """[N, D] of one grid, as the library resamples them."""
    if module.pos_embed_type == "none":
        return None
    table = module.pos_embed if module.pos_embed is not None else module.pos_embed_y
    position = table.new_zeros(1, grid[0] * grid[1], table.shape[-1])
    apply = module._apply_learned_pos_embed if module.pos_embed is not None else module._apply_factorized_pos_embed
    apply(position, grid_size=grid)
    return position[0]


def _naflex_mode(module: Any) -> str:
    if module.pos_embed_use_grid_sample:
        return "grid_sample"
    # timm before 1.0.31 had no choice
    return module.pos_embed_interp_mode + ("_aa" if getattr(module, "pos_embed_antialias", True) else "")


def against_naflex(module: Any) -> str | None:
    """Why timm's NaFlexEmbeds stays, or None."""
    if module.norm_input is not None:
        return "it normalises its patches"
    if module.pos_embed_type == "factorized" and module.pos_embed_use_grid_sample:
        return "it samples factorised positions with grid_sample"
    if getattr(module, "pos_embed_align_corners", False):
        return "it aligns the corners of its positions"
    known = {"bicubic"} if module.pos_embed_use_grid_sample else {"bicubic", "bilinear"}
    if module.pos_embed_type == "learned" and module.pos_embed_interp_mode not in known:
        return f"it interpolates its positions by {module.pos_embed_interp_mode}"
    if module.is_linear != isinstance(module.proj, nn.Linear):
        return f"its proj is {type(module.proj).__name__}, which its is_linear contradicts"
    return _against_projection(module.proj)


# --- open_clip ----------------------------------------------------------------------------------------------------


def open_clip_embeds(model: Any, x: Tensor, uint8: Statistics | None = None) -> Tensor:
    """open_clip's VisionTransformer._embeds: class token, positions, patch dropout and ln_pre in one operator."""
    drop, keep = model.patch_dropout, None
    if drop.training and getattr(drop, "prob", 0.0) > 0:
        patches = len(model.positional_embedding) - 1
        count = max(1, int(patches * (1 - drop.prob)))
        keep = torch.randn(x.shape[0], patches).topk(count, dim=-1).indices.to(x.device)
    return _rows(
        model.conv1,
        _whole(model.conv1, x),
        uint8,
        dtype=_dtype(model.conv1),
        prefix=model.class_embedding[None],
        pos_embed=model.positional_embedding,
        ids_keep=keep,
        pre_norm=_norm(model.ln_pre),
    )


def against_open_clip(model: Any) -> str | None:
    """Why open_clip's VisionTransformer stays, or None."""
    if not getattr(model.patch_dropout, "exclude_first_token", True):
        return "its patch_dropout may drop the class token"
    return _against_projection(model.conv1) or against_norm("ln_pre", model.ln_pre)


# --- transformers -------------------------------------------------------------------------------------------------


def vit_embeddings(
    module: Any,
    pixel_values: Tensor,
    bool_masked_pos: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """ViTEmbeddings: [B, C, H, W] to [B, 1 + N, D]."""
    if not interpolate_pos_encoding:
        _check_size(pixel_values, module.image_size)
    position = module.position_embeddings
    if interpolate_pos_encoding:
        position = _interpolated(module, module.patch_embeddings.projection, position, pixel_values)
    return module.dropout(_masked_rows(module, pixel_values, bool_masked_pos, position))


def beit_embeddings(
    module: Any, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, uint8: Statistics | None = None
) -> Tensor:
    """BeitEmbeddings: [B, C, H, W] to [B, 1 + N, D], masked tokens before positions."""
    position = module.position_embeddings
    if position is not None:
        position = _interpolated(module, module.patch_embeddings.projection, position, pixel_values)
    return module.dropout(_masked_rows(module, pixel_values, bool_masked_pos, position, uint8))


def clip_embeddings(
    module: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False, uint8: Statistics | None = None
) -> Tensor:
    """CLIPVisionEmbeddings: [B, C, H, W] to [B, 1 + N, D]."""
    if not interpolate_pos_encoding:
        _check_size(pixel_values, (module.image_size,) * 2)
    position = module.position_embedding.weight
    if interpolate_pos_encoding:
        position = _interpolated(module, module.patch_embedding, position, pixel_values)[0]
    return _classed(module.patch_embedding, pixel_values, module.class_embedding[None], position, uint8)


def blip_embeddings(
    module: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False, uint8: Statistics | None = None
) -> Tensor:
    """BlipVisionEmbeddings and those of BLIP-2 and InstructBLIP: [B, C, H, W] to [B, 1 + N, D]."""
    proj = module.patch_embedding
    position = module.position_embedding
    if interpolate_pos_encoding:
        position = _interpolated(module, proj, position, pixel_values)
    gh, gw = _grid(proj, pixel_values)
    dtype = _dtype(proj, proj.weight)
    return _classed(proj, pixel_values, module.class_embedding[0], position[0, : 1 + gh * gw], uint8, dtype)


def siglip_embeddings(
    module: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False, uint8: Statistics | None = None
) -> Tensor:
    """SiglipVisionEmbeddings: [B, C, H, W] to [B, N, D]."""
    proj, position = module.patch_embedding, module.position_embedding.weight
    if interpolate_pos_encoding:
        position = _interpolated(module, proj, position, pixel_values, prefix=0)[0]
    pixels = _cast(proj, _whole(proj, pixel_values), uint8)
    return _rows(proj, pixels, uint8, dtype=_dtype(proj, position), position=position)


def siglip2_embeddings(
    module: Any, pixel_values: Tensor, spatial_shapes: Tensor, uint8: Statistics | None = None
) -> Tensor:
    """Siglip2VisionEmbeddings: patches [B, L, P P C] of images of any sizes to [B, L, D], positions of each grid."""
    # as the library does; on a GPU a look would wait for it
    on_cpu = spatial_shapes.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not (spatial_shapes > 0).all():
        raise ValueError("spatial_shapes has a grid without patches, expected positive sizes (h, w)")
    proj, table = module.patch_embedding, module.position_embedding.weight
    pixels = _cast(proj, pixel_values, uint8)
    dtype = _dtype(proj, table)
    packed = patch_embed_packed(
        pixels, spatial_shapes, *_operands(proj), table=table, dtype=dtype, **_statistics(pixels, uint8)
    )
    return packed.tokens


def qwen_patch_embed(module: Any, hidden_states: Tensor) -> Tensor:
    """The patch embedding of Qwen2-VL, 2.5 and 3: [T, C t P P] to [T, D], without a 3-D convolution.

    It takes no bytes: the models cast their pixels on the way to the vision tower.
    """
    proj = module.proj
    patches = _cast(proj, hidden_states.reshape(1, -1, proj.weight[0].numel()))
    return _rows(proj, patches, None, layout="patches", dtype=_dtype(proj))[0]


def against_patch_embeddings(module: Any) -> str | None:
    """Why ViTEmbeddings or BeitEmbeddings stay, or None."""
    return _against_projection(module.patch_embeddings.projection)


def against_patch_embedding(module: Any) -> str | None:
    """Why the embeddings of BLIP stay, or None."""
    return _against_projection(module.patch_embedding)


def against_positions(module: Any) -> str | None:
    """Why the embeddings of CLIP and SigLIP stay, or None."""
    table = module.position_embedding
    if table.max_norm is not None or table.padding_idx is not None or table.scale_grad_by_freq or table.sparse:
        return "its position_embedding has options, expected none"
    return _against_projection(module.patch_embedding)


def against_qwen(module: Any) -> str | None:
    """Why a patch embedding of Qwen stays, or None."""
    return _against_projection(module.proj)


def _masked_rows(
    module: Any, pixels: Tensor, mask: Tensor | None, position: Tensor | None, uint8: Statistics | None = None
) -> Tensor:
    proj = module.patch_embeddings.projection
    return _rows(
        proj,
        _whole(proj, pixels),
        uint8,
        dtype=_dtype(proj, module.cls_token, position),
        prefix=module.cls_token[0],
        pos_embed=None if position is None else position[0],
        mask=None if mask is None else mask.bool(),
        mask_token=None if mask is None else module.mask_token[0, 0],
    )


def _classed(
    proj: Any,
    pixels: Tensor,
    token: Tensor,
    position: Tensor,
    uint8: Statistics | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or _dtype(proj, token, position)
    pixels = _cast(proj, _whole(proj, pixels), uint8)
    return _rows(proj, pixels, uint8, dtype=dtype, prefix=token, pos_embed=position)


def _interpolated(module: Any, proj: Any, table: Tensor, pixels: Tensor, prefix: int = 1) -> Tensor:
    """The model's own interpolated positions [1, prefix + N, D]; of the tokens it reads the shape alone."""
    gh, gw = _grid(proj, pixels)
    tokens = table.new_zeros((1, prefix + gh * gw, table.shape[-1]), device="meta")
    return module.interpolate_pos_encoding(tokens, *pixels.shape[-2:])


def _check_size(pixels: Tensor, expected: Any) -> None:
    if tuple(pixels.shape[-2:]) != tuple(expected):
        raise ValueError(f"pixel_values has images of {tuple(pixels.shape[-2:])}, expected {tuple(expected)}")


def _cast(proj: Any, pixels: Tensor, uint8: Statistics | None = None) -> Tensor:
    """In the dtype of the weights, as transformers does; bytes that are to be normalised stay bytes."""
    return pixels if uint8 is not None and pixels.dtype == torch.uint8 else pixels.to(proj.weight.dtype)


def few_products(path: str, bare: bool = False) -> Callable[..., bool]:
    """Whether the convolution at `path`, as the library runs it, is faster than the operator for these pixels."""
    weight = attrgetter(f"{path}.weight")

    def aside(module: Any, *args: Any, **kwargs: Any) -> bool:
        return steps_aside(args[0] if args else next(iter(kwargs.values())), weight(module), bare)

    return aside


# --- common -------------------------------------------------------------------------------------------------------


def _rows(proj: Any, pixels: Tensor, uint8: Statistics | None, **options: Any) -> Tensor:
    weight, bias = _operands(proj)
    return patch_embed(pixels, weight=weight, bias=bias, **options, **_statistics(pixels, uint8))


def _operands(proj: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projection."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot follow a fused stem after accelerate(): mmfuse.decelerate(model) first, "
            "or use torch.export"
        )
    return proj.weight, proj.bias


def _statistics(pixels: Tensor, uint8: Statistics | None) -> dict[str, Any]:
    if pixels.dtype != torch.uint8:
        return {}
    if uint8 is None:
        raise TypeError("pixels have dtype uint8, expected floats; accelerate(model, uint8=(mean, std)) takes bytes")
    return {"mean": uint8[0], "std": uint8[1]}


def _dtype(proj: Any, *others: Tensor | Norm | None) -> torch.dtype:
    """What the projection gives, under autocast its dtype, promoted by what is added to it and normalises it.

    On a CPU a norm keeps the dtype of its rows.
    """
    given = autocast_dtype(proj.weight) or proj.weight.dtype
    norms = () if proj.weight.is_cpu else (t[0] for t in others if isinstance(t, tuple))
    dtypes = (t.dtype for t in (*norms, *others) if isinstance(t, Tensor))
    return functools.reduce(torch.promote_types, dtypes, given)


def _grid(proj: Any, pixels: Tensor) -> tuple[int, int]:
    """Whole patches of images."""
    if pixels.dim() != 4 or pixels.shape[1] != proj.in_channels:
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}, expected images [B, {proj.in_channels}, H, W]")
    ph, pw = proj.kernel_size
    return pixels.shape[2] // ph, pixels.shape[3] // pw


def _whole(proj: Any, pixels: Tensor) -> Tensor:
    """Without the rows and columns that fill no patch, which a convolution passes over: a view."""
    (gh, gw), (ph, pw) = _grid(proj, pixels), proj.kernel_size
    return pixels[..., : gh * ph, : gw * pw]


def _norm(norm: Any) -> Norm | None:
    return None if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)


def against_norm(name: str, norm: Any) -> str | None:
    known = {"torch.nn.modules.normalization", "timm.layers.norm", "open_clip.transformer"}
    if type(norm) is nn.Identity:
        return None
    if not isinstance(norm, nn.LayerNorm) or type(norm).__module__ not in known or norm.weight is None:
        return f"its {name} is {type(norm).__name__}, expected a LayerNorm with weights"
    return None


def _against_projection(proj: Any) -> str | None:
    if isinstance(proj, nn.Linear):
        return None
    if proj.padding not in ("valid", (0,) * len(proj.kernel_size)) or set(proj.dilation) != {1} or proj.groups != 1:
        return "its projection has padding, dilation or groups"
    if proj.stride != proj.kernel_size:
        return f"its projection has stride {tuple(proj.stride)}, expected its kernel's size {tuple(proj.kernel_size)}"
    return None
