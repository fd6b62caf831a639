"""`mmfuse models`: the reference systems and their published sizes."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import Any

import torch

from mmfuse.models import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    rows = [_row(name, preset) for name, presets in registry.list().items() for preset in presets]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "preset", "embed dim", "resolution", "parameters", "paper", box=None)
    for column in table.columns[2:5]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(f"{value:,}" if key == "parameters" else str(value) for key, value in row.items()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)  # a pipe has no width
    return 0


def _row(name: str, preset: str) -> dict[str, Any]:
    with torch.device("meta"), warnings.catch_warnings():  # allocates nothing
        warnings.simplefilter("ignore")  # torch's and peft's, about their own layers
        model = registry.create(name, preset)
    return {
        "model": name,
        "preset": preset,
        "embed_dim": model.embed_dim,
        "resolution": model.image_resolution,
        "parameters": sum(p.numel() for p in model.parameters()),
        "paper": registry.system(name).paper,
    }
