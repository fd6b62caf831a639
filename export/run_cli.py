"""`mmfuse export run`: a file in the runtime that will serve it."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmfuse.export.ort_kernels import ort_library
from mmfuse.export.require import require
from mmfuse.export.run import PROVIDERS, Run, run_onnx


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="an ONNX file")
    parser.add_argument("--provider", default="cpu", choices=[*PROVIDERS, "openvino"], help="(default: %(default)s)")
    parser.add_argument("--inputs", metavar="FILE", type=Path, help="tensors by name, safetensors; by default random")
    parser.add_argument("--outputs", metavar="FILE", type=Path, help="write the outputs there, safetensors")
    parser.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help="of a free dimension of random inputs"
    )
    parser.add_argument(
        "--ops", metavar="LIB", nargs="?", const="", help="a library of custom operators (default: mmfuse's own)"
    )
    parser.add_argument("--repeat", type=int, default=10, help="timed runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    inputs = None if args.inputs is None else _read(args.inputs)
    library, sizes = ort_library() if args.ops == "" else args.ops, _sizes(args.size)
    with Console(stderr=True).status(f"running {args.file}"):
        done = run_onnx(args.file, inputs, provider=args.provider, sizes=sizes, repeat=args.repeat, library=library)
    if args.json:
        print(json.dumps(_record(done), indent=1))
    else:
        _print(done)
    if args.outputs is not None:
        _write(done.outputs, args.outputs)
    return 0


def _read(file: Path) -> dict[str, Tensor]:
    require("safetensors")
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # safetensors has its own
        raise ValueError(f"inputs is {str(file)!r}, which cannot be read: {error}") from error


def _write(outputs: dict[str, Tensor], file: Path) -> None:
    require("safetensors")
    from safetensors.torch import save_file

    try:
        save_file({name: t.contiguous() for name, t in outputs.items()}, file)
    except Exception as error:  # safetensors has its own
        raise ValueError(f"outputs is {str(file)!r}, which cannot be written: {error}") from error


def _sizes(words: list[str]) -> dict[str, int]:
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        if not name or not number.isdigit():
            raise ValueError(f"size is {word!r}, expected NAME=N, as in batch=8")
        found[name] = int(number)
    return found


def _record(done: Run) -> dict[str, Any]:
    return {
        "provider": done.provider,
        "runtime": done.runtime,
        "milliseconds": {"median": done.median, "least": min(done.milliseconds), "runs": len(done.milliseconds)},
        "fell_back": done.fell_back,
        "nodes": done.nodes,
        "remarks": done.remarks,
        "outputs": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in done.outputs.items()
        },
    }


def _print(done: Run) -> None:
    console = Console(highlight=False)
    low, high = min(done.milliseconds), max(done.milliseconds)
    median = statistics.median(done.milliseconds)
    console.print(
        f"{done.runtime}, {done.provider}: {median:.3f} ms ({low:.3f} to {high:.3f}, {len(done.milliseconds)} runs)"
    )
    if done.fell_back is None and done.provider != "openvino":
        console.print("this onnxruntime does not tell which nodes ran on the CPU")
    elif done.fell_back:
        console.print("on the CPU: " + ", ".join(f"{kind} {count}" for kind, count in done.fell_back.items()))
    for name, why in done.nodes.items():
        console.print(f"{name}: {'the library' if why is None else f'its function, as {why}'}")
    for remark in done.remarks:
        console.print(f"[yellow]{remark}[/]")
    table = Table("output", "shape", "dtype", box=None)
    for name, t in done.outputs.items():
        table.add_row(name, str(list(t.shape)), str(t.dtype).removeprefix("torch."))
    console.print(table)
