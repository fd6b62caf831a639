"""What is measured: one case per operation, with the shapes of real models and everything that can compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmfuse.bench import suites as folder
from mmfuse.bench.providers import Anchor, Load
from mmfuse.kernels._runtime import chosen, operators

Shape = dict[str, int]
Record = dict[str, Any]  # one measurement, as it is stored


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite for a NaN."""
    gap, size = (torch.linalg.vector_norm(t).item() for t in (got.double() - want.double(), want.double()))
    if math.isnan(gap):
        return math.inf
    return gap / size if size else math.inf if gap else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One operation: `inputs(device, dtype, **shape)` are the arguments of every provider.

    A provider returns a scalar, or without "fwd+bwd" among the modes one or more tensors of any shape.
    """

    name: str
    op: str  # the public name of our operator
    ours: Callable[..., Any]  # calls it: (*inputs, backend=..., and an option)
    peers: Mapping[str, Load]  # what else computes it, baselines first
    definitions: Sequence[str] = ("eager",)  # the peers that are the operation itself; the first loads everywhere
    spare: Callable[[], str] = lambda: ""  # the peer that is another one again: measured only where it is named
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)  # at most one of ours, with its values
    inputs: Callable[..., tuple[Any, ...]]
    outputs: Sequence[str]  # names of the result and of the gradients of the inputs that require one
    cpu: list[Shape]  # the sizes that are measured there, smallest first
    cuda: list[Shape]
    growth: str  # the dimension over which cost is fitted
    small: Shape  # for tests
    flops: Callable[..., float]  # (mode, **shape): the fewest that compute it
    bytes: Callable[..., float]  # (mode, itemsize, **shape): each input read once, each output written once
    anchors: Mapping[str, Anchor]
    beside: Callable[[str, str], str] | None = None  # (provider, mode) -> its anchor, where there are several
    modes: Sequence[str] = ("fwd+bwd", "fwd")
    judged: bool = True  # by float64: an error at most twice eager's
    distance: Callable[[Tensor, Tensor], float] = relative  # (got, definition's); large where it is another function

    @property
    def shapes(self) -> dict[str, list[Shape]]:
        return {"cpu": self.cpu, "cuda": self.cuda}

    @property
    def dims(self) -> tuple[str, ...]:
        """What the numbers of a size such as 8192x512 are."""
        return tuple(self.cpu[0])

    def shape(self, size: str) -> Shape:
        """`8192x512` as {"N": 8192, "D": 512}."""
        numbers = size.split("x")
        if len(numbers) != len(self.dims) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"size is {size!r}, expected {'x'.join(self.dims)} such as {label(self.cpu[0])}")
        return dict(zip(self.dims, map(int, numbers), strict=True))

    def anchor(self, provider: str, mode: str) -> str:
        """The anchor that a provider is compared with."""
        return self.beside(provider, mode) if self.beside else next(iter(self.anchors))

    def chosen(self, inputs: Sequence[Any], backend: str | None = None) -> str:
        """The implementation of ours that runs."""
        return chosen(lambda: self.ours(*inputs, backend=backend), operators()[self.op].name)

    @cached_property
    def providers(self) -> dict[str, Load]:
        """The peers and ours: `mmfuse` is what is chosen, `mmfuse-triton[store]` names it and an option's value."""
        found = dict(self.peers)
        for backend in (None, *operators()[self.op].implementations):
            name = f"mmfuse-{backend}" if backend else "mmfuse"
            found[name] = self._load(backend)
            for option, value in self._values() if backend != "torch" else ():
                found[f"{name}[{value}]"] = self._load(backend, **{option: value})
        return found

    def _values(self) -> list[tuple[str, str]]:
        return [(option, value) for option, values in self.options.items() for value in values]

    def _load(self, backend: str | None, **option: str) -> Load:
        def load(device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
            with torch.no_grad():  # some are a forward alone
                self.chosen(self.inputs(device, dtype, **self.small), backend)  # raises where it cannot run
            return partial(self.ours, backend=backend, **option)

        return load

    def default(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """The providers measured when none are named: every alternative once, none of another device."""
        kinds = {name: getattr(load, "kind", device.type) for name, load in self.peers.items()}
        names, spare = ["mmfuse"], self.spare()
        if device.type == "cuda" and "mmfuse-triton" in self.providers:
            inputs = self.inputs(device, dtype, **self.cuda[0])
            names += ["mmfuse-triton"] if self.chosen(inputs) != "triton" else []
        values = [f"[{value}]" for _, value in self._values()] or [""]
        peers = [name for name, kind in kinds.items() if kind == device.type and name != spare]
        chunked = ["mmfuse-chunked"] if "mmfuse-chunked" in self.providers else []
        return [*peers, *(name + value for name in names for value in values), *chunked]


@dataclass(frozen=True)
class Check:
    """One operator on one kind of input: `run(inputs, backend)` gives its outputs and gradients by name.

    In no_grad mode it gives the outputs alone: so an implementation is judged that has no backward.
    `inputs(device)` are in float32; those of one dimension or more are rounded to the dtype that is verified.
    """

    op: str
    name: str
    inputs: Callable[[torch.device], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], str | None], dict[str, Tensor]]


def label(shape: Shape) -> str:
    return "x".join(map(str, shape.values()))


def is_ours(provider: str) -> bool:
    return provider.startswith("mmfuse")


def options(fn: Any) -> dict[str, Any]:
    """The options that a provider of ours was bound to."""
    return dict(getattr(fn, "keywords", {}))


# --- what there is --------------------------------------------------------------------------------------------------


def suites() -> list[str]:
    """A new suite is a module, and nothing else."""
    return [module.name.replace("_", "-") for module in iter_modules(folder.__path__)]


def suite_module(name: str) -> ModuleType:
    if name not in suites():
        raise ValueError(f"suite is {name!r}, expected one of {', '.join(suites())}")
    return import_module(f"{folder.__name__}.{name.replace('-', '_')}")


def suite(name: str) -> list[Case]:
    """The cases of a suite; what counts has none."""
    return getattr(suite_module(name), "CASES", [])


def everything() -> Iterator[Case]:
    for name in suites():
        yield from suite(name)


def find(name: str) -> Case:
    """The case called `name`, of any suite."""
    return next(case for case in everything() if case.name == name)


def checks() -> Iterator[Check]:
    """The CHECKS of every suite."""
    for name in suites():
        yield from getattr(suite_module(name), "CHECKS", [])
