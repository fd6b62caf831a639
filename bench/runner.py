"""Correct first, then timed: every provider is checked before any is timed, and a wrong one gets no time.

Ours are judged against float64 at a smaller size: an error at most twice eager's plus one ulp. Every provider is then
compared with the operation's definition at the size itself. Timing interleaves the providers round by round.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from mmfuse.bench import memory
from mmfuse.bench.cases import Case, Shape, find, is_ours, label, options
from mmfuse.kernels._runtime.numerics import error_and_bound
from torch import Tensor

Record = dict[str, Any]
Outputs = tuple[Tensor | None, ...]
Tick = Callable[[str, float], None]  # (what is being done, rows that are done)

MODES = ("fwd+bwd", "fwd")
# |got - want| / |want| that rounding may explain, by dtype: beyond it, it is another function
DISTANCE = {torch.float64: 1e-9, torch.float32: 3e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# rows that float64 judges: several blocks of every implementation
_JUDGED = {"cpu": 1200, "cuda": 5000}
_DRAWS = 4
# below this share of the time that the measured ceilings allow, something was not computed
_PLAUSIBLE = 0.9


def _call(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Outputs:
    """The result and, in mode fwd+bwd, the gradient of every input that requires one."""
    if mode == "fwd":
        with torch.no_grad():
            return (fn(*inputs),)
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

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        _wait(self.device)
        start = time.perf_counter()
        result = run()
        _wait(self.device)
        return time.perf_counter() - start, result

    # --- correctness and memory

    def probe(self, name: str) -> Record:
        """Run a provider once: is it right, how much memory does it take, and about how long."""
        try:
            fn = self.fn(name)
        except Exception as error:  # importing a package built for another torch can raise anything
            return {"status": "absent", "reason": first_line(error)}
        try:
            found = {"status": "ok", "options": options(fn), **(self._judge(fn) if is_ours(name) else {})}
            if found["status"] != "ok":
                return found
            if self.warms(name):
                self.call(name)
            else:
                _call(fn, _draw(self.case, self.small, self.device, self.dtype), self.mode)
            seconds, (got, peak) = self.seconds(lambda: memory.peak(lambda: self.call(name), self.device))
            return {**found, "seconds": seconds, "memory": peak, **self._compare(name, got)}
        except Exception as error:
            if name in self.case.definitions and _out_of_memory(error):
                self._want = ()
            return _failure(error)

    def warms(self, name: str) -> bool:
        """Whether the first call at a size compiles for it."""
        return self.device.type == "cuda" or hasattr(self.fn(name), "_torchdynamo_orig_callable")

    def _judge(self, fn: Callable[..., Tensor]) -> Record:
        """The project's rule of tolerance, over a few draws so that a lucky sum of eager's does not decide."""
        eager, exact = _judges(self.case, tuple(self.small.items()), self.device, self.dtype, self.mode)
        got = _draws(fn, self.case, self.small, self.device, self.dtype, self.mode)
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
                distances[output] = _distance(g, w)
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

    # --- time

    def sample(self, name: str, calls: int) -> list[float]:
        """Milliseconds of each of a few calls."""
        if self.device.type == "cuda":
            return _cuda_times(lambda: self.call(name), calls, self.device)
        return [1e3 * self.seconds(lambda: self.call(name))[0] for _ in range(calls)]


def _draws(
    fn: Callable[..., Tensor],
    case: Case,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    exact: bool = False,
) -> list[Tensor]:
    """The outputs over a few draws of the inputs, in float64 if `exact`."""
    results = []
    for seed in range(_DRAWS):
        inputs = _draw(case, shape, device, dtype, seed)
        if exact:
            inputs = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        results.append(_call(fn, inputs, mode))
    return [torch.stack(ts) for ts in zip(*results, strict=True)]


@functools.lru_cache(maxsize=2)
def _judges(
    case: Case, shape: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype, mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    define = case.providers[case.definitions[0]](device, dtype)
    eager, exact = (_draws(define, case, dict(shape), device, dtype, mode, exact) for exact in (False, True))
    return eager, exact


def _distance(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite for a NaN."""
    gap, size = (torch.linalg.vector_norm(t).item() for t in (got.double() - want.double(), want.double()))
    if math.isnan(gap):
        return math.inf
    return gap / size if size else math.inf if gap else 0.0


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # an operator that accepts nothing says why on its second line
    return lines[1] if isinstance(error, NotImplementedError) and len(lines) > 1 else lines[0]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "bad_alloc", "out of memory")
    )


