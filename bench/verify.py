"""`mmfuse verify`: the error of every implementation and of eager against float64, for outputs and gradients."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmfuse.bench import cases
from mmfuse.bench.cases import Check
from mmfuse.bench.inputs import by_name, units, weighted
from mmfuse.kernels._runtime import operators
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dispatch import BACKENDS
from mmfuse.kernels._runtime.numerics import error_and_bound
from mmfuse.kernels._runtime.operator import reached

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DRAWS = 4


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    dtype: str
    backend: str
    quantity: str
    error: float
    eager: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


def checks() -> list[Check]:
    """Those of the suites, and the example of an operator that has none."""
    found = list(cases.checks())
    return found + [of_example(name) for name in operators() if all(check.op != name for check in found)]


def of_example(name: str) -> Check:
    def run(inputs: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
        features = inputs["features"].detach().requires_grad_()
        results = tree_leaves(operators()[name].examples[name](features, backend=backend))
        found = by_name([f"result {i}" for i in range(len(results))], results)
        if scalars := [weighted(t) for t in results if t.requires_grad]:
            found["d features"] = torch.autograd.grad(torch.stack(scalars).sum(), features)[0]
        return found

    return Check(name, "example", units(features=(33, 48)), run)


def verify(op: str | None = None, device: str = "cpu", seed: int = 0) -> Iterator[Row]:
    """The errors of every implementation that runs on `device`, over a few draws of each check's inputs."""
    for check in checks():
        if op in (None, check.op):
            for dtype in DTYPES.values():
                yield from _rows(check, dtype, device, seed)


def _rows(check: Check, dtype: torch.dtype, device: str, seed: int) -> Iterator[Row]:
    drawn = _rounded(check, dtype, device)
    differentiable = _backends(check, drawn, dtype)
    with torch.no_grad():
        forward = [n for n in _backends(check, drawn, dtype) if n not in differentiable]
    backends = differentiable + forward
    results: dict[str, list[dict[str, Tensor]]] = {n: [] for n in ("exact", "torch", *backends)}
    for draw in range(_DRAWS):
        torch.manual_seed(seed + draw)
        inputs = _rounded(check, dtype, device)
        exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        results["exact"].append(check.run(exact, "torch"))
        for name in ("torch", *backends):
            with torch.set_grad_enabled(name not in forward):
                results[name].append(check.run(inputs, name))
    stacked = {n: {q: torch.stack([r[q] for r in rs]) for q in rs[0]} for n, rs in results.items()}
    for backend in backends:
        for quantity, result in stacked[backend].items():
            error, allowed, eager = error_and_bound(result, stacked["torch"][quantity], stacked["exact"][quantity])
            yield Row(check.op, check.name, str(dtype)[6:], backend, quantity, error, eager, allowed)


def _backends(check: Check, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """The implementations of ours that run; without gradient mode, those that are a forward alone, too."""
    operator, args, _ = reached(lambda: check.run(inputs, None), operators()[check.op].name)
    truncates = INTERPRET and dtype == torch.bfloat16  # where a GPU rounds
    available = operator.available(args)
    return [n for n in available if n in BACKENDS and n != "torch" and not (n == "triton" and truncates)]


def _rounded(check: Check, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Matrices in `dtype`, scalars in float32: float64 sees the very same values."""
    inputs = check.inputs(torch.device(device))
    return {k: v.to(dtype) if v.dim() and v.is_floating_point() else v for k, v in inputs.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="an operator; without it, all of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def run(args: argparse.Namespace) -> int:
    known = sorted({check.op for check in checks()})
    if args.op not in (None, *known):
        raise ValueError(f"op is {args.op!r}, expected one of {', '.join(known)}")
    line = "{:12} {:24} {:9} {:8} {:8} {:>10} {:>10} {:>10}  {}"
    if not args.json:
        print(line.format("operator", "case", "dtype", "backend", "quantity", "error", "eager's", "allowed", ""))
    holds = True
    for row in verify(args.op, args.device, args.seed):
        holds &= row.holds
        if args.json:
            print(json.dumps({**asdict(row), "holds": row.holds}))
        else:
            cells = (value if isinstance(value, str) else f"{value:.2e}" for value in astuple(row))
            print(line.format(*cells, "ok" if row.holds else "WORSE"))
    return 0 if holds else 1
