"""The mini-PointNet over blocks of groups: only the last argmax is kept, the rest is computed again for the gradient.

x [M, k, C]    a = relu(W1 x + b1)    f = W2 a + b2    g = max_j f    h = relu(Wg g + Wf f + b3)    y = max_j W4 h + b4

W3 = [Wg | Wf]: Wg g is computed once for a group, not for each of its k neighbours. The last product, its maximum and
its gradient are those of the largest similarity over queries (kernels/contrastive/max_query): h are the query vectors,
the rows of W4 the texts. An entry of y has one neighbour, so the last layer's gradient is 1 / k of a product's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype

# what a block of groups holds of the third layer: on a CPU it stays in the cache between the products
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass
class Layers:
    """Weights and biases of the four layers."""

    w1: Tensor  # [C1, C]
    b1: Tensor
    w2: Tensor  # [C2, C1]
    b2: Tensor
    w3: Tensor  # [C3, 2 C2]
    b3: Tensor
    w4: Tensor  # [D, C3]
    b4: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter(vars(self).values())

    def operands(self, x: Tensor) -> Layers:
        """As the products with x take them: 16 bits on a GPU, float32 on a CPU."""
        dtype = x.dtype if x.is_cuda else accumulation_dtype(x.dtype)
        return Layers(*(t.to(dtype) for t in self))


@dataclass
class _Block:
    """What a block of m groups needs again for its gradient; rows are neighbours."""

    x: Tensor  # [m k, C]
    a: Tensor  # [m k, C1]
    f: Tensor  # [m k, C2]
    g: Tensor  # [m, C2]
    peak: Tensor  # [m, C2], the neighbours that g comes from
    third: Tensor  # [m k, C3], Wg g + Wf f (+ b3)


def _blocks(x: Tensor, layers: Layers, b3: Tensor | None) -> Iterator[tuple[slice, _Block]]:
    """The blocks of groups, with b3 or without."""
    w1, b1, w2, b2, w3, *_ = layers
    m, k, _ = x.shape
    c2, size = w2.shape[0], _size(x, layers)
    for i in range(0, m, size):
        block = slice(i, min(i + size, m))
        rows = x[block].to(w1.dtype).reshape(-1, x.shape[2])
        a = products.linear(rows, w1, b1).relu_()
        f = products.linear(a, w2, b2)
        g, peak = f.view(-1, k, c2).max(1)
        of_group = products.linear(g, w3[:, :c2])
        if b3 is not None:
            of_group += b3
        third = of_group.repeat_interleave(k, 0)
        products.add_mm_(third, f, w3[:, c2:].t())
        yield block, _Block(rows, a, f, g, peak, third)


def _size(x: Tensor, layers: Layers) -> int:
    """Groups of a block."""
    return max(1, _BLOCK_BYTES[x.device.type] // max(1, x.shape[1] * len(layers.w3) * layers.w3.dtype.itemsize))


def _product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a b in the accumulation dtype, which sums over blocks are kept in."""
    return products.mm(a, b) if a.dtype == acc else torch.mm(a, b, out_dtype=acc)


class Norm(NamedTuple):
    """Batch normalisation of the third product v: scale (v - mean) / std + shift."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor

    def unit(self, v: Tensor) -> Tensor:
        return (v - self.mean).mul_(self.rstd)

    def __call__(self, v: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.unit(v), self.scale)


def _hidden(s: _Block, norm: Norm | None) -> Tensor:
    """h of a block [m k, C3]."""
    return (s.third if norm is None else norm(s.third).to(s.f.dtype)).relu_()


def forward(passes: Any, x: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """(y [M, D], the neighbours that it comes from [M, D])."""
    operands = layers.operands(x)
    return _tokens(passes, x, operands, _blocks(x, operands, operands.b3))


def _tokens(
    passes: Any, x: Tensor, layers: Layers, blocks: Iterable[tuple[slice, _Block]], norm: Norm | None = None
) -> tuple[Tensor, Tensor]:
    """The same from blocks."""
    w4, (m, k, _) = layers.w4, x.shape
    y = torch.empty(m, len(w4), dtype=x.dtype, device=x.device)
    peak = torch.empty(m, len(w4), dtype=torch.uint8, device=x.device)
    for block, s in blocks:
        largest, peak[block] = passes.maximum(_hidden(s, norm).view(-1, k, w4.shape[1]), w4)
        y[block] = largest.add_(layers.b4)
    return y, peak


class _Gradients:
    """Sums over blocks of the gradients of the layers."""

    def __init__(self, passes: Any, g: Tensor, peak: Tensor, x: Tensor, layers: Layers, norm: Norm | None = None):
        self.passes, self.peak, self.layers, self.norm = passes, peak, layers, norm
        self.acc = acc = accumulation_dtype(x.dtype)
        self.dy = g.to(acc).contiguous()
        self.x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.sums = Layers(*(torch.zeros(t.shape, dtype=acc, device=x.device) for t in layers))

    def of_maximum(self, block: slice, s: _Block, need_weight: bool = True) -> Tensor:
        """Add the last layer's; the gradient of its operand before the activation [m k, C3]."""
        h, w4, dy = _hidden(s, self.norm), self.layers.w4, self.dy[block]
        rows = h.view(len(dy), -1, w4.shape[1])
        dh, dw4 = self.passes.gradient(dy, self.peak[block], rows, w4, True, need_weight)
        if need_weight:
            self.sums.w4.add_(dw4)
        return torch.ops.aten.threshold_backward(dh.view(h.shape), h, 0)

    def of_third(self, block: slice, s: _Block, d: Tensor) -> None:
        """Add those of the first three layers; d [m k, C3]: the gradient of the block's third product."""
        w1, w2, w3 = self.layers.w1, self.layers.w2, self.layers.w3
        sums, acc, c2 = self.sums, self.acc, len(w2)
        k = len(d) // len(s.g)
        of_group = d.view(-1, k, len(w3)).sum(1)
        sums.w3[:, :c2] += _product(of_group.t(), s.g, acc)
        sums.w3[:, c2:] += _product(d.t(), s.f, acc)
        sums.b3.add_(of_group.sum(0, dtype=acc))
        df = products.mm(d, w3[:, c2:])
        df.view(-1, k, c2).scatter_add_(1, s.peak[:, None], products.mm(of_group, w3[:, :c2])[:, None])
        sums.w2.add_(_product(df.t(), s.a, acc))
        sums.b2.add_(df.sum(0, dtype=acc))
        da = torch.ops.aten.threshold_backward(products.mm(df, w2), s.a, 0)
        sums.w1.add_(_product(da.t(), s.x, acc))
        sums.b1.add_(da.sum(0, dtype=acc))
        self.x[block] = products.mm(da, w1).view(-1, k, w1.shape[1])

    def named(self, layers: Layers, **others: Tensor) -> dict[str, Tensor]:
        """Those of x and of the layers, `others` in their place, in the dtypes of what they belong to."""
        found = vars(self.sums) | {"b4": self.dy.sum(0)} | others
        return {"x": self.x} | {name: found[name].to(t.dtype) for name, t in vars(layers).items()}


