"""What is measured: one case per operation, with the shapes of real models and everything that can compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Shape = dict[str, int]
Record = dict[str, Any]  # one measurement, as it is stored
# (device, dtype) -> the function to measure; raising means absent, with the exception as the reason
Load = Callable[[torch.device, torch.dtype], Callable[..., Any]]

# suite: the module with its CASES; a new suite is one line here and one module
SUITES = {
    "contrastive": "mmfuse.bench.contrastive",
    "queries": "mmfuse.bench.queries",
    "queue": "mmfuse.bench.queue",
    "language": "mmfuse.bench.language",
    "selection": "mmfuse.bench.selection",
    "codebook": "mmfuse.bench.codebook",
    "patch": "mmfuse.bench.patch",
    "packed": "mmfuse.bench.packed",
    "points": "mmfuse.bench.points",
    "tokens": "mmfuse.bench.tokens",
    "contrastive-dist": "mmfuse.bench.distributed",
    "variants": "mmfuse.bench.variants",
    "targets": "mmfuse.bench.targets",
}


@dataclass(frozen=True)
class Anchor:
    """Work that no implementation can do without, timed beside the providers."""

    load: Load
    flops: Callable[..., float]  # (**shape)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite for a NaN."""
    gap, size = (torch.linalg.vector_norm(t).item() for t in (got.double() - want.double(), want.double()))
    if math.isnan(gap):
        return math.inf
    return gap / size if size else math.inf if gap else 0.0


@dataclass(frozen=True, eq=False)
class Case:
    """One operation: `inputs(device, dtype, **shape)` are the arguments of every provider.

    A provider returns a scalar, or without "fwd+bwd" among the modes one or more tensors of any shape.
    """

    name: str
    inputs: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[str, ...]  # names of the result and of the gradients of the inputs that require one
    providers: dict[str, Load]  # baselines first
    definitions: tuple[str, ...]  # the providers that are the operation itself; the first of them loads everywhere
    chosen: Callable[..., str]  # (inputs, backend or None) -> the implementation of ours that runs
    default: Callable[[torch.device, torch.dtype], list[str]]  # the providers measured when none are named
    dims: tuple[str, ...]  # what the numbers of a size such as 8192x512 are
    shapes: dict[str, list[Shape]]  # by device type, smallest first
    growth: str  # the dimension over which cost is fitted
    small: Shape  # for tests
    flops: Callable[..., float]  # (mode, **shape): the fewest that compute it
    bytes: Callable[..., float]  # (mode, itemsize, **shape): each input read once, each output written once
    anchors: dict[str, Anchor]
    anchor: Callable[[str, str], str]  # (provider, mode) -> the anchor that it is compared with
    modes: tuple[str, ...] = ("fwd+bwd", "fwd")
    judged: bool = True  # by float64: an error at most twice eager's
    distance: Callable[[Tensor, Tensor], float] = relative  # (got, definition's); large where it is another function

    def shape(self, size: str) -> Shape:
        """`8192x512` as {"N": 8192, "D": 512}."""
        numbers = size.split("x")
        if len(numbers) != len(self.dims) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"size is {size!r}, expected {'x'.join(self.dims)} such as {label(self.shapes['cpu'][0])}")
        return dict(zip(self.dims, map(int, numbers), strict=True))


@dataclass(frozen=True)
class Check:
    """One operator on one kind of input: `run(inputs, backend)` gives its outputs and gradients by name.

    `inputs(device)` are in float32; those of one dimension or more are rounded to the dtype that is verified.
    """

    op: str
    name: str
    inputs: Callable[[torch.device], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]] = lambda inputs: tuple(inputs.values())[:2]  # of choice


def differentiated(fn: Callable[..., Tensor]) -> Callable[[dict[str, Tensor], str], dict[str, Tensor]]:
    """A check's `run` for a function of its inputs: the loss, and the gradient of every floating-point input."""

    def run(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        given = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        loss = fn(*given.values(), backend=backend)
        leaves = {k: v for k, v in given.items() if v.requires_grad}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **{f"d {k}": g for k, g in zip(leaves, grads, strict=True)}}

    return run


def label(shape: Shape) -> str:
    return "x".join(map(str, shape.values()))


def suite(name: str) -> list[Case]:
    """The cases of a suite."""
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    cases: list[Case] = import_module(SUITES[name]).CASES
    return cases


def find(name: str) -> Case:
    """The case called `name`, of any suite."""
    return next(case for case in everything() if case.name == name)


def everything() -> Iterator[Case]:
    for name in SUITES:
        yield from suite(name)


def is_ours(provider: str) -> bool:
    return provider.startswith("mmfuse")


def options(fn: Any) -> dict[str, Any]:
    """The options that a provider of ours was bound to."""
    return dict(getattr(fn, "keywords", {}))


def checks() -> Iterator[Check]:
    """What `mmfuse verify` verifies: the CHECKS of every suite."""
    for module in SUITES.values():
        yield from import_module(module).CHECKS
