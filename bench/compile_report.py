"""`mmfuse compile-report`: every kernel compiled ahead of time, on a machine without a GPU, and what became of it.

Triton's kernels at every configuration that ships, and the CUDA of csrc. A violation: register spills, more shared
memory than the architecture has, float64 instructions where none are meant, a matrix product in 16 bits or TF32
that does not use the architecture's tensor-core instruction, or on sm_90 a measure above the bound that its spec states
or `ledger.json` beside the kernel still allows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmfuse.bench import csrc_report
from mmfuse.kernels._runtime import UnsupportedError, operators
from mmfuse.kernels._runtime.aot import BOUNDED, SHARED_LIMIT, Facts, Spec, compile_all, ledger_path, violations
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
    # by kind of instruction and bytes, on the common path
    accesses: dict[str, int] = field(default_factory=dict)
    # what Facts.measures and Facts.floors say
    measures: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    size: str = ""
    ledger: str = ""
    violations: list[str] = field(default_factory=list)
    triton: str = ""


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
    parser.add_argument("--also", type=Path, metavar="DIR", help="a folder with another Triton: sm_90 with it, too")
    parser.add_argument(
        "--plainest",
        action="store_true",
        help="every variant of a kernel for sm_90 with this Triton alone, elsewhere the plainest",
    )
    parser.add_argument("--tighten", action="store_true", help="with --also: lower every ledger.json to what was found")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table of sm_90 on a page of the docs")


def run(args: argparse.Namespace) -> int:
    if INTERPRET:
        raise UnsupportedError("TRITON_INTERPRET=1 replaces the functions that would be compiled: unset it")
    for arch in args.arch:
        if arch not in ARCHS:
            raise ValueError(f"--arch is {arch}, expected some of {', '.join(map(str, ARCHS))}")
    if args.tighten and not args.also:
        raise ValueError("--tighten is given without --also: a ledger holds the larger number of two Tritons")
    console = Console(stderr=True)
    rows, absent = [], []
    missing = triton_missing()
    if missing:
        absent.append(f"Triton's kernels: {missing}")
    else:
        specs = list(triton_specs(args.kernel))
        plainest = _plainest(specs) if args.plainest else specs
        jobs = [
            (s, arch) for s in specs for arch in args.arch if arch in s.archs and (arch == BOUNDED or s in plainest)
        ]
        rows += _triton_rows(jobs, console, args.json)
    if args.also:
        rows += _rows_with(args.also, args.kernel, args.plainest)
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
    if args.tighten:
        _tighten(rows)
    if args.write:
        _write(args.write, rows)
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


def _plainest(specs: Iterable[Spec]) -> list[Spec]:
    """Of each kernel the variant with the least to say of it."""
    found: dict[str, Spec] = {}
    for spec in sorted(specs, key=lambda s: len(s.variant)):
        found.setdefault(spec.kernel, spec)
    return list(found.values())


def _triton_rows(jobs: list[tuple[Spec, int]], console: Console | None = None, quiet: bool = True) -> list[Row]:
    done = track(compile_all(jobs), "compiling Triton's kernels", len(jobs), console=console, disable=quiet)
    return [_triton_row(*result) for result in done]


_PROGRAM = f"import sys, {__name__} as report; report.print_rows(sys.argv[1], sys.argv[2] == 'plainest')"


def _rows_with(folder: Path, name: str, plainest: bool) -> list[Row]:
    """The rows of sm_90 with the Triton of a folder, in a process that finds it first."""
    path = os.pathsep.join([str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, "plainest" if plainest else "every"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the report with the Triton in {folder} failed, see above")
    return [Row(**row) for row in json.loads(done.stdout)]


def print_rows(name: str, plainest: bool) -> None:
    specs = _plainest(triton_specs(name)) if plainest else triton_specs(name)
    jobs = [(spec, BOUNDED) for spec in specs if BOUNDED in spec.archs]
    print(json.dumps([asdict(row) for row in _triton_rows(jobs)]))


def _triton_row(spec: Spec, arch: int, facts: Facts | str) -> Row:
    import triton

    names: dict[str, Any] = {"arch": arch, "kernel": spec.kernel.split(":")[1], "variant": spec.variant}
    names |= {"triton": triton.__version__, "ledger": str(ledger_path(spec))}
    if isinstance(facts, str):
        return Row(**names, violations=[f"does not compile: {facts}"])
    if spec.work:
        names |= {"unit": spec.work.unit, "size": spec.work.size}
    return Row(
        **names,
        **{k: getattr(facts, k) for k in ("registers", "spills", "shared", "f64", "tensor_core")},
        accesses=facts.code.accesses,
        measures=facts.measures(spec),
        floors=facts.floors(spec) if arch == BOUNDED else {},
        violations=violations(spec, arch, facts),
    )


def _csrc_rows(arch: int, name: str) -> list[Row] | str:
    try:
        found: list[dict[str, Any]] | str = csrc_report.resource_usage(f"sm_{arch}")
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
    table = Table("arch", "triton", "kernel", "variant", box=None)
    for column in ("registers", "spills", "shared", "f64"):
        table.add_column(column, justify="right")
    for column in ("tensor core", "bytes an access", "instructions", "floors"):
        table.add_column(column)
    for r in sorted(rows, key=lambda r: r.arch):
        numbers = [r.registers, r.spills, r.shared, r.f64]
        table.add_row(
            f"sm_{r.arch}",
            r.triton,
            r.kernel,
            r.variant,
            *("-" if n is None else str(n) for n in numbers),
            ", ".join(f"{n} {kind}" for kind, n in r.tensor_core.items()) or "-",
            _widths(r),
            _counts(r),
            ", ".join(f"{k} {v:g}" for k, v in r.floors.items()),
            style="red" if r.violations else None,
        )
    console = Console()
    if not console.is_terminal:  # a log is not cut to 80 columns
        console.width = 220
    console.print(table)
    for r in rows:
        for why in r.violations:
            console.print(f"[red]sm_{r.arch} {r.kernel} {r.variant}: {why}", highlight=False)
    for line in absent:
        console.print(f"not compiled: {line}", highlight=False)
    limits = ", ".join(f"sm_{a} {SHARED_LIMIT[a]}" for a in ARCHS)
    console.print(f"{len(rows)} compilations, {bad} with violations (bytes of shared memory allowed: {limits})")


def _widths(row: Row) -> str:
    """`global 2 4 16, shared 4 16`: bytes of a thread's accesses."""
    found: dict[str, set[int]] = {}
    for access in row.accesses:
        kind, _, size = access.partition(" ")
        if size:
            space = "global" if kind in ("LDG", "STG", "LDGSTS") else "shared"
            found.setdefault(space, set()).add(int(size))
    return ", ".join(f"{space} {' '.join(map(str, sorted(sizes)))}" for space, sizes in sorted(found.items())) or "-"