def _failure(error: Exception) -> Record:
    if _out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"status": "out of memory", "reason": first_line(error)}
    # what turns out at the first call to be missing is absent, not broken
    missing = isinstance(error, (ImportError, NotImplementedError))
    return {"status": "absent" if missing else "failed", "reason": first_line(error)}


class Isolated:
    """Probes in another process, whose resident memory is the provider's alone, and which may run out of it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def probe(self, row: Row, name: str) -> Record:
        if self._pool is None:
            self._pool = self._start()
        key = (row.case.name, tuple(row.shape.items()), row.device, row.dtype, row.mode)
        try:
            return self._pool.submit(_probe, key, name, torch.get_num_threads()).result()
        except BrokenProcessPool:
            self.__exit__()
            return {"status": "out of memory", "reason": "the process that ran it was ended"}

    def _start(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        before = {key: os.environ.get(key) for key in memory.EXACT}
        os.environ.update(memory.EXACT)  # read when the process starts
        try:
            pool.submit(os.getpid).result()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        return pool


def _probe(key: tuple[Any, ...], name: str, threads: int) -> Record:
    torch.set_num_threads(threads)
    with memory.guard():
        return _row(*key).probe(name)


@functools.lru_cache(maxsize=1)
def _row(case: str, shape: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype, mode: str) -> Row:
    return Row(find(case), dict(shape), device, dtype, mode)


class InProcess:
    """Probes in this process: on a GPU, whose allocator counts."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def probe(self, row: Row, name: str) -> Record:
        return row.probe(name)


def prober(device: torch.device) -> Isolated | InProcess:
    return InProcess() if device.type == "cuda" else Isolated()


# --- clocks and ceilings --------------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_times(run: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Milliseconds of each call by events, queued without waiting, the L2 cache cleared before each."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read and written), measured here."""
    n, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 256 << 20)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = []
    for run in (lambda: torch.mm(a, b, out=out), lambda: target.copy_(source)):
        run()
        if device.type == "cuda":
            best.append(min(_cuda_times(run, 10, device)) / 1e3)
        else:
            best.append(min(_clock(run) for _ in range(10)))
    return 2 * n**3 / best[0], 2 * length / best[1]


def _clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- one row, and many ----------------------------------------------------------------------------------------------


def _rounds(seconds: float, limit: float) -> int:
    """How many rounds of `seconds` each: about `limit` seconds in all, fewer of very long ones."""
    return max(2 if seconds > 30 else 3, min(25, int(limit / max(seconds, 1e-3))))


def measure(
    row: Row, names: Sequence[str], probes: Isolated | InProcess, tick: Tick, limit: float = 20.0
) -> list[Record]:
    """The records of the named providers at one size, and of the anchors that they are compared with."""
    case = row.case
    common = {"case": case.name, "shape": row.shape, "dtype": str(row.dtype)[6:], "mode": row.mode}
    records: dict[str, Record] = {}
    for i, name in enumerate(names):
        tick(f"checking {name}", i / len(names) / 2)
        records[name] = {**common, "provider": name, "role": "provider", **probes.probe(row, name)}
    timed = [name for name in names if records[name]["status"] == "ok"]
    anchors = list(dict.fromkeys(case.anchor(name, row.mode) for name in timed))
    for name in anchors:
        records[name] = {**common, "provider": name, "role": "anchor", "status": "ok"}
    samples: dict[str, list[float]] = {}
    first = {}
    for name in (*anchors, *timed):
        tick(f"warming {name}", 0.5)
        try:
            # a long call warms itself, unless it also compiles
            known = records[name].get("seconds", 0.0)
            first[name] = known if known > 2 and not row.warms(name) else _warm(row, name)
            samples[name] = []
        except Exception as error:
            records[name] |= _failure(error)
    rounds = _rounds(sum(first.values()), limit)
    for i in range(rounds):
        for name in samples:
            tick(f"round {i + 1} of {rounds}: {name}", 0.5 + i / rounds / 2)
            samples[name] += row.sample(name, _calls(first[name], row.device))
    peak_flops, peak_bytes = ceilings(row.device, row.dtype)
    for name, times in samples.items():
        records[name] |= _summary(row, name, times, records[name].get("flags", []), peak_flops, peak_bytes)
    for name in timed:
        anchor = case.anchor(name, row.mode)
        if name in samples and anchor in samples:
            records[name] |= {"anchor": anchor, "anchor_ms": records[anchor]["p50"]}
    return list(records.values())


