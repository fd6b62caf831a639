"""Patch embedding as a loop over blocks of images: patches go into a block that stays in the cache, then one product.

The product is added onto rows that already hold position, prefix and bias, in the buffer of the result itself:

    rows_b <- prefix, position + c                  A_b <- patches of the block's images, zeros under the prefix
    rows_b += A_b VT

and the gradients, of which only the pixels were saved:

    G = dyT A,   dW = s (G - d sum dy),   sums over images before sums over positions

The gather of the patches is `tile`: plain torch (`TorchTile`) or the compiled part's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels.patch.arguments import check_ids
from mmfuse.kernels.patch.geometry import fold as fold_patches
from mmfuse.kernels.patch.geometry import pad, unfold, unview
from mmfuse.kernels.patch.stem import DIFFERENTIABLE, Folded, Stem, fold, rows_added

_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of A


class TorchTile:
    """The gather in plain torch, any dtype, any device."""

    @staticmethod
    def patch_rows(x: Tensor, f: Folded, tokens: Tensor | None, rows: Tensor) -> None:
        """A of `tokens` (positions in the block's images, in a row), or of all, which `rows` [m, N, K] then are."""
        kernel = f.g.kernel
        k_dims = (*kernel, x.shape[1]) if f.channels_last else (x.shape[1], *kernel)
        order = (1, 2, 3, 0) if f.channels_last else (0, 1, 2, 3)

        def enter(patches: Tensor, channel: int) -> Tensor:
            per_channel = (slice(None), *[None] * (patches.dim() - channel - 1))
            y = patches.to(rows.dtype)
            y = y if f.subtract is None else y - f.subtract.to(rows.dtype)[per_channel]
            return y if f.multiply is None else y * f.multiply.to(rows.dtype)[per_channel]

        if tokens is None:
            windows = unfold(pad(enter(x, 1), f.g), f.g)
            into = rows.unflatten(2, k_dims).unflatten(1, f.g.grid)
            into.copy_(windows.permute(0, 1, 2, 3, *(4 + i for i in order)))
            return
        padded = f.g.padded != tuple(x.shape[2:])
        windows = unfold(pad(enter(x, 1), f.g) if padded else x, f.g)
        at, index = [], tokens
        for n in reversed(f.g.grid):
            at.append(index % n)
            index = torch.div(index, n, rounding_mode="floor")
        patches = windows[tuple(reversed([*at, index]))]
        rows.copy_((patches if padded else enter(patches, 1)).permute(0, *(1 + i for i in order)).flatten(1))


def compiled_tile(ops: Any) -> Any:
    """The compiled part's gather into float32, of uint8 and float32 pixels or of others after a cast."""
    return SimpleNamespace(
        patch_rows=lambda x, f, tokens, rows: ops.patch_rows(
            x if x.dtype == torch.uint8 else x.float(),
            x.new_empty(0, dtype=torch.int64) if tokens is None else tokens,
            *(rows.new_empty(0) if v is None else v for v in (f.subtract, f.multiply)),
            f.channels_last,
            *f.g.kernel,
            *f.g.stride,
            *f.g.grid,
            rows,
        )
    )


class Block:
    """The rows of some images: which patches they are, and what the forward makes of them."""

    def __init__(self, stem: Stem, f: Folded, i: int, j: int):
        self.stem, self.f = stem, f
        self.x, self.images = f.x[i:j], j - i
        _, self.r, self.n = stem.shape
        self.ids = None if stem.ids_keep is None else stem.ids_keep[i:j]
        mask = None if stem.mask is None else stem.mask[i:j]
        if mask is not None and self.ids is not None:
            mask = mask.gather(1, self.ids)
        self.mask = mask
        tokens = None
        if self.ids is not None:
            tokens = (self.ids + f.g.patches * torch.arange(j - i, device=f.x.device)[:, None]).flatten()
        self.kept: Tensor | None = None
        if mask is not None and f.x.device.type == "cpu":  # on a GPU it would wait for the number of them
            self.kept = (~mask).flatten().nonzero().squeeze(1)
            tokens = self.kept if tokens is None else tokens[self.kept]
        self.tokens = tokens

    def patches(self, tile: Any, scratch: Tensor) -> Tensor:
        """A of the patches to compute: [m N, K], or of those not masked."""
        count = self.images * self.n if self.kept is None else len(self.kept)
        rows = scratch[:count]
        every = rows.view(self.images, self.n, rows.shape[1]) if self.tokens is None else rows
        tile.patch_rows(self.x, self.f, self.tokens, every)
        if self.mask is not None and self.kept is None:
            rows.masked_fill_(self.mask.flatten()[:, None], 0)
        return rows

    def preload(self, rows: Tensor, added: Tensor) -> None:
        """rows [m, R + N, D] <- all that is not the product."""
        if self.ids is None:
            rows.copy_(added.expand_as(rows))
        else:
            rows[:, : self.r] = added[: self.r]
            rows[:, self.r :] = added[self.r :][self.ids]
        if self.mask is not None and self.stem.mask_token is not None:
            rows[:, self.r :] += torch.where(self.mask[:, :, None], self.stem.mask_token.to(rows.dtype), 0)

    def add(self, tokens: Tensor, product: Tensor) -> None:
        """tokens [m, N, D] += product, masked tokens not."""
        if self.kept is not None:
            at = self.kept
            image, position = at.div(self.n, rounding_mode="floor"), at % self.n
            tokens.index_put_((image, position), tokens[image, position] + product)
            return
        product = product.view(self.images, self.n, product.shape[1])
        if self.mask is not None:
            product = product.masked_fill(self.mask[:, :, None], 0)
        tokens.add_(product)

    def select(self, rows: Tensor) -> Tensor:
        """Gradients [m, N, D] of those that the product made, [m N, D] or [kept, D]."""
        if self.kept is not None:
            return rows.reshape(-1, rows.shape[2])[self.kept]
        if self.mask is not None:
            rows = rows.masked_fill(self.mask[:, :, None], 0)
        return rows.reshape(-1, rows.shape[2])


def blocks(stem: Stem, f: Folded, itemsize: int) -> Iterator[tuple[int, int]]:
    b, r, n = stem.shape
    size = max(1, (r + n) * f.weight.shape[1] * itemsize)
    step = max(1, _BLOCK_BYTES["cuda" if f.x.is_cuda else "cpu"] // size)
    for i in range(0, b, step):
        yield i, min(b, i + step)


def whole(stem: Stem, r: int, n: int) -> bool:
    """Whether every patch is computed, and the prefix is so short that its rows may join the product."""
    return stem.ids_keep is None and r <= n // 16


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    assert weight is not None
    w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return torch.native_layer_norm(x, list(w.shape), w, b, eps)


def norm_grad(g: Tensor, x: Tensor, stats: Any, weight: Tensor, bias: Tensor | None, sums: Any, name: str) -> Tensor:
    """dx; the gradients of weight and bias are added to the sums of this name."""
    w = weight.to(x.dtype)
    b = torch.zeros_like(w) if bias is None else bias.to(x.dtype)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(g, x, list(w.shape), *stats, w, b, [True, True, True])
    sums[f"{name}_weight"] += dw
    sums[f"{name}_bias"] += db
    return dx


def forward_into(tile: Any, out: Tensor, offset: int, stem: Stem) -> None:
    """Write the tokens into out[:, offset : offset + R + N]."""
    b, r, n = stem.shape
    if stem.ids_keep is not None:
        check_ids(stem.ids_keep, stem.geometry.patches)
    if b * (r + n) == 0:
        return
    acc, d = stem.acc, stem.weight.shape[0]
    f = fold(stem, acc)
    added = rows_added(stem, f.g.patches)
    plain = stem.mask is None and stem.stem_weight is None
    if plain and f.bias is not None:
        added = torch.cat([added[:r], added[r:] + f.bias])  # the rows may be the caller's position
    spans = list(blocks(stem, f, acc.itemsize))
    most = max(j - i for i, j in spans)
    k, new = f.weight.shape[1], partial(torch.empty, dtype=acc, device=out.device)
    # one product for the rows of all images in a row, with zeros under the prefix
    joined = plain and whole(stem, r, n)
    scratch = new(most, r + n, k).zero_() if joined else new(most * n, k)
    for i, j in spans:
        block = Block(stem, f, i, j)
        target = out[i:j, offset : offset + r + n]
        direct = target.dtype == acc and target.is_contiguous() and stem.pre_weight is None
        rows = target if direct else new(target.shape)
        block.preload(rows, added)
        if joined:
            tile.patch_rows(block.x, f, None, scratch[: j - i, r:])
            flat = rows.view(-1, d)
            products.add_mm_(flat, scratch[: j - i].view(-1, k), f.weight.t())
        else:
            a = block.patches(tile, scratch)
            product = products.mm(a, f.weight.t()) if plain else product_of(a, f)
            if stem.stem_weight is not None:
                product = norm(product, stem.stem_weight, stem.stem_bias, stem.stem_eps)[0]
            block.add(rows[:, r:], product)
        if stem.pre_weight is not None:
            rows = norm(rows, stem.pre_weight, stem.pre_bias, stem.pre_eps)[0]
        if not direct:
            target.copy_(rows)


def backward_from(
    tile: Any, grad: Tensor, stem: Stem, wanted: Collection[str], operand: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The gradients of the stem's tensors that are wanted, from that of its rows [B, R + N, D].

    Products are of `operand`, by default the accumulation dtype.
    """
    b, r, n = stem.shape
    acc, d = stem.acc, stem.weight.shape[0]
    operand = operand or acc
    f = fold(stem, operand)
    k, patches = f.weight.shape[1], f.g.patches
    need = {name: name in wanted for name in DIFFERENTIABLE}
    zeros = partial(torch.zeros, dtype=acc, device=grad.device)
    product = zeros(d, k)
    front, tokens = zeros(r, d), zeros(1 if stem.position is None else patches, d)
    sums = {name: zeros(d) for name in DIFFERENTIABLE}
    pixel_grads = zeros(f.x.shape if need["pixels"] else 0)
    plain = stem.mask is None and stem.stem_weight is None
    below = any(need[name] for name in ("pixels", "weight", "bias", "stem_weight", "stem_bias"))
    normed = stem.stem_weight is not None or stem.pre_weight is not None
    gather = need["weight"] or normed
    # the rows of all images in a row, with zeros under the prefix, spare a copy of the tokens' gradient
    joined = need["weight"] and plain and not normed and operand == acc and whole(stem, r, n)
    spans = list(blocks(stem, f, acc.itemsize)) if b * (r + n) else []
    most = max((j - i for i, j in spans), default=0) if gather else 0
    new = partial(torch.empty, dtype=operand, device=grad.device)
    scratch = new(most, r + n, k).zero_() if joined else new(most * n, k)
    added = rows_added(stem, patches) if stem.pre_weight is not None else None
    for i, j in spans:
        block = Block(stem, f, i, j)
        g = grad[i:j].to(acc)
        if joined:
            tile.patch_rows(block.x, f, None, scratch[: j - i, r:])
            products.add_mm_(product, g.reshape(-1, d).t(), scratch[: j - i].view(-1, k))
        a = block.patches(tile, scratch) if gather and not joined else scratch
        if normed:
            z = y = product_of(a, f)
            if stem.stem_weight is not None:
                z, *stem_stats = norm(y, stem.stem_weight, stem.stem_bias, stem.stem_eps)
        if stem.pre_weight is not None and added is not None:
            rows = torch.empty(g.shape, dtype=acc, device=g.device)
            block.preload(rows, added)
            block.add(rows[:, r:], z)
            _, *stats = norm(rows, stem.pre_weight, stem.pre_bias, stem.pre_eps)
            g = norm_grad(g, rows, stats, stem.pre_weight, stem.pre_bias, sums, "pre")
        front += g[:, :r].sum(0)
        g = g[:, r:]
        if stem.position is None:
            tokens += g.sum((0, 1))
        else:
            add_rows(tokens, block.ids, g)
        if block.mask is not None and need["mask_token"]:
            sums["mask_token"] += g.masked_fill(~block.mask[:, :, None], 0).sum((0, 1))
        if not below or (joined and not need["pixels"]):
            continue
        dy = block.select(g)
        if stem.stem_weight is not None:
            dy = norm_grad(dy, y, stem_stats, stem.stem_weight, stem.stem_bias, sums, "stem")
        if not plain:
            sums["bias"] += dy.sum(0)
        if need["weight"] and not joined:
            if operand == acc:
                products.add_mm_(product, dy.t(), a)
            else:
                product += matmul(dy.to(operand).t(), a)
        if need["pixels"]:
            pixel_grads[i:j] = fold_back(block, pixels_of(dy, f))
    if plain:
        sums["bias"] = tokens.sum(0)
    sums["type_embed"] = front.sum(0) + tokens.sum(0)
    grads = sums | {"prefix": front, "prefix_position": front, "position": tokens}
    if need["weight"]:
        grads["weight"] = f.weight_grad(product, sums["bias"], stem.weight)
    if need["pixels"]:
        grads["pixels"] = unview(pixel_grads, stem.pixels, stem.layout)
    return gradients(grads, stem, wanted)


def gradients(grads: dict[str, Tensor], stem: Stem, wanted: Collection[str]) -> dict[str, Tensor]:
    """Those that are wanted, in the dtypes of the stem's tensors."""
    given = {name: t for name in wanted if (t := getattr(stem, name)) is not None}
    return {name: grads[name].to(t.dtype, copy=name == "prefix_position") for name, t in given.items()}


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 for operands of 16 bits."""
    if a.dtype.itemsize >= 4:
        return products.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else products.mm(a.float(), b.float())


def product_of(a: Tensor, f: Folded) -> Tensor:
    y = matmul(a, f.weight.t())
    y = y if f.unscale is None else y.mul_(f.unscale)
    return y if f.bias is None else y.add_(f.bias)


def pixels_of(dy: Tensor, f: Folded) -> Tensor:
    """The gradient of A; that of pixels is needed where V is the weight itself."""
    return matmul(dy if f.unscale is None else dy * f.unscale, f.weight.to(dy.dtype))


def fold_back(block: Block, rows: Tensor) -> Tensor:
    """The gradient of the block's pixels [m, C, T, H, W] from that of its A."""
    f = block.f
    if f.multiply is not None:
        rows = rows * f.over_k(f.multiply)
    if block.tokens is not None:
        every = rows.new_zeros(block.images * f.g.patches, rows.shape[1])
        rows = sum_at(every, block.tokens, rows)
    if f.channels_last:
        rows = rows.unflatten(1, (-1, f.x.shape[1])).transpose(1, 2)
    return fold_patches(rows.flatten(1).unflatten(0, (block.images, f.g.patches)), f.g, block.x.shape)


def pixel_grad(grad: Tensor, stem: Stem) -> Tensor:
    """The gradient of the pixels from that of the tokens [B, N, D], without a norm."""
    f = fold(stem, stem.acc)
    dx = torch.zeros(f.x.shape, dtype=stem.acc, device=grad.device)
    for i, j in blocks(stem, f, stem.acc.itemsize) if grad.numel() else ():
        block = Block(stem, f, i, j)
        dx[i:j] = fold_back(block, pixels_of(block.select(grad[i:j].to(stem.acc)), f))
    return unview(dx, stem.pixels, stem.layout)


def add_rows(total: Tensor, ids: Tensor | None, g: Tensor) -> None:
    """total [N, D] += the sum over images of g [m, n, D], whose patches are `ids` or all."""
    if ids is None:
        total += g.sum(0)
    else:
        sum_at(total, ids.flatten(), g.reshape(-1, g.shape[2]))


def sum_at(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index] += rows, in order: torch sorts on a GPU and has one thread on a CPU."""
    return total.index_put_((index,), rows, accumulate=True) if rows.is_cuda else total.index_add_(0, index, rows)