def _counts(row: Row) -> str:
    """`4904, 38.3 + 1.2 a logit, 20.5 a product`: in all, outside the main loops and in them, by product."""
    m = row.measures
    texts = [f"{m['instructions']:g}"] if m else []
    texts += [f"{m['outside']:g} + {m['loop']:g} a {row.unit}"] if "outside" in m else []
    texts += [f"{m['product']:g} a product"] if "product" in m else []
    return ", ".join(texts)


def _tighten(rows: list[Row]) -> None:
    """What the ledgers allow falls to the most that any row has."""
    for path in {Path(r.ledger) for r in rows if r.ledger}:
        if not path.exists():
            continue
        ledger: dict[str, dict[str, float]] = json.loads(path.read_text())
        for name, still in ledger.items():
            seen = [r.measures for r in rows if r.arch == BOUNDED and r.ledger == str(path) and _named(r) == name]
            for measure in still:
                if seen:
                    still[measure] = min(still[measure], max(m.get(measure, 0.0) for m in seen))
        path.write_text(ledger_text({name: still for name, still in ledger.items() if any(still.values())}))


def ledger_text(ledger: dict[str, dict[str, float]]) -> str:
    """One line for each kernel and variant."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(still)}" for name, still in ledger.items())
    return f"{{\n{lines}\n}}\n"


def _named(row: Row) -> str:
    return f"{row.kernel} {row.variant}".strip()


_BEGIN, _END = "<!-- written by mmfuse compile-report --write -->", "<!-- end -->"


def _write(page: Path, rows: list[Row]) -> None:
    text = page.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"--write is {page}, expected a page with the lines {_BEGIN} and {_END}")
    before, after = text[: text.index(_BEGIN)], text[text.index(_END) :]
    page.write_text(f"{before}{_BEGIN}\n{_markdown(rows)}{after}")


def _markdown(rows: list[Row]) -> str:
    """A row for each kernel that has a stated size, on sm_90, with each Triton: its plainest variant."""
    plainest: dict[tuple[str, str], Row] = {}
    for r in sorted(rows, key=lambda r: len(r.variant)):
        if r.arch == BOUNDED and r.floors:
            plainest.setdefault((r.kernel, r.triton), r)
    lines = [
        "| kernel | size | Triton | registers | bytes an access | instructions | floors, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for (_, triton), r in sorted(plainest.items()):
        floors = ", ".join(f"{k} {v:.0f}" for k, v in r.floors.items())
        lines.append(
            f"| `{_named(r)}` | {r.size} | {triton} | {r.registers} | {_widths(r)} | {_counts(r)} | {floors} |"
        )
    return "\n".join(lines) + "\n"
