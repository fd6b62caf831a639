"""Inputs that several suites draw, and the scalars that they differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # that training starts from
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unit(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Features of length 1."""
    return F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)


def near(features: Tensor, noise: Tensor) -> Tensor:
    """Features at a cosine of 0.3 to those given."""
    return F.normalize(0.3 * features + 0.954 * noise, dim=-1)


def pair(device: torch.device, dtype: torch.dtype, n: int, d: int) -> list[Tensor]:
    """Unit features of images and of their texts, at a cosine of 0.3."""
    image, noise = (unit(device, torch.float32, n, d) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (image, near(image, noise))]


def scalar(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    # parameters are float32 beside 16-bit features
    return torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device=device, requires_grad=True)


def clip(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    """Images, texts and their scale."""
    return *pair(device, dtype, N, D), scalar(1 / TEMPERATURE, device, dtype)


def leaf(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def per_channel(pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation of ImageNet's channels, [3, 1, 1]."""
    mean, std = (torch.tensor(v, dtype=dtype, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return mean, std


# --- scalars --------------------------------------------------------------------------------------------------------


def ramp(y: Tensor) -> Tensor:
    """A scalar whose gradient is another number for every feature."""
    wide = torch.promote_types(y.dtype, torch.float32)
    features = torch.linspace(-1, 1, y.shape[-1], dtype=wide, device=y.device)
    return (y.to(wide).flatten(0, -2) @ features).mean()


def weighted(y: Tensor) -> Tensor:
    """A scalar whose gradient is another number everywhere, so that a gradient in the wrong place shows."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()


# --- of checks ------------------------------------------------------------------------------------------------------

Inputs = Callable[[torch.device], dict[str, Tensor]]


def units(**facts: tuple[int, ...] | float) -> Inputs:
    """Unit features of each shape, and a scalar of each number."""

    def inputs(device: torch.device) -> dict[str, Tensor]:
        return {
            name: unit(device, torch.float32, *fact) if isinstance(fact, tuple) else torch.tensor(fact, device=device)
            for name, fact in facts.items()
        }

    return inputs


def features(**scalars: float) -> Inputs:
    """129 pairs of 96 dimensions, and scalars."""
    return units(image=(129, 96), text=(129, 96), **scalars)


def of_case(inputs: Callable[..., Sequence[Tensor]], names: str, **shape: int) -> Inputs:
    """A case's inputs by name, at another size."""
    return lambda device: {
        name: t.detach() for name, t in zip(names.split(), inputs(device, torch.float32, **shape), strict=True)
    }


Run = Callable[[dict[str, Tensor], "str | None"], dict[str, Tensor]]


def computed(fn: Callable[..., Any], *names: str) -> Run:
    """A check's `run` for a function of its inputs that has no gradient: its results by name."""

    def run(inputs: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
        return by_name(names, fn(*inputs.values(), backend=backend))

    return run


def by_name(names: Sequence[str], results: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    results = [results] if isinstance(results, Tensor) else results
    return {name: t.detach() if t.is_floating_point() else t.double() for name, t in zip(names, results, strict=True)}


def differentiated(
    fn: Callable[..., Any],
    names: Sequence[str] = ("loss",),
    loss: Callable[[Tensor], Tensor] = lambda result: result,
    constants: Sequence[str] = (),
) -> Run:
    """A check's `run` for a function of its inputs: its results by name, and the gradients of the first one's loss.

    Every floating-point input has one, but for the `constants`; none has in no_grad mode.
    """

    def run(inputs: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
        given = {k: v.detach() for k, v in inputs.items()}
        leaves = {k: v.requires_grad_() for k, v in given.items() if v.is_floating_point() and k not in constants}
        results = fn(*given.values(), backend=backend)
        if not torch.is_grad_enabled():
            return by_name(names, results)
        first = results if isinstance(results, Tensor) else results[0]
        grads = torch.autograd.grad(loss(first), list(leaves.values()))
        return by_name(names, results) | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}

    return run
