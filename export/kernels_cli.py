"""`mmfuse export kernels`: our Triton kernels as TensorRT plugins, compiled ahead of time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from mmfuse.export.plugins import compile_plugins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="an ONNX file")
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path, help="where PTX and manifest.json go")


def run(args: argparse.Namespace) -> int:
    with Console(stderr=True).status(f"compiling the kernels of {args.file}"):
        names = compile_plugins(args.file, args.out)
    if not names:
        print(f"no node of {args.file} has a kernel that can be a plugin")
        return 1
    for name, why in json.loads((args.out / "manifest.json").read_text())["without"].items():
        print(f"{name}: none: {why}")
    for name in names:
        print(f"{name}: {args.out}/{name}.sm_*.ptx")
    return 0
