"""`mmfuse export ops`: the operators that leave PyTorch as nodes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from mmfuse.export.plugins import PLUGINS, WITHOUT
from mmfuse.kernels._runtime import operators


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = [
        {
            "operator": name,
            "node": f"mmfuse::{op.export.onnx_name}",
            "inputs": list(op.signature.flat),
            "plugin": "yes" if name in PLUGINS else f"no: {WITHOUT[name]}",
        }
        for name, op in sorted({op.name: op for op in operators().values()}.items())
        if op.export is not None
    ]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    table = Table("operator", "node", "arguments", "TensorRT plugin", box=None)
    for row in found:
        table.add_row(row["operator"], row["node"], ", ".join(row["inputs"]), row["plugin"])
    Console(highlight=False).print(table)
    return 0
