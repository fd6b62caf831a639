"""What a call is drawn from: hypothesis chooses its structure and a seed, torch fills in the numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What is drawn without randomness follows from the strategies, not from the constants in whatever is imported beside.
providers._get_local_constants = providers.Constants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("plain", "offset", "rows", "strided", "transposed", "expanded", "negated")
SPECIALS = ("nan", "inf", "-inf", "denormal", "huge", "zeros")
# most draws are plain numbers: one that is not hides what else may be wrong
STYLES = tuple((layout, special) for layout in LAYOUTS for special in (*[None] * 12, *SPECIALS))
DISTINCT = tuple(style for style in STYLES if style[0] != "expanded")
FINITE = tuple(style for style in STYLES if style[1] is None)


@dataclass(frozen=True)
class Spec:
    """A tensor to be made: what hypothesis shrinks, and what a failure prints."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    style: tuple[str, str | None] = ("plain", None)
    size: float = 1.0  # of the numbers; 0: they are positive, between 0.5 and 1.5
    low: int = 0  # of integers
    high: int = 2
    values: tuple[Any, ...] | None = None  # instead of random ones
    taken: int | None = None  # of a mask: how many of each row are set
    device: str = DEVICE

    def __repr__(self) -> str:
        how = [s for s in (*self.style, self.device if self.device != DEVICE else None) if s not in (None, "plain")]
        if self.values is not None:
            how.append(str(self.values))
        return " ".join([f"{str(self.dtype)[6:]}{list(self.shape)}", *how])

    def fill(self, g: torch.Generator) -> Tensor:
        return self._laid_out(self._numbers(g)).to(self.device)

    def _numbers(self, g: torch.Generator) -> Tensor:
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype).reshape(self.shape)
        if self.taken is not None:
            return (torch.rand(self.shape, generator=g).argsort(-1) < self.taken).to(self.dtype)
        if self.dtype.is_complex:
            return torch.zeros(self.shape, dtype=self.dtype)
        if not self.dtype.is_floating_point:
            drawn = torch.randint(self.low, max(self.high, self.low + 1), self.shape, generator=g)
            return drawn.to(self.dtype)
        if self.size:
            x = torch.randn(self.shape, generator=g, dtype=torch.float64) * self.size
        else:
            x = torch.rand(self.shape, generator=g, dtype=torch.float64) + 0.5
        x = x.to(self.dtype)
        if self.style[1] == "zeros":
            if x.dim() and x.numel():
                x.view(-1, x.shape[-1])[0] = 0
        elif self.style[1] and x.numel():
            x.view(-1)[torch.randint(x.numel(), (), generator=g)] = _special(self.style[1], self.dtype)
        return x

    def _laid_out(self, x: Tensor) -> Tensor:
        """The same numbers in other places of memory; what lies between them is NaN, or the largest integer."""
        layout, shape = self.style[0], list(x.shape)
        if layout == "negated":
            return torch._neg_view(-x) if x.is_floating_point() else x
        if layout == "plain" or not shape:
            return x
        if layout == "expanded":
            return x[:1].clone().expand(shape)
        pitch = [n + 2 if layout == "rows" and i == len(shape) - 1 else n for i, n in enumerate(shape)]
        order = range(len(shape)) if layout == "transposed" else reversed(range(len(shape)))
        strides, step = [0] * len(shape), 2 if layout == "strided" else 1
        for i in order:
            strides[i], step = step, step * max(pitch[i], 1)
        base = torch.full((step + 1,), _between(x.dtype), dtype=x.dtype)
        return base.as_strided(shape, strides, 0 if layout == "transposed" else 1).copy_(x)


def _special(kind: str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    huge = 6e4 if dtype == torch.float16 else 1e30
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "denormal": info.tiny / 4, "huge": huge}[kind]


def _between(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@dataclass(frozen=True)
class Call:
    """A call of a public function, with specs for its tensors."""

    name: str
    dtype: torch.dtype
    args: dict[str, Any]
    upstream: tuple[tuple[str, str | None], float] = (("plain", None), 1.0)  # style and size of the incoming gradients
    asked: int = -1  # a bit for each floating-point tensor, in turn: whether it asks for a gradient
    threads: int = 1
    seed: int = 0

    def __repr__(self) -> str:
        args = ", ".join(f"{name}={value!r}" for name, value in self.args.items())
        how = f"upstream={self.upstream}, asked={self.asked}, threads={self.threads}, seed={self.seed}"
        return f"{self.name}({args}) with {how}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis asks for it before __repr__
        printer.text(repr(self))

    def given(self, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        return tree_map_only(Spec, lambda spec: spec.fill(g), self.args)


@functools.cache
def _style(styles: tuple[tuple[str, str | None], ...], without: str) -> st.SearchStrategy[tuple[str, str | None]]:
    return st.sampled_from([style for style in styles if style[0] != without])


class Draw:
    """Draws the arguments of a call; all of them share a dtype and a scale of sizes."""

    def __init__(
        self, draw: Callable[[Any], Any], sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], without: str = ""
    ):
        self._draw, self._sizes, self._without = draw, sizes, without
        self.dtype = self.one(*dtypes)

    def one(self, *values: Any) -> Any:
        return self._draw(st.sampled_from(values))

    def size(self, least: int = 0, most: int | None = None) -> int:
        return self.one(*(n for n in self._sizes if least <= n and (most is None or n <= most)))

    def style(self, styles: Any = STYLES) -> tuple[str, str | None]:
        return self._draw(_style(styles, self._without))

    def up_to(self, n: int, least: int = 0) -> int:
        return self._draw(st.integers(least, max(n, least)))

    def flag(self) -> bool:
        return self.one(False, True)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.flag() else None

    def floats(self, *shape: int, dtype: torch.dtype | None = None, styles: Any = STYLES, size: float = 1.0) -> Spec:
        return Spec(shape, dtype or self.dtype, self.style(styles), size)

    def positive(self, *shape: int, dtype: torch.dtype | None = None) -> Spec:
        return self.floats(*shape, dtype=dtype, styles=FINITE, size=0)

    def integers(self, *shape: int, high: int, low: int = 0, dtype: torch.dtype | None = None) -> Spec:
        return Spec(shape, dtype or torch.int64, self.style(FINITE), low=low, high=high)

    def mask(self, *shape: int) -> Spec:
        return self.integers(*shape, high=2, dtype=torch.bool)

    def scalar(self, *numbers: float) -> Any:
        """A number, or a tensor of one element, in the features' dtype or in float32."""
        return self.one(*numbers, *(Spec(s, t, size=0) for s in ((), (1,)) for t in (self.dtype, torch.float32)))