def _warm(row: Row, name: str) -> float:
    row.call(name)
    return row.seconds(lambda: row.call(name))[0]


def _calls(seconds: float, device: torch.device) -> int:
    """A GPU takes short calls in batches, so that the host runs ahead of it."""
    return max(1, min(50, int(0.02 / seconds))) if device.type == "cuda" else 1


def _summary(row: Row, name: str, times: list[float], flags: list[str], peak_flops: float, peak_bytes: float) -> Record:
    case, mode = row.case, row.mode
    p20, p50, p80 = np.percentile(times, (20, 50, 80)).tolist()
    is_anchor = name in case.anchors
    flops = case.anchors[name].flops(**row.shape) if is_anchor else case.flops(mode, **row.shape)
    moved = case.bytes(mode, row.dtype.itemsize, **row.shape)
    found: Record = {"p20": p20, "p50": p50, "p80": p80, "samples": len(times)}
    found |= {"tflops": flops / p50 / 1e9, "gbps": moved / p50 / 1e6}
    found |= {"ceiling_tflops": peak_flops / 1e12, "ceiling_gbps": peak_bytes / 1e9}
    if not is_anchor and p50 / 1e3 < _PLAUSIBLE * max(flops / peak_flops, moved / peak_bytes):
        # skipped work, or a ceiling measured while the machine was busy
        found["flags"] = [*flags, "faster than the measured ceilings"]
    return found


def run(
    jobs: Sequence[tuple[Case, Shape, list[str]]],
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    tick: Tick,
    budget: float | None = None,
) -> Iterator[list[Record]]:
    """Measure (case, shape, providers) one after another; with a budget of seconds, skip what does not fit."""
    start = time.perf_counter()
    tick("measuring the ceilings", 0)
    ceilings(device, dtype)
    limit = 20.0 if budget is None else min(20.0, budget / (3 * max(1, len(jobs))))
    past: dict[str, tuple[float, float, float]] = {}  # case: seconds besides the rounds, seconds per round, its flops
    with prober(device) as probes:
        for i, (case, shape, names) in enumerate(jobs):
            begun = time.perf_counter()
            flops = case.flops(mode, **shape)
            if budget is not None and past:
                fixed, per_round, of = past.get(case.name) or max(past.values())
                expected = fixed + per_round * flops / of * (2 + _rounds(per_round * flops / of, limit))
                left = budget - (begun - start)
                if expected > left:
                    reason = f"would take about {expected:.0f} s, {max(0.0, left):.0f} s are left of {budget:.0f}"
                    yield [_skipped(case, shape, dtype, mode, reason)]
                    continue
            row = Row(case, shape, device, dtype, mode)
            step = functools.partial(_step, tick, f"{case.name} {label(shape)}", i)
            records = measure(row, names, probes, step, limit)
            per_round = sum(r["p50"] / 1e3 for r in records if "p50" in r)
            count = max((r.get("samples", 0) for r in records), default=0)
            wall = time.perf_counter() - begun
            past[case.name] = max(0.0, wall - per_round * (2 + count)), per_round, flops
            yield records


def _step(tick: Tick, job: str, before: int, text: str, share: float) -> None:
    tick(f"{job}: {text}", before + share)


def _skipped(case: Case, shape: Shape, dtype: torch.dtype, mode: str, reason: str) -> Record:
    return {
        "case": case.name,
        "shape": shape,
        "dtype": str(dtype)[6:],
        "mode": mode,
        "provider": "all",
        "role": "provider",
        "status": "skipped",
        "reason": reason,
    }


def holds(records: Sequence[Record]) -> bool:
    """Every check of correctness held, and whatever is ours ran."""
    return not any(r["status"] == "wrong" or (is_ours(r["provider"]) and r["status"] == "failed") for r in records)
