"""`mmfuse export`: a reference model as an ONNX file, and the check of such a file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmfuse.export.check import check_onnx
from mmfuse.export.clip import DTYPES, build
from mmfuse.export.onnx import TARGETS, export_onnx
from mmfuse.models.clip import SYSTEM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    clip = actions.add_parser("clip", help="write CLIP to one ONNX file", description="Write CLIP to one ONNX file.")
    clip.add_argument("--preset", required=True, help="a published size, e.g. vit-b-16 (`mmfuse models` lists them)")
    clip.add_argument("--onnx", required=True, metavar="FILE", type=Path, help="the file to write")
    clip.add_argument("--target", default="portable", help=f"{', '.join(TARGETS)}: standard operators, runs anywhere")
    clip.add_argument("--dtype", default="float32", help=f"{' or '.join(DTYPES)} (default: %(default)s)")
    source = clip.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="official state dict: safetensors, .pt, or OpenAI's archive")
    source.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    check = actions.add_parser(
        "check",
        help="compare an exported file with PyTorch",
        description="Compare an exported file with PyTorch. Exit code: 0 it holds, 1 it does not, 2 it cannot be told.",
    )
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument("--weights", metavar="FILE", help="where the weights file is now")
    check.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    return _check(args) if args.action == "check" else _clip(args)


def _clip(args: argparse.Namespace) -> int:
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    start = time.perf_counter()
    with Console(stderr=True).status(f"exporting CLIP {args.preset} to {args.onnx}"):
        seed = None if args.weights else args.seed
        model = build(args.preset, seed=args.seed, weights=args.weights).to(DTYPES[args.dtype])
        config = SYSTEM.presets[args.preset]
        export_onnx(model, args.onnx, target=args.target, config=config, seed=seed, weights=args.weights)
    print(f"wrote {args.onnx} in {time.perf_counter() - start:.0f} s; next: mmfuse export check {args.onnx}")
    return 0


def _check(args: argparse.Namespace) -> int:
    with Console(stderr=True).status(f"running {args.file} in onnxruntime and in PyTorch"):
        report = check_onnx(args.file, weights=args.weights)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if report["ok"] else 1


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    size = f"{report['bytes'] / 1e6:,.1f} MB"
    origin = f"from {report['weights']}" if "weights" in report else f"random, seed {report.get('seed', 'unknown')}"
    for name, fact in (
        ("file", f"{report['file']} ({size}), written by mmfuse {report['version']} for target {report['target']}"),
        ("model", f"{report['model']}, {report['dtype']}, weights {origin}"),
        ("config", report.get("config", "not recorded")),
        ("operators", ", ".join(f"{op} {count}" for op, count in report["operators"].items())),
    ):
        facts.add_row(name, escape(fact))
    checks = Table("check", "holds", "detail", box=None)
    for check in report["checks"]:
        checks.add_row(check["name"], _verdict(check), escape(check["detail"]))
    outputs = Table("output", "holds", box=None)
    for column in ("error", "allowed", "PyTorch's", "largest", "difference"):
        outputs.add_column(column, justify="right")
    for output in report["outputs"]:
        numbers = (output[key] for key in ("error", "allowed", "pytorch_error", "scale", "difference"))
        outputs.add_row(output["name"], _verdict(output), *(f"{number:.1e}" for number in numbers))
    console.print(facts, "", checks, "", outputs, sep="\n")
    console.print("error, PyTorch's: root mean square against float64; difference: the largest from PyTorch")


def _verdict(part: dict[str, Any]) -> str:
    return "[green]yes[/]" if part["ok"] else "[red]no[/]"
