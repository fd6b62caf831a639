"""The contrastive template as a loop over blocks of rows: matrix products by torch, one pass over each block of logits.

For features x [b, D] and y [N, D], logits S = s U with U = x yT and positives at column i + row_offset:

    stats      m = max S and l = sum exp(S - m) of every row and column over the negatives
    grad       G_ij = a_i exp(S_ij - rho_i) + b_j exp(S_ij - kappa_j) - shift,  d_i on the positives
               dx = s alpha G y,   dy = s alpha GT x,   ds = alpha <x, G y>
    sigmoid    softplus(-z S) and its gradients in the same pass

More positives, of equal keys: `stats` sums U over them, `grad` subtracts their targets p_i + q_j.

No b x N matrix is held unless the caller asks for the logits to be kept. The pass over a block is `tile`: plain torch
(`TorchTile`), or the compiled part's streaming kernels for CPU and CUDA (`compiled_tile`).
"""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype

# rows per block: large enough for the matrix products' full speed, and a block of logits that stays near the cache
_MAX_ROWS = 2048
_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_INT16_MAX = 32767
# float16 blocks of G hold this much more than G: 1/N would be subnormal there
FP16_SCALE = 2.0**13


def unit_rows(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v / max(|v|, 1e-12) in v's dtype, 1 / max(|v|, 1e-12) [b] in the accumulation dtype)."""
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=accumulation_dtype(v.dtype))
    inverse = norm.clamp_min(1e-12).reciprocal()
    return torch.mul(v, inverse[:, None], out=torch.empty(v.shape, dtype=v.dtype, device=v.device)), inverse


def fixed_point_step(x: Tensor, y: Tensor) -> Tensor:
    """The step of int16 logits, one per row [b]: |<x_i, y_j>| <= |x_i| max_j |y_j| (Cauchy-Schwarz)."""
    acc = accumulation_dtype(x.dtype)
    bound = torch.linalg.vector_norm(x, dim=-1, dtype=acc)
    if len(y):
        bound = bound * torch.linalg.vector_norm(y, dim=-1, dtype=acc).amax()
    return bound.clamp_min(1e-30) / _INT16_MAX


def finish(g: Tensor, x: Tensor, factor: Tensor, inverse: Tensor | None, out: Tensor) -> Tensor:
    """Write factor * g into `out`, through the L2 normalisation when its inverse norms are given; return <x, g>."""
    dot = (g * x.to(g.dtype)).sum(-1)
    if inverse is not None:
        # at |v| <= 1e-12 the clamp holds the norm fixed, so nothing is projected out
        along = dot * (inverse < 0.999e12)
        g = torch.addcmul(g, x.to(g.dtype), along[:, None], value=-1) * inverse[:, None]
    torch.mul(g, factor, out=out)
    # float64: the rows' terms cancel in the sum, which is the gradient of the scale
    return dot.sum(dtype=torch.float64)


def finish_rows(g: Tensor, x: Tensor, factor: Tensor, inverse: Tensor | None, out: Tensor) -> Tensor:
    """`finish` over blocks of rows, so that no second [N, D] tensor of the accumulation dtype exists."""
    total = g.new_zeros((), dtype=torch.float64)
    for i in range(0, len(g), 8192):
        rows = slice(i, i + 8192)
        inv = None if inverse is None else inverse[rows]
        total = total + finish(g[rows].contiguous(), x[rows], factor, inv, out[rows])
    return total


def positive_logits(x: Tensor, y: Tensor, row_offset: int) -> Tensor:
    """U near the positives of the rows, and of the columns (0 where there is none), [b + N]."""
    pairs = y[row_offset : row_offset + len(x)]
    u = torch.mul(x.to(accumulation_dtype(x.dtype)), pairs).sum(1)
    return torch.cat([u, F.pad(u, (row_offset, len(y) - len(x) - row_offset))])


def not_finite(*features: Tensor) -> Tensor:
    """NaN if any of them is not finite, else 0."""
    return torch.stack([(0 * t).sum(dtype=torch.float32) for t in features]).sum()


def finite(m: Tensor) -> Tensor:
    """A maximum as an offset: 0 where there was nothing to take the maximum of."""
    return m.masked_fill(m == -torch.inf, 0)