def backward(passes: Any, g: Tensor, peak: Tensor, x: Tensor, layers: Layers) -> dict[str, Tensor]:
    """The gradients of x and of the layers."""
    operands = layers.operands(x)
    sums = _Gradients(passes, g, peak, x, operands)
    for block, s in _blocks(x, operands, operands.b3):
        sums.of_third(block, s, sums.of_maximum(block, s))
    return sums.named(layers)


# --- batch normalisation of the third product, with the statistics of all groups -------------------------------------


def training(
    passes: Any, x: Tensor, layers: Layers, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [M, D], mean [C3], biased variance [C3], the neighbours that y comes from [M, D])."""
    operands = layers.operands(x)
    blocks = _without_shift(x, operands)
    mean, var = _statistics(x, operands, blocks())
    y, peak = _tokens(passes, x, operands, blocks(), _norm(mean, var, scale, operands.b3, eps))
    return y, mean, var, peak


def _without_shift(x: Tensor, layers: Layers) -> Callable[[], Iterable[tuple[slice, _Block]]]:
    """The blocks without b3, for one pass after another; one that holds all groups is made once."""
    blocks = partial(_blocks, x, layers, None)
    if len(x) > _size(x, layers):
        return blocks
    all_of_them = list(blocks())
    return lambda: all_of_them


def _norm(mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Norm:
    return Norm(mean, (var + eps).rsqrt(), scale.to(mean.dtype), shift.to(mean.dtype))


def _statistics(x: Tensor, layers: Layers, blocks: Iterable[tuple[slice, _Block]]) -> tuple[Tensor, Tensor]:
    """(mean, variance); blocks are merged by their means (Chan et al. 1983)."""
    acc, channels = accumulation_dtype(x.dtype), len(layers.w3)
    mean, squares = (torch.zeros(channels, dtype=acc, device=x.device) for _ in range(2))
    count = 0
    for _, s in blocks:
        rows = len(s.third)
        var, middle = torch.var_mean(s.third.to(acc), 0, correction=0)
        gap = middle - mean
        # of the first block nothing, however large: its square may overflow
        squares += var * rows + gap * (count * rows / (count + rows)) * gap
        count += rows
        mean += gap * (rows / count)
    return mean, squares / count


def training_backward(
    passes: Any,
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    peak: Tensor,
    x: Tensor,
    layers: Layers,
    scale: Tensor,
    eps: float,
) -> dict[str, Tensor]:
    """The gradients of x, of the layers and of the scale.

    With n = scale u + shift, u = (v - mean) / std and R rows: dv = scale / std (dn - (sum dn + u sum dn u) / R).
    """
    operands = layers.operands(x)
    norm = _norm(mean, var, scale, operands.b3, eps)
    sums = _Gradients(passes, g, peak, x, operands, norm)
    dshift, dscale = torch.zeros_like(norm.shift), torch.zeros_like(norm.scale)
    blocks = _without_shift(x, operands)
    for block, s in blocks():
        dn = sums.of_maximum(block, s)
        dshift += dn.sum(0, dtype=sums.acc)
        dscale += (dn * norm.unit(s.third)).sum(0, dtype=sums.acc)
    rows = x.shape[0] * x.shape[1]
    for block, s in blocks():
        dn = sums.of_maximum(block, s, need_weight=False)
        dv = dn - norm.unit(s.third).mul_(dscale / rows).add_(dshift / rows)
        sums.of_third(block, s, (dv * (norm.scale * norm.rstd)).to(operands.w4.dtype))
    return sums.named(layers, b3=dshift) | {"scale": dscale.to(scale.dtype)}
