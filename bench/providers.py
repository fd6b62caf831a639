"""What the peers and anchors of a case are made of: formulas, torch.compile of them, published kernels, products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Fn = Callable[..., Any]
# (device, dtype) -> the function to measure; raising means absent, with the exception as the reason
Load = Callable[[torch.device, torch.dtype], Fn]


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


def compiled(load: Load, **options: Any) -> Load:
    """torch.compile of what `load` gives; each size compiles for itself, as in training."""

    def run(device: torch.device, dtype: torch.dtype) -> Fn:
        torch._dynamo.reset()
        return torch.compile(load(device, dtype), dynamic=False, options=options or None)

    return run


def auto_chunked(load: Load) -> Load:
    """Compiled so that large logits are computed in chunks, with the gradients of each: Inductor's auto_chunker."""
    # by default only logits of more than 8 times the operands' size, which few vocabularies have
    return compiled(load, **{"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 0})


def torch_chunked(use: Callable[[Fn], Fn] = lambda fn: fn) -> Load:
    """PyTorch's own cross-entropy of a linear layer in chunks (2.13), as `use` calls it: (input, weight, label)."""

    def load(device: torch.device, dtype: torch.dtype) -> Fn:
        # no such names: absent
        options = torch.nn.LinearCrossEntropyOptions()
        fn = torch.nn.functional.linear_cross_entropy
        return use(lambda x, weight, label: fn(x, weight, label, options=options))

    return load


def formula(fn: Fn) -> dict[str, Load]:
    """As it stands, and compiled."""
    return {"eager": eager(fn), "compile": compiled(eager(fn))}


@dataclass(frozen=True)
class Only:
    """A peer for one kind of device."""

    kind: str
    load: Load

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Fn:
        if device.type != self.kind:
            raise NotImplementedError(f"needs a {self.kind.upper()} device")
        return self.load(device, dtype)


def gpu(make: Callable[[], Fn]) -> Load:
    """A published kernel for CUDA."""
    return Only("cuda", lambda device, dtype: make())


def faiss(index: str, k: int, found: Callable[[Tensor, Tensor], Tensor]) -> Load:
    """faiss's exact index on the CPU, filled in the same call; `found` of the values and indices that it gives."""

    def load(device: torch.device, dtype: torch.dtype) -> Fn:
        if dtype != torch.float32:
            raise NotImplementedError("needs float32")
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())

        def run(queries: Tensor, rows: Tensor) -> Tensor:
            flat = getattr(faiss, index)(rows.shape[1])
            flat.add(rows.numpy())
            return found(*map(torch.from_numpy, flat.search(queries.numpy(), k)))

        return run

    return Only("cpu", load)


def then(of: Fn, fn: Fn) -> Fn:
    """`of` the result of `fn`."""
    return lambda *args, **options: of(fn(*args, **options))


# --- anchors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """Work that no implementation can do without, timed beside the providers."""

    load: Load
    flops: Callable[..., float]  # (**shape)


class Scratch:
    """Memory that is made by the first call, and kept: page faults are no part of a product or a copy."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self.at = 0

    def kept(self, make: Callable[[], Tensor]) -> Tensor:
        if self.at == len(self._kept):
            self._kept.append(make())
        self.at += 1
        return self._kept[self.at - 1]

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        if a.is_cuda:  # where fresh memory is free, and results are large
            return a @ b
        return torch.mm(a, b, out=self.kept(lambda: a.new_empty(len(a), b.shape[1])))


def anchor(run: Callable[..., Tensor], flops: Callable[..., float]) -> Anchor:
    """`run(scratch, *inputs)`, which asks `scratch` for the same things at every call."""

    def load(device: torch.device, dtype: torch.dtype) -> Fn:
        scratch = Scratch()

        def call(*inputs: Any) -> Tensor:
            scratch.at = 0
            return run(scratch, *inputs)

        return call

    return Anchor(load, flops)


def products(
    pairs: Callable[..., Iterable[tuple[Tensor, Tensor, int]]], flops: Callable[..., float], name: str = "product"
) -> dict[str, Anchor]:
    """Of each (X, Y, count) among the inputs the first `count` of U = X YT, U Y, UT X, and X YT again."""

    def run(scratch: Scratch, *inputs: Any) -> Tensor:
        for x, y, count in pairs(*inputs):
            u = scratch.mm(x, y.T)
            if count > 1:
                scratch.mm(u, y)
                scratch.mm(u.T, x)
            if count > 3:
                torch.mm(x, y.T, out=u)
        return u

    return {name: anchor(run, flops)}


def copy(shape: Callable[..., tuple[int, ...]], flops: Callable[..., float]) -> dict[str, Anchor]:
    """A copy of as many numbers as the result has: `shape` of the inputs."""

    def run(scratch: Scratch, *inputs: Any) -> Tensor:
        target, source = (scratch.kept(lambda: inputs[0].new_ones(shape(*inputs))) for _ in range(2))
        return target.copy_(source)

    return {"copy": anchor(run, flops)}
