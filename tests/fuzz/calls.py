"""One strategy for each public operator: arguments that it takes, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fuzz.strategies import DEVICE, DISTINCT, DTYPES, FINITE, Call, Draw, Spec
from mmfuse.fused import language  # noqa: F401  (declares one more)
from mmfuse.kernels._runtime import operators
from mmfuse.kernels.contrastive.negatives.noise import gumbel
from mmfuse.kernels.contrastive.topk.reference import numbers
from mmfuse.kernels.multiway import Routing
from mmfuse.kernels.multiway.arguments import ACTIVATIONS, GATED
from mmfuse.kernels.multiway.routing import Part
from mmfuse.kernels.patch.positions.axes import MODES

Arguments = dict[str, Any]
CALLS: dict[str, Callable[[Draw], Arguments]] = {}
# These ask for no gradient: some implementations give mean and std one, which none promises.
# Known fault: where the others ask for one and what is differentiable does not, "chunked" raises RuntimeError.
WITHOUT = ("mean", "std", "keys", "key", "queue", "query_m", "log_u", "log_w", "row_scale")
NO_GRADIENT = tuple(f"['{name}']" for name in WITHOUT)
# the LayerNorm of a single feature is 0, and its gradient all rounding
NORMED = 2
# In place of an argument. Known fault: a tensor of two numbers as an option raises RuntimeError in most operators.
JUNK = (None, -1, 0, 1, 2.5, math.nan, math.inf, "x", True, (), (1, 2, 3, 4), Spec((), torch.float32))
OTHER_DTYPES = (torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64)
# Where a number is not finite, or huge: an implementation "spreads" a NaN to results that eager has finite, "hides" one
# that eager shows, or "differs". What is left of it is among the known limits of docs/reliability.md.
EXCUSED = {
    # Logits of 16-bit features are kept in steps of the largest: a huge number makes them too long for the other rows,
    # an infinite one makes NaN of them. And metrics are of all texts, also where only those with an image here count.
    ("clip_loss", "spreads"),
    ("clip_loss", "differs"),
    ("grouped_clip_loss", "spreads"),
    ("grouped_clip_loss", "differs"),
    ("global_contrastive_loss", "spreads"),
    ("global_contrastive_loss", "differs"),
    # The gradient of a maximum is that of the row that it is taken from; eager's product with the whole matrix has 0
    # times NaN in the other rows.
    ("max_query_similarity", "hides"),
    ("max_query_loss", "hides"),
    ("mini_pointnet", "hides"),
    ("mini_pointnet_training", "hides"),
    # where all are NaN, by the last bias, ours is taken from the largest before it was added
    ("mini_pointnet", "differs"),
    ("mini_pointnet_training", "differs"),
    # known faults: products of huge numbers overflow in another place; an infinite logit of the teacher
    ("mini_pointnet", "spreads"),
    ("mini_pointnet_training", "spreads"),
    ("distill_clip_loss", "spreads"),
    # the reference multiplies by 0: the logit -inf of a key that is no target, an infinite weight of an ignored token
    ("queue_itc_loss", "hides"),
    ("moco_loss", "hides"),
    ("linear_cross_entropy", "hides"),
    # the gradient of a query that is not a number, of an image without tokens: the reference multiplies by 0
    ("few_query_attention", "hides"),
    ("token_attention", "hides"),
    # a known limit: with the weights at the queries, products of huge numbers overflow in another place
    ("token_attention", "spreads"),
    # a position of the table that is not a number, times the weight 0
    ("patch_embed_packed", "hides"),
    ("patch_embed_packed", "spreads"),
    ("interpolate_position", "spreads"),
}


def of(
    name: str, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES, without: str = ""
) -> st.SearchStrategy[Call]:
    """Calls of a public function, `without` a layout."""

    @st.composite
    def call(draw: Callable[[Any], Any]) -> Call:
        d = Draw(draw, sizes, dtypes, without)
        args = CALLS[name](d)
        asked = d.one(-1, -1, -1, 1, 2, 0b10101, 0b01010)
        upstream = d.style((*FINITE, *FINITE, ("plain", "nan"))), d.one(1.0, 30.0)
        return Call(name, d.dtype, args, upstream, asked, d.one(*[1] * 15, 2), draw(st.integers(0, 2**31)))

    return call()


def bad(name: str, sizes: tuple[int, ...]) -> st.SearchStrategy[Call]:
    """Calls with one argument that may not fit."""

    @st.composite
    def call(draw: Callable[[Any], Any]) -> Call:
        made = draw(of(name, sizes))
        at = draw(st.sampled_from(list(made.args)))
        leaves, tree = tree_flatten(made.args[at])
        if not leaves:
            return replace(made, args=made.args | {at: draw(st.sampled_from(JUNK))})
        i = draw(st.integers(0, len(leaves) - 1))
        leaves[i] = draw(_spoiled(leaves[i])) if isinstance(leaves[i], Spec) else draw(st.sampled_from(JUNK))
        return replace(made, args=made.args | {at: tree.unflatten(leaves)})

    return call()


def _spoiled(spec: Spec) -> st.SearchStrategy[Any]:
    """Another shape, dtype, device or kind of object in place of a tensor."""
    plain = replace(spec, values=None, taken=None)
    longer = tuple(n + (i == 0) for i, n in enumerate(spec.shape))
    shapes = [spec.shape[1:], (*spec.shape, 1), (*spec.shape[:-1], 0), longer]
    return st.one_of(
        st.sampled_from([replace(plain, shape=shape) for shape in shapes]),
        st.sampled_from([replace(plain, dtype=dtype) for dtype in OTHER_DTYPES]),
        st.sampled_from([replace(plain, low=-2, high=spec.high + 2), replace(plain, device="meta")]),
        st.sampled_from(JUNK),
    )


def takes(strategy: Callable[[Draw], Arguments]) -> Callable[[Draw], Arguments]:
    CALLS[strategy.__name__] = strategy
    return strategy


# --- contrastive ----------------------------------------------------------------------------------------------------


def _pair(d: Draw) -> tuple[int, int, int, int]:
    """(b, N, row_offset, D)"""
    b, offset = d.size(1), d.one(0, 0, 1, 3)
    return b, b + offset + d.one(0, 0, 1, 4), offset, d.size(1)


def _scale(d: Draw) -> Any:
    return d.scalar(1.0, 14.3, 100.0)


@takes
def clip_loss(d: Draw) -> Arguments:
    b, n, offset, width = _pair(d)
    args: Arguments = {"weights": d.one((0.5, 0.5), (1.0, 0.0), (0.0, 2.0)), "row_offset": offset}
    kind = d.one("plain", "smooth", "decoupled", "ids", "pairs of ids", "metrics")
    if kind == "smooth":
        args |= {"label_smoothing": d.one(0.1, 1.0), "row_offset": 0}
        n = b = b + 1  # of one pair the loss is 0
    elif kind == "decoupled":
        b, n = b + 1, n + 1
        args["decoupled"] = True
    elif kind == "ids":
        args |= {"ids": d.integers(n, high=3), "label_smoothing": d.one(0.0, 0.1) if b == n else 0.0}
    elif kind == "pairs of ids":
        args["ids"] = (d.integers(b, high=3), d.integers(n, high=3))
    # whether a positive is the largest turns on a rounding where rows are equal
    styles = DISTINCT if kind == "metrics" else None
    image, text = (d.floats(m, width, **({"styles": styles} if styles else {})) for m in (b, n))
    return args | {
        "image": image,
        "text": text,
        "logit_scale": _scale(d),
        "logit_bias": d.one(None, 0.5, Spec((), torch.float32)),
        "normalize": width > 1 and d.flag(),  # the unit row of one feature is its sign
        "save": d.one("auto", "recompute"),
        "store_budget": d.one(None, 0),
        "metrics": kind == "metrics",
    }


@takes
def siglip_loss(d: Draw) -> Arguments:
    b, n, offset, width = _pair(d)
    return {
        "image": d.floats(b, width),
        "text": d.floats(n, width),
        "logit_scale": _scale(d),
        "logit_bias": d.one(None, -10.0, Spec((), d.dtype), Spec((1,), torch.float32)),
        "normalize": width > 1 and d.flag(),  # the unit row of one feature is its sign
        "negative_only": d.flag(),
        "row_offset": offset,
    }


@takes
def distill_clip_loss(d: Draw) -> Arguments:
    b, n, offset, width = _pair(d)
    other = d.size(1)
    return {
        "image": d.floats(b, width),
        "text": d.floats(n, width),
        "logit_scale": _scale(d),
        "teacher_image": d.floats(b, other),
        "teacher_text": d.floats(n, other),
        "teacher_scale": _scale(d),
        "weights": d.one((0.5, 0.5), (1.0, 0.0)),
        "row_offset": offset,
    }


@takes
def global_contrastive_loss(d: Draw) -> Arguments:
    n, width = d.size(1), d.size(1)
    acc = torch.promote_types(d.dtype, torch.float32)
    return {
        "image": d.floats(n, width),
        "text": d.floats(n, width),
        "logit_scale": d.scalar(1.0, 14.3),
        "log_u": d.floats(n, dtype=acc),
        "log_w": d.floats(n, dtype=acc),
        "gamma": d.one(1.0, 0.9, 0.1),
        "eps": d.one(1e-14, 1e-6),
        "normalize": width > 1 and d.flag(),  # the unit row of one feature is its sign
    }


@takes
def grouped_clip_loss(d: Draw) -> Arguments:
    sizes = [(d.size(1), d.size(1)) for _ in range(d.one(1, 2, 3))]
    return {
        "images": [d.floats(*s) for s in sizes],
        "texts": [d.floats(*s) for s in sizes],
        "logit_scales": [_scale(d) for _ in sizes],
        "normalize": all(width > 1 for _, width in sizes) and d.flag(),
        "weights": d.one((0.5, 0.5), (0.0, 1.0)),
    }


@takes
def max_query_similarity(d: Draw) -> Arguments:
    width = d.size(1)
    return {"image": d.floats(d.size(), d.size(1), width), "text": d.floats(d.size(), width)}


@takes
def max_query_loss(d: Draw) -> Arguments:
    b, queries, width, offset = d.size(1), d.size(1), d.size(1), 0
    args: Arguments = {}
    if d.flag():
        offset = d.one(0, 1)
        n = b + offset + d.one(0, 2)
        args = {"image_all": d.floats(n, queries, width), "text_all": d.floats(n, width), "row_offset": offset}
        if d.flag():
            args |= {"ids": d.integers(b, high=3), "all_ids": d.integers(n, high=3)}
    elif d.flag():
        args["ids"] = d.integers(b, high=3)
    return args | {
        "image": d.floats(b, queries, width),
        "text": d.floats(b, width),
        "temp": d.scalar(0.07, 1.0),
        "label_smoothing": d.one(0.0, 0.1, 1.0),
    }


@takes
def hard_negatives(d: Draw) -> Arguments:
    b, n, offset, width = _pair(d)
    args: Arguments = {"row_offset": offset}
    if d.flag():
        args |= {"ids": d.integers(b, high=4), "key_ids": d.integers(n, high=4)}
    return args | {
        "query": d.floats(b, width),
        "keys": d.floats(n, width),
        "logit_scale": d.scalar(1.0, 5.0),
        "k": d.one(1, 2, 5),
        "mixture": d.one(0.0, 1e-4, 0.5),
        "seed": d.one(0, -3, 2**40 + 1),
        "both": d.flag(),
    }


@takes
def queue_itc_loss(d: Draw) -> Arguments:
    b, width, m = d.size(1), d.size(1), d.size()
    k = b + d.one(0, 2)
    alpha = d.one(0.0, 0.4, 1.0)
    args: Arguments = {"alpha": alpha, "query_m": d.floats(b, width) if alpha else None}
    if d.flag():
        args |= {
            "ids": d.integers(b, high=3),
            "key_ids": d.integers(k, high=3),
            "queue_ids": d.integers(m, high=3, low=-1),
        }
    if d.flag():
        args |= {"negatives": d.one(1, 3), "mixture": d.one(0.0, 0.01), "seed": 5}
    stored = d.one(d.dtype, d.dtype if d.dtype == torch.float64 else torch.float32)
    return args | {
        "query": d.floats(b, width),
        "keys": d.floats(k, width, dtype=stored),
        "queue": d.floats(m, width, dtype=stored),
        "temp": d.scalar(0.07, 1.0),
    }


@takes
def moco_loss(d: Draw) -> Arguments:
    b, width = d.size(1), d.size(1)
    stored = d.one(d.dtype, d.dtype if d.dtype == torch.float64 else torch.float32)
    return {
        "query": d.floats(b, width),
        "key": d.floats(b, width, dtype=stored),
        "queue": d.floats(d.size(), width, dtype=stored),
        "temp": d.scalar(0.07, 1.0),
    }


@takes
def similarity_topk(d: Draw) -> Arguments:
    n, width = d.size(1), d.size(1)
    return {"queries": d.floats(d.size(), width), "gallery": d.floats(n, width), "k": d.up_to(n, 1)}


# --- codebooks ------------------------------------------------------------------------------------------------------


@takes
def nearest_code(d: Draw) -> Arguments:
    n, k, width = d.size(), d.size(1), d.size(1)
    return {
        "z": d.floats(n, width),
        "codebook": d.floats(k, width, dtype=d.one(d.dtype, torch.float32)),
        "metric": d.one("euclidean", "cosine"),
        "mask": d.maybe(lambda: d.mask(n)),
    }


@takes
def linear_argmax(d: Draw) -> Arguments:
    k, width = d.size(1), d.size(1)
    return {
        "x": d.floats(d.size(), width),
        "weight": d.floats(k, width),
        "bias": d.maybe(lambda: d.floats(k)),
    }


@takes
def code_statistics(d: Draw) -> Arguments:
    n, k = d.size(), d.size(1)
    return {"z": d.floats(n, d.size()), "codes": d.integers(n, low=-1, high=k + 1), "K": k}


@takes
def vector_quantize(d: Draw) -> Arguments:
    n, k, width = d.size(), d.size(1), d.size(1)
    gradient = d.one("straight_through", "rotation", "none")
    return {
        "z": d.floats(n, width),
        "codebook": d.floats(k, width),
        "metric": d.one("euclidean", "cosine"),
        "beta": d.one(1.0, 0.25),
        "codebook_weight": d.one(1.0, 0.0),
        "gradient": gradient,
        "mask": d.maybe(lambda: d.mask(n)),
    }


# --- patches --------------------------------------------------------------------------------------------------------


def _norm(d: Draw, width: int) -> tuple[Any, Any, float]:
    return d.floats(width), d.maybe(lambda: d.floats(width)), d.one(1e-5, 1e-6)


def _pixels(d: Draw, *shape: int) -> Spec:
    if d.one(False, False, True):
        return d.integers(*shape, high=256, dtype=torch.uint8)
    return d.floats(*shape)


def _moments(d: Draw, channels: int) -> Arguments:
    kind = d.one(None, None, "numbers", "tensors")
    if kind is None:
        return {}
    if kind == "numbers":
        return {"mean": d.one(0.5, (0.5,) * channels), "std": d.one(0.25, (0.25,) * channels)}
    acc = d.one(torch.promote_types(d.dtype, torch.float32), torch.float32)
    layout = d.one(("plain", None), ("strided", None))
    return {name: Spec((channels,), acc, layout, size=0) for name in ("mean", "std")}


@takes
def patch_embed(d: Draw) -> Arguments:
    b, channels, width = d.size(), d.one(1, 3), d.size(NORMED)
    dims, layout = d.one((2, "nchw"), (2, "nhwc"), (1, "nchw"), (3, "ntchw"), (3, "nchw"), (2, "patches"))
    kernel = tuple(d.one(1, 2, 3) for _ in range(dims))
    grid = tuple(d.one(1, 2, 3) for _ in range(dims))
    n, side = math.prod(grid), tuple(g * k for g, k in zip(grid, kernel, strict=True))
    # equal features have a LayerNorm of 0, and a gradient that is all rounding
    args: Arguments = {"weight": d.floats(width, channels, *kernel, styles=DISTINCT), "layout": layout}
    if layout == "patches":
        k = channels * math.prod(kernel)
        shape: tuple[int, ...] = (b, n, k)
        args["weight"] = d.floats(width, k, styles=DISTINCT)
    else:
        shape = {
            "nchw": (b, channels, *side),
            "nhwc": (b, *side, channels),
            "ntchw": (b, side[0], channels, *side[1:]),
        }[layout]
        step = d.one(None, None, None, 1, 2)
        if step:
            args |= {"stride": step, "padding": d.one("error", "zero")}
            zero = args["padding"] == "zero"
            counts = [max(0, -(-(s - k) // step) if zero else (s - k) // step) + 1 for s, k in zip(side, kernel)]  # noqa: B905
            n = math.prod(counts)
    kept = n
    if d.flag():
        args |= {"mask": d.mask(b, n), "mask_token": d.floats(width)}
    if d.one(False, False, True):
        kept = d.one(0, 1, 2)
        args["ids_keep"] = d.integers(b, kept, high=n)
    if d.flag():
        rows = d.one(0, 1, 2)
        args |= {"prefix": d.floats(rows, width), "prefix_position": d.maybe(lambda: d.floats(rows, width))}
        if args["prefix_position"] is None and d.flag():
            args["pos_embed"] = d.floats(rows + n, width)
    if "pos_embed" not in args:
        args["position"] = d.maybe(lambda: d.floats(n, width))
    return (
        args
        | _moments(d, channels)
        | {
            "pixels": _pixels(d, *shape),
            "bias": d.maybe(lambda: d.floats(width)),
            "stem_norm": d.maybe(lambda: _norm(d, width)),
            "type_embed": d.maybe(lambda: d.floats(width)),
            "pre_norm": d.maybe(lambda: _norm(d, width)),
            "dtype": d.one(None, None, torch.float32, torch.float16),
        }
    )


@takes
def interpolate_position(d: Draw) -> Arguments:
    mode, width = d.one(*MODES, "linear_1d"), d.size(1)
    h, w, gh, gw = (d.one(1, 2, 3, 5) for _ in range(4))
    if mode == "bicubic_scale":
        h, gh = w, gw
    if mode == "lookup":
        gh, gw = max(gh, h, w), max(gw, h, w)
    pair = mode == "linear_1d" or (mode not in ("bicubic_scale", "bicubic_aa") and d.flag())
    table = (d.floats(gh, width), d.floats(gw, width)) if pair else d.floats(gh, gw, width)
    return {"table": table, "grid": (h, w), "mode": mode, "keep_aspect": d.flag()}


@takes
def patch_embed_packed(d: Draw) -> Arguments:
    mode, order = d.one(*(m for m in MODES if m != "bicubic_scale")), d.one("raster", "merge2")
    sides = (0, 2, 4) if order == "merge2" else (0, 1, 2, 3)
    images, frames = d.one(0, 1, 2, 3), d.flag()
    grids = tuple((*((d.one(1, 2),) if frames else ()), d.one(*sides), d.one(*sides)) for _ in range(images))
    counts = [math.prod(g) for g in grids]
    gh = gw = d.one(4, 5) if mode == "lookup" else d.one(1, 2, 3)
    channels, width = d.one(1, 3), d.size(1)
    k = channels * d.one(1, 2, 4)
    total, longest = sum(counts), max(counts, default=0)
    args: Arguments = {}
    where = d.one("packed", "padded", "to padded", "kept")
    shape = (images, longest + d.one(0, 2), k) if where == "padded" else (total + d.one(0, 0, 2), k)
    if where == "to padded":
        args["padded_length"] = longest + d.one(0, 1)
    elif where == "kept":
        step = d.one(1, 2)
        ids = tuple(range(0, total, step))
        args["ids_keep"] = Spec((len(ids),), torch.int64, values=ids)
    position = d.one("table", "pair", "none")
    if position != "none":
        args["table"] = d.floats(gh, gw, width) if position == "table" else (d.floats(gh, width), d.floats(gw, width))
    kind = d.one(torch.int64, torch.int32)
    return (
        args
        | _moments(d, channels)
        | {
            "patches": _pixels(d, *shape),
            "grids": Spec((images, 3 if frames else 2), kind, d.one(("plain", None), ("strided", None)), values=grids),
            "weight": d.floats(width, k),
            "bias": d.maybe(lambda: d.floats(width)),
            "mode": mode,
            "keep_aspect": mode != "lookup" and d.flag(),
            "order": order,
            "channels_last": d.flag(),
            "pad_position": d.one("first", "none"),
            "dtype": d.one(None, None, torch.float32, torch.float16),
        }
    )


@takes
def masked_patch_loss(d: Draw) -> Arguments:
    b, channels, layout = d.size(1), d.one(1, 3), d.one("nchw", "nhwc", "ntchw", "video")
    dims = 2 if layout in ("nchw", "nhwc") else 3
    patch = (*(d.one(1, 2, 3) for _ in range(dims - 1)), d.one(2, 3))  # a single number has no variance
    grid = tuple(d.one(1, 2) for _ in range(dims))
    n, side = math.prod(grid), tuple(g * p for g, p in zip(grid, patch, strict=True))
    shape = {
        "nchw": (b, channels, *side),
        "nhwc": (b, *side, channels),
        "ntchw": (b, side[0], channels, *side[1:]),
        "video": (b, channels, *side),
    }[layout]
    rows = d.up_to(n, 1)  # nothing masked: another's
    return _moments(d, channels) | {
        "prediction": d.floats(b, d.one(n, rows), channels * math.prod(patch)),
        "pixels": _pixels(d, *shape),
        "mask": Spec((b, n), d.one(torch.bool, torch.float32, torch.int64), taken=rows),
        "patch": patch,
        "norm_pix": d.one(True, False, "patch", "channel"),
        "layout": "nchw" if layout == "video" else layout,
    }


# --- heads and text -------------------------------------------------------------------------------------------------


@takes
def select_head(d: Draw) -> Arguments:
    clips = d.one(None, None, 1, 2)
    b, length, width = d.size() * (clips or 1), d.one(1, 2, 5), d.size(NORMED)
    acc = torch.promote_types(d.dtype, torch.float32)
    kind = d.one(d.dtype, acc)
    affine = d.floats(width, dtype=kind), d.floats(width, dtype=kind)
    return {
        "x": d.floats(b, length, width),
        "index": d.one(0, d.integers(b, high=length)),
        "norm": (
            *d.one(lambda: (None, None), lambda: affine, lambda: affine[:1] + (None,), lambda: (None,) + affine[1:])(),
            d.one(1e-5, 1e-6),
        ),
        "weight": d.maybe(lambda: d.floats(d.size(1), width)),
        "normalize": d.flag(),
        "scale": d.one(None, d.scalar(20.0)),
        "clips": clips,
    }


@takes
def embed_text(d: Draw) -> Arguments:
    b, length, rows, width, offset = d.size(), d.size(), d.size(1), d.size(NORMED), d.one(0, 0, 2)
    return {
        "ids": d.integers(b, length, high=rows, dtype=d.one(torch.int64, torch.int32)),
        "table": d.floats(rows, width),
        "position": d.maybe(lambda: d.floats(length + offset + d.one(0, 1), width)),
        "position_offset": offset,
        "type_embed": d.maybe(lambda: d.floats(width)),
        "scale": d.one(1.0, 8.0),
        "norm": d.maybe(lambda: (d.maybe(lambda: d.floats(width)), d.maybe(lambda: d.floats(width)), 1e-5)),
        "padding_idx": d.one(None, 0, rows - 1),
        "pad_mask": d.maybe(lambda: d.mask(b, length)),
    }


@takes
def embed_pair(d: Draw) -> Arguments:
    b, channels, width, length, rows = d.size(), d.one(1, 3), d.size(1), d.size(), d.size(1)
    patch, grid, offset = (d.one(1, 2), d.one(1, 2, 3)), (d.one(1, 2), d.one(1, 3)), d.one(0, 2)
    n = math.prod(grid)
    args = {"mask": d.mask(b, n), "mask_token": d.floats(width)} if d.flag() else {}
    return (
        args
        | _moments(d, channels)
        | {
            "pixels": _pixels(d, b, channels, *(g * p for g, p in zip(grid, patch, strict=True))),
            "ids": d.integers(b, length, high=rows, dtype=d.one(torch.int64, torch.int32)),
            "weight": d.floats(width, channels, *patch),
            "bias": d.maybe(lambda: d.floats(width)),
            "cls_token": d.maybe(lambda: d.floats(width)),
            "position": d.floats(offset + 1 + n + d.one(0, 1), width),
            "table": d.floats(rows, width),
            "text_position": d.floats(offset + length + d.one(0, 1), width),
            "position_offset": offset,
            "pad_mask": d.maybe(lambda: d.mask(b, length)),
            "padding_idx": d.one(None, 0, rows - 1),
        }
    )


@takes
def linear_cross_entropy(d: Draw) -> Arguments:
    shape, width, words = d.one((1,), (3,), (2, 5)), d.size(1), d.size(1)
    args: Arguments = {}
    if d.one(False, False, True):
        other = d.size(1)
        bias = d.maybe(lambda: d.floats(words))
        args = {"teacher": (d.floats(*shape, other), d.floats(words, other), bias), "alpha": d.one(0.3, 1.0)}
    return args | {
        "hidden": d.floats(*shape, width),
        "weight": d.floats(words, width, styles=DISTINCT),
        "labels": d.integers(*shape, high=words, low=-1),
        "bias": d.maybe(lambda: d.floats(words)),
        "ignore_index": -1,
        "label_smoothing": 0.0 if args else d.one(0.0, 0.1),
        "reduction": d.one("mean", "sum", "none"),
        "chunk": d.one(None, 1, 2),
    }


# --- modality experts -----------------------------------------------------------------------------------------------


def _routing(d: Draw) -> Routing:
    experts = d.one(1, 2, 3)
    runs = [d.up_to(experts - 1) for _ in range(d.one(1, 2, 3))]
    bounds = torch.tensor([0, *(d.size() for _ in runs)]).cumsum(0)
    made = Routing.from_cu_seqlens(bounds, runs, experts)
    return replace(made, offsets=made.offsets.to(DEVICE))


def _experts(d: Draw, routing: Routing, *shape: int) -> Any:
    if d.flag():
        return d.floats(routing.experts, *shape)
    return [d.floats(*shape) for _ in range(routing.experts)]


def _branch(d: Draw, t: int, n: int) -> Arguments:
    shapes = {"residual": (t, n), "scale": (n,), "row_scale": (t,)}
    return {name: d.maybe(lambda s=shape: d.floats(*s)) for name, shape in shapes.items()}  # type: ignore[misc]


@takes
def routed_linear(d: Draw) -> Arguments:
    routing, activation, normed = _routing(d), d.one(*ACTIVATIONS), d.flag()
    k, n = d.size(NORMED if normed else 1), d.size(1)
    wide = 2 * n if activation in GATED else n
    return {
        "x": d.floats(routing.rows, k),
        "weight": _experts(d, routing, wide, k),
        "bias": d.maybe(lambda: _experts(d, routing, wide)),
        "routing": routing,
        "activation": activation,
        "input_norm": (_experts(d, routing, k), _experts(d, routing, k), 1e-5) if normed else None,
    } | _branch(d, routing.rows, n)


@takes
def routed_ffn(d: Draw) -> Arguments:
    routing, activation, normed = _routing(d), d.one("gelu", "gelu", "none", "silu", "geglu"), d.flag()
    k, f, n = d.size(NORMED if normed else 1), d.size(NORMED), d.size(1)
    wide = 2 * f if activation in GATED else f
    return {
        "x": d.floats(routing.rows, k),
        "weight_in": _experts(d, routing, wide, k),
        "bias_in": d.maybe(lambda: _experts(d, routing, wide)),
        "weight_out": _experts(d, routing, n, f),
        "bias_out": d.maybe(lambda: _experts(d, routing, n)),
        "routing": routing,
        "activation": activation,
        "norm": d.maybe(lambda: (_experts(d, routing, f), _experts(d, routing, f), 1e-5)),
        "input_norm": (_experts(d, routing, k), _experts(d, routing, k), 1e-5) if normed else None,
    } | _branch(d, routing.rows, n)


@takes
def routed_layer_norm(d: Draw) -> Arguments:
    routing, width = _routing(d), d.size(NORMED)
    bias = d.maybe(lambda: _experts(d, routing, width))
    return {
        "x": d.floats(routing.rows, width), "weight": _experts(d, routing, width), "bias": bias, "routing": routing,
        "eps": d.one(1e-5, 1e-3),
    }  # fmt: skip


@takes
def routed_rms_norm(d: Draw) -> Arguments:
    given = routed_layer_norm(d)
    del given["bias"]
    return given


@takes
def packed_attention(d: Draw) -> Arguments:
    samples, segments = d.one(1, 2), d.one(1, 2, 3)
    lengths = [d.size(1) for _ in range(segments)]
    kept = [[d.up_to(n, 1) for _ in range(samples)] if d.flag() else None for n in lengths]
    parts = [
        Part(0, samples, n, kept=None if of is None else torch.tensor(of, device=DEVICE))
        for n, of in zip(lengths, kept, strict=True)
    ]
    routing, heads, width = Routing.of(parts, 1, device=DEVICE), d.one(1, 2), d.size(1)
    places = max(lengths)
    return {
        **{name: d.floats(routing.rows, heads, width) for name in "qkv"},
        "routing": routing,
        # a segment sees itself, so that no row sees nothing
        "sees": d.maybe(
            lambda: [
                [d.one("all", "causal") if i == j else d.one("none", "causal", "all") for j in range(segments)]
                for i in range(segments)
            ]
        ),
        "bias": d.maybe(lambda: d.floats(heads, places, places)),
    }


# --- queries --------------------------------------------------------------------------------------------------------


@takes
def project_kv(d: Draw) -> Arguments:
    layers, heads, width, e = d.size(1, 3), d.size(1, 3), d.size(1), d.size(NORMED)
    norm = d.one((e,), (layers, e))
    return {
        "x": d.floats(d.size(), d.size(), e),
        "weight": d.floats(layers, 2, heads * width, e),
        "bias": d.maybe(lambda: d.floats(layers, 2, heads * width)),
        "heads": heads,
        "norm": d.maybe(lambda: (d.floats(*norm), d.floats(*norm), 1e-5)),
    }


@takes
def few_query_attention(d: Draw) -> Arguments:
    images, n, queries, heads, width = d.size(1), d.size(), d.size(), d.size(1, 3), d.size(1)
    args: Arguments = {"return_lse": d.flag()}
    if d.flag():
        sizes = [d.up_to(n) for _ in range(images)]
        bounds = tuple(sum(sizes[:i]) for i in range(images + 1))
        args |= {"cu_seqlens": Spec((images + 1,), d.one(torch.int32, torch.int64), values=bounds), "longest": n}
        k, v = (d.floats(bounds[-1] + d.one(0, 2), heads, width) for _ in range(2))
        v = replace(v, shape=k.shape)
    else:
        args["lengths"] = d.maybe(lambda: d.integers(images, high=n + 1))
        k, v = (d.floats(images, n, heads, width) for _ in range(2))
    args["kv_index"] = d.maybe(lambda: d.integers(d.size(), high=images))
    rows = images if args["kv_index"] is None else args["kv_index"].shape[0]
    return {"q": d.floats(d.one(1, rows), queries, heads, width), "k": k, "v": v} | args


@takes
def token_attention(d: Draw) -> Arguments:
    images, n, queries, heads, width, e = d.size(), d.size(), d.size(), d.size(1, 3), d.size(1), d.size(1)
    return {
        "q": d.floats(d.one(1, images), queries, heads, width),
        "x": d.floats(images, n, e),
        "key_weight": d.floats(heads * width, e),
        "value_weight": d.floats(heads * width, e),
        "value_bias": d.maybe(lambda: d.floats(heads * width)),
        "lengths": d.maybe(lambda: d.integers(images, high=n + 1)),
        "bias": d.maybe(lambda: d.floats(images, n)),
        "return_lse": d.flag(),
    }


# --- points ---------------------------------------------------------------------------------------------------------


@takes
def farthest_points(d: Draw) -> Arguments:
    b, n = d.size(), d.size(1)
    return {"points": d.floats(b, n, 3), "k": d.up_to(n, 1), "start": d.one(0, n - 1, d.integers(b, high=n))}


@takes
def nearest_neighbors(d: Draw) -> Arguments:
    b, n = d.size(), d.size(1)
    return {"query": d.floats(b, d.size(), 3), "points": d.floats(b, n, 3), "k": d.up_to(n, 1)}


@takes
def ball_query(d: Draw) -> Arguments:
    return nearest_neighbors(d) | {"radius": d.one(0.5, 1.5, 10.0)}


@takes
def group_points(d: Draw) -> Arguments:
    b, n = d.size(), d.size(1)
    return {
        "features": d.floats(b, n, d.size(1)),
        "idx": d.integers(b, d.size(), d.size(), high=n, dtype=d.one(torch.int64, torch.int32)),
    }


def _layers(d: Draw, width: int, least: int = 1) -> tuple[Spec, list[tuple[Spec, Spec]]]:
    c1, c2, c3, out = (d.size(1) for _ in range(4))
    # points that are equal tie for the maximum, and which of them has the gradient turns on a rounding
    groups = d.floats(*d.one((), (2,), (1, 3)), d.size(least), width, styles=DISTINCT)
    pairs = [(c1, width), (c2, c1), (c3, 2 * c2), (out, c3)]
    return groups, [(d.floats(*pair), d.floats(pair[0])) for pair in pairs]


@takes
def mini_pointnet(d: Draw) -> Arguments:
    groups, layers = _layers(d, d.one(3, 6))
    return {"groups": groups, "layers": layers}


@takes
def mini_pointnet_training(d: Draw) -> Arguments:
    groups, layers = _layers(d, 3, 2)  # eager refuses the statistics of one point
    scale = Spec(layers[2][1].shape, d.dtype, d.one(("plain", None), ("strided", None)), size=0)
    return {"groups": groups, "layers": layers, "scale": scale, "eps": d.one(1e-5, 1e-3)}


# --- results that are choices ---------------------------------------------------------------------------------------

Scores = tuple[Tensor, Tensor]  # [..., candidates] in float64, and what rounding may change in each row [..., 1]


def _products(x: Tensor, y: Tensor) -> Scores:
    """Inner products, and the size of the terms that they are sums of."""
    return x.double() @ y.double().t(), x.double().abs() @ y.double().abs().t()


def _of_topk(given: Arguments) -> dict[str, Scores]:
    s, size = _products(given["queries"], given["gallery"])
    return {"out 1": (numbers(s), size.amax(-1, keepdim=True))}


def _of_negatives(query: Tensor, keys: Tensor, scale: Any, given: Arguments, both: bool) -> list[Scores]:
    acc = torch.promote_types(query.dtype, torch.float32)
    s, size = (t * float(scale) for t in _products(query, keys))
    found, mixture = [], given.get("mixture", 0.0)
    for dim in (1, 0)[: 1 + both]:
        n0, n1, n2 = (
            gumbel(torch.tensor(given["seed"]), stream, given.get("row_offset", 0), 0, s.shape, acc).double()
            for stream in (dim, dim, dim + 2)
        )
        race = torch.fmax(s.log_softmax(dim) + n1, math.log(mixture) + n2) if mixture else s + n0
        race, bound = (t if dim else t.t() for t in (race, size + 20))
        found.append((numbers(race), bound.amax(-1, keepdim=True)))
    return found


def _of_hard_negatives(given: Arguments) -> dict[str, Scores]:
    both = given["both"]
    rows = _of_negatives(given["query"], given["keys"], given["logit_scale"], given, both)
    return {f"out {i}": s for i, s in enumerate(rows)}


def _of_queue(given: Arguments) -> dict[str, Scores]:
    query, keys = given["query"], given["keys"].to(given["query"].dtype)
    return {"out 1": _of_negatives(query, keys, 1 / given["temp"], given, False)[0]}


# what a result's indices were chosen by: another choice is as good where the scores differ by a rounding
SCORES = {"similarity_topk": _of_topk, "hard_negatives": _of_hard_negatives, "queue_itc_loss": _of_queue}


def public(name: str) -> Callable[..., Any]:
    return operators()[name].function(name)
