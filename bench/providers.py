"""What the providers of every case are made of: the eager formula, torch.compile of it, ours, and published kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.bench.cases import Load
from mmfuse.kernels._runtime import Op

Fn = Callable[..., Any]
Probe = Callable[[torch.device, torch.dtype], tuple[Any, ...]]  # small arguments of an operator's choice

BACKENDS = ("cuda", "triton", "cpu", "chunked", "torch")


def amp(fn: Fn) -> Fn:
    """16-bit features meet an eager formula under autocast, as they do in training."""

    def run(*args: Any) -> Any:
        x: Tensor = args[0]
        low = x.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, x.dtype if low else None, enabled=low):
            return fn(*args)

    return run


def eager(fn: Fn) -> Load:
    return lambda device, dtype: amp(fn)


def compiled(load: Load) -> Load:
    """torch.compile of what `load` gives; each size compiles for itself, as in training."""

    def run(device: torch.device, dtype: torch.dtype) -> Fn:
        torch._dynamo.reset()
        return torch.compile(load(device, dtype), dynamic=False)

    return run


def peer(make: Callable[[], Fn]) -> Load:
    """A published kernel for CUDA."""

    def load(device: torch.device, dtype: torch.dtype) -> Fn:
        if device.type != "cuda":
            raise NotImplementedError("needs a CUDA device")
        return make()

    return load


def chosen(op: Op, count: int, inputs: tuple[Any, ...], backend: str | None = None) -> str:
    """The implementation that runs, which an operator chooses by its first `count` arguments."""
    return op.select(*inputs[:count], backend=backend).name


def ours(op: Op, fn: Fn, probe: Probe, **options: tuple[Any, ...]) -> dict[str, Load]:
    """`mmfuse` is what the dispatcher chooses, `mmfuse-triton[store]` names the implementation and an option's value.

    `options`: at most one option, with the values it is also measured at, e.g. save=("store", "recompute").
    """
    values = [(name, value) for name, each in options.items() for value in each]
    return {
        "mmfuse" + (f"-{backend}" if backend else "") + (f"[{option[1]}]" if option else ""): _ours(
            op, fn, probe, backend, dict([option] if option else [])
        )
        for backend in (None, *BACKENDS)
        for option in ((None, *values) if backend != "torch" else (None,))
        if backend is None or backend in {i.name for i in op.implementations}
    }


def _ours(op: Op, fn: Fn, probe: Probe, backend: str | None, bound: dict[str, Any]) -> Load:
    def load(device: torch.device, dtype: torch.dtype) -> Fn:
        op.select(*probe(device, dtype), backend=backend)  # raises where it cannot run
        return partial(fn, backend=backend, **bound)

    return load
