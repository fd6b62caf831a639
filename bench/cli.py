"""`mmfuse bench`: speed and memory against what you would otherwise run, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmfuse.bench import report, runner, store
from mmfuse.bench.cases import Case, Record, Shape, everything, is_ours, label, suite, suite_module, suites
from mmfuse.bench.row import first_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MINUTE = 60.0

Job = tuple[Case, Shape, list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suite",
        nargs="?",
        choices=[*suites(), "all"],
        help="what to measure, or to count; without it, a table of one minute",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--mode", choices=runner.MODES, default=runner.MODES[0])
    parser.add_argument("--cases", help="comma-separated, e.g. clip")
    parser.add_argument("--sizes", help="comma-separated, e.g. 4096x512,8192x512")
    parser.add_argument(
        "--providers", help="comma-separated; a name without [...] is all its variants, e.g. open_clip,mmfuse"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="leave out what does not fit, smallest first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the records as DIR/<device>/<suite>.jsonl")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="show these records, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the records into a PNG")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the records as a page of Markdown")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--list", action="store_true", help="list the cases, their sizes and providers")


def run(args: argparse.Namespace) -> int:
    module = None if args.suite in (None, "all") else suite_module(args.suite)
    if (own := getattr(module, "run", None)) is not None:
        _require_taken(args, module.OPTIONS)  # type: ignore[union-attr]
        return own(args)
    device = torch.device(args.device)
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"--device is {args.device!r}, expected cpu{' or cuda' * torch.cuda.is_available()}")
    dtype = _DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if args.source is not None:
        if not args.source.exists():
            raise ValueError(f"--from is {str(args.source)!r}, expected a file of records or a folder of such files")
        records = store.read(args.source)
        if args.cases:
            wanted = args.cases.split(",")
            _check("--cases", wanted, {r["case"] for r in records})
            records = [r for r in records if r["case"] in wanted]
    else:
        jobs = list(_jobs(args, device, dtype))
        if args.list:
            return _list(jobs, device, dtype)
        budget = _MINUTE if args.suite is None and args.budget is None else args.budget
        records = []
        with progress(len(jobs)) as tick:
            for found in runner.run(jobs, device, dtype, args.mode, tick, budget, share=args.suite is None):
                found = store.stamped(found, device)
                records += found
                if args.out is not None:  # at once: what was measured stays, whatever comes after it
                    store.append(args.out, _suite_of(found[0]["case"]), found)
    if args.json:
        print("\n".join(json.dumps(record) for record in records))
    elif args.markdown:
        print(report.markdown(records), end="")
    elif args.report is not None:
        args.report.write_text(report.page(records))
    else:
        _show(records)
    if args.plot is not None:
        from mmfuse.bench import plots

        plots.draw(records, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
    return 0 if runner.holds(records) else 1


def _require_taken(args: argparse.Namespace, taken: Sequence[str]) -> None:
    """A suite with a `run` of its own knows few of the options."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([args.suite])).items():
        if name not in taken and getattr(args, name) != default:
            options = ", ".join(f"--{option}" for option in taken)
            raise ValueError(f"--{name.replace('source', 'from')} is given, expected only {options} for {args.suite}")


def _jobs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    """What to measure, smallest first."""
    cases = list(everything()) if args.suite in (None, "all") else suite(args.suite)
    if args.cases:
        wanted = args.cases.split(",")
        _check("--cases", wanted, [case.name for case in cases])
        cases = [case for case in cases if case.name in wanted]
    brief = args.suite is None and not args.list
    jobs: list[Job] = []
    for case in cases:
        shapes = case.shapes[device.type]
        if args.sizes:
            shapes = [case.shape(size) for size in args.sizes.split(",")]
        elif brief:
            shapes = shapes[:1]
        names = _providers(args.providers, case, device, dtype)
        if brief and args.providers is None:  # of ours what a user gets; compiling takes longer than all the rest
            first = next((name for name in names if is_ours(name)), None)
            names = [name for name in names if name == first or not (is_ours(name) or name.startswith("compile"))]
        jobs += [(case, shape, names) for shape in shapes if names]
    yield from sorted(jobs, key=lambda job: job[0].flops(args.mode, **job[1]))


def _providers(wanted: str | None, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    if wanted is None:
        return case.default(device, dtype)
    names = wanted.split(",")
    _check(
        "--providers", names, {p for c in everything() for p in (*c.providers, *(q.split("[")[0] for q in c.providers))}
    )
    return [p for p in case.providers if p in names or p.split("[")[0] in names]


def _check(option: str, given: list[str], known: list[str] | set[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{option} has {name!r}, expected some of {', '.join(sorted(known))}")


def _suite_of(case: str) -> str:
    return next(name for name in suites() if any(c.name == case for c in suite(name)))


@contextmanager
def progress(rows: int) -> Iterator[runner.Tick]:
    # on the error stream: the output may be read by a program
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=rows)
        yield lambda text, done: progress.update(task, description=text, completed=done)


def _show(records: list[Record]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    device = None
    for key, group in report.groups(records).items():
        if key[0] != device:
            device = key[0]
            console.print(report.machine(group[0]))
        console.print(f"\n[bold]{report.title(key)}[/bold]  {report.ceiling(group)}")
        if cells := list(report.rows(group)):
            console.print(_table(report.columns(group), cells))
        for provider, time, space in report.growth_rows(group):
            dim = report.varying(group)[0]
            memory = f", memory ~ {dim}^{space}" if space else ""
            console.print(f"  {escape(f'{provider:26}')} time ~ {dim}^{time}{memory}")
        for line in report.left_out(group):
            console.print(f"  {escape(line)}", style="dim")


def _table(header: tuple[str, ...], cells: list[tuple[str, ...]]) -> Table:
    table = Table(*header, box=None, pad_edge=False, header_style="dim")
    for column in table.columns[2:9]:
        column.justify = "right"
    for row, above in zip(cells, [None, *cells], strict=False):
        same = above is not None and above[0] == row[0]
        if above is not None and not same:
            table.add_section()
        table.add_row("" if same else row[0], *map(escape, row[1:]))
    return table


def _list(jobs: list[Job], device: torch.device, dtype: torch.dtype) -> int:
    by_case = {case.name: case for case, *_ in jobs}
    for case in by_case.values():
        print(f"{case.name}: sizes {', '.join(label(s) for s in case.shapes[device.type])} ({'x'.join(case.dims)})")
        default = case.default(device, dtype)
        for name, load in case.providers.items():
            try:
                load(device, dtype)
                state = "measured by default" if name in default else "available"
            except Exception as error:  # importing a package built for another torch can raise anything
                state = f"absent: {first_line(error)}"
            print(f"  {name:26} {state}")
    return 0
