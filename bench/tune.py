"""`mmfuse tune`: from which size on each implementation pays, measured on this device and kept as a table.

Every operator that declares a size is called through its benchmark cases, at powers of two, by each implementation
that accepts the arguments: correct first, then timed in turn, the least time of a few rounds. An implementation is
taken from the size on at which it is no slower than all later ones, forward alone and with backward.

A table only falls where that is known of every size up to what it said, and rises wherever an implementation loses.
Tables are read at the first call of a process; what was found is kept when the command is interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmfuse.bench.cases import Case, everything, label
from mmfuse.bench.cli import progress
from mmfuse.bench.row import Row, first_line
from mmfuse.kernels._runtime import configs, operators
from mmfuse.kernels._runtime.aot import SHARED_LIMIT, Spec, compile_all, violations
from mmfuse.kernels._runtime.device import INTERPRET, device_name, vectors
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels._runtime.operator import reached

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what an implementation may take of the best later one's time, and how many sizes in a row have to agree
_WORTH, _AGREE = 1.05, 2
# of timing at each size, and at least so many rounds
_SECONDS, _ROUNDS = 0.2, 5

Seconds = dict[str, float]  # by implementation
Times = list[tuple[int, list[Seconds]]]  # of each size, in each mode


@dataclass(frozen=True)
class Found:
    """What a table is to say of an implementation."""

    operator: str
    implementation: str
    kind: str
    columns: int
    unit: str
    was: int | None
    least: int

    @property
    def key(self) -> str:
        columns = f"/{self.columns}" if self.columns else ""
        return f"{self.operator}/{self.implementation}/{self.kind}{columns}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="in all (default %(default)s)")
    parser.add_argument("--ops", help="comma-separated, e.g. clip_loss,patch_embed; default: all that have a size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated (default %(default)s)")
    parser.add_argument("--save", action="store_true", help="write the tables that ship, kernels/<family>/configs")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {args.device!r}, expected cpu{' or cuda' * torch.cuda.is_available()}")
    folder = configs.SHIPPED if args.save else configs.tuned_folder()
    if folder is None:
        raise ValueError("MMFUSE_TUNED is empty, expected a folder to write to, or --save")
    jobs = [(case, dtype) for case in cases(args.ops) for dtype in dtypes(args.dtypes)]
    found: dict[str, Found] = {}
    left_out: list[str] = []
    files: set[Path] = set()
    tiles: dict[str, Settings] = {}
    until, interrupted = time.perf_counter() + args.budget, False
    try:
        with progress(len(jobs)) as tick:
            for i, (case, dtype) in enumerate(jobs):
                name, left = f"{case.name} in {dtype_name(dtype)}", until - time.perf_counter()
                tick(name, i)
                new, why = (
                    tuned(case, device, dtype, left / (len(jobs) - i)) if left > 0 else ([], ["no time was left"])
                )
                left_out += [f"{name}: {line}" for line in why]
                for f in new:  # of two cases the larger size counts
                    found[f.key] = max(f, found.get(f.key, f), key=lambda f: f.least)
                files |= save(folder, device, [found[f.key] for f in new])
                arch, left = facts_of(device).get("arch"), (until - time.perf_counter()) / (len(jobs) - i)
                if arch in SHARED_LIMIT and left > 0 and "triton" in operators()[case.op].implementations:
                    settings = launches(case, device, dtype, arch, left)
                    files |= put(folder, device, operators()[case.op].family, "configs", settings)
                    tiles |= settings
    except KeyboardInterrupt:
        interrupted = True
    configs.forget()
    facts: dict[str, Any] = {"device": device_name(device), "found": [asdict(f) for f in found.values()]}
    facts |= {"configs": tiles, "left_out": left_out, "files": sorted(map(str, files)), "interrupted": interrupted}
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _show(list(found.values()), facts)
    return 130 if interrupted else 0


def cases(wanted: str | None = None) -> list[Case]:
    """Those whose operator has a size."""
    every = list(everything())
    sized = [case for case in every if operators()[case.op].unit is not None]
    names = {case.op for case in sized}
    for name in wanted.split(",") if wanted else ():
        if name not in names:
            raise ValueError(f"--ops has {name!r}, expected some of {', '.join(sorted(names))}")
    return [case for case in sized if wanted is None or case.op in wanted.split(",")]


def dtypes(given: str) -> Iterator[torch.dtype]:
    for name in given.split(","):
        if name not in _DTYPES:
            raise ValueError(f"--dtypes has {name!r}, expected some of {', '.join(_DTYPES)}")
        yield _DTYPES[name]


# --- launch settings of a GPU's kernels ------------------------------------------------------------------------------


Settings = dict[str, int]


def launches(case: Case, device: torch.device, dtype: torch.dtype, arch: int, seconds: float) -> dict[str, Settings]:
    """Launch settings that are 3 % faster than those there are, by key, at a case's smallest size.

    Only what compiles clean for the card is tried, as `mmfuse compile-report` has it.
    """
    begun, operator = time.perf_counter(), operators()[case.op]
    row = Row(case, case.shapes[device.type][0], device, dtype, case.modes[0])
    columns = operator.measured(reached(lambda: case.ours(*row.inputs), operator.name)[1])[2]
    found: dict[str, Settings] = {}
    for module in map(import_module, operator.implementations["triton"].kernels):
        for key, options in getattr(module, "candidates", lambda *of: ())(operator.name, dtype, columns, arch):
            least = 0.97 * fastest(row, ["triton"])["triton"]
            for settings in clean(options, arch):
                if time.perf_counter() - begun > seconds:
                    break
                with configs.trying(operator.family, device, key, settings):
                    taken = fastest(row, ["triton"])["triton"] if _right([row], "triton", []) else math.inf
                if taken < least:
                    found[key], least = settings, taken
    return found


def clean(options: Sequence[tuple[Settings, Sequence[Spec]]], arch: int) -> Iterator[Settings]:
    """Those of which every compilation is without violations, as they come."""
    compiled = compile_all([(spec, arch) for _, specs in options for spec in specs])
    for settings, specs in options:
        facts = [next(compiled)[2] for _ in specs]
        if not any(isinstance(f, str) or violations(spec, arch, f) for spec, f in zip(specs, facts, strict=True)):
            yield settings


# --- one case in one dtype ------------------------------------------------------------------------------------------


def tuned(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[list[Found], list[str]]:
    """What was found within about so many seconds, and what is wrong or was left out."""
    begun, expected = time.perf_counter(), 0.0
    operator, sizes = operators()[case.op], ladder(case, device)
    names: list[str] = []
    was: dict[str, int | None] = {}
    times: Times = []
    why: list[str] = []
    kind, columns = "", 0
    for n in sizes:
        try:
            rows = [Row(case, case.shapes[device.type][0] | {case.growth: n}, device, dtype, m) for m in case.modes]
            args = reached(lambda rows=rows: case.ours(*rows[0].inputs), operator.name)[1]  # type: ignore[misc]
            size, kind, columns = operator.measured(args)
            if not times:
                small = [Row(case, case.small, device, dtype, mode) for mode in case.modes]
                names = [i for i in operator.available(args) if not (i == "triton" and INTERPRET)]
                names = [name for name in names if _right(small, name, why)]
                steps = {i: configs.least(operator.family, operator.name, i, device, kind) for i in names}
                was = {i: next((least for at, least in s if columns >= at), 0) for i, s in steps.items()}
            if len(names) < 2:
                return [], [*why, f"there is nothing to choose from: {', '.join(names)}"]
            if size is None:
                return [], [*why, f"at {label(rows[0].shape)} nothing steps aside, whatever a table says"]
            if time.perf_counter() - begun + expected > seconds:
                why.append(f"from {size} {operator.unit} on there was no time")
                break
            times.append((size, [fastest(row, names) for row in rows]))
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:  # often it is the dtype
            return [], [*why, first_line(error)]
        # as if the next size were four times this one
        expected = 4 * (1 + _ROUNDS) * sum(sum(one.values()) for one in times[-1][1])
        if all(settled(times, name, names, was[name]) for name in names[:-1]):
            break
    found = []
    for name in names[:-1] if times else ():
        least, before = least_size(times, name, names), was[name]
        if least == times[0][0] and before is not None:
            least = min(least, before)  # nothing is known of smaller sizes
        whole = len(times) == len(sizes) and settled(times, name, names, 0)
        if whole or settled(times, name, names, before) or (before is not None and least > before):
            found.append(Found(operator.name, name, kind, columns, operator.unit or "", before, least))
    return found, why


def ladder(case: Case, device: torch.device) -> list[int]:
    """The sizes along which a case grows: powers of two up to the largest that is measured."""
    most = max(shape[case.growth] for shape in case.shapes[device.type])
    first = max(0, case.small[case.growth] - 1).bit_length()
    return [1 << k for k in range(first, max(first, most.bit_length() - 1) + 1)]


def _right(rows: Sequence[Row], name: str, why: list[str]) -> bool:
    for row in rows:
        probed = row.probe(f"mmfuse-{name}")
        if probed["status"] != "ok":
            why.append(f"{name} is {probed['status']}: {probed['reason']}")
            return False
    return True


def fastest(row: Row, names: Sequence[str]) -> Seconds:
    """The least time of a call by each implementation, taken in turn."""
    least = dict.fromkeys(names, math.inf)
    calls = 5 if row.device.type == "cuda" else 1
    for name in names:
        row.call(f"mmfuse-{name}")
    begun, rounds = time.perf_counter(), 0
    while rounds < _ROUNDS or (time.perf_counter() - begun < _SECONDS and rounds < 100):
        for name in names:
            least[name] = min(least[name], *(ms / 1e3 for ms in row.sample(f"mmfuse-{name}", calls)))
        rounds += 1
    return least


def _lost(times: Times, name: str, names: Sequence[str]) -> int:
    """How many sizes there are up to the last at which a later implementation is faster."""
    later = names[names.index(name) + 1 :]
    worse = [i for i, (_, modes) in enumerate(times) if any(t[name] > _WORTH * min(t[n] for n in later) for t in modes)]
    return worse[-1] + 1 if worse else 0


def least_size(times: Times, name: str, names: Sequence[str]) -> int:
    """From which size on an implementation is no slower than the later ones, as far as was measured."""
    lost = _lost(times, name, names)
    return times[lost][0] if lost < len(times) else 2 * times[-1][0]


def settled(times: Times, name: str, names: Sequence[str], was: int | None) -> bool:
    """Whether it has won at the last sizes, and what a table said is no larger than these."""
    return len(times) - _lost(times, name, names) >= _AGREE and was is not None and times[-1][0] >= was


# --- the table ------------------------------------------------------------------------------------------------------


def save(folder: Path, device: torch.device, found: Sequence[Found]) -> set[Path]:
    """Put what was found of an operator into the table of its family."""
    by_family: dict[str, dict[str, int]] = {}
    for f in found:
        by_family.setdefault(operators()[f.operator].family, {})[f.key] = f.least
    return {path for family, least in by_family.items() for path in put(folder, device, family, "least", least)}


def put(folder: Path, device: torch.device, family: str, kind: str, entries: Mapping[str, Any]) -> set[Path]:
    """Put entries of a kind into a table. A new one that ships begins with those in force: nothing else adds to it."""
    if not entries:
        return set()
    path = configs.path_of(folder, family, device)
    table = configs.read(path) if path.exists() else facts_of(device)
    begun = {} if path.exists() or folder != configs.SHIPPED else configs.in_force(family, kind, device)
    configs.write(path, table | {kind: begun | table.get(kind, {}) | entries})
    return {path}


def facts_of(device: torch.device) -> configs.Table:
    """What a table says of its device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"arch": 10 * major + minor}
    return {"threads": torch.get_num_threads(), "vectors": vectors()}


def _show(found: Sequence[Found], facts: dict[str, Any]) -> None:
    table = Table("operator", "implementation", "kind", box=None, pad_edge=False, header_style="dim")
    for column in ("was taken from", "is taken from"):
        table.add_column(column, justify="right")
    table.add_column("")
    for f in found:
        columns = f", {f.columns} columns or more" if f.columns else ""
        was = "never" if f.was is None else str(f.was)
        table.add_row(f.operator, f.implementation, f.kind, was, str(f.least), f.unit + columns)
    console = Console(width=None if Console().is_terminal else 160, highlight=False, markup=False)
    console.print(table)
    for key, settings in facts["configs"].items():
        console.print(f"{key}: {settings}")
    for line in facts["left_out"]:
        console.print(f"left out: {line}", style="dim")
    for path in facts["files"]:
        console.print(f"written: {path}")
    if facts["interrupted"]:
        console.print("interrupted: what was found so far is kept")
