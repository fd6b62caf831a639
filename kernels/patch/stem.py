"""The operator's arguments as one object, and the weight with the normalisation folded in.

A product sees pixels as A and the weight as V, so that A VT + c = W . (x / 255 - mean) / std + bias:

    uint8     A = x - i   (exact)       V = 2^q W s   rounded      c = bias - sum_k V d / 2^q
    float     A = (x - mean) / std      V = W                      c = bias
    s = 1 / (255 std),  i = round(255 mean),  d = 255 mean - i;    one q for each row of V, 0 unless V is float16
    where zeros are added around the pixels, i = 255 mean

The bias is that of the rounded V: the image's mean does not multiply the rounding error of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels.patch.geometry import Geometry, kernel_of, source, view


@dataclass
class Stem:
    """What `patch_embed` takes, checked, and where its patches lie."""

    pixels: Tensor
    weight: Tensor
    bias: Tensor | None
    stem_weight: Tensor | None
    stem_bias: Tensor | None
    prefix: Tensor | None
    position: Tensor | None
    prefix_position: Tensor | None
    mask_token: Tensor | None
    type_embed: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    mask: Tensor | None
    ids_keep: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    stride: Sequence[int] | None
    layout: str
    padding: str
    stem_eps: float
    pre_eps: float
    compute: torch.dtype  # of the product: the weight's, or that of autocast
    dtype: torch.dtype  # of the tokens
    table: Tensor | None = field(default=None, init=False)  # of which prefix_position and position are parts
    geometry: Geometry = field(init=False)
    still: bool = field(init=False)  # a still image meets a temporal kernel

    def __post_init__(self) -> None:
        self.geometry, self.still = source(self.pixels, self.weight, self.stride, self.layout, self.padding)

    @property
    def products(self) -> int:
        return self.pixels.shape[0] * self.patches * self.weight.numel()

    @property
    def patches(self) -> int:
        """Those of an image that are computed."""
        return self.geometry.patches if self.ids_keep is None else self.ids_keep.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, N) of the tokens: prefix rows and patches that are computed."""
        return self.pixels.shape[0], 0 if self.prefix is None else self.prefix.shape[0], self.patches

    @property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.compute)

    def place(self, table: Tensor) -> None:
        """The positions of the prefix and of the patches as one table [R + N, D]."""
        if self.prefix is None:
            self.position = table
        else:
            # not `split`, which asks in Python what it is given
            sizes, self.table = [len(self.prefix), self.geometry.patches], table
            self.prefix_position, self.position = table.split_with_sizes(sizes)

    @property
    def bare(self) -> bool:
        """Whether it is a convolution and nothing else."""
        bare = self.stem_weight is self.prefix is self.position is self.mask is self.ids_keep is None
        bare = bare and self.type_embed is self.pre_weight is self.mean is self.std is None
        return bare and self.pixels.is_floating_point()


