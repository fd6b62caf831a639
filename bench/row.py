"""One case at one size: is a provider right, how much memory does it take, and how long does a call take."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmfuse.bench import clock, memory
from mmfuse.bench.cases import Case, Record, Shape, is_ours, label, options
from mmfuse.kernels._runtime.numerics import error_and_bound

Outputs = tuple[Tensor | None, ...]

# |got - want| / |want| that rounding may explain, by dtype: beyond it, it is another function
DISTANCE = {torch.float32: 3e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# rows that float64 judges: several blocks of every implementation
_JUDGED = {"cpu": 1200, "cuda": 5000}
_DRAWS = 4


def _call(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Outputs:
    """The result and, in mode fwd+bwd, the gradient of every input that requires one."""
    if mode == "fwd":
        with torch.no_grad():
            result = fn(*inputs)
            return result if isinstance(result, tuple) else (result,)
    result = fn(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return (result.detach(), *torch.autograd.grad(result, leaves, allow_unused=True))


def _draw(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return case.inputs(device, dtype, **shape)


class Row:
    """A case at one size, on one device, in one dtype and mode."""

    def __init__(self, case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, mode: str):
        self.case, self.shape, self.device, self.dtype, self.mode = case, shape, device, dtype, mode
        self.small = shape | {case.growth: min(shape[case.growth], _JUDGED[device.type])}
        self.inputs = _draw(case, shape, device, dtype)
        self._fns: dict[str, Callable[..., Tensor]] = {}
        self._want: Outputs | None = None  # empty: the definition does not fit into memory

    def fn(self, name: str) -> Callable[..., Tensor]:
        if name not in self._fns:
            load = self.case.anchors[name].load if name in self.case.anchors else self.case.providers[name]
            self._fns[name] = load(self.device, self.dtype)
        return self._fns[name]

    def call(self, name: str) -> Outputs:
        return _call(self.fn(name), self.inputs, "fwd" if name in self.case.anchors else self.mode)

    def sample(self, name: str, calls: int) -> list[float]:
        """Milliseconds of each of a few calls."""
        return clock.times(lambda: self.call(name), calls, self.device)

    def probe(self, name: str) -> Record:
        """Run a provider once: is it right, how much memory does it take, and about how long."""
        try:
            fn = self.fn(name)
        except Exception as error:  # importing a package built for another torch can raise anything
            return {"status": "absent", "reason": first_line(error)}
        try:
            found: Record = {"status": "ok"}
            if is_ours(name):
                bound = options(fn)
                with torch.set_grad_enabled(self.mode != "fwd"):
                    chosen = self.case.chosen(self.inputs, bound.get("backend"))
                found |= {"options": bound | {"backend": chosen}, **(self._judge(fn) if self.case.judged else {})}
            if found["status"] != "ok":
                return found
            if self.warms(name):
                self.call(name)
            else:
                _call(fn, _draw(self.case, self.small, self.device, self.dtype), self.mode)
            clock.wait(self.device)
            start = time.perf_counter()
            got, peak = memory.peak(lambda: self.call(name), self.device)
            seconds = time.perf_counter() - start
            return {**found, "seconds": seconds, "memory": peak, **self._compare(name, got)}
        except Exception as error:
            if name in self.case.definitions and _out_of_memory(error):
                self._want = ()
            return failure(error)

    def warms(self, name: str) -> bool:
        """Whether the first call at a size compiles or allocates for it."""
        compiles = self.device.type == "cuda" or hasattr(self.fn(name), "_torchdynamo_orig_callable")
        return compiles or name in self.case.anchors

    def _judge(self, fn: Callable[..., Tensor]) -> Record:
        """The project's rule of tolerance, over a few draws so that a lucky sum of eager's does not decide."""
        eager, exact = _judges(self.case, tuple(self.small.items()), self.device, self.dtype, self.mode)
        got = _draws(fn, functools.partial(_draw, self.case, self.small, self.device, self.dtype), self.mode)
        shares = {}
        for name, g, e, x in zip(self.case.outputs, got, eager, exact, strict=False):
            error, allowed, _ = error_and_bound(g, e, x)
            shares[name] = error / allowed if allowed else math.inf if error else 0.0
        worst = max(shares, key=lambda name: shares[name])
        if shares[worst] <= 1:
            return {"error": shares[worst]}
        why = f"{worst}: {shares[worst]:.2g} times the error that is allowed, at {label(self.small)}"
        return {"status": "wrong", "error": shares[worst], "reason": why}

    def _compare(self, name: str, got: Outputs) -> Record:
        if self._want is None:
            self._want = got if name in self.case.definitions else self._define()
        want, at = self._want, label(self.shape)
        if not want:  # too large for the definition
            small, at = _draw(self.case, self.small, self.device, self.dtype), label(self.small)
            got = _call(self.fn(name), small, self.mode)
            want = _call(self.fn(self.case.definitions[0]), small, self.mode)
        found: Record = {"flags": []}
        distances = {}
        for output, g, w in zip(self.case.outputs, got, want, strict=False):
            if g is None or w is None:
                found["flags"].append(f"no {output}")
            else:
                distances[output] = self.case.distance(g, w)
        worst = max(distances, key=lambda output: distances[output])
        found["distance"] = distances[worst]
        if not all(d <= DISTANCE[self.dtype] for d in distances.values()):
            found |= {"status": "wrong", "reason": f"{worst}: {distances[worst]:.2g} away from {self._by()}, at {at}"}
        return found

    def _by(self) -> str:
        return f"the definition, {DISTANCE[self.dtype]:g} is allowed in {str(self.dtype)[6:]}"

    def _define(self) -> Outputs:
        try:
            return self.call(self.case.definitions[0])
        except Exception as error:
            if _out_of_memory(error):
                return ()
            raise


def _draws(fn: Callable[..., Tensor], draw: Callable[[int], tuple[Tensor, ...]], mode: str) -> list[Tensor]:
    """The outputs over a few draws of the inputs."""
    results = [_call(fn, draw(seed), mode) for seed in range(_DRAWS)]
    return [torch.stack(ts) for ts in zip(*results, strict=True)]


def _exact(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


@functools.lru_cache(maxsize=2)
def _judges(
    case: Case, shape: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype, mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The definition's, in the dtype and in float64."""
    define = case.providers[case.definitions[0]](device, dtype)
    draw = functools.partial(_draw, case, dict(shape), device, dtype)
    return _draws(define, draw, mode), _draws(define, lambda seed: tuple(map(_exact, draw(seed))), mode)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # an operator that accepts nothing says why on its second line
    return lines[1] if isinstance(error, NotImplementedError) and len(lines) > 1 else lines[0]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "bad_alloc", "out of memory")
    )


def failure(error: Exception) -> Record:
    if _out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"status": "out of memory", "reason": first_line(error)}
    # what turns out at the first call to be missing is absent, not broken
    missing = isinstance(error, (ImportError, NotImplementedError))
    return {"status": "absent" if missing else "failed", "reason": first_line(error)}
