"""`mmfuse export build`: an ONNX file as an engine of TensorRT, or as a bundle for a machine that has it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mmfuse.export.engine_build import MODULES
from mmfuse.export.tensorrt import build_tensorrt, installed, write_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="an ONNX file")
    parser.add_argument("--engine", required=True, metavar="FILE", type=Path, help="the engine to write")
    add_engine_arguments(parser)
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default the file's own")
    parser.add_argument("--timing-cache", metavar="FILE", help="measured kernels, read and brought up to date")
    parser.add_argument("--plugins", metavar="FILE", help="manifest.json of `mmfuse export kernels`")
    parser.add_argument("--tf32", action="store_true", help="products of float32 may be rounded to TF32")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", default="tensorrt", choices=list(MODULES), help="(default: %(default)s)")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME=LEAST:USUAL:LARGEST",
        help="of a free dimension; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    options = {"dtype": args.dtype, "tf32": args.tf32}
    own = {"timing_cache": args.timing_cache, "plugins": args.plugins}
    with Console(stderr=True).status(f"building {args.engine}"):
        report = engine(args.file, args.engine, args.runtime, sizes_of(args.size), options, own)
    print(json.dumps(report, indent=1) if args.json else said(report))
    return 0


def engine(
    onnx: Path, path: Path, runtime: Any, profile: Any, options: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Build it, or where that TensorRT is missing write a bundle: what was done, and what was not."""
    if runtime == "tensorrt" and not installed("tensorrt"):
        folder = write_bundle(onnx, path.with_name(path.name + ".bundle"), profile, **options)
        return {"bundle": str(folder), "built": False, "ran": False}
    built = build_tensorrt(onnx, path, profile, runtime=runtime, **options, **own)
    return {
        "engine": str(built.engine), "built": True, "graph": built.graph, "plugins": list(built.plugins),
        "ran": built.ran, "runtime": built.runtime, "seconds": built.seconds, "bytes": built.bytes,
        "inputs": built.inputs, "outputs": built.outputs,
    }  # fmt: skip


def said(report: dict[str, Any]) -> str:
    if not report["built"]:
        return (
            f"TensorRT is not installed: wrote {report['bundle']}, whose README.md has the command that builds the "
            "engine and checks it"
        )
    megabytes = report["bytes"] / 1e6
    return (
        f"wrote {report['engine']} ({megabytes:.1f} MB, {report['runtime']}, {report['seconds']:.0f} s): "
        f"{report['graph']}; not run"
    )


def sizes_of(words: list[str]) -> dict[str, tuple[int, int, int]] | None:
    """{"batch": (1, 4, 8)} of ["batch=1:4:8"]."""
    found: dict[str, tuple[int, int, int]] = {}
    for word in words:
        name, _, three = word.partition("=")
        numbers = three.split(":")
        if not name or len(numbers) != 3 or not all(n.isdigit() for n in numbers):
            raise ValueError(f"size is {word!r}, expected NAME=LEAST:USUAL:LARGEST, as in batch=1:8:32")
        least, usual, largest = map(int, numbers)
        found[name] = least, usual, largest
    return found or None
