"""`mmfuse compile-report`: every kernel compiled ahead of time, on a machine without a GPU, and what became of it.

Triton's kernels at every configuration that ships, and the CUDA of csrc. A violation: register spills, more shared
memory than the architecture has, float64 instructions where none are meant, or a matrix product in 16 bits or TF32
that does not use the architecture's tensor-core instruction.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmfuse.bench import csrc_report
from mmfuse.kernels._runtime import UnsupportedError, operators
from mmfuse.kernels._runtime.aot import SHARED_LIMIT, Facts, Spec, compile_all, violations
from mmfuse.kernels._runtime.device import INTERPRET, triton_missing

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Row:
    """One compilation. Numbers are None where the compiler does not say."""

    arch: int
    kernel: str
    variant: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    f64: int | None = None
    tensor_core: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        nargs="+",
        default=list(ARCHS),
        type=lambda text: int(text.removeprefix("sm_")),
        metavar="SM",
        help="compute capabilities, e.g. sm_90 or 90 (default: %(default)s)",
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name or variant contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if INTERPRET:
        raise UnsupportedError("TRITON_INTERPRET=1 replaces the functions that would be compiled: unset it")
    for arch in args.arch:
        if arch not in ARCHS:
            raise ValueError(f"--arch is {arch}, expected some of {', '.join(map(str, ARCHS))}")
    console = Console(stderr=True)
    rows, absent = [], []
    missing = triton_missing()
    if missing:
        absent.append(f"Triton's kernels: {missing}")
    else:
        jobs = [(spec, arch) for spec in triton_specs(args.kernel) for arch in spec.archs if arch in args.arch]
        done = track(compile_all(jobs), "compiling Triton's kernels", len(jobs), console=console, disable=args.json)
        rows += [_triton_row(*result) for result in done]
    # nvcc is a process of its own: a thread for each core keeps it busy
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = pool.map(partial(_csrc_rows, name=args.kernel), args.arch)
        for found in track(reports, "compiling csrc", len(args.arch), console=console, disable=args.json):
            if isinstance(found, str):
                absent.append(f"csrc: {found}")
                break
            rows += found
    if not rows and not absent:
        raise ValueError(f"--kernel is {args.kernel!r}: no kernel has it in its name or variant")
    bad = sum(bool(r.violations) for r in rows)
    if args.json:
        print(json.dumps({"rows": [asdict(r) for r in rows], "absent": absent, "violations": bad}, indent=2))
    else:
        _print(rows, absent, bad)
    return 1 if bad else 0


def triton_specs(name: str = "") -> Iterator[Spec]:
    """What the modules ship that the operators' Triton implementations launch."""
    launched = (op.implementations["triton"].kernels for op in operators().values() if "triton" in op.implementations)
    for module in sorted(set(chain.from_iterable(launched))):
        for spec in import_module(module).aot_specs():
            if name in f"{spec.kernel} {spec.variant}":
                yield spec


def _triton_row(spec: Spec, arch: int, facts: Facts | str) -> Row:
    name = spec.kernel.split(":")[1]
    if isinstance(facts, str):
        return Row(arch, name, spec.variant, violations=[f"does not compile: {facts}"])
    return Row(arch, name, spec.variant, **asdict(facts), violations=violations(spec, arch, facts))


def _csrc_rows(arch: int, name: str) -> list[Row] | str:
    try:
        found: list[dict[str, Any]] | str = csrc_report.resource_usage({90: "sm_90a"}.get(arch, f"sm_{arch}"))
    except RuntimeError as error:
        return [Row(arch, "csrc", "", violations=[f"does not compile: {error}"])]
    if isinstance(found, str):
        return found
    rows = []
    for usage in found:
        kernel, registers, spills, shared = (usage[k] for k in ("kernel", "registers", "spills", "smem"))
        why = [f"spills {spills} bytes per thread"] if spills else []
        why += [f"needs {shared} bytes of shared memory"] if shared > SHARED_LIMIT[arch] else []
        if name in f"{kernel} csrc":
            rows.append(Row(arch, kernel, "csrc", registers, spills, shared, violations=why))
    return rows


def _print(rows: list[Row], absent: list[str], bad: int) -> None:
    table = Table("arch", "kernel", "variant", box=None)
    for column in ("registers", "spills", "shared", "f64"):
        table.add_column(column, justify="right")
    table.add_column("tensor core")
    for r in sorted(rows, key=lambda r: r.arch):
        numbers = [r.registers, r.spills, r.shared, r.f64]
        table.add_row(
            f"sm_{r.arch}",
            r.kernel,
            r.variant,
            *("-" if n is None else str(n) for n in numbers),
            ", ".join(f"{n} {kind}" for kind, n in r.tensor_core.items()) or "-",
            style="red" if r.violations else None,
        )
    console = Console()
    if not console.is_terminal:  # a log is not cut to 80 columns
        console.width = 160
    console.print(table)
    for r in rows:
        for why in r.violations:
            console.print(f"[red]sm_{r.arch} {r.kernel} {r.variant}: {why}", highlight=False)
    for line in absent:
        console.print(f"not compiled: {line}", highlight=False)
    limits = ", ".join(f"sm_{a} {SHARED_LIMIT[a]}" for a in ARCHS)
    console.print(f"{len(rows)} compilations, {bad} with violations (bytes of shared memory allowed: {limits})")
