"""`mmfuse export systems`: every reference system at a small size, exported and compared with PyTorch."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from mmfuse.export.check import check_onnx
from mmfuse.export.runtimes import RUNTIMES
from mmfuse.export.served import SERVED, export_served, served


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="MODEL", help="by default all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument(
        "--also", action="append", default=[], choices=list(RUNTIMES), help="another runtime; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    names = [served(name).name for name in args.names] or list(SERVED)
    rows = list(rows_of(track(names, transient=True), args.also))
    text = markdown(rows)
    print(json.dumps(rows, indent=1) if args.json else text)
    if args.out is not None:
        args.out.write_text(text)
    return 0 if all(row["ok"] for row in rows) else 1


def rows_of(names: Sequence[str] | Any, also: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """For each part: whether it left and holds, and the largest relative difference of onnxruntime from PyTorch.

    `also`: other runtimes, as of `check_onnx`; the row has what each did, or "no" and the reason.
    """
    for name in names:
        start = time.perf_counter()
        row: dict[str, Any] = {"model": name, "ok": False, "why": ""}
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = check_onnx(export_served(name, Path(folder, "model.onnx"), "tiny"), also=also)
                failed = [f"{c['name']}: {c['detail']}" for c in report["checks"] if not c["ok"]]
                failed += [f"{o['name']} differs" for o in report["outputs"] if not o["ok"]]
                differences = (o["difference"] / max(o["scale"], 1e-12) for o in report["outputs"])
                row |= {"ok": report["ok"], "why": "; ".join(failed), "difference": max(differences, default=0.0)}
                row |= {"ours": report["ours"]}
                row |= {
                    c["name"]: "yes" if c["ok"] else f"no: {c['detail']}" for c in report["checks"] if c["name"] in also
                }
            except (NotImplementedError, ValueError, TypeError) as error:
                row["why"] = str(error)
        yield row | {"seconds": time.perf_counter() - start}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    also = [name for name in RUNTIMES if any(name in row for row in rows)]
    head = ["model", "ONNX", "nodes of ours", "largest difference of onnxruntime, relative", *also]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        ours = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in sorted(row.get("ours", {}).items()))
        ok = "yes" if row["ok"] else f"no: {row['why']}"
        difference = f"{row['difference']:.0e}" if "difference" in row else ""
        others = [str(row.get(name, "")) for name in also]
        cells = [f"`{row['model']}`", ok, ours or "none", difference, *others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