# the fields that may need a gradient
DIFFERENTIABLE = (
    "pixels", "weight", "bias", "stem_weight", "stem_bias", "prefix", "position", "prefix_position", "mask_token",
    "type_embed", "pre_weight", "pre_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """The operands of the product; what is None is 0, or 1 for a factor."""

    x: Tensor  # [B, C, T, H, W], a view of the pixels
    g: Geometry
    still: bool
    channels_last: bool  # the order of K: (t, y, x, c) instead of (c, t, y, x), as the pixels lie in memory
    subtract: Tensor | None  # [C]: A = (x - subtract) multiply
    multiply: Tensor | None  # [C]
    scale: Tensor | None  # [C], s
    rest: Tensor | None  # [C], d
    weight: Tensor  # [D, K], V
    unscale: Tensor | None  # [D], 2^-q
    bias: Tensor | None  # [D], c

    def over_k(self, v: Tensor) -> Tensor:
        """A value of each channel as one of each column of A."""
        kt, kh, kw = self.g.kernel
        return v.repeat(kt * kh * kw) if self.channels_last else v.repeat_interleave(kt * kh * kw)

    def weight_grad(self, product: Tensor, sums: Tensor, like: Tensor) -> Tensor:
        """The weight's gradient from G = dyT A [D, K] and the column sums of dy [D]."""
        if self.rest is not None:
            product = product.sub_(sums[:, None] * self.over_k(self.rest))
        if self.scale is not None:
            product = product.mul_(self.over_k(self.scale))
        c, k = self.x.shape[1], self.g.kernel
        if self.channels_last:
            product = product.view(-1, *k, c).movedim(-1, 1)
        grad = product.to(like.dtype)
        if self.still:
            return grad.reshape(-1, c, *k).expand_as(like).contiguous()
        return grad.reshape(like.shape)


def entering(stem: Stem) -> Folded:
    """How pixels enter the product; the weight is still to come."""
    g = stem.geometry
    x = view(stem.pixels, stem.weight.dim(), stem.layout)
    mean, std = (None if t is None else t.to(torch.promote_types(t.dtype, stem.acc)) for t in (stem.mean, stem.std))
    subtract = multiply = scale = rest = None
    if stem.pixels.dtype != torch.uint8:
        subtract, multiply = mean, None if std is None else 1 / std
    elif mean is not None or std is not None:
        scale = 1 / (255 * (torch.ones_like(mean) if std is None else std))  # type: ignore[arg-type]
        # zeros beyond the image are those of normalised pixels
        padded = g.padded != tuple(x.shape[2:])
        if mean is not None:
            subtract = 255 * mean if padded else torch.round(255 * mean)
            rest = None if padded else 255 * mean - subtract
    return Folded(
        x=x,
        g=g,
        still=stem.still,
        channels_last=x.shape[1] > 1 and x.stride(1) < x.stride(4),
        subtract=None if subtract is None else subtract.to(stem.acc),
        multiply=None if multiply is None else multiply.to(stem.acc),
        scale=None if scale is None else scale.to(stem.acc),
        rest=None if rest is None else rest.to(stem.acc),
        weight=stem.weight,
        unscale=None,
        bias=stem.bias,
    )


def fold(stem: Stem, operand: torch.dtype) -> Folded:
    """The operands of the product, the weight rounded to `operand`."""
    f, acc = entering(stem), stem.acc
    w = kernel_of(stem.weight.to(acc), stem.layout, f.still)
    if f.scale is not None:
        w = w * f.scale[:, None, None, None]
    w = (w.movedim(1, -1) if f.channels_last else w).flatten(1)
    unscale = None
    if operand == torch.float16:
        # the largest of a row into [2^13, 2^14): float16 neither overflows nor loses what matters
        exponent = 14 - torch.frexp(w.abs().amax(1)).exponent
        w = torch.ldexp(w, exponent[:, None])
        unscale = torch.ldexp(torch.ones_like(w[:, 0]), -exponent)
    w = w.to(operand).contiguous()
    bias = None if stem.bias is None else stem.bias.to(acc)
    if f.rest is not None:
        shift = w.to(acc) @ f.over_k(f.rest)
        shift = shift if unscale is None else shift * unscale
        bias = -shift if bias is None else bias - shift
    return replace(f, weight=w, unscale=unscale, bias=bias)


def rows_added(stem: Stem, n: int) -> Tensor:
    """What every image adds to the product: prefix, positions and type, [R + n, D]."""
    d, acc = stem.weight.shape[0], stem.acc
    rows = torch.zeros(n, d, dtype=acc, device=stem.pixels.device) if stem.position is None else stem.position.to(acc)
    if stem.prefix is not None:
        front = stem.prefix.to(acc)
        front = front if stem.prefix_position is None else front + stem.prefix_position
        rows = torch.cat([front, rows])
    return rows if stem.type_embed is None else rows + stem.type_embed