_NUMBERS = {t: (torch.finfo(t).min, torch.finfo(t).max) for t in (torch.float32, torch.float64)}


class TorchTile:
    """The pass over a block of logits in plain torch, any float dtype, any device."""

    @staticmethod
    def logit_stats(u, scale, diagonal, step, row_max, row_sum, col_max, col_sum, q) -> None:  # type: ignore[no-untyped-def]
        if q.numel():
            # the loss is that of the kept logits, so that the probabilities of the backward sum to one
            u = torch.round(u / step[:, None])
            q.copy_(u)
            u = u * step[:, None]
        s = u * scale
        s.diagonal(diagonal).fill_(-torch.inf)
        torch.amax(s, 1, out=row_max)
        row_sum.copy_(torch.exp(s - finite(row_max)[:, None]).sum(1))
        m = torch.maximum(col_max, s.amax(0))
        col_sum.mul_(torch.exp(col_max - finite(m))).add_(s.sub_(finite(m)).exp_().sum(0))
        col_max.copy_(m)

    @staticmethod
    def logit_grad(u, scale, a, rho, b, kappa, d, shift, diagonal, step, g, dot) -> None:  # type: ignore[no-untyped-def]
        if u.dtype == torch.int16:
            u = u * step[:, None]
        s = u * scale
        p = torch.exp(s - rho[:, None]).mul_(a[:, None])
        p.addcmul_(s.sub_(kappa).exp_(), b)
        if shift:
            p.sub_(shift)
        rows = slice(max(0, -diagonal), max(0, min(len(u), u.shape[1] - diagonal)))
        p.diagonal(diagonal).copy_(d[rows])
        if dot.numel():
            dot.copy_((p * u).sum(1))
        g.copy_(p * FP16_SCALE if g.dtype == torch.float16 else p)

    @staticmethod
    def add_positives(u, diagonal, row_key, col_key, row_centre, col_centre, row_sum, col_sum) -> None:  # type: ignore[no-untyped-def]
        other = row_key[:, None] != col_key
        other.diagonal(diagonal).fill_(True)
        row_sum.copy_((u - row_centre[:, None]).masked_fill_(other, 0).sum(1))
        col_sum.add_((u - col_centre).masked_fill_(other, 0).sum(0))

    @staticmethod
    def subtract_targets(g, row_key, col_key, p, q) -> None:  # type: ignore[no-untyped-def]
        g.sub_((p[:, None] + q).masked_fill_(row_key[:, None] != col_key, 0))

    @staticmethod
    def cross_stats(  # type: ignore[no-untyped-def]
        u, t, scale, t_scale, diagonal, row_max, col_before, col_max, c_i, c_j, row_sum, col_sum, row_cross, col_cross
    ) -> None:
        t = t * t_scale
        t.diagonal(diagonal).fill_(-torch.inf)
        e = torch.exp(t - finite(row_max)[:, None])
        row_sum.copy_(e.sum(1))
        row_cross.copy_((u - c_i[:, None]).mul_(scale).mul_(e).sum(1))
        e = t.sub_(finite(col_max)).exp_()
        back = torch.exp(col_before - finite(col_max))
        col_sum.mul_(back).add_(e.sum(0))
        col_cross.mul_(back).add_((u - c_j).mul_(scale).mul_(e).sum(0))

    @staticmethod
    def distill_grad(u, t, scale, t_scale, a, rho, b, kappa, t_a, t_rho, t_b, t_kappa, g) -> None:  # type: ignore[no-untyped-def]
        s, t = u * scale, t * t_scale
        torch.exp(s - rho[:, None], out=g).mul_(a[:, None])
        g.addcmul_(torch.exp(t - t_rho[:, None]), t_a[:, None], value=-1)
        p = s.sub_(kappa).exp_().mul_(b)
        g.add_(p.addcmul_(t.sub_(t_kappa).exp_(), t_b, value=-1))

    @staticmethod
    def teacher_grad(  # type: ignore[no-untyped-def]
        u, t, scale, t_scale, a, rho, b, kappa, mean_i, c_i, t_c_i, mean_j, c_j, t_c_j, diagonal, g, dot
    ) -> None:
        s = t * t_scale
        p = torch.exp(s - rho[:, None]).mul_(a[:, None])
        p.mul_(torch.sub(mean_i[:, None], (u - c_i[:, None]).mul_(scale)))
        q = s.sub_(kappa).exp_().mul_(b).mul_(torch.sub(mean_j, (u - c_j).mul_(scale)))
        torch.add(p, q, out=g)
        terms = p.mul_(t - t_c_i[:, None]).addcmul_(q, t - t_c_j)
        terms.diagonal(diagonal).zero_()
        dot.copy_(terms.sum(1, dtype=torch.float64))

    @staticmethod
    def sigmoid_grad(u, scale, bias, diagonal, negative_only, g, sums) -> None:  # type: ignore[no-untyped-def]
        s = u * scale + bias
        if not negative_only:
            s.diagonal(diagonal).neg_()
        loss = torch.logaddexp(s, s.new_zeros(())).sum(1, dtype=torch.float64)
        p = torch.sigmoid(s)
        if not negative_only:
            # sigma(S) - 1 = -sigma(-S), which keeps its digits when the pair is already well matched
            p.diagonal(diagonal).neg_()
        # G of 0 times a product that overflowed is 0
        dot = p * u.clamp(*_NUMBERS[u.dtype])
        sums[0], sums[1], sums[2] = loss, p.sum(1, dtype=torch.float64), dot.sum(1, dtype=torch.float64)
        if g.numel():
            g.copy_(p * FP16_SCALE if g.dtype == torch.float16 else p)


