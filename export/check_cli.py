"""`mmfuse export check`: a file against PyTorch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmfuse.export.check import check_onnx
from mmfuse.export.cli import made
from mmfuse.export.generation.check import check_generation
from mmfuse.export.runtimes import RUNTIMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare an exported file, or a directory of --generation, with PyTorch. Exit code: 0 it holds, 1 it does not, "
        "2 it cannot be told."
    )
    parser.add_argument("file", metavar="FILE|DIR", type=Path)
    parser.add_argument("--weights", metavar="FILE", help="where the weights file is now")
    parser.add_argument("--model", metavar="FILE.PY:FACTORY", help="what was exported, where it was no reference model")
    parser.add_argument(
        "--also", action="append", default=[], choices=list(RUNTIMES), help="another runtime; may be repeated"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the report as Markdown")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with Console(stderr=True).status(f"running {args.file} in onnxruntime and in PyTorch"):
        model, inputs, _ = made(args.model) if args.model else (None, None, None)
        if args.file.is_dir():
            if args.also:
                raise ValueError(
                    f"also is {args.also[0]!r}, expected none: a directory is checked in onnxruntime alone"
                )
            report = check_generation(args.file, model, inputs, weights=args.weights)
        else:
            samples = None if inputs is None else [inputs]
            report = check_onnx(args.file, model, samples, weights=args.weights, also=args.also)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    if args.markdown is not None:
        args.markdown.write_text(markdown(report))
    return 0 if report["ok"] else 1


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    size = f"{report['bytes'] / 1e6:,.1f} MB"
    origin = f"random, seed {report['seed']}" if "seed" in report else report.get("weights", "not recorded")
    for name, fact in (
        ("file", f"{report['file']} ({size}), written by mmfuse {report['version']} for target {report['target']}"),
        ("model", f"{report.get('model', 'not recorded')}, {report['dtype']}, weights {origin}"),
        ("config", report.get("config", "not recorded")),
        ("ours", ", ".join(f"{op} {count}" for op, count in report["ours"].items()) or "none"),
        ("operators", ", ".join(f"{op} {count}" for op, count in report["operators"].items())),
    ):
        facts.add_row(name, escape(fact))
    checks = Table("check", "holds", "detail", box=None)
    for check in report["checks"]:
        checks.add_row(check["name"], _verdict(check), escape(check["detail"]))
    console.print(facts, "", checks, sep="\n")
    if "outputs" in report:
        _print_outputs(console, report)


def _print_outputs(console: Console, report: dict[str, Any]) -> None:
    outputs = Table("output", "holds", box=None)
    for column in ("error", "allowed", "PyTorch's", "largest", "difference"):
        outputs.add_column(column, justify="right")
    for output in report["outputs"]:
        numbers = (output[key] for key in ("error", "allowed", "pytorch_error", "scale", "difference"))
        outputs.add_row(output["name"], _verdict(output), *(f"{number:.1e}" for number in numbers))
    console.print("", outputs, sep="\n")
    console.print(f"float16: {escape(report['float16']['detail'])}")
    masked = report["float16"]["masked_rows"]
    for what in dict.fromkeys(masked.values()):
        first, *others = (escape(node) for node, of in masked.items() if of == what)
        more = f" and {len(others)} more" if others else ""
        console.print(f"  a row that is masked altogether is {what} after {first}{more}")
    console.print("error, PyTorch's: root mean square against float64; difference: the largest from PyTorch")


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    yes = {True: "yes", False: "no"}
    half = f" {report['float16']['detail']}." if "float16" in report else ""
    lines = [f"# {report['file']}", "", f"Holds: {yes[report['ok']]}.{half}", ""]
    lines += ["| check | holds | detail |", "|---|---|---|"]
    lines += [f"| {c['name']} | {yes[c['ok']]} | {c['detail']} |" for c in report["checks"]]
    keys = ("error", "allowed", "pytorch_error", "difference")
    if "outputs" in report:
        lines += ["", "| output | holds | error | allowed | PyTorch's | difference |", "|---|---|---|---|---|---|"]
    for o in report.get("outputs", ()):
        lines.append(f"| {o['name']} | {yes[o['ok']]} | {' | '.join(f'{o[key]:.1e}' for key in keys)} |")
    lines += ["", "| operator | nodes |", "|---|---|"]
    lines += [f"| {op} | {n} |" for op, n in (report["ours"] | report["operators"]).items()]
    return "\n".join(lines) + "\n"


def _verdict(part: dict[str, Any]) -> str:
    return "[green]yes[/]" if part["ok"] else "[red]no[/]"
