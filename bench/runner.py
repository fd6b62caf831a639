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

from mmfuse.bench import clock, memory
from mmfuse.bench.cases import Case, Record, Shape, find, is_ours, label
from mmfuse.bench.row import Row, failure

Tick = Callable[[str, float], None]  # (what is being done, rows that are done)

MODES = ("fwd+bwd", "fwd")
# below this share of the time that the measured ceilings allow, something was not computed
_PLAUSIBLE = 0.9
# of timing per case and size, as far as three rounds fit into it
_SECONDS = 10.0


class Isolated:
    """Probes in another process, whose resident memory is the provider's alone, and which may run out of it."""

    def __enter__(self) -> Isolated:
        self._pool = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def probe(self, row: Row, name: str) -> Record:
        key = (row.case.name, tuple(row.shape.items()), row.device, row.dtype, row.mode)
        try:
            return self._pool.submit(_probe, key, name).result()
        except BrokenProcessPool:
            self._pool = self._start()
            return {"status": "out of memory", "reason": "the process that ran it was ended"}

    def _start(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        before = {key: os.environ.get(key) for key in memory.EXACT}
        os.environ.update(memory.EXACT)  # read when the process starts
        try:
            pool.submit(torch.set_num_threads, torch.get_num_threads()).result()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        return pool


def _probe(key: tuple[Any, ...], name: str) -> Record:
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


def _rounds(seconds: float, limit: float) -> int:
    """How many rounds of `seconds` each: about `limit` seconds in all, fewer of very long ones."""
    return max(2 if seconds > 30 else 3, min(25, int(limit / max(seconds, 1e-3))))


def measure(
    row: Row,
    names: Sequence[str],
    probes: Isolated | InProcess,
    tick: Tick,
    limit: float = _SECONDS,
    until: float = math.inf,
) -> list[Record]:
    """The records of the named providers at one size, and of the anchors that they are compared with.

    After the time `until` only what a row needs is measured: the baselines, the first of ours, and one round of them.
    """
    case = row.case
    record = functools.partial(_record, case, row.shape, row.dtype, row.mode)
    records: dict[str, Record] = {}
    for i, name in enumerate(names):
        tick(f"checking {name}", i / len(names) / 2)
        late = time.perf_counter() > until and any(is_ours(n) for n in records)
        found = {"status": "skipped", "reason": "no time is left"} if late else probes.probe(row, name)
        records[name] = record(name, **found)
    timed = [name for name in names if records[name]["status"] == "ok"]
    anchors = list(dict.fromkeys(case.anchor(name, row.mode) for name in timed))
    peak_flops, peak_bytes = clock.ceilings(row.device, row.dtype)
    for name in anchors:
        seconds = case.anchors[name].flops(**row.shape) / peak_flops
        records[name] = record(name, role="anchor", status="ok", seconds=seconds)
    samples: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for name in (*anchors, *timed):
        tick(f"warming {name}", 0.5)
        try:
            first[name] = _warm(row, name, records[name]["seconds"])
            samples[name] = []
        except Exception as error:
            records[name] |= failure(error)
    rounds = _rounds(sum(first.values()), limit)
    for i in range(rounds):
        if i and time.perf_counter() > until:
            break
        for name in list(samples):
            tick(f"round {i + 1} of {rounds}: {name}", 0.5 + i / rounds / 2)
            try:
                samples[name] += row.sample(name, _calls(first[name], row.device))
            except Exception as error:
                records[name] |= failure(error)
                del samples[name]
    for name, times in samples.items():
        records[name] |= _summary(row, name, times, records[name].get("flags", []), peak_flops, peak_bytes)
    for name in timed:
        anchor = case.anchor(name, row.mode)
        if name in samples and anchor in samples:
            records[name] |= {"anchor": anchor, "anchor_ms": records[anchor]["p50"]}
    return list(records.values())


def _warm(row: Row, name: str, seconds: float) -> float:
    """Seconds of a warm call, of which about `seconds` is known: a long one needs no second call to find out."""
    if seconds > 2:
        if row.warms(name):
            row.call(name)
        return seconds
    row.call(name)
    return row.sample(name, 1)[0] / 1e3


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
    share: bool = False,
) -> Iterator[list[Record]]:
    """Measure (case, shape, providers) one after another; with a budget of seconds, skip what does not fit.

    With `share`, each gets an equal part of what is left of the budget, and makes do with it.
    """
    start = time.perf_counter()
    tick("measuring the ceilings", 0)
    clock.ceilings(device, dtype)
    limit = _SECONDS if budget is None else min(_SECONDS, budget / (3 * max(1, len(jobs))))
    past: dict[str, tuple[float, float, float]] = {}  # case: seconds besides the rounds, seconds per round, its flops
    with prober(device) as probes:
        for i, (case, shape, names) in enumerate(jobs):
            begun, until = time.perf_counter(), math.inf
            if share and budget is not None:
                part = max(0.0, budget - (begun - start)) / (len(jobs) - i)
                limit, until = min(_SECONDS, part / 10), begun + part
            of_case = mode if mode in case.modes else case.modes[0]
            flops = case.flops(of_case, **shape)
            if budget is not None and past:
                # a case that has not been seen is tried while time is left: its first size is small
                fixed, per_round, of = past.get(case.name, (0.0, 0.0, 1.0))
                expected = fixed + per_round * flops / of * (2 + _rounds(per_round * flops / of, limit))
                left = budget - (begun - start)
                if expected > left:
                    reason = f"would take about {expected:.0f} s, {max(0.0, left):.0f} s are left of {budget:.0f}"
                    yield [_record(case, shape, dtype, of_case, "all", status="skipped", reason=reason)]
                    continue
            row = Row(case, shape, device, dtype, of_case)
            step = functools.partial(_step, tick, f"{case.name} {label(shape)}", i)
            records = measure(row, names, probes, step, limit, until)
            per_round = sum(r["p50"] / 1e3 for r in records if "p50" in r)
            count = max((r.get("samples", 0) for r in records), default=0)
            wall = time.perf_counter() - begun
            past[case.name] = max(0.0, wall - per_round * (2 + count)), per_round, flops
            yield records


def _step(tick: Tick, job: str, before: int, text: str, share: float) -> None:
    tick(f"{job}: {text}", before + share)


def _record(
    case: Case, shape: Shape, dtype: torch.dtype, mode: str, provider: str, role: str = "provider", **found: Any
) -> Record:
    of = {"case": case.name, "shape": shape, "dtype": str(dtype)[6:], "mode": mode}
    return {**of, "provider": provider, "role": role, **found}


def holds(records: Sequence[Record]) -> bool:
    """Every check of correctness held, and whatever is ours ran."""
    return not any(r["status"] == "wrong" or (is_ours(r["provider"]) and r["status"] == "failed") for r in records)