def compiled_tile(namespace: Any) -> SimpleNamespace:
    """The same passes from the compiled part: `torch.ops.mmfuse_cpu`, or `mmfuse_cuda`, which has the main three."""
    names = (name for name in vars(TorchTile) if not name.startswith("_"))
    return SimpleNamespace(**{name: getattr(namespace, name).default for name in names if hasattr(namespace, name)})


class Blocks:
    """Operands ready for matrix products, and the loop's bounds."""

    def __init__(self, x: Tensor, y: Tensor):
        self.acc = accumulation_dtype(x.dtype)
        self.dtype = x.dtype if x.is_cuda else self.acc  # of G as a tile leaves it
        self.x, self.y = (products.operand(t, self.acc) for t in (x, y))
        b, n = len(x), len(y)
        rows = _BLOCK_BYTES[x.device.type] // max(1, n * self.acc.itemsize)
        self.rows = max(64, min(_MAX_ROWS if x.device.type == "cpu" else 4096, rows))
        self.spans = [(i, min(i + self.rows, b)) for i in range(0, b, self.rows)]

    def block(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(min(self.rows, len(self.x)), len(self.y), dtype=dtype, device=self.x.device)

    def logits(self, i: int, j: int, out: Tensor) -> Tensor:
        return products.mm(self.x[i:j], self.y.t(), out)


class Statistics:
    """m and l of the negatives of every row and column, and U at the positives, as the blocks of rows come."""

    def __init__(self, blocks: Blocks, scale: Tensor):
        b, self.n, self.scale = len(blocks.x), len(blocks.y), scale
        new: dict[str, Any] = {"dtype": blocks.acc, "device": blocks.x.device}
        self.row_max, self.col_max = (torch.full((k,), -torch.inf, **new) for k in (b, self.n))
        self.row_sum, self.col_sum = (torch.zeros(k, **new) for k in (b, self.n))
        self.positive = torch.empty(b, **new)

    def add(self, tile: Any, u: Tensor, i: int, diagonal: int, step: Tensor, q: Tensor) -> None:
        """Take in the rows from i on; `q`, unless it is empty, keeps them in whole steps."""
        rows = slice(i, i + len(u))
        into = (self.row_max[rows], self.row_sum[rows], self.col_max, self.col_sum)
        tile.logit_stats(u, self.scale, diagonal, step, *into, q)
        if diagonal < self.n:
            self.positive[rows] = q.diagonal(diagonal) * step if q.numel() else u.diagonal(diagonal)

    def all(self) -> tuple[Tensor, ...]:
        return self.row_max, self.row_sum, self.col_max, self.col_sum, self.positive


def stats(
    tile: Any,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_offset: int,
    save: str,
    same: tuple[Tensor, Tensor] | None = None,
    maxima: bool = False,
) -> tuple[Tensor, ...]:
    """(row_max, row_sum [b], col_max, col_sum [N], positive [b], logits).

    The negatives' m and l (without a negative -inf and 0), U at the positives, and the logits if kept. The positives
    are read like the negatives, out of the same products and as they are kept: among equal features they cancel.
    With row_offset >= N there are none, and `positive` is undefined.

    `save`: "" keeps nothing (logits is empty), "full" keeps U in the accumulation dtype, "int16" in fixed point.
    `same` (keys, centres c [b + N]): also the sums, over equal keys but the positive, of U_ij - c_i of every row [b]
    and of U_ij - c_j of every column [N].
    `maxima`: m are the maxima, which they are here; a kernel may otherwise take any number that leaves l its digits.
    """
    blocks = Blocks(x, y)
    b, n, acc, in_steps = len(x), len(y), blocks.acc, save == "int16"
    found = Statistics(blocks, scale)
    sums = [] if same is None else [torch.zeros(k, dtype=acc, device=x.device) for k in (b, n)]
    logits = torch.empty((b, n) if save else 0, dtype=torch.int16 if in_steps else acc, device=x.device)
    step = fixed_point_step(x, y) if in_steps else x.new_empty(0, dtype=acc)
    if b and n:
        block = logits if save == "full" else blocks.block(acc)
        for i, j in blocks.spans:
            u = blocks.logits(i, j, block[i:j] if save == "full" else block[: j - i])
            q = logits[i:j] if in_steps else logits[:0]
            found.add(tile, u, i, i + row_offset, step[i:j], q)
            if same is not None:
                kept = q * step[i:j, None] if in_steps else u
                given = (t for k in same for t in (k[i:j], k[b:]))
                tile.add_positives(kept, i + row_offset, *given, sums[0][i:j], sums[1])
    return *found.all(), logits, *sums


def grad(
    tile: Any,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    alpha: Tensor,
    a: Tensor,
    rho: Tensor,
    b: Tensor,
    kappa: Tensor,
    d: Tensor,
    shift: float,
    row_offset: int,
    logits: Tensor,
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_s: bool,
    targets: tuple[Tensor, Tensor, Tensor] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) for the external normalisers (a, rho, b, kappa), the positives' d and a constant shift.

    `targets` (keys [b + N], p [b], q [N]): G is less by p_i + q_j where the keys are equal (but for the positives' d).
    `wide`: dx in the accumulation dtype, for a sum over parts of y.
    """
    blocks = Blocks(x, y)
    acc, device = blocks.acc, x.device
    out = Gradients(blocks, x, y, scale * alpha, x_inv, y_inv, need_x, need_y, acc if wide else None)
    dot = torch.zeros(len(x) if need_s and not (need_x or need_y) else 0, dtype=acc, device=device)
    step = fixed_point_step(x, y) if logits.dtype == torch.int16 else dot[:0]
    if len(x) and len(y):
        u_block = None if logits.numel() else blocks.block(acc)
        # rounded once, when it is whole
        g_dtype = blocks.dtype if targets is None else acc
        reuse = g_dtype == acc and u_block is not None and (targets is None or not dot.numel())
        g_block: Any = u_block if reuse else blocks.block(g_dtype)
        for i, j in blocks.spans:
            u = logits[i:j] if u_block is None else blocks.logits(i, j, u_block[: j - i])
            g, diagonal = g_block[: j - i], i + row_offset
            tile.logit_grad(u, scale, a[i:j], rho[i:j], b, kappa, d[i:j], shift, diagonal, step[i:j], g, dot[i:j])
            if targets is not None:
                keys, p, q = targets
                tile.subtract_targets(g, keys[i:j], keys[len(x) :], p[i:j], q)
                g.diagonal(diagonal).copy_(d[i:j])
                if dot.numel():
                    dot[i:j] = (g * (u * step[i:j, None] if step.numel() else u)).sum(1)
            out.add(g, i, j)
    dx, dy, xgy = out.finish()
    ds = alpha * (dot.sum() if dot.numel() else xgy.to(acc))
    return dx, dy, ds if need_s else dot.new_empty(0)


def sigmoid(
    tile: Any,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    negative_only: bool,
    x_inv: Tensor | None,
    y_inv: Tensor | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx, dy, ds, db) of SigLIP's loss, sum over all pairs divided by the number of rows.

    dx and dy are in the accumulation dtype: they are rounded when they have been multiplied by the upstream gradient.
    """
    blocks = Blocks(x, y)
    acc = blocks.acc
    alpha = torch.full((), 1 / max(1, len(x)), dtype=acc, device=x.device)
    out = Gradients(blocks, x, y, scale * alpha, x_inv, y_inv, need_x, need_y, acc, acc)
    sums, missing = torch.zeros(3, len(x), dtype=torch.float64, device=x.device), torch.zeros_like(alpha)
    if len(x) and len(y):
        missing = not_finite(x, y).to(acc)
        u_block = blocks.block(acc)
        g_block = u_block if blocks.dtype == acc else blocks.block(blocks.dtype)
        for i, j in blocks.spans:
            u = blocks.logits(i, j, u_block[: j - i])
            g = g_block[: j - i] if need_x or need_y else g_block[:0]
            row_sums = torch.empty(3, j - i, dtype=torch.float64, device=x.device)
            tile.sigmoid_grad(u, scale, bias, i + row_offset, negative_only, g, row_sums)
            sums[:, i:j] = row_sums
            if need_x or need_y:
                out.add(g, i, j)
    dx, dy, _ = out.finish()
    loss, db, ds = (sums.sum(1) / max(1, len(x))).to(acc)
    return loss.clone(), dx, dy, ds + missing, db.clone()


class Gradients:
    """dx and dy, from blocks of G as they come."""

    def __init__(  # type: ignore[no-untyped-def]
        self, blocks, x, y, factor, x_inv, y_inv, need_x, need_y, dx_dtype=None, dy_dtype=None
    ):
        self.blocks, self.x, self.y, self.x_inv, self.y_inv = blocks, x, y, x_inv, y_inv
        self.need_x, self.need_y, self.dy_dtype = need_x, need_y, dy_dtype or y.dtype
        self.unscale = 1 / FP16_SCALE if blocks.x.dtype == torch.float16 else 1.0
        self.factor = factor * self.unscale
        new = {"dtype": blocks.acc, "device": x.device}
        self.dx = torch.zeros(x.shape if need_x else 0, dtype=dx_dtype or x.dtype, device=x.device)
        self.gx = torch.empty((min(blocks.rows, len(x)), x.shape[1]) if need_x else 0, **new)
        # in 16 bits a CPU multiplies G as it lies, by xT: dy is made transposed
        transposed = need_y and not x.is_cuda and blocks.x.dtype != blocks.acc
        self.gy = torch.zeros(y.shape[::-1], **new).t() if transposed else torch.zeros(y.shape if need_y else 0, **new)
        self.xgy = torch.zeros((), dtype=torch.float64, device=x.device)

    @cached_property
    def rounded(self) -> Tensor:
        return self.blocks.block(self.blocks.x.dtype)

    def add(self, g: Tensor, i: int, j: int) -> None:
        if g.dtype != self.blocks.x.dtype:
            g = self.rounded[: j - i].copy_(g if self.unscale == 1 else g / self.unscale)
        if self.need_x:
            gx = products.mm(g, self.blocks.y, self.gx[: j - i])
            inv = None if self.x_inv is None else self.x_inv[i:j]
            self.xgy += finish(gx, self.x[i:j], self.factor, inv, self.dx[i:j])
        if self.need_y:
            products.add_mm_(self.gy, g.t(), self.blocks.x[i:j])

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        dy = torch.zeros(self.y.shape if self.need_y else 0, dtype=self.dy_dtype, device=self.y.device)
        if self.need_y:
            ygx = finish_rows(self.gy, self.y, self.factor, self.y_inv, dy)
            self.xgy = self.xgy if self.need_x else ygx
        return self.dx, dy, (self.xgy * self.unscale)
